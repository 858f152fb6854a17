"""The frame around every stage: done already, resume, or make; aside first, renamed when whole."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunedm.errors import UserError
from prunedm.options import Options
from prunedm.record import Record, Source, environment, read_record, write_json, write_record

PARTIAL = ".partial"  # <out>.partial holds a stage's work until it is whole
RESUME = "resume"  # in there: what an interrupted stage goes on from
_IDENTITY = "identity.json"
# options that change how a result is made but not what it is
_NOT_IDENTITY = {"device", "workers", "checkpoint_every"}

Make = Callable[[Path, Record], dict[str, Any]]  # (working folder, record) -> figures


def run_stage(
    stage: str,
    out: str | Path,
    *,
    options: Options,
    inputs: dict[str, Source],
    make: Make,
    parent: Record | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Make `out` unless it is there already; returns its record and whether anything was made.

    `make` writes its result into the working folder, `<out>.partial`, and returns the figures of
    the record. What it leaves in `resume/` survives an interruption, and is gone when the stage is
    done; without it, a failed stage leaves nothing. Raises `UserError` where `out` holds something
    else: nothing is overwritten in silence.
    """
    record = Record(
        stage=stage,
        options=_identifying(options),
        inputs=inputs,
        seed=getattr(options, "seed", None),
        history=parent.lineage() if parent else [],
    )
    out = Path(out)
    found = _existing(out, record, overwrite)
    if found is not None:
        return found, False
    partial = _open_partial(out, record, overwrite)
    started = time.monotonic()
    try:
        figures = make(partial, record)
    except BaseException:
        if not _resumable(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    record = record.model_copy(
        update={"figures": figures, "wall_time_s": round(time.monotonic() - started, 2)}
        | environment()
    )
    write_record(record, partial)
    (partial / _IDENTITY).unlink()
    shutil.rmtree(partial / RESUME)
    if out.exists():
        shutil.rmtree(out)  # --overwrite was given, and the new result is whole
    partial.rename(out)
    return record, True


def _identifying(options: Options) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude=_NOT_IDENTITY)


def _existing(out: Path, record: Record, overwrite: bool) -> Record | None:
    """The record of a finished `out` that is just what was asked for."""
    if not out.exists():
        return None
    found = read_record(out) if out.is_dir() else None
    if found is not None and found.identity == record.identity:
        return found
    if overwrite:
        return None
    what = "no result of prunedm" if found is None else _difference(found.identity, record.identity)
    raise UserError(f"{out} exists and holds {what}; give another folder, or --overwrite")


def _open_partial(out: Path, record: Record, overwrite: bool) -> Path:
    """The working folder: kept from an interrupted run of the same identity, else new."""
    partial = out.with_name(out.name + PARTIAL)
    if _resumable(partial) and not overwrite:
        identity = json.loads((partial / _IDENTITY).read_text(encoding="utf-8"))
        if identity != record.identity:
            difference = _difference(identity, record.identity)
            raise UserError(
                f"{partial} is an unfinished run with {difference}; finish that one, "
                "give another folder, or --overwrite"
            )
        return partial
    shutil.rmtree(partial, ignore_errors=True)
    (partial / RESUME).mkdir(parents=True)
    write_json(record.identity, partial / _IDENTITY)
    return partial


def _resumable(partial: Path) -> bool:
    return (partial / RESUME).is_dir() and any((partial / RESUME).iterdir())


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words."""
    if old["stage"] != new["stage"]:
        return f"the result of {old['stage']}, not of {new['stage']}"
    for key in new["options"].keys() | old["options"].keys():
        before, now = old["options"].get(key), new["options"].get(key)
        if before != now:
            return f"another {key} ({before!r}, now {now!r})"
    for role in new["inputs"].keys() | old["inputs"].keys():
        if old["inputs"].get(role) != new["inputs"].get(role):
            return f"another {role} (its content has changed)"
    return "the same"
