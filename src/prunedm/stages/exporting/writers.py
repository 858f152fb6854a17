"""One writer a format: a file, opened again and run, its zeros looked up in it."""

from collections.abc import Callable
from dataclasses import replace

import torch

from prunedm.architecture import answer
from prunedm.deployment import int8, onnx_file, openvino_file, tensorrt, torch_program
from prunedm.deployment.runtimes import ExportedDenoiser, OnnxDenoiser, OpenVinoDenoiser
from prunedm.deployment.zeros import check_zeros
from prunedm.errors import UserError
from prunedm.folder import PACKED_FILE, load
from prunedm.packed import FLOATS, save_packed
from prunedm.stages.exporting.job import Job, Written


def write_packed(job: Job) -> Written:
    """Values and one bit a weight; prunedm loads it as any model folder."""
    precision = job.options.precision
    assert precision is not None
    save_packed(job.model.denoiser, job.model.masks, job.folder / PACKED_FILE, precision=precision)
    again = load(job.folder)
    again.denoiser.float()
    with torch.no_grad():
        output = answer(again.denoiser, job.inputs())
    errors = job.check(output, PACKED_FILE)
    if precision in FLOATS:
        _check_bits(job, again.denoiser, FLOATS[precision])
    return Written([PACKED_FILE], job.shapes(), *errors)


def write_onnx(job: Job) -> Written:
    path, written = job.folder / "model.onnx", job.options.precision
    if written == "int8":
        whole = job.folder / "float32.onnx"
        onnx_file.write_onnx(job.graph(), job.inputs(2), whole, opset=job.options.opset)
        int8.quantize_onnx(whole, path, job.calibration())
        whole.unlink()
    else:
        onnx_file.write_onnx(job.typed_graph(), job.inputs(2), path, opset=job.options.opset)
    shapes, opset = onnx_file.onnx_shapes(path)
    if job.model.masks is not None:
        check_zeros(onnx_file.onnx_arrays(path), job.model.masks, path.name)
    denoiser = OnnxDenoiser(path, job.model.denoiser.config, precision=str(written))
    errors = job.check(_run(job, denoiser), path.name)
    return Written([path.name], shapes, *errors, opset=opset, denoiser=denoiser)


def write_openvino(job: Job) -> Written:
    path, written = job.folder / "model.xml", str(job.options.precision)
    model = openvino_file.to_openvino(job.graph(), job.inputs(2))
    if written == "int8":
        assert job.data is not None
        model = int8.quantize_openvino(model, job.calibration(), len(job.data.calibration))
    openvino_file.write_openvino(model, path, half=written != "fp32")
    if job.model.masks is not None:
        check_zeros(openvino_file.openvino_arrays(path), job.model.masks, path.name)
    denoiser = OpenVinoDenoiser(path, job.model.denoiser.config, precision=written)
    errors = job.check(_run(job, denoiser), path.name)
    files = [path.name, path.with_suffix(".bin").name]
    return Written(files, job.shapes(), *errors, denoiser=denoiser)


def write_torch(job: Job) -> Written:
    path = job.folder / "model.pt2"
    torch_program.write_program(job.typed_graph(), job.inputs(2), path)
    if job.model.masks is not None:
        check_zeros(torch_program.program_arrays(path), job.model.masks, path.name)
    errors = job.check(torch_program.run_program(path, job.inputs()), path.name)
    return Written([path.name], job.shapes(), *errors)


def write_tensorrt(job: Job) -> Written:
    """An engine where TensorRT is installed; the ONNX file and the command for it anywhere."""
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


WRITERS: dict[str, Callable[[Job], Written]] = {
    "packed": write_packed,
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch": write_torch,
    "tensorrt": write_tensorrt,
}


def _run(job: Job, denoiser: ExportedDenoiser) -> torch.Tensor:
    return answer(denoiser, job.inputs())


def _check_bits(job: Job, again: torch.nn.Module, dtype: torch.dtype) -> None:
    """What was loaded again is the model in that type, to the bit."""
    own = job.model.denoiser.state_dict()
    for name, tensor in again.state_dict().items():
        due = own[name].to(dtype).to(tensor.dtype) if own[name].is_floating_point() else own[name]
        if not torch.equal(tensor, due):
            raise UserError(f"{PACKED_FILE}: {name} does not load as it was saved; report this")
