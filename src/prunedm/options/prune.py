"""Options of `prunedm prune`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat

from prunedm.options.base import Group, ModelOptions, PatternText, ScoreOptions
from prunedm.options.marks import Flag, OneOf
from prunedm.tables import MECHANISMS

Mechanism = Annotated[str, OneOf(MECHANISMS)]
TARGETS = ("params", "macs", "channels", "weights")


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


TargetText = Annotated[str, AfterValidator(_checked_target)]


class ObsOptions(Group):
    """Optimal brain surgeon: which weights go by the Hessian, and what the others become."""

    damping: Annotated[float, Flag("obs_damping")] = Field(
        0.01, gt=0, description="of the Hessian's mean diagonal"
    )
    time_weights: Annotated[tuple[PositiveFloat, PositiveFloat], Flag("obs_time_weights")] = Field(
        (1.2, 0.8), description="of problems, from the noisiest step to the cleanest"
    )
    guidance: Annotated[float, Flag("obs_guidance")] = Field(
        0.5, ge=0, description="positions count by influence^this; 0 is SparseGPT's rule"
    )
    swaps: Annotated[int, Flag("obs_swaps")] = Field(
        15, ge=0, description="rounds of swaps that mend the masks after the sweep (obs-nm)"
    )
    memory: Annotated[float, Flag("obs_memory")] = Field(
        2.0, gt=0, description="GiB of Hessians at a time"
    )


class SensitivityOptions(Group):
    """What each layer may get where the allocation goes by measured loss."""

    candidates: tuple[str, ...] = Field(
        (), description="a pattern or ratio that layers may get; repeat it"
    )
    problems: Annotated[int, Flag("sensitivity_problems")] = Field(
        128, ge=2, description="problems behind a layer's sensitivity"
    )


class ChannelOptions(Group):
    """How channels are narrowed."""

    round_to: int | None = Field(
        None, ge=1, description="widths' multiple; none: 16, or 8 where none is over 64"
    )
    max_layer_ratio: float = Field(0.7, gt=0, lt=1, description="most that one layer loses")
    narrow_ends: bool = Field(
        False, description="also remove channels that conv_in makes and conv_out reads"
    )
    reduction: Literal["sum", "mean", "max", "first"] = Field(
        "max", description="of a channel's scores over the layers that share it"
    )
    reinitialise: bool = Field(
        False, description="fresh weights in the smaller network: a baseline"
    )


class PruneOptions(ScoreOptions, ModelOptions):
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
        description="held-out, of the loss before and after; none: 16 to 64 by their cost",
    )
    channels: ChannelOptions = ChannelOptions()
    obs: ObsOptions = ObsOptions()
    sensitivity: SensitivityOptions = SensitivityOptions()
