"""Exported files as denoisers: called like a diffusers model, run by another runtime.

Shapes: N images, C channels, H W pixels.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from prunedm.architecture import architecture_of
from prunedm.deployment.description import Description
from prunedm.deployment.extras import ONNX, OPENVINO, require
from prunedm.errors import UserError, first_line
from prunedm.tables import FORMATS


class ExportedDenoiser(nn.Module):
    """What samplers see: `(sample, timestep[, class_labels]) -> (output,)`, float32, on the CPU."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = FrozenDict(config)
        self.class_embedding = nn.Identity() if config.get("num_class_embeds") else None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Raises `UserError` for images of another shape than the file was made for."""
        assert not return_dict
        due = architecture_of(self).shape(self)
        if tuple(sample.shape[1:]) != due:
            raise UserError(
                f"the exported model takes images of shape {due}, not {tuple(sample.shape[1:])}; "
                "export the model for those"
            )
        times_N = torch.as_tensor(timestep).float().cpu().expand(len(sample))
        inputs = {
            "sample": sample.detach().float().cpu().contiguous().numpy(),
            "timestep": times_N.contiguous().numpy(),
        }
        if self.class_embedding is not None:
            if class_labels is None:
                raise UserError("the exported model wants class labels; none were given")
            inputs["class_labels"] = class_labels.cpu().contiguous().numpy()
        return (torch.from_numpy(self.run(inputs)).to(sample.device),)

    @abstractmethod
    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The output of arrays by the file's input names."""

    @property
    @abstractmethod
    def arithmetic(self) -> str:
        """The runtime, and the type it computes in here."""


class OnnxDenoiser(ExportedDenoiser):
    """ONNX Runtime, on a GPU where its CUDA build is installed and there is one, else on the CPU."""

    def __init__(self, path: Path, config: Mapping[str, Any], *, precision: str) -> None:
        super().__init__(config)
        require("onnx", ONNX, "onnx")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in ort.get_available_providers()]
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # of onnxruntime's own classes
            raise UserError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
        self.precision = precision

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        output: np.ndarray = self.session.run(None, inputs)[0]
        return output

    @property
    def arithmetic(self) -> str:
        provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        return f"ONNX Runtime {provider} {self.precision}"


# what OpenVINO calls a type, and the capability that makes it fast on a CPU
_OPENVINO_TYPES = {"bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16"), "int8": ("bf16", "BF16")}
LEAST_IMAGES = (
    4  # in one stream: below, a thread more for one call is worth more than a second call
)


class OpenVinoDenoiser(ExportedDenoiser):
    """OpenVINO on the CPU, compiled for the batch that it is called with.

    Shapes are static, and a batch is shared out among streams of one thread each: two halves side
    by side take less time than one after the other on two threads, since most operations of a
    small model are too short to be split.
    """

    def __init__(
        self,
        source: Any,  # a path, or an openvino model
        config: Mapping[str, Any],
        *,
        precision: str,
        threads: int | None = None,
    ) -> None:
        super().__init__(config)
        require("openvino", OPENVINO, "openvino")
        import openvino

        self.core = openvino.Core()
        self.threads = threads or torch.get_num_threads()
        try:
            self.model = self.core.read_model(source) if isinstance(source, Path) else source
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot open {source}: {first_line(error)}") from error
        self.hint = self._native(precision)
        self.precision = precision
        self._ready: dict[int, tuple[int, Any]] = {}  # batch => images a call, queue

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        count = len(inputs["sample"])
        if count not in self._ready:
            self._ready[count] = self._compile(count)
        size, queue = self._ready[count]
        pixels = inputs["sample"].shape[2:]
        output = np.empty((count, self.config["out_channels"], *pixels), np.float32)
        parts = {}
        for start in range(0, count, size):
            parts[start] = {k: _filled(v[start : start + size], size) for k, v in inputs.items()}

        def keep(request: Any, start: int) -> None:
            own = output[start : start + size]
            own[:] = request.get_output_tensor(0).data[: len(own)]

        queue.set_callback(keep)
        for start, part in parts.items():
            queue.start_async(part, start, share_inputs=True)
        queue.wait_all()
        return output

    def _compile(self, count: int) -> tuple[int, Any]:
        import openvino

        streams = max(1, min(self.threads, count // LEAST_IMAGES))
        size = -(-count // streams)
        model = self.model.clone()
        model.reshape(
            {
                port: openvino.PartialShape([size, *list(port.get_partial_shape())[1:]])
                for port in model.inputs
            }
        )
        settings = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.hint,
        }
        try:
            compiled = self.core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise UserError(
                f"OpenVINO cannot compile the model: {first_line(error)}; try another --precision"
            ) from error
        return size, openvino.AsyncInferQueue(compiled, streams)

    def _native(self, precision: str) -> str:
        """The type to compute in: what the file is for, where this CPU has it."""
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        wanted, capability = _OPENVINO_TYPES.get(precision, ("f32", ""))
        return wanted if capability in able else "f32"

    @property
    def arithmetic(self) -> str:
        return f"OpenVINO {'int8 and ' if self.precision == 'int8' else ''}{self.hint}"


def open_file(
    description: Description, folder: Path, config: Mapping[str, Any]
) -> ExportedDenoiser:
    """The exported denoiser, ready to be called. Raises `UserError` for formats without a runtime."""
    path = folder / description.file
    known = FORMATS.get(description.format)
    if known is not None and known.open is not None:
        opened: ExportedDenoiser = known.open(path, config, precision=description.precision)
        return opened
    raise UserError(
        f"{folder} is a {description.format} export, which prunedm does not run; "
        "export --format onnx or openvino to sample from a file"
    )


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """With the last entry repeated up to `size`: shapes are static."""
    missing = size - len(array)
    return np.concatenate([array, array[-1:].repeat(missing, 0)]) if missing else array
