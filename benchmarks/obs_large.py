"""Time and memory of OBS on a 36M-parameter UNet: google/ddpm-cifar10-32's shape, random weights.

    python benchmarks/obs_large.py --threads 2

Writes `benchmarks/results/obs-36m.json`. Nothing is downloaded; the images are noise, because neither
time nor memory depends on their content.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from bench import RESULTS, Row, command_line
from diffusers import DDPMScheduler, UNet2DModel

from prunedm.data.images import ImageSet
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers, to_groups, why_not_nm
from prunedm.record import environment, write_json
from prunedm.removal.obs import obs_prune
from prunedm.task.codec import Pixels
from prunedm.task.condition import Unconditional
from prunedm.task.denoising import Denoising
from prunedm.task.process import process_of

OUT = RESULTS / "obs-36m.json"
UNET: Row = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
BATCH = 16


class Clock:
    """A progress that only measures where time goes: passes over the problems, and layers."""

    def __init__(self) -> None:
        self.seconds = {"passes": 0.0, "layers": 0.0}
        self.last = time.perf_counter()

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator["Clock"]:
        yield self

    def advance(self, units: int = 1, note: str = "") -> None:
        now = time.perf_counter()
        self.seconds["layers" if note else "passes"] += now - self.last
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gib", type=float, default=2.0, help="Grams held at once")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = int(arguments.memory_gib * 2**30)
    found = measure(arguments.problems, memory=memory)
    result = {"command": command_line()} | environment("cpu") | found
    write_json(result, arguments.out)
    print(f"{result['wall_time_s']['total']} s, {result['figures']['peak_rss_gb']} GB")


def measure(count: int, *, memory: int) -> Row:
    """Time and memory to prune every layer that supports 2:4."""
    torch.manual_seed(0)
    denoiser, scheduler = UNet2DModel(**UNET).eval(), DDPMScheduler()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = ImageSet(list(pixels), name="noise", size=32, channels=3)
    problems = Denoising(
        images,
        process_of(scheduler),
        codec=Pixels((3, 32, 32)),
        condition=Unconditional(),
        seed=0,
        purpose="train",
    )
    batches = [problems.batch(range(k, min(k + BATCH, count))) for k in range(0, count, BATCH)]
    pattern, layers = Pattern(2, 4), prunable_layers(denoiser)
    choices = {n: pattern for n, layer in layers.items() if why_not_nm(layer, 4) is None}
    before = _peak_gb()
    clock = Clock()
    began = time.perf_counter()
    masks = obs_prune(
        denoiser,
        choices,
        batches=batches,
        memory=memory,
        progress=clock,
    )
    total = time.perf_counter() - began
    assert all(bool((to_groups(mask, 4).sum(1) == 2).all()) for mask in masks.values())
    return {
        "wall_time_s": {k: round(v, 1) for k, v in (clock.seconds | {"total": total}).items()},
        "figures": {
            "peak_rss_gb": round(_peak_gb(), 2),
            "peak_rss_before_gb": round(before, 2),
            "params": sum(p.numel() for p in denoiser.parameters()),
            "params_in_masks": sum(mask.numel() for mask in masks.values()),
            "removed": sum(int((~mask).sum()) for mask in masks.values()),
            "layers": len(masks),
        },
        "conditions": {
            "pattern": str(pattern),
            "problems": count,
            "batch": BATCH,
            "gram_memory_gib": round(memory / 2**30, 3),
            "threads": torch.get_num_threads(),
        },
    }


def _peak_gb() -> float:
    """Largest resident set of this process so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main()
