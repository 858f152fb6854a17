"""Small models, problems and images that several tests share."""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from filelock import FileLock
from matplotlib.figure import Figure

from prunedm.data.images import ImageSet
from prunedm.folder import Model, save
from prunedm.task import Batch
from prunedm.task.codec import Pixels
from prunedm.task.condition import Classes, Unconditional
from prunedm.task.denoising import Denoising
from prunedm.task.process import process_of

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SAVEFIG = Figure.savefig


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Figures as users see them, which `conftest.py` leaves blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", SAVEFIG)
        yield


class Killed(BaseException):
    """What a test interrupts work with, as Ctrl-C would; pytest would stop at a KeyboardInterrupt."""


class Ended:
    """A child process that has ended."""

    pid = 0

    def __init__(self, returncode: int = 0) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def wait(self, *_) -> int:
        return self.returncode


class Conv1D(torch.nn.Module):
    """GPT-2's layer as transformers has it, which need not be installed: found by its name."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = torch.nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = torch.nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return y.reshape(*x.shape[:-1], self.nf)


def tiny_model(**unet: Any) -> Model:
    """A seeded random model with one attention block, in its middle: 8x8 grey unless told."""
    torch.manual_seed(0)
    return Model(UNet2DModel(**(TINY | unet)).eval(), DDPMScheduler(), name="tiny")


def noise_images(
    count: int = 12, *, size: int = 8, channels: int = 1, labels: Sequence[int] | None = None
) -> ImageSet:
    """Seeded images of uniform noise."""
    shape = (count, size, size, channels)[: 3 if channels == 1 else 4]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ImageSet(list(pixels), name="noise", size=size, channels=channels, labels=labels)


def problems(
    images: ImageSet | None = None,
    *,
    scheduler: Any = None,
    conditional: bool = False,
    **options: Any,
) -> Denoising:
    """Denoising problems over `images`, by the default DDPM scheduler."""
    images = images or noise_images()
    return Denoising(
        images,
        process_of(scheduler or DDPMScheduler()),
        codec=Pixels((images.channels, images.size, images.size)),
        condition=Classes(None) if conditional else Unconditional(),
        **{"seed": 0, "purpose": "test"} | options,
    )


def batch_of(sample: torch.Tensor, timestep: torch.Tensor, target: torch.Tensor, **more) -> Batch:
    """A batch of these problems, of an unconditional model unless `class_labels` are among `more`."""
    numbers = more.pop("numbers", ())
    level_N = timestep.double() / 999
    return Batch({"sample": sample, "timestep": timestep} | more, target, level_N, numbers)


def output(denoiser: torch.nn.Module) -> torch.Tensor:
    """The denoiser's answer to two fixed noisy images."""
    config = denoiser.config
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    sample_NCHW = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(sample_NCHW, torch.tensor([3, 700])).sample


@cache
def tiny_folder(**unet: Any) -> Path:
    """`tiny_model` saved as a model folder, once per test run; tests only read it."""
    place = mkdtemp(prefix="prunedm-tests-")
    atexit.register(rmtree, place, ignore_errors=True)
    folder = Path(place) / "tiny"
    save(tiny_model(**unet), folder)
    return folder


SHARED: list[Path] = []  # the folder that a run's test processes share; `conftest.py` fills it


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of a run's test processes makes, and the others wait for."""
    (place,) = SHARED
    with FileLock(place / f"{name}.lock"):
        if not (place / name).exists():
            make(place / name)
    return place / name


def torchrun(*words: str | Path, home: Path | None = None, world: int = 2) -> str:
    """What `world` processes on this machine print: `words` are a test file, or `-m` and a module.

    `accelerate launch` does the same for GPUs, and on CPUs starts several processes by MPI only.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command = [sys.executable, *launch, *map(str, words)]
    own = {"PYTHONPATH": str(Path(__file__).parent)} | ({"HF_HOME": str(home)} if home else {})
    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
