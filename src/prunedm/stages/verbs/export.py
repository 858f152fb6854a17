"""export: one file for another runtime, checked by running it next to the model."""

from pathlib import Path
from typing import Any

from prunedm.deployment.description import Description, write_description
from prunedm.errors import UserError
from prunedm.folder import Model, save_config
from prunedm.options import ExportOptions
from prunedm.record import file_hash
from prunedm.stages.exporting.job import Data, ExportJob, Format, Written, quiet
from prunedm.stages.exporting.quality import before_and_after
from prunedm.stages.frame import Plan, Request
from prunedm.stages.inputs import given_model, model_sources, source_of
from prunedm.tables import FORMATS


def export(request: Request[ExportOptions]) -> Plan:
    """Write `source` as `options.format` into folder `out`, with export.json next to it.

    The file is opened again, run on fixed noise at timesteps from the first to the last, and
    searched for the zeros of the masks. Raises `UserError` where the result differs by more than the
    tolerance, zeros are lost, or (before any work) a package is missing.
    """
    options, progress = request.options.filled(), request.progress
    kind: Format = FORMATS[options.format]
    kind.require(options.format, str(options.precision))
    model = given_model(request.source, options, progress)
    if model.tokenizer is not None and not kind.texts:
        raise UserError(
            f"--format {options.format} is for denoisers; of a language model prunedm writes packed "
            "files, and optimum-cli makes ONNX and OpenVINO ones of its folder"
        )
    if model.masks is not None:
        kind.check_masks(model.masks)
    data = (
        Data.of(model, options)
        if options.precision == "int8" and options.format != "packed"
        else None
    )

    def make(folder: Path) -> dict[str, Any]:
        return _make(ExportJob(model, options, folder, progress, data))

    inputs = model_sources(model) | (data.sources if data else {})
    return Plan(options=options, inputs=inputs, parent=model.record, make=make)


def _make(job: ExportJob) -> dict[str, Any]:
    """Write, check and describe the file; returns the record's figures."""
    model, options, folder = job.model, job.options, job.folder
    save_config(model, folder)
    job.progress.say(f"writing {options.format} in {options.precision}, and running it")
    with quiet():
        written: Written = FORMATS[options.format].write(job)
    description = Description(
        format=options.format,
        precision=str(options.precision),
        files={name: file_hash(folder / name) for name in written.files},
        shapes=written.shapes,
        source=source_of(model),
        pipeline=model.pipeline,
        opset=written.opset,
        pattern=model.masks.pattern_text if model.masks else "",
        relative_error=written.relative_error,
        largest_error=written.largest_error,
        tolerance=float(options.tolerance or 0),
    )
    write_description(description, folder)
    sizes = _sizes(model, [folder / name for name in written.files])
    quality = before_and_after(job, written.denoiser) if job.data and written.denoiser else {}
    return sizes | written.figures() | quality


def _sizes(model: Model, files: list[Path]) -> dict[str, Any]:
    """Bytes written, and the bytes of the parameters in half precision."""
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    written = sum(file.stat().st_size for file in files)
    return {
        "bytes": written,
        "bytes_fp16": 2 * parameters,
        "share_of_fp16": written / (2 * parameters),
    }
