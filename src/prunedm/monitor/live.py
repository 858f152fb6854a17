"""The view that refreshes itself until `q` or Ctrl-C."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live

from prunedm.monitor.machine import Meter, first_look, look
from prunedm.monitor.screen import screen


def show_once(console: Console, meter: Meter) -> None:
    console.print(screen(first_look(meter), width=console.width))


def show_live(console: Console, meter: Meter, every: float) -> None:
    """Refresh the view every `every` seconds; Ctrl-C or q ends it silently."""
    view = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    with suppress(KeyboardInterrupt), _keys() as key, view as live:
        snapshot = first_look(meter)
        while True:
            size = console.size
            live.update(screen(snapshot, width=size.width, height=size.height), refresh=True)
            if key(every) in ("q", "Q"):
                return
            snapshot = look(meter)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits some seconds for a key, without Enter where the terminal allows it."""
    try:
        import select
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
    except Exception:  # Windows, or no terminal to type in; termios.error has no base but Exception
        yield _sleep
        return

    def wait(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    tty.setcbreak(sys.stdin)
    try:
        yield wait
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return ""
