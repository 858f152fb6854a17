"""The command line: parse, call a stage, print. Nothing heavy is imported before a command runs."""

import sys

from prunedm.cli import distances, experiments, masks, monitoring, presets, run, verbs
from prunedm.cli.frame import app
from prunedm.errors import masked, shortened
from prunedm.messages import one_line
from prunedm.signals import Terminated, interruptible

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
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
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


def _fail(message: str, code: int) -> None:
    print("prunedm:", shortened(masked(message)), file=sys.stderr)
    raise SystemExit(code)
