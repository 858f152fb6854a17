"""learn: which N of every M weights to keep, found by training mask logits on frozen weights."""

from pathlib import Path
from typing import Any

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.layers import prunable_layers
from prunedm.learning.relaxation import RelaxedMasks
from prunedm.learning.trainer import Learned, learn_masks
from prunedm.masks import Masks, Pattern
from prunedm.options import LearnOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record
from prunedm.removal.nm import nm_masks
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import (
    data_source,
    held_out_problems,
    images_for,
    reload,
    score_weights,
    source_of,
    training_problems,
)
from prunedm.training.loop import make_accelerator


def learn(
    source: str | Path,
    out: str | Path,
    options: LearnOptions = LearnOptions(),
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Learn N:M masks for `source` and write it with them.

    A model that has N:M masks already gives the first masks; its weights are taken from the model
    it was pruned from, since a weight that was zeroed cannot come back.
    """
    progress = progress or Silent()
    given = load(source)
    model = _unmasked(given)
    images = images_for(model, options, "train")

    def make(folder: Path) -> dict[str, Any]:
        figures = _learn(
            model,
            masks=given.masks,
            images=images,
            options=options,
            resume=folder / RESUME,
            progress=progress,
        )
        save(model, folder)
        return figures

    return run_stage(
        "learn",
        out,
        options=options,
        inputs={"model": source_of(given), "dataset": data_source(images)},
        parent=given.record,
        make=make,
        overwrite=overwrite,
    )


def _unmasked(given: Model) -> Model:
    """The given model, or, where it is masked, the one whose weights were masked."""
    if given.masks is None:
        return given
    if given.masks.pattern is None:
        found = f"masks of several kinds ({given.masks.pattern_text})" * bool(given.masks.patterns)
        raise UserError(
            f"{given.name} has {found or 'unstructured masks'}; learn wants one N:M pattern for all; "
            "finetune it, or prune with one --pattern"
        )
    if given.record is None or given.record.stage not in ("prune", "learn"):
        raise UserError(
            f"{given.name} does not say which model its masks were applied to: give learn the "
            "model before masking"
        )
    if str(given.record.options.get("mechanism", "")).startswith("obs"):
        raise UserError(
            f"{given.name} was pruned by OBS, whose moved weights learn would undo; finetune it, or "
            "give learn a model pruned with --mechanism nm"
        )
    if given.record.options.get("permute"):
        raise UserError(
            f"{given.name} had its channels reordered when it was pruned, so no model on disk has "
            "the weights under its masks; give learn one that was pruned without --permute"
        )
    parent = reload(given.record.inputs["model"])
    return _unmasked(parent) if given.record.stage == "learn" else parent


def _learn(
    model: Model,
    *,
    masks: Masks | None,
    images: ImageSet,
    options: LearnOptions,
    resume: Path,
    progress: Progress,
) -> dict[str, Any]:
    relaxed = _relaxed_masks(model, masks, images, options, progress)
    held_out = held_out_problems(model, options, options.validation_problems)
    dense = denoising_loss(model.denoiser, held_out)
    weights = {n: p.detach().clone() for n, p in model.denoiser.named_parameters()}
    accelerator = make_accelerator(options)
    model.denoiser.to(accelerator.device)

    def hard_loss(masks: Masks) -> float:
        masks.apply_(model.denoiser)
        loss = denoising_loss(model.denoiser, held_out, device=accelerator.device).mean
        for name, parameter in model.denoiser.named_parameters():
            parameter.data.copy_(weights[name])
        return loss

    first = hard_loss(relaxed.mode())
    learned = learn_masks(
        model.denoiser,
        relaxed,
        problems=training_problems(model, options, images),
        options=options,
        accelerator=accelerator,
        checkpoint=resume / "checkpoint.safetensors",
        progress=progress,
        hard_loss=hard_loss,
    )
    model.masks = learned.masks
    model.masks.apply_(model.denoiser)
    after = denoising_loss(model.denoiser, held_out)
    return _figures(dense.mean, first, after.mean, after.standard_error, learned)


def _relaxed_masks(
    model: Model, masks: Masks | None, images: ImageSet, options: LearnOptions, progress: Progress
) -> RelaxedMasks:
    """Logits that start from the model's masks, or from the score's."""
    layers = prunable_layers(model.denoiser, options.targets)
    scores = score_weights(model, layers, options, images, progress=progress)
    if masks is None:
        masks = nm_masks(layers, scores, Pattern.parse(options.pattern))
    else:
        if "pattern" in options.model_fields_set and options.pattern != str(masks.pattern):
            raise UserError(
                f"pattern = {options.pattern!r}, but the model has {masks.pattern} masks; "
                "prune with the pattern you want, or give learn the model before masking"
            )
        outside = [name for name, _ in masks if name not in layers]
        if outside:
            raise UserError(
                f"--targets leaves out masked layers, first {outside[0]}; give learn the model "
                "before masking, or all of its masked layers"
            )
    return RelaxedMasks(masks, scores, strength=options.strength)


def _figures(
    dense: float, first: float, after: float, error: float, learned: Learned
) -> dict[str, Any]:
    gap = first - dense
    return {
        "loss_dense": dense,
        "loss_first_masks": first,
        "loss": after,
        "loss_se": error,
        "gap_closed": (first - after) / gap if gap > 0 else None,
        "groups_changed": learned.groups_changed,
    } | learned.history.as_figures()
