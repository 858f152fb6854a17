"""onnx: one graph for ONNX Runtime and whatever reads ONNX."""

from prunedm.architecture import answer
from prunedm.deployment import int8, onnx_file
from prunedm.deployment.extras import ONNX as PACKAGES
from prunedm.deployment.runtimes import OnnxDenoiser
from prunedm.deployment.zeros import check_zeros
from prunedm.stages.exporting.job import Format, Job, Written


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
    errors = job.check(answer(denoiser, job.inputs()), path.name)
    return Written([path.name], shapes, *errors, opset=opset, denoiser=denoiser)


ONNX = Format(
    ("fp32", "fp16", "int8"), write_onnx, packages=PACKAGES, extra="onnx", open=OnnxDenoiser
)
