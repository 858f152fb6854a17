"""What stages begin with: the model, its ancestors, the dataset, problems from it, and scores."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from prunedm.data import ImageSet, load_images
from prunedm.diffusion import DenoisingProblems, ProblemBatch
from prunedm.errors import UserError
from prunedm.evaluation.loss import fixed_batches
from prunedm.folder import EMBEDDED, Model, load
from prunedm.options import DataOptions, ScoreOptions
from prunedm.progress import Progress
from prunedm.record import Record, Source
from prunedm.scores import SCORES, score_layers


def source_of(model: Model) -> Source:
    """Where a model came from, as a record names it."""
    path = Path(model.name)
    local = path.is_dir() and model.name not in EMBEDDED
    return Source(path=str(path.resolve()) if local else model.name, hash=model.hash)


def data_source(images: ImageSet) -> Source:
    return Source(path=images.name, hash=images.fingerprint())


def reload(source: Source) -> Model:
    """The model that a record names. Raises `UserError` if it is gone or is no longer the same."""
    model = load(source.path)
    if model.hash != source.hash:
        raise UserError(f"{source.path} has changed since it was used (hash {source.hash})")
    return model


def dense_source(record: Record | None) -> Source | None:
    """The model that the first stage of the lineage was given, or None where no record tells."""
    for stage in record.lineage() if record else []:
        if "model" in stage.inputs:
            return stage.inputs["model"]
    return None


def device_for(wanted: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    return torch.device("cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu")


def images_for(model: Model, options: DataOptions, split: str) -> ImageSet:
    """The options' images in the shape that the model takes."""
    channels, height, width = model.sample_shape
    if height != width:
        raise UserError(f"the model takes {height}x{width} images; only square ones are supported")
    images = load_images(
        options.dataset,
        split=split,
        size=height,
        channels=channels,
        convert=options.convert_channels,
    )
    if model.conditional and images.labels is None:
        raise UserError(f"{options.dataset!r} has no labels, and the model is class-conditional")
    return images


def training_problems(model: Model, options: DataOptions, images: ImageSet) -> DenoisingProblems:
    """The endless stream that training, learning and calibration read."""
    return DenoisingProblems(
        images,
        model.scheduler,
        seed=options.seed,
        purpose="train",
        shuffle=True,
        flip=options.flip,
        conditional=model.conditional,
    )


def held_out_problems(model: Model, options: DataOptions, count: int) -> list[ProblemBatch]:
    """Fixed problems on the test images, the same for every model and stage of one seed."""
    problems = DenoisingProblems(
        images_for(model, options, "test"),
        model.scheduler,
        seed=options.seed,
        purpose="held out",
        conditional=model.conditional,
    )
    return fixed_batches(problems, count)


def score_weights(
    model: Model,
    layers: Mapping[str, nn.Module],
    options: ScoreOptions,
    images: ImageSet,
    *,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Scores of these layers; problems are drawn only for scores that look at data."""
    batches = []
    if SCORES[options.score].needs_problems:
        problems = training_problems(model, options, images)
        batches = fixed_batches(problems, options.calibration_problems)
    return score_layers(
        model.denoiser, layers, options.score, batches=batches, seed=options.seed, progress=progress
    )
