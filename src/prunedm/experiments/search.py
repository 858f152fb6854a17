"""Optuna proposes a sweep's runs. Its storage may be shared: every machine asks and tells there.

A trial that was cut off, by kill -9 too, is found again by the run it names, and gone on with. The
proposals of trial k are drawn with a seed of (seed, k): so a search that was interrupted proposes
what an uninterrupted one does, as long as one worker asks.
"""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from prunedm.errors import UserError, first_line
from prunedm.experiments.plan import Range, Search, Settings, Sweep, case_of
from prunedm.experiments.results import value_of
from prunedm.experiments.sources import OVER
from prunedm.experiments.store import Run, Status, Store, run_of
from prunedm.randomness import seed_for
from prunedm.running import Entry

# a trial's attributes: what it runs, the folder that holds it, and when that was last heard of
RUN, SETTINGS, PLACE, ALIVE = "run", "settings", "place", "alive"
_STAGE_STEPS = 1_000_000  # a stage's steps come after those of the stage before
_ASKING = 60.0  # seconds that a proposal may take before its trial counts as cut off
_ATTEMPTS = 4  # to open the database
_BEAT = 60.0  # seconds between signs of life
_SILENT = 600.0  # seconds after which a run in another machine's folder counts as cut off


class Searching:
    """The source of a search's runs."""

    def __init__(self, sweep: Sweep, store: Store, model: str, place: str) -> None:
        """model: the hash of the dense model's content. place: a name of the store's folder."""
        assert sweep.search is not None
        self._place, self._beaten = place, dict[str, float]()
        self._sweep, self._store, self._model, self._search = sweep, store, model, sweep.search
        self._study = open_study(sweep, store.out)
        self._trials: dict[str, Any] = {}  # run -> the trial it was started for
        self._reported: dict[str, int] = {}  # run -> the last step reported
        self._ended: set[str] = set()
        self.total = self._search.trials

    def next(self, busy: Sequence[Run]) -> Run | None:
        taken = {run.id for run in busy} | self._ended
        for trial in self._running():
            run = trial.user_attrs.get(RUN)
            if run is None:
                self._forget_if_cut_off(trial)
            elif run not in taken and self._is_cut_off(trial) and self._store.claim(run):
                return self._again(trial)
        while (trial := self._ask()) is not None:
            run = self._propose(trial)
            status = self._store.status(run.id)
            if status.state in (*OVER, "failed"):  # another trial has come to the same
                trial.set_user_attr(RUN, run.id)
                self.finished(run, status)
            elif run.id not in self._ended and self._store.claim(run.id):
                self._take(trial, run)
                return run
            else:  # it is told with the one that is at it
                trial.set_user_attr(RUN, run.id)
        return None

    def watch(self, run: Run, entry: Entry) -> bool:
        """Whether the pruner gives the trial up; and a sign of life for the other machines."""
        trial = self._trials.get(run.id)
        if trial is None:
            return False
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self._beat(run.id, trial)
            return self._search.pruner != "none" and self._lags(trial, run, entry)
        except UpdateFinishedTrialError:  # another machine took it over, and was faster
            return False

    def _lags(self, trial: Any, run: Run, entry: Entry) -> bool:
        """Report the held-out losses that are new; whether the pruner gives the trial up."""
        names = [stage.name for stage in run.stages]
        at = self._store.status(run.id).stage
        if at not in names or not entry.held_out:
            return False
        (direction,) = self._sweep.objectives.values()
        for step, loss in entry.held_out:
            place = names.index(at) * _STAGE_STEPS + step
            if place > self._reported.get(run.id, -1):
                trial.report(loss if direction == "minimize" else -loss, place)
                self._reported[run.id] = place
        return bool(trial.should_prune())

    def finished(self, run: Run, status: Status) -> None:
        from optuna.trial import TrialState

        self._ended.add(run.id)
        if status.state == "stopped":
            return  # its trials are gone on with next time
        values: list[float] | None = None
        state = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(status.state)
        if state == TrialState.COMPLETE:
            found = [value_of(self._store, run, name) for name in self._sweep.objectives]
            values = [value for value in found if value is not None]
            if len(values) < len(found):
                state, values = None, None
        for trial in self._running():
            if trial.user_attrs.get(RUN) == run.id:
                self._study.tell(
                    trial.number, values, state=state or TrialState.FAIL, skip_if_finished=True
                )

    def over(self) -> bool:
        waiting = [t for t in self._running() if t.user_attrs.get(RUN) not in self._ended]
        return not waiting and self._asked() >= self.total

    def count_over(self) -> int:
        return sum(t.state.is_finished() and RUN in t.user_attrs for t in self._all())

    def _all(self) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False)
        return trials

    def _running(self) -> list[Any]:
        return [trial for trial in self._all() if not trial.state.is_finished()]

    def _asked(self) -> int:
        """Trials that count: those with a run, and those that are being proposed."""
        return sum(RUN in t.user_attrs or not t.state.is_finished() for t in self._all())

    def _ask(self) -> Any:
        """A new trial; None where all have been asked for, here or elsewhere."""
        from optuna.trial import TrialState

        if self._asked() >= self.total:
            return None
        trial = self._study.ask()
        before = [t for t in self._all() if t.number < trial.number]
        if sum(RUN in t.user_attrs or not t.state.is_finished() for t in before) >= self.total:
            self._study.tell(trial, state=TrialState.FAIL)  # another machine was faster
            return None
        return trial

    def _propose(self, trial: Any) -> Run:
        self._study.sampler = _sampler(self._search, trial.number)
        try:
            settings = {name: _suggest(trial, name, s) for name, s in self._search.space.items()}
            run = run_of(case_of(self._sweep, settings), self._model)
        except ValueError as error:
            from optuna.trial import TrialState

            self._study.tell(trial, state=TrialState.FAIL)
            raise UserError(
                f"{first_line(error)} (where the space has changed, name another search.study)"
            ) from error
        trial.set_user_attr(SETTINGS, json.dumps(settings))
        return run

    def _again(self, frozen: Any) -> Run:
        """The run of a trial that was cut off."""
        import optuna

        settings: Settings = json.loads(frozen.user_attrs[SETTINGS])
        run = run_of(case_of(self._sweep, settings), self._model)
        if run.id != frozen.user_attrs[RUN]:  # the recipe has changed meanwhile
            raise UserError(
                f"trial {frozen.number} of study {self._study.study_name!r} is of another recipe; "
                "name another search.study, or give another folder"
            )
        self._take(optuna.trial.Trial(self._study, frozen._trial_id), run)
        if frozen.intermediate_values:
            self._reported[run.id] = max(frozen.intermediate_values)
        return run

    def _take(self, trial: Any, run: Run) -> None:
        """The trial is run here from now on."""
        self._beat(run.id, trial)
        trial.set_user_attr(PLACE, self._place)
        trial.set_user_attr(RUN, run.id)
        self._trials[run.id] = trial

    def _beat(self, run: str, trial: Any) -> None:
        if time.monotonic() - self._beaten.get(run, -_BEAT) >= _BEAT:
            self._beaten[run] = time.monotonic()
            trial.set_user_attr(ALIVE, time.time())

    def _is_cut_off(self, trial: Any) -> bool:
        """Whether nobody is at it: in our folder the run's lock tells, elsewhere its silence."""
        if trial.user_attrs.get(PLACE) == self._place:
            return not self._store.is_alive(trial.user_attrs[RUN])
        return bool(time.time() - trial.user_attrs.get(ALIVE, 0.0) > _SILENT)

    def _forget_if_cut_off(self, trial: Any) -> None:
        """A trial whose process died while it was proposed has no run to go on with."""
        from optuna.trial import TrialState

        begun: datetime | None = trial.datetime_start
        if begun is not None and time.time() - begun.timestamp() > _ASKING:
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def open_study(sweep: Sweep, out: Path) -> Any:
    """The Optuna study, new or gone on with. Raises `UserError` where that is impossible."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "search needs Optuna, which is not installed: pip install 'prunedm[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert sweep.search is not None
    search, directions = sweep.search, list(sweep.objectives.values())
    url = search.storage or f"sqlite:///{(out / 'study.db').resolve()}"
    out.mkdir(parents=True, exist_ok=True)
    # several processes write to one SQLite file in turns
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(_ATTEMPTS):
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs=waiting)
            study = optuna.create_study(
                storage=storage,
                study_name=search.study or out.resolve().name,
                directions=directions,
                pruner=_pruner(search),
                load_if_exists=True,
            )
            break
        except Exception as error:  # a URL, a driver, a server, rights: whatever the database says
            if attempt + 1 == _ATTEMPTS:
                raise UserError(f"cannot open storage {url}: {first_line(error)}") from error
            time.sleep(
                0.2 * (attempt + 1)
            )  # two that make the tables at once are in each other's way
    found = [d.name.lower() for d in study.directions]
    if found != directions:
        raise UserError(
            f"study {study.study_name!r} has objectives {found}, the file {directions}; name "
            "another search.study, or give another folder"
        )
    return study


def _suggest(trial: Any, name: str, space: list[Any] | Range) -> Any:
    if isinstance(space, Range):
        ends = [space.low, space.high] + ([] if space.step is None else [space.step])
        if all(isinstance(end, int) for end in ends):
            return trial.suggest_int(
                name, space.low, space.high, step=space.step or 1, log=space.log
            )
        return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
    if all(value is None or isinstance(value, bool | int | float | str) for value in space):
        return trial.suggest_categorical(name, space)
    # lists and tables: Optuna stores plain values only
    return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in space]))


def _sampler(search: Search, number: int) -> Any:
    from optuna import samplers

    seed = seed_for(search.seed, "search", number) % (1 << 32)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(seed=seed)


def _pruner(search: Search) -> Any:
    from optuna import pruners

    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=search.pruner_patience)
    if search.pruner == "halving":
        return pruners.SuccessiveHalvingPruner()
    return pruners.NopPruner()
