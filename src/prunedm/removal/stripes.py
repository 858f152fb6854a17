"""Choosing which channels share an N:M group: swaps, best first (Pool & Yu 2021, section 4).

A *slot* is a position in a set of channels; a *stripe* is the M slots of one N:M group in the layers
that read the channels. The search swaps the contents of two *units* (one slot, two, or a whole cell)
until no swap gains. All swaps of a kind are evaluated at once, and re-evaluated only where a stripe
has changed.

R rows of scores, one for each output channel and kernel tap of the layers that read; C channels,
or their slots; S stripes; A, B units; U slots of a unit; X the slots left in its stripe; V views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.nn import functional as F

from prunedm.masks import Pattern

_CHUNK = 1 << 20  # numbers in the largest temporary tensor
_ROUNDS = 20  # over all kinds of swap; two or three are enough in practice
_SWAPS = 10  # at most, for each unit of one kind in one round


@dataclass(frozen=True)
class View:
    """Score columns of layers that see the channels in the same stripes under one pattern."""

    pattern: Pattern
    score_RC: torch.Tensor  # float64
    home_C: torch.Tensor  # the stripe of each slot, or -1 where it must not change

    @property
    def stripe_SM(self) -> torch.Tensor:
        """The slots of each stripe."""
        inside = (self.home_C >= 0).nonzero().flatten()
        return inside[self.home_C[inside].argsort(stable=True)].reshape(-1, self.pattern.m)


def stripe_homes(place_C: torch.Tensor, m: int) -> torch.Tensor:
    """The stripe of each slot, counted from 0; -1 where other channels share the stripe."""
    stripe_C = place_C // m
    whole = torch.bincount(stripe_C) == m
    return torch.where(whole[stripe_C], (whole.cumsum(0) - 1)[stripe_C], -1)


def best_content(
    views: Sequence[View], cells: Sequence[torch.Tensor], families: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The best channel for each slot."""
    content_C = torch.arange(views[0].score_RC.shape[1])
    kinds = [units for units in _kinds(views, cells, families) if bool(_apart(views, units).any())]
    for _ in range(_ROUNDS):
        before_C = content_C.clone()
        for units_AU in kinds:
            _swap_best(views, content_C, units_AU)
        if torch.equal(content_C, before_C):
            break
    return content_C


def _kinds(
    views: Sequence[View], cells: Sequence[torch.Tensor], families: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Sets of units (A, U) that may swap with each other: channels, pairs of them, whole cells."""
    for cell in cells:
        yield _in_stripes(views, cell[:, None])
        # Pairs avoid local optima of two stripes of four: each is at most two channels from its best.
        if max(view.pattern.m for view in views) <= 4:
            pairs = torch.tensor(list(combinations(cell.tolist(), 2)), dtype=torch.long)
            yield _in_stripes(views, pairs.reshape(-1, 2))
    for units_AU in families:
        if units_AU.shape[1] < min(view.pattern.m for view in views):
            yield _in_stripes(views, units_AU)


def _in_stripes(views: Sequence[View], units_AU: torch.Tensor) -> torch.Tensor:
    """The units that lie in one stripe of every view."""
    inside = torch.ones(len(units_AU), dtype=torch.bool)
    for view in views:
        home_AU = view.home_C[units_AU]
        inside &= (home_AU == home_AU[:, :1]).all(1) & (home_AU[:, 0] >= 0)
    return units_AU[inside]


def _apart(views: Sequence[View], units_AU: torch.Tensor) -> torch.Tensor:
    """Whether two units are in different stripes: (views, A, A)."""
    homes = torch.stack([view.home_C[units_AU[:, 0]] for view in views])
    return homes[:, :, None] != homes[:, None, :]


def _swap_best(views: Sequence[View], content_C: torch.Tensor, units_AU: torch.Tensor) -> None:
    """Swap the two units with the largest gain, in place, until no swap gains.

    A swap changes one stripe per unit. With kept[a, b], the score of unit a's stripe with b's content
    in place of a's, the gain is kept[a, b] + kept[b, a] - kept[a, a] - kept[b, b].
    """
    apart_VAA = _apart(views, units_AU)
    kept_VAA = torch.stack([_kept_with(view, content_C, units_AU, units_AU) for view in views])
    least = 1e-10 * kept_score(views, content_C)  # rounding must not cause endless swaps
    for _ in range(_SWAPS * len(units_AU)):
        own_VA = kept_VAA.diagonal(dim1=1, dim2=2)
        gain_VAA = kept_VAA + kept_VAA.mT - own_VA[:, :, None] - own_VA[:, None, :]
        gain_AA = (gain_VAA * apart_VAA).sum(0)
        a, b = divmod(int(gain_AA.argmax()), len(units_AU))
        if gain_AA[a, b] <= least:
            return
        one, other = units_AU[a], units_AU[b]
        content_C[one], content_C[other] = content_C[other], content_C[one]
        for view, kept_AA, apart_AA in zip(views, kept_VAA, apart_VAA, strict=True):
            touched = (~apart_AA[a] | ~apart_AA[b]).nonzero().flatten()
            kept_AA[touched] = _kept_with(view, content_C, units_AU[touched], units_AU)
            kept_AA[:, touched] = _kept_with(view, content_C, units_AU, units_AU[touched])


def _kept_with(
    view: View, content_C: torch.Tensor, units_AU: torch.Tensor, others_BU: torch.Tensor
) -> torch.Tensor:
    """Score kept in each unit's stripe with the content of another unit in its place: (A, B).

    The best N of the union of two sets are, for some j, the best N-j of one and the best j of the other.
    """
    n, stripe_AM = view.pattern.n, view.stripe_SM[view.home_C[units_AU[:, 0]]]
    leaving_AM = (stripe_AM[:, :, None] == units_AU[:, None, :]).any(2)
    rest_AX = stripe_AM[~leaving_AM].reshape(len(units_AU), -1)
    takes = range(max(0, n - rest_AX.shape[1]), min(n, others_BU.shape[1]) + 1)
    kept_AB = content_C.new_zeros((len(units_AU), len(others_BU)), dtype=torch.float64)
    for score_RC in view.score_RC.split(max(1, _CHUNK // max(1, kept_AB.numel()))):
        stays_RAX = _best_sums(score_RC[:, content_C[rest_AX]])
        comes_RBX = _best_sums(score_RC[:, content_C[others_BU]])
        best_RAB = stays_RAX[:, :, None, n - takes[0]] + comes_RBX[:, None, :, takes[0]]
        for j in takes[1:]:
            sum_RAB = stays_RAX[:, :, None, n - j] + comes_RBX[:, None, :, j]
            best_RAB = torch.maximum(best_RAB, sum_RAB)
        kept_AB += best_RAB.sum(0)
    return kept_AB


def _best_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums of the 0, 1, 2, ... highest along the last axis."""
    sums = values.sort(-1, descending=True).values.cumsum(-1)
    return F.pad(sums, (1, 0))


def kept_score(views: Sequence[View], content_C: torch.Tensor) -> float:
    """The score that masks keep in all stripes, except those shared with other channels."""
    return sum(
        float(_best_sums(view.score_RC[:, content_C[view.stripe_SM]])[..., view.pattern.n].sum())
        for view in views
    )
