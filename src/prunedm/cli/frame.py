"""What every command has: the app, its common parameters, and how a stage is run and reported."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prunedm import __version__
from prunedm.recipe import describe

if TYPE_CHECKING:
    from prunedm.record import Record

app = App(
    name="prunedm",
    help="Make diffusion models small and fast, and prove what is left still works.\n\n"
    "`prunedm run` does everything on the embedded digits model. Every stage takes options from "
    "`--config FILE.yaml`; the command line wins. `--debug` shows tracebacks.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says how to go on
)
Flat = Parameter(name="*")
Config = Annotated[Path | None, Parameter(help="YAML file of options; the command line wins")]
Overwrite = Annotated[
    bool,
    Parameter(help="replace OUT if it holds another result, or failed measurements", negative=()),
]
Model = Annotated[str, Parameter(help="a model folder, a hub id like owner/name, or digits")]
Out = Annotated[Path, Parameter(help="the new folder")]


def report(
    stage: Callable[..., tuple["Record", bool]], *arguments: Any, overwrite: bool
) -> "Record":
    """Run a stage with bars, and say in one line what came out."""
    from prunedm.console import Terminal

    terminal = Terminal()
    record, made = stage(*arguments, progress=terminal, overwrite=overwrite)
    out = next(a for a in reversed(arguments) if isinstance(a, Path))
    terminal.say(f"{out}: {describe(record.figures, record.wall_time_s, made)}")
    return record


def show_comparison(folder: Path) -> None:
    """The table, what failed or is missing, and where the report is."""
    from prunedm.console import Terminal, evaluation_table
    from prunedm.stages.compare import REPORT, SUMMARY, read_comparison

    evaluation_table(read_comparison(folder))
    Terminal().say((folder / SUMMARY).read_text(encoding="utf-8").splitlines()[-1])
    if (folder / REPORT).exists():  # its step may have failed
        Terminal().say(f"report: {(folder / REPORT).resolve()}")
