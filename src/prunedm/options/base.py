"""Options that several stages share: data, calibration, scores, the training loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from prunedm.options.marks import Flag, How, Input, OneOf
from prunedm.system.places import expanded
from prunedm.tables import SCORES, TRACKERS

Precision = Literal["no", "bf16", "fp16"]


def _checked_pattern(text: str) -> str:
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 16):
        raise ValueError(f"{text!r} is not an N:M with 0 < N < M <= 16; try 2:4")
    return text


def _checked_time_range(text: str) -> str:
    first, dash, last = text.partition("-")
    numbers = dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)
    if text not in TIME_RANGES and not numbers:
        raise ValueError(f"{text!r} is not one of {', '.join(TIME_RANGES)}, nor a-b; try 100-500")
    return text


TIME_RANGES = ("all", "early", "middle", "late")
TimeRangeText = Annotated[str, AfterValidator(_checked_time_range)]
PatternText = Annotated[str, AfterValidator(_checked_pattern)]
ScoreName = Annotated[str, OneOf(SCORES)]


LARGEST = 10**9  # of an integer that is not a seed: beyond it, memory or patience ends first
LARGEST_SEED = 2**63 - 1
LARGEST_LR = 1e3


def _expanded(text: str) -> str:
    return str(expanded(text)) if text.startswith("~") or "\0" in text else text


DatasetName = Annotated[str, AfterValidator(_expanded), Input("dataset")]
ModelName = Annotated[str, AfterValidator(_expanded), Input("model", ("auto", "none"))]
FileName = Annotated[
    str, AfterValidator(_expanded), Input("file", ("auto", "inception", "digits-cnn"))
]
Device = Annotated[
    Literal["auto", "cpu"], How(), Field(description="auto takes a GPU if there is one")
]
Seed = Annotated[int, Field(ge=0, description="decides every random draw")]

PATH_OPTIONS: set[str] = set()  # options, of any stage, that name an input: flags, dotted names


class Options(BaseModel):
    """Immutable; unknown names, infinities and NaN are errors."""

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

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, given: Any) -> Any:
        return cls.nested(given) if isinstance(given, dict) else given

    @classmethod
    def nested(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with flat names (as in records and on the command line) moved into their groups."""
        paths = {leaf.flag: leaf.path for leaf in cls.leaves() if len(leaf.path) > 1}
        table = {name: value for name, value in given.items() if name not in paths}
        for name in given.keys() & paths:
            group, option = paths[name]
            inner = table.get(group) or {}
            if isinstance(inner, Options):
                inner = inner.given()
            table[group] = {**inner, option: given[name]} if isinstance(inner, dict) else inner
        return table

    @classmethod
    def leaves(cls) -> "list[Leaf]":
        """Every option, including those in groups."""
        found = []
        for name, field in cls.model_fields.items():
            kind, default = field.annotation, field.get_default(call_default_factory=True)
            if isinstance(kind, type) and issubclass(kind, Group):
                found += [
                    Leaf((name, option), inner, getattr(default, option))
                    for option, inner in kind.model_fields.items()
                ]
            else:
                found.append(Leaf((name,), field, default))
        return found

    def given(self) -> dict[str, Any]:
        """The options that were set, without defaults."""
        return self.model_dump(exclude_unset=True)

    @classmethod
    def inputs(cls) -> dict[str, Input]:
        """The options that name an input."""
        return {leaf.flag: mark for leaf in cls.leaves() if (mark := leaf.mark(Input))}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        named = [leaf for leaf in cls.leaves() if leaf.mark(Input)]
        PATH_OPTIONS.update(name for leaf in named for name in (leaf.flag, ".".join(leaf.path)))

    def flat(self) -> dict[str, Any]:
        """Every option as JSON, by its flag."""
        table = self.model_dump(mode="json")
        return {leaf.flag: reduce(getitem, leaf.path, table) for leaf in self.leaves()}

    def identity(self) -> dict[str, Any]:
        """As `flat`, without options that change how a result is made but not what it is."""
        table = self.flat()
        return {leaf.flag: table[leaf.flag] for leaf in self.leaves() if not leaf.mark(How)}


class Group(Options):
    """Options of one method, nested under its name."""


Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Leaf:
    """One option. path: its name, after that of its group. default: the value where none is given."""

    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    @property
    def flag(self) -> str:
        """Its name on the command line and in records."""
        named = self.mark(Flag)
        return named.name if named else self.path[-1]

    def mark(self, kind: type[Mark]) -> Mark | None:
        return next((mark for mark in self.field.metadata if isinstance(mark, kind)), None)


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
        description="noise schedule to use instead of the model's: a folder or scheduler_config.json",
    )


class DataOptions(Options):
    """Where images come from."""

    dataset: DatasetName = Field(
        "digits", description="digits, a hub id, a dataset folder or an image folder"
    )
    label_column: str = Field("", description="class column, where several qualify")
    caption_column: str = Field("", description="text column, unless called text or caption")
    image_column: str = Field("", description="image column, where several qualify")
    text_column: str = Field("", description="the column of texts that a language model reads")
    length: int | None = Field(
        None, ge=2, description="tokens of a sequence; none: 2048, or as many as the model takes"
    )
    flip: bool = Field(False, description="mirror half of the training images")
    convert_channels: bool = Field(False, description="convert images with another channel count")
    seed: Seed = 0
    device: Device = "auto"


class FeatureOptions(Options):
    """The network whose features distances between images are taken in."""

    features: FileName = Field(
        "auto",
        description="auto, digits-cnn, inception, or a TorchScript file (uint8 NCHW to N x D)",
    )
    trust_features: Annotated[bool, How()] = Field(
        False, description="run a TorchScript file unchecked: it may do anything you may"
    )
    inception_weights: FileName = Field("", description="local file with the Inception weights")


class CalibrationOptions(DataOptions):
    """The training problems on which layer statistics are measured."""

    calibration_problems: int = Field(512, ge=1, description="problems behind a score")
    calibration_batch: int = Field(64, ge=1, description="problems per batch")
    time_range: TimeRangeText = Field(
        "all", description="their timesteps: all, early (noisiest third), middle, late, or a-b"
    )
    time_bins: int = Field(10, ge=1, description="time bins of activation statistics")
    targets: tuple[str, ...] = Field(
        (), description="only layers with this prefix or matching this expression; repeatable"
    )


class WandaOptions(Group):
    """How activation norms are reduced over time bins and problems."""

    over_time: Literal["mean", "max", "median", "weighted_mean"] = Field(
        "mean", description="reduction of activation norms over time bins"
    )
    over_problems: Literal["mean", "max", "median"] = Field(
        "mean", description="reduction of activations over the problems of a bin"
    )


class DiffPruningOptions(Group):
    """The sweep over timesteps that accumulates Taylor gradients."""

    sweep_images: int = Field(16, ge=1, description="images in the sweep over timesteps")
    stop_below: float = Field(
        0.05, ge=0, lt=1, description="stop the sweep below this share of the largest loss"
    )


class ScoreOptions(CalibrationOptions):
    """The importance score, and the data it is measured on."""

    score: ScoreName = Field("taylor", description="importance score")
    wanda: WandaOptions = WandaOptions()
    diff_pruning: DiffPruningOptions = DiffPruningOptions()


class LoopOptions(DataOptions):
    """One training run."""

    steps: int = Field(400, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="images per step and process")
    accumulation: int = Field(1, ge=1, description="batches per step")
    lr: float = Field(3e-4, gt=0, le=LARGEST_LR, description="peak learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW second-moment decay")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 is no limit")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="weight averaging; 0 is none")
    mixed_precision: Precision = Field("no", description="autocast type")
    workers: Annotated[int, How()] = Field(0, ge=0, description="processes that decode images")
    checkpoint_every: Annotated[int, How()] = Field(
        50, ge=0, description="steps between checkpoints; 0 is none"
    )
    validate_every: int = Field(
        100, ge=0, description="steps between held-out losses; 0: only at the end"
    )
    validation_problems: int = Field(500, ge=1, description="problems in each held-out loss")
    tracker: Annotated[str, OneOf(TRACKERS), How()] = Field(
        "none", description="where live curves go"
    )
    tracker_project: Annotated[str, How()] = Field(
        "prunedm", min_length=1, description="the tracker's project"
    )
    tracker_mode: Annotated[Literal["auto", "offline", "local"], How()] = Field(
        "auto", description="auto: the service, or offline; local: SwanLab's own dashboard"
    )
    track_images: Annotated[int, How()] = Field(
        8, ge=0, description="samples sent to the tracker at each held-out loss"
    )


def whole_steps(problems: int, options: LoopOptions, processes: int = 1) -> int:
    """`problems` rounded up to whole steps: a cycle then repeats the same batches bit by bit."""
    per_step = options.batch_size * options.accumulation * processes
    return -(-problems // per_step) * per_step
