"""The frame around every stage: done, resumed, refused or made; whole or not at all."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Killed, tiny_folder

from prunedm import __version__
from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.options import LoopOptions
from prunedm.recipe import describe
from prunedm.record import (
    FILE,
    Record,
    Source,
    device_name,
    read_record,
    write_json,
    write_record,
)
from prunedm.stages import frame, workplace
from prunedm.stages.frame import RESUME, Plan, run_stage

OPTIONS = LoopOptions(steps=5, seed=3)
INPUTS = {"model": Source(path="/somewhere", hash="aaaa")}


class Stage:
    """Counts its calls; fails after writing half of its result while `failure` is set."""

    def __init__(self, failure: BaseException | None = None, *, resumable: bool = False) -> None:
        self.calls, self.failure, self.resumable, self.found = 0, failure, resumable, []

    def make(self, folder):
        self.calls += 1
        self.found = sorted(path.name for path in (folder / RESUME).iterdir())
        (folder / "half.txt").write_text("half")
        if self.resumable:
            (folder / RESUME / f"step-{self.calls}").write_text("state")
        if self.failure:
            raise self.failure
        return {"loss": 0.5, "curve": {"losses": [1.0]}}

    def run(self, out, *, options=OPTIONS, inputs=INPUTS, stage="finetune", parent=None, **more):
        return run_stage(stage, Plan(options, inputs, self.make, parent), out, **more)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_what_is_done_is_not_done_again(tmp_path):
    stage = Stage()
    first, made = stage.run(tmp_path / "out")
    before = content(tmp_path)
    again, made_again = stage.run(tmp_path / "out")
    assert (made, made_again, stage.calls) == (True, False, 1)
    assert again == first
    assert content(tmp_path) == before
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["half.txt", FILE]


def test_the_record_says_what_was_done(tmp_path):
    oldest = Record(stage="train", seed=1)
    parent = Record(stage="prune", inputs=INPUTS, history=[oldest])
    record, _ = Stage().run(tmp_path / "out", parent=parent)
    written = read_record(tmp_path / "out")
    assert written == record
    assert (written.stage, written.seed, written.inputs) == ("finetune", 3, INPUTS)
    assert written.options["steps"] == 5
    assert written.figures == {"loss": 0.5, "curve": {"losses": [1.0]}}
    assert written.wall_time_s >= 0
    assert written.device == device_name()
    assert written.created.startswith("20")
    assert written.versions["python"] == platform.python_version()
    assert written.versions["prunedm"] == __version__
    assert {"torch", "diffusers", "numpy", "torch-pruning"} <= written.versions.keys()
    assert [r.stage for r in written.lineage()] == ["train", "prune", "finetune"]
    assert json.loads((tmp_path / "out" / FILE).read_text())["stage"] == "finetune"


def test_identity_is_what_decides_the_result(tmp_path):
    stage = Stage()
    stage.run(tmp_path / "out")
    same = OPTIONS.model_copy(update={"device": "cpu", "workers": 2, "checkpoint_every": 7})
    moved = {"model": Source(path="/elsewhere", hash="aaaa")}
    assert stage.run(tmp_path / "out", options=same, inputs=moved)[1] is False


@pytest.mark.parametrize("finished", [True, False])
def test_a_result_from_before_an_option_existed_is_of_its_default(tmp_path, finished):
    out, stage = tmp_path / "out", Stage(None if finished else Killed(), resumable=True)
    if finished:
        stage.run(out)
    else:
        with pytest.raises(Killed):
            stage.run(out)
    place = out / FILE if finished else tmp_path / "out.partial" / "identity.json"
    written = json.loads(place.read_text())
    assert written["options"].pop("warmup") == OPTIONS.warmup
    write_json(written, place)
    stage.failure = None
    _, made = stage.run(out, options=OPTIONS)
    assert made == (not finished)
    assert finished or stage.found == ["step-1"]
    with pytest.raises(UserError, match="another warmup"):
        stage.run(out, options=OPTIONS.model_copy(update={"warmup": 7}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": OPTIONS.model_copy(update={"steps": 9})}, ["steps", "5", "9"]),
        ({"options": OPTIONS.model_copy(update={"seed": 4})}, ["seed", "3", "4"]),
        ({"inputs": {"model": Source(path="/somewhere", hash="bbbb")}}, ["model", "content"]),
        ({"inputs": INPUTS | {"teacher": Source(path="/t", hash="c")}}, ["teacher"]),
        ({"stage": "learn"}, ["finetune", "learn"]),
    ],
)
def test_another_result_is_refused_by_name_and_replaced_only_if_told(tmp_path, change, words):
    out, stage = tmp_path / "out", Stage()
    stage.run(out)
    before = content(tmp_path)
    with pytest.raises(UserError) as error:
        stage.run(out, **change)
    for word in [str(out), "another folder", "--overwrite", *words]:
        assert word in str(error.value)
    assert content(tmp_path) == before
    assert stage.run(out, **change, overwrite=True)[1] is True
    assert stage.calls == 2
    assert stage.run(out, **change)[1] is False


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.png").write_bytes(b"dear")
    before = content(tmp_path)
    stage = Stage()
    with pytest.raises(UserError, match=r"photos exists and holds no result of prunedm; give"):
        stage.run(out, overwrite=overwrite)
    assert (stage.calls, content(tmp_path), names(tmp_path)) == (0, before, ["photos"])


def test_a_file_is_never_touched(tmp_path):
    (tmp_path / "out").write_text("dear")
    with pytest.raises(UserError, match="no result of prunedm"):
        Stage().run(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "dear"


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    assert Stage().run(tmp_path / "out")[1] is True
    assert names(tmp_path / "out") == ["half.txt", FILE]


def test_the_folder_one_stands_in_will_do(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Stage().run(Path())
    assert names(tmp_path) == ["here"]
    assert names(tmp_path / "here") == ["half.txt", FILE]


def test_a_damaged_record_is_a_clear_error(tmp_path):
    Stage().run(tmp_path / "out")
    (tmp_path / "out" / FILE).write_text('{"stage": ')
    with pytest.raises(UserError, match=r"record\.json is damaged"):
        Stage().run(tmp_path / "out")


@pytest.mark.parametrize("failure", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    with pytest.raises(type(failure)):
        Stage(failure).run(tmp_path / "out")
    assert names(tmp_path) == []


def test_folders_without_files_are_nothing_to_resume_from(tmp_path):
    def make(folder):
        (folder / RESUME / "evaluations").mkdir()
        raise ValueError

    with pytest.raises(ValueError):
        run_stage("compare", Plan(OPTIONS, {}, make), tmp_path / "out")
    assert names(tmp_path) == []


def test_a_failed_overwrite_keeps_the_old_result(tmp_path):
    Stage().run(tmp_path / "out")
    before = content(tmp_path)
    other = OPTIONS.model_copy(update={"steps": 9})
    with pytest.raises(ValueError):
        Stage(ValueError()).run(tmp_path / "out", options=other, overwrite=True)
    assert content(tmp_path) == before


def test_what_can_be_resumed_is_kept_and_gone_when_done(tmp_path):
    stage = Stage(Killed(), resumable=True)
    with pytest.raises(Killed):
        stage.run(tmp_path / "out")
    assert names(tmp_path) == ["out.partial"]
    stage.failure = None
    assert stage.run(tmp_path / "out")[1] is True
    assert stage.found == ["step-1"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["half.txt", FILE]


def test_an_unfinished_run_is_not_continued_with_other_options(tmp_path):
    stage = Stage(Killed(), resumable=True)
    with pytest.raises(Killed):
        stage.run(tmp_path / "out")
    before = content(tmp_path)
    other = OPTIONS.model_copy(update={"lr": 0.5})
    with pytest.raises(UserError, match=r"unfinished run with another lr \(0\.0003, now 0\.5\)"):
        stage.run(tmp_path / "out", options=other)
    assert content(tmp_path) == before
    stage.failure = None
    stage.run(tmp_path / "out", options=other, overwrite=True)
    assert stage.found == []


# ------------------------------------------------------------------------------------- kills


class Killer:
    """Ends this process, as far as files are concerned, before the n-th change to one in `place`."""

    EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "open"})

    def __init__(self) -> None:
        self.place, self.left = "", -1
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.left < 0 or event not in self.EVENTS or not self._changes(event, arguments):
            return
        if self.left == 0:
            raise Killed  # and every change after it: nothing runs in a process that was killed
        self.left -= 1

    def _changes(self, event, arguments) -> bool:
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = event in ("os.remove", "os.rmdir") and not str(arguments[0]).startswith("/")
        return bool(writes) and (inside or str(arguments[0]).startswith(self.place))

    def kill(self, work, n: int, place: Path) -> bool:
        """Whether `work` was killed before its change number `n`."""
        self.place, self.left = str(place), n
        try:
            work()
        except Killed:
            return True
        finally:
            self.left = -1
        return False


@pytest.fixture(scope="module")
def killer():
    return Killer()


def new(place: Path) -> Path:
    return place / "out"


def an_empty_folder(place: Path) -> Path:
    (place / "out").mkdir()
    return place / "out"


def a_link(place: Path) -> Path:
    (place / "disk" / "real").mkdir(parents=True)
    (place / "out").symlink_to(place / "disk" / "real", target_is_directory=True)
    return place / "out"


def a_dangling_link(place: Path) -> Path:
    (place / "disk").mkdir()
    (place / "out").symlink_to(place / "disk" / "real")
    return place / "out"


def below_a_link(place: Path) -> Path:
    (place / "disk").mkdir()
    (place / "link").symlink_to(place / "disk")
    return place / "link" / "out"


def the_current_folder(place: Path) -> Path:
    (place / "out").mkdir()
    os.chdir(place / "out")
    return Path()


PLACES = [new, an_empty_folder, a_link, a_dangling_link, below_a_link, the_current_folder]


class Tree(Stage):
    """Writes a folder, a file, the parent's record as `save` does, and state to go on from."""

    def make(self, folder):
        self.calls += 1
        (folder / "unet").mkdir(exist_ok=True)
        (folder / "unet" / "w").write_text("weights")
        write_record(Record(stage="parent"), folder)
        (folder / RESUME / "step").write_text("state")
        return {"loss": 0.5}


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("make_place", PLACES)
def test_a_kill_before_any_change_loses_nothing(
    make_place, replaces, tmp_path, monkeypatch, killer
):
    """And what is whole is not made again: only what was killed before `whole.json` was there."""
    other = OPTIONS.model_copy(update={"steps": 9})
    monkeypatch.chdir(tmp_path)
    killed, whole = True, 0
    for n in range(100):
        place = tmp_path / str(n)
        place.mkdir()
        out = make_place(place)
        if replaces:
            Tree().run(out, options=other)
        stage = Tree()
        killed = killer.kill(lambda: stage.run(out, overwrite=replaces), n, place)  # noqa: B023
        if not killed:
            break
        was_whole = list(place.rglob("whole.json")) or not list(place.rglob("identity.json"))
        was_whole = bool(was_whole) and stage.calls == 1
        record, _ = stage.run(out, overwrite=replaces)
        assert stage.calls == 1 or not was_whole, n
        whole += was_whole
        real = out.resolve()
        assert read_record(real) == record
        assert record.options["steps"] == 5
        assert names(real) == [FILE, "unet"]
        assert names(real / "unet") == ["w"]
        left = {p.name for p in real.parent.iterdir()} - {"out", "real"}
        assert not left, n
        monkeypatch.chdir(tmp_path)
    assert not killed
    assert whole >= 5


def test_a_parent_that_is_a_file_is_refused_with_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    stage = Stage()
    with pytest.raises(UserError, match="is a file, and not a folder"):
        stage.run(tmp_path / "file" / "out")
    assert (stage.calls, names(tmp_path)) == (0, ["file"])


def _raising(number: int):
    def function(*_, **__):
        raise OSError(number, os.strerror(number), "here")

    return function


DAMAGE = [b"", b"{", b"[]", b"\xff", b'{"stage": 3}', b'{"spent": "x", "began": []}', b"[" * 9999]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_identity_says_what_to_delete_and_a_clock_is_done_without(tmp_path, content):
    stage, partial = Stage(Killed(), resumable=True), tmp_path / "out.partial"
    with pytest.raises(Killed):
        stage.run(tmp_path / "out")
    stage.failure = None
    identity = (partial / "identity.json").read_bytes()
    (partial / "identity.json").write_bytes(content)
    with pytest.raises(UserError, match=r"identity\.json is damaged .*; delete .*out\.partial"):
        stage.run(tmp_path / "out")
    (partial / "identity.json").write_bytes(identity)
    (partial / "clock.json").write_bytes(content)
    assert stage.run(tmp_path / "out")[1] is True
    assert stage.found == ["step-1"]


def test_an_overwrite_that_was_killed_goes_on(tmp_path):
    Stage().run(tmp_path / "out", options=OPTIONS.model_copy(update={"steps": 9}))
    stage = Stage(Killed(), resumable=True)
    with pytest.raises(Killed):
        stage.run(tmp_path / "out", overwrite=True)
    stage.failure = None
    assert stage.run(tmp_path / "out", overwrite=True)[1] is True
    assert stage.found == ["step-1"]


def test_a_whole_result_of_other_options_is_not_lost_by_an_overwrite_that_fails(tmp_path, killer):
    """Killed between the two renames, then asked for something else: the old result comes back."""
    other = OPTIONS.model_copy(update={"steps": 9})
    between = 0
    for n in range(40):
        out = tmp_path / str(n) / "out"
        Tree().run(out, options=other)
        killer.kill(lambda: Tree().run(out, overwrite=True), n, out.parent)  # noqa: B023
        if out.exists():
            continue
        between += 1
        third = OPTIONS.model_copy(update={"lr": 0.5})
        with pytest.raises(ValueError):
            Stage(ValueError()).run(out, options=third, overwrite=True)
        assert read_record(out).options["steps"] == 9
    assert between == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write_json", "write_record"])
def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path, monkeypatch, number, where):
    monkeypatch.setattr(workplace, where, _raising(number))
    with pytest.raises(OSError):
        Stage().run(tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EACCES, "Permission denied", "here"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_the_command_line_says_so_in_one_line(tmp_path, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(np, "savez", full)
    words = ["sample", str(tiny_folder()), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--count", "2", "--batch-size", "2", "--sampling-steps", "1", "--format=npz"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.startswith("prunedm: ")
    assert told.count("\n") == 1
    assert "another place" in told
    assert not (tmp_path / "out").exists()


def test_a_process_that_does_not_see_the_first_ones_folder_says_so(tmp_path, monkeypatch):
    """As on a second machine without a shared disk."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(frame.processes, "wait_for_all", lambda: None)
    stage = Stage()
    with pytest.raises(
        UserError, match=r"process 1 does not see .*out\.partial.*one shared folder"
    ):
        stage.run(tmp_path / "out")
    assert stage.calls == 0


def test_json_has_no_number_that_is_not_finite(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json({"a": nan, "b": [1.5, -inf, (inf, 2)], "c": {"d": inf}, "e": "nan"}, tmp_path / "f")
    assert json.loads((tmp_path / "f").read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, None, [None, 2]], "c": {"d": None}, "e": "nan"
    }  # fmt: skip


def test_a_record_with_an_endless_option_is_still_itself(tmp_path):
    record = Record(stage="train", options={"clip": float("inf")}, figures={"loss": float("nan")})
    write_record(record, tmp_path)
    found = read_record(tmp_path)
    assert found.identity == record.identity
    assert found.figures == {"loss": None}


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({"loss": None}, "done already"),
        ({"loss": 0.25}, "loss 0.2500  (done already)"),
        ({"loss": None, "loss_before": 0.5}, "loss 0.5000 => none  (done already)"),
        ({"loss": 0.25, "loss_before": 0.5}, "loss 0.5000 => 0.2500  (done already)"),
    ],
)
def test_a_loss_that_was_no_number_is_described(figures, line):
    assert describe(figures, 0, False) == line


def test_the_time_is_that_of_all_sessions(tmp_path, monkeypatch):
    """An interrupted session lasted until it last wrote what is gone on with."""
    out, stage = tmp_path / "out", Stage(KeyboardInterrupt(), resumable=True)
    with pytest.raises(KeyboardInterrupt):
        stage.run(out)
    clock = tmp_path / "out.partial" / "clock.json"
    began = json.loads(clock.read_text())["began"]
    os.utime(tmp_path / "out.partial" / "resume" / "step-1", (began + 100, began + 100))
    stage.failure = None
    record, _ = stage.run(out)
    assert 100 <= record.wall_time_s < 160
    assert not (out / "clock.json").exists()


def test_a_result_from_before_every_byte_of_a_dataset_counted_is_known(tmp_path):
    """Its record has the first half of the hash; another first half, or second, is another set."""

    def run(found: str, *, overwrite: bool = False) -> bool:
        inputs = INPUTS | {"dataset": Source(path="/images", hash=found)}
        return Stage().run(tmp_path / "out", inputs=inputs, overwrite=overwrite)[1]

    assert run("cccc") is True
    assert run("cccc-1111") is False
    for other in ("cccd-1111", "ccccc-1"):
        with pytest.raises(UserError, match="another dataset"):
            run(other)
    assert run("dddd-1111", overwrite=True) is True
    with pytest.raises(UserError, match="another dataset"):
        run("dddd-2222")


# ------------------------------------------------------------------------- others at the same


HOLDER = """
import sys, time
from pathlib import Path
from prunedm.options import LoopOptions
from prunedm.record import Source
from prunedm.stages.frame import Plan, run_stage

def make(folder):
    (folder / "resume" / "step").write_text("state")
    print("making", flush=True)
    time.sleep(60)
    return {}

options = LoopOptions(steps=int(sys.argv[2]), seed=3)
inputs = {"model": Source(path="/somewhere", hash="aaaa")}
run_stage("finetune", Plan(options, inputs, make), Path(sys.argv[1]))
"""


@pytest.fixture
def holder(tmp_path):
    """Begins to make `out` in another process, and has got to its middle; killed in the end."""
    begun = []

    def begin(out: Path, steps: int = 5) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(out), str(steps)],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert begun[-1].stdout.readline() == "making\n"
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("make_place", "steps", "overwrite"),
    [(new, 5, False), (new, 9, True), (an_empty_folder, 9, False)],
)
def test_a_result_is_made_by_one_command_at_a_time(tmp_path, holder, make_place, steps, overwrite):
    """And the lock dies with its process, whose work is then gone on with."""
    out, stage = make_place(tmp_path), Stage()
    other = OPTIONS.model_copy(update={"steps": steps})
    first = holder(out)
    before = content(first_place := next(tmp_path.rglob("*.partial")))
    with pytest.raises(UserError, match=rf"out is being made by process {first.pid}; wait for it"):
        stage.run(out, options=other, overwrite=overwrite)
    assert (stage.calls, content(first_place)) == (0, before)
    first.kill()
    first.wait()
    assert stage.run(out)[1] is True
    assert stage.found == ["step"]
    assert names(tmp_path) == ["out"]
    assert names(out) == ["half.txt", FILE]


def test_what_another_command_made_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    """It had looked before the other one ended."""
    other, stage = Stage(), Stage()
    real = workplace.Workplace.held

    def held(self):
        monkeypatch.undo()
        other.run(tmp_path / "out")
        return real(self)

    monkeypatch.setattr(workplace.Workplace, "held", held)
    assert stage.run(tmp_path / "out")[1] is False
    assert (stage.calls, other.calls) == (0, 1)


@pytest.mark.parametrize("inside", [False, True])
def test_a_working_folder_that_is_not_ours_is_never_touched(tmp_path, inside):
    out = tmp_path / "out"
    partial = out / ".partial" if inside else tmp_path / "out.partial"
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("precious")
    before, stage = content(tmp_path), Stage(ValueError())
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"partial is in the way and was not made by prunedm"):
            stage.run(out, overwrite=overwrite)
    assert (stage.calls, content(tmp_path)) == (0, before)


def test_a_working_folder_that_is_a_file_or_a_link_is_never_touched(tmp_path):
    (tmp_path / "a.partial").write_text("precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "b.partial").symlink_to(tmp_path / "mine")
    for name in ("a", "b"):
        with pytest.raises(UserError, match=rf"{name}.partial is in the way"):
            Stage().run(tmp_path / name)
    assert names(tmp_path) == ["a.partial", "b.partial", "mine"]
