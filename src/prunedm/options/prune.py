"""Options of `prunedm prune`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat

from prunedm.options.base import Group, ModelOptions, PatternText, ScoreOptions
from prunedm.options.marks import Flag, OneOf
from prunedm.tables import MECHANISMS

Mechanism = Annotated[str, OneOf(MECHANISMS)]
TARGETS = ("params", "macs", "channels", "weights", "blocks")


def parse_target(text: str) -> tuple[str, float]:
    """'params=0.3' => ("params", 0.3). A bare number means params."""
    kind, equals, number = text.rpartition("=")
    kind = kind.strip() if equals else "params"
    if kind not in TARGETS:
        raise ValueError(f"{kind!r} is not one of {', '.join(TARGETS)}")
    try:
        ratio = float(number)
    except ValueError:
        raise ValueError(f"{number!r} is not a number; write {kind}=0.3") from None
    if not 0 < ratio < 1:
        raise ValueError(f"{ratio:g} is not between 0 and 1; {kind}=0.3 removes 30 %")
    return kind, ratio


TargetText = Annotated[str, AfterValidator(lambda text: parse_target(text) and text)]


class ObsOptions(Group):
    """Optimal brain surgeon: removal by the Hessian, and updates of the weights that stay."""

    damping: Annotated[float, Flag("obs_damping")] = Field(
        0.01, gt=0, description="damping, as a share of the Hessian's mean diagonal"
    )
    time_weights: Annotated[tuple[PositiveFloat, PositiveFloat], Flag("obs_time_weights")] = Field(
        (1.2, 0.8), description="weights of problems, from the noisiest step to the cleanest"
    )
    guidance: Annotated[float | None, Flag("obs_guidance")] = Field(
        None, ge=0, description="exponent of each position's influence; 0 is SparseGPT's rule"
    )
    swaps: Annotated[int, Flag("obs_swaps")] = Field(
        15, ge=0, description="rounds of swaps that improve the masks after the sweep (obs-nm)"
    )
    refit: Annotated[int, Flag("obs_refit")] = Field(
        30, ge=0, description="steps that fit the kept weights together; 0 is SparseGPT's rule"
    )
    correction: Annotated[float, Flag("obs_correction")] = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the error before it that a layer makes good, where blocks are pruned in "
        "turn; 0 is SparseGPT's rule",
    )
    memory: Annotated[float, Flag("obs_memory")] = Field(
        2.0, gt=0, description="GiB of Hessians at a time"
    )


class SensitivityOptions(Group):
    """Allocation by measured loss."""

    candidates: tuple[str, ...] = Field(
        (), description="a pattern or ratio that layers may get; repeatable"
    )
    problems: Annotated[int, Flag("sensitivity_problems")] = Field(
        128, ge=2, description="problems in a layer's sensitivity"
    )


class ChannelOptions(Group):
    """How channels are narrowed."""

    round_to: int | None = Field(
        None,
        ge=1,
        description="multiple that widths are rounded to; none: 16, or 8 where no width exceeds 64",
    )
    max_layer_ratio: float = Field(0.7, gt=0, lt=1, description="largest share that a layer loses")
    narrow_ends: bool = Field(
        False, description="also remove output channels of conv_in and input channels of conv_out"
    )
    reduction: Literal["sum", "mean", "max", "first"] = Field(
        "max", description="reduction of a channel's scores over the layers that share it"
    )
    loadable_by: Literal["prunedm", "transformers"] = Field(
        "prunedm",
        description="transformers: the same widths in all blocks of a language model, which loads "
        "without prunedm",
    )
    reinitialise: bool = Field(
        False, description="new random weights in the smaller network, as a baseline"
    )


class PruneOptions(ScoreOptions, ModelOptions):
    """`prunedm prune`: remove channels, whole blocks, single weights, or N:M weights."""

    mechanism: Mechanism = Field(
        "channels", description="what is removed; obs- updates the remaining weights"
    )
    target: TargetText = Field(
        "params=0.3",
        description="share removed: params=, macs=, channels= (channels), weights= (of the layers), "
        "blocks= (depth)",
    )
    pattern: PatternText = Field("2:4", description="N kept of every M input channels (nm)")
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform", description="the same for all layers, or by measured loss to meet the target"
    )
    permute: bool = Field(
        False, description="reorder channels first so that groups lose less (nm, obs-nm)"
    )
    scope: Literal["row", "layer", "global"] = Field(
        "global", description="rank weights within an output row, a layer, or all (weights)"
    )
    pictures: int = Field(16, ge=0, description="samples before and after, from the same noise")
    problems: int | None = Field(
        None,
        ge=0,
        description="held-out problems in the loss before and after; none: 16 to 64, by cost",
    )
    channels: ChannelOptions = ChannelOptions()
    obs: ObsOptions = ObsOptions()
    sensitivity: SensitivityOptions = SensitivityOptions()
