"""The command line: parse, call a stage, print. Nothing heavy is imported before a command runs."""

import sys

from prunedm.cli import distances, making, masks, measuring
from prunedm.cli.frame import app
from prunedm.messages import one_line

__all__ = ["app", "distances", "main", "making", "masks", "measuring"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user can mend, 130 when interrupted."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it can", 130)
    except Exception as error:
        message = one_line(error)
        if debug:
            raise
        if message is None:
            _fail(f"internal error: {type(error).__name__}: {error}; --debug shows where", 1)
        _fail(str(message), 2)


def _fail(message: str, code: int) -> None:
    print("prunedm:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
