"""The frame around every stage: done already, resume, or make; written aside, renamed when whole."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
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
Identity = dict[str, Any]


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

    options: with every default filled in. inputs: what was read, by role. parent: the record of the
    model that this result is made from. complete: whether a result has no failures; `overwrite`
    makes one with failures again.
    """

    options: Options
    inputs: dict[str, Source]
    make: Callable[[Path], dict[str, Any]]
    parent: Record | None = None
    complete: Callable[[Path], bool] = lambda out: True

    def record(self, verb: str) -> Record:
        """The record to be, without figures."""
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
    """Make `out` unless it is done; returns its record and whether anything was made.

    `plan.make` writes its result into the working folder, `<out>.partial`, and returns the figures of
    the record. What it leaves in `resume/` survives an interruption, and is removed when the stage is
    done; without it, a failed stage leaves nothing. Raises `Changed` where `out` holds another
    result, which `overwrite` replaces, and `UserError` for anything that is not ours, which is never
    touched. An unfinished `<out>.partial` of the same identity was allowed to replace `out` when it
    was begun; a whole one only takes its place (workplace.py).
    Of several processes of one job the first writes; the others share its work. Another command
    that makes `out` at the same time is refused.
    """
    work = _Work(verb, plan, out, overwrite=overwrite)
    found = work.existing()
    if found is not None:
        if processes.rank() == 0:
            work.place.tidy()
        return found, False
    with work.place.held() if processes.rank() == 0 else nullcontext():
        processes.wait_for_all()  # from here on no other command changes anything
        work.place = Workplace.of(out)
        found = work.existing()
        return (found, False) if found is not None else work.finished()  # found: made meanwhile


def status(verb: str, plan: Plan, out: str | Path) -> str:
    """What `run_stage` would do: "" where `out` is done, else why it is not.

    Raises `UserError` where `out` holds no result of ours.
    """
    return _Work(verb, plan, out).status()


class _Work:
    """One result to be: its plan, its record, and the place where it is made."""

    def __init__(self, verb: str, plan: Plan, out: str | Path, *, overwrite: bool = False) -> None:
        self.plan, self.overwrite = plan, overwrite
        self.place, self.record = Workplace.of(out), plan.record(verb)

    def existing(self) -> Record | None:
        """The record of a finished `out` that is what was asked for; None where it may be made."""
        found = self._found()
        if found is None:
            return None
        out, before = self.place.out, self._completed(found.identity)
        same = before == self.record.identity
        if same and not (self.overwrite and not self.plan.complete(out)):
            return found
        if self.overwrite or self._is_begun():
            return None
        what = _difference(before, self.record.identity)
        raise Changed(f"{out} exists and holds {what}; give another folder, or --overwrite", what)

    def status(self) -> str:
        """See `frame.status`."""
        found = self._found()
        before = self._completed(found.identity) if found else None
        if before == self.record.identity:
            return ""
        if self._is_begun():
            whole = self.place.whole() is not None
            return "is whole, and takes its place" if whole else "continues from its checkpoint"
        if before is not None:
            return f"again: it is of {_difference(before, self.record.identity)}"
        return "to do"

    def finished(self) -> tuple[Record, bool]:
        """The record of the result, now in its place, and whether it was made now."""
        whole = self.place.whole()
        is_whole = whole is not None and self._completed(whole.identity) == self.record.identity
        processes.wait_for_all()  # all have looked; now the first may change what they saw
        if processes.rank() > 0:
            self._help(is_whole=is_whole)
        else:
            if not is_whole:
                self._make()
            self.place.finish()
        processes.wait_for_all()
        if is_whole or processes.rank() > 0:
            self.record = _record_of(self.place.out)
        return self.record, not is_whole

    def _make(self) -> None:
        """Fill the working folder and complete the record."""
        try:
            self._open()
            before, started = self.place.spent(), time.monotonic()
            processes.wait_for_all()
            figures = self.plan.make(self.place.partial)
            seconds = round(before + time.monotonic() - started, 2)
            self.record = self.record.model_copy(
                update={"figures": figures, "wall_time_s": seconds}
                | environment(getattr(self.plan.options, "device", "cpu"))
            )
            self.place.set_whole(self.record)
        except BaseException:
            self.place.give_up()
            raise

    def _help(self, *, is_whole: bool) -> None:
        """The part of every process but the first: the same work, nothing written."""
        if is_whole:
            return
        partial = self.place.partial
        processes.wait_for_all()
        if not (partial / RESUME).is_dir():
            raise UserError(
                f"process {processes.rank()} does not see {partial}, which the first one made; "
                "give all machines one shared folder"
            )
        with processes.place_to_write(partial, RESUME) as folder:
            self.plan.make(folder)

    def _open(self) -> None:
        """The working folder: kept from an interrupted run of the same identity, else new."""
        if self.overwrite:
            with suppress(UserError):  # an unreadable one is begun anew
                if self._is_begun():
                    return
        unfinished = None if self.overwrite else self.place.unfinished()
        if unfinished is None:
            self.place.begin(self.record.identity)
        elif (known := self._completed(unfinished)) != self.record.identity:
            difference = _difference(known, self.record.identity)
            raise Changed(
                f"{self.place.partial} is an unfinished run with {difference}; finish that one, "
                "give another folder, or --overwrite",
                difference,
            )

    def _is_begun(self) -> bool:
        """Whether this result waits unfinished in the working folder."""
        unfinished = self.place.unfinished()
        return unfinished is not None and self._completed(unfinished) == self.record.identity

    def _found(self) -> Record | None:
        """The record of what `out` holds; None where it holds nothing."""
        place = self.place
        if not place.has_content():
            return None
        found = read_record(place.out) if place.out.is_dir() else None
        if found is None and not (place.is_within and place.whole()):  # else half of it is moved
            raise UserError(
                f"{place.out} exists and holds no result of prunedm; give another folder"
            )
        return found

    def _completed(self, identity: Identity) -> Identity:
        """`identity` with what prunedm has added to identities since it was written.

        These are new options, at their defaults, and the second half of a dataset's hash, which
        covers every byte: it is taken over where the first half is the same.
        """
        defaults = type(self.plan.options).model_construct().identity()
        now = {role: source.hash for role, source in self.plan.inputs.items()}
        hashes = {
            role: now[role] if now.get(role, "").startswith(f"{found}-") else found
            for role, found in identity["inputs"].items()
        }
        return identity | {"options": defaults | identity["options"], "inputs": hashes}


def _record_of(out: Path) -> Record:
    record = read_record(out)
    assert record is not None
    return record


def _difference(old: Identity, new: Identity) -> str:
    """The first difference between two identities."""
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
