"""onnx: one graph for ONNX Runtime, TensorRT and whatever else reads ONNX, for any batch size.

N:M zeros run along input channels in Conv and MatMul weights, as TensorRT's sparse tactics expect.
"""

import tempfile
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


def write(job: ExportJob) -> Written:
    path, precision = job.folder / "model.onnx", str(job.options.precision)
    if precision == "int8":
        whole = job.folder / "float32.onnx"
        write_onnx(job.graph(), job.inputs(2), whole, opset=job.options.opset)
        quantize(whole, path, job.calibration())
        whole.unlink()
    else:
        write_onnx(job.typed_graph(), job.inputs(2), path, opset=job.options.opset)
    shapes, opset = onnx_shapes(path)
    denoiser = OnnxDenoiser(path, job.model.denoiser.config, precision=precision)
    errors = job.check(answer(denoiser, job.inputs()), path.name, onnx_arrays(path))
    return Written([path.name], shapes, *errors, opset=opset, denoiser=denoiser)


def write_onnx(graph: nn.Module, inputs: Inputs, path: Path, *, opset: int) -> None:
    """Export a graph of `(sample, timestep[, class_labels])` with a dynamic batch size.

    Raises `UserError` naming the first operator that has no ONNX form.
    """
    import onnx

    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the exporter's own libraries
            program = torch.onnx.export(
                graph,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                input_names=list(inputs),
                output_names=["output"],
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
            parts = model.graph
            # stack traces of this machine: a third of the file
            for part in (*parts.node, *parts.value_info, *parts.input, *parts.output):
                del part.metadata_props[:]
            onnx.save(model, str(path))
            onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the exporter wraps errors in its own classes
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = first_line(cause)[:300]
        raise UserError(f"this model cannot be converted to ONNX: {reason}") from error


def quantize(source: Path, target: Path, batches: Iterable[dict[str, np.ndarray]]) -> None:
    """In QDQ form: int8 weights and activations around Conv, Gemm and MatMul.

    `batches` are inputs by name. Raises `UserError` where ONNX Runtime cannot quantize the file.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        try:
            quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
            ends = tuple(f"unet.{end}" for end in NOT_QUANTIZED)
            quantize_static(
                prepared,
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[
                    node.name
                    for node in onnx.load(prepared).graph.node
                    if any(name.startswith(ends) for name in node.input)
                ],
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"ONNX Runtime cannot quantize this model: {error}") from error


def onnx_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every constant array in the file, by name."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    for tensor in graph.initializer:
        yield tensor.name, numpy_helper.to_array(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], numpy_helper.to_array(attribute.t)


def onnx_shapes(path: Path) -> tuple[dict[str, list[int | str]], int]:
    """Shapes of inputs and output by name, with free sizes as words; and the opset."""
    import onnx

    model = onnx.load(str(path))
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    return shapes, next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


class OnnxDenoiser(ExportedDenoiser):
    """ONNX Runtime, on a GPU where its CUDA build and a GPU are present, else on the CPU."""

    def __init__(self, path: Path, config: Mapping[str, Any], *, precision: str) -> None:
        super().__init__(config)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [name for name in wanted if name in ort.get_available_providers()]
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's own classes
            raise UserError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
        self.precision = precision

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        output: np.ndarray = self.session.run(None, inputs)[0]
        return output

    @property
    def arithmetic(self) -> str:
        provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        return f"ONNX Runtime {provider} {self.precision}"


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX = Format(("fp32", "fp16", "int8"), write, packages=PACKAGES, extra="onnx", open=OnnxDenoiser)
