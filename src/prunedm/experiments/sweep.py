"""sweep: run every case of a grid or a search in parallel, and collect the results."""

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import BaseModel

from prunedm.errors import UserError, masked, nearest
from prunedm.experiments.inputs import hashes_of
from prunedm.experiments.plan import Settings, Sweep, case_of, check_fields, grid_cases, label_of
from prunedm.experiments.results import Row, mark_best, row_of, value_of
from prunedm.experiments.search import ERROR, RUN, SETTINGS, Searching
from prunedm.experiments.sources import Grid
from prunedm.experiments.store import (
    RUNS,
    STAGES,
    Run,
    Status,
    Store,
    remove_leftovers,
    replace_json,
    run_of,
)
from prunedm.experiments.study import DATABASE, open_study
from prunedm.experiments.workers import (
    BUSY,
    Slot,
    Worker,
    end_all,
    outcome,
    slots,
    start,
    visible_gpus,
)
from prunedm.progress import Progress, Silent
from prunedm.reading import read_as
from prunedm.recipe import Recipe, steps_of
from prunedm.stages import check_inputs
from prunedm.system.places import expanded, target
from prunedm.tables import METRICS

Source = Grid | Searching
Labelled = TypeVar("Labelled", Run, Row)
FILE = "sweep.json"  # in OUT: the sweep, and the dense model's hash
_OF_SAMPLES = ("fd", "kid", "precision", "recall")
# measured between models or in turns, which a sweep does not do
_IN_TURNS = ("latency_ms", "psnr_db", "ssim", "loss_change", "compression")
MEASURED = (*(name for name in METRICS if name not in _IN_TURNS), "seconds")
_LOOK_EVERY = 0.5  # seconds


class Kept(BaseModel):
    """What OUT remembers of its sweep."""

    sweep: Sweep
    hashes: dict[str, str]  # of its inputs: the dense model, datasets, teachers, masks
    place: str  # a unique name of this folder


def sweep(
    plan: Sweep,
    out: str | Path,
    *,
    workers: int = 0,
    threads: int = 0,
    only: Sequence[str] = (),
    retry: bool = False,
    progress: Progress | None = None,
) -> list[Row]:
    """Run what is not done yet; see `Sweep`. Several calls may work on one `out` at once.

    A failed run is kept with its log while the others continue; `retry` starts failed ones again.
    only: run the cases of a grid whose label has all of these words.
    Interrupted, it ends its runs; called again, it continues them.
    """
    progress = progress or Silent()
    out = target(out)
    _check(plan, only, retry=retry)
    places = slots(workers, threads, visible_gpus())
    _check_place(out)
    hashes = _hashes(plan, out)
    runs = [] if plan.search else _chosen(_runs(plan, hashes, progress), only)
    store = Store(out)
    with _made_or_nothing(out):
        with FileLock(out / "lock"):  # two sweeps starting at once
            remove_leftovers(out)
            kept = _kept(plan, out, hashes)
            replace_json(out / FILE, without_secrets(kept).model_dump(mode="json"))
        source: Source = (
            Searching(plan, store, kept.hashes, kept.place)
            if plan.search
            else Grid(runs, store, retry=retry)
        )
    _work(source, store, places, progress)
    return _rows(kept, store)


def _check_place(out: Path) -> None:
    """Raise `UserError` for a file, or a folder with other content."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder")
    own = {FILE, "lock", STAGES, RUNS, DATABASE}
    if out.exists() and not any((out / name).exists() for name in own) and any(out.iterdir()):
        raise UserError(f"{out} exists and holds no sweep; give another folder")


@contextmanager
def _made_or_nothing(out: Path) -> Iterator[None]:
    """Make the folder; a failure before the first run removes a new one."""
    was_there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not was_there:
            shutil.rmtree(out, ignore_errors=True)
        raise


def without_secrets(kept: "Kept") -> "Kept":
    """`kept` without the password of the storage's URL."""
    search = kept.sweep.search
    if search is None:
        return kept
    told = search.model_copy(update={"storage": masked(search.storage)})
    return kept.model_copy(update={"sweep": kept.sweep.model_copy(update={"search": told})})


def planned(plan: Sweep, out: Path, only: Sequence[str] = ()) -> list[Row]:
    """The rows of a sweep as they stand; of a search, the existing runs. Makes nothing."""
    _check(plan, only)
    if plan.search is not None and not (out / FILE).exists():
        return []
    out = expanded(out)
    rows = _rows(_kept(plan, out, _hashes(plan, out)), Store(out))
    return _chosen(rows, only) if only else rows


def rows_of(out: Path) -> list[Row]:
    """All runs of the sweep in `out`, in order. Raises `UserError` where there is no sweep."""
    out = expanded(out)
    return _rows(read_kept(out), Store(out))


def _check(plan: Sweep, only: Sequence[str] = (), *, retry: bool = False) -> None:
    """Raise `UserError` for errors that would show only after hours."""
    if plan.search is not None and (only or retry):
        raise UserError("--only and --retry are for the runs of a grid; a search proposes its own")
    check_fields(plan)
    first = case_of(plan, {})
    check_inputs(first.recipe.model, first.recipe.evaluation())
    _check_objectives(plan, first.recipe)


def _hashes(plan: Sweep, out: Path) -> dict[str, str]:
    """Current hashes of the inputs; where OUT has only the first half of one (0.1.0), that half."""
    now = hashes_of(plan)
    before = read_kept(out).hashes if (out / FILE).exists() else {}
    known = {name: found for name, found in before.items() if name in now}
    return now | {name: found for name, found in known.items() if now[name].startswith(f"{found}-")}


def _kept(plan: Sweep, out: Path, hashes: dict[str, str]) -> Kept:
    """What OUT is to remember, with the name it already has."""
    place = read_kept(out).place if (out / FILE).exists() else uuid.uuid4().hex
    return Kept(sweep=plan, hashes=hashes, place=place)


def _rows(kept: Kept, store: Store) -> list[Row]:
    objectives = kept.sweep.objectives
    if kept.sweep.search is None:
        runs = _runs(kept.sweep, kept.hashes, Silent())
        rows = [row_of(store, run, list(objectives)) for run in runs]
    else:
        rows = _trial_rows(kept, store)
    mark_best(rows, objectives)
    return rows


def read_kept(out: Path) -> Kept:
    """Raises `UserError` where there is no sweep or its file is damaged."""
    if not (out / FILE).exists():
        raise UserError(f"{out} holds no sweep; make one: prunedm sweep FILE.yaml {out}")
    return read_as(Kept, out / FILE, "delete it and start the sweep again: what is done stays")


def _check_objectives(plan: Sweep, recipe: Recipe) -> None:
    """Raise `UserError` for an objective that no run will have a figure for."""
    stages = [step.label for step in steps_of(recipe)]
    evaluate = recipe.evaluation()
    draws = evaluate.depth != "quick" and evaluate.samples != 0
    for name in plan.objectives:
        stage, dot, _ = name.rpartition(".")
        if dot and stage not in stages:
            raise UserError(f"objective {name!r}: the recipe's stages are {', '.join(stages)}")
        if not dot and name in _IN_TURNS:
            raise UserError(
                f"objective {name!r} is not measured in a sweep, where models are measured alone and "
                "parallel runs disturb timings; take loss or macs, and `prunedm compare` the best ones"
            )
        if not dot and name not in MEASURED:
            raise UserError(f"objective {name!r}: no such figure{nearest(name, MEASURED)}")
        if name in _OF_SAMPLES and (evaluate.skip_fid or not draws):
            raise UserError(
                f"objective {name!r} needs samples and features: evaluate.depth = full, without "
                "skip_fid and samples = 0"
            )


def _runs(plan: Sweep, hashes: Mapping[str, str], progress: Progress) -> list[Run]:
    """Distinct runs; cases that differ only in unused settings are merged (the first is kept)."""
    runs: dict[str, Run] = {}
    for case in grid_cases(plan):
        run = run_of(case, hashes)
        if run.id in runs:
            progress.say(f"{case.label}: the same as {runs[run.id].label}")
        runs.setdefault(run.id, run)
    return list(runs.values())


def _chosen(runs: Sequence[Labelled], words: Sequence[str]) -> list[Labelled]:
    """Raises `UserError` where no run has all the words in its label."""
    chosen = [run for run in runs if set(words) <= set(run.label.split())]
    if not chosen:
        known = sorted({word for run in runs for word in run.label.split()})
        raise UserError(f"only = {' '.join(words)}: no run has that; there are {', '.join(known)}")
    return chosen


def _work(source: Source, store: Store, places: Sequence[Slot], progress: Progress) -> None:
    """Keep every slot busy until the source has nothing left."""
    jobs: list[Worker] = []
    done = source.count_over()
    with progress.task("runs", source.total, done) as bar:
        try:
            while jobs or not source.over():
                free = [s for s in places if s not in [job.slot for job in jobs]]
                run = source.next([job.run for job in jobs]) if free else None
                if run is not None:
                    jobs.append(start(store, run, free[0]))
                    progress.say(f"started {run.label}  (log: {store.log(run.id)})")
                    continue
                time.sleep(_LOOK_EVERY)
                jobs = [job for job in jobs if not _over(job, source, store, progress)]
                now = source.count_over()
                bar.advance(now - done, _note(jobs))
                done = now
        finally:
            end_all(jobs)
            store.release_all()


def _over(job: Worker, source: Source, store: Store, progress: Progress) -> bool:
    """Whether the job has ended; if so, tells the source and the user."""
    if job.process.poll() is None:
        if source.watch(job.run, job.entry) and not job.ended_early:
            job.ended_early = True
            job.interrupt()
        return False
    if job.process.returncode == BUSY:
        store.release(job.run.id)
        return True
    status = outcome(store, job)
    source.finished(job.run, status)
    store.release(job.run.id)
    progress.say(f"{status.state} {job.run.label}: {_story(store, job.run, status)}")
    return True


def _story(store: Store, run: Run, status: Status) -> str:
    if status.state == "failed":
        return f"{status.error}; log: {store.log(run.id)}"
    loss = value_of(store, run, "loss")
    shown = "" if loss is None else f"loss {loss:.4f}, "
    return f"{shown}{status.seconds:.0f} s"


def _note(jobs: Sequence[Worker]) -> str:
    """Progress of the running jobs."""
    entries = [job.entry for job in jobs]
    return ", ".join(f"{e.label} {e.done}/{e.total}" for e in entries if e and e.label)


def _trial_rows(kept: Kept, store: Store) -> list[Row]:
    """One row per run, in the order of its first trial, and one per impossible trial."""
    names = list(kept.sweep.objectives)
    rows: dict[str, Row] = {}
    for trial in open_study(kept.sweep, store.out, kept.hashes).get_trials(deepcopy=False):
        if SETTINGS not in trial.user_attrs:
            continue
        settings = json.loads(trial.user_attrs[SETTINGS])
        name = trial.user_attrs.get(RUN, f"trial {trial.number}")
        if name not in rows:
            rows[name] = _trial_row(kept, store, trial, settings)
        rows[name].numbers.append(trial.number)
        if trial.state.name == "COMPLETE":  # what another machine found is in the storage alone
            rows[name].values = dict(zip(names, trial.values, strict=True))
            rows[name].status = rows[name].status.model_copy(update={"state": "done"})
    return list(rows.values())


def _trial_row(kept: Kept, store: Store, trial: Any, settings: Settings) -> Row:
    """A trial's row, as far as this folder tells."""
    names = list(kept.sweep.objectives)
    if RUN not in trial.user_attrs:
        error = trial.user_attrs.get(ERROR, "")
        status = Status(state="failed" if trial.state.is_finished() else "waiting", error=error)
        return Row(label_of(settings), settings, status, dict.fromkeys(names))
    row = row_of(store, run_of(case_of(kept.sweep, settings), kept.hashes), names)
    state = {"PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}.get(trial.state.name)
    if row.status.state == "waiting" and state:  # its folder is another machine's
        row.status = Status(state=state)
    return row
