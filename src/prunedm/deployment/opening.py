"""A model to sample from: a model folder, or an exported one with its runtime behind it."""

from pathlib import Path

from prunedm.deployment.description import read_description
from prunedm.deployment.runtimes import open_file
from prunedm.folder import EXPORT_FILE, Model, hash_folder, load
from prunedm.model_files.configs import read_network_config
from prunedm.model_files.schedule import find_scheduler
from prunedm.record import read_record


def open_model(source: str | Path, *, scheduler: str | Path | None = None) -> Model:
    """As `folder.load`, and exported folders too. Raises `UserError` for those without a runtime."""
    folder = Path(source).expanduser()
    if not (folder / EXPORT_FILE).is_file():
        return load(source, scheduler=scheduler)
    description = read_description(folder)
    if description.format == "packed":
        return load(source, scheduler=scheduler)
    found = find_scheduler(folder, scheduler)
    return Model(
        denoiser=open_file(description, folder, read_network_config(folder)).eval(),
        scheduler=found.scheduler,
        scheduler_file=found.file if scheduler else None,
        scheduler_assumed=found.assumed,
        notes=(found.note,) if found.note else (),
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder),
    )
