"""The next run of a grid; search.py has the same interface for Optuna."""

from collections.abc import Sequence

from prunedm.experiments.store import Run, Status, Store
from prunedm.system.running import Entry


class Grid:
    """All combinations; those that need no stage in progress elsewhere come first.

    The scheduler asks it for runs. Several schedulers may share a sweep's folder.
    """

    def __init__(self, runs: Sequence[Run], store: Store, *, retry: bool = False) -> None:
        self._runs, self._store, self._retry = runs, store, retry
        self._ended: set[str] = set()  # in this session, and not started again
        self.total = len(runs)

    def next(self, busy: Sequence[Run]) -> Run | None:
        """A run to start now, claimed, while `busy` ones run here; None where there is none yet."""
        taken = {run.id for run in busy}
        open_runs = [run for run in self._runs if run.id not in taken and self._is_open(run)]
        making = {self._first_missing(run) for run in busy}
        making |= {stage.folder for run in busy for stage in run.stages}
        free = [run for run in open_runs if self._first_missing(run) not in making]
        for run in [*free, *open_runs]:
            if self._store.claim(run.id):
                if self._is_open(run):
                    return run
                self._store.release(run.id)  # another scheduler has just finished it
        return None

    def watch(self, run: Run, entry: Entry | None) -> bool:
        """Whether a running run should be ended early."""
        return False

    def finished(self, run: Run, status: Status) -> None:
        """Note that a run started here has ended."""
        self._ended.add(run.id)

    def over(self) -> bool:
        """Whether nothing is left to start or still running elsewhere."""
        return not any(self._is_open(run) for run in self._runs)

    def count_over(self) -> int:
        """How many of `total` are over."""
        return sum(not self._is_open(run) for run in self._runs)

    def _is_open(self, run: Run) -> bool:
        state = self._store.status(run.id).state
        if run.id in self._ended or state == "done":
            return False
        return state != "failed" or self._retry

    def _first_missing(self, run: Run) -> str:
        folders = [stage.folder for stage in run.stages] + [run.evaluation]
        return next((f for f in folders if not self._store.stage(f).exists()), "")
