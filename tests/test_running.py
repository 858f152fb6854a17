"""Entries of running stages: kept up to date, gone with their process, stopped one at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prunedm.errors import UserError
from prunedm.progress import Silent
from prunedm.system import running
from prunedm.system.running import Entry, Finished, add_finished, entries, entry_of, finished, stop
from prunedm.system.watching import Watched

CHILD = """
import sys, time
from pathlib import Path
import prunedm.cli as cli
from prunedm.cli.frame import app
from prunedm.progress import Silent
from prunedm.system.watching import Watched

@app.command
def work(out: Path):
    with Watched(Silent(), out, command="prunedm work") as progress, progress.task("work", 10**6) as bar:
        while True:
            bar.advance()
            time.sleep(0.01)

cli.main(["work", sys.argv[1]])
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(running.STATE, str(tmp_path / "state"))
    return tmp_path / "state"


def watched(out: Path = Path("out"), **more) -> Watched:
    return Watched(Silent(), out, command="prunedm test", **more)


def entry(**changes) -> Entry:
    with watched() as progress:
        return progress.entry.model_copy(update=changes)


def start(out: Path, *, ignoring: bool = False) -> subprocess.Popen:
    """A child that works until it is stopped; `ignoring` starts it as a script's `&` does."""
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN if ignoring else signal.default_int_handler
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(out)], stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while entry_of(process.pid) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    return process


# ------------------------------------------------------------------------------- the entry


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEDM_LOG", str(tmp_path / "log.txt"))
    monkeypatch.chdir(tmp_path)
    with watched(Path("a/out"), stage="finetune") as progress:
        with progress.task("fine-tuning", 10, 4) as bar:
            bar.figures({"loss": 0.5, "lr": 1e-3}, 5)
            bar.figures({"held_out_loss": 0.25, "odd": float("nan")}, 6)
            bar.figures({"held_out_loss": 0.125}, 8)
            bar.advance(4, "loss 0.5")
            progress.say("hello")
        (found,) = entries()
        assert entry_of(os.getpid()).model_dump_json() == found.model_dump_json()
        assert found.model_dump_json() == progress.entry.model_dump_json()
    assert (found.pid, found.host, found.command) == (
        os.getpid(),
        os.uname().nodename,
        "prunedm test",
    )
    assert (found.out, found.name, found.cwd) == (tmp_path / "a" / "out", "out", str(tmp_path))
    assert (found.label, found.done, found.total, found.note) == ("fine-tuning", 8, 10, "loss 0.5")
    assert found.figures["loss"] == (5, 0.5)
    assert found.figures["held_out_loss"] == (8, 0.125)
    assert found.figures["odd"][1] != found.figures["odd"][1]
    assert found.held_out == [(6, 0.25), (8, 0.125)]
    assert (found.lines, found.log, found.stage) == (["hello"], tmp_path / "log.txt", "finetune")
    assert entries() == []
    assert entry_of(os.getpid()) is None


def test_writing_is_at_most_once_a_second_and_at_both_ends_of_a_task():
    clock = Clock()
    with watched(clock=clock) as progress:
        with progress.task("work", 1000) as bar:
            assert entries()[0].total == 1000
            clock.now += 0.9
            bar.advance(100)
            assert entries()[0].done == 0
            clock.now += 0.2
            bar.advance(10)
            assert entries()[0].done == 110
            assert entries()[0].rate == pytest.approx(100)
            bar.advance(1)
            assert entries()[0].done == 110
        assert entries()[0].done == 111


def test_the_rate_is_of_late():
    clock = Clock()
    with watched(clock=clock) as progress, progress.task("work", 1000, done=500) as bar:
        clock.now += 60  # the first step compiles
        bar.advance()
        assert progress.entry.rate == pytest.approx(1 / 60)
        for _ in range(40):
            clock.now += 2
            bar.advance()
        assert progress.entry.rate == pytest.approx(1 / 2)


def test_a_new_task_begins_with_no_figures_and_an_inner_one_gives_the_outer_back():
    with watched() as progress:
        with progress.task("first", 2) as bar:
            bar.figures({"held_out_loss": 1.0}, 1)
            bar.advance(1, "one")
            with progress.task("inner", 7) as inner:
                inner.advance(7)
                assert (progress.entry.label, progress.entry.held_out) == ("inner", [])
            assert (progress.entry.label, progress.entry.done) == ("first", 1)
            assert progress.entry.held_out == [(1, 1.0)]
            bar.advance()
        assert (progress.entry.label, progress.entry.done, progress.entry.total) == ("first", 2, 2)
        with progress.task("second", 3):
            assert (progress.entry.figures, progress.entry.held_out) == ({}, [])
            assert progress.entry.note == ""


def test_the_last_five_lines_are_kept():
    with watched() as progress:
        for number in range(8):
            progress.say(str(number))
        assert progress.entry.lines == ["3", "4", "5", "6", "7"]


def test_everything_is_passed_on():
    told = []

    class Listener(Silent):
        def task(self, label, total, done=0):
            told.append((label, total, done))
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.append("end")

        def advance(self, units=1, note=""):
            told.append((units, note))

        def figures(self, values, step):
            told.append((values, step))

        def say(self, text):
            told.append(text)

    for registered in (True, False):
        told.clear()
        with Watched(Listener(), Path("out"), command="x", registered=registered) as progress:
            assert len(entries()) == registered
            with progress.task("a", 2, 1) as bar:
                bar.figures({"loss": 1.0}, 2)
                bar.advance(3, "n")
            progress.say("line")
        assert told == [("a", 2, 1), ({"loss": 1.0}, 2), (3, "n"), "end", "line"]
        assert len(finished()) == 1  # the registered one's


@pytest.mark.parametrize("place", ["a file", "nowhere"])
def test_where_nothing_can_be_written_the_work_goes_on(place, tmp_path, monkeypatch):
    target = tmp_path / "target"
    if place == "a file":
        target.write_text("")
    else:
        target = Path("/proc/nowhere")
    monkeypatch.setenv(running.STATE, str(target))
    with watched() as progress, progress.task("work", 1) as bar:
        bar.advance()
    assert entries() == []
    assert finished() == []


def test_the_state_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv(running.STATE, "/a")
    assert running.state_folder() == Path("/a")
    monkeypatch.delenv(running.STATE)
    monkeypatch.setenv("XDG_STATE_HOME", "/b")
    assert running.state_folder() == Path("/b/prunedm")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert running.state_folder() == Path("/c/.local/state/prunedm")


# ---------------------------------------------------------------------------- who is alive


def test_the_entry_of_a_killed_process_is_dropped_and_deleted(tmp_path, state):
    process = start(tmp_path / "out")
    process.kill()  # not waited for: a zombie
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list((state / "running").iterdir())) == 1
    assert entry_of(process.pid) is None
    assert entries() == []
    assert list((state / "running").iterdir()) == []
    process.communicate()


def test_a_reused_pid_is_neither_shown_nor_stopped(state):
    other = entry(process_started=time.time() - 10**6)
    running.write_entry(other)
    with pytest.raises(UserError, match="has ended already"):
        stop(other)  # else this very process were interrupted
    assert entry_of(os.getpid()) is None
    assert entries() == []


def test_entries_of_other_hosts_are_shown_for_a_day_and_stopped_there(state):
    other = entry(host="elsewhere", pid=1, updated=time.time() - 3600)
    old = entry(host="elsewhere", pid=2, updated=time.time() - 10**6)
    running.write_entry(other)
    running.write_entry(old)
    assert [e.pid for e in entries()] == [1]
    assert len(list((state / "running").iterdir())) == 2
    with pytest.raises(UserError, match="runs on elsewhere: run the command there"):
        stop(other)


def test_what_is_no_entry_is_passed_over(state):
    (state / "running").mkdir(parents=True)
    (state / "running" / "a.json").write_text("{")
    (state / "running" / "b.json").write_text(json.dumps({"pid": 3}))
    with watched():
        assert len(entries()) == 1


@pytest.mark.parametrize("ignoring", [False, True], ids=["foreground", "background"])
def test_stop_ends_one_process_and_no_other(ignoring, tmp_path):
    stays, goes = start(tmp_path / "stays"), start(tmp_path / "goes", ignoring=ignoring)
    try:
        stop(entry_of(goes.pid))
        _, told = goes.communicate(timeout=20)
        assert goes.returncode == 130
        assert told == "prunedm: interrupted; the same command continues where it can\n"
        assert [e.out.name for e in entries()] == ["stays"]
        assert stays.poll() is None
        assert [(e.out.name, e.error) for e in finished()] == [("goes", "stopped")]
    finally:
        goes.kill()
        stays.terminate()
        _, told = stays.communicate(timeout=20)
    assert stays.returncode == 143  # a scheduler's SIGTERM is as clean
    assert "the same command continues" in told
    assert entries() == []


# ------------------------------------------------------------------------------- finished


def test_what_finished_is_listed_with_its_loss_or_its_error():
    with watched(stage="prune") as progress:
        progress.result({"loss": 0.5})
    with watched() as progress:
        progress.result({"loss": 0.5}, made=False)  # was there already
    with pytest.raises(UserError), watched(stage="learn"):
        raise UserError("first\nsecond")
    assert [(f.stage, f.loss, f.error) for f in finished()] == [
        ("learn", None, "first"),
        ("prune", 0.5, ""),
    ]


def test_the_list_of_what_finished_stays_short(state):
    for number in range(120):
        add_finished(Finished(out=Path(f"/{number}"), stage="x", when=0, seconds=0))
    assert [f.out.name for f in finished()] == [str(k) for k in range(119, 69, -1)]
    assert len((state / "finished.jsonl").read_text().splitlines()) < 2 * running.FINISHED_LINES
    with (state / "finished.jsonl").open("a") as file:
        file.write("{half\n")
    assert len(finished()) == running.FINISHED_LINES - 1
