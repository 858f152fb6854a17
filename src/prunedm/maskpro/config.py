"""Options of the MaskPro trainer: typed, or from a YAML file or mapping with the same names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, ValidationError, ValidationInfo, field_validator

from prunedm.configuration import merged, validation_message
from prunedm.errors import UserError
from prunedm.options import DataOptions


class MaskProConfig(DataOptions):
    """Options of `DiffusionMaskProTrainer`; a YAML file has the same names."""

    model: str = Field("digits", description="a model folder, a hub id, or digits")
    n: int = Field(2, ge=1, description="weights kept of every m")
    m: int = Field(4, ge=2, le=16, description="input channels of a group")
    target_layers: tuple[str, ...] = Field((), description="prefixes or expressions; none is all")
    estimator: Literal["relaxed", "reinforce"] = Field("relaxed", description="how masks learn")
    lead: float | None = Field(
        None, ge=0, description="of the first masks' logits; none: 1 (relaxed), 10 (reinforce)"
    )
    model_lr: float = Field(1e-5, gt=0, description="AdamW, of the weights")
    mask_lr: float = Field(1e-3, gt=0, description="AdamW, of the logits")
    mask_loss_weight: float = Field(1.0, ge=0, description="of the logits' gradient")
    clip: float = Field(1.0, ge=0, description="largest gradient norm, of weights and of logits")
    batch_size: int = Field(64, ge=1, description="images a step")
    epochs: int = Field(1, ge=1, description="passes over the images")
    steps: int = Field(0, ge=0, description="optimizer steps; 0 is all of the epochs")
    temperature: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 0.1), description="of the Gumbel softmax, first and last (relaxed)"
    )
    baseline_momentum: float = Field(0.9, ge=0, lt=1, description="of the losses (reinforce)")
    validation_problems: int = Field(200, ge=2, description="held-out problems of validate()")

    @field_validator("m")
    @classmethod
    def _more_than_n(cls, m: int, info: ValidationInfo) -> int:
        if m <= info.data.get("n", 0):
            raise ValueError(f"must be more than n = {info.data['n']}; try n = 2, m = 4")
        return m

    @property
    def first_lead(self) -> float:
        """`lead`, or the estimator's default: weights that train under hard draws need a large one."""
        default = {"relaxed": 1.0, "reinforce": 10.0}[self.estimator]
        return default if self.lead is None else self.lead


def parsed_config(config: str | Path | Mapping[str, Any] | MaskProConfig) -> MaskProConfig:
    """The typed options. Raises `UserError` for unknown names and values out of range."""
    if isinstance(config, MaskProConfig):
        return config
    if isinstance(config, str | Path):
        return merged(MaskProConfig, Path(config))
    try:
        return MaskProConfig.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(validation_message(error, MaskProConfig)) from error
