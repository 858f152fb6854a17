"""What a network is told besides noise and time: nothing, a class, or a prompt."""

from collections.abc import Sequence
from typing import Protocol

import torch

from prunedm.architecture import Inputs
from prunedm.data import ImageSet
from prunedm.data.files import shown
from prunedm.errors import UserError
from prunedm.randomness import generator_for
from prunedm.task.prompts import PromptEncoder


class Condition(Protocol):
    """Tensors for a network's inputs, N rows each. captions: whether a dataset's are needed."""

    captions: bool

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """What a dataset says of its images of these indices, in the problems of these numbers."""

    def drawn(self, indices: Sequence[int]) -> Inputs:
        """What the samples of these indices are told."""

    def check(self, images: ImageSet) -> None:
        """Raise `UserError` where a dataset does not say what the network must be told."""


class Unconditional:
    """Nothing is told."""

    captions = False

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """No inputs."""
        return {}

    def drawn(self, indices: Sequence[int]) -> Inputs:
        """No inputs."""
        return {}

    def check(self, images: ImageSet) -> None:
        """Any dataset will do."""


class Classes:
    """A class label each.

    count: of the classes, or None where the network takes other numbers. only: the one class of all
    samples, which take all classes in turn otherwise. Raises `UserError` where that class is missing.
    """

    captions = False

    def __init__(self, count: int | None, only: int | None = None) -> None:
        if only is not None and count is not None and only >= count:
            raise UserError(f"label {only} is not below the model's {count} classes")
        self.count, self.only = count, only

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """The images' labels."""
        return {"class_labels": torch.tensor([images.label(index) for index in indices])}

    def drawn(self, indices: Sequence[int]) -> Inputs:
        """All classes in turn, or the one."""
        if self.only is not None:
            return {"class_labels": torch.full((len(indices),), self.only)}
        return {"class_labels": torch.tensor([i % (self.count or 1) for i in indices])}

    def check(self, images: ImageSet) -> None:
        """Raise `UserError` where there are no labels, or some that the network has no class for."""
        name = shown(images.name)
        if images.labels is None:
            why = f": {images.unlabelled}" if images.unlabelled else ""
            raise UserError(f"the model is class-conditional, and {name!r} has no labels{why}")
        if (lowest := min(images.labels)) < 0:
            raise UserError(f"{name!r} has label {lowest}, and labels start at 0")
        if self.count is not None and (highest := max(images.labels)) >= self.count:
            raise UserError(f"{name!r} has label {highest}, and the model {self.count} classes")


class Prompts:
    """A text each, as the model's own encoders see it.

    empty: the share of problems whose text is left out, for classifier-free guidance (Ho & Salimans
    2022). texts: what samples are told, in turn.
    """

    captions = True

    def __init__(
        self, encoder: PromptEncoder, *, empty: float = 0.1, texts: Sequence[str] = ("",)
    ) -> None:
        self.encoder, self.empty, self.texts = encoder, empty, texts

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """The images' captions, or nothing."""
        assert images.captions is not None
        texts = [
            "" if self._left_out(number, seed) else images.captions[index]
            for index, number in zip(indices, numbers, strict=True)
        ]
        return self.encoder(texts)

    def drawn(self, indices: Sequence[int]) -> Inputs:
        """The texts in turn."""
        return self.encoder([self.texts[i % len(self.texts)] for i in indices])

    def check(self, images: ImageSet) -> None:
        """Raise `UserError` where there are no captions."""
        if images.captions is None:
            raise UserError(
                f"the model is told prompts, and {shown(images.name)!r} has no captions: a column "
                "`text` or `caption` of metadata.jsonl, metadata.csv or a table gives them, and "
                "--caption-column names another"
            )

    def _left_out(self, number: int, seed: int) -> bool:
        generator = generator_for(seed, "empty prompt", number)
        return bool(torch.rand((), generator=generator) < self.empty)
