"""Inputs of stages: the model, its ancestors, the dataset, problems made from it, and scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunedm.architectures.causal_lm import window
from prunedm.data.images import ImageSet, is_embedded, load_images
from prunedm.data.texts import TextSet, load_texts
from prunedm.errors import UserError
from prunedm.evaluation.loss import fixed_batches
from prunedm.folder import Model, load
from prunedm.hub import EMBEDDED
from prunedm.options import CalibrationOptions, DataOptions, ModelOptions, ScoreOptions
from prunedm.progress import Progress
from prunedm.record import Record, Source, file_hash
from prunedm.scores import Calibration, score_layers
from prunedm.stages.frame import Request
from prunedm.task import Batch, Task
from prunedm.task.denoising import Denoising
from prunedm.task.next_token import NextToken
from prunedm.training import processes

DataSet = ImageSet | TextSet


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


def data_source(data: DataSet) -> Source:
    return Source(path=data.name, hash=data.fingerprint())


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
) -> tuple[Model, DataSet, dict[str, Source]]:
    """The model and the data of a split that a request names, and both as inputs of a record."""
    options, progress = request.options, request.progress
    model = given_model(request.source, options, progress)
    data = data_for(model, options, split, progress)
    return model, data, {**model_sources(model), "dataset": data_source(data)}


def device_for(wanted: str) -> torch.device:
    """ "auto" is a GPU if there is one; several processes on a machine each take their own."""
    if wanted != "auto" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.count() == 1:
        return torch.device("cuda")
    return torch.device("cuda", processes.local_rank() % torch.cuda.device_count())


def data_for(
    model: Model, options: DataOptions, split: str, progress: Progress | None = None
) -> DataSet:
    """The options' images in the model's shape, or texts in its tokens; says what is left out.

    Raises `UserError` where the model takes none.
    """
    read = texts_for if model.architecture.text else images_for
    data = read(model, options, split)
    if progress is not None and not is_embedded(options.dataset):
        rest = f"; not among them: {data.left_out}" * bool(data.left_out)
        what = f"sequences of {data.length:,} tokens" if isinstance(data, TextSet) else "images"
        progress.say(f"{data.name}: {len(data):,} {what}, {_USE.get(split, split)}{rest}")
    return data


def texts_for(model: Model, options: DataOptions, split: str) -> TextSet:
    """The options' texts in the model's tokens."""
    if is_embedded(options.dataset):
        raise UserError(
            f"{model.name} is a language model and reads texts; give --dataset: a text file, a folder "
            "or a hub id (wikitext, c4)"
        )
    assert model.tokenizer is not None
    known = getattr(model.denoiser.config, "max_position_embeddings", None)
    length = options.length or window(model.denoiser)
    if known and length > known:
        raise UserError(
            f"--length {length}: {model.name} has {known} positions; give at most so many"
        )
    return load_texts(
        options.dataset,
        split=split,
        tokenize=model.tokenizer,
        length=length,
        vocabulary=model.denoiser.config.vocab_size,
        column=options.text_column,
    )


def images_for(model: Model, options: DataOptions, split: str) -> ImageSet:
    """The options' images in the model's shape. Raises `UserError` where the model takes none."""
    if model.unasked:
        raise UserError(model.unasked)
    if model.architecture.text:
        raise UserError(f"{model.name} is a language model, and this needs images")
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
    return images


_USE = {"train": "to train on", "test": "held out"}


def training_problems(
    model: Model,
    options: DataOptions,
    data: DataSet,
    *,
    time_range: tuple[int, int] | None = None,
    cycle: int = 0,
) -> Task:
    """The stream for training, learning and calibration: endless, or repeating after `cycle`."""
    how: dict[str, Any] = {"purpose": "train", "shuffle": True, "cycle": cycle}
    if isinstance(data, TextSet):
        return _next_token(data, model, options.seed, **how)
    return _denoising(data, model, options.seed, flip=options.flip, time_range=time_range, **how)


def held_out_problems(model: Model, options: DataOptions, count: int) -> list[Batch]:
    """Fixed problems on the test data: the same for every model and stage with one seed."""
    data = data_for(model, options, "test")
    return fixed_batches(problems_on(data, model, options.seed), held_out_count(data, count))


def held_out_count(data: DataSet, wanted: int) -> int:
    """So many problems; of texts at most one a sequence, for only noise makes new ones of old."""
    return min(wanted, len(data)) if isinstance(data, TextSet) else wanted


def problems_on(data: DataSet, model: Model, seed: int) -> Task:
    """The endless stream that begins with the held-out problems."""
    if isinstance(data, TextSet):
        return _next_token(data, model, seed, purpose="held out")
    model.condition.check(data)
    return _denoising(data, model, seed, purpose="held out")


def _next_token(texts: TextSet, model: Model, seed: int, **how: Any) -> NextToken:
    vocabulary = model.denoiser.config.vocab_size
    return NextToken(texts.tokens_SL, vocabulary=vocabulary, seed=seed, **how)


def _denoising(images: ImageSet, model: Model, seed: int, **how: Any) -> Denoising:
    return Denoising(
        images, model.process, codec=model.codec, condition=model.condition, seed=seed, **how
    )


def calibration_problems(model: Model, options: CalibrationOptions, data: DataSet) -> Task:
    """The training stream, restricted to the options' timesteps."""
    text = model.architecture.text
    time_range = None if text else model.process.time_range(options.time_range)
    return training_problems(model, options, data, time_range=time_range)


def time_bins(model: Model, options: CalibrationOptions) -> int:
    """Of activations: one where there are no noise levels."""
    return 1 if model.architecture.text else options.time_bins


def score_weights(
    model: Model,
    layers: Mapping[str, nn.Module],
    options: ScoreOptions,
    data: DataSet | None,
    *,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """The options' score of these layers, on the options' device.

    data: to make problems from, if the score needs them.
    """
    return score_layers(
        model.denoiser.to(device_for(options.device)),
        layers,
        options.score,
        calibration=calibration_for(model, options, data) if data is not None else None,
        seed=options.seed,
        progress=progress,
    )


def calibration_for(model: Model, options: ScoreOptions, data: DataSet) -> Calibration:
    """What the options' score is measured on, and how."""
    return Calibration(
        problems=calibration_problems(model, options, data),
        count=options.calibration_problems,
        batch_size=options.calibration_batch,
        time_bins=time_bins(model, options),
        over_time=options.wanda.over_time,
        over_problems=options.wanda.over_problems,
        sweep_images=options.diff_pruning.sweep_images,
        stop_below=options.diff_pruning.stop_below,
    )
