"""Damaged inputs: kinds of files x damages x the verb that reads them; options and output paths.

A case is clean where the verb ends with exit code 2 and one short line, or, unless `refused`, makes
a result whose figures are finite: some damages leave an input that can be used.
"""

import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults import damages, server
from tests.faults.commands import BASES, OUTS, READERS, TYPED, WRITERS, Reader
from tests.faults.things import words

OUTCOMES = ("clean", "noisy", "wrong", "internal", "hung", "heavy")
LONGEST = 500  # characters of a refusal


@dataclass(frozen=True)
class Case:
    """One damaged input. command: words, `{name}` is a sound thing, a bare word a damaged copy.

    copies: sound things that are copied into the working folder before `damage` changes them.
    refused: a result would be wrong. expect: a regular expression of the line, where that matters.
    """

    name: str
    command: tuple[str, ...]
    copies: tuple[str, ...] = ()
    damage: Callable[[Path], None] = lambda work: None
    refused: bool = False
    expect: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


@dataclass
class Found:
    """What came of a case."""

    name: str
    outcome: str
    command: str
    line: str
    seconds: float
    growth: int  # bytes

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


def cases(base: Path) -> list[Case]:
    """The whole table, as far as there are sound things."""
    readers = [reader for reader in READERS if (base / reader.file).exists()]
    found = [
        *(case for reader in readers for case in _of_file(reader, base)),
        *_of_options(),
        *_of_outs(),
        *_typed(),
    ]
    twice = [name for name, count in Counter(case.name for case in found).items() if count > 1]
    assert not twice, f"several cases are called {twice}"
    return found


def judge(case: Case, base: Path, place: Path) -> Found:
    """Run a case in a child, and say what came of it."""
    place.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=place))
    work = own / "work"
    work.mkdir()
    for thing in case.copies:
        source = base / thing
        (shutil.copytree if source.is_dir() else shutil.copy)(source, work / source.name)
    case.damage(work)
    command = [word if word in ("", *OUTS) else _filled(word, base) for word in case.command]
    ended = server.in_child(lambda: server.prunedm(command), work)
    outcome, line = _outcome(case, ended, work)
    shutil.rmtree(own)
    shown = shlex.join(word if len(word) < 80 else f"{word[:60]}..." for word in case.command)
    line = line.encode("utf-8", "replace").decode()[:600]
    shown = shown.encode("utf-8", "backslashreplace").decode()
    return Found(case.name, outcome, shown, line, round(ended.seconds, 2), ended.growth)


def counts(found: Iterable[Found]) -> dict[str, int]:
    """The figures that the docs quote."""
    found = list(found)
    outcomes = Counter(f.outcome for f in found)
    return (
        {"inputs": len(found)}
        | {name: outcomes[name] for name in OUTCOMES}
        | {
            "over_1_GB": sum(f.growth > server.MEMORY for f in found),
            "over_20_s": sum(f.seconds > server.SECONDS for f in found),
        }
    )


def as_rows(found: Iterable[Found]) -> list[dict[str, Any]]:
    return [asdict(f) for f in found if f.outcome != "clean"]


def _filled(word: str, base: Path) -> str:
    return words(shlex.quote(word), base)[0] if re.search(r"\{\w+\}", word) else word


def _outcome(case: Case, ended: server.Ended, work: Path) -> tuple[str, str]:
    """What it is called, and the line that shows it."""
    lines = ended.err.strip().splitlines()
    last = lines[-1] if lines else f"exit code {ended.code}"
    internal = ended.code not in (0, 2) or re.search("internal error|Traceback", ended.err)
    found = [
        (ended.limit, last),
        ("wrong" * (work / "pwned").exists(), "what is written in the file was executed"),
        ("wrong" * bool(ended.connections), f"asks the network: {', '.join(ended.connections)}"),
        ("internal" * bool(internal), last),
        (
            "noisy" * (bool(ended.code) and (len(lines) > 1 or len(last) > LONGEST)),
            _noise(ended.err),
        ),
    ]
    for outcome, line in found:
        if outcome:
            return outcome, line
    if ended.code == 0:
        return _accepted(case, ended, work)
    if case.expect and not re.search(case.expect, last):
        return "wrong", f"not as expected ({case.expect}): {last}"
    return "clean", last


def _noise(text: str) -> str:
    return f"{len(text.splitlines())} lines, {len(text)} characters: {text[:300]}"


def _accepted(case: Case, ended: server.Ended, work: Path) -> tuple[str, str]:
    if case.refused:
        return "wrong", f"accepted: {ended.out[-200:]}"
    for record in work.rglob("record.json"):
        try:
            figures = json.loads(record.read_text(encoding="utf-8"))["figures"]
        except (ValueError, KeyError, OSError, TypeError):
            continue
        loss = figures.get("loss", 0.0) if isinstance(figures, dict) else 0.0
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return "wrong", f"accepted, and the loss is {loss}"
    if re.search(r"\b(nan|inf)\b", ended.out):
        return "wrong", f"accepted, and says nan or inf: {ended.out[-200:]}"
    return "clean", "accepted"


def _of_file(reader: Reader, base: Path) -> Iterator[Case]:
    """Everything that can be wrong with a file."""
    sound = base / reader.file
    for kind in reader.damages.split():
        for name, damage in damages.KINDS[kind](sound):
            yield Case(
                name=f"{reader.name}: {name}",
                command=tuple(shlex.split(reader.command)),
                copies=tuple(dict.fromkeys([Path(reader.file).parts[0], *reader.copies])),
                damage=lambda work, damage=damage: damage(work / reader.file),
                refused=kind in damages.REFUSED,
            )


def _of_options() -> Iterator[Case]:
    """Wrong values of every option; one that several verbs share is tried with the first."""
    tried = set()
    for verb, (options, command) in BASES.items():
        for leaf in options.leaves():
            name, field = leaf.flag, leaf.field
            if (name, field.annotation, repr(field.metadata)) in tried:
                continue
            tried.add((name, field.annotation, repr(field.metadata)))
            flag = f"--{name.replace('_', '-')}"
            for value in _wrong_values(str(field.annotation)):
                shown = value if len(value) < 40 else f"{value[:10]}... ({len(value):,})"
                given = tuple(_without(shlex.split(command), flag))
                yield Case(f"option {verb}: {flag} {shown!r}", (*given, f"{flag}={value}"))


def _wrong_values(annotation: str) -> list[str]:
    for kind, values in damages.OPTIONS.items():
        if re.search(kind, annotation):
            return values
    raise AssertionError(f"damages.OPTIONS has no line for {annotation}")


def _without(command: list[str], flag: str) -> list[str]:
    """The words but an option and its values."""
    if flag not in command:
        return command
    start = command.index(flag)
    end = next((k for k in range(start + 1, len(command)) if command[k].startswith("--")), None)
    return command[:start] + ([] if end is None else command[end:])


def _of_outs() -> Iterator[Case]:
    """Output paths that are none, or not to be written."""
    for verb in WRITERS:
        command = BASES[verb][1]
        for out, (prepare, refused) in OUTS.items():
            given = tuple(
                out if word in ("out", "out.npz") else word for word in shlex.split(command)
            )
            shown = out if len(out) < 40 else f"{out[:10]}... ({len(out):,})"
            yield Case(f"out of {verb}: {shown!r}", given, damage=prepare, refused=refused)


def _typed() -> Iterator[Case]:
    for command, expect in TYPED.items():
        given = tuple(shlex.split(command))
        yield Case(f"command: {command}", given, damage=_decoys, refused=True, expect=expect)


def _decoys(work: Path) -> None:
    """Files that are not what they are given for."""
    for name in ("imgs.zip", "train.npz", "model.pt", "notes.txt"):
        (work / name).write_text("text\n", encoding="utf-8")
    (work / "empty").mkdir()
    os.mkfifo(work / "pipe")
    (work / "zero").symlink_to("/dev/zero")
