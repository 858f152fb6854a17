"""Distributions over N:M masks with one logit a weight. A set S is the N kept of a group of M.

*Conditional Bernoulli* (Chen & Liu 1997), M independent coins given that N come up heads:
P(S) = exp(sum_{i in S} l_i) / Z, and d log P(S) / d l = mask - inclusion. Items are walked in order.
With E_r(i) the log of the r-th elementary symmetric polynomial of exp(l_i), ..., exp(l_{M-1}), item
i is taken, when r are still to come, with log-odds

    x_r(i) = l_i - D_r(i + 1),    D_r(i) = E_r(i) - E_{r-1}(i),    s_r(i) = log(1 + exp x_r(i)),
    D_r(i) = D_r(i + 1) + s_r(i) - s_{r-1}(i).

D stays as large as a logit where E grows with N, so float32 keeps its digits. Samples, log P,
entropy and inclusion probabilities (for SIMPLE, Ahmed et al. 2023) are one walk over the x.

*Plackett-Luce* (Luce 1959, Plackett 1975), N draws without replacement, each in proportion to exp(l)
among what is left. Its sets are the top N of l + Gumbel (Kool et al. 2019). F(T), the probability
that the first |T| draws are the set T, sums over orders without listing them:

    F(T) = sum_{j in T} F(T - j) exp(l_j) / sum_{k not in T - j} exp(l_k).

Sums over the rest are taken in log space: 1 - p would lose everything once p is near 1. log P(S)
goes over the 2^N subsets of S; inclusion and entropy go over all sets of up to N of M.

Both are most probable at the N largest logits. For Plackett-Luce: draws are the first N arrivals of
independent exponential clocks, and having the faster of two clocks in S, the slower outside, never
makes "all of S before all others" less likely.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import combinations, pairwise
from math import comb

import torch
from torch.nn.functional import logsigmoid, softplus
from torch.utils.checkpoint import checkpoint

from prunedm.errors import UserError
from prunedm.masks import Pattern
from prunedm.removal.nm import nm_mask

GRAPH_CHUNK = 1 << 21  # numbers that a graph holds at a time: 8 MB in float32
_SAMPLE_CHUNK = 1 << 18  # weights at a time: they stay in the processor's cache
_MOST_SETS = 1 << 16  # all sets of 16
_LINEAR = 40  # where softplus(x) is x to float64's last digit; torch's own 20 serves float32

_Choices = dict[tuple[int, int], torch.Tensor]  # (C,) by (item, how many are still to come)
_Either = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Distribution(ABC):
    """Independent groups of M, each with a random set of N; tensors have the logits' dtype, device."""

    def __init__(self, logits_GM: torch.Tensor, n: int) -> None:
        """Raise `UserError` unless 0 < N < M."""
        self.logits_GM = logits_GM
        self.pattern = Pattern(n, logits_GM.shape[1])

    @torch.no_grad()
    def sample(self, uniform_GM: torch.Tensor) -> torch.Tensor:
        """Masks, bool (G, M), as a function of uniforms in [0, 1]; 1 - u gives the antithetic draw."""
        assert uniform_GM.shape == self.logits_GM.shape
        groups = max(1, _SAMPLE_CHUNK // self.pattern.m)
        mask_GM = torch.empty_like(self.logits_GM, dtype=torch.bool)
        parts = (part.split(groups) for part in (mask_GM, self.logits_GM, uniform_GM))
        # torch.rand gives multiples of eps / 2: only 0 and 1, where no quantile is finite, move
        eps = torch.finfo(uniform_GM.dtype).eps
        for mask_CM, l_CM, u_CM in zip(*parts, strict=True):
            mask_CM.copy_(self._sample(l_CM, u_CM.clamp(eps / 4, 1 - eps / 2)))
        return mask_GM

    def log_prob(self, mask_GM: torch.Tensor) -> torch.Tensor:
        """log P of each group's set, (G,), differentiable in the logits."""
        mask_GM = mask_GM.bool()
        assert bool((mask_GM.sum(1) == self.pattern.n).all()), f"masks are not {self.pattern}"
        return _in_chunks(self._log_prob, self._cost(self.pattern.n), self.logits_GM, mask_GM)

    def score(self, mask_GM: torch.Tensor) -> torch.Tensor:
        """d log P / d logits, (G, M), without a graph."""
        with torch.enable_grad():
            leaf_GM = self.logits_GM.detach().requires_grad_()
            total = type(self)(leaf_GM, self.pattern.n).log_prob(mask_GM).sum()
            return torch.autograd.grad(total, leaf_GM)[0]

    def relative_score(self, mask_GM: torch.Tensor) -> torch.Tensor:
        """`score` up to a term that all masks share: equivalent where their weights sum to 0."""
        return self.score(mask_GM)

    def inclusion(self) -> torch.Tensor:
        """Probability that each weight is kept, (G, M); a group sums to N; differentiable."""
        return _in_chunks(self._inclusion, self._cost(self.pattern.m), self.logits_GM)

    def entropy(self) -> torch.Tensor:
        """Entropy of each group's set in nats, (G,), differentiable in the logits."""
        return _in_chunks(self._entropy, self._cost(self.pattern.m), self.logits_GM)

    def mode(self) -> torch.Tensor:
        """The most probable masks, bool (G, M): the N largest logits; ties keep the first."""
        return nm_mask(self.logits_GM.detach(), self.pattern)

    @abstractmethod
    def _sample(self, l_CM: torch.Tensor, u_CM: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _log_prob(self, l_CM: torch.Tensor, mask_CM: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _inclusion(self, l_CM: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _entropy(self, l_CM: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _cost(self, items: int) -> int:
        """Roughly the numbers that a graph holds for one group, where draws are from `items` items."""


class ConditionalBernoulli(Distribution):
    """P(S) = exp(sum_{i in S} l_i) / Z."""

    @torch.no_grad()
    def score(self, mask_GM: torch.Tensor) -> torch.Tensor:
        """d log P / d logits = mask - inclusion, (G, M), without a graph."""
        return mask_GM.to(self.logits_GM.dtype) - self.inclusion()

    def relative_score(self, mask_GM: torch.Tensor) -> torch.Tensor:
        """The mask itself, since all masks share the inclusion probabilities."""
        return mask_GM.to(self.logits_GM.dtype)

    def _sample(self, l_CM: torch.Tensor, u_CM: torch.Tensor) -> torch.Tensor:
        u_MC = _by_member(u_CM)
        taken = {(i, r): u_MC[i] < x.sigmoid() for (i, r), x in self._log_odds(l_CM).items()}
        left = {place: ~hit for place, hit in taken.items()}
        kept_MC, _ = self._walk(taken, left, operator.or_)
        return torch.stack(kept_MC, 1)

    def _log_prob(self, l_CM: torch.Tensor, mask_CM: torch.Tensor) -> torch.Tensor:
        kept_MC = _by_member(mask_CM)
        to_come_MC = self.pattern.n - (kept_MC.cumsum(0) - kept_MC.long())
        total_C = torch.zeros_like(l_CM[:, 0])
        for (i, r), x_C in self._log_odds(l_CM).items():
            log_p_C = logsigmoid(torch.where(kept_MC[i], x_C, -x_C))
            total_C = total_C + torch.where(to_come_MC[i] == r, log_p_C, 0)
        return total_C

    def _inclusion(self, l_CM: torch.Tensor) -> torch.Tensor:
        kept_MC, _ = self._expected(self._log_odds(l_CM))
        return torch.stack(kept_MC, 1)

    def _entropy(self, l_CM: torch.Tensor) -> torch.Tensor:
        x = self._log_odds(l_CM)
        _, reached = self._expected(x)
        total_C = torch.zeros_like(l_CM[:, 0])
        for place, here_C in reached.items():
            yes_C, no_C = logsigmoid(x[place]), logsigmoid(-x[place])
            total_C = total_C - here_C * (yes_C.exp() * yes_C + no_C.exp() * no_C)
        return total_C

    def _cost(self, items: int) -> int:
        del items
        return 12 * self.pattern.n * self.pattern.m

    def _log_odds(self, l_CM: torch.Tensor) -> _Choices:
        """x_r(i), (C,), for every reachable state with a choice."""
        n, m = self.pattern.n, self.pattern.m
        x: _Choices = {}
        ratio: dict[int, torch.Tensor] = {}  # D_r(i + 1) by r
        for i, l_C in reversed(list(enumerate(_by_member(l_CM)))):
            choices = range(max(1, n - i), min(n, m - i - 1) + 1)
            x.update({(i, r): l_C - ratio[r] for r in choices})
            if i == 0:
                break
            soft = {r: softplus(x[i, r], threshold=_LINEAR) for r in choices}
            # with r = M - i, E_r(i) is the sum of all the logits, and D_r(i) = l_i - s_{r-1}(i)
            needed = range(max(1, n - i + 1), min(n, m - i) + 1)
            grown = {r: ratio[r] + soft[r] if r < m - i else l_C for r in needed}
            ratio = {r: d - soft[r - 1] if r > 1 else d for r, d in grown.items()}
        return x

    def _expected(self, x: _Choices) -> tuple[list[torch.Tensor], _Choices]:
        """`_walk` in probabilities."""
        taken = {place: odds.sigmoid() for place, odds in x.items()}
        left = {place: (-odds).sigmoid() for place, odds in x.items()}
        return self._walk(taken, left, operator.add)

    def _walk(
        self, taken: _Choices, left: _Choices, either: _Either
    ) -> tuple[list[torch.Tensor], _Choices]:
        """Whether each item is kept, M of (C,), and whether each choice is reached.

        Values are probabilities, or booleans for a sample; `either` joins mutually exclusive ones.
        """
        kept, reached = [], {}
        at = {
            self.pattern.n: torch.ones_like(taken[0, self.pattern.n])
        }  # by how many are still to come
        for i in range(self.pattern.m):
            kept_C, after = torch.zeros_like(taken[0, self.pattern.n]), {}
            for r, here_C in sorted(at.items()):
                if r == 0:
                    after[0] = here_C
                    continue
                go_C = here_C  # all remaining items are needed
                if (i, r) in taken:
                    reached[i, r] = here_C
                    after[r], go_C = here_C * left[i, r], here_C * taken[i, r]
                kept_C = either(kept_C, go_C)
                after[r - 1] = either(after[r - 1], go_C) if r - 1 in after else go_C
            kept.append(kept_C)
            at = after
        return kept, reached


class PlackettLuce(Distribution):
    """The top N of l + Gumbel."""

    def _sample(self, l_CM: torch.Tensor, u_CM: torch.Tensor) -> torch.Tensor:
        return nm_mask(l_CM - (-u_CM.log()).log(), self.pattern)

    def _log_prob(self, l_CM: torch.Tensor, mask_CM: torch.Tensor) -> torch.Tensor:
        kept_CN = l_CM[mask_CM].view(-1, self.pattern.n)
        others_C = l_CM[~mask_CM].view(len(l_CM), -1).logsumexp(1)
        return _drawn(kept_CN, others_C, self.pattern.n)[0]

    def _inclusion(self, l_CM: torch.Tensor) -> torch.Tensor:
        share_KC = _drawn(l_CM, None, self.pattern.n).softmax(0)
        _, kept_KN, _ = _lattice(self.pattern.m, self.pattern.n, l_CM.device)[-1]
        pattern_KM = share_KC.new_zeros(len(kept_KN), self.pattern.m).scatter_(1, kept_KN, 1)
        return share_KC.T @ pattern_KM

    def _entropy(self, l_CM: torch.Tensor) -> torch.Tensor:
        log_p_KC = _drawn(l_CM, None, self.pattern.n).log_softmax(0)
        return -(log_p_KC.exp() * log_p_KC).sum(0)

    def _cost(self, items: int) -> int:
        sets = sum(comb(items, k) for k in range(self.pattern.n + 1))
        if sets > _MOST_SETS:
            raise UserError(
                f"plackett-luce goes over {sets} sets a group for {self.pattern}, {_MOST_SETS} at "
                "most; choose conditional-bernoulli or M up to 16"
            )
        return 3 * items * sets


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    "conditional-bernoulli": ConditionalBernoulli,
    "plackett-luce": PlackettLuce,
}


def all_patterns(pattern: Pattern) -> torch.Tensor:
    """(K, M) floats: every way to keep N of M, in lexicographic order of the kept indices."""
    kept_KN = torch.tensor(list(combinations(range(pattern.m), pattern.n)))
    return torch.zeros(len(kept_KN), pattern.m).scatter_(1, kept_KN, 1)


def _drawn(l_CT: torch.Tensor, others_C: torch.Tensor | None, most: int) -> torch.Tensor:
    """log F of all sets of `most` of T items, (sets, C), in lexicographic order.

    `others_C`: logsumexp of the items outside these T, if there are any.
    """
    l_TC = _by_member(l_CT)
    log_f_SC, scale_C = torch.zeros_like(l_TC[:1]), torch.zeros_like(l_TC[0])
    for rest_SR, member_SK, before_SK in _lattice(len(l_TC), most, l_TC.device):
        rest_SC = l_TC[rest_SR].logsumexp(1)
        if others_C is not None:
            rest_SC = torch.logaddexp(rest_SC, others_C)
        log_f_SC = ((log_f_SC - rest_SC)[before_SK] + l_TC[member_SK]).logsumexp(1)
        # the common offset is kept apart: next to -900 the other terms would lose their digits
        top_C = log_f_SC.detach().amax(0)
        log_f_SC, scale_C = log_f_SC - top_C, scale_C + top_C
    return log_f_SC + scale_C


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # cached tensors must also serve graphs
def _lattice(items: int, most: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Per draw k = 1..most: the items left after each set of k - 1, each set of k, and the rows of its
    subsets of k - 1 (in the order of the missing member). Sets are in lexicographic order."""
    levels = [list(combinations(range(items), k)) for k in range(most + 1)]
    draws = []
    for smaller, larger in pairwise(levels):
        index = {subset: row for row, subset in enumerate(smaller)}
        rest = [[j for j in range(items) if j not in subset] for subset in smaller]
        before = [[index[s[:k] + s[k + 1 :]] for k in range(len(s))] for s in larger]
        draws.append([torch.tensor(table, device=device) for table in (rest, larger, before)])
    return draws


def _in_chunks(
    function: Callable[..., torch.Tensor], cost: int, *tensors: torch.Tensor
) -> torch.Tensor:
    """function(*tensors) of independent groups, in chunks; one group's graph holds `cost` numbers."""
    groups = max(1, GRAPH_CHUNK // cost)
    run = function
    if torch.is_grad_enabled() and tensors[0].requires_grad and len(tensors[0]) > groups:
        # the graph of a chunk is dropped, and built again for its gradient
        run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = zip(*(tensor.split(groups) for tensor in tensors), strict=True)
    return torch.cat([run(*part) for part in parts])


def _by_member(values_CM: torch.Tensor) -> torch.Tensor:
    """(M, C), contiguous; `.T.contiguous()` takes three times as long on a CPU."""
    return torch.stack(values_CM.unbind(1))
