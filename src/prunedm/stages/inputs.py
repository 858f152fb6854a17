"""Inputs of stages: the model, its ancestors, the dataset, problems made from it, and scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunedm.data.images import ImageSet, is_embedded, load_images
from prunedm.errors import UserError
from prunedm.evaluation.loss import fixed_batches
from prunedm.folder import Model, load
from prunedm.hub import EMBEDDED
from prunedm.options import CalibrationOptions, DataOptions, ModelOptions, ScoreOptions
from prunedm.progress import Progress
from prunedm.record import Record, Source, file_hash
from prunedm.scores import Calibration, score_layers
from prunedm.stages.frame import Request
from prunedm.task import Batch
from prunedm.task.denoising import Denoising
from prunedm.training import processes


def source_of(model: Model) -> Source:
    """A model as an input of a record."""
    path = Path(model.name)
    local = path.is_dir() and model.name not in EMBEDDED
    return Source(path=str(path.resolve()) if local else model.name, hash=model.hash)


def given_model(source: str | Path, options: ModelOptions, progress: Progress) -> Model:
    """The model with the options' noise schedule; says what was chosen or assumed for it."""
    model = load(source, scheduler=options.scheduler)
    for note in model.notes:
        progress.say(note)
    return model


def model_sources(model: Model) -> dict[str, Source]:
    """The model as an input, and the noise schedule file if one was given."""
    given = model.scheduler_file
    return {"model": source_of(model)} | ({"scheduler": file_source(given)} if given else {})


def file_source(path: Path) -> Source:
    return Source(path=str(path.resolve()), hash=file_hash(path))


def data_source(images: ImageSet) -> Source:
    return Source(path=images.name, hash=images.fingerprint())


def reload(source: Source, *, like: Model | None = None) -> Model:
    """The model that a record names. Raises `UserError` if it is gone or has changed.

    like: a model made from it, whose noise schedule it gets where it has none of its own.
    """
    model = load(source.path)
    if like is not None and model.scheduler_assumed:
        model.scheduler = like.scheduler
    if model.hash != source.hash:
        raise UserError(f"{source.path} has changed since it was used (hash {source.hash})")
    return model


def dense_source(record: Record | None) -> Source | None:
    """The input model of the lineage's first stage, or None where no record names one."""
    for stage in record.lineage() if record else []:
        if "model" in stage.inputs:
            return stage.inputs["model"]
    return None


def read_inputs(
    request: Request[Any], split: str = "train"
) -> tuple[Model, ImageSet, dict[str, Source]]:
    """The model and the images of a split that a request names, and both as inputs of a record."""
    options, progress = request.options, request.progress
    model = given_model(request.source, options, progress)
    images = images_for(model, options, split, progress)
    return model, images, {**model_sources(model), "dataset": data_source(images)}


def device_for(wanted: str) -> torch.device:
    """ "auto" is a GPU if there is one; several processes on a machine each take their own."""
    if wanted != "auto" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.count() == 1:
        return torch.device("cuda")
    return torch.device("cuda", processes.local_rank() % torch.cuda.device_count())


def images_for(
    model: Model, options: DataOptions, split: str, progress: Progress | None = None
) -> ImageSet:
    """The options' images in the model's shape; says which are left out.

    Raises `UserError` where the model takes no images.
    """
    if model.unasked:
        raise UserError(model.unasked)
    channels, height, width = model.codec.image_shape
    if options.convert_channels and channels not in (1, 3):
        raise UserError(
            f"the model takes images of {channels} channels, and --convert-channels makes 1 or 3; "
            "give images that have them (RGBA is 4, gray with alpha 2), and leave it out"
        )
    images = load_images(
        options.dataset,
        split=split,
        size=height if height == width else (height, width),
        channels=channels,
        convert=options.convert_channels,
        labels="needed" if model.conditional else "none",
        captions=model.condition.captions,
        label_column=options.label_column,
        caption_column=options.caption_column,
        image_column=options.image_column,
    )
    model.condition.check(images)
    if progress is not None and not is_embedded(options.dataset):
        rest = f"; not among them: {images.left_out}" * bool(images.left_out)
        progress.say(f"{images.name}: {len(images):,} images, {_USE.get(split, split)}{rest}")
    return images


_USE = {"train": "to train on", "test": "held out"}


def training_problems(
    model: Model,
    options: DataOptions,
    images: ImageSet,
    *,
    time_range: tuple[int, int] | None = None,
    cycle: int = 0,
) -> Denoising:
    """The stream for training, learning and calibration: endless, or repeating after `cycle`."""
    return _problems(
        images,
        model,
        seed=options.seed,
        purpose="train",
        shuffle=True,
        flip=options.flip,
        time_range=time_range,
        cycle=cycle,
    )


def held_out_problems(model: Model, options: DataOptions, count: int) -> list[Batch]:
    """Fixed problems on the test images: the same for every model and stage with one seed."""
    problems = problems_on(images_for(model, options, "test"), model, options.seed)
    return fixed_batches(problems, count)


def problems_on(images: ImageSet, model: Model, seed: int) -> Denoising:
    """The endless stream that begins with the held-out problems."""
    model.condition.check(images)
    return _problems(images, model, seed=seed, purpose="held out")


def _problems(images: ImageSet, model: Model, **how: Any) -> Denoising:
    return Denoising(images, model.process, codec=model.codec, condition=model.condition, **how)


def calibration_problems(model: Model, options: CalibrationOptions, images: ImageSet) -> Denoising:
    """The training stream, restricted to the options' timesteps."""
    return training_problems(
        model, options, images, time_range=model.process.time_range(options.time_range)
    )


def score_weights(
    model: Model,
    layers: Mapping[str, nn.Module],
    options: ScoreOptions,
    images: ImageSet | None,
    *,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The options' score of these layers, on the options' device.

    images: to make problems from, if the score needs them.
    """
    device = device_for(options.device)
    calibration = None
    if images is not None:
        calibration = Calibration(
            problems=calibration_problems(model, options, images),
            count=options.calibration_problems,
            batch_size=options.calibration_batch,
            time_bins=options.time_bins,
            over_time=options.wanda.over_time,
            over_problems=options.wanda.over_problems,
            sweep_images=options.diff_pruning.sweep_images,
            stop_below=options.diff_pruning.stop_below,
        )
    return score_layers(
        model.denoiser.to(device),
        layers,
        options.score,
        calibration=calibration,
        seed=options.seed,
        progress=progress,
    )
