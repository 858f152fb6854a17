"""The results of evaluating one model and their conditions: one row of the table."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, computed_field

from prunedm.record import Record, finite
from prunedm.tables import METRICS

TASK = "task:"  # how the figures of zero-shot tasks begin
EMA, LAST = "EMA ", "not averaged"  # values of `Conditions.weights`
# numbers that are not finite count as not measured; JSON cannot hold them either
Measured = Annotated[int | float | None, AfterValidator(finite)]


class LayerFigures(BaseModel):
    """The non-zero weights of one prunable layer."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    pattern: str = ""  # "2:4" where the layer has an N:M mask
    valid: float | None = None  # share of its groups that are N:M
    why_dense: str = ""  # why it has no mask, in a model with masks


class Timing(BaseModel):
    """How long the denoiser takes when called in one way."""

    batch: int
    dtype: str  # "float32", "bf16 autocast"
    threads: int
    compiled: bool = False
    kernel: str = "dense"  # what actually ran: "dense", "semi-structured", ...
    median_ms: float
    spread_ms: float  # half the interquartile range
    others: float = 0.0  # share of the processor that other processes used meanwhile

    @computed_field  # type: ignore[prop-decorator]  # so that files have it too
    @property
    def images_per_s(self) -> float:
        return 1000 * self.batch / self.median_ms


class Figures(BaseModel):
    """Figures by name: those of every metric (`tables.METRICS`), and those that are not numbers.

    None where a figure was not requested, does not apply, or its step failed.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Measured] = Field(init=False)

    timings: list[Timing] = Field(default_factory=list)  # the first is `latency_ms`
    peak_memory_batch: int | None = None
    pattern: str = ""  # "2:4" where the model has N:M masks
    nm_layers: int = 0  # layers with a mask
    nm_dense: dict[str, str] = Field(default_factory=dict)  # prunable layers left dense, and why

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float | None: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    else:

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, finite(value) if isinstance(value, float) else value)

        def __getattr__(self, name: str) -> float | None:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or not (name.startswith(TASK) or name in figure_names()):
                    raise
                return None


def figure_names() -> list[str]:
    """The names of all metrics' figures, in the order of the columns."""
    return [name for metric in METRICS.values() for name in metric.fields]


class Change(BaseModel):
    """A figure's change from the dense model's: absolute, and relative to it."""

    absolute: float
    relative: Measured = None  # -0.3: 30 % less


class Conditions(BaseModel):
    """What the figures were measured under; empty where not known."""

    dataset: str
    problems: int  # held-out ones behind `loss`
    length: int = 0  # tokens of each, of texts
    stride: int = 0  # tokens between the windows of the strided perplexity
    task_examples: int = 0  # questions of each task at most; 0: all
    samples: int
    sampler: str  # "ddim-50"
    spacing: str = ""  # of its timesteps: "trailing"
    seed: int
    features: str  # "FD (digits-cnn)", "FID" only for the Inception network
    reference: int  # held-out images behind `fd`
    device: str
    dtype: str  # "float32", "float32 (TF32 convolutions)"
    threads: int = 0
    weights: str = ""  # "EMA 0.9999", an average over training with its decay; "not averaged"
    prediction: str = ""  # what the denoiser predicts: "epsilon", "sample", "v_prediction"
    schedule: str = ""  # noise schedule: "linear 0.0001 to 0.02, 1000 steps"
    latency_batch: int
    latency_repeats: int = 0  # timed calls per median, after the warm-up

    @property
    def kind(self) -> Literal["images", "texts"]:
        """What the model makes."""
        return "texts" if self.length else "images"


class Asked(BaseModel):
    """One pruning target of the lineage: requested and reached."""

    what: str  # "params", "pattern", ...
    asked: float | str
    got: float | str
    reason: str = ""  # why the two differ

    @property
    def texts(self) -> tuple[str, str]:
        """`asked` and `got` as they are shown."""
        asked, got = (f"{v:.4g}" if isinstance(v, float) else v for v in (self.asked, self.got))
        return asked, got


class StepResult(BaseModel):
    """One step of an evaluation and how it ended; `error` also says why a step was skipped."""

    step: str
    model: str = ""  # its label; "" for a step on all models
    status: Literal["done", "failed", "skipped"]
    seconds: float = 0.0
    error: str = ""


class Evaluation(BaseModel):
    """One model's row: label ("dense", "1-prune", ...), figures, conditions and records."""

    label: str
    model: str
    hash: str
    figures: Figures
    conditions: Conditions
    record: Record | None = None
    dense: Figures | None = None  # the dense model's, unless this is it
    changes: dict[str, Change] = Field(default_factory=dict)  # to dense, of comparable figures
    layers: list[LayerFigures] = Field(default_factory=list)
    asked: list[Asked] = Field(default_factory=list)
    reloads: bool | None = None  # whether a reload gives bit-identical output; None: not checked
    failed: dict[str, str] = Field(default_factory=dict)  # failed step -> its error
    # uint8 NHWC .npz beside the results, from the same noise for every model
    samples_file: str = ""
    # {"losses": [...], "held_out": [[step, loss]]}
    curve: dict[str, Any] = Field(default_factory=dict)
