"""Distributions over N:M masks against enumeration of all sets and orders, in float64."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2

from prunedm.errors import UserError
from prunedm.learning import distribution
from prunedm.learning.distribution import DISTRIBUTIONS, Distribution, all_patterns
from prunedm.masks import Pattern

SMALL = [(n, m) for m in range(2, 9) for n in range(1, m)]
FAMILIES = list(DISTRIBUTIONS)
family = pytest.mark.parametrize("family", FAMILIES)
small = pytest.mark.parametrize(("n", "m"), SMALL)


def some_logits(groups: int, m: int, scale: float, dtype=torch.float64) -> torch.Tensor:
    """Uniform in [-scale, scale]; every third group at the ends, so with ties."""
    generator = torch.Generator().manual_seed(100 * m + groups)
    uniform_GM = 2 * torch.rand(groups, m, generator=generator) - 1
    uniform_GM[2::3] = uniform_GM[2::3].sign()
    return (scale * uniform_GM).to(dtype)  # the same numbers in float32 and float64


def uniforms(l_GM: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.rand(l_GM.shape, generator=torch.Generator().manual_seed(seed))


def sets(n: int, m: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(m), n))


def all_log_p(family: str, l_GM: torch.Tensor, n: int) -> torch.Tensor:
    """log P of every set, (G, K), straight from the definition."""
    every = sets(n, l_GM.shape[1])
    if family == "conditional-bernoulli":
        return torch.stack([l_GM[:, s].sum(1) for s in every], 1).log_softmax(1)
    return torch.stack([(orders if n < 4 else race)(l_GM, s) for s in every], 1)


def orders(l_GM: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    """Plackett-Luce: log P of a set, (G,), summed over the N! orders draw by draw."""
    by_order = []
    for order in itertools.permutations(kept):
        rest = list(range(l_GM.shape[1]))
        total_G = torch.zeros_like(l_GM[:, 0])
        for item in order:
            total_G = total_G + l_GM[:, item] - l_GM[:, rest].logsumexp(1)
            rest.remove(item)
        by_order.append(total_G)
    return torch.stack(by_order).logsumexp(0)


def race(l_GM: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    """Plackett-Luce: exponential clocks, all of a set before the first of the others.

    With t = exp(z) the time of that first, and R the sum of the others' exp(l),
    P = int R t exp(-R t) prod_{i in S} (1 - exp(-t exp(l_i))) dz: smooth and zero at both ends, so
    that the trapezoid rule converges geometrically.
    """
    step = 0.1
    z_Z = torch.arange(-60.0, 20.0, step, dtype=l_GM.dtype)
    others = [i for i in range(l_GM.shape[1]) if i not in kept]
    late_GZ = l_GM[:, others].logsumexp(1, keepdim=True) + z_Z
    early_GNZ = (-torch.expm1(-(l_GM[:, kept, None] + z_Z).exp())).log()
    return (late_GZ - late_GZ.exp() + early_GNZ.sum(1) + math.log(step)).logsumexp(1)


def with_every_mask(family: str, l_GM: torch.Tensor, n: int) -> tuple[Distribution, torch.Tensor]:
    """Each group as often as there are sets, and with each of them: (G K, M)."""
    pattern_KM = all_patterns(Pattern(n, l_GM.shape[1])).bool()
    repeated = l_GM.repeat_interleave(len(pattern_KM), 0)
    return DISTRIBUTIONS[family](repeated, n), pattern_KM.repeat(len(l_GM), 1)


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-9, rtol: float = 0) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def test_patterns_are_all_sets_in_lexicographic_order():
    pattern_KM = all_patterns(Pattern(2, 4))
    assert [tuple(row.nonzero().flatten().tolist()) for row in pattern_KM] == sets(2, 4)
    assert all_patterns(Pattern(8, 16)).shape == (12870, 16)
    assert bool((all_patterns(Pattern(8, 16)).sum(1) == 8).all())


def test_both_oracles_of_plackett_luce_agree():
    l_GM = some_logits(3, 6, 3.0)
    for kept in sets(4, 6)[::4]:
        close(race(l_GM, kept), orders(l_GM, kept))


@family
@small
def test_values_are_those_of_enumeration(family, n, m):
    l_GM = some_logits(3, m, 3.0)
    log_p_GK = all_log_p(family, l_GM, n)
    pattern_KM = all_patterns(Pattern(n, m)).double()
    every, mask_AM = with_every_mask(family, l_GM, n)
    close(every.log_prob(mask_AM), log_p_GK.flatten())
    dist = DISTRIBUTIONS[family](l_GM, n)
    close(dist.inclusion(), log_p_GK.exp() @ pattern_KM)
    close(dist.entropy(), -(log_p_GK.exp() * log_p_GK).sum(1))
    close(dist.log_prob(dist.mode()), log_p_GK.amax(1))  # where sets tie, it is one of them
    assert torch.equal(dist.mode()[:2], pattern_KM[log_p_GK.argmax(1)][:2].bool())


@family
@small
def test_gradients_are_those_of_enumeration(family, n, m):
    l_GM = some_logits(3, m, 3.0).requires_grad_()
    log_p_GK = all_log_p(family, l_GM, n)
    share_GK = log_p_GK.exp()
    every, mask_AM = with_every_mask(family, l_GM, n)
    dist = DISTRIBUTIONS[family](l_GM, n)
    pairs = [
        (every.log_prob(mask_AM), log_p_GK),
        (dist.inclusion(), share_GK @ all_patterns(Pattern(n, m)).double()),
        (dist.entropy(), -(share_GK * log_p_GK).sum(1)),
    ]
    for found, wanted in pairs:
        weight = torch.linspace(-1, 2, found.numel(), dtype=torch.float64)
        of_found, of_wanted = (
            torch.autograd.grad(value.flatten() @ weight, l_GM, retain_graph=True)[0]
            for value in (found, wanted)
        )
        close(of_found, of_wanted)
    weight_A = torch.linspace(-1, 2, len(mask_AM), dtype=torch.float64)
    (wanted_GM,) = torch.autograd.grad(log_p_GK.flatten() @ weight_A, l_GM)
    score_AM = every.score(mask_AM)
    assert not score_AM.requires_grad
    close((weight_A[:, None] * score_AM).view(3, -1, m).sum(1), wanted_GM)


@pytest.mark.parametrize(("n", "m"), [(1, 16), (2, 16), (8, 16), (15, 16)])
def test_conditional_bernoulli_of_sixteen(n, m):
    l_GM = some_logits(3, m, 3.0)
    log_p_GK = all_log_p("conditional-bernoulli", l_GM, n)
    every, mask_AM = with_every_mask("conditional-bernoulli", l_GM, n)
    close(every.log_prob(mask_AM), log_p_GK.flatten())
    dist = DISTRIBUTIONS["conditional-bernoulli"](l_GM, n)
    close(dist.inclusion(), log_p_GK.exp() @ all_patterns(Pattern(n, m)).double())
    close(dist.entropy(), -(log_p_GK.exp() * log_p_GK).sum(1))


@family
def test_float64_keeps_its_digits_where_one_logit_leads(family):
    """log(1 + exp x) is not yet x at x = 20."""
    l_GM = torch.tensor([[0, 20.5, 0, 0], [0, 25, 1, 0], [25, 22, 0, 1]], dtype=torch.float64)
    every, mask_AM = with_every_mask(family, l_GM, 2)
    close(every.log_prob(mask_AM), all_log_p(family, l_GM, 2).flatten(), atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 16), (2, 16), (8, 16), (15, 16)])
def test_plackett_luce_of_sixteen(n, m):
    """log P by the race, of 30 sets at most; what goes over all sets from log P of all sets."""
    l_GM = some_logits(1, m, 3.0)
    every, mask_AM = with_every_mask("plackett-luce", l_GM, n)
    log_p_K = every.log_prob(mask_AM)
    some = range(0, len(log_p_K), 1 + len(log_p_K) // 30)
    close(log_p_K[some], torch.cat([race(l_GM, sets(n, m)[k]) for k in some]))
    dist = DISTRIBUTIONS["plackett-luce"](l_GM, n)
    close(dist.inclusion()[0], log_p_K.exp() @ mask_AM.double())
    close(dist.entropy()[0], -(log_p_K.exp() @ log_p_K))


@family
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (7, 8), (2, 16), (8, 16)])
def test_float32_holds_for_logits_up_to_60(family, n, m):
    """Against float64, of samples and of sets that never occur (log P down to -900)."""
    l_GM = some_logits(3 if (family, n) == ("plackett-luce", 8) else 300, m, 60.0, torch.float32)
    single, double = DISTRIBUTIONS[family](l_GM, n), DISTRIBUTIONS[family](l_GM.double(), n)
    unlikely = DISTRIBUTIONS[family](-l_GM, n).mode()
    for mask_GM in (single.sample(uniforms(l_GM)), unlikely, single.mode()):
        log_p_G = single.log_prob(mask_GM)
        assert log_p_G.dtype == torch.float32
        close(log_p_G.double(), double.log_prob(mask_GM), atol=2e-5, rtol=1e-6)
        close(single.score(mask_GM).double(), double.score(mask_GM), atol=1e-4)
    close(single.inclusion().double(), double.inclusion(), atol=3e-6)
    close(single.inclusion().sum(1), torch.full((len(l_GM),), float(n)), atol=1e-5)
    close(single.entropy().double(), double.entropy(), atol=1e-5)
    assert bool((single.entropy() >= 0).all())
    leaf_GM = l_GM.clone().requires_grad_()
    inclusion_GM = DISTRIBUTIONS[family](leaf_GM, n).inclusion()
    (inclusion_GM[:, 0].sum() + inclusion_GM.square().sum()).backward()
    assert bool(leaf_GM.grad.isfinite().all())


def unlikeliness(family: str, l_M: torch.Tensor, n: int, mask_GM: torch.Tensor) -> float:
    """Chi-square p-value of the samples' frequencies; sets expected under 10 times are one."""
    p_K = all_log_p(family, l_M[None].double(), n)[0].exp()
    pattern_KM = all_patterns(Pattern(n, len(l_M)))
    code_M = 2.0 ** torch.arange(len(l_M))
    match_GK = (mask_GM.float() @ code_M)[:, None] == (pattern_KM @ code_M)
    assert bool((match_GK.sum(1) == 1).all())
    expected_K, seen_K = p_K * len(mask_GM), match_GK.sum(0).double()
    rare_K = expected_K < 10
    expected = torch.cat([expected_K[~rare_K], expected_K[rare_K].sum()[None]])
    seen = torch.cat([seen_K[~rare_K], seen_K[rare_K].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected.clamp_min(1e-9))[expected + seen > 1e-6].sum()
    return float(chi2.sf(float(statistic), max(1, len(expected) - 1)))


@family
@small
def test_sampling_frequencies_and_those_of_antithetic_samples(family, n, m):
    l_M = some_logits(1, m, 1.5, torch.float32)[0]
    dist = DISTRIBUTIONS[family](l_M.expand(10_000, m), n)
    uniform_GM = uniforms(dist.logits_GM, seed=7)
    for u_GM in (uniform_GM, 1 - uniform_GM):
        assert unlikeliness(family, l_M, n, dist.sample(u_GM)) > 1e-3


@family
@pytest.mark.parametrize("logits", [[60, -60, -59, -60], [60, 59, 60, -60], [-60, 60, -60, -60]])
def test_sampling_frequencies_of_logits_far_apart(family, logits):
    l_M = torch.tensor(logits, dtype=torch.float32)
    dist = DISTRIBUTIONS[family](l_M.expand(10_000, 4), 2)
    assert unlikeliness(family, l_M, 2, dist.sample(uniforms(dist.logits_GM))) > 1e-3


@family
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (7, 8), (8, 16)])
@pytest.mark.parametrize("scale", [0.0, 3.0, 60.0])
def test_every_uniform_gives_exactly_n(family, n, m, scale):
    """0 and 1 too."""
    l_GM = some_logits(999, m, scale, torch.float32)
    dist = DISTRIBUTIONS[family](l_GM, n)
    corners_GM = uniforms(l_GM).round()
    for u_GM in (uniforms(l_GM), corners_GM, 1 - corners_GM, torch.zeros_like(l_GM)):
        mask_GM = dist.sample(u_GM)
        assert mask_GM.dtype == torch.bool
        assert bool((mask_GM.sum(1) == n).all())


@family
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (7, 8), (8, 16)])
def test_no_uniform_draws_a_set_that_has_next_to_no_probability(family, n, m):
    """torch.rand gives 0 about twice in 36M numbers."""
    l_GM = 120 * (uniforms(torch.zeros(999, m)).argsort(1) < n).float() - 60
    dist = DISTRIBUTIONS[family](l_GM, n)
    for u_GM in (uniforms(l_GM, 1), uniforms(l_GM, 1).round(), torch.zeros(999, m)):
        assert torch.equal(dist.sample(u_GM), l_GM > 0)
        assert torch.equal(dist.sample(1 - u_GM), l_GM > 0)


@family
def test_samples_are_the_same_to_the_bit(family, monkeypatch):
    l_GM = some_logits(999, 8, 3.0, torch.float32)
    first = DISTRIBUTIONS[family](l_GM, 4).sample(uniforms(l_GM))
    assert torch.equal(first, DISTRIBUTIONS[family](l_GM.clone(), 4).sample(uniforms(l_GM)))
    columns = l_GM.T.contiguous().T
    assert torch.equal(first, DISTRIBUTIONS[family](columns, 4).sample(uniforms(l_GM)))
    monkeypatch.setattr(distribution, "_SAMPLE_CHUNK", 800)
    assert torch.equal(first, DISTRIBUTIONS[family](l_GM, 4).sample(uniforms(l_GM)))
    assert not torch.equal(first, DISTRIBUTIONS[family](l_GM, 4).sample(uniforms(l_GM, 1)))


@family
def test_chunks_change_nothing(family, monkeypatch):
    l_GM = some_logits(50, 4, 3.0).requires_grad_()
    mask_GM = DISTRIBUTIONS[family](l_GM, 2).sample(uniforms(l_GM))
    results = []
    for numbers in (1 << 30, 1000):
        monkeypatch.setattr(distribution, "GRAPH_CHUNK", numbers)
        dist = DISTRIBUTIONS[family](l_GM, 2)
        values = [dist.log_prob(mask_GM), dist.inclusion()[:, 1], dist.entropy()]
        total = sum((k + 1) * value.square().sum() for k, value in enumerate(values))
        results.append([*values, dist.score(mask_GM), *torch.autograd.grad(total, l_GM)])
    for whole, chunked in zip(*results, strict=True):
        close(chunked, whole, atol=1e-12)


@family
def test_what_inference_mode_left_behind_serves_a_gradient(family):
    l_GM = some_logits(3, 7, 3.0)
    distribution._lattice.cache_clear()
    with torch.inference_mode():
        DISTRIBUTIONS[family](l_GM, 3).inclusion()
    leaf_GM = l_GM.clone().requires_grad_()
    DISTRIBUTIONS[family](leaf_GM, 3).inclusion()[:, 0].sum().backward()
    close(leaf_GM.grad.sum(1), torch.zeros(3, dtype=torch.float64))


def test_a_set_of_another_size_is_refused():
    dist = DISTRIBUTIONS["conditional-bernoulli"](torch.zeros(2, 4), 2)
    with pytest.raises(AssertionError, match="not 2:4"):
        dist.log_prob(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool())
    with pytest.raises(UserError, match="4:4"):
        DISTRIBUTIONS["plackett-luce"](torch.zeros(2, 4), 4)


def test_plackett_luce_of_more_than_sixteen_samples_but_does_not_go_over_all_sets():
    dist = DISTRIBUTIONS["plackett-luce"](torch.zeros(2, 32), 16)
    assert dist.sample(uniforms(dist.logits_GM)).sum(1).tolist() == [16, 16]
    with pytest.raises(UserError, match=r"16:32.*conditional-bernoulli"):
        dist.inclusion()


@family
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_relative_scores_differ_from_scores_by_what_all_masks_share(family, n, m):
    dist = DISTRIBUTIONS[family](some_logits(9, m, 2.0), n)
    masks = [dist.sample(uniforms(dist.logits_GM, seed).double()) for seed in range(5)]
    shared = [dist.score(mask) - dist.relative_score(mask) for mask in masks]
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])
    for term in shared[1:]:
        torch.testing.assert_close(term, shared[0])
