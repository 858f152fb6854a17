"""Options of `prunedm train` and `finetune`."""

from typing import Any, Literal

from pydantic import Field

from prunedm.options.base import LoopOptions


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


class FinetuneOptions(LoopOptions):
    """`prunedm finetune`: weights of any model, masks held exactly."""

    teacher: str = Field("auto", description="auto (the record's dense model), none, or a model")
    distill: float = Field(
        0.9, ge=0, le=1, description="share of the teacher's output in the target"
    )
