"""What other processes use is told from what this one does."""

import subprocess
import sys
import time

from prunedm.system.neighbours import Neighbours, disturbance

BUSY = "import time\nend = time.process_time() + 60\nwhile time.process_time() < end: pass"


def test_work_of_its_own_is_none_and_a_neighbours_is_some(monkeypatch):
    """By counters: how busy this machine is must not decide."""
    clock = {"now": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr("prunedm.system.neighbours.time.monotonic", lambda: clock["now"])
    monkeypatch.setattr("prunedm.system.neighbours._busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr("prunedm.system.neighbours._own_seconds", lambda: clock["own"])
    monkeypatch.setattr("prunedm.system.neighbours.os.cpu_count", lambda: 2)
    neighbours = Neighbours()
    assert neighbours.share == 0
    clock.update(now=10.0, busy=12.0, own=12.0)
    assert neighbours.share == 0
    clock["busy"] = 17.0
    assert neighbours.share == 0.25
    clock["busy"] = 11.5  # counters are read one after the other
    assert neighbours.share == 0


def test_a_real_neighbour_is_seen():
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(0.2)
        neighbours = Neighbours()
        time.sleep(0.5)
        assert neighbours.share > 0.01
    finally:
        neighbour.kill()
        neighbour.wait()


def test_it_is_said_from_a_tenth_on():
    assert disturbance(0.09) == ""
    assert "used 35% of the processor" in disturbance(0.35)
