"""The command line: parse, call a stage, print. Nothing heavy is imported before a command runs."""

import sys
from io import TextIOWrapper

from cyclopts import App

from prunedm import __version__
from prunedm.cli import distances, experiments, masks, monitoring, presets, run, verbs
from prunedm.cli.frame import app
from prunedm.errors import masked, shortened
from prunedm.messages import one_line
from prunedm.stages import STAGES
from prunedm.system.signals import Terminated, interruptible

__all__ = [
    "app",
    "distances",
    "experiments",
    "main",
    "masks",
    "monitoring",
    "presets",
    "run",
    "verbs",
]


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user can mend, 130 and 143 when interrupted."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal of ASCII shows "?" for what it lacks
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
        _fail("interrupted; the same command goes on where it can", code)
    except Exception as error:
        message = one_line(error)
        if debug:
            raise
        if message is None:
            _fail(f"internal error: {type(error).__name__}: {error}; --debug shows where", 1)
        _fail(str(message), 2)


def _help_all(tokens: list[str]) -> None:
    """The help of a command with all of its options; of any other, its help."""
    verb = next((token for token in tokens if not token.startswith("-")), "")
    if verb in STAGES or verb in ("compare", "run"):
        one = App(name="prunedm", version=__version__)
        if verb in STAGES:
            one.command(verbs.stage_command(STAGES[verb], everything=True))
        elif verb == "compare":
            one.command(verbs.compare_command(everything=True))
        else:
            one.command(run.run_command(everything=True))
        one([verb, "--help"])
    else:
        app([verb, "--help"] if verb else ["--help"])


def _fail(message: str, code: int) -> None:
    print("prunedm:", shortened(masked(message)), file=sys.stderr)
    raise SystemExit(code)
