"""Allocation against all assignments enumerated; sensitivities against pruning by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers import Killed, problems, tiny_model
from torch import nn

from prunedm.architecture import example
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import layer_positions, prunable_layers
from prunedm.removal import allocation
from prunedm.removal.allocation import (
    allocate,
    dense_targets,
    fitting,
    kept_share,
    sensitivities,
    weight_costs,
)
from prunedm.removal.channels.target import planned_macs
from prunedm.removal.nm import nm_mask
from prunedm.removal.weights import weight_masks
from prunedm.scores import score_layers
from prunedm.task import predict

P24, P14, P48 = Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)
CHOICES = (None, P24, P14)
SEEDS = range(8)


def instance(seed: int, *, layers: int = 6, whole: bool = True):
    """Random losses, which rise with what is removed, and costs by layer and choice."""
    rng = np.random.default_rng(seed)
    losses, costs = {}, {}
    for number in range(layers):
        size = 4 * float(rng.integers(1, 50)) if whole else float(rng.lognormal(3))
        rising = np.sort(rng.lognormal(0, 2, 2))
        losses[f"layer{number}"] = dict(zip(CHOICES, [0.0, *rising], strict=True))
        costs[f"layer{number}"] = {choice: size * kept_share(choice) for choice in CHOICES}
    return losses, costs


def total(table, chosen) -> float:
    return sum(table[name][choice] for name, choice in chosen.items())


def extremes(costs) -> tuple[float, float]:
    return sum(min(c.values()) for c in costs.values()), sum(
        max(c.values()) for c in costs.values()
    )


def enumerated(losses, costs, budget) -> float:
    """The least sum of losses of all assignments within the budget."""
    assignments = (dict(zip(losses, combo, strict=True)) for combo in product(*costs.values()))
    return min(total(losses, a) for a in assignments if total(costs, a) <= budget)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_is_the_best_of_all_assignments(seed, whole):
    losses, costs = instance(seed, whole=whole)
    least, most = extremes(costs)
    for share in (0.0, 0.1, 0.33, 0.5, 0.8, 1.0):
        budget = least + share * (most - least)
        chosen = allocate(losses, costs, budget)
        assert list(chosen) == list(losses)
        assert total(costs, chosen) <= budget
        assert total(losses, chosen) == pytest.approx(enumerated(losses, costs, budget), abs=1e-12)


@pytest.mark.parametrize("resolution", [8, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_thinned_list_is_as_good_as_promised(seed, resolution, monkeypatch):
    monkeypatch.setattr(allocation, "RESOLUTION", resolution)
    losses, costs = instance(seed, whole=False)
    least, most = extremes(costs)
    for share in (0.3, 0.5, 0.8):
        budget = least + share * (most - least)
        smaller = max(least, budget - 6 / (resolution - 2) * (most - least))
        chosen = allocate(losses, costs, budget)
        assert total(costs, chosen) <= budget
        assert total(losses, chosen) <= enumerated(losses, costs, smaller) + 1e-12


def test_more_budget_is_never_worse_and_all_of_it_is_dense():
    losses, costs = instance(0, layers=30)
    least, most = extremes(costs)
    sums = []
    for budget in np.linspace(least, most, 40):
        chosen = allocate(losses, costs, budget)
        assert total(costs, chosen) <= budget
        sums.append(total(losses, chosen))
    assert sums == sorted(sums, reverse=True)
    assert set(allocate(losses, costs, most).values()) == {None}
    assert set(allocate(losses, costs, least).values()) == {P14}


@pytest.mark.parametrize("whole", [True, False])
def test_a_large_allocation_spends_its_budget(whole):
    losses, costs = instance(1, layers=100, whole=whole)
    least, most = extremes(costs)
    for share in (0.1, 0.4, 0.7):
        budget = least + share * (most - least)
        assert 0.99 * budget < total(costs, allocate(losses, costs, budget)) <= budget


def test_no_layer_could_be_denser_without_more_loss():
    losses, costs = instance(3)
    losses = {name: dict.fromkeys(choices, 0.0) for name, choices in losses.items()}
    least, most = extremes(costs)
    chosen = allocate(losses, costs, (least + most) / 2)
    left = (least + most) / 2 - total(costs, chosen)
    for name, choice in chosen.items():
        denser = [c - costs[name][choice] for c in costs[name].values() if c > costs[name][choice]]
        assert all(more > left for more in denser)
    assert set(allocate(losses, costs, most).values()) == {None}


def test_noise_is_no_reason_to_remove_weights():
    costs = {"a": {None: 8.0, P24: 4.0, P14: 2.0}, "b": {None: 8.0, P24: 4.0, P14: 2.0}}
    losses = {"a": {None: 0.0, P24: -3.0, P14: -1.0}, "b": {None: 0.0, P24: 2.0, P14: 1.0}}
    assert allocate(losses, costs, 16) == {"a": None, "b": None}
    # a's gains count as 0, b's 1:4 as much as its 2:4
    assert allocate(losses, costs, 10) == {"a": P14, "b": None}
    assert allocate(losses, costs, 8) == {"a": P24, "b": P24}


def test_gains_count_as_nothing_where_dense_is_no_choice():
    costs = {"a": {P24: 4.0, P14: 2.0}, "b": {P24: 4.0, P14: 2.0}}
    losses = {"a": {P24: -1.0, P14: -0.5}, "b": {P24: 0.0, P14: 0.2}}
    assert allocate(losses, costs, 6) == {"a": P14, "b": P24}


def test_a_thinned_list_keeps_the_cheapest_and_the_best_of_each_interval(monkeypatch):
    monkeypatch.setattr(allocation, "RESOLUTION", 5)  # 3 intervals over 1..10
    cost, loss = np.array([9.0, 1, 2, 3, 5, 10, 6, 3]), np.array([2.0, 9, 8, 7, 5, 1, 6, 8])
    kept = allocation._undominated(cost, loss, 10)
    assert cost[kept].tolist() == [1, 3, 5, 9, 10]
    assert loss[kept].tolist() == [9, 7, 5, 2, 1]
    assert cost[allocation._undominated(cost, loss, 5.5)].tolist() == [1, 2, 3, 5]


def test_choices_of_equal_cost_do_not_bound_each_other():
    losses = {"a": {P24: 2.0, P48: 1.0, None: 0.0}}
    costs = {"a": {P24: 4.0, P48: 4.0, None: 8.0}}
    assert allocate(losses, costs, 7) == {"a": P48}


def test_a_layer_may_have_one_choice_only():
    losses, costs = (
        {"a": {None: 0.0}, "b": {None: 0.0, 0.5: 1.0}},
        {"a": {None: 3}, "b": {None: 4, 0.5: 2}},
    )
    assert allocate(losses, costs, 6) == {"a": None, "b": 0.5}
    assert allocate(losses, costs, 7) == {"a": None, "b": None}


def test_an_unreachable_budget_names_what_can_be_reached():
    costs = {"a": {None: 8.0, P24: 4.0}, "b": {None: 8.0}}
    losses = {"a": {None: 0.0, P24: 1.0}, "b": {None: 0.0}}
    with pytest.raises(UserError, match=r"budget's 0\.5000; ask for a share of at least 0\.7500"):
        allocate(losses, costs, 8)
    assert allocate(losses, costs, 12) == {"a": P24, "b": None}


def test_a_loss_that_is_no_number_is_named():
    with pytest.raises(UserError, match="loss with a pruned by 2:4 is nan"):
        allocate({"a": {None: 0.0, P24: float("nan")}}, {"a": {None: 8.0, P24: 4.0}}, 8)


def test_kept_shares():
    assert [kept_share(c) for c in (None, P24, P14, 0.0, 0.25, 1.0)] == [1, 0.5, 0.25, 1, 0.75, 0]
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="not between 0 and 1"):
            kept_share(ratio)


def test_layers_that_cannot_take_a_pattern_stay_dense():
    layers = {"six": nn.Linear(6, 2), "eight": nn.Linear(8, 2)}
    assert fitting(layers, [P24, P48]) == {"six": (None,), "eight": (P24, P48)}
    assert fitting(layers, [None, P24, 0.5])["six"] == (None, 0.5)
    with pytest.raises(UserError, match="six cannot take 2:4: 6 input channels are not a multiple"):
        weight_costs(layers, {"six": [P24]})


@pytest.fixture(scope="module")
def tiny():
    """(denoiser, its layers, magnitude scores of them)."""
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser)
    return denoiser, layers, score_layers(denoiser, layers, "magnitude")


def masks_by(scores):
    def masks_for(name, choice):
        if isinstance(choice, Pattern):
            return nm_mask(scores[name], choice)
        return weight_masks({name: scores[name]}, choice, scope="layer").by_layer[name]

    return masks_for


def test_costs_are_the_weights_that_masks_keep(tiny):
    denoiser, layers, scores = tiny
    candidates = fitting(layers, [None, P24, P14, 0.0, 0.3, 0.77])
    weights = weight_costs(layers, candidates)
    positions = layer_positions(denoiser, example(denoiser))
    macs = weight_costs(layers, candidates, positions)
    masks_for = masks_by(scores)
    for name, choices in candidates.items():
        for choice in choices[1:]:
            kept = int(masks_for(name, choice).sum())
            assert weights[name][choice] == kept
            assert macs[name][choice] == kept * positions[name]
        assert weights[name][None] == layers[name].weight.numel()


def test_dense_costs_are_the_macs_of_the_layers(tiny):
    denoiser, layers, _ = tiny
    positions = layer_positions(denoiser, example(denoiser))
    costs = weight_costs(layers, dict.fromkeys(layers, (None,)), positions)
    protected = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in layers
    }
    others = weight_costs(protected, dict.fromkeys(protected, (None,)), positions)
    attention = 2 * 32 * 16 * 16  # inner width 32, over 4x4 positions each way
    counted = sum(c[None] for table in (costs, others) for c in table.values())
    assert counted + attention == planned_macs(denoiser, positions)


def test_sensitivities_are_losses_of_a_model_pruned_by_hand(tiny):
    denoiser, layers, scores = tiny
    masks_for, batches = (
        masks_by(scores),
        [problems().batch(range(4)), problems().batch(range(4, 6))],
    )
    names = ["down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_q"]
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    candidates = {names[0]: (None, P24, 0.9), names[1]: (0.0, P14, 0.5)}
    found = sensitivities(denoiser, layers, masks_for, candidates, batches=batches)
    assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())
    dense = denoising_loss(denoiser, batches).mean
    for name, choices in candidates.items():
        assert tuple(found[name]) == choices
        assert found[name][choices[0]] == 0
        for choice in choices[1:]:
            pruned = tiny_model().denoiser
            Masks({name: masks_for(name, choice)}).apply_(pruned)
            assert found[name][choice] == denoising_loss(pruned, batches).mean - dense != 0


def test_sensitivities_to_dense_targets_are_distances_to_the_dense_output(tiny):
    scores = tiny[2]
    denoiser, name = tiny_model(dropout=0.5).denoiser.train(), "mid_block.resnets.0.conv1"
    batches = dense_targets(denoiser, [problems().batch(range(4)), problems().batch(range(4, 6))])
    assert denoiser.training
    found = sensitivities(
        denoiser,
        {name: denoiser.get_submodule(name)},
        masks_by(scores),
        {name: (P24,)},
        batches=batches,
    )
    whole = problems().batch(range(6))
    pruned = tiny_model().denoiser
    with torch.no_grad():
        dense_NCHW = predict(pruned, whole)
        pruned.get_submodule(name).weight.mul_(nm_mask(scores[name], P24))
        distance = float((predict(pruned, whole) - dense_NCHW).square().mean())
    assert denoising_loss(denoiser, batches).mean == 0
    assert found[name][P24] == pytest.approx(distance, rel=1e-4)


class Counted:
    """A progress that counts, and may be killed at an advance."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at, self.total, self.done = kill_at, 0, 0

    def task(self, label, total, done=0):
        self.total = total
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def say(self, text):
        pass

    def advance(self, units=1, note=""):
        self.done += units
        if self.done == self.kill_at:
            raise Killed


def test_progress_ends_at_its_total(tiny):
    denoiser, layers, scores = tiny
    progress = Counted()
    candidates = dict.fromkeys(list(layers)[:2], (None, P24, 0.0, 0.5))
    batches = [problems().batch(range(2))]
    sensitivities(
        denoiser, layers, masks_by(scores), candidates, batches=batches, progress=progress
    )
    assert progress.done == progress.total == 1 + 2 * 2


@pytest.mark.parametrize("where", ["loss", "progress"])
def test_weights_come_back_when_the_work_is_killed(tiny, where, monkeypatch):
    denoiser, layers, scores = tiny
    name = "mid_block.resnets.0.conv1"
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    changed = []

    def killing_loss(denoiser, batches, *, device):
        changed.append(
            not torch.equal(denoiser.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
        )
        if changed[-1] and where == "loss":
            raise Killed
        return denoising_loss(denoiser, batches, device=device)

    monkeypatch.setattr(allocation, "denoising_loss", killing_loss)
    with pytest.raises(Killed):
        sensitivities(
            denoiser,
            layers,
            masks_by(scores),
            {name: (None, P24, P14)},
            batches=[problems().batch(range(2))],
            progress=Counted(kill_at=2),
        )
    assert changed == [False, True]
    assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())


def test_measured_sensitivities_make_a_budget(tiny):
    denoiser, layers, scores = tiny
    candidates = fitting(layers, CHOICES)
    losses = sensitivities(
        denoiser, layers, masks_by(scores), candidates, batches=[problems().batch(range(2))]
    )
    costs = weight_costs(layers, candidates)
    budget = 0.5 * sum(c[None] for c in costs.values())
    chosen = allocate(losses, costs, budget)
    assert 0.99 * budget <= total(costs, chosen) <= budget
    assert set(chosen) == set(layers)
