"""The command line: parse, call a stage, print. Nothing heavy is imported before a command runs."""

import sys
from functools import partial
from io import TextIOWrapper

from cyclopts import App

from prunedm import __version__
from prunedm.cli import experiments, run, tools, verbs
from prunedm.cli.frame import app
from prunedm.errors import masked, shortened
from prunedm.messages import one_line
from prunedm.stages.table import VERBS
from prunedm.system.signals import Terminated, interruptible

__all__ = ["app", "experiments", "main", "run", "tools", "verbs"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2 for errors that the user can fix, 130 or 143 when interrupted."""
    if isinstance(sys.stdout, TextIOWrapper):  # an ASCII terminal shows "?" for other characters
        sys.stdout.reconfigure(errors="replace")
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    if "--help-all" in tokens:
        _help_all(tokens)
        return
    tokens = [token for token in tokens if token != "--debug"]
    try:
        with interruptible():
            app(tokens, exit_on_error=False, print_error=False)
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, Terminated) else 130
        _fail("interrupted; the same command continues where it can", code)
    except Exception as error:
        message = one_line(error)
        if debug:
            raise
        if message is None:
            _fail(f"internal error: {type(error).__name__}: {error}; --debug shows where", 1)
        _fail(str(message), 2)


def _help_all(tokens: list[str]) -> None:
    """Print a command's help with all of its options."""
    verb = next((token for token in tokens if not token.startswith("-")), "")
    shown = app
    if verb in VERBS or verb == "run":
        shown = App(name="prunedm", version=__version__)
        command = run.run_command if verb == "run" else partial(verbs.stage_command, VERBS[verb])
        shown.command(command(everything=True))
    shown([verb, "--help"] if verb else ["--help"])


def _fail(message: str, code: int) -> None:
    print("prunedm:", shortened(masked(message)), file=sys.stderr)
    raise SystemExit(code)
