"""openvino: model.xml and model.bin for Intel and ARM CPUs; bf16 and int8 where the CPU has them."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs, answer
from prunedm.deployment.runtimes import ExportedDenoiser
from prunedm.errors import UserError, first_line
from prunedm.stages.exporting.job import NOT_QUANTIZED, ExportJob, Format, Written

# OpenVINO's name for a type, and the capability that makes it fast on a CPU
_TYPES = {"bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16"), "int8": ("bf16", "BF16")}
LEAST_IMAGES = (
    4  # per stream: with fewer, another thread for one call gains more than a second call
)


def write(job: ExportJob) -> Written:
    import openvino

    path, precision = job.folder / "model.xml", str(job.options.precision)
    model = to_openvino(job.graph(), job.inputs(2))
    if precision == "int8":
        assert job.data is not None
        model = quantize(model, job.calibration(), len(job.data.calibration))
    # weights go into float16 unless asked otherwise; int8 ones stay int8
    openvino.save_model(model, str(path), compress_to_fp16=precision != "fp32")
    denoiser = OpenVinoDenoiser(path, job.model.denoiser.config, precision=precision)
    errors = job.check(answer(denoiser, job.inputs()), path.name, openvino_arrays(path))
    files = [path.name, path.with_suffix(".bin").name]
    return Written(files, job.shapes(), *errors, denoiser=denoiser)


def to_openvino(graph: nn.Module, inputs: Inputs) -> Any:
    """An openvino model of a graph of `(sample, timestep[, class_labels])`, of any batch size.

    Raises `UserError` naming the first operator that OpenVINO does not have.
    """
    import openvino

    shapes = [openvino.PartialShape([-1, *x.shape[1:]]) for x in inputs.values()]
    example = tuple(inputs.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from tracing diffusers' code
            model = openvino.convert_model(graph, example_input=example, input=shapes)
    except Exception as error:  # openvino has several classes of conversion errors
        reason = first_line(error)[:300]
        raise UserError(f"this model cannot be converted to OpenVINO: {reason}") from error
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({"output"})
    return model


def quantize(model: Any, batches: Iterable[dict[str, np.ndarray]], count: int) -> Any:
    """The model with int8 convolutions and products, calibrated on `count` batches."""
    import nncf

    ends = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul")
        and any(f".{end}" in op.get_friendly_name() for end in NOT_QUANTIZED)
    ]
    return nncf.quantize(
        model,
        nncf.Dataset(list(batches)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=count,
        ignored_scope=nncf.IgnoredScope(names=ends),
    )


def openvino_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every constant array in the file, by name."""
    import openvino

    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            yield node.get_friendly_name(), np.asarray(node.data)


class OpenVinoDenoiser(ExportedDenoiser):
    """OpenVINO on the CPU, compiled for each batch size that it is called with.

    Shapes are static, and a batch is split among streams of one thread each: two halves side by side
    take less time than one after the other on two threads, since most operations of a small model are
    too short to be split.
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
        import openvino

        self.core = openvino.Core()
        self.threads = threads or torch.get_num_threads()
        try:
            self.model = self.core.read_model(source) if isinstance(source, Path) else source
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot open {source}: {first_line(error)}") from error
        self.precision = precision
        # the type to compute in: the file's, where this CPU has it
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        wanted, capability = _TYPES.get(precision, ("f32", ""))
        self.hint = wanted if capability in able else "f32"
        self._ready: dict[int, tuple[int, Any]] = {}  # batch => images per call, queue

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

    @property
    def arithmetic(self) -> str:
        return f"OpenVINO {'int8 and ' if self.precision == 'int8' else ''}{self.hint}"


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Padded to `size` with the last entry, since shapes are static."""
    missing = size - len(array)
    return np.concatenate([array, array[-1:].repeat(missing, 0)]) if missing else array


OPENVINO = Format(
    ("bf16", "fp32", "fp16", "int8"),
    write,
    packages=("openvino",),
    int8_packages=("nncf",),
    extra="openvino",
    open=OpenVinoDenoiser,
)
