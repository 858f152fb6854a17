"""learn: choose which N of every M weights to keep by training mask logits."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, save
from prunedm.learning.logits import MaskLogits, groups_changed
from prunedm.learning.trainer import learn_masks
from prunedm.masks import Masks, Pattern
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import prunable_layers
from prunedm.options import LearnOptions
from prunedm.options.base import whole_steps
from prunedm.progress import Progress
from prunedm.record import Source
from prunedm.removal.nm import nm_masks
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import (
    dense_source,
    held_out_problems,
    read_inputs,
    reload,
    score_weights,
    training_problems,
)
from prunedm.stages.learned import write_learned
from prunedm.stages.masks import before_masks, masks_from, unmasked
from prunedm.stages.shown import samples
from prunedm.training.loop import make_accelerator


def learn(request: Request[LearnOptions]) -> Plan:
    """Learn N:M masks for `source` and write it with them.

    The first masks are those of `options.masks`, of the model itself, or of a score, in this order.
    A model with masks gets its removed weights back from the model it was pruned from: they are zero
    in the model itself.
    """
    progress, options = request.progress, request.options.filled()
    given, images, inputs = read_inputs(request)
    first, said = _given_masks(given, options, inputs)
    before = before_masks(given)
    model = unmasked(given, before)
    teacher = _teacher(model, before, options)
    model.masks = None

    def make(folder: Path) -> dict[str, Any]:
        for line in said:
            progress.say(line)
        masks = first or _scored_masks(model, images, options, progress)
        return _learn(
            model, folder, masks, teacher, images=images, options=options, progress=progress
        )

    return Plan(options=options, inputs=inputs, parent=given.record, make=make)


def _given_masks(
    model: Model, options: LearnOptions, inputs: dict[str, Source]
) -> tuple[Masks | None, list[str]]:
    """The masks given by option or by the model, projected to N:M if necessary; and lines about it."""
    named = "pattern" in options.model_fields_set
    pattern = Pattern.parse(options.pattern)
    if options.masks:
        take = partial(masks_from, options.masks, model.denoiser, targets=options.targets)
        masks, found = take(pattern=pattern if named else None)
        if len(masks.patterns) < len(masks.by_layer):
            masks, found = take(pattern=pattern)
        inputs["masks"] = found.source
        return masks, found.lines()
    if model.masks is None:
        return None, []
    if len(model.masks.patterns) < len(model.masks.by_layer):
        raise UserError(
            f"{model.name} has unstructured masks; give learn the model before masking, with "
            f"--masks {model.name}, and they are projected to --pattern"
        )
    if named and options.pattern != model.masks.pattern_text:
        raise UserError(
            f"pattern = {options.pattern!r}, but the model has {model.masks.pattern_text} masks; "
            "prune with the pattern you want, or give learn the model before masking"
        )
    layers = prunable_layers(model.denoiser, options.targets)
    outside = [name for name, _ in model.masks if name not in layers]
    if outside:
        raise UserError(
            f"--targets leaves out masked layers, first {outside[0]}; give learn the model before "
            "masking, or all of its masked layers"
        )
    return model.masks, []


def _scored_masks(
    model: Model, images: ImageSet, options: LearnOptions, progress: Progress
) -> Masks:
    layers = prunable_layers(model.denoiser, options.targets)
    scores = score_weights(model, layers, options, images, progress=progress)
    model.denoiser.to("cpu")
    return nm_masks(layers, scores, Pattern.parse(options.pattern))


def _teacher(model: Model, before: Model, options: LearnOptions) -> Any:
    """The model whose output is the target, or None for the unmasked model itself.

    With trained weights it is the lineage's dense model. Where kept weights changed under their
    masks (OBS, fine-tuning), they make no sensible model together with the removed ones, so the
    target is the model from before the masks.
    """
    if options.train_weights:
        source = dense_source(model.record) if model.masks is not None else None
        return deepcopy(model.denoiser) if source is None else reload(source).denoiser
    pairs = zip(model.denoiser.parameters(), before.denoiser.parameters(), strict=True)
    same = all(torch.equal(now, then) for now, then in pairs)
    return None if same else before.denoiser


def _learn(
    model: Model,
    folder: Path,
    first: Masks,
    teacher: Any,
    *,
    images: ImageSet,
    options: LearnOptions,
    progress: Progress,
) -> dict[str, Any]:
    held_out = held_out_problems(model, options, options.validation_problems)
    accelerator = make_accelerator(options)
    device = accelerator.device
    model.denoiser.to(device)
    dense = denoising_loss(
        teacher.to(device) if teacher else model.denoiser, held_out, device=device
    )

    def hard_loss(masks: Masks) -> float:
        with masks.applied(model.denoiser):
            return denoising_loss(model.denoiser, held_out, device=device).mean

    def pictures(masks: Masks) -> dict[str, np.ndarray]:
        with masks.applied(model.denoiser):
            return samples(model, options, device)

    scores = {name: weight_of(model.denoiser.get_submodule(name)).detach() for name, _ in first}
    cycle = whole_steps(options.dataset_size, options, accelerator.num_processes)
    learned = learn_masks(
        model.denoiser,
        MaskLogits(first, scores, lead=options.logits or 0.0),
        teacher=teacher,
        problems=training_problems(model, options, images, cycle=cycle),
        options=options,
        accelerator=accelerator,
        resume=folder / RESUME,
        progress=progress,
        hard_loss=hard_loss,
        pictures=pictures,
    )
    model.masks = learned.masks
    model.masks.apply_(model.denoiser)
    model.round_to_dtype()
    after = denoising_loss(model.denoiser.to(device), held_out, device=device)
    model.denoiser.to("cpu")
    save(model, folder)
    (_, before), *_ = learned.history.held_out
    write_learned(learned, folder, dense=dense.mean, first=before)
    gap = before - dense.mean
    return {
        "loss_dense": dense.mean,
        "loss_first_masks": before,
        "loss": after.mean,
        "loss_se": after.standard_error,
        "gap_closed": (before - after.mean) / gap if gap > 0 else None,
        "groups_changed": groups_changed(first, learned.masks),
        "compliance": learned.masks.compliance,
    } | learned.history.as_figures()
