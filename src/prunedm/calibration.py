"""Statistics of layers over a stream of problems, in memory that does not grow with the stream.

Shapes: N problems, B time bins, I input channels, *taps of a convolution's kernel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from prunedm.architecture import device_of
from prunedm.errors import UserError
from prunedm.networks.layer_kinds import oriented, tap_means
from prunedm.networks.layers import hooked
from prunedm.progress import Progress, Silent
from prunedm.randomness import generator_for
from prunedm.task import Batch, Times, predict

OverProblems = Literal["mean", "max", "median"]
RESERVOIR = 32  # problems per time bin behind a median


@dataclass(frozen=True)
class TimeBins:
    """`count` bins of equal width over steps first..last of T noise levels, noisiest last."""

    first: int
    last: int
    count: int
    steps: int = 1000  # T

    @classmethod
    def over(cls, times: Times, count: int) -> "TimeBins":
        """Bins over the steps at which a task draws its problems."""
        return cls(times.first, times.last, count, times.steps)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.last - self.first + 1:
            raise UserError(
                f"time_bins = {self.count}: timesteps {self.first}-{self.last} take 1 to "
                f"{self.last - self.first + 1} bins"
            )

    def of(self, level_N: torch.Tensor) -> torch.Tensor:
        """The bin of each noise level, (N,)."""
        width = self.last - self.first + 1
        step_N = (level_N * (self.steps - 1)).round().long()
        return (step_N - self.first) * self.count // width

    @property
    def edges(self) -> list[tuple[int, int]]:
        """First and last step of each bin."""
        width = self.last - self.first + 1
        starts = [self.first + -(-width * b // self.count) for b in range(self.count + 1)]
        return [(start, after - 1) for start, after in pairwise(starts)]


def input_squares(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    bins: TimeBins,
    over_problems: OverProblems = "mean",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Squared inputs of each layer, by time bin: (B, I, *taps); float64.

    Each problem contributes its mean of x^2 over positions; `over_problems` combines the problems of
    a bin (a median uses at most `RESERVOIR` of them). Raises `UserError` where a bin has no problem,
    or a layer is never called.
    """
    squares = {name: {2: _REDUCERS[over_problems](bins.count)} for name in layers}
    _reduce_inputs(denoiser, layers, batches, squares, bin_of=bins.of, progress=progress)
    return {name: reducers[2].value().cpu() for name, reducers in squares.items()}


def input_variances(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Variance over problems and positions of each layer's inputs: (I, *taps); float64.

    Raises `UserError` where a layer is never called.
    """
    moments = {name: {1: _Mean(1), 2: _Mean(1)} for name in layers}

    def one_bin(level_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(level_N, dtype=torch.long)

    _reduce_inputs(denoiser, layers, batches, moments, bin_of=one_bin, progress=progress)
    # E[x^2] - E[x]^2
    variances = {n: (m[2].value() - m[1].value().square())[0] for n, m in moments.items()}
    return {name: variance.clamp_min(0).cpu() for name, variance in variances.items()}


def loss_gradients(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    stop_below: float = 0.0,
    total: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all problems, by layer, as [O, I, *taps].

    Stops before the first batch whose loss is below `stop_below` times the largest so far.
    `total`: the number of batches, for the progress bar of an iterable without a length.
    """
    denoiser.eval()
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    length = len(batches) if isinstance(batches, Sequence) else total
    largest, count = 0.0, 0
    with (progress or Silent()).task("gradients", length) as bar:
        for cpu_batch in batches:
            batch = cpu_batch.to(device_of(denoiser))
            loss = batch.losses(predict(denoiser, batch)).mean()
            value = float(loss.detach())
            largest = max(largest, value)
            if value < stop_below * largest:  # this batch does not count: no backward pass
                break
            gradients = torch.autograd.grad(
                loss,
                list(weights.values()),
                allow_unused=True,  # cross-attention of a decoder on its own
                materialize_grads=True,
            )
            torch._foreach_add_(list(totals.values()), list(gradients), alpha=len(batch))
            count += len(batch)
            bar.advance()
    means = {name: (total / max(1, count)).cpu() for name, total in totals.items()}
    return {name: oriented(layers[name], mean) for name, mean in means.items()}


def _reduce_inputs(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    reducers: Mapping[str, Mapping[int, "_Mean"]],
    *,
    bin_of: Callable[[torch.Tensor], torch.Tensor],
    progress: Progress | None,
) -> None:
    """Feed the reducers of each layer, by power p, with every problem's mean of x^p."""
    level_N = torch.empty(0)  # of the current batch

    def hear(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        for power, reducer in reducers[name].items():
            means = tap_means(layer, inputs[0].detach() ** power)
            reducer.add(_by_problem(means, len(level_N)), bin_of(level_N))

    denoiser.eval()  # dropout would blur the statistics
    bars = (progress or Silent()).task("activations", len(batches))
    with hooked(layers, hear), torch.no_grad(), bars as bar:
        for batch in batches:
            level_N = batch.level_N
            predict(denoiser, batch.to(device_of(denoiser)))
            bar.advance()
    for name, by_power in reducers.items():
        for reducer in by_power.values():
            reducer.check(name)


def _by_problem(means: torch.Tensor, problems: int) -> torch.Tensor:
    """One mean per problem, also where a network folds tokens or windows into its first axis."""
    if len(means) == problems:
        return means
    return means.unflatten(0, (problems, -1)).mean(1)


class _Mean:
    """Mean over the problems of each bin, in float64."""

    def __init__(self, bins: int) -> None:
        self.counts_B = torch.zeros(bins, dtype=torch.long)
        self.totals: torch.Tensor | None = None

    def add(self, values_N: torch.Tensor, bin_N: torch.Tensor) -> None:
        if self.totals is None:
            self.totals = self._first(values_N)
        self._combine(self.totals, values_N.double(), bin_N.to(values_N.device))
        self.counts_B += torch.bincount(bin_N, minlength=len(self.counts_B))

    def check(self, name: str) -> None:
        """Raise `UserError` where layer `name` gave nothing, or nothing in some bin."""
        if self.totals is None:
            raise UserError(f"{name} is never called by the denoiser; leave it out of the targets")
        if not bool(self.counts_B.all()):
            raise UserError(
                f"{int(self.counts_B.sum())} calibration problems leave a time bin of "
                f"{len(self.counts_B)} empty; give more problems, or fewer bins"
            )

    def value(self) -> torch.Tensor:
        assert self.totals is not None
        counts = self.counts_B.to(self.totals.device)
        return self.totals / counts.reshape(-1, *[1] * (self.totals.ndim - 1))

    def _first(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(len(self.counts_B), *values_N.shape[1:], dtype=torch.float64)

    def _combine(self, totals: torch.Tensor, values_N: torch.Tensor, bin_N: torch.Tensor) -> None:
        totals.index_add_(0, bin_N, values_N)


class _Max(_Mean):
    """Maximum over the problems of each bin."""

    def _combine(self, totals: torch.Tensor, values_N: torch.Tensor, bin_N: torch.Tensor) -> None:
        for b in bin_N.unique().tolist():
            totals[b] = torch.maximum(totals[b], values_N[bin_N == b].amax(0))

    def value(self) -> torch.Tensor:
        assert self.totals is not None
        return self.totals


class _Median(_Mean):
    """Median over a uniform sample of at most `RESERVOIR` problems of each bin.

    Reservoir sampling (Vitter 1985, algorithm R), seeded by the position of the problem in its bin,
    so every layer keeps the same problems.
    """

    def _first(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_full(
            (len(self.counts_B), RESERVOIR, *values_N.shape[1:]), torch.nan, dtype=torch.float64
        )

    def _combine(self, totals: torch.Tensor, values_N: torch.Tensor, bin_N: torch.Tensor) -> None:
        seen = self.counts_B.tolist()
        for value, b in zip(values_N, bin_N.tolist(), strict=True):
            slot = seen[b]
            if slot >= RESERVOIR:
                draw = generator_for(0, f"median/{b}", slot)
                slot = int(torch.randint(slot + 1, (), generator=draw))
            if slot < RESERVOIR:
                totals[b, slot] = value
            seen[b] += 1

    def value(self) -> torch.Tensor:
        assert self.totals is not None
        return self.totals.nanquantile(0.5, dim=1)


_REDUCERS: dict[str, type[_Mean]] = {"mean": _Mean, "max": _Max, "median": _Median}
