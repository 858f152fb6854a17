"""The command that looks at the others: monitor."""

import math
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prunedm.cli.frame import app
from prunedm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from prunedm.system.running import Entry


@app.command
def monitor(
    *,
    every: Annotated[float, Parameter(help="seconds between looks")] = 1.0,
    once: Annotated[bool, Parameter(help="print the picture once", negative=())] = False,
    json: Annotated[bool, Parameter(help="print it once as JSON", negative=())] = False,
    stop: Annotated[
        str | None, Parameter(help="end this run alone, cleanly: its folder, name or pid")
    ] = None,
    log: Annotated[
        str | None, Parameter(help="print what this run said last: its folder, name or pid")
    ] = None,
) -> None:
    """Show what runs: progress, remaining time, figures, CPUs, memory, GPUs; stop one of them."""
    from rich.console import Console

    from prunedm.monitor.live import show_live, show_once
    from prunedm.monitor.machine import Meter
    from prunedm.monitor.runs import find_run, said
    from prunedm.system.running import entries

    if not 0 < every < math.inf:
        raise UserError(f"every = {every:g} is no time between looks; try 1")
    console = Console()
    if stop is not None:
        _stop(find_run(stop, entries()), console)
    elif log is not None:
        for line in said(find_run(log, entries())):
            _say(console, line)
    elif json:
        _json()
    elif once or not console.is_terminal:
        show_once(console, Meter())
    else:
        show_live(console, Meter(), every)


def _stop(entry: "Entry", console: "Console") -> None:
    from prunedm.monitor.runs import STOP_WITHIN, how_to_go_on, stop_and_wait

    _say(console, f"stopping {entry.out} (pid {entry.pid})")
    if not stop_and_wait(entry):
        raise UserError(
            f"{entry.name} was told to stop and still runs after {STOP_WITHIN:.0f} s: look again, "
            f"or end it with kill -9 {entry.pid}; what it saved stays"
        )
    _say(console, f"stopped; the same command goes on: {how_to_go_on(entry)}")


def _json() -> None:
    import json

    from prunedm.monitor.machine import Meter, first_look
    from prunedm.record import finite

    print(json.dumps(finite(first_look(Meter()).model_dump(mode="json")), indent=1))


def _say(console: "Console", text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
