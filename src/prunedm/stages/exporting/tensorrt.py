"""tensorrt: an engine where TensorRT is installed; the ONNX file and the command for it anywhere."""

from dataclasses import replace

from prunedm.deployment import tensorrt
from prunedm.deployment.extras import ONNX as PACKAGES
from prunedm.errors import UserError
from prunedm.masks import Masks
from prunedm.stages.exporting.job import Format, Job, Written
from prunedm.stages.exporting.onnx import write_onnx

SPARSE = (2, 4)  # the one pattern that NVIDIA's sparse tensor cores take


def write(job: Job) -> Written:
    options = job.options
    whole = write_onnx(replace(job, options=options.model_copy(update={"precision": "fp32"})))
    onnx, engine = job.folder / whole.files[0], job.folder / "model.engine"
    inputs = {name: shape for name, shape in whole.shapes.items() if name != "output"}
    half = options.precision == "fp16"
    command = tensorrt.command(onnx.name, engine.name, inputs, batch=options.batch_size, half=half)
    files, notes = [onnx.name], {"command": command}
    if tensorrt.is_installed():
        tensorrt.build_engine(onnx, engine, inputs, batch=options.batch_size, half=half)
        files.append(engine.name)
    else:
        (job.folder / "build_engine.sh").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        notes["engine"] = "none: TensorRT is not installed here"
    errors = whole.relative_error, whole.largest_error
    return Written(files, whole.shapes, *errors, opset=whole.opset, notes=notes)


def check_masks(masks: Masks) -> None:
    """Sparse kernels take 2:4 only; other zeros would be carried along for nothing."""
    for layer, _ in masks:
        pattern = masks.patterns.get(layer)
        if pattern is None or (pattern.n, pattern.m) != SPARSE:
            found = "unstructured" if pattern is None else str(pattern)
            raise UserError(
                f"tensorrt: the masks of {layer} are {found}, and sparse tensor cores take 2:4 only; "
                "prune with --pattern 2:4, or export --format onnx"
            )


TENSORRT = Format(("fp16", "fp32"), write, packages=PACKAGES, extra="onnx", check_masks=check_masks)
