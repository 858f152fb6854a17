"""tensorrt: an engine where TensorRT is installed, and elsewhere the ONNX file and the command for it.

TensorRT inspects the weights and tries its sparse kernels on layers whose groups of four input
channels hold at most two non-zeros (NVIDIA 2021, "Accelerating Inference with Sparsity Using the Ampere
Architecture and TensorRT"); it keeps them where they are faster on the GPU at hand. An engine belongs
to one GPU and one version of TensorRT, so it is built where it will run.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from prunedm.errors import UserError
from prunedm.masks import Masks
from prunedm.stages.exporting import onnx
from prunedm.stages.exporting.job import ExportJob, Format, Written

SPARSE = (2, 4)  # the only pattern of NVIDIA's sparse tensor cores
Shapes = dict[str, tuple[int, ...]]  # by input name


def write(job: ExportJob) -> Written:
    """Write the ONNX file, and an engine or the command that builds it."""
    options = job.options
    whole = onnx.write(replace(job, options=options.model_copy(update={"precision": "fp32"})))
    source, engine = job.folder / whole.files[0], job.folder / "model.engine"
    smallest, usual = (
        {
            name: tuple(size if isinstance(s, str) else s for s in shape)
            for name, shape in whole.shapes.items()
            if name != "output"
        }
        for size in (1, options.batch_size)
    )
    profile, half = (smallest, usual, usual), options.precision == "fp16"
    command = command_of(source.name, engine.name, profile, half=half)
    files, notes = [source.name], {"command": command}
    if find_spec("tensorrt") is not None:
        engine.write_bytes(build_engine(source, profile, half=half))
        files.append(engine.name)
    else:
        (job.folder / "build_engine.sh").write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        notes["engine"] = "none: TensorRT is not installed here"
    errors = whole.relative_error, whole.largest_error
    return Written(files, whole.shapes, *errors, opset=whole.opset, notes=notes)


def command_of(source: str, engine: str, profile: Sequence[Shapes], *, half: bool) -> str:
    """The `trtexec` call that builds the same engine as `build_engine`."""
    parts = ["trtexec", f"--onnx={source}", f"--saveEngine={engine}", "--sparsity=enable"]
    parts += ["--fp16"] * half
    for kind, shapes in zip(("min", "opt", "max"), profile, strict=True):
        told = (f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
        parts.append(f"--{kind}Shapes={','.join(told)}")
    return shlex.join(parts)


def build_engine(
    source: Path,
    profile: Sequence[Mapping[str, tuple[int, ...]]],
    *,
    half: bool,
    sparse: bool = True,
) -> bytes:
    """An engine from an ONNX file for the least, the usual and the largest shapes of its inputs.

    Raises `UserError` with TensorRT's own message where it cannot read the file or build.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes()):
        raise UserError(f"TensorRT cannot read {source}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if half and hasattr(trt.BuilderFlag, "FP16"):  # version 11 takes types from the network alone
        config.set_flag(trt.BuilderFlag.FP16)
    shapes = builder.create_optimization_profile()
    for name in profile[0]:
        shapes.set_shape(name, *(each[name] for each in profile))
    config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise UserError(f"TensorRT cannot build an engine from {source}; its messages are above")
    return bytes(built)


def check_masks(masks: Masks) -> None:
    """Raise `UserError` for masks that are not 2:4, whose zeros would gain nothing."""
    for layer, _ in masks:
        pattern = masks.patterns.get(layer)
        if pattern is None or (pattern.n, pattern.m) != SPARSE:
            found = "unstructured" if pattern is None else str(pattern)
            raise UserError(
                f"tensorrt: the masks of {layer} are {found}, and sparse tensor cores take 2:4 only; "
                "prune with --pattern 2:4, or export --format onnx"
            )


TENSORRT = Format(
    ("fp16", "fp32"), write, packages=onnx.PACKAGES, extra="onnx", check_masks=check_masks
)
