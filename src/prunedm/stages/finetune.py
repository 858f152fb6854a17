"""finetune: train the weights that are left; masks hold exactly, in weights and EMA."""

from pathlib import Path
from typing import Any

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.options import FinetuneOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record, Source
from prunedm.recovery.distill import recovery_objective
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import (
    data_source,
    dense_source,
    held_out_problems,
    images_for,
    reload,
    source_of,
    training_problems,
)
from prunedm.training.loop import fit, make_accelerator


def finetune(
    source: str | Path,
    out: str | Path,
    options: FinetuneOptions = FinetuneOptions(),
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Train `source`'s weights and write a model folder of the same shape and masks."""
    progress = progress or Silent()
    model = load(source)
    images = images_for(model, options, "train")
    teacher = find_teacher(model, options.teacher, progress)
    inputs: dict[str, Source] = {"model": source_of(model), "dataset": data_source(images)}
    if teacher is not None:
        inputs["teacher"] = source_of(teacher)

    def make(folder: Path) -> dict[str, Any]:
        figures = _finetune(
            model,
            teacher=teacher,
            images=images,
            options=options,
            resume=folder / RESUME,
            progress=progress,
        )
        save(model, folder)
        return figures

    return run_stage(
        "finetune",
        out,
        options=options,
        inputs=inputs,
        parent=model.record,
        make=make,
        overwrite=overwrite,
    )


def find_teacher(model: Model, wanted: str, progress: Progress) -> Model | None:
    """The teacher: a model by name, or ("auto") the dense one of the lineage if it is still there."""
    if wanted == "none":
        return None
    if wanted != "auto":
        return load(wanted)
    source = dense_source(model.record)
    if source is None:
        progress.say("no dense parent on record: training on the data loss alone")
        return None
    try:
        return reload(source)
    except UserError as error:
        progress.say(f"no teacher ({error}): training on the data loss alone")
        return None


def _finetune(
    model: Model,
    *,
    teacher: Model | None,
    images: ImageSet,
    options: FinetuneOptions,
    resume: Path,
    progress: Progress,
) -> dict[str, Any]:
    held_out = held_out_problems(model, options, options.validation_problems)
    accelerator = make_accelerator(options)
    model.denoiser.to(accelerator.device)
    if teacher is not None:
        teacher.denoiser.to(accelerator.device).eval().requires_grad_(False)
    hold = model.masks.hold(model.denoiser) if model.masks else lambda: None
    before = denoising_loss(model.denoiser, held_out, device=accelerator.device)
    history = fit(
        model.denoiser,
        recovery_objective(teacher.denoiser if teacher else None, options.distill),
        problems=training_problems(model, options, images),
        options=options,
        accelerator=accelerator,
        checkpoint=resume / "checkpoint.safetensors",
        progress=progress,
        label="fine-tuning",
        after_step=lambda _: hold(),
        validate=lambda m: denoising_loss(m, held_out, device=accelerator.device).mean,
    )
    model.denoiser.to("cpu")
    model.round_to_dtype()
    after = denoising_loss(model.denoiser, held_out)
    return {
        "loss_before": before.mean,
        "loss": after.mean,
        "loss_se": after.standard_error,
    } | history.as_figures()
