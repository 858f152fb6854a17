"""A tiny random network of each family in `ARCHITECTURES`, and a task for each."""

from typing import Any

import torch
from helpers import noise_images
from torch import nn

from prunedm.architecture import Inputs, architecture_named, architecture_of
from prunedm.folder import Model
from prunedm.model_files.configs import network_class
from prunedm.task import Task
from prunedm.task.codec import Pixels
from prunedm.task.denoising import Denoising
from prunedm.task.next_token import NextToken
from prunedm.task.process import process_of, scheduler_class

SIDE = 8
TOKENS = torch.randint(97, (24, 16), generator=torch.Generator().manual_seed(0))


def network(name: str) -> Any:
    """The family's tiny network, of the same weights at every call, none of them zero."""
    torch.manual_seed(0)
    cls, record = network_class(name), architecture_named(name)
    tiny = dict(record.tiny)
    made = cls(**tiny) if hasattr(cls, "from_config") else cls(cls.config_class(**tiny))
    for parameter in made.parameters():  # diffusers begins some layers at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return made.eval()


def model(name: str) -> Model:
    """The network in a model."""
    made = network(name)
    record = architecture_of(made)
    return Model(
        made,
        None if record.text else scheduler_class(record.scheduler)(),
        name=name,
        component=record.component,
        pipeline=record.pipeline,
    )


class Told:
    """A condition that tells whatever the network wants besides noise and time: fixed random rows."""

    captions = False

    def __init__(self, made: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        record = architecture_of(made)
        self.rows = dict(record.more(made, 4, generator))
        if classes := record.classes(made):
            self.rows["class_labels"] = torch.arange(4) % classes

    def of(self, images, indices, numbers, *, seed: int) -> Inputs:
        """By the image's number."""
        return self.drawn(indices)

    def drawn(self, indices) -> Inputs:
        """By the sample's number."""
        return {name: rows[[i % 4 for i in indices]] for name, rows in self.rows.items()}

    def check(self, images) -> None:
        """Nothing is wanted of a dataset."""


def task(made: Model, **options: Any) -> Task:
    """Denoising of random images, or the next of random tokens."""
    if made.architecture.text:
        return NextToken(TOKENS, seed=0, purpose="test", **options)
    channels = made.sample_shape[0]
    shape = (channels, SIDE, SIDE)
    return Denoising(
        noise_images(12, size=SIDE, channels=channels),
        process_of(made.scheduler),
        codec=Pixels(shape),
        condition=Told(made.denoiser),
        seed=0,
        purpose="test",
        **options,
    )
