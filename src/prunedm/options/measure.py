"""Options of the stages that change nothing: sample, evaluate, compare, analyze, loss."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from prunedm.options.base import (
    TRUST,
    CalibrationOptions,
    DataOptions,
    FileName,
    ModelName,
    ModelOptions,
    PatternText,
)
from prunedm.options.marks import How


class SampleOptions(ModelOptions):
    """`prunedm sample`: images; image i depends on the seed and i alone."""

    count: int = Field(64, ge=1, description="images")
    sampler: str = Field(
        "ddim", description="ddpm, ddim, dpm++, or a diffusers scheduler's class name"
    )
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    spacing: Literal["trailing", "uniform", "quad"] = Field(
        "trailing", description="of timesteps: even from T-1 on; even T-1 to 0; dense near 0"
    )
    batch_size: int = Field(64, ge=1, description="images at a time")
    speed: Literal["exact", "fast"] = Field(
        "exact", description="float32 to the bit, or bf16 and torch.compile where they help"
    )
    seed: int = Field(0, ge=0, description="decides every random draw")
    format: Literal["png", "npz"] = Field("png", description="files, or one uint8 NHWC array")
    label: int | None = Field(None, ge=0, description="class of all images; default: all in turn")
    device: Annotated[Literal["auto", "cpu"], How()] = Field(
        "auto", description="auto takes a GPU if there is one"
    )


class EvaluateOptions(DataOptions, ModelOptions):
    """`prunedm evaluate` and `compare`: quality, size, speed, sparsity, to a chosen depth."""

    depth: Literal["quick", "full", "compare", "comprehensive"] = Field(
        "full",
        description="quick: loss, size, sparsity, reload check, one latency, no samples; full: "
        "samples, FD, KID, precision and recall, PSNR and SSIM to dense, memory and latencies too; "
        "compare: also the first masks of a learned folder; comprehensive: all models of the lineage, "
        "and latency compiled and in bf16. The dense model of the record is measured alike",
    )
    problems: int = Field(2000, ge=2, description="held-out problems behind the loss")
    samples: int | None = Field(
        None, ge=0, description="images behind FD; none: enough for the features; 0 skips them"
    )
    middle_samples: int | None = Field(
        None,
        ge=0,
        description="compare: images of the models between the first and the last, for pictures and "
        "pairs, and no FD of them; none: as many as of the others, with FD",
    )
    references: int = Field(
        10_000, ge=2, description="held-out images behind FD at most; published FID takes 50000"
    )
    skip_fid: bool = Field(
        False, description="no distances of samples to images, and so no feature network"
    )
    sampler: str = Field("ddim", description="as in sample")
    sampling_steps: int = Field(50, ge=1, description="denoiser calls an image")
    batch_size: int = Field(100, ge=1, description="images at a time")
    features: FileName = Field(
        "auto",
        description="auto, digits-cnn, inception, or a file of TorchScript (uint8 NCHW to N x D)",
    )
    trust_features: Annotated[bool, How()] = Field(False, description=TRUST)
    inception_weights: FileName = Field("", description="local file with the Inception weights")
    latency_batch: int = Field(16, ge=1, description="images in one timed denoiser call")
    latency_batches: tuple[PositiveInt, ...] = Field(
        (1, 4, 16), description="batches timed besides (full and deeper); repeat it"
    )
    latency_repeats: int = Field(20, ge=1, description="timed calls")


class AnalyzeOptions(CalibrationOptions, ModelOptions):
    """`prunedm analyze`: activation statistics of every layer and time bin."""

    outlier: float = Field(
        3.0, gt=1, description="an input channel is an outlier above this times the layer's median"
    )
    pattern: PatternText = Field("2:4", description="pattern that both scores are tried with")
    problems: int = Field(500, ge=2, description="held-out problems of that trial; see the report")


class LossOptions(DataOptions, ModelOptions):
    """`prunedm loss`: the denoising loss on fixed problems, batch by batch."""

    masks: ModelName = Field(
        "", description="masks to put on first: a masks file, or a model with masks or zeros"
    )
    targets: tuple[str, ...] = Field(
        (), description="only the masks of this prefix or expression of layers; repeat it"
    )
    split: Literal["train", "test"] = Field("test", description="images the problems are made of")
    problems: int = Field(512, ge=1, description="problems behind the loss")
    batch_size: int = Field(32, ge=1, description="problems at a time")
    max_batches: int | None = Field(None, ge=1, description="stop after so many; none: all")
