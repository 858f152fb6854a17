"""What a network is told besides noise and time: nothing, a class, or a prompt."""

from collections.abc import Sequence

import torch

from prunedm.architecture import Inputs
from prunedm.data.files import shown
from prunedm.data.images import ImageSet
from prunedm.errors import UserError
from prunedm.randomness import generator_for
from prunedm.task.prompts import PromptEncoder


class Condition:
    """Tensors for a network's inputs besides noise and time, N rows each; here none.

    captions: whether a dataset must have them.
    """

    captions = False

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """For the images at `indices` of a dataset, in the problems `numbers`."""
        return {}

    def drawn(self, indices: Sequence[int]) -> Inputs:
        """For the samples `indices`."""
        return {}

    def check(self, images: ImageSet) -> None:
        """Raise `UserError` where a dataset lacks what the network must be told."""


class Unconditional(Condition):
    """Nothing is told."""


class Classes(Condition):
    """One class label per row.

    count: the number of classes, or None where labels are other numbers. only: the class of all
    samples; None takes the classes in turn. Raises `UserError` where that class does not exist.
    """

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
        """All classes in turn, or `only`."""
        if self.only is not None:
            return {"class_labels": torch.full((len(indices),), self.only)}
        return {"class_labels": torch.tensor([i % (self.count or 1) for i in indices])}

    def check(self, images: ImageSet) -> None:
        """Raise `UserError` where labels are missing, or outside the network's classes."""
        name = shown(images.name)
        if images.labels is None:
            why = f": {images.unlabelled}" if images.unlabelled else ""
            raise UserError(f"the model is class-conditional, and {name!r} has no labels{why}")
        if (lowest := min(images.labels)) < 0:
            raise UserError(f"{name!r} has label {lowest}, and labels start at 0")
        if self.count is not None and (highest := max(images.labels)) >= self.count:
            raise UserError(f"{name!r} has label {highest}, and the model {self.count} classes")


class Prompts(Condition):
    """One text per row, encoded by the model's own encoders.

    empty: the share of problems with an empty text, for classifier-free guidance (Ho & Salimans
    2022). texts: the samples' prompts, in turn.
    """

    captions = True

    def __init__(
        self, encoder: PromptEncoder, *, empty: float = 0.1, texts: Sequence[str] = ("",)
    ) -> None:
        self.encoder, self.empty, self.texts = encoder, empty, texts

    def of(
        self, images: ImageSet, indices: Sequence[int], numbers: Sequence[int], *, seed: int
    ) -> Inputs:
        """The images' captions; some are replaced by the empty text."""
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
                f"the model needs prompts, and {shown(images.name)!r} has no captions: a column "
                "`text` or `caption` of metadata.jsonl, metadata.csv or a table gives them, and "
                "--caption-column names another"
            )

    def _left_out(self, number: int, seed: int) -> bool:
        generator = generator_for(seed, "empty prompt", number)
        return bool(torch.rand((), generator=generator) < self.empty)
