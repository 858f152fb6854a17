"""Every family of networks goes through the whole engine: what holds for one holds for all.

The table decides which: a new family is tested from the day that it has a line there.
"""

import copy
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from families import model, network, task
from torch import nn

from prunedm.architecture import (
    ARCHITECTURES,
    Architecture,
    answer,
    architecture_named,
    architecture_of,
    example,
)
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import load, save
from prunedm.learning import ESTIMATORS
from prunedm.learning.logits import MaskLogits
from prunedm.learning.trainer import learn_masks
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import is_under, prunable_layers, to_groups, why_not_nm
from prunedm.options import LearnOptions
from prunedm.progress import Silent
from prunedm.removal.input_grams import input_grams
from prunedm.removal.nm import eligible_layers, nm_masks
from prunedm.removal.obs import obs_prune
from prunedm.sampling import FastDenoiser
from prunedm.scores import SCORES, Calibration, score_layers
from prunedm.training.loop import make_accelerator

FAMILIES = list(ARCHITECTURES)


def layers_of(made: nn.Module, most: int = 6) -> dict[str, nn.Module]:
    """Some layers that take 2:4, spread over the network."""
    fit = {n: m for n, m in prunable_layers(made).items() if why_not_nm(m, 4) is None}
    names = list(fit)
    return {name: fit[name] for name in names[:: max(1, len(names) // most)]}


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_laid_out_as_samples_are(name):
    made = network(name)
    inputs = task(model(name)).batch(range(3)).inputs
    with torch.no_grad():
        found = answer(made, inputs)
        alone = answer(made, {key: x[1:2] for key, x in inputs.items()})
    torch.testing.assert_close(found[1:2], alone, rtol=1e-4, atol=1e-5)
    if "sample" in inputs:
        n, c, h, w = inputs["sample"].shape
        assert found.shape in ((n, c, h, w), (n, 2 * c, h, w))


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_are_seeded_and_whole(name):
    made = network(name)
    if name == "FluxTransformer2DModel":
        pytest.skip("its example is of full size: 4,096 tokens")
    first, again, other = (example(made, 2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    with torch.no_grad():
        assert answer(made, first).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_protected_is_there(name):
    made, record = network(name), architecture_of(network(name))
    layers = prunable_layers(made)
    assert layers
    assert not any(is_under(layer, record.protect) for layer in layers)
    names = [n for n, _ in made.named_modules()]
    optional = {"class_embedding", "add_embedding", "encoder_hid_proj"}
    for pattern in {*record.protect, *record.ends, *record.blocks} - optional:
        assert any(is_under(n, [pattern]) for n in names), pattern


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_masks_that_are_not_each_others(name, score):
    made, layers = model(name), layers_of(network(name))
    layers = {n: made.denoiser.get_submodule(n) for n in layers}
    calibration = Calibration(
        problems=task(made, **({} if made.scheduler is None else {"time_range": (0, 3)})),
        count=8,
        batch_size=4,
        time_bins=1,
        sweep_images=4,
    )
    scores = score_layers(made.denoiser, layers, score, calibration=calibration)
    masks = nm_masks(layers, scores, Pattern(2, 4))
    assert masks.by_layer.keys() == layers.keys()
    assert masks.kept * 2 == masks.total
    if not score.startswith("magnitude"):
        plain = nm_masks(layers, score_layers(made.denoiser, layers, "magnitude"), Pattern(2, 4))
        assert any(not torch.equal(mask, plain.by_layer[n]) for n, mask in masks)


@pytest.mark.parametrize("name", FAMILIES)
def test_obs_changes_layers_outputs_less_than_magnitude(name):
    made = model(name)
    batches = [task(made).batch(range(k, k + 16)) for k in (0, 16)]
    plain, updated = (copy.deepcopy(made.denoiser) for _ in range(2))
    layers = layers_of(made.denoiser)
    grams = input_grams(made.denoiser, layers, batches, weigh=torch.ones_like)
    ours = {n: plain.get_submodule(n) for n in layers}
    nm_masks(ours, score_layers(plain, ours, "magnitude"), Pattern(2, 4)).apply_(plain)
    masks = obs_prune(
        updated,
        dict.fromkeys(layers, Pattern(2, 4)),
        batches=batches,
        time_weights=(1, 1),
        guidance=0,
    )
    assert masks.keys() == layers.keys()

    def error(pruned: nn.Module, n: str) -> float:
        """|X (W - W')^T|^2 over the inputs X that the dense layer meets."""
        change = (layers[n].weight - pruned.get_submodule(n).weight).detach()
        columns = to_groups(change, 1).reshape(len(change), -1)
        return float((columns @ grams[n] * columns).sum())

    for n in layers:
        assert error(updated, n) < error(plain, n), n


@pytest.mark.parametrize("name", FAMILIES)
def test_a_masked_model_is_saved_and_loaded_to_the_bit(name, tmp_path):
    made = model(name)
    eligible, _ = eligible_layers(prunable_layers(made.denoiser), Pattern(2, 4))
    masks = nm_masks(eligible, score_layers(made.denoiser, eligible, "magnitude"), Pattern(2, 4))
    masks.apply_(made.denoiser)
    made.masks = masks
    save(made, tmp_path / "out")
    again = load(tmp_path / "out")
    assert type(again.denoiser) is type(made.denoiser)
    assert isinstance(again.masks, Masks)
    inputs = task(made).batch(range(2)).inputs
    with torch.no_grad():
        assert torch.equal(answer(made.denoiser, inputs), answer(again.denoiser, inputs))
    plain = type(made.denoiser).from_pretrained(tmp_path / "out" / made.component).eval()
    with torch.no_grad():
        torch.testing.assert_close(answer(plain, inputs), answer(made.denoiser, inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_finite_and_gradients_reach_every_layer(name):
    made = model(name)
    batch = task(made).batch(range(4))
    loss = batch.losses(answer(made.denoiser, batch.inputs))
    assert loss.shape == (4,)
    loss.mean().backward()
    for layer, module in prunable_layers(made.denoiser).items():
        assert module.weight.grad is not None, layer
        assert module.weight.grad.isfinite().all(), layer
    assert denoising_loss(made.denoiser, [batch]).mean == pytest.approx(float(loss.mean().detach()))


FROZEN = [name for name in ESTIMATORS if name != "sr-ste"]  # which follows trained weights
PAIRS = [(name, FROZEN[k % len(FROZEN)]) for k, name in enumerate(FAMILIES)]


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_masks_are_learned(name, estimator, tmp_path):
    made = model(name)
    network, problems = made.denoiser, task(made)
    layers = layers_of(network)
    first = nm_masks(layers, score_layers(network, layers, "magnitude"), Pattern(2, 4))
    options = LearnOptions(
        estimator=estimator, steps=12, batch_size=8, lr=0.5, keep="last", device="cpu",
        validate_every=0, checkpoint_every=0, train_weights=False, distill=1.0,
    )  # fmt: skip
    logits = MaskLogits(first, {n: m.weight.detach() for n, m in layers.items()}, lead=0.05)
    start = logits.by_layer([g.detach().clone() for g in logits.groups])
    weights = {n: m.weight.detach().clone() for n, m in layers.items()}
    held_out = problems.batch(range(12, 20))
    wanted = answer(network, held_out.inputs).detach()

    def loss(masks: Masks) -> float:
        kept = {f"{n}.weight": weights[n] * mask for n, mask in masks}
        with torch.no_grad():
            found = answer(network, held_out.inputs, weights=kept)
        return float(held_out.distances(found, wanted).mean())

    learned = learn_masks(
        network,
        logits,
        teacher=None,
        problems=problems,
        options=options,
        accelerator=make_accelerator(options),
        resume=tmp_path / "resume",
        progress=Silent(),
        hard_loss=loss,
    )
    learned.masks.check_pattern()
    moved = torch.cat([(learned.logits[n] - start[n]).flatten() for n in layers])
    assert float(moved.abs().max()) > 0
    assert math.isfinite(loss(learned.masks))
    for n, module in layers.items():
        assert torch.equal(module.weight, weights[n])


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_stays_near(name):
    """What is `precise` may be called in any way, and its attributes read from outside."""
    made = network(name)
    if architecture_of(made).text:
        pytest.skip("samples are of denoisers")
    inputs = task(model(name)).batch(range(2)).inputs
    quick = FastDenoiser(made, calls=1, dtype=torch.bfloat16, compiling="off")
    with torch.no_grad():
        due, found = answer(made, inputs), answer(quick, inputs)
    assert found.dtype == torch.float32
    assert float((found - due).norm() / due.norm()) < 0.05
    assert not torch.equal(found, due)


# ------------------------------------------------------------------ classes without a record


def page() -> str:
    path = Path(__file__).parents[1] / "docs" / "guides" / "add-a-family.md"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def fresh_records():
    """Records are read once; what a test puts into the table is forgotten."""
    architecture_named.cache_clear()
    yield
    architecture_named.cache_clear()


def test_the_example_of_the_docs_is_a_family(tmp_path, monkeypatch, fresh_records):
    code, line = re.findall(r"```(?:python|text)\n(.*?)```", page(), re.S)
    (tmp_path / "pixart.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    name, module = re.fullmatch(r'\s*"(\w+)": "prunedm\.architectures\.(\w+)",\s*', line).groups()
    monkeypatch.setitem(ARCHITECTURES, name, module)
    for check in CHECKS:
        check(name)
    place = tmp_path / "saved"
    test_a_masked_model_is_saved_and_loaded_to_the_bit(name, place)


CHECKS = [
    test_half_precision_stays_near,
    test_answers_are_laid_out_as_samples_are,
    test_examples_are_seeded_and_whole,
    test_what_is_protected_is_there,
    test_obs_changes_layers_outputs_less_than_magnitude,
    test_losses_are_finite_and_gradients_reach_every_layer,
]


def test_the_page_names_every_field():
    named = set(re.findall(r"`(\w+)`", page()))
    assert {field.name for field in fields(Architecture)} <= named | {"text"}


def test_a_class_without_a_record_takes_masks_and_says_what_is_missing():
    made = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    layers = layers_of(made)
    assert nm_masks(layers, score_layers(made, layers, "magnitude"), Pattern(2, 4)).total
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1])}
    inputs |= {"input_ids": torch.zeros(1, 4).long()}
    with pytest.raises(UserError, match=r"PixArtTransformer2DModel is not known.*add-a-family"):
        answer(made, inputs)
