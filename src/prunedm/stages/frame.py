"""The frame around every stage: done already, resume, or make; aside first, renamed when whole."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from prunedm.errors import Changed, UserError
from prunedm.options import Options
from prunedm.progress import Progress
from prunedm.record import Record, Source, environment, read_record
from prunedm.stages.workplace import RESUME, Workplace
from prunedm.training import processes

__all__ = ["RESUME", "Plan", "Request", "run_stage", "status"]
O_co = TypeVar("O_co", bound=Options, covariant=True)

Models = str | Path | Mapping[str, str | Path]  # one by name, or several by label
Known = Callable[[dict[str, Any] | None], dict[str, Any] | None]  # an identity, completed


@dataclass(frozen=True)
class Request(Generic[O_co]):
    """A call of a verb. title: heading of the report, where the verb writes one."""

    source: Any  # Models, as the verb reads them
    out: Path
    options: O_co
    progress: Progress
    overwrite: bool = False
    title: str = ""


@dataclass(frozen=True)
class Plan:
    """What decides a result, and `make`, which writes it into a working folder.

    options: as they came to be, with every default filled in. inputs: what was read, by role.
    parent: the record of the model that this one is made from. complete: whether a result is without
    failures; of one that is not, `overwrite` makes the same again.
    """

    options: Options
    inputs: dict[str, Source]
    make: Callable[[Path], dict[str, Any]]
    parent: Record | None = None
    complete: Callable[[Path], bool] = lambda out: True

    def record(self, verb: str) -> Record:
        """The record to be, without what came out."""
        lineage = self.parent.lineage() if self.parent else []
        return Record(
            stage=verb,
            options=self.options.identity(),
            inputs=self.inputs,
            seed=getattr(self.options, "seed", None),
            history=[r.model_copy(update={"history": []}) for r in lineage],
        )


def run_stage(
    verb: str, plan: Plan, out: str | Path, *, overwrite: bool = False
) -> tuple[Record, bool]:
    """Make `out` unless it is there already; returns its record and whether anything was made.

    `plan.make` writes its result into the working folder, `<out>.partial`, and returns the figures of
    the record. What it leaves in `resume/` survives an interruption, and is gone when the stage is
    done; without it, a failed stage leaves nothing. Raises `Changed` where `out` holds another
    result, which `overwrite` replaces, and `UserError` for anything that is not ours, which is never
    touched. An unfinished `<out>.partial` of what is asked for now was allowed to replace `out` when
    it was begun; a whole one only takes its place (workplace.py).
    Of several processes of one job the first writes; the others share its work. Another command
    that makes `out` meanwhile is refused.
    """
    place, record = Workplace.of(out), plan.record(verb)
    known = partial(_completed, options=plan.options, inputs=plan.inputs)
    found = _existing(place, record, known, overwrite, plan.complete)
    if found is not None:
        if processes.rank() == 0:
            place.tidy()
        return found, False
    with place.held() if processes.rank() == 0 else nullcontext():
        processes.wait_for_all()  # no other command changes anything any more
        place = Workplace.of(out)
        found = _existing(place, record, known, overwrite, plan.complete)
        if found is not None:  # made meanwhile
            return found, False
        return _finished(place, record, known, plan, overwrite=overwrite)


def _finished(
    place: Workplace, record: Record, known: Known, plan: Plan, *, overwrite: bool
) -> tuple[Record, bool]:
    """The record of what is now in its place, and whether it was made now."""
    whole = place.whole()
    is_whole = whole is not None and known(whole.identity) == record.identity
    processes.wait_for_all()  # all have looked; now the first may change what is there
    if processes.rank() > 0:
        return _help(place, plan, is_whole=is_whole), not is_whole
    if not is_whole:
        record = _made(place, record, known, plan, overwrite=overwrite)
    place.finish()
    processes.wait_for_all()
    return _record_of(place.out) if is_whole else record, not is_whole


def status(verb: str, plan: Plan, out: str | Path) -> str:
    """What `run_stage` would do: "" where `out` is done, else why it is not, in words.

    Raises `UserError` where `out` holds no result of ours.
    """
    place, record = Workplace.of(out), plan.record(verb)
    known = partial(_completed, options=plan.options, inputs=plan.inputs)
    found = _found(place)
    before = known(found.identity if found else None)
    if found is not None and before == record.identity:
        return ""
    if known(place.unfinished()) == record.identity:
        whole = place.whole() is not None
        return "is whole, and takes its place" if whole else "goes on from its checkpoint"
    if before is not None:
        return f"again: it is of {_difference(before, record.identity)}"
    return "to do"


def _made(place: Workplace, record: Record, known: Known, plan: Plan, *, overwrite: bool) -> Record:
    """The whole record of what was written into the working folder."""
    try:
        _open(place, record, known, overwrite)
        before, started = place.spent(), time.monotonic()
        processes.wait_for_all()
        figures = plan.make(place.partial)
        seconds = round(before + time.monotonic() - started, 2)
        record = record.model_copy(
            update={"figures": figures, "wall_time_s": seconds}
            | environment(getattr(plan.options, "device", "cpu"))
        )
        place.set_whole(record)
    except BaseException:
        place.give_up()
        raise
    return record


def _help(place: Workplace, plan: Plan, *, is_whole: bool) -> Record:
    """What every process but the first does: the same work, and nothing written."""
    if not is_whole:
        processes.wait_for_all()
        if not (place.partial / RESUME).is_dir():
            raise UserError(
                f"process {processes.rank()} does not see {place.partial}, which the first one made; "
                "give all machines one shared folder"
            )
        with processes.place_to_write(place.partial, RESUME) as folder:
            plan.make(folder)
    processes.wait_for_all()
    return _record_of(place.out)


def _record_of(out: Path) -> Record:
    record = read_record(out)
    assert record is not None
    return record


def _completed(
    identity: dict[str, Any] | None, options: Options, inputs: dict[str, Source]
) -> dict[str, Any] | None:
    """An identity with what came after it was written.

    That is options, at their defaults, and the second part of a dataset's hash, which is of every
    byte: where the first is of what is asked for now, so is the second.
    """
    if identity is None:
        return None
    defaults = type(options).model_construct().identity()
    now = {role: source.hash for role, source in inputs.items()}
    hashes = {
        role: now[role] if now.get(role, "").startswith(f"{found}-") else found
        for role, found in identity["inputs"].items()
    }
    return identity | {"options": defaults | identity["options"], "inputs": hashes}


def _existing(
    place: Workplace,
    record: Record,
    known: Known,
    overwrite: bool,
    complete: Callable[[Path], bool],
) -> Record | None:
    """The record of a finished `out` that is just what was asked for; None where it can be made."""
    out, found = place.out, _found(place)
    if found is None:
        return None
    before = known(found.identity)
    assert before is not None
    if before == record.identity and not (overwrite and not complete(out)):
        return found
    if overwrite or known(place.unfinished()) == record.identity:
        return None
    what = _difference(before, record.identity)
    message = f"{out} exists and holds {what}; give another folder, or --overwrite"
    raise Changed(message, what)


def _found(place: Workplace) -> Record | None:
    """The record of what `out` holds; None where there is nothing."""
    if not place.has_content():
        return None
    found = read_record(place.out) if place.out.is_dir() else None
    if found is None and not (place.is_within and place.whole()):  # else half of it is moved
        raise UserError(f"{place.out} exists and holds no result of prunedm; give another folder")
    return found


def _open(place: Workplace, record: Record, known: Known, overwrite: bool) -> None:
    """The working folder: kept from an interrupted run of the same identity, else new."""
    unfinished = None if overwrite else known(place.unfinished())
    if overwrite and _is_of(place, record, known):
        return
    if unfinished is None:
        place.begin(record.identity)
    elif unfinished != record.identity:
        difference = _difference(unfinished, record.identity)
        message = (
            f"{place.partial} is an unfinished run with {difference}; finish that one, "
            "give another folder, or --overwrite"
        )
        raise Changed(message, difference)


def _is_of(place: Workplace, record: Record, known: Known) -> bool:
    """Whether just this was begun there; what cannot be read was not."""
    try:
        return known(place.unfinished()) == record.identity
    except UserError:
        return False


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    if old["stage"] != new["stage"]:
        return f"the result of {old['stage']}, not of {new['stage']}"
    for key in old["options"] | new["options"]:
        before, now = old["options"].get(key), new["options"].get(key)
        if before != now:
            return f"another {key} ({before!r}, now {now!r})"
    for role in old["inputs"] | new["inputs"]:
        if old["inputs"].get(role) != new["inputs"].get(role):
            return f"another {role} (its content has changed)"
    return "the same"
