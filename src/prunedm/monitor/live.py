"""The view that renews itself, until `q` or Ctrl-C."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live

from prunedm.monitor.machine import Meter
from prunedm.monitor.screen import screen
from prunedm.monitor.snapshot import first_look, look


def show_once(console: Console, meter: Meter) -> None:
    console.print(screen(first_look(meter), width=console.width))


def show_live(console: Console, meter: Meter, every: float) -> None:
    """Renew the picture every `every` seconds; Ctrl-C or q ends it silently."""
    with suppress(KeyboardInterrupt), _keys() as key, _live(console) as live:
        snapshot = first_look(meter)
        while True:
            size = console.size
            live.update(screen(snapshot, width=size.width, height=size.height), refresh=True)
            if key(every) in ("q", "Q"):
                return
            snapshot = look(meter)


def _live(console: Console) -> Live:
    return Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, without Enter where the terminal allows it."""
    try:
        import select
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError):  # Windows, or no terminal to type in
        yield _sleep
        return
    except termios.error:
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
