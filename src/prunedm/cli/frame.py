"""What every command has: the app, its common parameters, and how a stage is run and reported."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter, Token

from prunedm import __version__
from prunedm.errors import UserError
from prunedm.recipe import describe
from prunedm.system.places import expanded, target

if TYPE_CHECKING:
    from prunedm.record import Record
    from prunedm.system.watching import Watched

app = App(
    name="prunedm",
    help="Make diffusion models small and fast, and prove what is left still works.\n\n"
    "`prunedm run` does everything on the embedded digits model. Every stage takes options from "
    "`--config FILE.yaml`; the command line wins. `--debug` shows tracebacks.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says how to go on
)
Flat = Parameter(name="*")


def to_output(_: object, tokens: Sequence[Token]) -> Path:
    """A folder or file to be made, as the user named it but for `~`; refused before any work."""
    target(tokens[0].value)
    return expanded(tokens[0].value)


def to_input(_: object, tokens: Sequence[Token]) -> Path:
    if not tokens[0].value.strip():
        raise UserError("the file has no name; give one, or leave the option out")
    return expanded(tokens[0].value)


Config = Annotated[
    Path | None,
    Parameter(help="YAML file of options; the command line wins", converter=to_input),
]
Overwrite = Annotated[
    bool,
    Parameter(help="replace OUT if it holds another result, or failed measurements", negative=()),
]
Model = Annotated[str, Parameter(help="a model folder, a hub id like owner/name, or digits")]
Out = Annotated[Path, Parameter(help="the new folder", converter=to_output)]


def told(terminal: "Watched", out: Path, record: "Record", *, made: bool) -> None:
    """Say in one line what came out."""
    terminal.say(f"{out}: {describe(record.figures, record.wall_time_s, made)}")
    terminal.result(record.figures, made=made)


def check_names(*names: str, dataset: str = "digits") -> None:
    """Raise `UserError` for a model or dataset that is nowhere, before PyTorch is imported."""
    from prunedm.hub import find_locally

    for name in filter(None, names):
        find_locally(name)
    if dataset not in ("", "digits"):
        from prunedm.data.hub import open_hub
        from prunedm.data.tables import find_dataset

        if find_dataset(dataset) is None:
            open_hub(dataset)


def watched_terminal(out: Path, stage: str = "") -> "Watched":
    """The terminal as a progress that `prunedm monitor` sees while its context lasts."""
    from prunedm.console import Terminal
    from prunedm.system.watching import Watched
    from prunedm.training import processes

    return Watched(
        Terminal(), out, stage=stage, command=_command(), registered=processes.rank() == 0
    )


def _command() -> str:
    """What starts this again: of several processes, their launcher's words."""
    import psutil

    from prunedm.training import processes

    if processes.count() > 1:
        with suppress(psutil.Error):
            return shlex.join(psutil.Process(os.getppid()).cmdline())
    script = Path(sys.argv[0]).stem
    start = ["prunedm"] if script in ("prunedm", "__main__") else ["python", sys.argv[0]]
    words = [word.encode("utf-8", "replace").decode() for word in sys.argv[1:]]
    return shlex.join([*start, *words])
