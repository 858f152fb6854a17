"""Randomness as a function of (seed, purpose, index), independent of batches and processes.

Item `index` of any random stream (the noise of image 17, the timestep of problem 4,096) comes from
its own generator. A stream can therefore be cut anywhere, resumed, or shared among processes, and
every item keeps its bits.
"""

import hashlib

import torch

_MT19937_SEEDS = 2**32  # torch's CPU generator uses only the low 32 bits of a seed


def seed_for(seed: int, purpose: str, index: int = 0) -> int:
    """A 32-bit seed. Different indices of one (seed, purpose) never collide: the map is a shift."""
    digest = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + index) % _MT19937_SEEDS


def generator_for(
    seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator for item `index` of the stream named `purpose`."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, index))
