"""What a sweep's runs read, by the hash of its content: a changed file is another experiment."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunedm.experiments.plan import Sweep, case_of
from prunedm.experiments.store import INPUTS, inputs_of
from prunedm.folder import Model, hash_folder, load
from prunedm.hub import find
from prunedm.options import DataOptions
from prunedm.record import file_hash
from prunedm.stages.inputs import data_source, images_for


def hashes_of(sweep: Sweep) -> dict[str, str]:
    """The dense model's, and those of every dataset, teacher and file of masks that is named.

    Raises `UserError` for one that cannot be read.
    """
    base = case_of(sweep, {}).recipe
    model = load(base.model)
    names = set(inputs_of(base)) | set(_varied(sweep))
    hashes = {name: _hash(name, model, base) for name in sorted(names)}
    return {"model": model.hash} | hashes


def _hash(name: str, model: Model, options: DataOptions) -> str:
    kind, _, value = name.partition(" ")
    if kind == "dataset":
        wanted = options.model_copy(update={"dataset": value})
        images = [images_for(model, wanted, split) for split in ("train", "test")]
        return "-".join(data_source(split).hash for split in images)
    path = Path(value).expanduser()
    return file_hash(path) if path.is_file() else hash_folder(find(value))


def _varied(sweep: Sweep) -> Iterable[str]:
    """The same names among the values of a grid or a search."""
    for field, value in _values(sweep):
        kind = field.rpartition(".")[2]
        if kind in INPUTS and value and f"{kind} {value}" not in ("teacher auto", "teacher none"):
            yield f"{kind} {value}"


def _values(sweep: Sweep) -> Iterable[tuple[str, Any]]:
    for name, space in (sweep.search.space if sweep.search else {}).items():
        yield from ((name, value) for value in space if isinstance(space, list))
    for name, points in sweep.grid.items():
        if isinstance(points, dict):
            yield from (pair for settings in points.values() for pair in settings.items())
        else:
            yield from ((name, value) for value in points)
