"""What the terminal shows: bars with remaining time, tables, one-line messages."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from prunedm.progress import Task

if TYPE_CHECKING:
    from prunedm.evaluation.results import Evaluation

console = Console()


class Terminal:
    """Progress bars by rich; on a pipe or in CI, one line at the end of each task."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _Left(compact=True, elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Bars(*columns, console=console) as bars:
            yield _Bar(bars, label, total, done)

    def say(self, text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)  # paths stay whole


class _Left(TimeRemainingColumn):
    """The remaining time, or, at the end, the time it took."""

    def render(self, task: RichTask) -> Text:
        return super().render(task).append(" took" if task.finished else " left")


class _Bar:
    def __init__(self, bars: Bars, label: str, total: int, done: int) -> None:
        self.bars = bars
        self.id = bars.add_task(label, total=total, completed=done, note="")

    def advance(self, units: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"note": note} if note else {}
        self.bars.update(self.id, advance=units, **fields)


def evaluation_table(evaluations: "Sequence[Evaluation]") -> None:
    """The comparison, one row a model."""
    from prunedm.evaluation.table import rich_table

    console.print(rich_table(evaluations, width=console.width))


def pruning_table(stats_file: Path) -> None:
    """What pruning did to each layer: widths before and after, or the share of zeros."""
    stats = json.loads(stats_file.read_text(encoding="utf-8"))
    table = Table("layer", "before => after", title="pruning", title_justify="left")
    for name, value in stats["layers"].items():
        table.add_row(name, _change(value))
    for name, reason in stats.get("dense", {}).items():
        table.add_row(name, f"dense: {reason}")
    before, after = stats["before"], stats["after"]
    for key in ("params", "nonzero", "macs"):
        share = 1 - after[key] / before[key]
        table.add_row(f"[bold]{key}", f"{before[key]:,} => {after[key]:,}  (-{share:.1%})")
    table.add_row("[bold]loss", f"{before['loss']:.4f} => {after['loss']:.4f}")
    console.print(table)


def _change(value: list[list[int]] | float) -> str:
    if isinstance(value, float):
        return f"{value:.1%} zeros"
    before, after = ("x".join(map(str, widths)) for widths in value)
    return before if before == after else f"{before} => {after}"
