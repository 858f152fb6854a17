"""train: a dense denoising diffusion model from scratch (Ho et al. 2020), with EMA."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from prunedm.errors import UserError, nearest
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, save
from prunedm.model_files.configs import (
    SCHEDULER_RANGES,
    check_config,
    check_timesteps,
    check_unet_config,
    describe_network,
)
from prunedm.options import TrainOptions
from prunedm.options.train import WeightOptions
from prunedm.randomness import seed_for
from prunedm.recovery.objective import data_objective
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import (
    DataSet,
    data_for,
    data_source,
    held_out_problems,
    training_problems,
)
from prunedm.stages.shown import samples
from prunedm.task import Batch
from prunedm.training import processes
from prunedm.training.loop import Objective, fit, make_accelerator
from prunedm.training.tracking import Shown


def train(request: Request[TrainOptions]) -> Plan:
    """Train `options.unet` on `options.dataset` and write a model folder."""
    options, progress = request.options, request.progress
    model = _new_model(options)
    data = data_for(model, options, "train", progress)

    def make(folder: Path) -> dict[str, Any]:
        figures = fit_weights(
            model,
            data,
            options,
            folder / RESUME,
            accelerator=make_accelerator(options),
            held_out=held_out_problems(model, options, options.validation_problems),
            progress=progress,
            label="training",
        )
        save(model, folder)
        return figures

    return Plan(options=options, inputs={"dataset": data_source(data)}, make=make)


def _new_model(options: TrainOptions) -> Model:
    if not options.unet:
        raise UserError(
            "no architecture: give --preset digits, or a `unet:` table in --config FILE"
        )
    unet = options.unet | {"dropout": options.dropout}
    torch.manual_seed(seed_for(options.seed, "weights"))
    denoiser = _from_config(UNet2DModel, unet, "unet")
    scheduler = _from_config(DDPMScheduler, options.scheduler, "scheduler")
    check_timesteps(unet, scheduler, "unet")
    return Model(
        denoiser,
        scheduler,
        name="scratch",
        dtype=getattr(torch, options.save_dtype),
    )


def _from_config(cls: Any, config: dict[str, Any], what: str) -> Any:
    """diffusers would ignore an unknown option or another class; these are errors here."""
    wanted = config.get("_class_name", cls.__name__)
    if wanted != cls.__name__:
        raise UserError(
            f"{what}._class_name = {wanted!r}: train takes {cls.__name__}; leave it out"
        )
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for name in config:
        if name not in (*known, "_class_name", "_diffusers_version"):
            raise UserError(f"unknown option '{what}.{name}'{nearest(name, known)}")
    if cls is UNet2DModel:
        check_unet_config(config, what)
        describe_network(config | {"_class_name": wanted}, what)
    else:
        check_config(config, cls, what, SCHEDULER_RANGES)
    try:
        return cls.from_config(config)
    except (ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise UserError(f"diffusers refuses this {what}: {str(error).splitlines()[0]}") from error


def fit_weights(
    model: Model,
    data: DataSet,
    options: WeightOptions,
    resume: Path,
    *,
    accelerator: Accelerator,
    held_out: Sequence[Batch],
    objective: Objective = data_objective,
    cycle: int = 0,
    **named: Any,
) -> dict[str, Any]:
    """Train the model's weights; returns the held-out loss and curves as a record's figures.

    cycle: problems after which the training stream repeats; 0: never. named: further arguments of
    `fit`.
    """
    device = accelerator.device
    history = fit(
        model.denoiser,
        objective,
        problems=training_problems(model, options, data, cycle=cycle),
        options=options,
        accelerator=accelerator,
        checkpoint=resume / "checkpoint.safetensors",
        validate=lambda m: denoising_loss(m, held_out, device=device).mean,
        show=lambda _: Shown(images=samples(model, options, device)),
        compiles=options.compile,
        **named,
    )
    model.round_to_dtype()
    final = denoising_loss(model.denoiser, held_out, device=device)
    model.denoiser.to("cpu")
    figures = {"loss": final.mean, "loss_se": final.standard_error}
    return figures | processes.as_figures() | history.as_figures()
