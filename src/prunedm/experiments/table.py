"""A sweep in the terminal: every run with its objectives and its state."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunedm.experiments.page import header_of, in_words, shown
from prunedm.experiments.plan import Sweep
from prunedm.experiments.results import Row

_STYLES = {"done": "", "failed": "red", "running": "cyan", "stopped": "yellow"}


def sweep_table(rows: Sequence[Row], plan: Sweep, console: Console) -> None:
    """Print the table; ★ marks the Pareto front. Failures have a line each below it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    for name, way in plan.objectives.items():
        arrow = "↓" if way == "minimize" else "↑"
        table.add_column(f"{header_of(name)} {arrow}", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, plan))
    console.print(table)
    if any(row.best for row in rows):
        console.print("★ no other run is as good in all objectives and better in one", style="dim")
    for row in rows:
        if row.status.state == "failed":
            console.print(f"failed: {row.label}: {row.status.error}", style="red", markup=False)


def _cells(row: Row, plan: Sweep) -> list[Text]:
    style = _STYLES.get(row.status.state, "dim")
    values = [Text(shown(name, row.values[name])) for name in plan.objectives]
    state = row.status.state
    if state in ("running", "stopped", "pruned") and row.status.stage:
        state = f"{state}: {row.status.stage}"  # type: ignore[assignment]
    time = in_words(row.status.seconds) if row.status.seconds else ""
    label = Text(("★ " if row.best else "  ") + row.label, style="bold" if row.best else "")
    return [label, *values, Text(state, style=style), Text(time, style="dim")]
