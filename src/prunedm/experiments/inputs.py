"""Content hashes of a sweep's inputs: a changed file makes another experiment."""

from collections.abc import Iterable
from contextlib import suppress

from prunedm.errors import UserError
from prunedm.experiments.plan import Sweep, case_of, draft_of
from prunedm.experiments.store import inputs_of, inputs_of_evaluation, inputs_of_stages
from prunedm.folder import Model, hash_folder, load
from prunedm.hub import find
from prunedm.model_files.companions import hash_files
from prunedm.options import PATH_OPTIONS, DataOptions
from prunedm.record import file_hash
from prunedm.stages import STAGES
from prunedm.stages.inputs import data_for, data_source
from prunedm.system.places import expanded


def hashes_of(sweep: Sweep) -> dict[str, str]:
    """Hashes of the dense model and of every dataset, model and file that an option names.

    Raises `UserError` for an input that cannot be read.
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
        images = [data_for(model, wanted, split) for split in ("train", "test")]
        parts = [data_source(split).hash.split("-") for split in images]
        return "-".join(part for kind in zip(*parts, strict=True) for part in kind)  # samples first
    path = expanded(value)
    if option == "task_folder":  # the other folders are models
        return hash_files(sorted(file for file in path.rglob("*") if file.is_file()), path)
    return file_hash(path) if path.is_file() else hash_folder(find(value))


def _varied(sweep: Sweep) -> Iterable[str]:
    """The inputs named by values of a grid or a search."""
    for field, value in sweep.values():
        if not any(f".{field}".endswith(f".{name}") for name in PATH_OPTIONS):
            continue
        with suppress(UserError):  # an impossible combination fails on its own
            draft = draft_of(sweep, {field: value})
            recipe, owner = draft.recipe(), draft.owner(field)
            yield from [*inputs_of_stages(recipe), *inputs_of_evaluation(recipe)]
            if owner is not None and not owner.runs:  # runs only with another varied field
                yield from inputs_of(STAGES[owner.verb].options.model_validate(owner.table))
