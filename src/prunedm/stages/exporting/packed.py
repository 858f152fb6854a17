"""packed: kept values and one bit per weight; prunedm loads it like any model folder."""

import torch

from prunedm.architecture import answer
from prunedm.errors import UserError
from prunedm.folder import PACKED_FILE, load
from prunedm.packed import FLOATS, save_packed
from prunedm.stages.exporting.job import ExportJob, Format, Written


def write(job: ExportJob) -> Written:
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


def _check_bits(job: ExportJob, again: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise `UserError` unless the loaded model equals the saved one in that type, bit by bit."""
    own = job.model.denoiser.state_dict()
    for name, tensor in again.state_dict().items():
        due = own[name].to(dtype).to(tensor.dtype) if own[name].is_floating_point() else own[name]
        if not torch.equal(tensor, due):
            raise UserError(f"{PACKED_FILE}: {name} does not load as it was saved; report this")


PACKED = Format(("fp16", "fp32", "bf16", "int8"), write, texts=True)
