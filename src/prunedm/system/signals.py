"""SIGINT and SIGTERM end a command cleanly, in the background and under a scheduler too."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, with which schedulers and torchrun end a process."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the context both signals raise; a shell's background jobs would otherwise ignore SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
