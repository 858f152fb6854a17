"""openvino: Intel's runtime; bf16 and int8 where the CPU has them."""

from prunedm.architecture import answer
from prunedm.deployment import int8, openvino_file
from prunedm.deployment.extras import OPENVINO as PACKAGES
from prunedm.deployment.runtimes import OpenVinoDenoiser
from prunedm.deployment.zeros import check_zeros
from prunedm.stages.exporting.job import Format, Job, Written


def write(job: Job) -> Written:
    path, written = job.folder / "model.xml", str(job.options.precision)
    model = openvino_file.to_openvino(job.graph(), job.inputs(2))
    if written == "int8":
        assert job.data is not None
        model = int8.quantize_openvino(model, job.calibration(), len(job.data.calibration))
    openvino_file.write_openvino(model, path, half=written != "fp32")
    if job.model.masks is not None:
        check_zeros(openvino_file.openvino_arrays(path), job.model.masks, path.name)
    denoiser = OpenVinoDenoiser(path, job.model.denoiser.config, precision=written)
    errors = job.check(answer(denoiser, job.inputs()), path.name)
    files = [path.name, path.with_suffix(".bin").name]
    return Written(files, job.shapes(), *errors, denoiser=denoiser)


OPENVINO = Format(
    ("bf16", "fp32", "fp16", "int8"),
    write,
    packages=PACKAGES,
    int8_packages=("nncf",),
    extra="openvino",
    open=OpenVinoDenoiser,
)
