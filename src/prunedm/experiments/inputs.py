"""What a sweep's runs read, by the hash of its content: a changed file is another experiment."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from prunedm.errors import UserError
from prunedm.experiments.plan import Sweep, case_of, draft_of
from prunedm.experiments.store import inputs_of, inputs_of_evaluation, inputs_of_stages
from prunedm.folder import Model, hash_folder, load
from prunedm.hub import find
from prunedm.options import PATH_OPTIONS, DataOptions
from prunedm.record import file_hash
from prunedm.stages import STAGES
from prunedm.stages.inputs import data_source, images_for
from prunedm.system.places import expanded


def hashes_of(sweep: Sweep) -> dict[str, str]:
    """The dense model's, and those of every dataset, model and file that an option names.

    Raises `UserError` for one that cannot be read.
    """
    base = case_of(sweep, {}).recipe
    model = load(base.model)
    names = {*inputs_of_stages(base), *inputs_of_evaluation(base), *_varied(sweep)}
    hashes = {name: _hash(name, model, base) for name in sorted(names)}
    return {"model": model.hash} | hashes


def _hash(name: str, model: Model, options: DataOptions) -> str:
    option, _, value = name.partition(" ")
    if option == "dataset":
        wanted = options.model_copy(update={"dataset": value})
        images = [images_for(model, wanted, split) for split in ("train", "test")]
        parts = [data_source(split).hash.split("-") for split in images]
        return "-".join(part for kind in zip(*parts, strict=True) for part in kind)  # samples first
    path = expanded(value)
    return file_hash(path) if path.is_file() else hash_folder(find(value))


def _varied(sweep: Sweep) -> Iterable[str]:
    """The same names among the values of a grid or a search."""
    for field, value in _values(sweep):
        if field.rpartition(".")[2] not in PATH_OPTIONS:
            continue
        with suppress(UserError):  # a combination that is impossible fails by itself
            draft = draft_of(sweep, {field: value})
            recipe, owner = draft.recipe(), draft.owner(field)
            yield from [*inputs_of_stages(recipe), *inputs_of_evaluation(recipe)]
            if owner is not None and not owner.runs:  # it is run only with another varied field
                yield from inputs_of(STAGES[owner.verb].options.model_validate(owner.table))


def _values(sweep: Sweep) -> Iterable[tuple[str, Any]]:
    for name, space in (sweep.search.space if sweep.search else {}).items():
        yield from ((name, value) for value in space if isinstance(space, list))
    for name, points in sweep.grid.items():
        if isinstance(points, dict):
            yield from (pair for settings in points.values() for pair in settings.items())
        else:
            yield from ((name, value) for value in points)
