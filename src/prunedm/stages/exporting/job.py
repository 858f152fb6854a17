"""One export under way: the model, example inputs, and the check of what was written.

Shapes: N images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs, answer
from prunedm.deployment.extras import require
from prunedm.deployment.inference_graph import HalfInside, InferenceDenoiser
from prunedm.deployment.runtimes import ExportedDenoiser
from prunedm.errors import UserError
from prunedm.folder import Model
from prunedm.masks import Masks
from prunedm.options import ExportOptions
from prunedm.packed import FLOATS
from prunedm.progress import Progress
from prunedm.stages.exporting.data import Data

CHECKED = 16  # images of the check


@dataclass(frozen=True)
class Written:
    """What a format's writer made: files, the first to be opened; and how far it is from the model.

    `denoiser`: the file as prunedm runs it, or None where it does not.
    """

    files: list[str]
    shapes: dict[str, list[int | str]]
    relative_error: float
    largest_error: float
    opset: int | None = None
    denoiser: ExportedDenoiser | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        ran = {"runtime": self.denoiser.arithmetic} if self.denoiser else {}
        errors = {"relative_error": self.relative_error, "largest_error": self.largest_error}
        return errors | ran | self.notes


@dataclass(frozen=True)
class Job:
    """What the writers share."""

    model: Model
    options: ExportOptions
    folder: Path
    progress: Progress
    data: Data | None  # for int8

    def graph(self) -> nn.Module:
        """The denoiser as it is exported."""
        return InferenceDenoiser(self.model.denoiser)

    def typed_graph(self) -> nn.Module:
        """`graph` that computes in the precision asked for, float32 outside; int8 comes after."""
        dtype = FLOATS.get(str(self.options.precision), torch.float32)
        return self.graph() if dtype == torch.float32 else HalfInside(self.graph(), dtype)

    def inputs(self, count: int = CHECKED) -> Inputs:
        """`count` images of seeded noise at timesteps from the first to the last, by input name.

        Raises `UserError` for class labels that are not numbers.
        """
        model = self.model
        if model.conditional and model.denoiser.config.num_class_embeds is None:
            raise UserError(
                "export takes class labels as numbers; this model embeds them otherwise "
                f"(class_embed_type {model.denoiser.config.class_embed_type!r})"
            )
        return model.example(count, seed=self.options.seed)

    def shapes(self) -> dict[str, list[int | str]]:
        """Of inputs and output, as the graph has them."""
        config, (_, height, width) = self.model.denoiser.config, self.model.sample_shape
        free: list[int | str] = ["batch"]
        shapes = {name: free + list(x.shape[1:]) for name, x in self.inputs(1).items()}
        return shapes | {"output": [*free, config.out_channels, height, width]}

    def calibration(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of real denoising problems by input name."""
        assert self.data is not None
        for batch in self.data.calibration:
            timestep = batch.inputs["timestep"].float()
            inputs = {**batch.inputs, "timestep": timestep}
            yield {name: tensor.numpy() for name, tensor in inputs.items()}

    def check(self, output_NCHW: torch.Tensor, what: str) -> tuple[float, float]:
        """Relative and largest error of an output for `inputs()`; `UserError` above the tolerance."""
        with torch.no_grad():
            due = answer(self.model.denoiser.eval(), self.inputs()).double()
        error = output_NCHW.double() - due
        relative, largest = float(error.norm() / due.norm()), float(error.abs().max())
        tolerance = float(self.options.tolerance or 0)
        if not relative <= tolerance:  # also where it is not a number
            raise UserError(
                f"{what} differs from the model by a relative error of {relative:.2g}, above the "
                f"tolerance of {tolerance:g}; take another --precision, or --tolerance {relative:.1g}"
            )
        return relative, largest


@dataclass(frozen=True)
class Format:
    """How a model is written for another runtime: a file that is opened again and run.

    precisions: of weights and arithmetic, the default first. packages: what is imported, and
    int8_packages besides; the extra of prunedm that installs them. open: the file as prunedm runs it,
    where it does. check_masks: raises `UserError` for masks that the format can make nothing of.
    """

    precisions: tuple[str, ...]
    write: Callable[[Job], Written]
    packages: tuple[str, ...] = ()
    int8_packages: tuple[str, ...] = ()
    extra: str = ""
    open: Callable[..., ExportedDenoiser] | None = None
    check_masks: Callable[[Masks], None] = lambda masks: None

    def require(self, name: str, precision: str) -> None:
        """Raise `UserError` with the `pip install` to run where packages are missing."""
        more = self.int8_packages if precision == "int8" else ()
        require(name, (*self.packages, *more), self.extra)
