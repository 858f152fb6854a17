"""finetune: train the remaining weights; masks hold exactly, in weights and EMA."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from prunedm.architecture import answer
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.hub import find
from prunedm.learning.memo import Memo
from prunedm.masks import Masks
from prunedm.options import FinetuneOptions
from prunedm.options.base import whole_steps
from prunedm.progress import Progress
from prunedm.record import Source, read_record
from prunedm.recovery.objective import Mixture, data_objective, recovery_objective
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import (
    DataSet,
    dense_source,
    held_out_problems,
    read_inputs,
    reload,
    source_of,
)
from prunedm.stages.verbs.train import fit_weights
from prunedm.system.places import target
from prunedm.training.loop import Objective, make_accelerator

GIB = 1 << 30


def finetune(request: Request[FinetuneOptions]) -> Plan:
    """Train `source`'s weights and write a model folder of the same shape and masks."""
    options, progress = request.options, request.progress
    model, data, inputs = read_inputs(request)
    _check_dropout(model, options)
    teacher = known = None
    if not request.overwrite:
        known = _teacher_of_result(target(request.out), model, options)
    if known is None:
        teacher = find_teacher(model, options.teacher, progress)
        if teacher is not None:
            _check_teacher(model, teacher)
            known = source_of(teacher)
    if known is not None:
        inputs["teacher"] = known

    def make(folder: Path) -> dict[str, Any]:
        network = teacher
        if network is None and known is not None:  # that of an `out` to be replaced
            network = reload(known, like=model)
        figures = _finetune(
            model, network, data, options, resume=folder / RESUME, progress=progress
        )
        save(model, folder)
        return figures

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _teacher_of_result(out: Path, model: Model, options: FinetuneOptions) -> Source | None:
    """The teacher on record of a finished `out`, if it is the one asked for.

    A finished stage is thus recognized even when its teacher is gone.
    """
    found = read_record(out) if out.is_dir() else None
    if found is None or found.stage != "finetune" or "teacher" not in found.inputs:
        return None
    teacher = found.inputs["teacher"]
    if options.teacher == "auto":
        dense = dense_source(model.record)
        return teacher if dense is not None and teacher.hash == dense.hash else None
    if found.options.get("teacher") != options.teacher or _is_there(options.teacher):
        return None
    return teacher


def _is_there(model: str) -> bool:
    try:
        find(model)
    except UserError:
        return False
    return True


def _check_teacher(model: Model, teacher: Model) -> None:
    """Raise `UserError` where the model cannot be trained towards the teacher's outputs."""
    if what := teacher.differs_from(model):
        raise UserError(
            f"teacher {teacher.name} and {model.name} have other {what}; give another --teacher"
        )
    if model.scheduler is not None and (other := model.process.differs_from(teacher.process)):
        raise UserError(
            f"teacher {teacher.name} was trained with another {other}; give another --teacher"
        )


def _reorderings(model: Model) -> list[str]:
    """Hashes of the ancestors whose channels were reordered by pruning."""
    stages = model.record.lineage() if model.record else []
    return [s.inputs["model"].hash for s in stages if s.options.get("permute")]


def _check_dropout(model: Model, options: FinetuneOptions) -> None:
    own = float(getattr(model.denoiser.config, "dropout", None) or 0.0)
    if options.match_sensitivity and options.dropout is None and own:
        raise UserError(
            f"{model.name} has dropout {own:g}, which would drown responses to small changes; "
            "give --dropout 0"
        )


def find_teacher(model: Model, wanted: str, progress: Progress) -> Model | None:
    """The teacher: a model by name, or for "auto" the lineage's dense model if it still exists."""
    if wanted == "none":
        return None
    if wanted != "auto":
        teacher = load(wanted)
        if teacher.scheduler_assumed:
            teacher.scheduler = model.scheduler
        return teacher
    source = dense_source(model.record)
    if source is None:
        progress.say("no dense parent on record: training on the data loss alone")
        return None
    try:
        return reload(source, like=model)
    except UserError as error:
        progress.say(f"no teacher ({error}): training on the data loss alone")
        return None


def _finetune(
    model: Model,
    teacher: Model | None,
    data: DataSet,
    options: FinetuneOptions,
    *,
    resume: Path,
    progress: Progress,
) -> dict[str, Any]:
    held_out = held_out_problems(model, options, options.validation_problems)
    accelerator = make_accelerator(options)
    device = accelerator.device
    model.denoiser.to(device)
    hold = model.masks.hold(model.denoiser) if model.masks else lambda: None
    before = denoising_loss(model.denoiser, held_out, device=device)
    with (
        dropout(model.denoiser, options.dropout),
        _objective(model, teacher, options, device) as objective,
    ):
        figures = fit_weights(
            model,
            data,
            options,
            resume,
            accelerator=accelerator,
            held_out=held_out,
            objective=objective,
            cycle=whole_steps(options.dataset_size, options, accelerator.num_processes),
            progress=progress,
            label="fine-tuning",
            after_step=lambda _: hold(),
            observe=lambda m: observed(m, model.masks) if model.masks else {},
        )
    return {"loss_before": before.mean} | figures


def _objective(
    model: Model, teacher: Model | None, options: FinetuneOptions, device: torch.device
) -> AbstractContextManager[Objective]:
    if teacher is None:
        return nullcontext(data_objective)
    network = teacher.denoiser.to(device).eval().requires_grad_(False)
    known = Memo(int(options.memo_memory * GIB) if options.dataset_size else 0)
    return recovery_objective(
        model.denoiser,
        network,
        Mixture(
            output=options.distill,
            features=options.match_features,
            sensitivity=options.match_sensitivity,
            every=options.sensitivity.every,
            size=options.sensitivity.size,
            seed=options.seed,
            reordered=_reorderings(model) != _reorderings(teacher),
        ),
        outputs=lambda batch: known(batch, lambda b: answer(network, b.inputs)),
    )


@contextmanager
def dropout(denoiser: nn.Module, p: float | None) -> Iterator[None]:
    """Set the residual blocks' dropout to `p` while the context lasts; None leaves it."""
    layers = [m.dropout for m in denoiser.modules() if isinstance(m, ResnetBlock2D)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = layer.p if p is None else p
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.p = own


def observed(denoiser: nn.Module, masks: Masks) -> dict[str, float]:
    """The share of zeros in masked layers, and of N:M groups with at most N nonzeros."""
    weights = [denoiser.get_parameter(f"{name}.weight") for name, _ in masks]
    figures = {"sparsity": 1 - sum(int(torch.count_nonzero(w)) for w in weights) / masks.total}
    if (valid := masks.validity(denoiser)) is not None:
        figures["compliance"] = valid
    return figures
