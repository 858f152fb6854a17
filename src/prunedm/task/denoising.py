"""Denoising, the task of all image generators, given a process, a codec and a condition.

Problem p is a function of (seed, p) alone: its image, flip, noise level and noise.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from prunedm.data.images import ImageSet
from prunedm.randomness import generator_for
from prunedm.task import Batch, Task, Times
from prunedm.task.codec import Codec
from prunedm.task.condition import Condition
from prunedm.task.process import Process


class Denoising(Task, Dataset[dict[str, Any]]):
    """A seeded, endless stream of denoising problems over a set of images.

    `shuffle` and `cycle` as in `Task`; `flip` mirrors half of the images. Noise levels are antithetic:
    problem 2k draws step t, problem 2k+1 takes T-1-t, which halves their variance over a batch.
    `time_range`: the first and last drawn step, in 0..T-1.
    """

    def __init__(
        self,
        images: ImageSet,
        process: Process,
        *,
        codec: Codec,
        condition: Condition,
        seed: int,
        purpose: str,
        shuffle: bool = False,
        flip: bool = False,
        time_range: tuple[int, int] | None = None,
        cycle: int = 0,
    ) -> None:
        super().__init__(seed=seed, purpose=purpose, shuffle=shuffle, cycle=cycle)
        self.images, self.process, self.codec, self.condition = images, process, codec, condition
        self.flip = flip
        self.times = Times(*(time_range or (0, process.steps - 1)), process.steps)

    def __getitem__(self, p: int) -> dict[str, Any]:
        """The data and draws of problem p; the image is uint8 CHW."""
        p = self.number(p)
        generator = generator_for(self.seed, self.purpose, p)
        index = self.item(p, len(self.images))
        image = self.images[index]
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        noise = torch.randn(self.codec.shape, generator=generator)
        return {"image": image, "noise": noise, "step": self._step(p), "number": p, "index": index}

    def batch(self, numbers: Sequence[int]) -> Batch:
        return self._batch(_stacked([self[p] for p in numbers]))

    def batches(self, number_lists: Sequence[Any], *, workers: int = 0) -> Iterator[Batch]:
        loader = DataLoader(
            self, batch_sampler=number_lists, num_workers=workers, collate_fn=_stacked
        )
        return map(self._batch, loader)

    def sweep(self, count: int) -> Iterator[Batch]:
        """Problems 0..count-1 at each step in turn, with the same images and noise."""
        for step in range(self.times.first, self.times.last + 1):
            yield self._batch(_stacked([self[p] | {"step": step} for p in range(count)]))

    def _step(self, p: int) -> int:
        first, last = self.times.first, self.times.last
        generator = generator_for(self.seed, self.purpose + "/t", p // 2)
        step = first + int(torch.randint(last - first + 1, (), generator=generator))
        return step if p % 2 == 0 else first + last - step

    def _batch(self, read: dict[str, Any]) -> Batch:
        level_N, numbers = self.process.level(read["step"]), tuple(read["number"])
        noisy, timestep_N, target = self.process.corrupt(
            self.codec.encode(read["image"]), read["noise"], level_N
        )
        told = self.condition.of(self.images, read["index"], numbers, seed=self.seed)
        return Batch({"sample": noisy, "timestep": timestep_N, **told}, target, level_N, numbers)


def _stacked(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of N problems joined into tensors of N rows, and lists."""
    read: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    stacked = {name: torch.stack(read[name]) for name in ("image", "noise")}
    return read | stacked | {"step": torch.tensor(read["step"])}
