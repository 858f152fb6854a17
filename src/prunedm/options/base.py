"""What several stages' options share: data, calibration, scores, the training loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from prunedm.tables import SCORES

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
ScoreName = Annotated[str, OneOf(SCORES)]


LARGEST = 10**9  # of a whole number but a seed: beyond it, memory or patience ends first
LARGEST_SEED = 2**63 - 1
LARGEST_LR = 1e3


def _expanded(text: str) -> str:
    return str(expanded(text)) if text.startswith("~") or "\0" in text else text


DatasetName = Annotated[str, AfterValidator(_expanded), Input("dataset")]
ModelName = Annotated[str, AfterValidator(_expanded), Input("model", ("auto", "none"))]
FileName = Annotated[
    str, AfterValidator(_expanded), Input("file", ("auto", "inception", "digits-cnn"))
]


# names of the options, of any stage, that say what is read
PATH_OPTIONS: set[str] = set()


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

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, given: Any) -> Any:
        return cls.nested(given) if isinstance(given, dict) else given

    @classmethod
    def nested(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options under their groups that are given flat, as by records and by the command line."""
        paths = {leaf.flag: leaf.path for leaf in cls.leaves() if len(leaf.path) > 1}
        table = {name: value for name, value in given.items() if name not in paths}
        for name in given.keys() & paths:
            group, option = paths[name]
            inner = table.get(group) or {}
            if isinstance(inner, Options):
                inner = inner.model_dump(exclude_unset=True)
            table[group] = {**inner, option: given[name]} if isinstance(inner, dict) else inner
        return table

    @classmethod
    def leaves(cls) -> "list[Leaf]":
        """Every option, those of groups too."""
        return [leaf for name, field in cls.model_fields.items() for leaf in _leaves(name, field)]

    @classmethod
    def inputs(cls) -> dict[str, Input]:
        """The options that name what is read."""
        marks = {leaf.flag: leaf.mark(Input) for leaf in cls.leaves()}
        return {name: mark for name, mark in marks.items() if mark is not None}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        PATH_OPTIONS.update(cls.inputs())

    def flat(self) -> dict[str, Any]:
        """Every option by its flag, as JSON has it: what records hold."""
        table = self.model_dump(mode="json")
        return {leaf.flag: leaf.of(table) for leaf in self.leaves()}

    def identity(self) -> dict[str, Any]:
        """As `flat`, without the options that change how a result is made but not what it is."""
        table = self.flat()
        return {leaf.flag: table[leaf.flag] for leaf in self.leaves() if not leaf.mark(How)}


class Group(Options):
    """Options of one method, nested under its name; a flag is the option's name, or its `Flag`."""


Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Leaf:
    """One option. flag: its name on the command line and in records. default: unless it is given."""

    flag: str
    path: tuple[str, ...]
    field: FieldInfo
    default: Any

    def mark(self, kind: type[Mark]) -> Mark | None:
        return next((mark for mark in self.field.metadata if isinstance(mark, kind)), None)

    def of(self, table: Mapping[str, Any]) -> Any:
        """Its value in nested tables."""
        value: Any = table
        for part in self.path:
            value = value[part]
        return value


def _leaves(name: str, field: FieldInfo) -> list[Leaf]:
    kind, default = field.annotation, field.get_default(call_default_factory=True)
    if not (isinstance(kind, type) and issubclass(kind, Group)):
        return [Leaf(name, (name,), field, default)]
    return [
        Leaf(_flag(option, inner), (name, option), inner, getattr(default, option))
        for option, inner in kind.model_fields.items()
    ]


def _flag(name: str, field: FieldInfo) -> str:
    return next((mark.name for mark in field.metadata if isinstance(mark, Flag)), name)


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
    device: Annotated[Literal["auto", "cpu"], How()] = Field(
        "auto", description="auto takes a GPU if there is one"
    )


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


class WandaOptions(Group):
    """How norms of activations become one number a weight."""

    over_time: Literal["mean", "max", "median", "weighted_mean"] = Field(
        "mean", description="of activation norms over time bins"
    )
    over_problems: Literal["mean", "max", "median"] = Field(
        "mean", description="of activations over the problems of a bin"
    )


class DiffPruningOptions(Group):
    """The sweep over timesteps behind Taylor's gradients."""

    sweep_images: int = Field(16, ge=1, description="images of the sweep over t")
    stop_below: float = Field(
        0.05, ge=0, lt=1, description="share of the largest loss that ends the sweep"
    )


class ScoreOptions(CalibrationOptions):
    """What matters, and what it is measured on."""

    score: ScoreName = Field("taylor", description="what matters")
    wanda: WandaOptions = WandaOptions()
    diff_pruning: DiffPruningOptions = DiffPruningOptions()


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
    workers: Annotated[int, How()] = Field(0, ge=0, description="processes that decode images")
    checkpoint_every: Annotated[int, How()] = Field(
        50, ge=0, description="steps between checkpoints; 0 is none"
    )
    validate_every: int = Field(
        100, ge=0, description="steps between held-out losses; 0 is at the end"
    )
    validation_problems: int = Field(500, ge=1, description="held-out problems of each of these")
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio", "swanlab"], How()] = (
        Field("none", description="where live curves go")
    )
    tracker_project: Annotated[str, How()] = Field(
        "prunedm", min_length=1, description="the tracker's project"
    )
    tracker_mode: Annotated[Literal["auto", "offline", "local"], How()] = Field(
        "auto", description="auto: its service, or offline; local: SwanLab's own dashboard"
    )
    track_images: Annotated[int, How()] = Field(
        8, ge=0, description="samples shown at each held-out loss, where there is a tracker"
    )
