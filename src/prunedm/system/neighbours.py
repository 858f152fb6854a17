"""Processor use by other processes while something is timed."""

import os
import time

import psutil

DISTURBED = 0.1  # share of the processor from which a warning is due


class Neighbours:
    """Counts from its creation; threads and reaped children of this process do not count."""

    def __init__(self) -> None:
        self._began = time.monotonic(), _busy_seconds(), _own_seconds()

    @property
    def share(self) -> float:
        """Share of all cores' time that other processes, and other machines of the host, used."""
        began, busy, own = self._began
        cores_seconds = (time.monotonic() - began) * (os.cpu_count() or 1)
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        return min(1.0, max(0.0, others / cores_seconds)) if cores_seconds else 0.0


def disturbance(share: float) -> str:
    """A warning where times cannot be trusted, else ""."""
    if share < DISTURBED:
        return ""
    return f"other processes used {share:.0%} of the processor meanwhile: these times are too long"


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # also in user
    return sum(times) - idle - guests


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
