"""Mask learning: logits, memory, one step of a learner, whole runs and their resumption, the stage."""

import json
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from helpers import Killed, drawn_figures, noise_images, problems, tiny_folder, tiny_model
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import MASKS_FILE, load, save
from prunedm.learning import ESTIMATORS, relaxation
from prunedm.learning.logits import MaskLogits, groups_changed
from prunedm.learning.memo import Memo
from prunedm.learning.trainer import (
    Learned,
    learn_masks,
    learning_objective,
    make_learner,
    make_optimizer,
)
from prunedm.masks import Masks, Pattern, load_masks, save_masks
from prunedm.networks.inference import evaluating
from prunedm.networks.layers import prunable_layers, to_groups
from prunedm.options import FinetuneOptions, LearnOptions, PruneOptions
from prunedm.options.learn import RelaxedOptions
from prunedm.progress import Silent
from prunedm.randomness import seed_for
from prunedm.record import FILE
from prunedm.removal.nm import nm_mask, nm_masks
from prunedm.scores import score_layers
from prunedm.stages import finetune, learn, prune
from prunedm.stages.inputs import held_out_problems
from prunedm.task import Batch, predict, squared_errors
from prunedm.training import loop
from prunedm.training.loop import make_accelerator

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "2:8"]
LAYER = "layer"
SMALL = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu"}
TWO_OF_FOUR = Pattern(2, 4)
learn_module = import_module(
    "prunedm.stages.verbs.learn"
)  # the package has a function of that name
estimators = pytest.mark.parametrize("name", list(ESTIMATORS))


class Listener(Silent):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("lead", [0.01, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [0, 3])
def test_learning_starts_from_the_given_masks_whatever_made_them(pattern, lead, kernel):
    wanted = Pattern.parse(pattern)
    shape = (30, 2 * wanted.m) + (kernel, kernel) * bool(kernel)
    given = nm_mask(torch.rand(shape, generator=seeded(0)), wanted)
    other_score = torch.rand(shape, generator=seeded(1)) ** 4  # does not agree with the masks
    logits = MaskLogits(Masks.uniform({LAYER: given}, wanted), {LAYER: other_score}, lead=lead)
    assert torch.equal(logits.mode().by_layer[LAYER], given)
    assert logits.observe("conditional-bernoulli")["groups_changed"] == 0


def test_layers_keep_their_own_logits_and_patterns():
    patterns = {"a": Pattern(2, 4), "b": Pattern(1, 4), "c": Pattern(2, 4)}
    shapes = {"a": (3, 8), "b": (2, 4, 3, 3), "c": (5, 4)}
    scores = {name: torch.rand(shape, generator=seeded(2)) for name, shape in shapes.items()}
    masks = Masks({n: nm_mask(s, patterns[n]) for n, s in scores.items()}, patterns)
    logits = MaskLogits(masks, scores)
    assert [tuple(g.shape) for g in logits.groups] == [(6 + 5, 4), (18, 4)]
    assert logits.patterns == [Pattern(2, 4), Pattern(1, 4)]
    assert list(logits.by_layer(logits.groups)) == ["a", "b", "c"]
    for name, mask in logits.mode():
        assert torch.equal(mask, masks.by_layer[name])
    back = logits.by_layer(logits.to_groups(scores))
    assert all(torch.equal(back[name], score) for name, score in scores.items())


def test_a_group_without_any_score_starts_from_its_mask():
    mask = torch.tensor([[False, True, False, True]])
    logits = MaskLogits(Masks.uniform({LAYER: mask}, TWO_OF_FOUR), {LAYER: torch.zeros(1, 4)})
    assert torch.equal(logits.mode().by_layer[LAYER], mask)


def test_observations_by_hand():
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    logits = MaskLogits(Masks.uniform({LAYER: first}, TWO_OF_FOUR), {LAYER: torch.zeros(2, 4)})
    with torch.no_grad():
        logits.groups[0].copy_(torch.tensor([[0.0, 0, 0, 0], [9e3, 0, 0, 8e3]]))
    seen = logits.observe("conditional-bernoulli")
    assert seen["entropy"] == pytest.approx(np.log(6) / 2, rel=1e-5)  # six sets, and one
    assert seen["groups_changed"] == 0.5
    assert seen["compliance"] == 1


def test_groups_changed_by_hand():
    def masks(rows: list[list[int]]) -> Masks:
        return Masks.uniform({LAYER: torch.tensor(rows).bool()}, Pattern(1, 2))

    before = masks([[1, 0, 1, 0], [0, 1, 0, 1]])
    assert groups_changed(before, before) == 0
    assert groups_changed(before, masks([[1, 0, 0, 1], [0, 1, 0, 1]])) == 0.25


# --------------------------------------------------------------------------------- memo


class Counter:
    """Counts what is computed: the mean of a problem's noisy image, three times."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.seen.append(batch.numbers)
        return batch.inputs["sample"].mean((1, 2, 3))[:, None].expand(-1, 3)


ROW = 3 * 4  # bytes


def test_a_memo_computes_once_and_gives_the_same():
    memo, count, source = Memo(10 * ROW), Counter(), problems(cycle=8)
    wanted = [Counter()(source.batch(range(k, k + 4))) for k in (0, 4)]
    for _ in range(3):
        for k, values in zip((0, 4), wanted, strict=True):
            assert torch.equal(memo(source.batch(range(k, k + 4)), count), values)
    assert count.seen == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert memo.free == 2 * ROW


def test_a_memo_takes_other_batches_of_what_it_has_and_computes_the_rest():
    memo, count, source = Memo(100 * ROW), Counter(), problems()
    memo(source.batch([0, 1]), count)
    memo(source.batch([2, 3]), count)
    assert torch.equal(memo(source.batch([3, 0]), count), Counter()(source.batch([3, 0])))
    assert len(count.seen) == 2
    assert torch.equal(memo(source.batch([3, 9]), count), Counter()(source.batch([3, 9])))
    assert count.seen[2:] == [(3, 9)]


@pytest.mark.parametrize(("memory", "computed"), [(0, 4), (ROW - 1, 4), (3 * ROW, 4), (4 * ROW, 2)])
def test_a_memo_is_bounded_by_bytes(memory, computed):
    memo, count, source = Memo(memory), Counter(), problems(cycle=4)
    for _ in range(2):
        for part in ([0, 1], [2, 3]):
            assert torch.equal(memo(source.batch(part), count), Counter()(source.batch(part)))
    assert len(count.seen) in (computed, computed - 1)
    assert memo.free == memory - min(4, memory // ROW) * ROW
    assert sum(row.untyped_storage().nbytes() for row in memo._rows.values()) <= memory


def test_a_memo_has_no_graph_and_needs_numbers():
    memo, weight = Memo(100), torch.ones(1, requires_grad=True)
    batch = problems().batch([0, 1])
    assert not memo(batch, lambda b: weight * b.inputs["sample"].mean((1, 2, 3))).requires_grad
    nameless = replace(batch, numbers=())
    memo, count = Memo(1000), Counter()
    for _ in range(2):
        memo(nameless, count)
    assert len(count.seen) == 2


# -------------------------------------------------------------------------- one step


def tiny_denoiser(**unet) -> nn.Module:
    """Of weights that matter: the default start is close to an output of zero."""
    denoiser = tiny_model(**(SMALL | unet)).denoiser
    torch.manual_seed(1)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def random_masks(denoiser: nn.Module, *patterns: str) -> Masks:
    """One pattern, or alternating ones; 2:4 unless told."""
    layers = prunable_layers(denoiser)
    scores = score_layers(denoiser, layers, "random")
    wanted = [Pattern.parse(pattern) for pattern in patterns or ("2:4",)]
    chosen = {name: wanted[k % len(wanted)] for k, name in enumerate(layers)}
    return Masks({n: nm_mask(scores[n], p) for n, p in chosen.items()}, chosen)


def make_options(name: str = "relaxed", **changes) -> LearnOptions:
    """Ones that learn something in few steps on a tiny model."""
    rates = {"policy-gradient": 1.0, "policy-gradient-classic": 1e3, "straight-through": 0.3}
    default = {
        "estimator": name,
        "lr": rates.get(name, 0.3),
        "logits": 1.0,
        "train_weights": name == "sr-ste",
        "steps": 6,
        "batch_size": 4,
        "samples": 4,
        "weight_lr": 1e-3,
        "device": "cpu",
    }
    return LearnOptions(**(default | changes)).filled()


def logits_for(denoiser: nn.Module, first: Masks, options: LearnOptions) -> MaskLogits:
    scores = {name: denoiser.get_parameter(f"{name}.weight").detach() for name, _ in first}
    return MaskLogits(first, scores, lead=options.logits)


class Step:
    """A learner on a tiny model, and the gradients of single steps."""

    def __init__(self, options: LearnOptions, *, masks: Masks | None = None, **unet) -> None:
        self.options = options
        self.denoiser = tiny_denoiser(**unet)
        teacher = tiny_denoiser(**unet) if options.train_weights else None
        first = masks or random_masks(self.denoiser)
        logits = logits_for(self.denoiser, first, options)
        self.learner = make_learner(
            self.denoiser, logits, options, teacher=teacher, device=torch.device("cpu")
        )
        self.problems = problems(noise_images(), cycle=options.dataset_size)

    def gradients(self, numbers=range(4), *, progress: float = 0.0, seed: int = 0):
        """Of logits and weights, and the loss; averages of the estimator stay as they were."""
        state = {name: buffer.clone() for name, buffer in self.learner.named_buffers()}
        self.learner.zero_grad()
        loss = self.learner(self.problems.batch(numbers), progress, seeded(seed))
        loss.backward()
        for name, buffer in self.learner.named_buffers():
            buffer.copy_(state[name])
        named = self.learner.named_parameters()
        return loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}

    @property
    def outputs(self) -> list[torch.Tensor]:
        """Grows by every output of the network."""
        seen: list[torch.Tensor] = []
        self.denoiser.register_forward_hook(lambda *given: seen.append(given[2][0]))
        return seen


def test_the_loss_mixes_the_dense_output_and_the_data_by_hand():
    """Under masks that are as good as hard, with a far lead and no temperature."""
    batch = problems(noise_images()).batch(range(4))
    dense, masked = tiny_denoiser(), tiny_denoiser()
    random_masks(dense).apply_(masked)
    with torch.no_grad():
        wanted, output = predict(dense, batch), predict(masked, batch)
        copy, data = (squared_errors(output, t).mean() for t in (wanted, batch.target))
    for share in (0.0, 0.25, 1.0):
        step = Step(make_options(logits=500.0, tau=(1e-2, 1e-2), distill=share))
        loss, _ = step.gradients()
        assert loss == pytest.approx(float(share * copy + (1 - share) * data), rel=1e-4)


def test_frozen_weights_get_no_gradient_and_are_no_part_of_the_learner():
    step = Step(make_options())
    step.gradients()
    assert [name for name, _ in step.learner.named_parameters()] == ["logits.groups.0"]
    assert all(p.grad is None for p in step.denoiser.parameters())
    step.learner.train()
    assert not step.denoiser.training


@estimators
def test_every_mask_of_a_step_meets_the_same_images_noise_and_timesteps(name):
    step, seen = Step(make_options(name)), []
    step.denoiser.register_forward_pre_hook(
        lambda _, __, given: seen.append((given["sample"], given["timestep"])), with_kwargs=True
    )
    batch = step.problems.batch(range(4))
    step.learner(batch, 0.0, seeded(0))
    assert len(seen) >= {"policy-gradient": 5, "policy-gradient-classic": 3}.get(name, 1)
    for noisy, timesteps in seen:
        assert noisy is batch.inputs["sample"]
        assert timesteps is batch.inputs["timestep"]


@pytest.mark.parametrize(
    ("name", "passes"), [("policy-gradient", 4), ("policy-gradient-classic", 1)]
)
def test_policy_gradients_have_no_graph_through_the_network(name, passes):
    step = Step(make_options(name))
    batch = step.problems.batch(range(4))
    seen = step.outputs
    loss = step.learner(batch, 0.0, seeded(0))
    extra = 2 if name == "policy-gradient-classic" else 1  # the dense output; the first masks'
    assert len(seen) == passes + extra
    assert all(output.grad_fn is None for output in seen)
    loss.backward()
    assert step.learner.logits.groups[0].grad.abs().sum() > 0


@pytest.mark.parametrize(("dataset_size", "passes"), [(8, 2 * 1 + 4 * 2), (0, 6 * 3)])
def test_dense_outputs_and_the_first_masks_losses_are_computed_once_a_problem(dataset_size, passes):
    """Classic: each of 6 steps runs a draw; the dense output and the baseline only at first."""
    step = Step(make_options("policy-gradient-classic", dataset_size=dataset_size))
    seen = step.outputs
    losses = []
    for k in range(6):
        batch = step.problems.batch(range(4 * k, 4 * k + 4))
        losses.append(step.learner(batch, 0.0, seeded(0)).item())
    new = 2 if dataset_size else 6  # batches
    assert len(seen) == 6 + 2 * new == {8: 10, 0: 18}[dataset_size] == passes
    if dataset_size:
        assert losses[0] == losses[2] == losses[4]


def test_a_baseline_that_moves_with_the_weights_is_not_kept():
    step = Step(make_options("policy-gradient-classic", dataset_size=4, train_weights=True))
    seen = step.outputs
    for _ in range(3):
        step.learner(step.problems.batch(range(4)), 0.0, seeded(0))
    assert len(seen) == 6


@estimators
def test_mask_loss_weight_scales_the_gradient_of_the_logits_only(name):
    (loss, plain), (other, half) = (
        Step(make_options(name, train_weights=True, mask_loss_weight=w)).gradients()
        for w in (1.0, 0.5)
    )
    assert loss == other
    assert plain.keys() == half.keys()
    assert len(plain) > 10
    for key, gradient in plain.items():
        assert torch.equal(half[key], (0.5 if key.startswith("logits") else 1.0) * gradient), key


@estimators
def test_joint_gradients_reach_every_weight(name):
    step = Step(make_options(name, train_weights=True))
    _, found = step.gradients()
    missing = [
        key for key, parameter in step.learner.named_parameters()
        if parameter.requires_grad and key not in found
    ]  # fmt: skip
    assert not missing
    assert all(g.abs().sum() > 0 for k, g in found.items() if "conv" in k and "weight" in k)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if not n.startswith("policy")])
def test_gradients_do_not_depend_on_the_split_of_a_batch(name):
    step = Step(make_options(name))
    whole, first, second = (step.gradients(part)[1] for part in (range(4), range(2), (2, 3)))
    for key, wanted in whole.items():
        mean = (first[key] + second[key]) / 2
        assert (mean - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9, key


@estimators
def test_the_network_computes_in_bf16_and_logits_in_float32(name, monkeypatch):
    step = Step(make_options(name))
    inside, around = [], []
    step.denoiser.mid_block.resnets[0].conv1.register_forward_hook(
        lambda *given: inside.append(given[2].dtype)
    )
    estimate = step.learner.estimator.forward

    def spy(*given):
        around.append(torch.is_autocast_enabled("cpu"))
        return estimate(*given)

    monkeypatch.setattr(step.learner.estimator, "forward", spy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = step.learner(step.problems.batch(range(4)), 0.0, seeded(0))
    loss.backward()
    assert around == [False]
    assert set(inside) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in step.learner.logits.parameters())


def test_energies_are_in_float32_under_mixed_precision(monkeypatch):
    seen = []
    relaxed = relaxation.relaxed

    def spy(logits_GM, *others):
        seen.append(relaxed(logits_GM, *others))
        return seen[-1]

    monkeypatch.setattr(relaxation, "relaxed", spy)
    step = Step(make_options())
    with torch.autocast("cpu", torch.bfloat16):
        step.learner(step.problems.batch(range(4)), 0.0, seeded(0))
    assert [mask.dtype for mask in seen] == [torch.float32]


def test_logits_and_weights_have_their_own_learning_rates():
    """Adam's first step is the learning rate, whatever the gradient."""
    step = Step(make_options(lr=0.25, train_weights=True, weight_lr=1e-3))
    optimizer = make_optimizer(step.learner, step.options)
    before = {name: p.detach().clone() for name, p in step.learner.named_parameters()}
    _, gradients = step.gradients()
    optimizer.step()
    for name, parameter in step.learner.named_parameters():
        moved = (parameter.detach() - before[name])[gradients[name].abs() > 1e-4].abs()
        rate = 0.25 if name.startswith("logits") else 1e-3
        assert moved.numpy() == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("train_weights", [False, True])
@pytest.mark.parametrize("name", ["policy-gradient", "policy-gradient-classic"])
def test_policy_gradients_take_plain_steps_also_beside_trained_weights(name, train_weights):
    step = Step(make_options(name, lr=7.0, train_weights=train_weights, weight_decay=0.1))
    optimizer = make_optimizer(step.learner, step.options)
    before = {name: p.detach().clone() for name, p in step.learner.named_parameters()}
    for seed in range(2):
        start = step.learner.logits.groups[0].detach().clone()
        _, gradients = step.gradients(seed=seed)
        optimizer.step()
        wanted = start - 7.0 * gradients["logits.groups.0"]
        assert torch.equal(step.learner.logits.groups[0], wanted)
    assert train_weights == (len(optimizer.state) > 0)
    if train_weights:
        moved = (step.denoiser.conv_in.weight - before["denoiser.conv_in.weight"]).abs()
        assert 0 < moved.max() < 3e-3


def test_the_reward_for_magnitude_falls_to_zero():
    plain, rewarded = (
        [
            Step(make_options(keep_magnitude=k, tau=(1.0, 1.0))).gradients(progress=p)[0]
            for p in (0.0, 0.5, 1.0)
        ]
        for k in (0.0, 5.0)
    )
    gains = [a - b for a, b in zip(plain, rewarded, strict=True)]
    assert gains == pytest.approx([gains[0], gains[0] / 2, 0], rel=1e-5)
    assert gains[0] > 1


def test_rewarded_magnitude_raises_the_kept_share(tmp_path):
    shares = []
    for reward in (0.0, 100.0):
        run = learned_on_tiny(tmp_path / str(reward), keep_magnitude=reward, keep="last", steps=8)
        weights = {n: run.before[f"{n}.weight"] for n, _ in run.learned.masks}
        kept = sum((weights[n] * m).square().sum() for n, m in run.learned.masks)
        shares.append(float(kept / sum(w.square().sum() for w in weights.values())))
    assert shares[1] > shares[0] + 0.05


# ------------------------------------------------------------------------------ whole runs


@dataclass
class Run:
    """A tiny model whose random masks have learned to keep its output."""

    denoiser: nn.Module
    before: dict[str, torch.Tensor]
    first: Masks
    learned: Learned
    hard_loss: object
    steps: list[int]

    @property
    def bits(self) -> dict[str, torch.Tensor]:
        masks = {f"mask.{name}": mask for name, mask in self.learned.masks}
        last = {f"last.{name}": mask for name, mask in self.learned.last}
        logits = {f"logits.{name}": value for name, value in self.learned.logits.items()}
        return masks | last | logits | dict(self.denoiser.named_parameters())


def learned_on_tiny(
    folder: Path,
    name: str = "relaxed",
    *,
    patterns: tuple[str, ...] = ("2:4",),
    kill_at: int | None = None,
    **changes,
) -> Run:
    options = make_options(name, **changes)
    unet = {"dropout": 0.3} if options.train_weights else {}
    denoiser, teacher = tiny_denoiser(**unet), tiny_denoiser(**unet)
    before = {key: p.detach().clone() for key, p in denoiser.named_parameters()}
    batch = problems().batch(range(8))
    wanted = predict(teacher.eval(), batch).detach()
    first, steps, step = random_masks(denoiser, *patterns), [], loop._step

    @torch.no_grad()
    def hard_loss(masks: Masks) -> float:
        with masks.applied(denoiser), evaluating(denoiser):
            return float(squared_errors(predict(denoiser, batch), wanted).mean())

    def counted(*given, **named):
        if named["step"] == kill_at:
            raise Killed
        steps.append(named["step"])
        return step(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", counted)
        learned = learn_masks(
            denoiser,
            logits_for(denoiser, first, options),
            teacher=teacher if options.train_weights else None,
            problems=problems(noise_images(12), shuffle=True, cycle=options.dataset_size),
            options=options,
            accelerator=make_accelerator(options),
            resume=folder,
            progress=Silent(),
            hard_loss=hard_loss,
        )
    return Run(denoiser, before, first, learned, hard_loss, steps)


@estimators
def test_learned_masks_are_exact_and_a_frozen_denoiser_is_left_alone(name, tmp_path):
    """Layers of different patterns learn together."""
    run = learned_on_tiny(tmp_path, name, patterns=("2:4", "1:4", "1:2"), explore=1.0)
    assert run.learned.masks.patterns == run.first.patterns
    for masks in (run.learned.masks, run.learned.last):
        masks.check_pattern()
        assert all(mask.dtype == torch.bool for _, mask in masks)
        for layer, mask in masks:
            pattern = run.first.patterns[layer]
            assert (to_groups(mask, pattern.m).sum(1) == pattern.n).all(), layer
    assert groups_changed(run.first, run.learned.last) > 0
    assert {k: v.shape for k, v in run.learned.logits.items()} == {
        layer: mask.shape for layer, mask in run.first
    }
    observed = run.learned.history.observed
    assert [step for step, _ in observed["compliance"]] == [0, 6]
    assert [share for _, share in observed["compliance"]] == [1.0, 1.0]
    moved = [k for k, p in run.denoiser.named_parameters() if not torch.equal(p, run.before[k])]
    assert bool(moved) == (name == "sr-ste")
    for parameter in run.denoiser.parameters():
        assert parameter.requires_grad
        assert name == "sr-ste" or parameter.grad is None


@pytest.mark.parametrize("name", ["relaxed", "straight-through"])
def test_learning_lowers_the_hard_loss(name, tmp_path):
    run = learned_on_tiny(tmp_path, name, steps=30, batch_size=8, validate_every=10)
    held_out = dict(run.learned.history.held_out)
    assert held_out[0] == run.hard_loss(run.first)
    assert min(held_out.values()) == run.hard_loss(run.learned.masks)
    assert held_out[30] == run.hard_loss(run.learned.last)
    assert run.hard_loss(run.learned.masks) < 0.8 * held_out[0]


def test_many_patterns_a_group_learn_too(tmp_path):
    """8:16 has 12,870: too many for a softmax over them."""
    folder, unet = tmp_path / "run", {"block_out_channels": (16,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, "block_out_channels", unet["block_out_channels"])
        run = learned_on_tiny(folder, patterns=("8:16",), steps=3)
    run.learned.masks.check_pattern()
    assert groups_changed(run.first, run.learned.last) > 0


CASES = {name: {"name": name} for name in ESTIMATORS} | {
    "joint": {"train_weights": True},
    "joint-policy-gradient": {"name": "policy-gradient", "train_weights": True},
    "accumulation": {"name": "policy-gradient-classic", "accumulation": 2},
    "cycle": {"dataset_size": 8, "steps": 6},
    "cycle-classic": {"name": "policy-gradient-classic", "dataset_size": 8},
    "part of the memory": {"dataset_size": 8, "memo_memory": 5 * 64 * 4 / 2**30},
    "average": {"ema_decay": 0.5, "warmup": 3, "schedule": "cosine", "clip": 0.1},
    "plackett-luce": {"name": "straight-through", "distribution": "plackett-luce"},
    "last": {"keep": "last"},
}
RESUMED = {"steps": 5, "checkpoint_every": 2, "validate_every": 3, "dataset_size": 0}


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(case, tmp_path):
    options = RESUMED | CASES[case]
    whole, place = learned_on_tiny(tmp_path / "whole", **options), tmp_path / "broken"
    for kill_at in (1, 3):  # before the first checkpoint, and after it
        with pytest.raises(Killed):
            learned_on_tiny(place, kill_at=kill_at, **options)
    resumed = learned_on_tiny(place, **options)
    assert resumed.steps == list(range(2, options["steps"]))
    assert resumed.learned.history == whole.learned.history
    assert resumed.bits.keys() == whole.bits.keys()
    for name, value in whole.bits.items():
        assert torch.equal(resumed.bits[name], value), name


@estimators
def test_runs_repeat_to_the_bit_and_depend_on_the_seed(name, tmp_path):
    one, same, other = (
        learned_on_tiny(tmp_path / key, name, steps=2, seed=seed)
        for key, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert all(torch.equal(same.bits[key], value) for key, value in one.bits.items())
    assert same.learned.history == one.learned.history
    if name != "sr-ste":  # which draws nothing but dropout
        assert any(not torch.equal(other.bits[key], value) for key, value in one.bits.items())


@pytest.mark.parametrize("keep", ["best", "last"])
def test_best_and_last_are_what_is_kept(keep, tmp_path):
    """With a learning rate that ruins the masks."""
    run = learned_on_tiny(
        tmp_path, "policy-gradient-classic", lr=1e9, logits=0.5, keep=keep, validate_every=2
    )
    losses = dict(run.learned.history.held_out)
    if keep == "last":
        assert groups_changed(run.learned.masks, run.learned.last) == 0
        assert run.hard_loss(run.learned.masks) == losses[6]
    else:
        assert run.hard_loss(run.learned.masks) == min(losses.values())
    assert groups_changed(run.first, run.learned.last) > 0


def test_the_best_may_be_the_start(tmp_path):
    seen = []

    def learn_with(hard_loss_of):
        denoiser = tiny_denoiser()
        options, first = make_options(validate_every=2), random_masks(denoiser)
        return first, learn_masks(
            denoiser, logits_for(denoiser, first, options), teacher=None,
            problems=problems(), options=options, accelerator=make_accelerator(options),
            resume=tmp_path / str(len(seen)), progress=Silent(), hard_loss=hard_loss_of,
        )  # fmt: skip

    def rising(_: Masks) -> float:
        seen.append(1.0)
        return float(len(seen))

    first, learned = learn_with(rising)
    assert groups_changed(first, learned.masks) == 0
    assert groups_changed(first, learned.last) > 0
    assert [loss for _, loss in learned.history.held_out] == [1, 2, 3, 4]


def test_every_step_draws_its_own_masks_and_accumulated_batches_share_them(monkeypatch):
    options, seeds = make_options(), []

    def module(batch, progress, generator):
        seeds.append((generator.initial_seed(), progress))
        return torch.zeros(())

    class Place:
        device, num_processes, process_index = torch.device("cpu"), 2, 1

    for step in (0, 0, 5):
        learning_objective(module, None, step, options=options, accelerator=Place)
    assert seeds == [(seed_for(0, "masks", k), p) for k, p in ((1, 0.0), (1, 0.0), (11, 1.0))]


def test_two_accumulated_batches_are_one_batch(tmp_path):
    runs = [
        learned_on_tiny(tmp_path / str(size), batch_size=size, accumulation=8 // size, steps=2,
                        lr=1e-3, keep="last")
        for size in (8, 4)
    ]  # fmt: skip
    one, two = (torch.cat([v.flatten() for v in r.learned.logits.values()]) for r in runs)
    start = torch.cat([v.flatten() for v in start_logits(make_options()).values()])
    assert (one - two).norm() < 0.02 * (one - start).norm()
    assert runs[0].learned.history.losses == pytest.approx(runs[1].learned.history.losses, rel=1e-4)


def start_logits(options: LearnOptions) -> dict[str, torch.Tensor]:
    denoiser = tiny_denoiser()
    logits = logits_for(denoiser, random_masks(denoiser), options)
    return logits.by_layer([g.detach() for g in logits.groups])


def test_sr_ste_ends_with_masks_of_the_largest_weights(tmp_path):
    run = learned_on_tiny(tmp_path, "sr-ste", weight_lr=3e-2, keep="last", steps=3)
    for name, mask in run.learned.masks:
        size = run.denoiser.get_parameter(f"{name}.weight").detach().abs()
        assert torch.equal(mask, nm_mask(size, TWO_OF_FOUR)), name
    assert groups_changed(run.first, run.learned.masks) > 0


def test_bf16_runs_and_logits_stay_float32(tmp_path):
    run = learned_on_tiny(tmp_path, mixed_precision="bf16", steps=2)
    assert {value.dtype for value in run.learned.logits.values()} == {torch.float32}
    assert {p.dtype for p in run.denoiser.parameters()} == {torch.float32}
    full = learned_on_tiny(tmp_path / "full", steps=2)
    assert run.learned.history.losses != full.learned.history.losses
    assert run.learned.history.losses == pytest.approx(full.learned.history.losses, rel=0.05)
    assert run.learned.history.held_out[0] == full.learned.history.held_out[0]  # not in bf16


def test_diverging_weights_stop_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"loss is (nan|inf) at step \d+: lower --lr"):
        learned_on_tiny(tmp_path, train_weights=True, weight_lr=1e3, weight_decay=1e6, steps=20)


# -------------------------------------------------------------------------------- options


def test_what_is_not_given_depends_on_the_estimator():
    assert LearnOptions().filled().lr == 0.3
    classic = LearnOptions(estimator="policy-gradient-classic").filled()
    assert (classic.lr, classic.logits) == (50, 10)
    given = LearnOptions(estimator="policy-gradient-classic", lr=1.0, logits=2.0).filled()
    assert (given.lr, given.logits) == (1, 2)
    for name in ESTIMATORS:
        filled = LearnOptions(estimator=name, train_weights=True).filled()
        assert filled.lr > 0
        assert filled.logits > 0


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 400),
        ({"epochs": 2, "dataset_size": 64, "batch_size": 8}, 16),
        ({"epochs": 2, "dataset_size": 64, "batch_size": 8, "accumulation": 4}, 4),
        ({"epochs": 2, "dataset_size": 64, "batch_size": 8, "steps": 10}, 10),
        ({"epochs": 1, "dataset_size": 3, "batch_size": 8}, 1),
    ],
)
def test_epochs_are_passes_and_steps_a_bound(given, steps):
    filled = LearnOptions(**given).filled()
    assert filled.steps == steps
    assert filled.filled() == filled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "sr-ste"}, "add --train-weights"),
        ({"epochs": 1, "dataset_size": 0}, "give --dataset-size"),
        ({"samples": 5}, "multiple of 2"),
        ({"samples": 2}, "greater than or equal to 4"),
        ({"logits": 0}, "greater than 0"),
        ({"explore": 0}, "greater than 0"),
        ({"estimator": "gumbel"}, "relaxed"),
    ],
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        LearnOptions(**given)


# -------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """The tiny model with 2:4 masks, by our own prune stage."""
    out = tmp_path_factory.mktemp("masked") / "masked"
    prune(tiny_folder(), out, PruneOptions(mechanism="nm", score="random", pictures=0))
    return out


@pytest.fixture(scope="module")
def learned(masked, tmp_path_factory) -> tuple[Path, dict, LearnOptions]:
    """A run of the stage that changes masks for sure: folder, figures, options."""
    out = tmp_path_factory.mktemp("learned") / "out"
    options = LearnOptions(steps=4, lr=1.0, keep="last", validate_every=2, **QUICK)
    with drawn_figures():
        record, made = learn(masked, out, options)
    assert made
    return out, record.figures, options


def test_the_stage_starts_from_masks_and_takes_weights_from_before_them(masked, learned):
    out, figures, _ = learned
    dense, first, result = load(tiny_folder()), load(masked), load(out)
    assert set(result.masks.by_layer) == set(first.masks.by_layer)
    result.masks.check_pattern()
    assert figures["groups_changed"] == groups_changed(first.masks, result.masks) > 0
    assert figures["compliance"] == 1
    for name, weight in dense.denoiser.named_parameters():
        layer = name.removesuffix(".weight")
        mask = result.masks.by_layer.get(layer, torch.ones(1))
        assert torch.equal(result.denoiser.get_parameter(name), weight * mask), name
    assert [r.stage for r in result.record.lineage()] == ["prune", "learn"]
    assert result.record.inputs["model"].hash == first.hash


def test_figures_are_of_the_hard_masks(masked, learned):
    out, figures, options = learned
    models = {"loss_dense": tiny_folder(), "loss_first_masks": masked, "loss": out}
    for key, folder in models.items():
        model = load(folder)
        direct = denoising_loss(model.denoiser, held_out_problems(model, options, 8))
        assert figures[key] == pytest.approx(direct.mean, abs=1e-7), key
    assert figures["curve"]["held_out"][0] == (0, figures["loss_first_masks"])
    assert figures["curve"]["held_out"][-1][1] == pytest.approx(figures["loss"])
    gap = figures["loss_first_masks"] - figures["loss_dense"]
    if gap > 0:
        closed = (figures["loss_first_masks"] - figures["loss"]) / gap
        assert figures["gap_closed"] == pytest.approx(closed)
    else:
        assert figures["gap_closed"] is None


def test_what_learning_leaves_beside_the_model(learned):
    out, figures, _ = learned
    place, masks = out / "learned", load(out).masks
    logits = load_file(place / "logits.safetensors")
    assert logits.keys() == masks.by_layer.keys()
    for name, value in logits.items():  # the kept masks are the logits' largest
        assert torch.equal(nm_mask(value, TWO_OF_FOUR), masks.by_layer[name]), name
    last = load_masks(place / "masks_last.safetensors")
    assert groups_changed(masks, last) == 0  # keep = last
    losses = np.load(place / "loss_training.npy")
    assert losses.tolist() == figures["curve"]["losses"]
    assert losses.shape == (4,)
    steps, gained = np.load(place / "loss_improvements.npy").T
    assert steps.tolist() == [0, 2, 4]
    assert gained[0] == 0
    assert gained[-1] == pytest.approx(figures["loss_first_masks"] - figures["loss"], abs=1e-7)
    with Image.open(out / "training_curves.png") as picture:
        picture.load()
        assert min(picture.size) > 300
        assert picture.convert("L").getextrema()[0] < 128  # something is drawn
    assert [step for step, _ in figures["curve"]["observed"]["entropy"]] == [0, 2, 4]
    assert not list(out.rglob("best.safetensors"))


def test_the_same_options_make_nothing_anew_and_others_are_named(masked, learned):
    out, _, options = learned
    assert learn(masked, out, options)[1] is False
    changed = options.model_copy(update={"lr": 0.5})
    with pytest.raises(UserError, match=r"another lr \(1\.0, now 0\.5\)"):
        learn(masked, out, changed)


def test_learning_goes_on_from_learned_masks(learned, tmp_path):
    once, *_ = learned
    record, _ = learn(once, tmp_path / "twice", LearnOptions(steps=1, **QUICK))
    assert record.figures["loss_first_masks"] == pytest.approx(
        json.loads((once / FILE).read_text())["figures"]["loss"]
    )
    before, twice = load(once), load(tmp_path / "twice")
    assert (twice.masks.kept, twice.masks.total) == (before.masks.kept, before.masks.total)
    assert [r.stage for r in record.lineage()] == ["prune", "learn", "learn"]


@pytest.mark.parametrize("pattern", ["1:4", "8:16"])
def test_a_model_without_masks_starts_from_a_score(pattern, tmp_path):
    options = LearnOptions(steps=1, pattern=pattern, keep="best", **QUICK)
    record, _ = learn(tiny_folder(), tmp_path / "out", options)
    model = load(tmp_path / "out")
    assert str(model.masks.pattern) == pattern
    dense = load(tiny_folder()).denoiser
    layers = {name: dense.get_submodule(name) for name, _ in model.masks}
    sizes = {n: layer.weight.detach().abs() for n, layer in layers.items()}
    first = nm_masks(layers, sizes, Pattern.parse(pattern))
    first.apply_(dense)
    loss = denoising_loss(dense, held_out_problems(model, options, 8)).mean
    assert record.figures["loss_first_masks"] == pytest.approx(loss, abs=1e-7)


def test_joint_training_starts_from_and_aims_at_the_dense_model(masked, tmp_path):
    options = LearnOptions(steps=2, train_weights=True, weight_lr=1e-3, keep="last", **QUICK)
    record, _ = learn(masked, tmp_path / "out", options)
    dense, result = load(tiny_folder()).denoiser, load(tmp_path / "out")
    moved = (result.denoiser.conv_in.weight - dense.conv_in.weight).abs().max()
    assert 0 < moved < 3e-3
    assert not result.masks.violations(result.denoiser)
    assert record.figures["loss_dense"] == pytest.approx(
        denoising_loss(dense, held_out_problems(result, options, 8)).mean, abs=1e-7
    )


# ------------------------------------------------------------------ first masks from elsewhere


def first_masks(out: Path, source: Path, **given) -> tuple[Masks, list[str]]:
    """What learning would begin with, and what was said; it is stopped there."""
    seen, progress = [], Listener()

    def stop(first: Masks, *others, **named):
        seen.append(first)
        raise Killed

    options = LearnOptions(steps=1, **QUICK, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_module, "MaskLogits", stop)
        with pytest.raises(Killed):
            learn(source, out, options, progress=progress)
    return seen[0], progress.said


def same(one: Masks, other: Masks) -> bool:
    return one.patterns == other.patterns and groups_changed(one, other) == 0


@pytest.mark.parametrize("kind", ["file", "model", "zeros"])
def test_first_masks_from_a_file_a_model_and_the_zeros_of_one(kind, masked, tmp_path):
    wanted, place = load(masked).masks, masked
    if kind == "file":
        place = tmp_path / "m.safetensors"
        save_masks(wanted, place)
    if kind == "zeros":
        place = Path(copytree(masked, tmp_path / "foreign"))
        (place / MASKS_FILE).unlink()
        (place / FILE).unlink()
    first, said = first_masks(tmp_path / "out", tiny_folder(), masks=str(place))
    assert same(first, wanted)
    assert any(str(place) in line for line in said)


def test_first_masks_of_another_pattern_are_projected_and_told(tmp_path):
    denoiser = load(tiny_folder()).denoiser
    sizes = {n: layer.weight.abs() for n, layer in prunable_layers(denoiser).items()}
    rough = Masks({n: size > size.median() for n, size in sizes.items()})
    save_masks(rough, tmp_path / "rough.safetensors")
    place = str(tmp_path / "rough.safetensors")
    first, said = first_masks(tmp_path / "a", tiny_folder(), masks=place)
    first.check_pattern()
    assert first.pattern == TWO_OF_FOUR
    assert any("projected to 2:4" in line and "groups" in line for line in said)
    first, said = first_masks(tmp_path / "b", tiny_folder(), masks=place, pattern="1:4")
    assert first.pattern == Pattern(1, 4)
    assert any("projected to 1:4" in line for line in said)


def test_first_masks_keep_the_patterns_of_their_layers(tmp_path):
    denoiser = load(tiny_folder()).denoiser
    mixed = random_masks(denoiser, "2:4", "1:4")
    save_masks(mixed, tmp_path / "mixed.safetensors")
    first, _ = first_masks(
        tmp_path / "out", tiny_folder(), masks=str(tmp_path / "mixed.safetensors")
    )
    assert same(first, mixed)


def test_given_masks_go_before_the_models_own(masked, tmp_path):
    """Weights still come from before the model's own; the record names the masks, too."""
    other = random_masks(load(tiny_folder()).denoiser, "2:4", "1:4")
    save_masks(other, tmp_path / "other.safetensors")
    options = LearnOptions(steps=1, masks=str(tmp_path / "other.safetensors"), keep="best", **QUICK)
    record, _ = learn(masked, tmp_path / "out", options)
    dense, result = load(tiny_folder()).denoiser, load(tmp_path / "out")
    assert result.masks.patterns == other.patterns
    assert record.inputs["masks"].path.endswith("other.safetensors")
    for name, mask in result.masks:
        weight = dense.get_parameter(f"{name}.weight")
        assert torch.equal(result.denoiser.get_parameter(f"{name}.weight"), weight * mask), name
    other.apply_(dense)
    loss = denoising_loss(dense, held_out_problems(result, options, 8)).mean
    assert record.figures["loss_first_masks"] == pytest.approx(loss, abs=1e-7)


def test_weights_that_obs_updated_stay_and_removed_ones_come_from_before(tmp_path):
    prune(
        tiny_folder(), tmp_path / "obs",
        PruneOptions(mechanism="obs-nm", pictures=0, calibration_problems=8, device="cpu"),
    )  # fmt: skip
    options = LearnOptions(steps=4, lr=3.0, keep="last", **QUICK)
    record, _ = learn(tmp_path / "obs", tmp_path / "out", options)
    dense, obs, result = (load(p) for p in (tiny_folder(), tmp_path / "obs", tmp_path / "out"))
    back = updated = 0
    for name, mask in result.masks:
        was, new = obs.masks.by_layer[name], result.denoiser.get_parameter(f"{name}.weight")
        own, before = (m.denoiser.get_parameter(f"{name}.weight") for m in (obs, dense))
        assert torch.equal(new, torch.where(mask, torch.where(was, own, before), 0)), name
        back += int((mask & ~was).sum())
        updated += int((mask & was & (own != before)).sum())
    assert back > 0
    assert updated > 0
    loss = denoising_loss(dense.denoiser, held_out_problems(dense, options, 8)).mean
    assert record.figures["loss_dense"] == pytest.approx(loss, abs=1e-7)


def test_the_target_is_the_model_before_masks_though_kept_weights_have_changed(masked, tmp_path):
    """What OBS or fine-tuning updated, together with what was removed, is no model at all."""
    finetune(masked, tmp_path / "tuned", FinetuneOptions(steps=2, lr=0.1, teacher="none", **QUICK))
    found = []

    def stop(*_, teacher, **__):
        found.append(teacher)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_module, "learn_masks", stop)
        for source in (masked, tiny_folder(), tmp_path / "tuned"):
            with pytest.raises(Killed):
                learn(source, tmp_path / "out", LearnOptions(steps=1, **QUICK), overwrite=True)
    assert found[:2] == [None, None]  # the unmasked model itself
    dense = load(tiny_folder()).denoiser
    for name, parameter in found[2].named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name


# ------------------------------------------------------------------------------- refusals


def test_unstructured_masks_are_refused_with_the_way_out(tmp_path):
    sparse = tmp_path / "sparse"
    prune(
        tiny_folder(),
        sparse,
        PruneOptions(mechanism="weights", score="random", target="params=0.3", pictures=0),
    )
    with pytest.raises(UserError, match=r"sparse has unstructured masks; .* --masks .*projected"):
        learn(sparse, tmp_path / "out", LearnOptions(steps=1, **QUICK))
    assert not (tmp_path / "out").exists()
    given = LearnOptions(steps=1, masks=str(sparse), **QUICK)
    learn(tiny_folder(), tmp_path / "out", given)
    assert load(tmp_path / "out").masks.pattern == TWO_OF_FOUR


def test_masks_of_unknown_origin_are_refused(masked, tmp_path):
    foreign = load(masked)
    foreign.record = None
    save(foreign, tmp_path / "foreign")
    tuned = tmp_path / "tuned"
    finetune(masked, tuned, FinetuneOptions(steps=1, teacher="none", **QUICK))
    with pytest.raises(UserError, match="does not say which model its masks were applied to"):
        learn(tmp_path / "foreign", tmp_path / "out", LearnOptions(steps=1, **QUICK))
    learn(tuned, tmp_path / "out", LearnOptions(steps=1, **QUICK))  # through the records
    dense, own = load(tiny_folder()).denoiser, load(tuned)
    result = load(tmp_path / "out")
    for name, mask in result.masks:
        was, new = own.masks.by_layer[name], result.denoiser.get_parameter(f"{name}.weight")
        kept, before = (d.get_parameter(f"{name}.weight") for d in (own.denoiser, dense))
        assert torch.equal(new, torch.where(mask, torch.where(was, kept, before), 0)), name


def test_reordered_channels_have_no_weights_to_go_back_to(tmp_path):
    prune(
        tiny_folder(), tmp_path / "permuted",
        PruneOptions(mechanism="nm", score="magnitude", permute=True, pictures=0),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"permuted had its channels reordered.*without --permute"):
        learn(tmp_path / "permuted", tmp_path / "out", LearnOptions(steps=1, **QUICK))


def test_a_parent_that_is_gone_or_changed_is_named(tmp_path):
    parent, masks = tmp_path / "parent", tmp_path / "masks"
    save(tiny_model(), parent)
    prune(parent, masks, PruneOptions(mechanism="nm", score="random", pictures=0))
    other = tiny_model()
    torch.nn.init.ones_(other.denoiser.conv_in.weight)
    save(other, parent)
    with pytest.raises(UserError, match=r"parent has changed since it was used"):
        learn(masks, tmp_path / "out", LearnOptions(steps=1, **QUICK))


def test_targets_that_leave_out_masked_layers_are_refused(masked, tmp_path):
    with pytest.raises(UserError, match="--targets leaves out masked layers, first"):
        learn(masked, tmp_path / "out", LearnOptions(steps=1, targets=("mid_block",), **QUICK))
    learn(tiny_folder(), tmp_path / "out", LearnOptions(steps=1, targets=("mid_block",), **QUICK))
    layers = load(tmp_path / "out").masks.by_layer
    assert layers
    assert all(name.startswith("mid_block.") for name in layers)


def another_model(place: Path) -> dict:
    save_masks(
        Masks.uniform(
            {
                "gone": torch.eye(4).bool().repeat(1, 2)
                | torch.eye(4).bool().roll(1, 1).repeat(1, 2)
            },
            TWO_OF_FOUR,
        ),
        place / "m.safetensors",
    )
    return {"masks": str(place / "m.safetensors")}


def another_shape(place: Path) -> dict:
    found = random_masks(load(tiny_folder()).denoiser)
    name, mask = next(iter(found))
    wrong = dict(found.by_layer) | {name: mask[:, :4]}
    save_masks(Masks(wrong, found.patterns), place / "m.safetensors")
    return {"masks": str(place / "m.safetensors")}


REFUSED = [
    (lambda _: {"targets": ("mid_blok",)}, r"'mid_blok' matches no layer; near ones are mid_block"),
    (lambda _: {"targets": ("conv_in",)}, "'conv_in' is protected"),
    (lambda _: {"pattern": "2:5"}, "pattern 2:5 fits no layer: .* are not a multiple of 5"),
    (another_model, "masks are of another model: gone has no such layer"),
    (another_shape, r"masks are of another model: down_blocks\S+ has shape"),
    (lambda p: {"masks": str(p / "none.safetensors")}, "none.safetensors"),
    (lambda p: {"masks": str(tiny_folder())}, "has no masks.*prune it first"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_does_not_fit_the_model_is_refused_by_name(make, message, tmp_path):
    options = LearnOptions(steps=1, **QUICK, **make(tmp_path))
    with pytest.raises(UserError, match=message):
        learn(tiny_folder(), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_another_pattern_than_the_masks_is_refused(masked, tmp_path):
    with pytest.raises(UserError, match="pattern = '1:4', but the model has 2:4 masks"):
        learn(masked, tmp_path / "out", LearnOptions(steps=1, pattern="1:4", **QUICK))


# ------------------------------------------------------------------------------- resumption


def killed_in(step: int, action) -> list[int]:
    """Run `action` until the loop begins this step; the steps that were begun."""
    original, begun = loop._step, []

    def counted(*given, **named):
        begun.append(named["step"])
        if named["step"] == step:
            raise Killed
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", counted)
        with pytest.raises(Killed):
            action()
    return begun


def test_an_interrupted_stage_ends_with_the_same_bits(masked, tmp_path):
    options = LearnOptions(
        steps=6, lr=1.0, checkpoint_every=2, validate_every=2, train_weights=True, dataset_size=8,
        **QUICK,
    )  # fmt: skip
    learn(masked, tmp_path / "whole", options)
    run = partial(learn, masked, tmp_path / "broken", options)
    assert killed_in(5, run) == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "broken").exists()
    changed = options.model_copy(update={"relaxed": RelaxedOptions(tau=(3.0, 0.1))})
    with pytest.raises(UserError, match=r"unfinished run with another tau .*--overwrite"):
        learn(masked, tmp_path / "broken", changed)
    assert killed_in(5, run) == [4, 5]
    run()
    whole, broken = load(tmp_path / "whole"), load(tmp_path / "broken")
    assert broken.hash == whole.hash
    assert broken.record.figures == whole.record.figures
    for name in ("logits.safetensors", "masks_last.safetensors", "loss_training.npy"):
        one, two = (
            (p / "learned" / name).read_bytes() for p in (tmp_path / "whole", tmp_path / "broken")
        )
        assert one == two, name


def test_a_stage_cycles_through_whole_batches(masked, tmp_path, monkeypatch):
    """dataset_size 9 in batches of 4 is 12 problems: three batches, again and again."""
    seen = []

    def stop(*_, problems, **__):
        seen.append(problems.cycle)
        raise Killed

    monkeypatch.setattr(learn_module, "learn_masks", stop)
    for size in (9, 12, 0):
        options = LearnOptions(steps=1, dataset_size=size, **QUICK)
        with pytest.raises(Killed):
            learn(masked, tmp_path / "out", options)
    assert seen == [12, 12, 0]
