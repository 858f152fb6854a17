"""Options of the stages that leave the model as it is: sample, evaluate, compare, analyze, loss."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from prunedm.options.base import (
    CalibrationOptions,
    DataOptions,
    Device,
    FeatureOptions,
    FileName,
    Group,
    ModelName,
    ModelOptions,
    PatternText,
    Seed,
)
from prunedm.options.marks import Flag


def _split(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those between commas too."""
    return tuple(name.strip() for text in names for name in text.split(",") if name.strip())


class SampleOptions(ModelOptions):
    """`prunedm sample`: images; image i depends only on the seed and i."""

    count: int = Field(64, ge=1, description="images")
    sampler: str = Field(
        "ddim", description="ddpm, ddim, dpm++, or a diffusers scheduler's class name"
    )
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    spacing: Literal["trailing", "uniform", "quad"] = Field(
        "trailing",
        description="of timesteps: trailing: even, from T-1 on; uniform: even, from T-1 to 0; quad: "
        "dense near 0",
    )
    batch_size: int = Field(64, ge=1, description="images at a time")
    speed: Literal["exact", "fast"] = Field(
        "exact", description="bitwise float32, or bf16 and torch.compile where they help"
    )
    seed: Seed = 0
    format: Literal["png", "npz"] = Field("png", description="files, or one uint8 NHWC array")
    label: int | None = Field(
        None, ge=0, description="class of all images; none: all classes in turn"
    )
    prompts: FileName = Field("", description="for language models: a text file, one prompt a line")
    tokens: int = Field(64, ge=1, description="that a language model adds to a prompt")
    temperature: float = Field(
        0.0, ge=0, description="of its draws; 0 takes the likeliest token each time"
    )
    device: Device = "auto"


class ZeroShotOptions(Group):
    """How --tasks are asked."""

    folder: Annotated[FileName, Flag("task_folder")] = Field(
        "", description="folder of further definitions (YAML); lm-eval runs code that they name"
    )
    examples: Annotated[int, Flag("task_examples")] = Field(
        0, ge=0, description="first questions of each task; 0: all"
    )


class EvaluateOptions(FeatureOptions, DataOptions, ModelOptions):
    """`prunedm evaluate` and `compare`: quality, size, speed and sparsity, at a chosen depth."""

    depth: Literal["quick", "full", "compare", "comprehensive"] = Field(
        "full",
        description="quick: loss, size, sparsity, reload check, one latency, no samples; full: "
        "samples, FD, KID, precision and recall, PSNR and SSIM to dense, memory and latencies too; "
        "compare: also the first masks of a learned folder; comprehensive: all models of the lineage, "
        "and latency compiled and in bf16. The dense model on record is measured the same way",
    )
    problems: int = Field(2000, ge=2, description="held-out problems in the loss")
    samples: int | None = Field(
        None, ge=0, description="images in FD; none: enough for the features; 0 skips them"
    )
    middle_samples: int | None = Field(
        None,
        ge=0,
        description="compare: images from each model between the first and the last, for pictures and "
        "pairs, without FD; none: as many as from the others, with FD",
    )
    references: int = Field(
        10_000, ge=2, description="most held-out images in FD; published FID takes 50000"
    )
    skip_fid: bool = Field(
        False, description="no distances between samples and images, so no feature network"
    )
    sampler: str = Field("ddim", description="as in sample")
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    batch_size: int = Field(100, ge=1, description="images at a time")
    stride: int = Field(
        0,
        ge=0,
        description="tokens between the windows of a strided perplexity; 0: the plain one alone",
    )
    tasks: Annotated[tuple[str, ...], AfterValidator(_split)] = Field(
        (), description="zero-shot tasks of lm-eval, as arc_easy,hellaswag; repeatable"
    )
    latency_batch: int = Field(16, ge=1, description="images in one timed denoiser call")
    latency_batches: tuple[PositiveInt, ...] = Field(
        (1, 4, 16), description="further batch sizes to time (full and deeper); repeatable"
    )
    latency_repeats: int = Field(20, ge=1, description="timed calls")
    zero_shot: ZeroShotOptions = ZeroShotOptions()


class AnalyzeOptions(CalibrationOptions, ModelOptions):
    """`prunedm analyze`: activation statistics of every layer and time bin."""

    outlier: float = Field(
        3.0,
        gt=1,
        description="an input channel above this multiple of the layer's median is an outlier",
    )
    pattern: PatternText = Field("2:4", description="pattern that the scores are tried with")
    problems: int = Field(500, ge=2, description="held-out problems in that trial")


class LossOptions(DataOptions, ModelOptions):
    """`prunedm loss`: the loss on fixed problems, batch by batch."""

    masks: ModelName = Field(
        "", description="masks to apply first: a masks file, or a model with masks or zeros"
    )
    targets: tuple[str, ...] = Field(
        (),
        description="only masks of layers with this prefix or matching this expression; repeatable",
    )
    split: Literal["train", "test"] = Field("test", description="images to make problems from")
    problems: int = Field(512, ge=1, description="problems in the loss")
    batch_size: int = Field(32, ge=1, description="problems per batch")
    max_batches: int | None = Field(None, ge=1, description="stop after this many; none: all")
