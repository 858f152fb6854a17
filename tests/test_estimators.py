"""Each estimator's gradient on a toy of three groups, against enumeration of all of its masks."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2, kstest

from prunedm.learning import ESTIMATORS, make_estimator, policy_gradient
from prunedm.learning.distribution import DISTRIBUTIONS, Distribution, all_patterns
from prunedm.learning.estimator import Estimator, Trial
from prunedm.learning.logits import MaskLogits
from prunedm.learning.policy_gradient import (
    ClassicPolicyGradient,
    PolicyGradient,
    _block,
    leave_pair_out,
    with_gradients,
)
from prunedm.learning.relaxation import RelaxedPatterns, _gumbel, relaxed, temperature
from prunedm.learning.sr_ste import SrSte
from prunedm.learning.straight_through import StraightThrough
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import to_groups
from prunedm.options import LearnOptions
from prunedm.removal.nm import nm_mask

LAYER = "layer"
GROUPS = 3
FAMILIES = list(DISTRIBUTIONS)
estimators = pytest.mark.parametrize("name", list(ESTIMATORS))
family = pytest.mark.parametrize("family", FAMILIES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Toy:
    """One layer of three groups, and a loss in which all of its weights interact.

    f(w) = mean over problems p of (1 + sum_ij w_i A_pij w_j + b_p w)^2 / 10, in float64.
    """

    def __init__(self, pattern: str = "2:4", *, trained: bool = False, problems: int = 4) -> None:
        self.pattern = Pattern.parse(pattern)
        size = GROUPS * self.pattern.m
        self.quadratic = normal(problems, size, size, seed=1) / size
        self.linear = normal(problems, size, seed=2)
        self.weight = normal(GROUPS, self.pattern.m, seed=3).requires_grad_(trained)
        first = nm_mask(normal(GROUPS, self.pattern.m, seed=4), self.pattern)
        self.logits = MaskLogits(
            Masks.uniform({LAYER: first}, self.pattern), {LAYER: self.weight.detach()}
        ).double()
        with torch.no_grad():
            self.logits.groups[0].copy_(0.8 * normal(GROUPS, self.pattern.m, seed=5))
        self.calls = 0

    def losses(self, weights) -> torch.Tensor:
        """(problems,)"""
        self.calls += 1
        w = weights[LAYER].flatten().double()
        return (1 + torch.einsum("i,pij,j->p", w, self.quadratic, w) + self.linear @ w) ** 2 / 10

    def trial(self, seed: int = 0, problems: slice = slice(None), **named) -> Trial:
        first = {LAYER: self.weight * self.logits.first.by_layer[LAYER]}
        named = {"progress": 0.0, "generator": seeded(seed)} | named
        return Trial(
            run=lambda weights: self.losses(weights)[problems].mean(),
            first_loss=lambda: self.losses(first)[problems].mean().float(),
            weights={LAYER: self.weight},
            **named,
        )

    def gradient(self, estimator: Estimator, **trial) -> torch.Tensor:
        """Of the logits in one step, (G, M)."""
        self.logits.zero_grad()
        estimator(self.logits, self.trial(**trial)).backward()
        return self.logits.groups[0].grad.clone()

    def every_mask(self) -> list[torch.Tensor]:
        """All of a layer, each (G, M)."""
        every = all_patterns(self.pattern).bool()
        return [torch.stack(rows) for rows in itertools.product(every, repeat=GROUPS)]

    def every_loss(self) -> torch.Tensor:
        """f of all masks."""
        losses = [self.losses({LAYER: self.weight * m}).mean() for m in self.every_mask()]
        return torch.stack(losses).detach()

    def expected(self, family: str, l_GM: torch.Tensor) -> torch.Tensor:
        """E[f], summed over all masks; differentiable in the logits."""
        log_p_GK = log_p(family, l_GM, self.pattern)
        index = itertools.product(range(self.pattern.count), repeat=GROUPS)
        p = torch.stack([sum(log_p_GK[g, k] for g, k in enumerate(ks)).exp() for ks in index])
        return p @ self.every_loss()

    def exact(self, family: str) -> torch.Tensor:
        """d E[f] / d logits."""
        leaf = self.logits.groups[0].detach().clone().requires_grad_()
        return torch.autograd.grad(self.expected(family, leaf), leaf)[0]


def log_p(family: str, l_GM: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """log P of every set of each group, (G, K), straight from the definitions."""
    sets = list(itertools.combinations(range(pattern.m), pattern.n))
    if family == "conditional-bernoulli":
        return torch.stack([l_GM[:, s].sum(1) for s in sets], 1).log_softmax(1)
    columns = []
    for chosen in sets:
        orders = []
        for order in itertools.permutations(chosen):
            total, left = 0.0, list(range(pattern.m))
            for i in order:
                total = total + l_GM[:, i] - l_GM[:, left].logsumexp(1)
                left.remove(i)
            orders.append(total)
        columns.append(torch.stack(orders).logsumexp(0))
    return torch.stack(columns, 1)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


def options_for(name: str, **changes) -> LearnOptions:
    named = {"train_weights": name == "sr-ste", "estimator": name, "device": "cpu"}
    return LearnOptions(**(named | changes)).filled()


def scripted(monkeypatch, masks: list[torch.Tensor]) -> None:
    """Samples are these masks, one after another."""
    coming = iter(masks)
    monkeypatch.setattr(Distribution, "sample", lambda self, u_GM: next(coming))
    for cls in DISTRIBUTIONS.values():
        assert "sample" not in vars(cls)


# -------------------------------------------------------------------------- policy gradients


@family
@pytest.mark.parametrize("delta", [0.0, -0.7])
def test_the_classic_policy_gradient_is_unbiased_whatever_its_baseline(family, delta, monkeypatch):
    toy = Toy()
    every = toy.every_mask()
    share = log_p(family, toy.logits.groups[0].detach(), toy.pattern).exp()
    share = [math.prod(float(s) for s in row) for row in itertools.product(*share)]
    scripted(monkeypatch, every)
    mean = torch.zeros(GROUPS, 4).double()
    for p in share:
        estimator = ClassicPolicyGradient(family)
        estimator.delta.fill_(delta)
        mean += p * toy.gradient(estimator)
    assert sum(share) == pytest.approx(1)
    close(mean, toy.exact(family))
    assert mean.abs().max() > 0.05


def test_the_policy_gradient_is_unbiased_over_antithetic_pairs(monkeypatch):
    """1:2 is decided by one uniform a group; three cells of it decide u and 1 - u together."""
    toy = Toy("1:2")
    p_G = torch.sigmoid(toy.logits.groups[0][:, 0] - toy.logits.groups[0][:, 1]).tolist()
    cells_G = []
    for p in p_G:
        low = min(p, 1 - p)
        cells_G.append([(low / 2, low), (0.5, 1 - 2 * low), (1 - low / 2, low)])
    pairs = [
        (torch.tensor([[u, 0.5] for u, _ in cells]), math.prod(share for _, share in cells))
        for cells in itertools.product(*cells_G)
    ]
    monkeypatch.setattr(
        policy_gradient, "_block", lambda groups, *_: torch.arange(groups)
    )  # all, in their order
    mean, total = torch.zeros(GROUPS, 2).double(), 0.0
    for one, two in itertools.product(pairs, repeat=2):
        coming = iter([one[0], two[0]])
        monkeypatch.setattr(policy_gradient, "uniforms", lambda *_, c=coming: [next(c)])
        estimator = PolicyGradient(samples=4, explore=1.0)
        estimator.variance.fill_(1.0)  # of earlier steps
        mean += one[1] * two[1] * toy.gradient(estimator)
        total += one[1] * two[1]
    assert total == pytest.approx(1)
    close(mean, toy.exact("conditional-bernoulli"))


def test_the_policy_gradient_is_unbiased_when_everything_is_explored():
    toy, family = Toy("1:2"), "plackett-luce"
    found = []
    for seed in range(400):
        estimator = PolicyGradient(family, samples=4, explore=1.0)
        estimator.variance.fill_(4.0)
        found.append(2 * toy.gradient(estimator, seed=seed))  # a standard deviation of 2
    drawn, exact = torch.stack(found), toy.exact(family)
    error = drawn.std(0) / len(found) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 8 * error).any()


def test_leave_pair_out_by_hand():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 4.0, 2.0])
    # means of the others: (10+20+4+2)/4 = 9, (1+3+4+2)/4 = 2.5, (1+3+10+20)/4 = 8.5
    assert leave_pair_out(losses).tolist() == [-8, -6, 7.5, 17.5, -4.5, -6.5]


def test_a_step_of_the_policy_gradient_by_hand():
    """Antithetic draws, leave one pair out, the running deviation of earlier steps."""
    toy = Toy()
    estimator = PolicyGradient(samples=4, explore=1.0)
    variance = None
    for seed in (3, 4):
        generator = seeded(seed)
        order = (torch.randint(GROUPS, (), generator=generator) + torch.arange(GROUPS)) % GROUPS
        distribution = DISTRIBUTIONS["conditional-bernoulli"](toy.logits.groups[0].detach(), 2)
        inside = DISTRIBUTIONS["conditional-bernoulli"](distribution.logits_GM[order], 2)
        masks = []
        for _ in range(2):
            u = torch.rand(GROUPS, 4, generator=generator)
            for uniform in (u, 1 - u):
                masks.append(inside.sample(uniform)[order.argsort()])
        f = torch.stack([toy.losses({LAYER: toy.weight * m}).mean() for m in masks])
        advantage = torch.stack([f[k] - f[[2, 3] if k < 2 else [0, 1]].mean() for k in range(4)])
        scale = (f.var() if variance is None else variance) ** 0.5
        wanted = sum(a * distribution.score(m) for a, m in zip(advantage, masks, strict=True))
        close(toy.gradient(estimator, seed=seed), wanted / scale / 4)
        variance = f.var() if variance is None else 0.9 * variance + 0.1 * f.var()
        assert float(estimator.variance) == pytest.approx(float(variance), rel=1e-5)


def test_blocks_have_one_size_and_cover_all_groups_equally():
    counts = torch.zeros(10)
    for seed in range(1000):
        block = _block(10, 0.3, seeded(seed))
        assert len(block.unique()) == 3
        assert ((block.diff() == 1) | (block.diff() == -9)).all()  # neighbours, in a ring
        counts[block] += 1
    # windows overlap, which makes counts of neighbours alike and the statistic smaller, not larger
    assert float(((counts - 300) ** 2 / 300).sum()) < 3 * chi2.ppf(0.999, 9)
    assert sorted(_block(7, 1.0, seeded(0)).tolist()) == list(range(7))
    assert len(_block(7, 0.01, seeded(0))) == 1


def test_groups_outside_the_block_stay_at_their_mode_and_get_no_gradient(monkeypatch):
    toy = Toy()
    seen = []
    trial = toy.trial(seed=1)
    mode = toy.logits.mode().by_layer[LAYER]
    run = trial.run
    monkeypatch.setitem(trial.__dict__, "run", lambda w: (seen.append(w[LAYER] != 0), run(w))[1])
    PolicyGradient(samples=8, explore=1 / 3)(toy.logits, trial).backward()
    gradient = toy.logits.groups[0].grad
    inside = int(_block(GROUPS, 1 / 3, seeded(1)))
    outside = [g for g in range(GROUPS) if g != inside]
    assert all(torch.equal(mask[outside], mode[outside]) for mask in seen)
    assert (gradient[outside] == 0).all()
    assert (gradient[inside] != 0).any()
    assert any(not torch.equal(mask[inside], mode[inside]) for mask in seen)


def test_two_steps_of_the_classic_rule_by_hand():
    toy = Toy()
    estimator = ClassicPolicyGradient()
    optimizer = torch.optim.SGD(toy.logits.parameters(), lr=50.0)
    first = toy.logits.first.by_layer[LAYER]
    logits, delta = toy.logits.groups[0].detach().clone(), 0.0
    for step, problems in enumerate((slice(0, 2), slice(2, 4))):
        uniform = torch.rand(GROUPS, 4, generator=seeded(step))
        distribution = DISTRIBUTIONS["conditional-bernoulli"](logits, 2)
        mask = distribution.sample(uniform)
        f, f_first = (
            toy.losses({LAYER: toy.weight * m})[problems].mean().item() for m in (mask, first)
        )
        residual = f - f_first  # on the same problems
        logits = logits - 50 * (residual - delta) * (mask.double() - distribution.inclusion())
        delta = 0.99 * delta + 0.01 * residual
        loss = estimator(toy.logits, toy.trial(seed=step, problems=problems))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(f)
        close(toy.logits.groups[0].detach(), logits, 1e-4)
        assert float(estimator.delta) == pytest.approx(delta, rel=1e-5)
    assert delta != 0


@pytest.mark.parametrize("name", ["policy-gradient", "policy-gradient-classic"])
def test_policy_gradients_ask_for_values_only(name):
    toy = Toy()
    trial = toy.trial()
    outputs = []

    def run(weights):
        outputs.append(toy.losses(weights).mean())
        return outputs[-1]

    trial = Trial(run, trial.first_loss, trial.weights, 0.0, seeded(0))
    make_estimator(options_for(name))(toy.logits, trial).backward()
    assert outputs
    assert all(output.grad_fn is None for output in outputs)
    assert toy.logits.groups[0].grad.abs().sum() > 0


def test_the_value_stays_exact_under_a_steep_slope():
    logits = torch.full((5, 4), 1e6, requires_grad=True)
    value = with_gradients(torch.tensor(0.123456), [logits], [torch.full((5, 4), 1e6)])
    assert value.item() == torch.tensor(0.123456).item()
    value.backward()
    assert (logits.grad == 1e6).all()


# ------------------------------------------------------------------------------- relaxation


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "4:8", "8:16"])
@pytest.mark.parametrize("tau", [5.0, 1.0, 0.05])
def test_soft_masks_lie_in_0_1_and_groups_sum_to_n(pattern, tau):
    wanted = Pattern.parse(pattern)
    soft = relaxed(torch.randn(20, wanted.m, generator=seeded(0)), wanted, tau, seeded(1))
    assert soft.min() >= 0
    assert soft.max() <= 1 + 1e-5
    assert soft.sum(1).numpy() == pytest.approx(wanted.n, abs=1e-4)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16"])
def test_relaxed_masks_harden_as_tau_falls(pattern):
    wanted = Pattern.parse(pattern)
    logits = torch.randn(200, wanted.m, generator=seeded(0))
    spread = []
    for tau in (2.0, 0.5, 0.05, 1e-4):
        soft = relaxed(logits, wanted, tau, seeded(1))
        spread.append(float((soft * (1 - soft)).mean()))
    assert spread == sorted(spread, reverse=True)
    hard = soft.round()
    assert (hard.sum(1) == wanted.n).all()
    assert ((soft - hard).abs().amax(1) < 1e-3).float().mean() > 0.98


@pytest.mark.parametrize("pattern", ["1:3", "2:4", "3:5"])
def test_at_tau_0_a_draw_is_a_pattern_of_the_conditional_bernoulli_distribution(pattern):
    wanted = Pattern.parse(pattern)
    logits = torch.tensor([0.9, -0.4, 0.0, 0.6, -1.1][: wanted.m]).expand(8000, -1)
    soft = relaxed(logits, wanted, 1e-4, seeded(2))
    table = all_patterns(wanted)
    far, best = (soft[:, None] - table).abs().amax(2).min(1)
    assert (far < 1e-3).float().mean() > 0.995
    p = log_p("conditional-bernoulli", logits[:1].double(), wanted).exp()[0]
    counts = torch.bincount(best, minlength=len(table))
    assert float(((counts - 8000 * p) ** 2 / (8000 * p)).sum()) < chi2.ppf(0.99, len(table) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_noise_is_standard_and_finite_where_the_uniform_draw_is_0(dtype, monkeypatch):
    noise = _gumbel((3, 40_000), torch.empty(0, dtype=dtype), seeded(5))
    assert noise.dtype == dtype
    assert kstest(noise.flatten().double().numpy(), "gumbel_r").pvalue > 0.01
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator: self.zero_())
    assert _gumbel((2, 3), noise, seeded(5)).isfinite().all()


def test_the_relaxed_gradient_reaches_the_exact_one_as_tau_falls():
    """Many copies of one group, whose loss is not linear in its mask: biased when warm, only then."""
    copies, pattern = 200_000, Pattern(2, 4)
    start = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64)
    square = normal(4, 4, seed=7)

    def energy(mask_GM: torch.Tensor) -> torch.Tensor:
        return (1 + mask_GM @ square.to(mask_GM)).square().sum(1)

    leaf = start.clone().requires_grad_()
    p = log_p("conditional-bernoulli", leaf[None], pattern)[0].exp()
    (exact,) = torch.autograd.grad(p @ energy(all_patterns(pattern).double()), leaf)
    bias, error = {}, {}
    for tau in (2.0, 0.5, 0.1):
        logits = start.float().expand(copies, -1).clone().requires_grad_()
        energy(relaxed(logits, pattern, tau, seeded(8))).sum().backward()
        bias[tau] = (logits.grad.double().mean(0) - exact).abs().max()
        error[tau] = (logits.grad.double().std(0) / copies**0.5).max()
    assert bias[2.0] > bias[0.5] > bias[0.1]
    assert bias[2.0] > 20 * error[2.0]
    assert bias[0.1] < 4 * error[0.1] + 0.02 * exact.abs().max()


def test_the_relaxed_estimator_is_the_loss_of_soft_masks_at_its_temperature():
    toy = Toy()
    estimator = RelaxedPatterns((2.0, 0.125))
    for progress, tau in ((0.0, 2.0), (0.5, 0.5), (1.0, 0.125)):
        loss = estimator(toy.logits, toy.trial(progress=progress))
        soft = relaxed(toy.logits.groups[0], toy.pattern, tau, seeded(0))
        assert loss.item() == pytest.approx(toy.losses({LAYER: toy.weight * soft}).mean().item())


def test_temperature_is_geometric_between_its_ends():
    values = [temperature((2.0, 0.125), step / 4) for step in range(5)]
    assert values == pytest.approx([2, 1, 0.5, 0.25, 0.125])


# ------------------------------------------------------------------ straight through, SR-STE


@family
def test_straight_through_is_the_gradient_of_the_means_at_the_sample(family):
    toy = Toy()
    loss = StraightThrough(family)(toy.logits, toy.trial(seed=2))
    loss.backward()
    l_GM = toy.logits.groups[0].detach().requires_grad_()
    uniform = torch.rand(GROUPS, 4, generator=seeded(2))
    mask = DISTRIBUTIONS[family](l_GM, 2).sample(uniform).double().requires_grad_()
    value = toy.losses({LAYER: toy.weight * mask}).mean()
    (slope,) = torch.autograd.grad(value, mask)
    inclusion = log_p(family, l_GM, toy.pattern).exp() @ all_patterns(toy.pattern).double()
    (wanted,) = torch.autograd.grad((inclusion * slope).sum(), l_GM)
    assert loss.item() == value.item()  # a hard mask, to the bit
    close(toy.logits.groups[0].grad, wanted, 1e-9)


def test_sr_ste_is_masked_forward_and_decays_the_removed():
    toy = Toy(trained=True)
    for _ in range(2):
        mask = nm_mask(toy.weight.detach().abs(), toy.pattern)
        toy.weight.grad = None
        loss = SrSte(0.3)(toy.logits, toy.trial())
        loss.backward()
        masked = (toy.weight.detach() * mask).requires_grad_()
        value = toy.losses({LAYER: masked}).mean()
        (slope,) = torch.autograd.grad(value, masked)
        assert loss.item() == value.item()
        close(toy.weight.grad, slope + 0.3 * (~mask * toy.weight.detach()), 1e-12)
        assert (toy.logits.groups[0].grad == 0).all()
        assert torch.equal(toy.logits.mode().by_layer[LAYER], mask)
        with torch.no_grad():
            toy.weight.copy_(normal(GROUPS, 4, seed=9))  # other masks the second time


def test_sr_ste_masks_follow_the_weights_that_a_step_has_made():
    toy = Toy(trained=True)
    weight = normal(GROUPS, 4, seed=11)
    SrSte().after_step(toy.logits, {LAYER: weight})
    assert torch.equal(toy.logits.mode().by_layer[LAYER], nm_mask(weight.abs(), toy.pattern))


# ------------------------------------------------------------------------------ conformance


@estimators
def test_an_estimator_is_a_function_of_generator_and_state(name):
    toy = Toy(trained=name == "sr-ste")
    found = []
    for seed in (0, 0, 1):
        estimator = make_estimator(options_for(name, explore=1.0))
        found.append([toy.gradient(estimator, seed=s) for s in (seed, seed + 10)])
    for same, other in zip(found[0], found[1], strict=True):
        assert torch.equal(same, other)
    if name != "sr-ste":  # which draws nothing
        assert not torch.equal(found[0][0], found[2][0])


@estimators
def test_gradients_do_not_depend_on_how_problems_are_split(name):
    """Linear in the problems, given the averages of earlier steps."""
    toy = Toy(trained=name == "sr-ste")

    def gradients(problems: slice) -> list[torch.Tensor]:
        estimator = make_estimator(options_for(name, explore=1.0))
        for buffer in estimator.buffers():
            buffer.fill_(0.25)
        toy.weight.grad = None
        logits = toy.gradient(estimator, problems=problems)
        return [logits] if toy.weight.grad is None else [logits, toy.weight.grad]

    whole, halves = gradients(slice(None)), [gradients(slice(0, 2)), gradients(slice(2, 4))]
    for k, wanted in enumerate(whole):
        close((halves[0][k] + halves[1][k]) / 2, wanted, 1e-6)
        assert not torch.allclose(halves[0][k], halves[1][k]) or name == "sr-ste"


@estimators
def test_all_masks_of_a_step_meet_the_same_problems(name):
    """One `run` serves every mask, so a constant loss has no gradient at all."""
    toy = Toy(trained=name == "sr-ste")
    constant = torch.tensor(3.0)
    trial = Trial(
        lambda weights: constant + 0 * weights[LAYER].sum(),
        lambda: constant,
        {LAYER: toy.weight},
        0.5,
        seeded(0),
    )
    toy.logits.zero_grad()
    make_estimator(options_for(name)).forward(toy.logits, trial).backward()
    assert toy.logits.groups[0].grad.abs().max() == 0


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("relaxed", 0.3),
        ("straight-through", 0.3),
        ("policy-gradient", 0.5),
        ("policy-gradient-classic", 2.0),
    ],
)
def test_following_an_estimator_lowers_the_expected_loss(name, lr):
    toy, estimator = Toy(), make_estimator(options_for(name, samples=4, explore=1.0))
    family, (logits,) = "conditional-bernoulli", toy.logits.groups
    before = toy.expected(family, logits.detach())
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[estimator.optimizer]
    optimizer = kind(toy.logits.parameters(), lr=lr)
    for seed in range(200):
        optimizer.zero_grad()
        estimator(toy.logits, toy.trial(seed, progress=seed / 199)).backward()
        optimizer.step()
    best = toy.every_loss().min()
    assert toy.expected(family, logits.detach()) - best < 0.4 * (before - best)


@estimators
def test_patterns_may_differ_between_layers(name):
    patterns = {"a": Pattern(1, 2), "b": Pattern(2, 4), "c": Pattern(1, 2)}
    shapes = {"a": (3, 8), "b": (2, 4, 3, 3), "c": (5, 4)}
    weights = {n: torch.randn(shape, generator=seeded(3)) for n, shape in shapes.items()}
    for weight in weights.values():
        weight.requires_grad_(name == "sr-ste")
    masks = Masks({n: nm_mask(w.abs(), patterns[n]) for n, w in weights.items()}, patterns)
    logits = MaskLogits(masks, {n: w.detach() for n, w in weights.items()})

    def run(masked) -> torch.Tensor:
        assert {n: w.shape for n, w in masked.items()} == {n: w.shape for n, w in weights.items()}
        return sum((w - 1).square().sum() * (k + 1) for k, w in enumerate(masked.values()))

    trial = Trial(run, lambda: torch.tensor(1.0), weights, 0.5, seeded(0))
    make_estimator(options_for(name, explore=1.0))(logits, trial).backward()
    assert [tuple(g.shape) for g in logits.groups] == [(22, 2), (18, 4)]
    if name != "sr-ste":
        assert all(bool(g.grad.abs().sum() > 0) for g in logits.groups)
    after = logits.mode()
    after.check_pattern()
    assert after.patterns == patterns


@pytest.mark.parametrize("name", ["relaxed", "straight-through"])
def test_magnitude_kept_is_rewarded(name):
    """The loss is lowered by the share of squared magnitude that the masks keep."""
    toy = Toy()
    plain, rewarded = (
        make_estimator(options_for(name))(toy.logits, toy.trial(keep_magnitude=k)) for k in (0, 2.5)
    )
    seen = []
    trial = toy.trial(keep_magnitude=1.0)
    trial = Trial(
        lambda w: seen.append(w[LAYER].detach()) or toy.losses(w).mean(),
        trial.first_loss, trial.weights, 0.0, seeded(0),
    )  # fmt: skip
    make_estimator(options_for(name))(toy.logits, trial)
    share = seen[0].square().sum() / toy.weight.square().sum()
    assert 0.2 < share < 1
    assert (plain - rewarded).item() == pytest.approx(2.5 * share.item())


def test_groups_of_a_convolution_are_input_channels():
    """One logit a weight: raising it keeps just that weight."""
    pattern, shape = Pattern(1, 4), (2, 8, 3, 3)
    first = nm_mask(torch.rand(shape, generator=seeded(0)), pattern)
    logits = MaskLogits(Masks.uniform({LAYER: first}, pattern), {LAYER: first.float()})
    chosen = nm_mask(torch.rand(shape, generator=seeded(1)), pattern)
    with torch.no_grad():
        for l_GM, wanted in zip(
            logits.groups, logits.to_groups({LAYER: 9 * chosen.float()}), strict=True
        ):
            l_GM.add_(wanted)
    assert torch.equal(logits.mode().by_layer[LAYER], chosen)
    assert (to_groups(logits.mode().by_layer[LAYER], 4).sum(1) == 1).all()


def several_layers() -> tuple[MaskLogits, dict[str, torch.Tensor]]:
    """Logits of three layers with two patterns, and weights without zeros."""
    shapes = {"a": (3, 8), "b": (2, 4, 3, 3), "c": (5, 8)}
    patterns = {"a": Pattern(2, 4), "b": Pattern(2, 4), "c": Pattern(1, 8)}
    weights = {name: torch.rand(shape) + 0.1 for name, shape in shapes.items()}
    first = Masks({n: nm_mask(w, patterns[n]) for n, w in weights.items()}, patterns)
    return MaskLogits(first, weights), weights


def test_layers_of_groups_by_marking_them():
    logits, _ = several_layers()
    sizes = [len(groups_GM) for groups_GM in logits.groups]
    for seed in range(30):
        blocks = [_block(size, 0.2, seeded(seed + k)) for k, size in enumerate(sizes)]
        marks = [torch.zeros_like(groups_GM) for groups_GM in logits.groups]
        for mark_GM, block in zip(marks, blocks, strict=True):
            mark_GM[block] = 1
        wanted = {name for name, mark in logits.by_layer(marks).items() if mark.any()}
        found = logits.layers_of(blocks)
        assert len(found) == len(wanted)
        assert set(found) == wanted


def test_every_draw_is_judged_whole_with_the_rest_at_its_mode():
    logits, weights = several_layers()
    seen: list[dict[str, torch.Tensor]] = []

    def run(masked):
        seen.append({name: weight != 0 for name, weight in masked.items()})
        return torch.stack([weight.sum() for weight in masked.values()]).sum()

    trial = Trial(run, lambda: torch.zeros(()), weights, 0.0, seeded(4))
    estimator = policy_gradient.PolicyGradient(samples=8, explore=0.1)
    estimator(logits, trial)
    mode = logits.mode().by_layer
    explored = {
        name for masks in seen for name in masks if not torch.equal(masks[name], mode[name])
    }
    assert len(seen) == 8
    assert 0 < len(explored) < 3
    for masks in seen:
        assert masks.keys() == weights.keys()
        for name, mask in masks.items():
            pattern = logits.first.patterns[name]
            assert (to_groups(mask, pattern.m).sum(1) == pattern.n).all(), name
    assert any(not torch.equal(a[n], b[n]) for a, b in itertools.pairwise(seen) for n in explored)
