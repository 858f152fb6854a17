"""The MaskPro trainer by hand: the steps' order, figures, gradients, resume, and what it saves."""

import atexit
import math
from copy import deepcopy
from functools import cache
from itertools import chain, islice
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import pytest
import torch
import yaml
from helpers import batch_of, output, tiny_folder, tiny_model
from PIL import Image

import prunedm
from prunedm.architecture import answer
from prunedm.data.images import digits
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import load, save
from prunedm.learning.sparsity import get_model_sparsity_summary
from prunedm.maskpro.config import MaskProConfig
from prunedm.maskpro.trainer import DiffusionMaskProTrainer
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import DataOptions
from prunedm.randomness import seed_for
from prunedm.removal.nm import nm_masks
from prunedm.stages.inputs import held_out_problems, images_for, training_problems
from prunedm.task import Batch

ESTIMATORS = ["relaxed", "reinforce"]
CALLS = [
    "load_model_and_scheduler",
    "apply_maskpro_wrappers",
    "setup_data_loaders",
    "setup_optimizers",
]
KEYS = {
    "total_loss",
    "sparsity_ratio",
    "nm_compliance",
    "temperature",
    "grad_norm",
}


@cache
def images() -> str:
    """A folder of 40 digits, two of them held out."""
    folder = Path(mkdtemp(prefix="prunedm-tests-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    for i, pixels in enumerate(digits("train", 8)[0][:40]):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return str(folder)


def config(**options) -> dict:
    quick = {
        "dataset": images(),
        "target_layers": ["mid_block"],
        "batch_size": 8,
        "steps": 6,
        "validation_problems": 20,
        "device": "cpu",
    }
    return {"model": str(tiny_folder()), **quick, **options}


def trainer(**options) -> DiffusionMaskProTrainer:
    made = DiffusionMaskProTrainer(config(**options))
    for call in CALLS:
        getattr(made, call)()
    return made


def batches(trainer: DiffusionMaskProTrainer, count: int) -> list[Batch]:
    epochs = (batch for _ in range(count) for batch in trainer.train_loader)
    return list(islice(epochs, count))


def logits(trainer: DiffusionMaskProTrainer) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in trainer.learner.logits.parameters()])


def parts(trainer: DiffusionMaskProTrainer) -> list[list[torch.nn.Parameter]]:
    return [list(trainer.model.parameters()), list(trainer.learner.logits.parameters())]


def same_parameters(first: DiffusionMaskProTrainer, second: DiffusionMaskProTrainer) -> bool:
    other = second.learner.state_dict()
    return all(torch.equal(x, other[name]) for name, x in first.learner.state_dict().items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_by_hand_lower_the_held_out_loss(estimator):
    made = trainer(estimator=estimator, steps=12, model_lr=3e-3, mask_lr=0.02)
    before = made.validate()
    for step, batch in enumerate(batches(made, 12)):
        metrics = made.training_step(batch)
        assert metrics.keys() == KEYS
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        assert metrics["sparsity_ratio"] == 0.5
        assert metrics["nm_compliance"] == 1
        assert metrics["temperature"] == pytest.approx(2 * 0.05 ** (step / 11))
    after = made.validate()
    assert after["loss"] < 0.8 * before["loss"]
    assert after["loss"] == made.validate()["loss"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_same_seed_gives_the_same_bits_and_resumes_to_them(estimator):
    first = trainer(estimator=estimator, mask_lr=0.1, lead=1)
    given = batches(first, 4)
    for batch in given[:2]:
        first.training_step(batch)
    state = deepcopy(first.state_dict())
    metrics = [first.training_step(batch) for batch in given[2:]]
    second = trainer(estimator=estimator, mask_lr=0.1, lead=1)
    second.load_state_dict(state)
    assert [second.training_step(batch) for batch in batches(trainer(), 4)[2:]] == metrics
    assert same_parameters(first, second)
    other = trainer(estimator=estimator, mask_lr=0.1, seed=1)
    for batch in given:
        other.training_step(batch)
    assert not same_parameters(first, other)


def masked_loss(model: torch.nn.Module, masks: dict, batch: Batch) -> torch.Tensor:
    weights = {f"{n}.weight": model.get_parameter(f"{n}.weight") * m for n, m in masks.items()}
    return batch.losses(answer(model, batch.inputs, weights=weights)).mean()


def test_reinforce_is_the_classic_policy_gradient_of_learn():
    """Twins under the same draw: weights follow the loss, logits the advantage, step by step."""
    made = trainer(
        estimator="reinforce", clip=0, mask_loss_weight=0.25, baseline_momentum=0.7, lead=1
    )
    delta = 0.0
    for step, batch in enumerate(batches(made, 3)):
        model, logits = deepcopy(made.model).train(), deepcopy(made.learner.logits)
        (distribution,) = logits.distributions("conditional-bernoulli")
        generator = torch.Generator().manual_seed(seed_for(0, "masks", step))
        mask_GM = distribution.sample(torch.rand(logits.groups[0].shape, generator=generator))
        loss = masked_loss(model, logits.by_layer([mask_GM]), batch)
        residual = float((loss - masked_loss(model, logits.first.by_layer, batch)).detach())
        (loss + 0.25 * (residual - delta) * distribution.log_prob(mask_GM).sum()).backward()
        metrics = made.training_step(batch)
        assert metrics["total_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        wanted = [*model.parameters(), *logits.parameters()]
        for mine, twin in zip(chain(*parts(made)), wanted, strict=True):
            torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-4, atol=1e-7)
        delta += 0.3 * (residual - delta)
        assert float(made.learner.estimator.delta) == pytest.approx(delta, abs=1e-7)


def test_the_relaxed_gradient_of_logits_is_weighted():
    made = [trainer(mask_loss_weight=weight, clip=0) for weight in (1.0, 0.5, 0.0)]
    for each in made:
        each.training_step(batches(each, 1)[0])
    full, half, none = (parts(each)[1] for each in made)
    for a, b, c in zip(full, half, none, strict=True):
        assert torch.equal(a.grad * 0.5, b.grad)
        assert not c.grad.any()
    weights = [parts(each)[0] for each in made]
    assert all(torch.equal(a.grad, c.grad) for a, _, c in zip(*weights, strict=True))


def test_gradients_are_clipped_apart_and_learning_rates_are_their_own():
    made = trainer(clip=1e-3, model_lr=1e-4, mask_lr=0.01)
    before = [deepcopy(part) for part in parts(made)]
    metrics = made.training_step(batches(made, 1)[0])
    assert metrics["grad_norm"] > 1e-3
    for part, old, lr in zip(parts(made), before, (1e-4, 0.01), strict=True):
        norm = torch.cat([p.grad.flatten() for p in part]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
        moved = max(float((p - q).detach().abs().max()) for p, q in zip(part, old, strict=True))
        assert moved == pytest.approx(lr, rel=0.02)  # AdamW's first step


def test_the_loader_reads_the_stages_problems_epoch_by_epoch():
    made = trainer(batch_size=15, flip=True)
    epochs = [list(made.train_loader) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [len(made.train_loader)] * 2 == [3, 3]
    numbers = [n for epoch in epochs for batch in epoch for n in batch.numbers]
    model, options = load(tiny_folder()), DataOptions(dataset=images(), flip=True)
    found = images_for(model, options, "train")
    assert numbers == list(range(2 * len(found)))
    stream = training_problems(model, options, found)
    last = stream.batch([numbers[-1]])
    assert torch.equal(last.inputs["sample"][0], epochs[1][-1].inputs["sample"][-1])


def test_validation_is_the_loss_of_the_masked_model_on_the_stages_problems():
    made = trainer(target_layers=[])
    model = load(tiny_folder())
    layers = prunable_layers(model.denoiser)
    scores = {name: layer.weight for name, layer in layers.items()}
    nm_masks(layers, scores, Pattern(2, 4)).apply_(model.denoiser)
    expected = denoising_loss(
        model.denoiser, held_out_problems(model, DataOptions(dataset=images()), 20)
    )
    found = made.validate()
    assert (found["loss"], found["loss_se"]) == (expected.mean, expected.standard_error)
    assert not made.model.training


def test_clean_images_get_seeded_noise():
    clean = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second, other = (trainer(seed=seed) for seed in (0, 0, 1))
    losses = [[x.training_step(clean)["total_loss"] for _ in range(2)] for x in (first, second)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert other.training_step(clean)["total_loss"] != losses[0][0]


def test_the_summary_counts_the_trainers_masks():
    made = trainer(target_layers=[])
    found = get_model_sparsity_summary(made.model, made.masks)
    assert found["overall_stats"]["masked_parameters"] == made.masks.total - made.masks.kept
    assert found["overall_stats"]["nm_compliance"] == 1
    assert found["layer_stats"]["mid_block.attentions.0.to_q"]["sparsity"] == 0.5
    assert found["layer_stats"]["conv_in"]["n"] is None


def test_train_runs_all_steps():
    made = trainer(steps=0, epochs=2)
    assert made.total_steps == 2 * len(made.train_loader) == 2 * math.ceil(38 / 8)
    metrics = made.train()
    assert made.steps == 10
    assert metrics == made.validate()
    short = trainer(steps=2)
    short.train()
    assert short.steps == 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_saved_reloads_with_masks_that_hold(estimator, tmp_path):
    made = trainer(estimator=estimator, mask_lr=0.3, model_lr=1e-3)
    for batch in batches(made, 4):
        made.training_step(batch)
    loss = made.validate()["loss"]
    state = deepcopy(made.model.state_dict())
    made.save(tmp_path / "out")
    assert all(torch.equal(value, state[name]) for name, value in made.model.state_dict().items())
    saved = prunedm.load(tmp_path / "out")
    assert saved.masks.pattern == Pattern(2, 4)
    assert not saved.masks.violations(saved.denoiser)
    with made.masks.applied(made.model):
        assert torch.equal(output(saved.denoiser), output(made.model.eval()))
    assert (
        denoising_loss(
            saved.denoiser, held_out_problems(saved, DataOptions(dataset=images()), 20)
        ).mean
        == loss
    )
    assert saved.record.stage == "maskpro"
    assert saved.record.inputs["model"].hash == load(tiny_folder()).hash
    assert saved.record.figures == {"steps": 4, "sparsity_ratio": 0.5, "nm_compliance": 1.0}
    with pytest.raises(UserError, match="is not an empty folder"):
        made.save(tmp_path / "out")
    made.training_step(batches(made, 1)[0])


def test_every_call_names_the_one_before_it():
    made = DiffusionMaskProTrainer(config(steps=0))
    clean = torch.zeros(1, 1, 8, 8)
    for missing, calls in (
        (CALLS[0], [lambda: made.model, made.apply_maskpro_wrappers, made.setup_data_loaders]),
        (CALLS[1], [made.setup_optimizers, made.validate, lambda: made.save("nowhere")]),
        (CALLS[2], [lambda: made.train_loader, made.validate, made.train]),
        (CALLS[3], [lambda: made.training_step(clean), made.state_dict]),
    ):
        for call in calls:
            with pytest.raises(UserError, match=rf"call {missing}\(\) first"):
                call()
        getattr(made, missing)()
    assert made.training_step(clean).keys() == KEYS
    with pytest.raises(UserError, match="the masks are on already"):
        made.apply_maskpro_wrappers()
    made.load_model_and_scheduler()
    assert made.steps == 0
    with pytest.raises(UserError, match="call apply_maskpro_wrappers"):
        made.masks  # noqa: B018


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "torch.uint8 is neither"),
        (torch.zeros(1, 8, 8), "neither a Batch nor float images"),
        ([1], "a batch of list"),
        (torch.zeros(1, 3, 8, 8), r"the model takes N of 1x8x8"),
        (torch.full((1, 1, 8, 8), 2.0), "not in -1..1"),
        (torch.full((1, 1, 8, 8), torch.nan), "not in -1..1"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(UserError, match=message):
        trainer().training_step(batch)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_is_not_finite_changes_nothing(estimator):
    made = trainer(estimator=estimator)
    batch = batches(made, 1)[0]
    before = deepcopy(made.learner.state_dict())
    bad = batch_of(batch.inputs["sample"] * torch.nan, batch.inputs["timestep"], batch.target)
    with pytest.raises(UserError, match="loss nan has no finite gradient at step 0: lower"):
        made.training_step(bad)
    assert all(torch.equal(x, before[name]) for name, x in made.learner.state_dict().items())
    assert math.isfinite(made.training_step(batch)["total_loss"])


def test_a_class_conditional_model_trains_on_labels_only(tmp_path):
    model = tiny_model(num_class_embeds=10)
    save(model, tmp_path / "conditional")
    made = trainer(model=str(tmp_path / "conditional"), dataset="digits")
    assert made.masks.by_layer.keys() == prunable_layers(model.denoiser, ["mid_block"]).keys()
    assert made.training_step(batches(made, 1)[0])["total_loss"] > 0
    with pytest.raises(UserError, match="wants labels"):
        made.training_step(torch.zeros(1, 1, 8, 8))


def test_a_masked_model_is_refused(tmp_path):
    model = tiny_model()
    weight = model.denoiser.mid_block.attentions[0].to_q.weight
    model.masks = Masks({"mid_block.attentions.0.to_q": torch.ones_like(weight).bool()})
    save(model, tmp_path / "masked")
    with pytest.raises(UserError, match="has masks already; give the model before masking"):
        trainer(model=str(tmp_path / "masked"))


def test_configurations_from_files_mappings_and_types_are_equal(tmp_path):
    options = config(estimator="reinforce", temperature=[1.0, 0.5], target_layers=["mid_block"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    made = [
        DiffusionMaskProTrainer(x).config
        for x in (path, str(path), options, MaskProConfig(**options))
    ]
    assert all(each == made[0] for each in made)
    assert made[0].temperature == (1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_lrr": 1e-3}, "unknown option 'mask_lrr'; did you mean 'mask_lr'"),
        ({"n": 4, "m": 4}, "m = 4: must be more than n = 4"),
        ({"estimator": "gumbel"}, "estimator = 'gumbel'"),
        ({"temperature": [1, 0]}, "temperature.1 = 0"),
    ],
)
def test_bad_configurations_are_one_line(options, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    for given in (options, path):
        with pytest.raises(UserError, match=message) as caught:
            DiffusionMaskProTrainer(given)
        assert "\n" not in str(caught.value)


def test_the_public_names():
    assert prunedm.DiffusionMaskProTrainer is DiffusionMaskProTrainer
    assert prunedm.MaskProConfig is MaskProConfig
