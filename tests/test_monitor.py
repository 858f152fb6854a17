"""The monitor: what it measures, draws and says; a run that is stopped goes on to the same bits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_folder
from rich.console import Console

from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.monitor.machine import Gpu, Gpus, Machine, Meter, RunningStage, Snapshot, Use, look
from prunedm.monitor.runs import find_run, said
from prunedm.monitor.screen import duration, screen, sparks, speed
from prunedm.progress import Silent
from prunedm.system import running
from prunedm.system.running import Entry, Finished, entries, write_entry
from prunedm.system.watching import Watched

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(running.STATE, str(tmp_path / "state"))
    return tmp_path / "state"


class Nvml:
    """Two GPUs; the second tells its name and memory alone, as a MIG slice does."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return ["NVIDIA H200", b"NVIDIA A30 MIG"][handle]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=150 * 10**9, used=(12 + 130 * handle) * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self._only_first(handle, 97))

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._only_first(handle, 54)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._only_first(handle, 312_400)

    def _only_first(self, handle, value):
        if handle:
            raise self.NVMLError("Not Supported")
        return value


class NoNvml(Nvml):
    def nvmlInit(self):
        raise self.NVMLError("NVML Shared Library Not Found")


def entry(**changes) -> Entry:
    """A fine-tuning of this process, 312 of 2,000 steps done."""
    own = Watched(Silent(), Path("/runs/digits/4-finetune"), command="x", registered=False).entry
    own.started, own.updated, own.task_started = NOW - 100, NOW - 1, NOW - 78
    own.label, own.done, own.total, own.rate = "fine-tuning", 312, 2000, 4.0
    own.figures = {"loss": (310, 0.03125), "lr": (310, 3e-4), "held_out_loss": (300, 0.0301)}
    own.held_out = [(100, 0.05), (200, 0.04), (300, 0.0301)]
    own.note = "loss 0.0312"
    return own.model_copy(update=changes)


def run(silent: float = 1.0, **changes) -> RunningStage:
    use = Use(cpu=98, memory=1_200_000_000)
    return RunningStage(entry=entry(**changes), use=use, elapsed=100, silent=silent, remaining=421)


def snapshot(
    *runs: RunningStage, gpus: Gpus | None = None, ended: list[Finished] | None = None
) -> Snapshot:
    gpus = gpus or Gpus(NoNvml())
    machine = Machine(
        host="box", cpu=93, cores=2, load=3.1, memory_used=5_100_000_000,
        memory_total=15_600_000_000, gpus=gpus.read(), no_gpus=gpus.reason,
    )  # fmt: skip
    return Snapshot(now=NOW, machine=machine, runs=list(runs), finished=ended or [])


def drawn(shot: Snapshot, width: int = 100, height: int | None = 30) -> list[str]:
    """The lines of the picture, which must fit."""
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(screen(shot, width=width, height=height))
    lines = capture.get().splitlines()
    assert all(len(line) <= width for line in lines)
    assert height is None or len(lines) <= height
    return [line.rstrip() for line in lines]


# -------------------------------------------------------------------------------- machine


def test_gpus_tell_what_they_can():
    full, slice_ = Gpus(Nvml()).read()
    assert full == Gpu(
        index=0, name="NVIDIA H200", utilisation=97, memory_used=12 * 10**9,
        memory_total=150 * 10**9, temperature=54, power=312.4,
    )  # fmt: skip
    assert (slice_.name, slice_.memory_used) == ("NVIDIA A30 MIG", 142 * 10**9)
    assert (slice_.utilisation, slice_.temperature, slice_.power) == (None, None, None)


def test_without_nvml_there_are_no_gpus():
    gpus = Gpus(NoNvml())
    assert gpus.read() == []
    assert gpus.reason == "no NVIDIA GPU (NVML Shared Library Not Found)"


def test_the_use_of_a_run_is_that_of_its_processes():
    meter = Meter(Gpus(NoNvml()))
    command = [sys.executable, "-c", "print(flush=True)\nx = bytearray(50 << 20)\nwhile True: pass"]
    alone = meter.use(entry()).memory
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        meter.use(entry())
        time.sleep(0.3)
        use = meter.use(entry())
        child.kill()
    assert use.memory - alone > 50 << 20
    assert use.cpu > 0
    assert meter.use(entry(host="elsewhere")) is None
    assert meter.use(entry(process_started=0.0)) is None


def test_the_machine_is_this_one():
    machine = Meter(Gpus(Nvml())).machine()
    assert machine.host == os.uname().nodename
    assert 0 < machine.memory_used < machine.memory_total
    assert len(machine.gpus) == 2
    assert 0 <= machine.cpu <= 100


def test_remaining_time_runs_down_between_updates():
    write_entry(entry(updated=NOW, done=1000, rate=10.0))
    meter = Meter(Gpus(NoNvml()))
    assert [look(meter, NOW + k).runs[0].remaining for k in (0, 30, 500)] == [100, 70, 0]
    write_entry(entry(rate=None))
    assert look(meter, NOW).runs[0].remaining is None


# -------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("width", [80, 120])
def test_the_picture(width):
    ended = [
        Finished(out=Path("/a/2-recover"), stage="finetune", when=NOW, seconds=61, loss=0.025),
        Finished(out=Path("/a/bad"), stage="prune", when=NOW, seconds=2, error="no model"),
    ]
    lines = drawn(snapshot(run(), gpus=Gpus(Nvml()), ended=ended), width)
    assert lines[0].startswith("PruneDM on box")
    cpu, memory, gpu, other = lines[2:6]
    assert "93 % 2 cores, load 3.1" in cpu
    assert "33 % 5.1 GB of 15.6 GB" in memory
    assert "97 % 12.0 GB of 150.0 GB  54 °C  312 W" in gpu
    assert "unknown" in other
    assert "142.0 GB of 150.0 GB  NVIDIA A30 MIG" in other
    first = next(k for k, line in enumerate(lines) if line.startswith("4-finetune"))
    for word in ("fine-tuning", "━", "312/2,000", "16%", "7:01 left"):
        assert word in lines[first]
    details = lines[first + 1]
    told = "  held out 0.0301 █▄▁ · loss 0.03125 · 4.0/s · CPU 98 %, 1.2 GB · for 1:40"
    whole = f"{told} · pid {os.getpid()} · lr 0.0003"
    assert details == (whole if width == 120 else f"{whole[:79]}…")
    text = "\n".join(lines)
    assert "2-recover  finetune  1:01  loss 0.0250" in text
    assert "no model" in text
    assert lines[-1].startswith("q quits")


def test_without_gpus_one_line_says_so():
    lines = drawn(snapshot(), 80)
    assert sum("GPU" in line for line in lines) == 1
    assert "no NVIDIA GPU (NVML Shared Library Not Found)" in "\n".join(lines)
    assert "nothing is running" in lines


def test_printed_once_there_is_no_help_for_keys():
    assert "q quits" not in "\n".join(drawn(snapshot(run()), height=None))


@pytest.mark.parametrize("count", [1, 5, 9, 14, 40])
def test_many_runs_fit_the_height(count):
    ended = [Finished(out=Path("/a/b"), stage="prune", when=NOW, seconds=2)] * 5
    runs = [run(out=Path(f"/runs/{k}-long-name-of-a-run")) for k in range(count)]
    lines = drawn(snapshot(*runs, ended=ended), 80, height=30)
    shown = sum("-long-name" in line for line in lines)
    more = [line for line in lines if line.startswith("and ")]
    assert more == ([] if shown == count else [f"and {count - shown} more"])
    assert shown >= min(count, 14)
    assert lines[-1].startswith("q quits")


def test_what_is_out_of_the_ordinary_is_told():
    text = "\n".join(drawn(snapshot(run(silent=90.0, host="far")), 120))
    assert "no update for 1:30 · on far" in text
    text = "\n".join(drawn(snapshot(run(total=0, label="", stage="learn", figures={})), 120))
    assert "learn" in text
    assert "left" not in text
    assert "loss 0.0312" in text  # the note, where there are no figures


def test_words():
    assert [duration(s) for s in (0, 59.4, 60, 3600, 200_000)] == [
        "0 s", "59 s", "1:00", "1:00:00", "2 d 7 h"
    ]  # fmt: skip
    rates = (12.34, 1.0, 0.08, 0.01)
    assert [speed(r) for r in rates] == ["12.3/s", "1.0/s", "12.5 s each", "1:40 each"]
    assert sparks([1.0]) == ""
    assert sparks([3.0, 2.0, float("nan"), 1.0]) == "█▅▁"
    assert sparks([2.0, 2.0]) == "▁▁"


# ------------------------------------------------------------------------------- commands


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_is_found_by_folder_name_and_pid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = entry(out=tmp_path / "a" / "x", pid=1)
    two = entry(out=tmp_path / "b" / "x", pid=2)
    three = entry(out=tmp_path / "y", pid=3, host="far")
    every = [one, two, three]
    assert find_run("a/x", every) is one
    assert find_run(str(tmp_path / "b" / "x"), every) is two
    assert find_run("y", every) is three
    assert find_run("2", every) is two
    with pytest.raises(
        UserError, match=r"2 runs match 'x'; give the pid: .*a/x \(1\), .*b/x \(2\)"
    ):
        find_run("x", every)
    with pytest.raises(UserError, match=r"no run 'z'; running: .*y \(3 on far\)"):
        find_run("z", every)
    with pytest.raises(UserError, match="nothing is running"):
        find_run("z", [])


def test_a_log_is_shown_from_its_end(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {k}\x1b\n" for k in range(10_000)))
    told = said(entry(log=log))
    assert told[0] == "line 9960"
    assert told[-1] == "line 9999"
    assert said(entry(lines=["a", "b"])) == ["a", "b"]
    with pytest.raises(UserError, match=r"cannot read the log .*gone"):
        said(entry(log=tmp_path / "gone"))


def test_the_command_prints_once_where_there_is_no_terminal(capsys):
    with Watched(Silent(), Path("out"), command="prunedm x") as progress:
        progress.say("hello")
        with progress.task("work", 10) as bar:
            bar.advance(3)
        assert call("monitor") == 0
        told = capsys.readouterr().out
        assert "work" in told
        assert "3/10" in told
        assert call("monitor", "--json") == 0
        (found,) = json.loads(capsys.readouterr().out)["runs"]
        assert (found["entry"]["done"], found["entry"]["pid"]) == (3, os.getpid())
        assert found["use"]["memory"] > 0
        assert call("monitor", "--log", "out") == 0
        assert capsys.readouterr().out == "hello\n"
        assert call("monitor", "--stop", "other") == 2
        assert "no run 'other'; running: " in capsys.readouterr().err
        assert call("monitor", "--every", 0) == 2
        assert "every = 0: give a positive number" in capsys.readouterr().err


def test_a_stage_tells_its_figures(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "prunedm.system.watching.write_entry", lambda e: seen.append(e.model_copy())
    )
    words = ["--steps", 4, "--batch-size", 4, "--validate-every", 2, "--validation-problems", 4]
    assert call("finetune", tiny_folder(), tmp_path / "out", *words, "--device", "cpu") == 0
    last = next(e for e in reversed(seen) if e.label == "fine-tuning")
    assert (last.done, last.total, last.stage) == (4, 4, "finetune")
    curve = json.loads((tmp_path / "out" / "record.json").read_text())["figures"]["curve"]
    assert last.held_out == [tuple(pair) for pair in curve["held_out"]]
    assert len(last.held_out) == 2
    assert last.figures["loss"] == (4, pytest.approx(sum(curve["losses"]) / 4))
    assert {"lr", "held_out_loss"} <= last.figures.keys()
    (ended,) = running.finished()
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (ended.stage, ended.loss) == ("finetune", record["figures"]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(workers, tmp_path, capsys):
    words = ["finetune", tiny_folder(), "--steps", 60, "--batch-size", 4, "--device", "cpu"]
    words += ["--checkpoint-every", 5, "--validation-problems", 4, "--workers", workers]

    def command(out: Path) -> list[str]:
        return [str(w) for w in (*words[:2], out, *words[2:])]

    assert call(*command(tmp_path / "whole")) == 0
    out = tmp_path / "out"
    checkpoint = tmp_path / "out.partial" / "resume" / "checkpoint.safetensors"
    start = [sys.executable, "-m", "prunedm", *command(out)]
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        capsys.readouterr()
        assert call("monitor", "--stop", "out") == 0
        told = capsys.readouterr().out
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert f"stopped; the same command continues: prunedm finetune {tiny_folder()}" in told
    assert checkpoint.exists()
    assert not out.exists()
    assert entries() == []
    assert call(*command(out)) == 0
    assert load(out).hash == load(tmp_path / "whole").hash
    assert not (tmp_path / "out.partial").exists()
