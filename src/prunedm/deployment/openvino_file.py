"""OpenVINO: model.xml and model.bin, for Intel and ARM CPUs."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError, first_line


def to_openvino(graph: nn.Module, inputs: Inputs) -> Any:
    """An openvino model of a graph of `(sample, timestep[, class_labels])`; the batch is dynamic.

    Raises `UserError` naming the operator where OpenVINO has none.
    """
    import openvino

    shapes = [openvino.PartialShape([-1, *x.shape[1:]]) for x in inputs.values()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing diffusers' code
            model = openvino.convert_model(
                graph, example_input=tuple(inputs.values()), input=shapes
            )
    except Exception as error:  # openvino's conversion errors are of several classes
        raise UserError(
            f"OpenVINO has no form for this model: {first_line(error)[:300]}"
        ) from error
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({"output"})
    return model


def write_openvino(model: Any, path: Path, *, half: bool) -> None:
    """`path` and the `.bin` beside it; weights in float16 where `half`, which int8 ones are not."""
    import openvino

    openvino.save_model(model, str(path), compress_to_fp16=half)


def openvino_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every constant array in the file, by name."""
    import openvino

    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            yield node.get_friendly_name(), np.asarray(node.data)
