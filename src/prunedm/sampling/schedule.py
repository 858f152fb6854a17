"""Samplers by name, their timesteps, and DDIM steps for any timesteps."""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from prunedm.architecture import Shape
from prunedm.errors import UserError
from prunedm.task import without_variance
from prunedm.task.process import FlowMatching, process_of, scheduler_class

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
FLOW_SAMPLERS = {
    "ddim": "FlowMatchEulerDiscreteScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
SPACINGS = ("trailing", "uniform", "quad")


def make_sampler(trained: Any, name: str, spacing: str = "trailing") -> Any:
    """A diffusers scheduler that samples with the trained one's noise schedule.

    "trailing" timesteps are evenly spaced and end at T-1, so that the first step starts from pure noise
    (Lin et al. 2023); for the others see `spaced`. Raises `UserError` for an unknown name, a scheduler
    that cannot sample from such a model, and a spacing that it does not support.
    """
    if isinstance(process_of(trained), FlowMatching):
        return _flow_sampler(trained, name, spacing)
    cls = scheduler_class(SAMPLERS.get(name, name))
    if cls is None:
        raise UserError(
            f"unknown sampler {name!r}; try {', '.join(SAMPLERS)} or a diffusers scheduler's class name"
        )
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r}; try {', '.join(SPACINGS)}")
    if cls is DDIMScheduler:
        cls = Ddim
    elif spacing != "trailing":
        if "timesteps" not in inspect.signature(cls.set_timesteps).parameters:
            raise UserError(
                f"sampler {name!r} does not support {spacing} spacing; try trailing, or one of "
                f"{', '.join(SAMPLERS)}"
            )
        cls = _at_given_timesteps(cls)
    # without this, diffusers replaces the trained one's defaults by the other class's, betas too
    config = {k: v for k, v in trained.config.items() if k != "_use_default_values"}
    if not _takes_variance(cls):  # some would use only the first three channels
        config.pop("variance_type", None)
    try:
        sampler = cls.from_config(config, timestep_spacing=spacing)
    except (AttributeError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise _unfit(name, str(error)) from error
    _check_fits(sampler, trained, name)
    return sampler


def _flow_sampler(trained: Any, name: str, spacing: str) -> Any:
    """For a flow DDIM is Euler's method: both follow the same ordinary differential equation."""
    cls = scheduler_class(FLOW_SAMPLERS.get(name, name))
    if cls is None or not ("FlowMatch" in cls.__name__ or _takes_flows(cls)):
        raise UserError(
            f"sampler {name!r} cannot sample from this model, which learned a flow; try "
            f"{', '.join(FLOW_SAMPLERS)}"
        )
    if spacing != "trailing":
        raise UserError(
            f"spacing {spacing!r}: the steps of a flow follow from its shift; leave it out"
        )
    config = {k: v for k, v in trained.config.items() if k != "_use_default_values"}
    if _takes_flows(cls):
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        config["flow_shift"] = FlowMatching(trained).shift
    elif config.get("use_flow_sigmas"):
        config["shift"] = config["flow_shift"]
    sampler = cls.from_config(config)
    _check_steps(sampler, name)
    return sampler


def _takes_flows(cls: Any) -> bool:
    return "use_flow_sigmas" in inspect.signature(cls.__init__).parameters


def _check_fits(sampler: Any, trained: Any, name: str) -> None:
    """Raise `UserError` unless it goes from noise to image on the trained schedule, by seed alone."""
    own, due = getattr(sampler, "alphas_cumprod", torch.empty(0)), trained.alphas_cumprod
    # some end a little above zero
    if own.shape != due.shape or not torch.allclose(own.float(), due.float(), atol=1e-6):
        raise _unfit(name, "it has a noise schedule of its own")
    if "Inverse" in type(sampler).__name__:
        raise _unfit(name, "it goes from image to noise")
    if "noise_sampler_seed" in sampler.config:
        raise _unfit(name, "its noise would depend on an image's neighbours")
    if not hasattr(sampler, "scale_model_input"):
        raise _unfit(name, "it has no plain steps")
    _check_steps(sampler, name)


def _check_steps(sampler: Any, name: str) -> None:
    """Raise `UserError` unless a step takes the output, the time and the sample alone."""
    if not hasattr(sampler, "step"):
        raise _unfit(name, "it has no plain steps")
    parameters = inspect.signature(sampler.step).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if wanted != ["model_output", "timestep", "sample"]:
        raise _unfit(name, f"its steps take {', '.join(wanted)}")


def _unfit(name: str, why: str) -> UserError:
    return UserError(
        f"sampler {name!r} cannot sample from this model: {why}; try {', '.join(SAMPLERS)}"
    )


def _takes_variance(cls: Any) -> bool:
    """Whether its steps use a learned variance."""
    return issubclass(cls, DDPMScheduler | DDPMParallelScheduler)


def for_sampler(sampler: Any, output_NCHW: torch.Tensor, x_NCHW: torch.Tensor) -> torch.Tensor:
    """The output as the sampler's steps take it: with a learned variance, or without.

    Raises `UserError` where the sampler needs one that the denoiser does not predict.
    """
    learned = sampler.config.get("variance_type") in ("learned", "learned_range")
    if not (learned and _takes_variance(type(sampler))):
        return without_variance(output_NCHW, x_NCHW)
    if output_NCHW.shape[1] == x_NCHW.shape[1]:
        raise UserError(
            "the scheduler has a learned variance, which the denoiser does not predict; give "
            "--sampler ddim, or set variance_type to fixed_large in scheduler_config.json"
        )
    return output_NCHW


def set_steps(sampler: Any, steps: int, shape: Shape | None = None) -> None:
    """Set the sampler's timesteps and reset its state. Raises `UserError` where it refuses them.

    shape: (C, H, W) of a sample, which determines the shift of some flows.
    """
    most = sampler.config.num_train_timesteps
    if steps > most:
        raise UserError(f"{steps} sampling steps: the model has {most}; give at most that many")
    given: dict[str, Any] = {}
    if sampler.config.get("use_dynamic_shifting"):  # as in Flux's pipelines
        given = {"sigmas": np.linspace(1, 1 / steps, steps).tolist(), "mu": _shift(sampler, shape)}
    try:
        sampler.set_timesteps(steps, **given)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"{steps} steps of {type(sampler).__name__}: {error}") from error


def _shift(sampler: Any, shape: Shape | None) -> float:
    """Linear in the number of 2 x 2 patches (Esser et al. 2024, section 5.3.2; diffusers' numbers)."""
    c = sampler.config
    tokens = shape[1] * shape[2] / 4 if shape else c.max_image_seq_len
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    return float(c.base_shift + slope * (tokens - c.base_image_seq_len))


def spaced(spacing: str, steps: int, trained: int) -> np.ndarray:
    """Timesteps from trained-1 down to 0: "uniform", or "quad" (Song et al. 2021, appendix D.2).

    Quadratic ones are dense near 0; where several would coincide, they move up to the next free
    timesteps, since a step from t to t does nothing.
    """
    power = {"uniform": 1, "quad": 2}[spacing]
    if steps == 1:
        return np.array([trained - 1])
    k = np.arange(steps)
    even = np.round(k**power * (trained - 1) / (steps - 1) ** power).astype(np.int64)
    return np.maximum(even, k)[::-1].copy()


def _at_given_timesteps(cls: Any) -> Any:
    class Spaced(cls):  # type: ignore[misc]
        def set_timesteps(self, steps: int, device: Any = None) -> None:
            c = self.config
            given = spaced(c.timestep_spacing, steps, c.num_train_timesteps)
            super().set_timesteps(timesteps=given.tolist(), device=device)

    Spaced.__name__ = cls.__name__
    return Spaced


class Ddim(DDIMScheduler):  # type: ignore[misc]
    """DDIM without noise (Song et al. 2021, eq. 12, eta = 0), from each timestep to the next one.

    diffusers' own steps go from t to t - T // steps, whatever the next timestep is; the two agree only
    for evenly spaced timesteps where `steps` divides T.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """As diffusers, with uniform and quadratic spacings too."""
        c = self.config
        if c.timestep_spacing in ("uniform", "quad"):
            self.num_inference_steps = num_inference_steps
            given = spaced(c.timestep_spacing, num_inference_steps, c.num_train_timesteps)
            self.timesteps = torch.from_numpy(given).to(device)
        else:
            super().set_timesteps(num_inference_steps, device)

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> DDIMSchedulerOutput:
        """x_NCHW at the next timestep; the last step goes to `final_alpha_cumprod`."""
        place = int((self.timesteps == timestep).nonzero()[0])
        left = self.timesteps[place + 1 :]
        alpha = self.alphas_cumprod[timestep]
        alpha_next = self.alphas_cumprod[left[0]] if len(left) else self.final_alpha_cumprod
        clean, noise = self._predicted(model_output, sample, alpha)
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        x = alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * noise
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=clean)

    def _predicted(
        self, output: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean image and the noise that the output predicts."""
        signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (x - sigma * output) / signal, output
        if kind == "sample":
            return output, (x - signal * output) / sigma
        assert kind == "v_prediction", kind
        return signal * x - sigma * output, signal * output + sigma * x
