"""Every stage's options, typed. The command line, YAML files and the docs come from these classes."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

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
Mechanism = Literal["channels", "weights", "nm", "obs-weights", "obs-nm"]
TARGETS = ("params", "macs", "channels", "weights")
Precision = Literal["no", "bf16", "fp16"]


def parse_target(text: str) -> tuple[str, float]:
    """'params=0.3' => ("params", 0.3). A bare number means params."""
    kind, equals, number = text.rpartition("=")
    kind = kind.strip() if equals else "params"
    if kind not in TARGETS:
        raise ValueError(f"{kind!r} is none of {', '.join(TARGETS)}")
    try:
        ratio = float(number)
    except ValueError:
        raise ValueError(f"{number!r} is no number; write {kind}=0.3") from None
    if not 0 < ratio < 1:
        raise ValueError(f"{ratio:g} is not between 0 and 1; {kind}=0.3 removes 30 %")
    return kind, ratio


def _checked_target(text: str) -> str:
    parse_target(text)
    return text


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
TargetText = Annotated[str, AfterValidator(_checked_target)]
PatternText = Annotated[str, AfterValidator(_checked_pattern)]


class Options(BaseModel):
    """Options cannot be changed once made, and unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataOptions(Options):
    """Where images come from."""

    dataset: str = Field(
        "digits", description="digits, a hub id, a dataset folder or an image folder"
    )
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
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
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


class TrainOptions(LoopOptions):
    """`prunedm train`: a dense model from scratch."""

    steps: int = Field(10_000, ge=1, description="optimizer steps")
    batch_size: int = Field(128, ge=1, description="images a step and process")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="weight averaging; 0 is none")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
    save_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type of the saved weights"
    )
    unet: dict[str, Any] = Field(
        default_factory=dict, description="UNet2DModel configuration (in YAML)"
    )
    scheduler: dict[str, Any] = Field(
        default_factory=dict, description="DDPMScheduler configuration (in YAML)"
    )


class PruneOptions(ScoreOptions):
    """`prunedm prune`: remove channels, single weights, or N:M weights."""

    mechanism: Mechanism = Field(
        "channels", description="what is removed; obs- updates the weights that stay"
    )
    target: TargetText = Field(
        "params=0.3",
        description="share removed: params=, macs=, channels= (channels), weights= (of the layers)",
    )
    pattern: PatternText = Field("2:4", description="N kept of every M input channels (nm)")
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform", description="same for all layers, or by measured loss to meet the target"
    )
    candidates: tuple[str, ...] = Field(
        (), description="a pattern or ratio that layers may get; repeat it (sensitivity)"
    )
    sensitivity_problems: int = Field(
        128, ge=2, description="problems behind a layer's sensitivity"
    )
    permute: bool = Field(
        False, description="reorder channels first so that groups lose less (nm, obs-nm)"
    )
    scope: Literal["row", "layer", "global"] = Field(
        "global", description="rank weights within an output row, a layer, or all (weights)"
    )
    obs_damping: float = Field(0.01, gt=0, description="of the Hessian's mean diagonal (obs)")
    obs_time_weights: tuple[PositiveFloat, PositiveFloat] = Field(
        (1.2, 0.8), description="of problems, from the noisiest step to the cleanest (obs)"
    )
    obs_memory: float = Field(2.0, gt=0, description="GiB of Hessians at a time (obs)")
    round_to: int | None = Field(
        None, ge=1, description="widths' multiple; none: 16, or 8 where none is over 64 (channels)"
    )
    max_layer_ratio: float = Field(
        0.7, gt=0, lt=1, description="most that one layer loses (channels)"
    )
    reduction: Literal["sum", "mean", "max", "first"] = Field(
        "max", description="of a channel's scores over the layers that share it (channels)"
    )
    reinitialise: bool = Field(
        False, description="fresh weights in the smaller network: a baseline (channels)"
    )
    pictures: int = Field(16, ge=0, description="samples before and after, from the same noise")


class LearnOptions(LoopOptions, ScoreOptions):
    """`prunedm learn`: N:M masks by relaxed patterns, weights frozen."""

    steps: int = Field(200, ge=1, description="optimizer steps")
    lr: float = Field(0.5, gt=0, description="peak learning rate, in logits")
    schedule: Literal["cosine", "constant"] = Field("constant", description="after the warm-up")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 is no limit")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="logit averaging; 0 is none")
    pattern: PatternText = Field(
        "2:4", description="N kept of every M, where the model has no masks yet"
    )
    score: ScoreName = Field("magnitude", description="first masks, where the model has none yet")
    strength: float = Field(1.0, ge=0, description="logit lead of the first masks' weights")
    tau: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 0.1), description="softmax temperature, first and last"
    )
    objective: Literal["output", "data"] = Field(
        "output", description="match the unmasked model's output, or the data"
    )


class FinetuneOptions(LoopOptions):
    """`prunedm finetune`: weights of any model, masks held exactly."""

    teacher: str = Field("auto", description="auto (the record's dense model), none, or a model")
    distill: float = Field(
        0.9, ge=0, le=1, description="share of the teacher's output in the target"
    )


class SampleOptions(Options):
    """`prunedm sample`: images; image i depends on the seed and i alone."""

    count: int = Field(64, ge=1, description="images")
    sampler: str = Field(
        "ddim", description="ddpm, ddim, dpm++, or a diffusers scheduler's class name"
    )
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    batch_size: int = Field(64, ge=1, description="images at a time")
    seed: int = Field(0, ge=0, description="decides every random draw")
    format: Literal["png", "npz"] = Field("png", description="files, or one uint8 NHWC array")
    label: int | None = Field(None, ge=0, description="class of all images; default: all in turn")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes a GPU if there is one")


class EvaluateOptions(DataOptions):
    """`prunedm evaluate` and `compare`: loss, FD, size, speed, sparsity."""

    problems: int = Field(2000, ge=2, description="held-out problems behind the loss")
    samples: int | None = Field(
        None, ge=0, description="images behind FD; none: enough for the features; 0 skips FD"
    )
    sampler: str = Field("ddim", description="as in sample")
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    batch_size: int = Field(100, ge=1, description="images at a time")
    features: str = Field(
        "auto",
        description="auto, digits-cnn, inception, or a TorchScript file (uint8 NCHW to N x D)",
    )
    inception_weights: str = Field("", description="local file with the Inception weights")
    latency_batch: int = Field(16, ge=1, description="images in one timed denoiser call")
    latency_repeats: int = Field(20, ge=1, description="timed calls")


class AnalyzeOptions(CalibrationOptions):
    """`prunedm analyze`: activation statistics of every layer and time bin."""

    outlier: float = Field(
        3.0, gt=1, description="an input channel is an outlier above this times the layer's median"
    )
    pattern: PatternText = Field("2:4", description="pattern that both scores are tried with")
    problems: int = Field(500, ge=2, description="held-out problems of that trial; see the report")
