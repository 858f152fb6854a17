"""prune: score the weights, remove the lowest by a mechanism, write a smaller or sparser model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.size import count_macs, count_nonzero, count_parameters
from prunedm.folder import Model, load, save
from prunedm.layers import prunable_layers, why_not_nm
from prunedm.masks import Pattern
from prunedm.options import PruneOptions, parse_target
from prunedm.progress import Progress, Silent
from prunedm.pruned_unet import from_resized
from prunedm.record import Record, write_json
from prunedm.removal.channel_costs import layer_positions
from prunedm.removal.channel_groups import channel_groups
from prunedm.removal.channels import plan_channels, remove_channels
from prunedm.removal.nm import nm_masks
from prunedm.removal.weights import weight_masks
from prunedm.sampling import make_sampler, sample_batches
from prunedm.stages.frame import run_stage
from prunedm.stages.inputs import (
    data_source,
    held_out_problems,
    images_for,
    score_weights,
    source_of,
)
from prunedm.stages.sample import labels_for

PICTURE_STEPS = 25  # DDIM steps of the pictures before and after
HELD_OUT = 500  # problems behind the loss before and after


def prune(
    source: str | Path,
    out: str | Path,
    options: PruneOptions = PruneOptions(),
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Prune `source` and write a model folder, `pruning_stats.json` and `vis/`."""
    progress = progress or Silent()
    model = load(source)
    if model.masks is not None:
        raise UserError(f"{source} has masks already; prune the model that they were made from")
    images = images_for(model, options, "train")
    inputs = {"model": source_of(model), "dataset": data_source(images)}

    def make(folder: Path) -> dict[str, Any]:
        figures = _prune(model, images, options, folder, progress=progress)
        save(model, folder)
        return figures

    return run_stage(
        "prune",
        out,
        options=options,
        inputs=inputs,
        parent=model.record,
        make=make,
        overwrite=overwrite,
    )


def _prune(
    model: Model, images: ImageSet, options: PruneOptions, folder: Path, *, progress: Progress
) -> dict[str, Any]:
    held_out = held_out_problems(model, options, HELD_OUT)
    layers = prunable_layers(model.denoiser, options.targets)
    before = _summary(model) | {"loss": denoising_loss(model.denoiser, held_out).mean}
    _picture(model, options, folder / "vis" / "before_pruning.png")
    scores = score_weights(model, layers, options, images, progress=progress)
    details = {"channels": _channels, "weights": _weights, "nm": _nm}[options.mechanism](
        model, layers, scores, options
    )
    if model.masks is not None:
        model.masks.check_pattern()
        model.masks.apply_(model.denoiser)
    model.round_to_dtype()
    after = _summary(model) | {"loss": denoising_loss(model.denoiser, held_out).mean}
    _picture(model, options, folder / "vis" / "after_pruning.png")
    write_json({"before": before, "after": after} | details, folder / "pruning_stats.json")
    removed = {f"{k}_removed": 1 - after[k] / before[k] for k in ("params", "nonzero", "macs")}
    shown = {key: value for key, value in details.items() if key not in ("layers", "dense")}
    return {"loss_before": before["loss"], **after, **removed, **shown}


def _channels(
    model: Model, layers: Any, scores: dict[str, torch.Tensor], options: PruneOptions
) -> dict[str, Any]:
    if options.targets:
        raise UserError("--targets narrows weights and nm; channels are coupled across the network")
    kind, ratio = parse_target(options.target)
    sample = torch.zeros(1, *model.sample_shape)
    labels = torch.zeros(1, dtype=torch.long) if model.conditional else None
    widths = {name: _width(layer) for name, layer in layers.items()}
    groups = channel_groups(model.denoiser, sample, class_labels=labels, round_to=options.round_to)
    plan = plan_channels(
        model.denoiser,
        groups,
        scores=scores,
        ratio=ratio,
        target_kind=kind,  # type: ignore[arg-type]
        positions=layer_positions(model.denoiser, sample, class_labels=labels),
        reduction=options.reduction,
        max_ratio=options.max_layer_ratio,
    )
    remove_channels(model.denoiser, plan)
    model.denoiser = from_resized(model.denoiser)  # type: ignore[arg-type]
    return {
        "requested": {kind: ratio},
        "norms_regrouped": len(plan.regrouped),
        "layers": {name: [before, _width(layers[name])] for name, before in widths.items()},
    }


def _weights(
    model: Model, layers: Any, scores: dict[str, torch.Tensor], options: PruneOptions
) -> dict[str, Any]:
    kind, ratio = parse_target(options.target)
    if kind != "params":
        raise UserError(f"--target {kind}= is for channels; weights take params={ratio:g}")
    model.masks = weight_masks(scores, ratio, scope=options.scope)
    return {"requested": {kind: ratio}, "layers": _sparsities(model)}


def _nm(
    model: Model, layers: Any, scores: dict[str, torch.Tensor], options: PruneOptions
) -> dict[str, Any]:
    pattern = Pattern.parse(options.pattern)
    model.masks = nm_masks(layers, scores, pattern)
    dense = {
        name: why_not_nm(layer, pattern.m)
        for name, layer in layers.items()
        if name not in model.masks.by_layer
    }
    return {"requested": {"pattern": str(pattern)}, "dense": dense, "layers": _sparsities(model)}


def _sparsities(model: Model) -> dict[str, float]:
    assert model.masks is not None
    return {name: 1 - float(mask.float().mean()) for name, mask in model.masks}


def _summary(model: Model) -> dict[str, Any]:
    return {
        "params": count_parameters(model.denoiser),
        "nonzero": count_nonzero(model.denoiser),
        "macs": count_macs(model.denoiser, model.sample_shape),
    }


def _width(layer: Any) -> list[int]:
    return [layer.weight.shape[1], layer.weight.shape[0]]


def _picture(model: Model, options: PruneOptions, path: Path) -> None:
    count = options.pictures
    if not count:
        return
    batches = sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, "ddim"),
        count=count,
        steps=PICTURE_STEPS,
        shape=model.sample_shape,
        seed=options.seed,
        batch_size=count,
        labels=labels_for(model, count),
    )
    images = torch.cat(list(batches)).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(exist_ok=True)
    grid(np.ascontiguousarray(images), 8).save(path)
