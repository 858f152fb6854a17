"""Options of `prunedm train` and `finetune`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prunedm.options.base import LARGEST_LR, Group, LoopOptions, ModelName, ModelOptions
from prunedm.options.marks import Flag


class WeightOptions(LoopOptions):
    """Training of weights."""

    compile: bool = Field(False, description="torch.compile, where a compiler is available")


class TrainOptions(WeightOptions):
    """`prunedm train`: a dense model from scratch."""

    steps: int = Field(10_000, ge=1, description="optimizer steps")
    batch_size: int = Field(128, ge=1, description="images per step and process")
    lr: float = Field(2e-4, gt=0, le=LARGEST_LR, description="peak learning rate")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="weight averaging; 0 is none")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the residual blocks")
    save_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the saved weights"
    )
    unet: dict[str, Any] = Field(
        default_factory=dict, description="UNet2DModel configuration (in YAML)"
    )
    scheduler: dict[str, Any] = Field(
        default_factory=dict, description="DDPMScheduler configuration (in YAML)"
    )


class SensitivityMatching(Group):
    """How responses to small input changes are matched."""

    every: Annotated[int, Flag("sensitivity_every")] = Field(
        4, ge=1, description="one pair of problems in this many is perturbed"
    )
    size: Annotated[float, Flag("sensitivity_size")] = Field(
        0.05, gt=0, description="standard deviation of the perturbation; images span -1 to 1"
    )


class FinetuneOptions(WeightOptions, ModelOptions):
    """`prunedm finetune`: train the weights of any model; masks hold exactly."""

    teacher: ModelName = Field(
        "auto", description="auto (the dense model on record), none, or a model"
    )
    distill: float = Field(
        0.9, ge=0, le=1, description="share of the teacher's output in the target"
    )
    match_features: float = Field(
        0.0, ge=0, description="weight of the relative error of the teacher's block outputs"
    )
    match_sensitivity: float = Field(
        0.0,
        ge=0,
        description="weight of the relative error of the teacher's response to small changes",
    )
    sensitivity: SensitivityMatching = SensitivityMatching()
    dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout inside the residual blocks; none: the model's own"
    )
    dataset_size: int = Field(
        0,
        ge=0,
        description="problems to cycle through, keeping the teacher's outputs; 0: always new ones",
    )
    memo_memory: float = Field(1.0, ge=0, description="GiB of teacher outputs to keep")

    @model_validator(mode="after")
    def _possible(self) -> "FinetuneOptions":
        if self.match_sensitivity and self.dropout:
            raise ValueError("dropout would drown responses to small changes; give --dropout 0")
        if self.teacher == "none" and (self.match_features or self.match_sensitivity):
            raise ValueError("blocks and responses are matched to a teacher's; give --teacher")
        return self
