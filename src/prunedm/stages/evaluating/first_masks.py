"""The model that `learn` started from: the given weights under the initial masks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prunedm.data.images import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import LossEstimate
from prunedm.evaluation.paired import psnr, ssim
from prunedm.evaluation.results import Evaluation
from prunedm.folder import Model
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import LearnOptions
from prunedm.progress import Progress
from prunedm.record import Record, finite
from prunedm.removal.nm import nm_masks
from prunedm.stages.inputs import images_for, reload, score_weights
from prunedm.stages.masks import before_masks, masks_from, unmasked


def is_learned(model: Model) -> bool:
    """Whether `learn` made this folder."""
    return model.record is not None and model.record.stage == "learn" and model.masks is not None


def under_first_masks(learned: Model, *, device: str, progress: Progress) -> Model:
    """The model that `learn` was given, under the masks that it started from, found by its record.

    Masks from a score are computed again from the recorded options. Weights are those before learning,
    even where it trained them. Raises `UserError` where an input is gone or has changed.
    """
    record = learned.record
    assert record is not None
    assert learned.masks is not None
    options = LearnOptions.model_validate(record.options | {"device": device})
    given = reload(record.inputs["model"])
    model = unmasked(given, before_masks(given))
    if "masks" in record.inputs:
        masks = _masks_of_file(model, learned.masks, record, options)
    else:
        masks = given.masks or _scored(model, options, progress)
    masks.apply_(model.denoiser.cpu())
    return replace(model, masks=masks, dtype=learned.dtype)


def masks_comparison(
    first: Evaluation,
    learned: Evaluation,
    *,
    changed: float,
    losses: Sequence[np.ndarray | None],
    samples: Sequence[np.ndarray | None],
) -> dict[str, Any]:
    """The learned masks against the first ones, on the same problems and noise.

    `changed`: share of groups that differ. Losses and samples come in the order first, learned.
    """
    found: dict[str, Any] = {
        "first": first.figures.model_dump(mode="json"),
        "learned": learned.figures.model_dump(mode="json"),
        "groups_changed": changed,
    }
    before_N, after_N = losses
    if before_N is not None and after_N is not None:
        change = LossEstimate.of(torch.from_numpy(after_N) - torch.from_numpy(before_N))
        found |= {"loss_change": change.mean, "loss_change_se": change.standard_error}
    before_NHWC, after_NHWC = samples
    if before_NHWC is not None and after_NHWC is not None:
        found |= {
            "psnr_db": finite(float(np.median(psnr(after_NHWC, before_NHWC)))),
            "ssim": float(np.median(ssim(after_NHWC, before_NHWC))),
        }
    return found


def _masks_of_file(model: Model, learned: Masks, record: Record, options: LearnOptions) -> Masks:
    """The masks of the given file, projected to the pattern if they were then."""
    source = record.inputs["masks"]
    masks, found = masks_from(source.path, model.denoiser, targets=options.targets)
    if found.source.hash != source.hash:
        raise UserError(f"{source.path} has changed since it was used (hash {source.hash})")
    if masks.patterns != learned.patterns:
        pattern = Pattern.parse(options.pattern)
        masks, _ = masks_from(source.path, model.denoiser, targets=options.targets, pattern=pattern)
    return masks


def _scored(model: Model, options: LearnOptions, progress: Progress) -> Masks:
    images: ImageSet = images_for(model, options, "train")
    layers = prunable_layers(model.denoiser, options.targets)
    scores = score_weights(model, layers, options, images, progress=progress)
    return nm_masks(layers, {n: s.cpu() for n, s in scores.items()}, Pattern.parse(options.pattern))
