"""Kills: every verb is killed before its n-th change to a file, and the same command goes on."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.server import Ended, in_child, prunedm
from tests.faults.things import FEATURES, FINETUNE, QUICK, SCORE, TUNE, words

LIMIT = 120.0  # seconds of one run, however busy the machine is
ENDS = 10  # first and last moments that are always tried
_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = {  # audit event -> the places of its path and of the folder's descriptor
    "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.remove": (0, 1), "os.rename": (1, 3),
    "os.link": (1, 3), "os.symlink": (1, 2), "os.truncate": (0, None),
}  # fmt: skip
# what may differ between two undisturbed runs: times, memory, and numbers in texts that tell them
_MEASURED = re.compile(
    r"wall_time|created|second|started|updated|latenc|_ms$|per_s$|memory|timestamp|^(pid|place|others)$"
)
_TEXTS = (".csv", ".md", ".txt", ".jsonl")
_BY_NAME = (".html", ".svg", ".log", ".db", ".lock", "dashboard.png")  # with figures of times


@dataclass(frozen=True)
class Verb:
    """A command to kill. before: a command whose result it finds. prepare: of its folder, first."""

    command: str
    before: str = ""
    prepare: Callable[[Path], None] = lambda work: None


def _linked(work: Path) -> None:
    (work / "real").mkdir()
    (work / "out").symlink_to("real")


def _empty(work: Path) -> None:
    (work / "out").mkdir()


LOSS = f"loss {{model}} out {QUICK}"
EVALUATE = "--dataset {images} --problems 2 --latency-repeats 1 --latency-batches 1"
FULL = f"{EVALUATE} --samples 4 --sampling-steps 1 --skip-fid"
VERBS = {
    "train": Verb(f"train out {TUNE} --config {{unet}}"),
    "prune channels": Verb(f"prune {{model}} out --target params=0.2 {SCORE}"),
    "prune weights": Verb(
        f"prune {{model}} out --mechanism weights --target weights=0.5 --score magnitude {SCORE}"
    ),
    "prune nm": Verb(f"prune {{model}} out --mechanism nm --score magnitude {SCORE}"),
    "prune obs-weights": Verb(
        f"prune {{model}} out --mechanism obs-weights --target weights=0.5 {SCORE}"
    ),
    "prune obs-nm": Verb(f"prune {{model}} out --mechanism obs-nm --obs-swaps 1 {SCORE}"),
    "learn": Verb(f"learn {{model}} out {TUNE} --dataset-size 8"),
    "finetune": Verb(FINETUNE),
    "sample": Verb("sample {model} out --count 6 --batch-size 2 --sampling-steps 1"),
    "sample npz": Verb(
        "sample {model} out --count 4 --batch-size 2 --sampling-steps 1 --format npz"
    ),
    "evaluate": Verb(f"evaluate {{masked}} out --depth quick {EVALUATE}"),
    "evaluate full": Verb(f"evaluate {{masked}} out {FULL}"),
    "compare": Verb(f"compare {{model}} {{masked}} --out out --depth quick {EVALUATE}"),
    "loss": Verb(LOSS),
    "analyze": Verb(f"analyze {{model}} out {SCORE.removesuffix(' --pictures 0')} --problems 2"),
    "export packed": Verb(f"export {{masked}} out {QUICK}"),
    "export onnx": Verb(f"export {{masked}} out --format onnx {QUICK}"),
    "export openvino": Verb(f"export {{masked}} out --format openvino {QUICK}"),
    "fid": Verb(f"fid {{images}} {{set}} --json out.json {FEATURES}"),
    "stats": Verb("stats {images} out.npz --features digits-cnn --force"),
    "masks extract": Verb("masks extract {masked} out.safetensors"),
    "run": Verb("run {recipe} out"),
    "sweep": Verb("sweep {sweep} out --workers 1 --threads 1"),
    "overwrite": Verb(f"{LOSS} --overwrite", before=f"{LOSS} --seed 1"),
    "overwrite finetune": Verb(f"{FINETUNE} --overwrite", before=f"{FINETUNE} --seed 1"),
    "out is a link": Verb(LOSS, prepare=_linked),
    "out is a link, finetune": Verb(FINETUNE, prepare=_linked),
    "out is an empty folder": Verb(LOSS, prepare=_empty),
    "out is .": Verb(LOSS.replace(" out ", " . ")),
}


@dataclass
class Reference:
    """What a verb makes undisturbed: its files, and the moments at which it may be killed."""

    verb: str
    files: dict[str, str]
    changes: list[str]  # "open loss.json"
    moments: list[tuple[int, bool]]  # number of the change; whether it is begun, and half done
    error: str = ""


@dataclass
class Attempt:
    """One kill, and what the same command made of it."""

    verb: str
    change: str
    survived: bool = False
    exact: bool = False
    whole: bool = False  # before it went on, a result of it was whole
    twice: list[str] = field(default_factory=list)  # files of whole results that were made again
    error: str = ""

    @property
    def good(self) -> bool:
        return self.survived and self.exact and not self.twice


class Changes:
    """Counts what changes files below `folder`, and ends the process before one, or half through."""

    def __init__(self, folder: Path, at: tuple[int, bool] | None = None) -> None:
        self.folder, self.at = f"{folder}/", at
        self.seen: list[str] = []
        self._inside = False
        sys.addaudithook(self._hear)
        self._wrap("safetensors.torch", "serialize_file")
        self._wrap("openvino", "save_model")

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._inside:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & _WRITES:
            self._note("open", arguments[0], None, arguments[2])
        elif event in _CHANGES:
            path, descriptor = _CHANGES[event]
            self._note(event, arguments[path], descriptor and arguments[descriptor])

    def _note(self, what: str, name: Any, folder: int | None, flags: int = 0) -> None:
        """One change; the process may end here."""
        self._inside = True
        try:
            path = os.fsdecode(name)
            if folder is not None and folder >= 0:
                path = str(Path(f"/proc/self/fd/{folder}").readlink() / path)
            path = os.path.abspath(path)  # noqa: PTH100
            nameless = what == "open" and Path(path).is_dir()  # a temporary file in it
            if nameless or not f"{path}/".startswith(self.folder):
                return
            self.seen.append(f"{what} {path[len(self.folder) :] or '.'}")
            number, half = self.at or (-1, False)
            if len(self.seen) - 1 == number:
                if half:
                    opened = os.open(path, flags & (os.O_TRUNC | os.O_APPEND) | _BEGIN, 0o644)
                    os.write(opened, b"{")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            self._inside = False

    def _wrap(self, module: str, name: str) -> None:
        """Hear of a writer that is not Python's."""
        if module not in sys.modules:
            return
        real = getattr(sys.modules[module], name)

        def write(content: Any, path: Any, *rest: Any, **named: Any) -> Any:
            self._note("open", str(path), None, os.O_TRUNC)
            return real(content, path, *rest, **named)

        setattr(sys.modules[module], name, write)


_BEGIN = os.O_WRONLY | os.O_CREAT


def refer(verb: str, count: int | None, base: Path, place: Path) -> Reference:
    """Run a verb twice, undisturbed; `count` moments to kill at, None for all."""
    found: list[dict[str, str]] = []
    for number in range(2):
        work = _work(verb, base, place / f"{_slug(verb)}-{number}")
        ended = _run(verb, base, work)
        if ended.code:
            return Reference(verb, {}, [], [], error=ended.err or ended.limit or str(ended.code))
        found.append(snapshot(work))
        shutil.rmtree(work)
    differing = sorted(
        name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)
    )
    if differing:
        return Reference(verb, {}, [], [], error=f"two runs differ in {', '.join(differing)}")
    changes: list[str] = ended.answer
    every = [
        (k, half)
        for k, change in enumerate(changes)
        for half in ([False, True] if change.startswith("open") else [False])
    ]
    return Reference(verb, found[0], changes, spread(every, count))


def attempt(reference: Reference, moment: tuple[int, bool], base: Path, place: Path) -> Attempt:
    """Kill at a moment, run the same again, and compare."""
    verb, (number, half) = reference.verb, moment
    change = f"{'during' if half else 'before'} {number + 1}: {reference.changes[number]}"
    found = Attempt(verb, change)
    work = _work(verb, base, place / f"{_slug(verb)}-{number}{'-half' * half}")
    killed = _run(verb, base, work, moment)
    if killed.code != -signal.SIGKILL:
        found.error = f"was not killed: {killed.code} {killed.err}"
        return found
    whole = _whole(work, reference.files)
    found.whole = bool(whole)
    again = _run(verb, base, work)
    found.survived = again.code == 0
    found.error = again.limit or again.err[-1000:].strip()
    now = snapshot(work)
    differing = [f for f in now | reference.files if now.get(f) != reference.files.get(f)]
    found.exact = not differing
    if differing and not found.error:
        found.error = "differs: " + ", ".join(
            f"{f}{' (left over)' * (f not in reference.files)}{' (missing)' * (f not in now)}"
            for f in sorted(differing)
        )
    found.twice = [f for f, mark in whole.items() if _mark(work / f) != mark]
    shutil.rmtree(work)
    return found


def spread(every: list[Any], count: int | None, ends: int = ENDS) -> list[Any]:
    """`count` of them, evenly spaced, the first and the last few always among them."""
    if count is None or count >= len(every):
        return every
    ends = min(ends, count // 3)
    middle = every[ends : len(every) - ends]
    chosen = count - 2 * ends
    return [
        *every[:ends],
        *(middle[k * len(middle) // chosen] for k in range(chosen)),
        *every[len(every) - ends :],
    ]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below, with a digest of what is not measured time."""
    return {
        str(path.relative_to(folder)): _digest(path, folder)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def counts(attempts: Iterable[Attempt]) -> dict[str, int]:
    """The figures that the docs quote."""
    attempts = list(attempts)
    return {
        "verbs": len({a.verb for a in attempts}),
        "kills": len(attempts),
        "survived": sum(a.survived for a in attempts),
        "bit_exact": sum(a.exact for a in attempts),
        "whole_when_killed": sum(a.whole for a in attempts),
        "made_twice": sum(bool(a.twice) for a in attempts),
    }


def as_rows(attempts: Iterable[Attempt]) -> list[dict[str, Any]]:
    return [asdict(a) for a in attempts if not a.good]


def _work(verb: str, base: Path, work: Path) -> Path:
    """The folder a verb runs in, as it finds it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if VERBS[verb].before:
        command = words(VERBS[verb].before, base)
        ended = in_child(lambda: prunedm(command), work, seconds=LIMIT)
        assert ended.code == 0, ended
    VERBS[verb].prepare(work)
    return work


def _run(verb: str, base: Path, work: Path, at: tuple[int, bool] | None = None) -> Ended:
    """The verb's command in a child, killed at a moment if one is given; its answer: the changes."""
    command = words(VERBS[verb].command, base)

    def live() -> list[str]:
        _sweep_in_process()
        _alone()
        changes = Changes(work, at)
        prunedm(command)
        return changes.seen

    return in_child(live, work, seconds=LIMIT)


def _alone() -> None:
    """As if nobody else used the processor: reports say who did, and which kernel took longest."""
    from prunedm.evaluation import speed
    from prunedm.system import neighbours

    neighbours._busy_seconds = lambda: 0.0
    speed.kernel = lambda call: "dense (convolution)"


def _sweep_in_process() -> None:
    """A sweep's runs are made by the same process: a kill ends both, as a power cut does."""
    from prunedm.experiments import chain, sweep, workers
    from tests import helpers

    def start(store: Any, run: Any, slot: Any) -> Any:
        store.write(run)
        store.set_status(run.id, workers.Status())
        return workers.Worker(run, slot, helpers.Ended(chain.main(str(store.out), run.id)))

    chain._end_with_scheduler = lambda: None
    sweep.start, sweep._LOOK_EVERY = start, 0.0


def _whole(work: Path, due: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Files of the results in `work` that have all they shall have, and which files they are.

    A result is a folder with a record, under its own name or its working one; or one file.
    """
    marks: dict[str, tuple[int, int]] = {}
    for record in sorted(name for name in due if Path(name).name == "record.json"):
        folder = Path(record).parent
        files = {f: digest for f, digest in due.items() if folder in Path(f).parents}
        for place in (
            folder,
            folder.with_name(f"{folder.name}.partial") if folder.name else folder,
        ):
            there = {f: work / place / Path(f).relative_to(folder) for f in files}
            if all(there[f].is_file() and _digest(there[f], work) == files[f] for f in files):
                marks |= {f: _mark(there[f]) for f in files}
                break
    for name, digest in due.items():
        if "/" not in name and (work / name).is_file() and _digest(work / name, work) == digest:
            marks[name] = _mark(work / name)
    return marks


def _mark(path: Path) -> tuple[int, int]:
    """Which file it is, and when it was written."""
    found = path.stat() if path.exists() else os.stat_result([0] * 10)
    return found.st_ino, found.st_mtime_ns


def _digest(path: Path, root: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.name.endswith(_BY_NAME) or not path.suffix:
        return "there" if path.suffix != ".html" or path.stat().st_size else "empty"
    content = path.read_bytes()
    if path.suffix in (".json", *_TEXTS):
        text = content.decode("utf-8", "replace").replace(str(root), "")
        content = (_text if path.suffix in _TEXTS else _facts)(text).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _text(text: str) -> str:
    return re.sub(r"[+−±×-]?\d[\d.,e+-]*", "#", text)


def _facts(text: str) -> str:
    try:
        return json.dumps(_timeless(json.loads(text)), sort_keys=True)
    except ValueError:
        return text


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not _MEASURED.search(k)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def _slug(verb: str) -> str:
    return re.sub(r"\W+", "-", verb).strip("-")
