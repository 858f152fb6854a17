"""Optuna proposes a sweep's runs. Several machines may share its storage.

A trial that was cut off, even by kill -9, is found by the run it names and continued. Trial k is
proposed with a seed from (seed, k), so that with one worker an interrupted search proposes the same
trials as an uninterrupted one.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prunedm.errors import UserError, first_line
from prunedm.experiments.plan import Settings, Sweep, case_of
from prunedm.experiments.results import value_of
from prunedm.experiments.store import Run, Status, Store, recipe_of, run_of
from prunedm.experiments.study import open_study, sampler_for, suggest
from prunedm.options import LearnOptions, LoopOptions
from prunedm.recipe import steps_of
from prunedm.system.running import Entry

# a trial's attributes: its run, settings, folder (by name), last sign of life, and error
RUN, SETTINGS, PLACE, ALIVE, ERROR = "run", "settings", "place", "alive", "error"
_ASKING = 120.0  # seconds after which a trial without a run counts as cut off
_BEAT = 60.0  # seconds between signs of life
_SILENT = 600.0  # seconds after which a run in another machine's folder counts as cut off


class Searching:
    """The source of a search's runs; the interface is that of `Grid`."""

    def __init__(self, sweep: Sweep, store: Store, hashes: Mapping[str, str], place: str) -> None:
        """hashes: of the runs' inputs, see `run_of`. place: a unique name of the store's folder."""
        assert sweep.search is not None
        self._place, self._hashes = place, hashes
        self._sweep, self._store, self._search = sweep, store, sweep.search
        self._study = open_study(sweep, store.out, hashes)
        self._trials: dict[str, list[Any]] = {}  # run -> trials waiting for it here
        self._reported: dict[str, int] = {}  # run -> the last step reported
        self._beaten: dict[int, float] = {}  # trial -> last sign of life
        self._seen: dict[int, float] = {}  # trial without a run -> first seen
        self._ended: set[str] = set()
        self.total = self._search.trials

    def next(self, busy: Sequence[Run]) -> Run | None:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            return self._cut_off({run.id for run in busy}) or self._new()
        except UpdateFinishedTrialError:  # another machine considered the trial cut off
            self._store.release_all(but={run.id for run in busy})
            return None

    def _cut_off(self, busy: set[str]) -> Run | None:
        """The run of a trial that no process works on any more."""
        by_run: dict[str, list[Any]] = {}
        for trial in self._running():
            run = trial.user_attrs.get(RUN)
            if run is None:
                self._forget_if_cut_off(trial)
            else:
                by_run.setdefault(run, []).append(trial)
        for run, trials in by_run.items():
            if run in busy | self._ended or any(map(self._is_alive, trials)):
                continue
            if self._store.claim(run):
                still = [t for t in self._running() if t.user_attrs.get(RUN) == run]
                if still:
                    return self._again(still)
                self._store.release(run)  # another scheduler has just finished it
        return None

    def _new(self) -> Run | None:
        """The run of a new trial, skipping trials whose run exists already."""
        while (trial := self._ask()) is not None:
            run = self._propose(trial)
            if run is None:
                continue
            status = self._store.status(run.id)
            told = any(
                t.user_attrs.get(RUN) == run.id for t in self._all() if t.state.is_finished()
            )
            mine = run.id not in self._ended and self._store.claim(run.id)
            self._take(trial, run.id)
            if status.state == "done" or (told and status.state in ("failed", "pruned")):
                if mine:
                    self._store.release(run.id)
                self.finished(run, status)
            elif mine:
                return run
        return None

    def watch(self, run: Run, entry: Entry | None) -> bool:
        """Whether the pruner ends the trial; also gives other machines a sign of life."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            for trial in self._trials.get(run.id, []):
                self._beat(trial)
            if self._search.pruner == "none" or entry is None or run.id not in self._trials:
                return False
            return self._lags(self._trials[run.id][0], run, entry)
        except UpdateFinishedTrialError:  # another machine took it over
            return False

    def _lags(self, trial: Any, run: Run, entry: Entry) -> bool:
        """Report new held-out losses; returns whether the pruner ends the trial."""
        status = self._store.status(run.id)
        names = [stage.name for stage in run.stages]
        # else the losses are of an earlier stage
        fresh = entry.task_started >= status.stage_started
        if status.stage not in names or not entry.held_out or not fresh:
            return False
        before = _steps_before(run, names.index(status.stage))
        (direction,) = self._sweep.objectives.values()
        for step, loss in entry.held_out:
            if before + step > self._reported.get(run.id, -1):
                trial.report(loss if direction == "minimize" else -loss, before + step)
                self._reported[run.id] = before + step
        return bool(trial.should_prune())

    def finished(self, run: Run, status: Status) -> None:
        from optuna.trial import TrialState

        self._ended.add(run.id)
        if status.state == "stopped":
            return  # its trials continue next time
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
        return sum(t.state.is_finished() and SETTINGS in t.user_attrs for t in self._all())

    def _all(self) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False)
        return trials

    def _running(self) -> list[Any]:
        return [trial for trial in self._all() if not trial.state.is_finished()]

    def _asked(self) -> int:
        """The number of trials with settings or being proposed."""
        return sum(map(_counts, self._all()))

    def _ask(self) -> Any:
        """A new trial; None where all have been asked for on some machine."""
        from optuna.samplers import RandomSampler
        from optuna.trial import Trial, TrialState

        if self._asked() >= self.total:
            return None
        self._study.sampler = RandomSampler()  # draws nothing: the number decides the sampler
        trial = self._study.ask()
        if sum(_counts(t) for t in self._all() if t.number < trial.number) >= self.total:
            self._study.tell(trial, state=TrialState.FAIL)  # another machine was faster
            return None
        self._study.sampler = sampler_for(self._search, trial.number)
        return Trial(self._study, trial._trial_id)

    def _propose(self, trial: Any) -> Run | None:
        """The run of a trial's settings; None where the recipe rejects them."""
        from optuna.trial import TrialState

        try:
            settings = {name: suggest(trial, name, s) for name, s in self._search.space.items()}
        except ValueError as error:
            self._study.tell(trial, state=TrialState.FAIL)
            raise UserError(
                f"{first_line(error)} (the space has changed: name another search.study)"
            ) from error
        trial.set_user_attr(SETTINGS, json.dumps(settings))
        try:
            return run_of(case_of(self._sweep, settings), self._hashes)
        except UserError as error:  # incompatible options: one failed trial
            trial.set_user_attr(ERROR, str(error))
            self._study.tell(trial, state=TrialState.FAIL)
            return None

    def _take(self, trial: Any, run: str) -> None:
        """Let the trial wait for a run here from now on."""
        self._beat(trial)
        trial.set_user_attr(PLACE, self._place)
        trial.set_user_attr(RUN, run)
        self._trials.setdefault(run, []).append(trial)

    def _again(self, cut_off: Sequence[Any]) -> Run:
        from optuna.trial import Trial

        settings: Settings = json.loads(cut_off[0].user_attrs[SETTINGS])
        run = run_of(case_of(self._sweep, settings), self._hashes)
        assert run.id == cut_off[0].user_attrs[RUN], "the study's basis is the sweep's"
        for frozen in cut_off:
            self._take(Trial(self._study, frozen._trial_id), run.id)
        steps = [step for frozen in cut_off for step in frozen.intermediate_values]
        self._reported[run.id] = max(steps, default=-1)
        return run

    def _beat(self, trial: Any) -> None:
        now = time.monotonic()
        if now - self._beaten.get(trial.number, -_BEAT) >= _BEAT:
            self._beaten[trial.number] = now
            trial.set_user_attr(ALIVE, time.time())

    def _is_alive(self, trial: Any) -> bool:
        """Whether a process works on it: by the run's lock in our folder, by signs of life elsewhere."""
        if trial.user_attrs.get(PLACE) == self._place:
            return self._store.is_alive(trial.user_attrs[RUN])
        return bool(time.time() - trial.user_attrs.get(ALIVE, 0.0) <= _SILENT)

    def _forget_if_cut_off(self, trial: Any) -> None:
        """Fail a trial whose process died while it was proposed: it has no run to continue."""
        from optuna.trial import TrialState

        seen = self._seen.setdefault(trial.number, time.monotonic())
        if time.monotonic() - seen > _ASKING:
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _counts(trial: Any) -> bool:
    return SETTINGS in trial.user_attrs or not trial.state.is_finished()


def _steps_before(run: Run, stage: int) -> int:
    """Optimizer steps of the earlier stages, so that a run's steps only increase."""
    every = [step.options for step in steps_of(recipe_of(run))[:stage]]
    return sum((o.filled() if isinstance(o, LearnOptions) else o).steps
               for o in every if isinstance(o, LoopOptions))  # fmt: skip
