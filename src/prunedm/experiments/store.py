"""The folders of a sweep, named by content, and the status of each run.

    OUT/stages/prune-3f2a9c01d4e8/     a stage, shared by all runs that begin with it
    OUT/runs/7b01c2de99a4/run.json     a run: its settings, recipe and stages
                          status.json  its state; log.txt: what it printed

A folder is named by the hash of what decides its content: the initial model, the datasets, and the
options of every stage up to it. So nothing is computed twice, and a changed sweep file keeps finished
work.
"""

import glob
import hashlib
import json
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel

from prunedm.errors import UserError
from prunedm.experiments.plan import Case, Settings
from prunedm.options import Options
from prunedm.reading import read_as
from prunedm.recipe import Recipe, steps_of
from prunedm.recipe_draft import Draft
from prunedm.record import write_json
from prunedm.system.locks import locked

STAGES, RUNS = "stages", "runs"
State = Literal["waiting", "running", "done", "failed", "stopped", "pruned"]


class StageFolder(BaseModel):
    """One stage of a run: its label in the recipe, and its folder's name below `stages`."""

    name: str
    folder: str


class Run(BaseModel):
    """One run; the last of `stages` is evaluated, and so is the dense model."""

    id: str
    label: str
    settings: Settings
    recipe: dict[str, Any]
    stages: list[StageFolder]
    evaluation: str
    dense: str  # the folder of the dense model's evaluation


class Status(BaseModel):
    """State of a run; times are seconds since 1970."""

    state: State = "waiting"
    stage: str = ""  # the current or last one
    stage_started: float = 0.0
    host: str = ""
    pid: int = 0
    started: float = 0.0
    seconds: float = 0.0
    error: str = ""


class Store:
    """The folders of one sweep."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._claims: dict[str, FileLock] = {}

    def stage(self, name: str) -> Path:
        return self.out / STAGES / name

    def folder(self, run: str) -> Path:
        return self.out / RUNS / run

    def log(self, run: str) -> Path:
        return self.folder(run) / "log.txt"

    def write(self, run: Run) -> None:
        self.folder(run.id).mkdir(parents=True, exist_ok=True)
        replace_json(self.folder(run.id) / "run.json", run.model_dump(mode="json"))

    def read(self, run: str) -> Run:
        """Raises `UserError` where the file is damaged."""
        folder = self.folder(run)
        return read_as(Run, folder / "run.json", f"delete {folder} and start the sweep again")

    def set_status(self, run: str, status: Status) -> None:
        replace_json(self.folder(run) / "status.json", status.model_dump(mode="json"))

    def status(self, run: str) -> Status:
        """As last written; a "running" process may be dead, see `is_alive`."""
        try:
            return read_as(Status, self.folder(run) / "status.json", "")
        except UserError:  # missing or damaged
            return Status()

    def claim(self, run: str) -> bool:
        """Reserve a run for this scheduler; False where another has it, or a process is at work on it.

        A claim holds from before the run's own process starts until `release` or our exit.
        """
        if run in self._claims:
            return False
        self.folder(run).mkdir(parents=True, exist_ok=True)
        claim = FileLock(self.folder(run) / "claim", timeout=0)
        try:
            claim.acquire()
        except Timeout:
            return False
        if not self._is_free(run, "lock"):  # its scheduler was killed, the run is not
            claim.release()
            return False
        self._claims[run] = claim
        return True

    def release(self, run: str) -> None:
        self._claims.pop(run).release()

    def release_all(self, *, but: Collection[str] = ()) -> None:
        for run in set(self._claims) - set(but):
            self.release(run)

    def is_alive(self, run: str) -> bool:
        """Whether a process on any machine that sees the folder is working on the run."""
        if run in self._claims:
            return True
        return not (self._is_free(run, "claim") and self._is_free(run, "lock"))

    def _is_free(self, run: str, name: str) -> bool:
        path = self.folder(run) / name
        if not path.exists():
            return True
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False

    def lock(self, run: str) -> FileLock:
        """Held by a run's process, and released by the system however that process ends.

        Entering raises `Timeout` where another process holds it.
        """
        self.folder(run).mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder(run) / "lock", timeout=0)

    def stage_lock(self, name: str) -> AbstractContextManager[None]:
        """Lets one run at a time make a stage; entering raises `Timeout` while another does."""
        (self.out / STAGES).mkdir(parents=True, exist_ok=True)
        return locked(self.out / STAGES / f"{name}.lock")


def inputs_of(options: Options) -> list[str]:
    """ "option value" of every input that the options name."""
    table = options.flat()
    return sorted(
        f"{name} {value}"
        for name, mark in options.inputs().items()
        if (value := table[name]) and value not in mark.words
    )


def inputs_of_stages(recipe: Recipe) -> list[str]:
    """Inputs of the stages other than the dense model, and the evaluation's images."""
    evaluate = set(inputs_of(recipe.evaluation())) - set(inputs_of_evaluation(recipe))
    every = [name for step in steps_of(recipe) for name in inputs_of(step.options)]
    return sorted({*every, *evaluate})


def inputs_of_evaluation(recipe: Recipe) -> list[str]:
    """Files that only the evaluation reads: features, weights."""
    options = recipe.evaluation()
    marks = options.inputs()
    return [name for name in inputs_of(options) if marks[name.partition(" ")[0]].kind == "file"]


def run_of(case: Case, hashes: Mapping[str, str]) -> Run:
    """The folders of a case. hashes: content hashes of the "model" and of all inputs."""
    contents = {name: hashes[name] for name in inputs_of_stages(case.recipe)}
    # sweeps of 0.1.0 have no hashes of these
    files = [hashes[name] for name in inputs_of_evaluation(case.recipe) if name in hashes]
    model = _digest([hashes["model"], contents])
    stages, address = list[StageFolder](), model
    for step in steps_of(case.recipe):
        own = _address(step.stage.verb, step.options, address)
        name = step.folder.partition("-")[2]
        stages.append(StageFolder(name=step.label, folder=f"{name}-{own}"))
        address = own if step.stage.makes == "model" else address
    evaluate = case.recipe.evaluation()
    whole = _address("evaluate", evaluate, address, files)
    return Run(
        id=whole,
        label=case.label,
        settings=case.settings,
        recipe=case.recipe.model_dump(mode="json", exclude_unset=True),
        stages=stages,
        evaluation=f"evaluate-{whole}",
        dense=f"evaluate-{_address('evaluate', evaluate, model, files)}",
    )


def recipe_of(run: Run) -> Recipe:
    return Draft.of(run.recipe).recipe()


def _address(verb: str, options: Options, parent: str, files: Sequence[str] = ()) -> str:
    return _digest([verb, options.identity(), parent, *files])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def replace_json(path: Path, value: Any) -> None:
    """As `write_json`, from several processes at once."""
    write_json(value, path, own_name(path))


def own_name(path: Path) -> Path:
    """A name next to `path` that no other process writes to."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")


def remove_leftovers(out: Path) -> None:
    """Remove files that processes of this machine were writing under `own_name` when killed."""
    stem = f".{socket.gethostname()}-"
    for folder in (out, *out.glob(f"{RUNS}/*")):
        for path in folder.glob(f"*{glob.escape(stem)}*"):
            number = path.name.rpartition(stem)[2]
            if number.isdigit() and not psutil.pid_exists(int(number)):
                path.unlink(missing_ok=True)
