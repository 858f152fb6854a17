"""How noise is added to clean data, and what a network should answer: one class per kind of process.

A noise level goes from 0 (clean) to 1 (pure noise); the process defines the timestep and the noisy
sample of each level. Letters: N problems, T timesteps.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, schedulers

from prunedm.errors import UserError

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Process(ABC):
    """A noise schedule of diffusers as training sees it: T levels and their targets."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        steps: int = self.scheduler.config.num_train_timesteps
        return steps

    def level(self, step_N: torch.Tensor) -> torch.Tensor:
        """The level of each of the steps 0..T-1, float64: 0 to 1."""
        return step_N.double() / max(self.steps - 1, 1)

    def step(self, level_N: torch.Tensor) -> torch.Tensor:
        """The nearest of the steps 0..T-1 to each level."""
        return (level_N * (self.steps - 1)).round().long()

    @abstractmethod
    def check(self) -> None:
        """Raise `UserError` where the scheduler's numbers are not a noise schedule."""

    @abstractmethod
    def timesteps(self, level_N: torch.Tensor) -> torch.Tensor:
        """The timesteps that the network is given, (N,)."""

    @abstractmethod
    def rates(self, level_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the clean data and of the noise: each (N,)."""

    @abstractmethod
    def target(
        self, clean: torch.Tensor, noise: torch.Tensor, level_N: torch.Tensor
    ) -> torch.Tensor:
        """What the network is trained to predict, in the shape of `clean`, (N, ...)."""

    @abstractmethod
    def schedule_in_words(self) -> str:
        """The noise schedule, as a table names it."""

    @property
    def prediction(self) -> str:
        """What the network predicts, by diffusers' name."""
        kind: str = self.scheduler.config.prediction_type
        return kind

    def corrupt(
        self, clean: torch.Tensor, noise: torch.Tensor, level_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy data (N, ...), timesteps (N,), and the target (N, ...)."""
        signal, spread = (append_dims(rate_N, clean) for rate_N in self.rates(level_N))
        noisy = signal * clean + spread * noise
        return noisy, self.timesteps(level_N), self.target(clean, noise, level_N)

    def differs_from(self, other: "Process") -> str:
        """What makes the other process a different training target; "" for none."""
        if type(self) is not type(other):
            return "kind of noise"
        if self.prediction != other.prediction:
            return f"prediction type ({self.prediction} and {other.prediction})"
        if self.steps != other.steps:
            return f"number of timesteps ({self.steps} and {other.steps})"
        level_N = self.level(torch.arange(self.steps))
        for own_N, theirs_N in zip(self.rates(level_N), other.rates(level_N), strict=True):
            if not torch.allclose(own_N.float(), theirs_N.float(), atol=1e-6):
                return "noise schedule"
        return ""

    def time_range(self, text: str) -> tuple[int, int]:
        """First and last step of all, early, middle, late (thirds, early = noisiest), or "a-b".

        Raises `UserError` for a range outside 0..T-1.
        """
        thirds = [round(self.steps * k / 3) for k in range(4)]
        named = {
            "all": (0, self.steps - 1),
            "late": (0, thirds[1] - 1),
            "middle": (thirds[1], thirds[2] - 1),
            "early": (thirds[2], self.steps - 1),
        }
        if text in named:
            return named[text]
        first, dash, last = text.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            raise UserError(
                f"time range {text!r} is not one of {', '.join(named)}, and not a-b; try 100-500"
            )
        if not int(first) <= int(last) < self.steps:
            raise UserError(
                f"time range {text}: the scheduler's timesteps are 0-{self.steps - 1}, lower end first"
            )
        return int(first), int(last)


class VariancePreserving(Process):
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4), abar_T = 0 included.

    Written out because some samplers' `add_noise` (Euler's) lives on another scale.
    """

    def check(self) -> None:
        """Raise `UserError` for an unknown prediction type or betas that are not a noise schedule."""
        if self.scheduler.config.get("prediction_type") not in PREDICTIONS:
            kind = self.scheduler.config.get("prediction_type")
            raise UserError(f"prediction_type {kind!r} is none of {', '.join(PREDICTIONS)}")
        abar_T = self.scheduler.alphas_cumprod
        if abar_T.shape != (self.steps,):
            raise UserError(
                f"{len(abar_T)} betas for num_train_timesteps = {self.steps}; give one for each"
            )
        betas_T = getattr(self.scheduler, "betas", None)
        betas_T = betas_T if isinstance(betas_T, torch.Tensor) else torch.zeros(1)
        whole = abar_T.isfinite().all() and betas_T.isfinite().all()
        falls = (abar_T.diff() <= 0).all() and 0 <= abar_T[-1] < 1 and 0 < abar_T[0] <= 1
        if not (whole and falls and (betas_T >= 0).all() and (betas_T <= 1).all()):
            raise UserError(
                f"betas go from {float(betas_T.min()):.4g} to {float(betas_T.max()):.4g} and leave "
                f"{float(abar_T[-1]):.4g} of the signal's variance: that is not a noise schedule "
                "(betas in 0..1, not all 0)"
            )

    def timesteps(self, level_N: torch.Tensor) -> torch.Tensor:
        """Integers 0..T-1."""
        return self.step(level_N)

    def rates(self, level_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        abar_N = self.scheduler.alphas_cumprod[self.step(level_N)]
        return abar_N.sqrt(), (1 - abar_N).sqrt()

    def target(
        self, clean: torch.Tensor, noise: torch.Tensor, level_N: torch.Tensor
    ) -> torch.Tensor:
        """Noise, clean data, or the velocity of Salimans & Ho 2022."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        assert self.prediction == "v_prediction", self.prediction
        signal, spread = (append_dims(rate_N, clean) for rate_N in self.rates(level_N))
        return signal * noise - spread * clean

    def schedule_in_words(self) -> str:
        """ "linear 0.0001 to 0.02, 1000 steps"."""
        config = self.scheduler.config
        steps = f"{self.steps} steps"
        given = config.get("trained_betas")
        if given is not None:
            digest = sha256(np.asarray(given, np.float64).tobytes()).hexdigest()[:8]
            return f"betas of its own ({digest}), {steps}"
        kind = config.get("beta_schedule", "")
        ends = [f"{config[key]:g}" for key in ("beta_start", "beta_end") if key in config]
        words = [f"{kind} {' to '.join(ends)}" if "linear" in kind else kind, steps]
        return ", ".join(words + ["zero at the end"] * bool(config.get("rescale_betas_zero_snr")))


class FlowMatching(Process):
    """x_s = (1 - s) x + s eps, answered by the velocity eps - x (Lipman et al. 2023; Esser et al. 2024).

    s are diffusers' sigmas, which a shift moves towards noise; timesteps are T s, and not integers.
    """

    @property
    def shift(self) -> float:
        """1 where the sampler derives it from the image size."""
        config = self.scheduler.config
        moved = config.get("flow_shift", 1.0) if config.get("use_flow_sigmas") else config.shift
        return 1.0 if config.get("use_dynamic_shifting") else float(moved)

    @cached_property
    def _sigma_T(self) -> torch.Tensor:
        """Cleanest first; made anew since set_timesteps overwrites a sampler's own."""
        made = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.steps, shift=self.shift)
        return made.sigmas[: self.steps].flip(0)

    def check(self) -> None:
        """Raise `UserError` where the shift is not a positive number."""
        if not 0 < self.shift < 1e4:
            raise UserError(
                f"shift = {self.shift:g} of the sigmas; it is above 0, and mostly 1 to 20"
            )

    @property
    def prediction(self) -> str:
        """The velocity eps - x, by diffusers' name."""
        return "flow_prediction"

    def timesteps(self, level_N: torch.Tensor) -> torch.Tensor:
        """T s, float32."""
        return self._sigma_T[self.step(level_N)] * self.steps

    def rates(self, level_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 - s and s."""
        sigma_N = self._sigma_T[self.step(level_N)]
        return 1 - sigma_N, sigma_N

    def target(
        self, clean: torch.Tensor, noise: torch.Tensor, level_N: torch.Tensor
    ) -> torch.Tensor:
        """eps - x at every level."""
        return noise - clean

    def schedule_in_words(self) -> str:
        """ "flow matching, shift 3, 1000 steps"."""
        dynamic = self.scheduler.config.get("use_dynamic_shifting")
        moved = "shift by image size" if dynamic else f"shift {self.shift:g}"
        return f"flow matching, {moved}, {self.steps} steps"


def process_of(scheduler: Any) -> Process:
    """The process of a diffusers scheduler. Raises `UserError` for other kinds of noise."""
    config = scheduler.config
    if config.get("use_flow_sigmas") or "FlowMatch" in type(scheduler).__name__:
        return FlowMatching(scheduler)
    if isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor):
        return VariancePreserving(scheduler)
    raise UserError(
        f"{type(scheduler).__name__} has no alphas_cumprod, and is not one of flow matching; "
        "supported: variance-preserving noise (DDPM) and flow matching (FlowMatchEulerDiscrete)"
    )


def scheduler_class(name: str) -> Any:
    """The diffusers noise scheduler of this class name, or None where there is none."""
    cls = getattr(schedulers, name, None)
    bases = (schedulers.SchedulerMixin, ConfigMixin)
    known = isinstance(cls, type) and all(issubclass(cls, base) for base in bases)
    return cls if known else None


def append_dims(rate_N: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) as (N, 1, ...), with as many dimensions as `like`."""
    return rate_N.reshape(-1, *[1] * (like.ndim - 1))
