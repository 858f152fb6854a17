"""learn: choose which N of every M weights to keep by training mask logits."""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_file

from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, save
from prunedm.learning.logits import MaskLogits, groups_changed
from prunedm.learning.trainer import Learned, learn_masks
from prunedm.masks import Masks, Pattern, save_masks
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import prunable_layers
from prunedm.options import LearnOptions
from prunedm.options.base import whole_steps
from prunedm.progress import Progress
from prunedm.record import Source
from prunedm.removal.nm import nm_masks
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import (
    DataSet,
    dense_source,
    held_out_problems,
    read_inputs,
    reload,
    score_weights,
    training_problems,
)
from prunedm.stages.masks import before_masks, masks_from, unmasked
from prunedm.stages.shown import samples
from prunedm.training.checkpoint import History
from prunedm.training.loop import make_accelerator


def learn(request: Request[LearnOptions]) -> Plan:
    """Learn N:M masks for `source` and write it with them.

    The first masks are those of `options.masks`, of the model itself, or of a score, in this order.
    A model with masks gets its removed weights back from the model it was pruned from: they are zero
    in the model itself.
    """
    progress, options = request.progress, request.options.filled()
    given, data, inputs = read_inputs(request)
    first, said = _given_masks(given, options, inputs)
    before = before_masks(given)
    model = unmasked(given, before)
    teacher = _teacher(model, before, options)
    model.masks = None

    def make(folder: Path) -> dict[str, Any]:
        for line in said:
            progress.say(line)
        masks = first or _scored_masks(model, data, options, progress)
        return _learn(model, folder, masks, teacher, data=data, options=options, progress=progress)

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


def _scored_masks(model: Model, data: DataSet, options: LearnOptions, progress: Progress) -> Masks:
    layers = prunable_layers(model.denoiser, options.targets)
    scores = score_weights(model, layers, options, data, progress=progress)
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
    data: DataSet,
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
        problems=training_problems(model, options, data, cycle=cycle),
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
    _write_learned(learned, folder, dense=dense.mean, first=before)
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


def _write_learned(learned: Learned, folder: Path, *, dense: float, first: float) -> None:
    """`learned/` with logits, the last masks and losses, and `training_curves.png`.

    logits.safetensors: the kept logits by layer, each of its weight's shape.
    masks_last.safetensors: the masks of the last step; the model has the kept ones.
    loss_training.npy: the estimator's loss at every step.
    loss_improvements.npy: (steps done, loss of the first masks minus that of the current hard masks).
    """
    place = folder / "learned"  # not part of the model or its hash
    place.mkdir(exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in learned.logits.items()},
        place / "logits.safetensors",
    )
    save_masks(learned.last, place / "masks_last.safetensors")
    np.save(place / "loss_training.npy", np.asarray(learned.history.losses), allow_pickle=False)
    improvements = [(step, first - loss) for step, loss in learned.history.held_out]
    np.save(place / "loss_improvements.npy", np.asarray(improvements), allow_pickle=False)
    _picture(learned.history, folder / "training_curves.png", dense=dense, first=first)


def _picture(history: History, path: Path, *, dense: float, first: float) -> None:
    """Four panels over the steps: losses, entropy, groups changed, compliance."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    _losses(top_left, history, dense=dense, first=first)
    for axes, key, title, percent in (
        (top_right, "entropy", "entropy of a group (nats)", False),
        (low_left, "groups_changed", "groups changed (%)", True),
        (low_right, "compliance", "groups with exactly N kept (%)", True),
    ):
        points = history.observed.get(key, [])
        axes.plot(*_columns(points, 100 if percent else 1), color="tab:blue", marker=".")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
    low_right.set_ylim(0, 105)
    figure.savefig(path, dpi=110)


def _losses(axes, history: History, *, dense: float, first: float) -> None:  # type: ignore[no-untyped-def]
    axes.plot(*_columns(history.held_out), marker=".", label="hard masks, held out")
    axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
    axes.axhline(first, color="tab:red", linestyle=":", linewidth=1, label="first masks")
    axes.set_title("loss", fontsize=10)
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


def _columns(points: Sequence[tuple[int, float]], factor: float = 1.0) -> tuple[list[float], ...]:
    return [step for step, _ in points], [factor * value for _, value in points]
