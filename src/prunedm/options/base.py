"""What several stages' options share: data, calibration, scores, the training loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from prunedm.places import expanded

ScoreName = Literal[
    "random",
    "magnitude",
    "magnitude-l2",
    "taylor",
    "taylor-multivariable",
    "diff-pruning",
    "wanda",
    "fluctuation",
]
Precision = Literal["no", "bf16", "fp16"]
TRUST = "run a TorchScript file of features whatever is written in it: it may do all that you may"


def _checked_pattern(text: str) -> str:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 16):
        raise ValueError(f"{text!r} is no N:M with 0 < N < M <= 16; try 2:4")
    return text


def _checked_time_range(text: str) -> str:
    first, dash, last = text.partition("-")
    numbers = dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)
    if text not in TIME_RANGES and not numbers:
        raise ValueError(f"{text!r} is none of {', '.join(TIME_RANGES)}, and no a-b; try 100-500")
    return text


TIME_RANGES = ("all", "early", "middle", "late")
TimeRangeText = Annotated[str, AfterValidator(_checked_time_range)]
PatternText = Annotated[str, AfterValidator(_checked_pattern)]


LARGEST = 10**9  # of a whole number but a seed: beyond it, memory or patience ends first
LARGEST_SEED = 2**63 - 1
LARGEST_LR = 1e3


@dataclass(frozen=True)
class Input:
    """Marks an option that names what is read, whose content decides the result."""

    kind: Literal["model", "dataset", "file"]
    words: tuple[str, ...] = ()  # values that name nothing on this machine


def _expanded(text: str) -> str:
    return str(expanded(text)) if text.startswith("~") or "\0" in text else text


DatasetName = Annotated[str, AfterValidator(_expanded), Input("dataset")]
ModelName = Annotated[str, AfterValidator(_expanded), Input("model", ("auto", "none"))]
FileName = Annotated[
    str, AfterValidator(_expanded), Input("file", ("auto", "inception", "digits-cnn"))
]


class Options(BaseModel):
    """Options cannot be changed once made; unknown names and numbers without end are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        if any("\udc80" <= c <= "\udcff" for text in _texts(value) for c in text):
            raise ValueError("is not UTF-8")
        largest = LARGEST_SEED if info.field_name == "seed" else LARGEST
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > largest for number in numbers):
            raise ValueError(f"the largest possible is {largest:,}")
        return value

    @classmethod
    def inputs(cls) -> dict[str, Input]:
        """The options that name what is read."""
        marks = {
            name: next((mark for mark in field.metadata if isinstance(mark, Input)), None)
            for name, field in cls.model_fields.items()
        }
        return {name: mark for name, mark in marks.items() if mark is not None}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])


class ModelOptions(Options):
    """How a model is read."""

    scheduler: FileName = Field(
        "",
        description="noise schedule in the place of the model's: a folder or scheduler_config.json",
    )


class DataOptions(Options):
    """Where images come from."""

    dataset: DatasetName = Field(
        "digits", description="digits, a hub id, a dataset folder or an image folder"
    )
    label_column: str = Field("", description="the column of classes, where several could be")
    caption_column: str = Field(
        "", description="the column of texts, where it is not called text or caption"
    )
    image_column: str = Field("", description="the column of images, where several could be")
    flip: bool = Field(False, description="mirror half of the training images")
    convert_channels: bool = Field(False, description="convert images of other channel counts")
    seed: int = Field(0, ge=0, description="decides every random draw")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes a GPU if there is one")


class CalibrationOptions(DataOptions):
    """The problems that statistics of layers are taken from."""

    calibration_problems: int = Field(512, ge=1, description="problems behind a score")
    calibration_batch: int = Field(64, ge=1, description="problems at a time")
    time_range: TimeRangeText = Field(
        "all", description="their timesteps: all, early (noisiest third), middle, late, or a-b"
    )
    time_bins: int = Field(10, ge=1, description="time bins of activation statistics")
    targets: tuple[str, ...] = Field(
        (), description="only this prefix or expression of layers; repeat it"
    )


class ScoreOptions(CalibrationOptions):
    """What matters, and what it is measured on."""

    score: ScoreName = Field("taylor", description="what matters")
    over_time: Literal["mean", "max", "median", "weighted_mean"] = Field(
        "mean", description="of activation norms over time bins (wanda)"
    )
    over_problems: Literal["mean", "max", "median"] = Field(
        "mean", description="of activations over the problems of a bin (wanda)"
    )
    sweep_images: int = Field(16, ge=1, description="images of the sweep over t (diff-pruning)")
    stop_below: float = Field(
        0.05, ge=0, lt=1, description="share of the largest loss that ends the sweep (diff-pruning)"
    )


class LoopOptions(DataOptions):
    """One training run."""

    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="images a step and process")
    accumulation: int = Field(1, ge=1, description="batches a step")
    lr: float = Field(3e-4, gt=0, le=LARGEST_LR, description="peak learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW second-moment decay")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 is no limit")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="weight averaging; 0 is none")
    mixed_precision: Precision = Field("no", description="autocast type")
    workers: int = Field(0, ge=0, description="processes that decode images")
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0 is none")
    validate_every: int = Field(
        100, ge=0, description="steps between held-out losses; 0 is at the end"
    )
    validation_problems: int = Field(500, ge=1, description="held-out problems of each of these")
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "swanlab"] = Field(
        "none", description="where live curves go"
    )
    tracker_project: str = Field("prunedm", min_length=1, description="the tracker's project")
    tracker_mode: Literal["auto", "offline", "local"] = Field(
        "auto", description="auto: its service, or offline; local: SwanLab's own dashboard"
    )
    track_images: int = Field(
        8, ge=0, description="samples shown at each held-out loss, where there is a tracker"
    )
