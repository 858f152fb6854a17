"""TensorRT: an engine that may use sparse tensor cores, from an ONNX file.

TensorRT looks at the weights itself and tries its sparse kernels on layers whose groups of four
input channels hold at most two non-zeros (NVIDIA 2021, "Accelerating Inference with Sparsity Using
the Ampere Architecture and TensorRT"); it keeps them where they are faster on the GPU at hand. An
engine is of one GPU and one version of TensorRT, so it is built where it will run.
"""

import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from prunedm.errors import UserError

Shapes = Mapping[str, list[int | str]]  # of the ONNX file's inputs; words are free sizes


def is_installed() -> bool:
    """Whether TensorRT's Python package is there; a GPU is needed besides."""
    return find_spec("tensorrt") is not None


def command(onnx: str, engine: str, inputs: Shapes, *, batch: int, half: bool) -> str:
    """The `trtexec` call that builds the same engine as `build_engine`."""
    parts = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--sparsity=enable"]
    parts += ["--fp16"] * half
    for kind, size in (("min", 1), ("opt", batch), ("max", batch)):
        shapes = (f"{name}:{'x'.join(map(str, _sized(s, size)))}" for name, s in inputs.items())
        parts.append(f"--{kind}Shapes={','.join(shapes)}")
    return shlex.join(parts)


def build_engine(onnx: Path, engine: Path, inputs: Shapes, *, batch: int, half: bool) -> None:
    """Build and write an engine for batches of 1 to `batch`, tuned for the largest.

    Raises `UserError` with TensorRT's own message where it cannot read the file or build.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx.read_bytes()):
        raise UserError(f"TensorRT cannot read {onnx}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if half and hasattr(trt.BuilderFlag, "FP16"):  # version 11 takes types from the network alone
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        profile.set_shape(name, _sized(shape, 1), _sized(shape, batch), _sized(shape, batch))
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise UserError(f"TensorRT cannot build an engine from {onnx}; its messages are above")
    engine.write_bytes(bytes(built))


def _sized(shape: list[int | str], batch: int) -> tuple[int, ...]:
    return tuple(batch if isinstance(size, str) else size for size in shape)
