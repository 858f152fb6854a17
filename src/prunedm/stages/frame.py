"""The frame around every stage: done already, resume, or make; aside first, renamed when whole."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prunedm.errors import Changed, NotDone, UserError
from prunedm.options import Options
from prunedm.record import Record, Source, environment, read_record
from prunedm.stages.workplace import RESUME, Workplace
from prunedm.training import processes

__all__ = ["RESUME", "Overwrite", "identifying", "run_stage"]
# options that change how a result is made but not what it is
_NOT_IDENTITY = {
    "device", "workers", "checkpoint_every", "trust_features",
    "tracker", "tracker_project", "tracker_mode", "track_images",
}  # fmt: skip

Make = Callable[[Path], dict[str, Any]]  # working folder -> figures
Known = Callable[[dict[str, Any] | None], dict[str, Any] | None]  # an identity, completed
Overwrite = bool | Literal["look"]  # "look": make nothing, raise NotDone where there is work


def _complete(out: Path) -> bool:
    return True


def run_stage(
    stage: str,
    out: str | Path,
    *,
    options: Options,
    inputs: dict[str, Source],
    make: Make,
    parent: Record | None = None,
    overwrite: Overwrite = False,
    complete: Callable[[Path], bool] = _complete,
) -> tuple[Record, bool]:
    """Make `out` unless it is there already; returns its record and whether anything was made.

    `make` writes its result into the working folder, `<out>.partial`, and returns the figures of
    the record. What it leaves in `resume/` survives an interruption, and is gone when the stage is
    done; without it, a failed stage leaves nothing. Raises `Changed` where `out` holds another
    result, which `overwrite` replaces, and `UserError` for anything that is not ours, which is never
    touched. Of a result that is not `complete`, `overwrite` makes the same one again. An unfinished
    `<out>.partial` of what is asked for now was allowed to replace `out` when it was begun; a whole
    one only takes its place (workplace.py).
    Of several processes of one job the first writes; the others share its work. Another command
    that makes `out` meanwhile is refused.
    """
    place = Workplace.of(out)
    record = Record(
        stage=stage,
        options=identifying(options),
        inputs=inputs,
        seed=getattr(options, "seed", None),
        history=[r.model_copy(update={"history": []}) for r in parent.lineage()] if parent else [],
    )
    known = partial(_completed, options=options, inputs=inputs)
    if overwrite == "look":
        return _look(place, record, known), False
    found = _existing(place, record, known, overwrite, complete)
    if found is not None:
        if processes.rank() == 0:
            place.tidy()
        return found, False
    with place.held() if processes.rank() == 0 else nullcontext():
        processes.wait_for_all()  # no other command changes anything any more
        place = Workplace.of(out)
        found = _existing(place, record, known, overwrite, complete)
        if found is not None:  # made meanwhile
            return found, False
        return _finished(place, record, known, options=options, make=make, overwrite=overwrite)


def _finished(
    place: Workplace,
    record: Record,
    known: Known,
    *,
    options: Options,
    make: Make,
    overwrite: Overwrite,
) -> tuple[Record, bool]:
    """The record of what is now in its place, and whether it was made now."""
    whole = place.whole()
    is_whole = whole is not None and known(whole.identity) == record.identity
    processes.wait_for_all()  # all have looked; now the first may change what is there
    if processes.rank() > 0:
        return _help(place, make, is_whole=is_whole), not is_whole
    if not is_whole:
        record = _made(place, record, known, options=options, make=make, overwrite=overwrite)
    place.finish()
    processes.wait_for_all()
    return _record_of(place.out) if is_whole else record, not is_whole


def _made(
    place: Workplace,
    record: Record,
    known: Known,
    *,
    options: Options,
    make: Make,
    overwrite: Overwrite,
) -> Record:
    """The whole record of what `make` has written into the working folder."""
    try:
        _open(place, record, known, bool(overwrite))
        before, started = place.spent(), time.monotonic()
        processes.wait_for_all()
        figures = make(place.partial)
        seconds = round(before + time.monotonic() - started, 2)
        record = record.model_copy(
            update={"figures": figures, "wall_time_s": seconds}
            | environment(getattr(options, "device", "cpu"))
        )
        place.set_whole(record)
    except BaseException:
        place.give_up()
        raise
    return record


def _help(place: Workplace, make: Make, *, is_whole: bool) -> Record:
    """What every process but the first does: the same work, and nothing written."""
    if not is_whole:
        processes.wait_for_all()
        if not (place.partial / RESUME).is_dir():
            raise UserError(
                f"process {processes.rank()} does not see {place.partial}, which the first one made; "
                "give all machines one shared folder"
            )
        with processes.place_to_write(place.partial, RESUME) as folder:
            make(folder)
    processes.wait_for_all()
    return _record_of(place.out)


def _record_of(out: Path) -> Record:
    record = read_record(out)
    assert record is not None
    return record


def identifying(options: Options) -> dict[str, Any]:
    """The options that decide what a result is."""
    return options.model_dump(mode="json", exclude=_NOT_IDENTITY)


def _completed(
    identity: dict[str, Any] | None, options: Options, inputs: dict[str, Source]
) -> dict[str, Any] | None:
    """An identity with what came after it was written.

    That is options, at their defaults, and the second part of a dataset's hash, which is of every
    byte: where the first is of what is asked for now, so is the second.
    """
    if identity is None:
        return None
    defaults = type(options).model_construct().model_dump(mode="json", exclude=_NOT_IDENTITY)
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


def _look(place: Workplace, record: Record, known: Known) -> Record:
    """The record of `out` where it is done. Raises `NotDone` in words for a table of stages."""
    found = _found(place)
    before = known(found.identity if found else None)
    if found is not None and before == record.identity:
        return found
    if known(place.unfinished()) == record.identity:
        whole = place.whole() is not None
        raise NotDone("is whole, and takes its place" if whole else "goes on from its checkpoint")
    if before is not None:
        raise NotDone(f"again: it is of {_difference(before, record.identity)}")
    raise NotDone("to do")


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
