"""Options of `prunedm export`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prunedm.options.base import DataOptions, FeatureOptions, ModelOptions
from prunedm.options.marks import OneOf
from prunedm.tables import FORMATS

ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]

# largest relative error of one denoiser call that passes as rounding
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.05, "int8": 0.2}


class ExportOptions(FeatureOptions, DataOptions, ModelOptions):
    """`prunedm export`: one file for another runtime, run and compared with the model."""

    format: Annotated[str, OneOf(FORMATS)] = Field("packed", description="output format")
    precision: ExportPrecision | None = Field(
        None,
        description="of weights and arithmetic; none: the format's default, such as fp16 (packed)",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        description="largest relative error of a call; none: 1e-4 (fp32), 0.01 (fp16), 0.05 (bf16), "
        "0.2 (int8)",
    )
    opset: int = Field(18, ge=18, le=23, description="ONNX opset version")
    batch_size: int = Field(
        16, ge=1, description="batch size that the engine is tuned for (tensorrt)"
    )
    calibration_problems: int = Field(
        256, ge=8, description="problems to calibrate ranges on, spread over timesteps (int8)"
    )
    problems: int = Field(512, ge=2, description="held-out problems in the losses before and after")
    samples: int | None = Field(
        None,
        ge=0,
        description="images in the distances before and after; none: enough for the features; 0 "
        "skips them (int8)",
    )
    sampler: str = Field("ddim", description="sampler of these images, as in sample")
    sampling_steps: int = Field(25, ge=1, description="denoiser calls an image")

    @model_validator(mode="after")
    def _possible(self) -> "ExportOptions":
        if self.precision:  # imports the format only where it must
            known = FORMATS[self.format].precisions
            if self.precision not in known:
                raise ValueError(
                    f"{self.format} takes no {self.precision}; there are {', '.join(known)}"
                )
        return self

    def filled(self) -> "ExportOptions":
        """A copy with precision and tolerance set."""
        precision = self.precision or FORMATS[self.format].precisions[0]
        tolerance = self.tolerance or TOLERANCES[precision]
        return self.model_copy(update={"precision": precision, "tolerance": tolerance})
