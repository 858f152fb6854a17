"""Processes against diffusers' own schedulers, and against closed forms."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from prunedm.errors import UserError
from prunedm.task.process import FlowMatching, VariancePreserving, process_of


def drawn(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 3, 4, 5, generator=generator).unbind()


STEPS = torch.tensor([0, 1, 17, 250, 499, 500, 998, 999])
SCHEDULES = [
    {},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("config", SCHEDULES)
def test_variance_preserving_noise_and_targets_are_diffusers_own(kind, config):
    scheduler = DDPMScheduler(prediction_type=kind, **config)
    process, (clean, noise) = process_of(scheduler), drawn()
    assert isinstance(process, VariancePreserving)
    noisy, timestep_N, target = process.corrupt(clean, noise, process.level(STEPS))
    assert torch.equal(timestep_N, STEPS)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, STEPS))
    velocity = scheduler.get_velocity(clean, noise, STEPS)
    due = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
    torch.testing.assert_close(target, due)
    if config.get("rescale_betas_zero_snr"):
        assert float(process.rates(torch.ones(1))[0]) == 0  # no signal at the noisiest level


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("steps", [1000, 20])
def test_flow_matching_is_diffusers_own(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    process, (clean, noise) = process_of(scheduler), drawn()
    assert isinstance(process, FlowMatching)
    step_N = STEPS * (steps - 1) // 999
    noisy, timestep_N, target = process.corrupt(clean, noise, process.level(step_N))
    # training scripts draw an index into the scheduler's own lists, noisiest first
    torch.testing.assert_close(timestep_N, scheduler.timesteps[steps - 1 - step_N])
    torch.testing.assert_close(noisy, scheduler.scale_noise(clean, timestep_N, noise))
    torch.testing.assert_close(target, noise - clean)
    sigma_N = (step_N + 1) / steps
    torch.testing.assert_close(timestep_N / steps, shift * sigma_N / (1 + (shift - 1) * sigma_N))


def test_a_sampler_under_way_does_not_change_what_is_trained():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = process_of(scheduler)
    before = process.timesteps(torch.tensor([0.5]).double())
    scheduler.set_timesteps(4)
    assert torch.equal(process_of(scheduler).timesteps(torch.tensor([0.5]).double()), before)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
        UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    ],
)
def test_solvers_for_flows_are_flows_though_they_have_betas(scheduler):
    process = process_of(scheduler)
    assert isinstance(process, FlowMatching)
    assert process.differs_from(process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))) == ""


def test_one_step_from_pure_noise_along_the_true_velocity_is_the_clean_data():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process, (clean, noise) = process_of(scheduler), drawn()
    noisy, _, velocity = process.corrupt(clean, noise, torch.ones(8).double())
    torch.testing.assert_close(noisy, noise)
    torch.testing.assert_close(noisy - velocity, clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(num_train_timesteps=37), DDPMScheduler()])
def test_levels_and_steps_are_each_others_inverse(scheduler):
    process = process_of(scheduler)
    step_N = torch.arange(process.steps)
    level_N = process.level(step_N)
    assert (float(level_N[0]), float(level_N[-1])) == (0, 1)
    assert torch.equal(process.step(level_N), step_N)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (DDPMScheduler(), ""),
        (DDPMScheduler(clip_sample=False), ""),
        (DDPMScheduler(prediction_type="sample"), "prediction type (epsilon and sample)"),
        (DDPMScheduler(num_train_timesteps=500), "number of timesteps (1000 and 500)"),
        (DDPMScheduler(beta_end=0.03), "noise schedule"),
        (FlowMatchEulerDiscreteScheduler(), "kind of noise"),
    ],
)
def test_what_would_teach_something_else_is_named(other, why):
    assert process_of(DDPMScheduler()).differs_from(process_of(other)) == why


def test_noise_of_another_kind_and_a_broken_shift_are_refused():
    with pytest.raises(UserError, match="EDMEulerScheduler has no alphas_cumprod"):
        process_of(EDMEulerScheduler())
    with pytest.raises(UserError, match="shift = -1"):
        process_of(FlowMatchEulerDiscreteScheduler(shift=-1.0)).check()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDPMScheduler(), "linear 0.0001 to 0.02, 1000 steps"),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2, 1000 steps"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "flow matching, shift 3, 1000 steps"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "flow matching, shift by image size, 1000 steps",
        ),
    ],
)
def test_schedules_in_words(scheduler, words):
    assert process_of(scheduler).schedule_in_words() == words
