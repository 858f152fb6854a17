"""The frame around every stage: done already, resume, or make; aside first, renamed when whole."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prunedm.errors import Changed, NotDone, UserError
from prunedm.options import Options
from prunedm.record import Record, Source, environment, read_record, write_json, write_record
from prunedm.training import processes

PARTIAL = ".partial"  # <out>.partial holds a stage's work until it is whole
RESUME = "resume"  # in there: what an interrupted stage goes on from
_IDENTITY = "identity.json"
_CLOCK = "clock.json"  # when this session began, and the seconds of those before it
_SPENT = "spent"
# options that change how a result is made but not what it is
_NOT_IDENTITY = {
    "device", "workers", "checkpoint_every", "trust_features",
    "tracker", "tracker_project", "tracker_mode", "track_images",
}  # fmt: skip

Make = Callable[[Path], dict[str, Any]]  # working folder -> figures
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
    `<out>.partial` of what is asked for now was allowed to replace `out` when it was begun.
    Of several processes the first writes; the others share its work.
    """
    out = Path(out).absolute()  # "." has no name to put ".partial" behind
    record = Record(
        stage=stage,
        options=identifying(options),
        inputs=inputs,
        seed=getattr(options, "seed", None),
        history=[r.model_copy(update={"history": []}) for r in parent.lineage()] if parent else [],
    )
    partial = out.with_name(out.name + PARTIAL)
    if overwrite == "look":
        return _look(out, partial, record), False
    found = _existing(out, partial, record, overwrite, complete)
    if found is not None:
        return found, False
    processes.wait_for_all()  # all have looked; now the first may change what is there
    if processes.rank() > 0:
        return _help(out, partial, make), True
    try:
        _open(partial, record, overwrite)
        before, started = _spent(partial), time.monotonic()
        processes.wait_for_all()
        figures = make(partial)
        seconds = round(before + time.monotonic() - started, 2)
        record = record.model_copy(
            update={"figures": figures, "wall_time_s": seconds}
            | environment(getattr(options, "device", "cpu"))
        )
        write_record(record, partial)
    except BaseException:
        if not _resumable(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / RESUME).rename(partial / _SPENT)  # at once: half of it must not be resumed from
    shutil.rmtree(partial / _SPENT)
    (partial / _IDENTITY).unlink()
    (partial / _CLOCK).unlink()
    if out.exists():
        shutil.rmtree(out)  # empty, or --overwrite was given; and the new result is whole
    partial.rename(out)
    processes.wait_for_all()
    return record, True


def _help(out: Path, partial: Path, make: Make) -> Record:
    """What every process but the first does: the same work, and nothing written."""
    processes.wait_for_all()
    if not (partial / RESUME).is_dir():
        raise UserError(
            f"process {processes.rank()} does not see {partial}, which the first one made; give all "
            "machines one shared folder"
        )
    with processes.place_to_write(partial, RESUME) as folder:
        make(folder)
    processes.wait_for_all()
    record = read_record(out)
    assert record is not None
    return record


def identifying(options: Options) -> dict[str, Any]:
    """The options that decide what a result is."""
    return options.model_dump(mode="json", exclude=_NOT_IDENTITY)


def _existing(
    out: Path, partial: Path, record: Record, overwrite: bool, complete: Callable[[Path], bool]
) -> Record | None:
    """The record of a finished `out` that is just what was asked for; None where it can be made."""
    found = _found(out)
    if found is None:
        return None
    if found.identity == record.identity and not (overwrite and not complete(out)):
        return found
    if overwrite or _unfinished(partial) == record.identity:
        return None
    what = _difference(found.identity, record.identity)
    message = f"{out} exists and holds {what}; give another folder, or --overwrite"
    raise Changed(message, what)


def _look(out: Path, partial: Path, record: Record) -> Record:
    """The record of `out` where it is done. Raises `NotDone` in words for a table of stages."""
    found = _found(out)
    if found is not None and found.identity == record.identity:
        return found
    if _unfinished(partial) == record.identity:
        raise NotDone("goes on from its checkpoint")
    if found is not None:
        raise NotDone(f"again: it is of {_difference(found.identity, record.identity)}")
    raise NotDone("to do")


def _found(out: Path) -> Record | None:
    """The record of what `out` holds; None where there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    found = read_record(out) if out.is_dir() else None
    if found is None:
        raise UserError(f"{out} exists and holds no result of prunedm; give another folder")
    return found


def _unfinished(partial: Path) -> dict[str, Any] | None:
    """The identity of what waits in the working folder to be gone on with."""
    if not _resumable(partial):
        return None
    identity: dict[str, Any] = json.loads((partial / _IDENTITY).read_text(encoding="utf-8"))
    return identity


def _open(partial: Path, record: Record, overwrite: bool) -> None:
    """The working folder: kept from an interrupted run of the same identity, else new."""
    unfinished = _unfinished(partial)
    if unfinished is not None and not overwrite:
        if unfinished != record.identity:
            difference = _difference(unfinished, record.identity)
            message = (
                f"{partial} is an unfinished run with {difference}; finish that one, "
                "give another folder, or --overwrite"
            )
            raise Changed(message, difference)
        return
    shutil.rmtree(partial, ignore_errors=True)
    (partial / RESUME).mkdir(parents=True)
    write_json(record.identity, partial / _IDENTITY)


def _spent(partial: Path) -> float:
    """Seconds of the sessions before this one, which begins now.

    A session that was killed lasted until it last wrote what can be gone on with.
    """
    clock, spent = partial / _CLOCK, 0.0
    if clock.exists():
        earlier = json.loads(clock.read_text(encoding="utf-8"))
        last = max((p.stat().st_mtime for p in (partial / RESUME).rglob("*")), default=0.0)
        spent = earlier["spent"] + max(0.0, last - earlier["began"])
    write_json({"spent": spent, "began": time.time()}, clock)
    return spent


def _resumable(partial: Path) -> bool:
    return any(path.is_file() for path in (partial / RESUME).rglob("*"))


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
