"""The steps of an evaluation: a step that fails is recorded, and the evaluation continues."""

import time
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import TypeVar

from prunedm.errors import UserError, masked, shortened
from prunedm.evaluation.results import StepResult

Found = TypeVar("Found")


class Steps:
    """The steps taken so far, of one model or of all."""

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.taken: list[StepResult] = []

    def take(self, name: str, work: Callable[[], Found]) -> Found | None:
        """The result of `work`, or None where it fails. Interruptions propagate."""
        started, found, error = time.monotonic(), None, ""
        try:
            found = work()
        except Exception as problem:
            error = _in_words(problem)
        self.taken.append(
            StepResult(
                step=name,
                model=self.model,
                status="failed" if error else "done",
                seconds=round(time.monotonic() - started, 3),
                error=error,
            )
        )
        return found

    def skip(self, name: str, why: str) -> None:
        self.taken.append(StepResult(step=name, model=self.model, status="skipped", error=why))

    @property
    def failed(self) -> dict[str, str]:
        """Failed step -> its error."""
        return {s.step: s.error for s in self.taken if s.status == "failed"}

    @property
    def failures(self) -> list[str]:
        """One line per failure: the model, the step and the error."""
        return [
            f"{s.model}: {s.step} ({s.error})" if s.model else f"{s.step} ({s.error})"
            for s in self.taken
            if s.status == "failed"
        ]


def _in_words(error: Exception) -> str:
    """One line; for errors other than `UserError` with the type and the place."""
    text = shortened(masked(str(error)))
    if isinstance(error, UserError):
        return text
    places = extract_tb(error.__traceback__)
    where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {text}{where}"
