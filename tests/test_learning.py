"""Mask learning: the relaxation against enumeration, the trainer and the stage on a tiny model."""

import json
from collections import Counter
from itertools import combinations, product
from math import comb, exp
from pathlib import Path

import pytest
import torch
from helpers import Killed, noise_images, problems, tiny_folder, tiny_model
from scipy.stats import chisquare

from prunedm.diffusion import predict, problem_losses
from prunedm.errors import UserError
from prunedm.folder import load, save
from prunedm.layers import prunable_layers, to_groups
from prunedm.learning.relaxation import RelaxedMasks, all_patterns, temperature
from prunedm.learning.trainer import groups_changed, learn_masks
from prunedm.masks import Masks, Pattern
from prunedm.options import FinetuneOptions, LearnOptions, PruneOptions
from prunedm.progress import Silent
from prunedm.record import FILE
from prunedm.removal.nm import nm_mask, nm_masks
from prunedm.scores import score_layers
from prunedm.stages import finetune, learn, prune
from prunedm.training import loop
from prunedm.training.loop import make_accelerator

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "2:8"]
LAYER = "layer"
QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu"}


def relaxed(
    pattern: str, groups: int = 6, *, seed: int = 0, strength: float = 1.0, kernel: int = 0
) -> RelaxedMasks:
    """Over one layer with `groups` groups; first masks by a random score."""
    wanted = Pattern.parse(pattern)
    shape = (groups, wanted.m) + (kernel, kernel) * bool(kernel)
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    masks = Masks.uniform({LAYER: nm_mask(score, wanted)}, wanted)
    return RelaxedMasks(masks, {LAYER: score}, strength=strength)


def set_logits(relaxed: RelaxedMasks, values: list[float]) -> None:
    """The same logits in every group."""
    with torch.no_grad():
        relaxed.logits.copy_(torch.tensor(values).expand_as(relaxed.logits))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_patterns_are_every_choice_once(pattern):
    wanted = Pattern.parse(pattern)
    rows = [tuple(map(int, row)) for row in all_patterns(wanted)]
    expected = [bits for bits in product((0, 1), repeat=wanted.m) if sum(bits) == wanted.n]
    assert sorted(rows) == sorted(expected)
    assert len(rows) == comb(wanted.m, wanted.n)


def test_too_many_patterns_are_refused_with_their_number():
    assert len(all_patterns(Pattern(2, 16))) == 120
    with pytest.raises(UserError, match="8:16 has 12870 patterns a group, relaxation takes 256"):
        all_patterns(Pattern(8, 16))


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tau", [5.0, 1.0, 0.05])
def test_soft_masks_lie_in_0_1_and_groups_sum_to_n(pattern, kernel, tau):
    masks = relaxed(pattern, kernel=kernel)
    soft = masks(tau, torch.Generator().manual_seed(1))[LAYER].detach()
    assert soft.shape == masks.shapes[LAYER]
    assert soft.min() >= 0
    assert soft.max() <= 1 + 1e-5
    sums_G = to_groups(soft, masks.pattern.m).sum(1)
    assert sums_G.numpy() == pytest.approx(masks.pattern.n, abs=1e-5)


@pytest.mark.parametrize("pattern", ["1:3", "2:4", "3:5"])
def test_hard_draws_follow_the_conditional_bernoulli_distribution(pattern):
    n, m = map(int, pattern.split(":"))
    logits = [0.9, -0.4, 0.0, 0.6, -1.1][:m]
    masks = relaxed(pattern, groups=8000)
    set_logits(masks, logits)
    soft_GM = masks(1e-4, torch.Generator().manual_seed(2))[LAYER].detach()
    hard_GM = soft_GM.round()
    assert (hard_GM.sum(1) == n).all()
    assert ((soft_GM - hard_GM).abs().amax(1) < 1e-3).float().mean() > 0.995
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in hard_GM)
    weights = {s: exp(sum(logits[i] for i in s)) for s in combinations(range(m), n)}
    total = sum(weights.values())
    expected = [8000 * weight / total for weight in weights.values()]
    assert chisquare([counts[s] for s in weights], expected).pvalue > 0.01
    uniform = [8000 / len(weights)] * len(weights)
    assert chisquare([counts[s] for s in weights], uniform).pvalue < 1e-6


def test_draws_are_a_function_of_the_generator():
    masks = relaxed("2:4")
    first, same, other = (
        masks(1.0, torch.Generator().manual_seed(seed))[LAYER] for seed in (3, 3, 4)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_gradient_points_away_from_what_costs():
    """For costs c . mask, dE/dl_i = Cov(c . S, S_i) by enumeration; drawn at a warm temperature."""
    masks = relaxed("2:4", groups=4000)
    logits, costs = [0.3, -0.2, 0.5, 0.0], torch.tensor([2.0, -1.0, 0.5, -1.5])
    set_logits(masks, logits)
    soft = masks(1.0, torch.Generator().manual_seed(0))[LAYER]
    (soft * costs).sum().backward()
    drawn = masks.logits.grad.mean(0).double()
    table = all_patterns(Pattern(2, 4)).double()
    p = torch.softmax(table @ torch.tensor(logits).double(), 0)
    mean, cost = p @ table, table @ costs.double()
    exact = (p * (cost - p @ cost)) @ (table - mean)
    assert (drawn.sign() == exact.sign()).all()
    assert torch.nn.functional.cosine_similarity(drawn, exact, dim=0) > 0.97


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mode_is_the_most_probable_pattern(pattern):
    n, m = map(int, pattern.split(":"))
    masks = relaxed(pattern, groups=20)
    with torch.no_grad():
        masks.logits.copy_(torch.randn(20, m, generator=torch.Generator().manual_seed(5)))
    mode_GM = masks.mode().by_layer[LAYER]
    for logits, kept in zip(masks.logits.tolist(), mode_GM, strict=True):
        best = max(combinations(range(m), n), key=lambda s: sum(logits[i] for i in s))
        assert tuple(kept.nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [0, 3])
def test_learning_starts_from_the_given_masks_whatever_made_them(pattern, strength, kernel):
    wanted = Pattern.parse(pattern)
    shape = (30, 2 * wanted.m) + (kernel, kernel) * bool(kernel)
    generator = torch.Generator().manual_seed(0)
    given = nm_mask(torch.rand(shape, generator=generator), wanted)
    other_score = torch.rand(shape, generator=generator) ** 4  # does not agree with the masks
    masks = RelaxedMasks(
        Masks.uniform({LAYER: given}, wanted), {LAYER: other_score}, strength=strength
    )
    assert torch.equal(masks.mode().by_layer[LAYER], given)


def test_layers_keep_their_own_logits():
    wanted = Pattern(2, 4)
    shapes = {"a": (3, 8), "b": (2, 4, 3, 3), "c": (5, 4)}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    masks = Masks.uniform({n: nm_mask(s, wanted) for n, s in scores.items()}, wanted)
    learned = RelaxedMasks(masks, scores, strength=1.0)
    assert learned.logits.shape == ((24 + 72 + 20) // 4, 4)
    for name, mask in learned.mode():
        assert torch.equal(mask, masks.by_layer[name])


def test_temperature_is_geometric_between_its_ends():
    values = [temperature((2.0, 0.125), step, 5) for step in range(5)]
    assert values == pytest.approx([2, 1, 0.5, 0.25, 0.125])
    assert temperature((2.0, 0.1), 0, 1) == 2.0


def test_groups_changed_by_hand():
    def masks(rows: list[list[int]]) -> Masks:
        return Masks.uniform({LAYER: torch.tensor(rows).bool()}, Pattern(1, 2))

    before = masks([[1, 0, 1, 0], [0, 1, 0, 1]])
    assert groups_changed(before, before) == 0
    assert groups_changed(before, masks([[1, 0, 0, 1], [0, 1, 0, 1]])) == 0.25


# ------------------------------------------------------------------------------ trainer


def learned_on_tiny(folder: Path, **changes):
    """Masks that start at random and learn to keep a tiny model's output; its losses and weights."""
    denoiser = tiny_model().denoiser
    for parameter in denoiser.parameters():  # the default start is close to an output of zero
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    layers = prunable_layers(denoiser)
    pattern = Pattern(2, 4)
    scores = score_layers(denoiser, layers, "random")
    batch = problems().batch(range(16))
    wanted = predict(denoiser, batch).detach()
    seen = []

    def hard_loss(masks: Masks) -> float:
        kept = {n: p.clone() for n, p in denoiser.named_parameters()}
        masks.apply_(denoiser)
        with torch.no_grad():
            loss = float(problem_losses(predict(denoiser, batch), wanted).mean())
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(kept[name])
        seen.append(masks)
        return loss

    first = nm_masks(layers, scores, pattern)
    start = hard_loss(first)
    options = LearnOptions(**({"steps": 30, "batch_size": 8, "device": "cpu"} | changes))
    learned = learn_masks(
        denoiser,
        RelaxedMasks(first, scores, strength=1.0),
        problems=problems(noise_images(12)),
        options=options,
        accelerator=make_accelerator(options),
        checkpoint=folder / "checkpoint.safetensors",
        progress=Silent(),
        hard_loss=hard_loss,
    )
    return denoiser, before, first, start, learned, hard_loss


def test_learning_lowers_the_hard_loss_and_leaves_the_denoiser_alone(tmp_path):
    denoiser, before, first, start, learned, hard_loss = learned_on_tiny(tmp_path)
    assert hard_loss(learned.masks) < 0.8 * start
    learned.masks.check_pattern()
    assert learned.masks.pattern == Pattern(2, 4)
    for name, mask in learned.masks:
        assert (to_groups(mask, 4).sum(1) == 2).all(), name
    assert learned.groups_changed == groups_changed(first, learned.masks) > 0.05
    assert learned.history.held_out[-1] == (30, hard_loss(learned.masks))
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad
        assert parameter.grad is None


def test_the_loss_of_a_step_is_of_masked_weights_against_the_dense_output(tmp_path, monkeypatch):
    seen = []

    def spy(module, objective, **named):
        batch = named["problems"].batch(range(4))
        seen.append([objective(module, batch, step).item() for step in (0, 0, 1)])
        return loop.fit(module, objective, **named)

    monkeypatch.setattr("prunedm.learning.trainer.fit", spy)
    for objective in ("output", "data"):
        learned_on_tiny(tmp_path / objective, steps=2, tau=(1.0, 1.0), objective=objective)
    (a, again, other_draw), (data, *_) = seen
    assert a == again > 0
    assert a != other_draw
    assert data != a


# -------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """The tiny model with 2:4 masks, by our own prune stage."""
    out = tmp_path_factory.mktemp("masked") / "masked"
    prune(tiny_folder(), out, PruneOptions(mechanism="nm", score="random", pictures=0))
    return out


def test_the_stage_starts_from_masks_and_takes_weights_from_before_them(masked, tmp_path):
    record, made = learn(masked, tmp_path / "out", LearnOptions(steps=8, lr=1.0, **QUICK))
    dense, first, result = load(tiny_folder()), load(masked), load(tmp_path / "out")
    assert made
    assert set(result.masks.by_layer) == set(first.masks.by_layer)
    result.masks.check_pattern()
    changed = groups_changed(first.masks, result.masks)
    assert record.figures["groups_changed"] == changed > 0
    for name, weight in dense.denoiser.named_parameters():
        layer = name.removesuffix(".weight")
        mask = result.masks.by_layer.get(layer, torch.ones(1))
        assert torch.equal(result.denoiser.get_parameter(name), weight * mask), name
    assert [r.stage for r in record.lineage()] == ["prune", "learn"]
    assert record.inputs["model"].hash == first.hash


def test_figures_are_of_the_hard_masks(masked, tmp_path):
    from prunedm.evaluation.loss import denoising_loss
    from prunedm.stages.inputs import held_out_problems

    options = LearnOptions(steps=3, **QUICK)
    record, _ = learn(masked, tmp_path / "out", options)
    models = {
        "loss_dense": load(tiny_folder()),
        "loss_first_masks": load(masked),
        "loss": load(tmp_path / "out"),
    }
    for key, model in models.items():
        direct = denoising_loss(model.denoiser, held_out_problems(model, options, 8))
        assert record.figures[key] == pytest.approx(direct.mean, abs=1e-7), key
    assert record.figures["curve"]["held_out"][-1][1] == pytest.approx(record.figures["loss"])


def test_learning_goes_on_from_learned_masks(masked, tmp_path):
    learn(masked, tmp_path / "once", LearnOptions(steps=3, lr=1.0, **QUICK))
    record, _ = learn(tmp_path / "once", tmp_path / "twice", LearnOptions(steps=1, **QUICK))
    once = load(tmp_path / "once")
    assert record.figures["loss_first_masks"] == pytest.approx(
        json.loads((tmp_path / "once" / FILE).read_text())["figures"]["loss"]
    )
    twice = load(tmp_path / "twice")
    assert (twice.masks.kept, twice.masks.total) == (once.masks.kept, once.masks.total)
    assert [r.stage for r in record.lineage()] == ["prune", "learn", "learn"]


@pytest.mark.parametrize("pattern", ["1:4", "2:4"])
def test_a_model_without_masks_starts_from_a_score(pattern, tmp_path):
    record, _ = learn(
        tiny_folder(), tmp_path / "out", LearnOptions(steps=1, pattern=pattern, **QUICK)
    )
    masks = load(tmp_path / "out").masks
    assert str(masks.pattern) == pattern
    assert "loss_first_masks" in record.figures


def test_unstructured_masks_are_refused(tmp_path):
    sparse = tmp_path / "sparse"
    prune(
        tiny_folder(),
        sparse,
        PruneOptions(mechanism="weights", score="random", target="params=0.3", pictures=0),
    )
    with pytest.raises(
        UserError, match="sparse has unstructured masks; learn wants one N:M pattern"
    ):
        learn(sparse, tmp_path / "out", LearnOptions(steps=1, **QUICK))
    assert not (tmp_path / "out").exists()


def test_masks_of_unknown_origin_are_refused(masked, tmp_path):
    foreign = load(masked)
    foreign.record = None
    save(foreign, tmp_path / "foreign")
    tuned = tmp_path / "tuned"
    finetune(masked, tuned, FinetuneOptions(steps=1, teacher="none", **QUICK))
    for folder in (tmp_path / "foreign", tuned):
        with pytest.raises(UserError, match="does not say which model its masks were applied to"):
            learn(folder, tmp_path / "out", LearnOptions(steps=1, **QUICK))


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


def test_another_pattern_than_the_masks_is_refused(masked, tmp_path):
    with pytest.raises(UserError, match="pattern = '1:4', but the model has 2:4 masks"):
        learn(masked, tmp_path / "out", LearnOptions(steps=1, pattern="1:4", **QUICK))


def test_an_interrupted_stage_ends_with_the_same_bits(masked, tmp_path, monkeypatch):
    options = LearnOptions(steps=6, lr=1.0, checkpoint_every=2, validate_every=2, **QUICK)
    learn(masked, tmp_path / "whole", options)
    step, taken = loop._step, []

    def killed(*arguments, **named):
        taken.append(named["step"])
        if len(taken) == 6:  # in step 5, after the checkpoint of 4
            raise Killed
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(Killed):
        learn(masked, tmp_path / "broken", options)
    assert not (tmp_path / "broken").exists()
    learn(masked, tmp_path / "broken", options)
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5]
    whole, broken = load(tmp_path / "whole"), load(tmp_path / "broken")
    assert broken.hash == whole.hash
    assert broken.record.figures == whole.record.figures
