"""A model to sample from: a model folder, or an exported one with its runtime behind it."""

from pathlib import Path

from prunedm.deployment.description import read_description
from prunedm.deployment.runtimes import open_file
from prunedm.folder import EXPORT_FILE, Model, hash_folder, load, load_scheduler, read_config
from prunedm.record import read_record


def open_model(source: str | Path) -> Model:
    """As `folder.load`, and exported folders too. Raises `UserError` for those without a runtime."""
    folder = Path(source).expanduser()
    if not (folder / EXPORT_FILE).is_file():
        return load(source)
    description = read_description(folder)
    if description.format == "packed":
        return load(source)
    return Model(
        denoiser=open_file(description, folder, read_config(folder)).eval(),
        scheduler=load_scheduler(folder),
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder),
    )
