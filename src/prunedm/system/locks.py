"""Locks that the system releases however their process ends."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["Timeout", "locked"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, removed afterwards; raises `Timeout` where another process has it.

    A process may lock a file that was removed meanwhile, which locks nothing; it then tries again.
    """
    while True:
        path.touch()
        before = _inode(path)
        with FileLock(path, timeout=0):
            if before is None or _inode(path) != before:
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
