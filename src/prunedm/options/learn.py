"""Options of `prunedm learn`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from prunedm.options.base import (
    LARGEST_LR,
    Group,
    LoopOptions,
    ModelName,
    ModelOptions,
    PatternText,
    ScoreName,
    ScoreOptions,
)
from prunedm.options.marks import Flag, OneOf
from prunedm.tables import ESTIMATORS

EstimatorName = Annotated[str, OneOf(ESTIMATORS)]


class RelaxedOptions(Group):
    """Soft masks (estimator relaxed)."""

    tau: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 0.1), description="softmax temperature, first and last"
    )


class PolicyGradientOptions(Group):
    """Masks from loss values alone (estimator policy-gradient)."""

    samples: int = Field(8, ge=4, multiple_of=2, description="masks per step, in antithetic pairs")
    explore: float = Field(0.1, gt=0, le=1, description="share of groups explored per step")


class SrSteOptions(Group):
    """Masks that follow trained weights (estimator sr-ste)."""

    decay: Annotated[float, Flag("sr_ste_decay")] = Field(
        2e-4, ge=0, description="decay of removed weights"
    )


class LearnOptions(LoopOptions, ScoreOptions, ModelOptions):
    """`prunedm learn`: which N of every M weights to keep, the weights frozen or trained too."""

    estimator: EstimatorName = Field("relaxed", description="how masks learn")
    distribution: Literal["conditional-bernoulli", "plackett-luce"] = Field(
        "conditional-bernoulli", description="mask distribution of estimators that draw hard masks"
    )
    pattern: PatternText = Field(
        "2:4", description="N kept of every M, where the model has no masks yet"
    )
    masks: ModelName = Field(
        "", description="first masks: a masks file, or a model with masks or zeros"
    )
    score: ScoreName = Field(
        "magnitude", description="score of the first masks, where there are none yet"
    )
    lr: float | None = Field(  # type: ignore[assignment]  # filled() makes it a number
        None,
        gt=0,
        le=1e9,
        description="learning rate of logits; none: by estimator, 0.3 (relaxed), 50 (classic)",
    )
    logits: float | None = Field(
        None, gt=0, description="initial lead of the first masks; none: 1 (relaxed), 10 (classic)"
    )
    steps: int = Field(400, ge=1, description="optimizer steps at most (max_step)")
    epochs: int = Field(0, ge=0, description="passes over --dataset-size problems; 0: --steps")
    dataset_size: int = Field(
        8192, ge=0, description="problems to cycle through; 0: always new ones"
    )
    memo_memory: float = Field(
        1.0, ge=0, description="GiB of dense outputs to keep; others are computed again"
    )
    schedule: Literal["cosine", "constant"] = Field("constant", description="after the warm-up")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0 is no limit")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="averaging of trained parameters; 0 is none"
    )
    distill: float = Field(
        1.0, ge=0, le=1, description="share of the dense model's output in the target"
    )
    train_weights: bool = Field(False, description="train the weights together with the masks")
    weight_lr: float = Field(
        1e-5, gt=0, le=LARGEST_LR, description="peak learning rate of trained weights"
    )
    mask_loss_weight: float = Field(1.0, ge=0, description="weight of the logits' gradient")
    keep_magnitude: float = Field(
        0.0, ge=0, description="reward for the share of magnitude kept, falling to zero"
    )
    relaxed: RelaxedOptions = RelaxedOptions()
    policy_gradient: PolicyGradientOptions = PolicyGradientOptions()
    sr_ste: SrSteOptions = SrSteOptions()
    keep: Literal["best", "last"] = Field(
        "best", description="masks of the lowest held-out loss, or of the last step"
    )

    @model_validator(mode="after")
    def _possible(self) -> "LearnOptions":
        if self.estimator == "sr-ste" and not self.train_weights:
            raise ValueError("sr-ste follows trained weights; add --train-weights")
        if self.epochs and not self.dataset_size:
            raise ValueError("epochs pass over dataset_size problems; give --dataset-size too")
        return self

    def filled(self) -> "LearnOptions":
        """A copy with the estimator's defaults filled in, and steps limited to the epochs."""
        usual = ESTIMATORS[self.estimator]
        update: dict[str, float] = {
            name: getattr(usual, name) for name in ("lr", "logits") if getattr(self, name) is None
        }
        if self.epochs:
            passes = self.epochs * self.dataset_size // (self.batch_size * self.accumulation)
            update["steps"] = max(1, min(self.steps, passes))
        return self.model_copy(update=update)
