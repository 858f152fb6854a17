"""torch: a .pt2 archive of torch.export, for PyTorch without this package and for C++."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prunedm.architecture import Inputs
from prunedm.errors import UserError, first_line
from prunedm.stages.exporting.job import ExportJob, Format, Written


def write(job: ExportJob) -> Written:
    path = job.folder / "model.pt2"
    write_program(job.typed_graph(), job.inputs(2), path)
    with torch.no_grad():
        output = torch.export.load(path).module()(*job.inputs().values())
    errors = job.check(output, path.name, program_arrays(path))
    return Written([path.name], job.shapes(), *errors)


def write_program(graph: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export a graph of `(sample, timestep[, class_labels])` for batches of two or more.

    Raises `UserError` where torch.export cannot trace it.
    """
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes)
    except Exception as error:  # torch.export has many classes of errors
        reason = first_line(error)[:300]
        raise UserError(f"torch.export cannot trace this model: {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path)


def program_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight in a file that was just written here, by name."""
    for name, tensor in torch.export.load(path).state_dict.items():
        yield name, tensor.detach().float().numpy()


TORCH = Format(("fp32", "fp16", "bf16"), write)
