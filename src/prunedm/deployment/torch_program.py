"""torch.export: the graph as a .pt2 archive, for PyTorch without this package and for C++."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError, first_line


def write_program(graph: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export a graph of `(sample, timestep[, class_labels])`; the batch is dynamic, 2 or more.

    Raises `UserError` where torch.export cannot trace it.
    """
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                graph, tuple(inputs.values()), dynamic_shapes=tuple({0: batch} for _ in inputs)
            )
    except Exception as error:  # torch.export's errors are of many classes
        raise UserError(
            f"torch.export cannot trace this model: {first_line(error)[:300]}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path)


def program_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight in a file that was just written here, by name."""
    for name, tensor in torch.export.load(path).state_dict.items():
        yield name, tensor.detach().float().numpy()


def run_program(path: Path, inputs: Inputs) -> torch.Tensor:
    """The output of the program in a file that was just written here."""
    with torch.no_grad():
        output: torch.Tensor = torch.export.load(path).module()(*inputs.values())
    return output
