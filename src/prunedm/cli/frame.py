"""What commands share: the app, common parameters, the watched terminal."""

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
from prunedm.system.places import expanded, target

if TYPE_CHECKING:
    from prunedm.system.watching import Watched

app = App(
    name="prunedm",
    help="Make diffusion models small and fast, and prove what is left still works.\n\n"
    "`prunedm run` does everything on the embedded digits model. Every stage takes options from "
    "`--config FILE.yaml`; the command line wins. `--debug` shows tracebacks.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says how to continue
)
Flat = Parameter(name="*")


def to_output(_: object, tokens: Sequence[Token]) -> Path:
    """A folder or file to write, with `~` expanded; refused here where it is impossible."""
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


def check_names(*names: str, dataset: str = "digits") -> None:
    """Raise `UserError` for a model or dataset that cannot be found, before PyTorch is imported."""
    from prunedm.hub import find_locally

    for name in filter(None, names):
        find_locally(name)
    if dataset not in ("", "digits"):
        from prunedm.data.hub import open_hub
        from prunedm.data.tables import TEXTS, find_dataset

        texts = Path(dataset).suffix.lower() in TEXTS and Path(dataset).is_file()
        if not texts and find_dataset(dataset) is None:
            open_hub(dataset)


def watched_terminal(out: Path, stage: str = "") -> "Watched":
    """The terminal as a progress that `prunedm monitor` sees while the context lasts."""
    from prunedm.console import Terminal
    from prunedm.system.watching import Watched
    from prunedm.training import processes

    return Watched(
        Terminal(), out, stage=stage, command=_command(), registered=processes.rank() == 0
    )


def _command() -> str:
    """The command that starts this again; for several processes, their launcher's."""
    import psutil

    from prunedm.training import processes

    if processes.count() > 1:
        with suppress(psutil.Error):
            return shlex.join(psutil.Process(os.getppid()).cmdline())
    script = Path(sys.argv[0]).stem
    start = ["prunedm"] if script in ("prunedm", "__main__") else ["python", sys.argv[0]]
    words = [word.encode("utf-8", "replace").decode() for word in sys.argv[1:]]
    return shlex.join([*start, *words])
