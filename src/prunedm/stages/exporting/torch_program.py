"""torch: a program of torch.export, which PyTorch loads without this package."""

from prunedm.deployment import torch_program
from prunedm.deployment.zeros import check_zeros
from prunedm.stages.exporting.job import Format, Job, Written


def write(job: Job) -> Written:
    path = job.folder / "model.pt2"
    torch_program.write_program(job.typed_graph(), job.inputs(2), path)
    if job.model.masks is not None:
        check_zeros(torch_program.program_arrays(path), job.model.masks, path.name)
    errors = job.check(torch_program.run_program(path, job.inputs()), path.name)
    return Written([path.name], job.shapes(), *errors)


TORCH = Format(("fp32", "fp16", "bf16"), write)
