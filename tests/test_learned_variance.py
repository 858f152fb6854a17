"""A denoiser whose second half of channels is a variance: everything as for its first half alone."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from helpers import TINY, noise_images, problems, tiny_model
from PIL import Image

from prunedm.data.images import to_uint8
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import (
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    PruneOptions,
    SampleOptions,
)
from prunedm.randomness import generator_for
from prunedm.recovery.objective import Mixture, recovery_objective
from prunedm.removal.obs import obs_prune
from prunedm.sampling import make_sampler, sample_batches
from prunedm.scores import SCORES, Calibration, score_layers
from prunedm.stages import evaluate, export, finetune, learn, loss, prune, sample

CHANNELS = (1, 2, 3, 4)
QUICK = {"calibration_problems": 4, "calibration_batch": 4, "time_bins": 1, "device": "cpu"}


def both(channels: int = 1, **scheduler) -> tuple[Model, Model]:
    """A model with a learned variance, and the same one cut to its first half."""
    whole = tiny_model(in_channels=channels, out_channels=2 * channels)
    learned = {"variance_type": "learned_range"} | scheduler
    whole.scheduler = DDPMScheduler(**learned)
    sizes = TINY | {"in_channels": channels, "out_channels": channels}
    half = Model(UNet2DModel(**sizes).eval(), DDPMScheduler())
    state = deepcopy(whole.denoiser.state_dict())
    for part in ("weight", "bias"):
        state[f"conv_out.{part}"] = state[f"conv_out.{part}"][:channels]
    half.denoiser.load_state_dict(state)
    return whole, half


def stream(channels: int):
    return problems(noise_images(channels=channels) if channels in (1, 3) else _banded(channels))


def _banded(channels: int):
    from prunedm.data.images import ImageSet

    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, channels), dtype=np.uint8)
    mode = {2: "LA", 4: "RGBA"}[channels]
    return ImageSet([Image.fromarray(p, mode) for p in pixels], name="n", size=8, channels=channels)


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_loss_is_that_of_the_first_half(channels):
    whole, half = both(channels)
    batches = [stream(channels).batch(range(6))]
    found = [denoising_loss(model.denoiser, batches).per_problem_N for model in (whole, half)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_the_first_half(score):
    whole, half = both()
    early = problems(noise_images(), time_range=(0, 3))
    calibration = Calibration(early, count=4, batch_size=4, time_bins=1, sweep_images=2)
    found = [
        score_layers(m.denoiser, prunable_layers(m.denoiser), score, calibration=calibration)
        for m in (whole, half)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_obs_finds_the_masks_and_weights_of_the_first_half(guidance):
    models, batches = both(), [stream(1).batch(range(8))]
    masks = [
        obs_prune(
            model.denoiser,
            dict.fromkeys(
                ["mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv2"], Pattern(2, 4)
            ),
            batches=batches,
            guidance=guidance,
        )
        for model in models
    ]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    for name in masks[0]:
        weights = [model.denoiser.get_parameter(f"{name}.weight") for model in models]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def drawn(model: Model, sampler: str) -> torch.Tensor:
    made = make_sampler(model.scheduler, sampler)
    batches = sample_batches(
        model.denoiser,
        made,
        count=3,
        steps=4,
        codec=model.codec,
        condition=model.condition,
        batch_size=3,
    )
    return next(batches)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_samplers_without_a_use_for_the_variance_take_the_first_half(sampler, channels):
    whole, half = both(channels)
    gap = drawn(whole, sampler).int() - drawn(half, sampler).int()
    assert int(gap.abs().max()) <= 1


def test_ddpm_draws_with_the_learned_variance_as_diffusers_does():
    whole, half = both()
    scheduler = DDPMScheduler.from_config(whole.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    generators = [generator_for(0, "sample", i) for i in range(3)]
    x = torch.stack([torch.randn(whole.sample_shape, generator=g) for g in generators])
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = whole.denoiser(x, t).sample
            assert output.shape[1] == 2
            x = scheduler.step(output, t, x, generator=generators).prev_sample
    assert torch.equal(drawn(whole, "ddpm"), to_uint8(x))
    assert not torch.equal(drawn(whole, "ddpm"), drawn(half, "ddpm"))


def test_ddpm_of_a_fixed_variance_takes_the_first_half():
    whole, half = both(variance_type="fixed_small")
    assert int((drawn(whole, "ddpm").int() - drawn(half, "ddpm").int()).abs().max()) <= 1


def test_a_variance_that_the_denoiser_does_not_make_is_named():
    _, half = both()
    half.scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(UserError, match="the denoiser does not predict; give --sampler ddim"):
        drawn(half, "ddpm")
    drawn(half, "ddim")


@pytest.mark.parametrize("mixture", [Mixture(output=0.5), Mixture(output=0.5, sensitivity=0.1)])
def test_distillation_copies_the_teachers_variance_too(mixture):
    student, teacher = both()[0].denoiser, both()[0].denoiser
    batch = stream(1).batch(range(4))
    with torch.no_grad():
        teacher.conv_out.bias[1] += 1  # of the variance
    with recovery_objective(student, teacher, mixture) as objective:
        loss = objective(student, batch, 0)
        loss.backward()
    assert float(student.conv_out.bias.grad[1].abs()) > 0
    data = denoising_loss(student, [batch]).mean
    assert float(loss.detach()) == pytest.approx(
        0.5 * data + 0.5 * 0.5, rel=1e-4
    )  # 1 in half of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("variance")
    whole, _ = both()
    save(whole, place / "m")
    return place / "m"


FAST = {"batch_size": 4, "validation_problems": 8, "device": "cpu", "warmup": 1, "steps": 2}


def test_it_is_pruned_tuned_and_drawn_from(folder, tmp_path):
    narrow = PruneOptions(**QUICK, target="params=0.2", round_to=2, pictures=0, score="wanda")
    prune(folder, tmp_path / "narrow", narrow)
    finetune(tmp_path / "narrow", tmp_path / "tuned", FinetuneOptions(**FAST))
    for sampler in ("ddpm", "ddim"):
        drawing = SampleOptions(count=2, sampler=sampler, sampling_steps=2, device="cpu")
        sample(tmp_path / "tuned", tmp_path / sampler, drawing)


@pytest.mark.slow
def test_the_other_verbs_take_it(folder, tmp_path):
    record, _ = loss(folder, tmp_path / "loss", LossOptions(problems=8, device="cpu"))
    assert 0 < record.figures["loss"] < 10
    pruned = PruneOptions(**QUICK, mechanism="obs-nm", pictures=2)
    prune(folder, tmp_path / "sparse", pruned)
    learn(folder, tmp_path / "learned", LearnOptions(**FAST, score="magnitude"))
    export(tmp_path / "sparse", tmp_path / "packed", ExportOptions(format="packed"))
    assert load(tmp_path / "packed").denoiser.config.out_channels == 2
    quick = EvaluateOptions(depth="quick", problems=4, device="cpu", latency_repeats=1)
    found, _ = evaluate(tmp_path / "sparse", tmp_path / "evaluated", quick)
    assert found.figures["loss"] > 0


def test_a_teacher_of_other_output_is_refused(folder, tmp_path):
    save(both()[1], tmp_path / "half")
    options = FinetuneOptions(**FAST, teacher=str(tmp_path / "half"))
    with pytest.raises(UserError, match=r"have other output channels \(1, 2\)"):
        finetune(folder, tmp_path / "out", options)
