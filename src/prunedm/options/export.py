"""Options of `prunedm export`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prunedm.options.base import (
    TRUST,
    DataOptions,
    FileName,
    ModelOptions,
)
from prunedm.options.marks import How, OneOf
from prunedm.tables import FORMATS

ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]

# relative error of one denoiser call that is still taken for rounding
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05, "int8": 0.2}


class ExportOptions(DataOptions, ModelOptions):
    """`prunedm export`: one file for another runtime, checked against the model by running it."""

    format: Annotated[str, OneOf(FORMATS)] = Field("packed", description="what is written")
    precision: ExportPrecision | None = Field(
        None,
        description="of weights and arithmetic; none: the format's first, such as fp16 (packed)",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest relative error of a call; none: 1e-4 (fp32), 0.01 (fp16), 0.05 (bf16), "
        "0.2 (int8)",
    )
    opset: int = Field(18, ge=18, le=23, description="of the ONNX file")
    batch_size: int = Field(
        16, ge=1, description="images at a time that an engine is tuned for (tensorrt)"
    )
    calibration_problems: int = Field(
        256, ge=8, description="problems that ranges are taken from, spread over timesteps (int8)"
    )
    problems: int = Field(512, ge=2, description="held-out problems of the losses before and after")
    samples: int | None = Field(
        None,
        ge=0,
        description="images of the distances before and after; none: enough for the features; 0 "
        "skips them (int8)",
    )
    sampler: str = Field("ddim", description="of those, as in sample")
    sampling_steps: int = Field(25, ge=1, description="denoiser calls an image")
    features: FileName = Field(
        "auto",
        description="auto, digits-cnn, inception, or a file of TorchScript (uint8 NCHW to N x D)",
    )
    trust_features: Annotated[bool, How()] = Field(False, description=TRUST)
    inception_weights: FileName = Field("", description="local file with the Inception weights")

    @model_validator(mode="after")
    def _possible(self) -> "ExportOptions":
        if self.precision is not None:  # else the format need not be imported
            known = FORMATS[self.format].precisions
            if self.precision not in known:
                raise ValueError(
                    f"{self.format} takes no {self.precision}; there are {', '.join(known)}"
                )
        return self

    def filled(self) -> "ExportOptions":
        """With the format's precision, and that precision's tolerance."""
        precision = self.precision or FORMATS[self.format].precisions[0]
        tolerance = self.tolerance or TOLERANCES[precision]
        return self.model_copy(update={"precision": precision, "tolerance": tolerance})
