"""Sampling: exactly n images; image i depends on (seed, i) alone."""

from prunedm.sampling.draw import draw_images, images_of, sample_batches
from prunedm.sampling.fast import FastDenoiser
from prunedm.sampling.schedule import SAMPLERS, SPACINGS, make_sampler, set_steps

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "FastDenoiser",
    "draw_images",
    "images_of",
    "make_sampler",
    "sample_batches",
    "set_steps",
]
