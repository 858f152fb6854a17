"""What the writers of all formats share: the model, example inputs, data for int8, and the checks.

Post-training quantization takes the ranges of activations from denoising problems over all timesteps:
they change with the noise level (Shang et al. 2023, PTQ4DM; Li et al. 2023, Q-Diffusion). Weights are
symmetric per output channel, so zeros stay zeros.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs, answer
from prunedm.data.images import ImageSet
from prunedm.deployment.inference_graph import HalfInside, InferenceDenoiser
from prunedm.deployment.runtimes import ExportedDenoiser
from prunedm.deployment.zeros import check_zeros
from prunedm.errors import UserError
from prunedm.evaluation.features import FeatureNetwork
from prunedm.evaluation.loss import fixed_batches
from prunedm.folder import Model
from prunedm.masks import Masks
from prunedm.options import EvaluateOptions, ExportOptions
from prunedm.packed import FLOATS
from prunedm.progress import Progress
from prunedm.record import Source
from prunedm.sampling import make_sampler, set_steps
from prunedm.stages.evaluating.quality import with_features
from prunedm.stages.inputs import data_source, held_out_problems, images_for, training_problems
from prunedm.task import Batch

CHECKED = 16  # images of the check
# the error of the ends would be added to the image at every step, so they stay in floating point
NOT_QUANTIZED = ("conv_in", "conv_out", "time_embedding")


@dataclass(frozen=True)
class Written:
    """The result of a writer: its files, the one to open first, and its error against the model.

    `denoiser`: the file as prunedm runs it, or None where it cannot.
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
class Data:
    """What quantization reads; opened before any work, so that missing data are reported at once."""

    calibration: list[Batch]  # on training images, antithetic over all timesteps
    held_out: list[Batch]
    reference: ImageSet  # images behind the distances
    evaluate: EvaluateOptions
    network: FeatureNetwork | None
    sources: dict[str, Source]

    @classmethod
    def of(cls, model: Model, options: ExportOptions) -> "Data":
        images = images_for(model, options, "train")
        reference = images_for(model, options, "test")
        shared = EvaluateOptions.model_fields.keys() & ExportOptions.model_fields.keys()
        asked = EvaluateOptions(**{name: getattr(options, name) for name in shared})
        evaluate, network, files = with_features(asked, reference)
        if evaluate.samples:
            set_steps(make_sampler(model.scheduler, evaluate.sampler), evaluate.sampling_steps)
        problems = training_problems(model, options, images)
        return cls(
            calibration=fixed_batches(problems, options.calibration_problems),
            held_out=held_out_problems(model, options, options.problems),
            reference=reference,
            evaluate=evaluate,
            network=network,
            sources={"dataset": data_source(reference)} | files,
        )


@dataclass(frozen=True)
class ExportJob:
    """One export."""

    model: Model
    options: ExportOptions
    folder: Path
    progress: Progress
    data: Data | None  # for int8

    def graph(self) -> nn.Module:
        """The denoiser in the form that is exported."""
        return InferenceDenoiser(self.model.denoiser)

    def typed_graph(self) -> nn.Module:
        """`graph` computing in the chosen precision, float32 outside; int8 comes later."""
        dtype = FLOATS.get(str(self.options.precision), torch.float32)
        return self.graph() if dtype == torch.float32 else HalfInside(self.graph(), dtype)

    def inputs(self, count: int = CHECKED) -> Inputs:
        """Seeded noise for `count` images at timesteps from the first to the last, by input name.

        Raises `UserError` where class labels are not numbers.
        """
        model = self.model
        if model.conditional and model.denoiser.config.num_class_embeds is None:
            raise UserError(
                "export takes class labels as numbers; this model embeds them otherwise "
                f"(class_embed_type {model.denoiser.config.class_embed_type!r})"
            )
        return model.example(count, seed=self.options.seed)

    def shapes(self) -> dict[str, list[int | str]]:
        """Of the graph's inputs and output, by name."""
        if self.model.tokenizer is not None:
            return {"input_ids": ["batch", "length"], "output": ["batch", "length", "vocabulary"]}
        config, (_, height, width) = self.model.denoiser.config, self.model.sample_shape
        free: list[int | str] = ["batch"]
        shapes = {name: free + list(x.shape[1:]) for name, x in self.inputs(1).items()}
        return shapes | {"output": [*free, config.out_channels, height, width]}

    def calibration(self) -> Iterator[dict[str, np.ndarray]]:
        """The inputs of denoising problems, batch by batch, by name."""
        assert self.data is not None
        for batch in self.data.calibration:
            timestep = batch.inputs["timestep"].float()
            inputs = {**batch.inputs, "timestep": timestep}
            yield {name: tensor.numpy() for name, tensor in inputs.items()}

    def check(
        self,
        output_NCHW: torch.Tensor,
        what: str,
        arrays: Iterable[tuple[str, np.ndarray]] | None = None,
    ) -> tuple[float, float]:
        """Relative and largest error of a file's output for `inputs()`.

        Raises `UserError` above the tolerance, and where the masks' zeros are not in its `arrays`, if
        any are given.
        """
        if arrays is not None and self.model.masks is not None:
            check_zeros(arrays, self.model.masks, what)
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
    """How a model is written for another runtime, as a file that is opened again and run.

    precisions: of weights and arithmetic, the default first. packages: those that are imported, for
    int8 with int8_packages. extra: the extra of prunedm that installs them. open: opens the file as a
    denoiser, where prunedm can run it. check_masks: raises `UserError` for masks of no use here.
    """

    precisions: tuple[str, ...]
    write: Callable[[ExportJob], Written]
    packages: tuple[str, ...] = ()
    int8_packages: tuple[str, ...] = ()
    extra: str = ""
    texts: bool = False  # whether language models can be written in it
    open: Callable[..., ExportedDenoiser] | None = None
    check_masks: Callable[[Masks], None] = lambda masks: None

    def require(self, name: str, precision: str = "") -> None:
        """Raise `UserError` with the `pip install` command where packages are missing."""
        packages = self.packages + (self.int8_packages if precision == "int8" else ())
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise UserError(
                f"{name} needs {', '.join(missing)}; run: pip install 'prunedm[{self.extra}]'"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """No stdout, and no log below an error: exporters and quantizers print bars and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
