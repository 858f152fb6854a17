"""Commands above the recipe: sweeps, and the schemas of their files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from prunedm.cli.frame import app, to_input, to_output, watched_terminal

if TYPE_CHECKING:
    from prunedm.experiments.plan import Sweep
    from prunedm.experiments.results import Row

sweep = App(
    name="sweep",
    help="Run a recipe with many settings, in a grid or searched by Optuna: prunedm sweep FILE OUT",
)
app.command(sweep)


@sweep.default
def make(
    file: Annotated[Path, Parameter(help="the sweep's YAML file", converter=to_input)],
    out: Annotated[Path, Parameter(help="folder of all runs", converter=to_output)],
    /,
    *,
    workers: Annotated[
        int, Parameter(help="parallel runs; 0: one per GPU, or one on a machine without")
    ] = 0,
    threads: Annotated[
        int, Parameter(help="processor threads of each; 0: an equal share of the cores")
    ] = 0,
    only: Annotated[
        tuple[str, ...],
        Parameter(help="only runs with this word in their label, such as pattern=2:4; repeatable"),
    ] = (),
    retry: Annotated[bool, Parameter(help="start failed runs again", negative=())] = False,
    dry_run: Annotated[
        bool, Parameter(help="only list the runs and their state", negative=())
    ] = False,
) -> None:
    """Run what is not done yet, and write OUT/sweep.html.

    The same command continues after an interruption, kill -9 included; started on several machines with
    a shared OUT, they share the runs. A stage that several runs begin with is made once. Exit code 1
    means that a run of the grid has failed.
    """
    from prunedm.console import Terminal
    from prunedm.experiments.plan import draft_of, read_sweep
    from prunedm.experiments.sweep import planned
    from prunedm.experiments.sweep import sweep as run_sweep

    plan = read_sweep(file)
    for line in draft_of(plan, {}).old_form(f"{file}, recipe"):
        Terminal().say(line)
    if dry_run:
        _show(planned(plan, out, only), plan, out, write=False)
        return
    with watched_terminal(out, "sweep") as terminal:
        rows = run_sweep(
            plan,
            out,
            workers=workers,
            threads=threads,
            only=only,
            retry=retry,
            progress=terminal,
        )
    _show(rows, plan, out)
    if plan.search is None and any(row.status.state == "failed" for row in rows):
        raise SystemExit(1)


@sweep.command
def show(
    out: Annotated[Path, Parameter(help="folder of a sweep, finished or not", converter=to_output)],
    /,
) -> None:
    """Print the current table of runs and the Pareto front, and rewrite OUT/sweep.html."""
    from prunedm.experiments.sweep import read_kept, rows_of

    _show(rows_of(out), read_kept(out).sweep, out)


@app.command
def schema(of: Literal["recipe", "sweep"] = "recipe", /) -> None:
    """Print the JSON schema of a file, for editors to complete and check it."""
    from prunedm.experiments.plan import Sweep
    from prunedm.recipe import Recipe

    table = (Sweep if of == "sweep" else Recipe).model_json_schema()
    print(json.dumps(table, indent=1, ensure_ascii=False))


def _show(rows: "list[Row]", plan: "Sweep", out: Path, *, write: bool = True) -> None:
    from prunedm.console import Terminal, console
    from prunedm.experiments.page import write_page
    from prunedm.experiments.table import sweep_table

    sweep_table(rows, plan, console)
    if write:
        Terminal().say(f"page: {write_page(rows, plan, out).resolve()}")
