"""export.json: the contents of an exported folder, for whoever runs it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from prunedm.errors import UserError
from prunedm.folder import EXPORT_FILE as FILE
from prunedm.reading import read_as, read_object
from prunedm.record import Source, file_hash, write_json
from prunedm.system.places import located, portable

VERSION = 1


class Description(BaseModel):
    """One exported denoiser: `(sample, timestep[, class_labels]) -> output`, with float32 at both ends.

    `shapes`: of inputs and output by name; "batch" is any number. `files`: name -> hash, the one to
    open first. `relative_error` and `largest_error` come from the check at export.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    format: str
    precision: str
    files: dict[str, str] = Field(min_length=1)
    shapes: dict[str, list[int | str]]
    source: Source
    pipeline: str = "DDPMPipeline"  # diffusers' class, to save a packed model again
    opset: int | None = None
    pattern: str = ""  # of the masks whose zeros the file has
    relative_error: float
    largest_error: float
    tolerance: float

    @property
    def file(self) -> str:
        return next(iter(self.files))


def write_description(description: Description, folder: Path) -> None:
    """`source` becomes relative to `folder`, or to the final place of a working folder."""
    source = description.source
    told = source.model_copy(update={"path": portable(source.path, folder)})
    write_json(
        description.model_copy(update={"source": told}).model_dump(mode="json"), folder / FILE
    )


def read_description(folder: Path) -> Description:
    """Raises `UserError` where it is damaged or of another version, or a file is missing or changed."""
    path = folder / FILE
    try:
        version = read_object(path).get("version")
    except UserError as error:
        raise UserError(
            f"{path} is missing or damaged ({error}); export the model again"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{folder} was exported in version {version}, this prunedm reads {VERSION}; "
            "export the model again"
        )
    description = read_as(Description, path, "export the model again")
    description.source.path = located(description.source.path, folder)
    for name, due in description.files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{folder} has no {name}; export the model again, or copy all of it")
        if file_hash(file) != due:
            raise UserError(f"{file} is damaged or not the file that was exported; export it again")
    return description
