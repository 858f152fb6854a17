"""ONNX: one file for ONNX Runtime and TensorRT, any batch size.

N:M zeros run along input channels in Conv and MatMul weights, as TensorRT's sparse tactics want.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError, first_line


def write_onnx(graph: nn.Module, inputs: Inputs, path: Path, *, opset: int) -> None:
    """Export a graph of `(sample, timestep[, class_labels])`; the batch is dynamic.

    Raises `UserError` naming the operator where one has no ONNX form.
    """
    import onnx

    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own libraries
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
            for part in (*model.graph.node, *model.graph.value_info):
                del part.metadata_props[:]  # stack traces of this machine: a third of the file
            for value in (*model.graph.input, *model.graph.output):
                del value.metadata_props[:]
            onnx.save(model, str(path))
            onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the exporter wraps what fails in classes of its own
        raise UserError(f"ONNX has no form for this model: {_cause(error)}") from error


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
    """Shapes of inputs and output by name, free sizes as words; and the opset."""
    import onnx

    model = onnx.load(str(path))
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    return shapes, next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:300]
