"""Zero-shot tasks: questions with answers to choose from or to write, by lm-eval (EleutherAI's harness).

A task's figures are named "task:arc_easy:acc" and "task:arc_easy:acc_se", the standard error. Which
there are is known once they are measured, so their metrics are made of the names.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from prunedm.data.hub import offline
from prunedm.errors import UserError, first_line
from prunedm.evaluation.metric import Measurement, Metric, fixed
from prunedm.evaluation.results import TASK
from prunedm.hub import why_silent

# of lm-eval's metrics, those where less is better
LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
MEASURED = Measurement("tasks", "tasks")


def task_metrics(names: Iterable[str]) -> list[Metric]:
    """A metric for each of these figures that is a task's."""
    found = []
    for name in dict.fromkeys(names):
        if name.startswith(TASK) and not name.endswith("_se"):
            _, task, figure = name.split(":", 2)
            found.append(
                Metric(
                    name,
                    f"{task}, {figure}",
                    f"lm-eval's {figure} ± its standard error on the questions of {task}",
                    fixed(4),
                    MEASURED,
                    better="lower" if figure.split("@")[0] in LOWER else "higher",
                    of="texts",
                    spread=f"{name}_se",
                )
            )
    return found


class Tasks:
    """Tasks that lm-eval knows, or finds in a folder of definitions (YAML), with their questions."""

    def __init__(self, names: Sequence[str], folder: str = "") -> None:
        """Raises `UserError` without lm-eval, for unknown names and for questions out of reach."""
        if find_spec("lm_eval") is None:
            raise UserError("--tasks needs lm_eval; run: pip install 'prunedm[lm-eval]'")
        from huggingface_hub import HfApi
        from lm_eval.tasks import TaskManager

        self.names, self._manager = list(names), TaskManager(include_path=folder or None)
        known = self._manager.all_tasks
        if unknown := [name for name in names if name not in known]:
            near = get_close_matches(unknown[0], known, n=3, cutoff=0.5)
            others = f"near are {', '.join(near)}" if near else "`lm_eval ls tasks` lists all"
            raise UserError(f"--tasks: lm-eval has no {unknown[0]!r}; {others}")
        self._why = why_silent(lambda limit: HfApi().dataset_info("gsm8k", timeout=limit)) or ""
        try:
            with offline(bool(self._why)):  # else each request is tried for half a minute
                self._leaves = {name: list(self._manager.load([name])["tasks"]) for name in names}
        except Exception as error:  # the task's own code and files, datasets, the hub
            why = f"; the hub cannot be reached ({self._why})" if self._why else ""
            raise UserError(
                f"--tasks: cannot read the questions: {first_line(error)[:200]}{why}"
            ) from error

    @torch.no_grad()
    def figures(
        self, network: nn.Module, tokenizer: Any, *, examples: int = 0, batch_size: int = 1
    ) -> dict[str, float]:
        """What lm-eval measures of a network of transformers, by the names of figures.

        A group's figures are its own; a tag's are those of its tasks. examples: of each task, the
        first so many; 0: all.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with offline(bool(self._why)):
            found = simple_evaluate(
                HFLM(network, backend="causal", tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.names,
                task_manager=self._manager,
                limit=examples or None,
                log_samples=False,
                random_seed=None,  # global ones; few-shot examples have a seed of their own
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        assert found is not None  # this is the only process
        rows: dict[str, dict[str, Any]] = found["results"]
        shown = [n for name in self.names for n in ([name] if name in rows else self._leaves[name])]
        return {key: value for task in shown for key, value in _figures(task, rows[task])}


def _figures(task: str, row: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """Of one row of lm-eval: "acc,none" and "acc_stderr,none"; a filter other than none is named."""
    for key, value in row.items():
        figure, comma, how = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        spread = figure.endswith("_stderr")
        name = figure.removesuffix("_stderr") + (f"@{how}" if how != "none" else "")
        yield f"{TASK}{task}:{name}{'_se' * spread}", float(value)
