"""Denoising problems: the one currency of scores, learning, recovery and evaluation.

Problem p is a function of (seed, p) alone: its image, flip, timestep and noise. A training run
reads problems 0, 1, 2, ... in batches; a fixed evaluation reads 0..n-1 of another purpose.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, schedulers
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from prunedm.architecture import answer
from prunedm.data import ImageSet, to_model_range
from prunedm.errors import UserError
from prunedm.randomness import generator_for
from prunedm.task import Batch

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class DenoisingProblems(Dataset[dict[str, Any]]):
    """A seeded, endless stream of denoising problems over a set of images.

    `shuffle` draws a fresh order of the images each epoch; `flip` mirrors half of them. Timesteps
    are antithetic: problem 2k draws t, problem 2k+1 takes T-1-t, which halves their variance over
    a batch. With `cycle`, problem p is problem p mod cycle: a fixed set, read again and again.
    """

    def __init__(
        self,
        images: ImageSet,
        scheduler: Any,
        *,
        seed: int,
        purpose: str,
        shuffle: bool = False,
        flip: bool = False,
        conditional: bool = False,
        time_range: tuple[int, int] | None = None,
        cycle: int = 0,
    ) -> None:
        self.images, self.scheduler, self.seed, self.purpose = images, scheduler, seed, purpose
        self.cycle = cycle
        self.shuffle, self.flip, self.conditional = shuffle, flip, conditional
        steps: int = scheduler.config.num_train_timesteps
        self.first, self.last = time_range or (0, steps - 1)
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))  # (epoch, permutation)

    def __getitem__(self, p: int) -> dict[str, Any]:
        p = p % self.cycle if self.cycle else p
        generator = generator_for(self.seed, self.purpose, p)
        index = self._image_index(p)
        image = self.images[index]
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        noise = torch.randn(image.shape, generator=generator)
        item = {"image": image, "noise": noise, "timestep": self._timestep(p), "number": p}
        if self.conditional:
            item["label"] = self.images.label(index)
        return item

    def batch(self, indices: Sequence[int]) -> Batch:
        """The problems of these indices, on the CPU."""
        return self._collate([self[p] for p in indices])

    def stream(self, count: int, *, size: int = 64) -> "ProblemStream":
        """Problems 0..count-1 in batches, each drawn when it is asked for."""
        return ProblemStream(self, count, size)

    def sweep(self, count: int) -> Iterator[Batch]:
        """Problems 0..count-1 at t = first, then first + 1, ...: the same images and noise."""
        for t in range(self.first, self.last + 1):
            yield self._collate([self[p] | {"timestep": t} for p in range(count)])

    def batches(self, index_lists: Sequence[Any], *, workers: int = 0) -> Iterator[Batch]:
        """One batch a list of indices, in order; images are decoded by `workers` processes."""
        return iter(
            DataLoader(
                self, batch_sampler=index_lists, num_workers=workers, collate_fn=self._collate
            )
        )

    def _timestep(self, p: int) -> int:
        generator = generator_for(self.seed, self.purpose + "/t", p // 2)
        t = self.first + int(torch.randint(self.last - self.first + 1, (), generator=generator))
        return t if p % 2 == 0 else self.first + self.last - t

    def _image_index(self, p: int) -> int:
        epoch, position = divmod(p, len(self.images))
        if not self.shuffle:
            return position
        if self._order[0] != epoch:
            generator = generator_for(self.seed, self.purpose + "/order", epoch)
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return int(self._order[1][position])

    def _collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        clean = to_model_range(torch.stack([item["image"] for item in items]))
        noise = torch.stack([item["noise"] for item in items])
        timesteps = torch.tensor([item["timestep"] for item in items])
        noisy = add_noise(self.scheduler, clean, noise, timesteps)
        target = prediction_target(self.scheduler, clean, noise, timesteps)
        inputs = {"sample": noisy, "timestep": timesteps}
        if self.conditional:
            inputs["class_labels"] = torch.tensor([item["label"] for item in items])
        return Batch(inputs, target, tuple(item["number"] for item in items))


@dataclass(frozen=True)
class ProblemStream(Sequence[Batch]):
    """Batches of problems 0..total-1, as often as wanted; none is kept."""

    problems: DenoisingProblems
    total: int
    size: int

    def __len__(self) -> int:
        return math.ceil(self.total / self.size)

    def __getitem__(self, k: Any) -> Any:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.problems.batch(range(k * self.size, min((k + 1) * self.size, self.total)))


def time_range(text: str, steps: int) -> tuple[int, int]:
    """First and last timestep of all, early, middle, late (thirds, early = noisiest), or "a-b".

    Raises `UserError` for a range outside 0..steps-1.
    """
    thirds = [round(steps * k / 3) for k in range(4)]
    named = {
        "all": (0, steps - 1),
        "late": (0, thirds[1] - 1),
        "middle": (thirds[1], thirds[2] - 1),
        "early": (thirds[2], steps - 1),
    }
    if text in named:
        return named[text]
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise UserError(
            f"time range {text!r} is none of {', '.join(named)}, and no a-b; try 100-500"
        )
    if not int(first) <= int(last) < steps:
        raise UserError(
            f"time range {text}: the scheduler's timesteps are 0-{steps - 1}, lower end first"
        )
    return int(first), int(last)


def sample_shape(denoiser: Any) -> tuple[int, int, int]:
    """(C, H, W) of one image that the denoiser was trained on."""
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser.config.in_channels, height, width


def example(
    denoiser: Any, count: int = 1, *, last: int = 999, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs for `count` images: seeded noise, timesteps from 0 to `last`, classes in turn."""
    shape = (count, *sample_shape(denoiser))
    inputs = {
        "sample": torch.randn(shape, generator=generator_for(seed, "export", 0)),
        "timestep": torch.linspace(0, last, count),
    }
    if getattr(denoiser, "class_embedding", None) is not None:
        inputs["class_labels"] = torch.arange(count) % (denoiser.config.num_class_embeds or 1)
    return inputs


def check_sample_shape(denoiser: Any, problems: Batch) -> None:
    """Raise `UserError` where problems have another shape than the denoiser was trained on."""
    wanted = sample_shape(denoiser)
    given = tuple(problems.inputs["sample"].shape[1:])
    if given != wanted:
        shapes = ["x".join(map(str, shape)) for shape in (given, wanted)]
        raise UserError(
            f"calibration images are {shapes[0]}, the model takes {shapes[1]}; resize them"
        )


def scheduler_class(name: str) -> Any:
    """The diffusers noise scheduler of this class name, or None where there is none."""
    cls = getattr(schedulers, name, None)
    bases = (schedulers.SchedulerMixin, ConfigMixin)
    known = isinstance(cls, type) and all(issubclass(cls, base) for base in bases)
    return cls if known else None


def check_scheduler(scheduler: Any) -> None:
    """Raise `UserError` for noise that is not variance preserving, or an unknown prediction."""
    name, steps = type(scheduler).__name__, scheduler.config.get("num_train_timesteps")
    abar_T = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(abar_T, torch.Tensor):
        raise UserError(
            f"{name} has no alphas_cumprod; supported: variance-preserving noise (DDPM)"
        )
    kind = scheduler.config.get("prediction_type")
    if kind not in PREDICTIONS:
        raise UserError(f"prediction_type {kind!r} is none of {', '.join(PREDICTIONS)}")
    if abar_T.shape != (steps,):
        raise UserError(f"{len(abar_T)} betas for num_train_timesteps = {steps}; give one for each")
    betas_T = getattr(scheduler, "betas", None)
    betas_T = betas_T if isinstance(betas_T, torch.Tensor) else torch.zeros(1)
    whole = abar_T.isfinite().all() and betas_T.isfinite().all()
    falls = (abar_T.diff() <= 0).all() and 0 <= abar_T[-1] < 1 and 0 < abar_T[0] <= 1
    if not (whole and falls and (betas_T >= 0).all() and (betas_T <= 1).all()):
        raise UserError(
            f"betas go from {float(betas_T.min()):.4g} to {float(betas_T.max()):.4g} and leave "
            f"{float(abar_T[-1]):.4g} of the signal's variance: that is not a noise schedule "
            "(betas in 0..1, not all 0)"
        )


def add_noise(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

    Written out because some samplers' `add_noise` (Euler's) lives on another scale.
    """
    signal, spread = _rates(scheduler, timesteps)
    return signal * clean + spread * noise


def prediction_target(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the denoiser is trained to output: noise, clean sample, or velocity (Salimans & Ho 2022)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    assert kind == "v_prediction", kind
    signal, spread = _rates(scheduler, timesteps)
    return signal * noise - spread * clean


def _rates(scheduler: Any, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), each (N, 1, 1, 1)."""
    abar = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def predict(denoiser: torch.nn.Module, problems: Batch) -> torch.Tensor:
    """The denoiser's prediction for a batch of problems, NCHW, without a learned variance."""
    return without_variance(answer(denoiser, problems.inputs), problems.target)


def without_variance(output_NCHW: torch.Tensor, like_NCHW: torch.Tensor) -> torch.Tensor:
    """The prediction in an output: of twice the image's channels the first half.

    The rest interpolates the logarithm of the sampler's variance (Nichol & Dhariwal 2021).
    `like_NCHW`: the image or the target.
    """
    channels = like_NCHW.shape[1]
    return output_NCHW[:, :channels] if output_NCHW.shape[1] == 2 * channels else output_NCHW


def problem_losses(output_NCHW: torch.Tensor, target_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each problem, in float32: (N,). A target has no variance, or both do."""
    prediction_NCHW = without_variance(output_NCHW, target_NCHW).float()
    return F.mse_loss(prediction_NCHW, target_NCHW.float(), reduction="none").mean(dim=(1, 2, 3))
