"""Sweeps: cases, folders by content, scheduling, failures, results, and the page."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import Ended, Killed, tiny_folder

from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.experiments import chain, workers
from prunedm.experiments import sweep as sweeps
from prunedm.experiments.inputs import hashes_of
from prunedm.experiments.page import in_words, shown, write_page
from prunedm.experiments.plan import Sweep, case_of, grid_cases, label_of, read_sweep
from prunedm.experiments.results import Row, mark_best, value_of
from prunedm.experiments.store import Status, Store, remove_leftovers, run_of
from prunedm.experiments.sweep import planned, read_kept, rows_of, sweep
from prunedm.experiments.workers import Slot, Worker, outcome, slots
from prunedm.folder import hash_folder
from prunedm.options import Options
from prunedm.progress import Silent
from prunedm.recipe import Recipe

TUNE = {"steps": 2, "batch_size": 4, "validation_problems": 8, "validate_every": 0}
RECIPE = {
    "convert_channels": True,
    "device": "cpu",
    "stages": ["mask", "finetune"],
    "mask": {"mechanism": "nm", "score": "magnitude", "pictures": 0, "calibration_problems": 8},
    "finetune": TUNE,
    "evaluate": {"depth": "quick", "problems": 8},
}


def plan(grid=None, **more) -> Sweep:
    recipe = RECIPE | {"model": str(tiny_folder())}
    grid = {"mask.pattern": ["2:4", "1:4"], "finetune.lr": [1e-3, 1e-4]} if grid is None else grid
    return Sweep(**({"recipe": recipe, "grid": grid} | more))


HASHES = defaultdict(lambda: "abc")  # of whatever a run reads


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs are made by this process, one by one; returns those that were started."""
    started = []

    def start(store, run, slot):
        store.write(run)
        started.append(run.label)
        code = chain.main(str(store.out), run.id)
        store.log(run.id).write_text("".join(capsys.readouterr()), encoding="utf-8")
        return Worker(run, slot, Ended(code))

    monkeypatch.setattr(chain, "_end_with_scheduler", lambda: None)
    monkeypatch.setattr(sweeps, "start", start)
    monkeypatch.setattr(sweeps, "_LOOK_EVERY", 0.0)
    return started


# ------------------------------------------------------------------------------------- the plan


def test_a_grid_is_every_combination_in_order():
    cases = grid_cases(plan())
    assert [case.label for case in cases] == [
        "pattern=2:4 lr=0.001", "pattern=2:4 lr=0.0001", "pattern=1:4 lr=0.001", "pattern=1:4 lr=0.0001",
    ]  # fmt: skip
    assert [
        (c.recipe.stage_options("mask").pattern, c.recipe.stage_options("finetune").lr)
        for c in cases
    ] == list(itertools.product(["2:4", "1:4"], [1e-3, 1e-4]))
    assert (
        cases[0].recipe.stage_options("finetune").steps == 2
    )  # the recipe's, beside what is varied


def test_a_dimension_may_set_several_fields_under_a_label():
    method = {"plain": {"mask.score": "random"}, "obs": {"mask.mechanism": "obs-nm"}}
    first, _, last, _ = grid_cases(plan({"method": method, "seed": [0, 1]}))
    assert (first.label, last.label) == ("plain seed=0", "obs seed=0")
    masks = [case.recipe.stage_options("mask") for case in (first, last)]
    assert [(m.mechanism, m.score) for m in masks] == [("nm", "random"), ("obs-nm", "magnitude")]
    assert plan({"method": method, "seed": [0]}).fields() == [
        "mask.score",
        "mask.mechanism",
        "seed",
    ]


def test_labels_name_a_field_by_its_last_part_where_that_is_unique():
    assert label_of({"mask.pattern": "2:4", "finetune.lr": 0.00123456}) == "pattern=2:4 lr=0.001235"
    assert label_of({"recover.lr": 1, "finetune.lr": 2}) == "recover.lr=1 finetune.lr=2"
    assert label_of({"stages": ["prune", "mask"]}) == "stages=prune+mask"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: {}", "either a grid or a search"),
        ("grid: {seed: [1]}\nsearch: {space: {seed: [1]}}", "either a grid or a search"),
        ("grid: {seed: []}", "at least one value"),
        ("grid: {model: [a, b]}", "one dense model"),
        ("grid: {seed: [1]}\nobjective: {}", "did you mean 'objectives'"),
        ("search: {space: {finetune.lr: {low: 2, high: 1}}}", "low = 2 is above high = 1"),
        ("search: {space: {finetune.lr: {low: 0, high: 1, log: true}}}", "log needs low > 0"),
        ("search: {space: {seed: [1]}, pruner: median}", "a pruner needs one objective"),
        ("recipe: gone.yaml\ngrid: {seed: [1]}", "gone.yaml: it is missing"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(file)
    assert str(tmp_path) in str(caught.value)


def test_the_recipe_may_be_a_file_beside_it(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 7\nmask: {pattern: 1:4}\n")
    (tmp_path / "sweep.yaml").write_text("recipe: r.yaml\ngrid: {finetune.steps: [1, 2]}\n")
    recipe = case_of(read_sweep(tmp_path / "sweep.yaml"), {"finetune.steps": 2}).recipe
    assert (recipe.seed, recipe.stage_options("mask").pattern) == (7, "1:4")
    assert recipe.stage_options("finetune").steps == 2


def test_a_setting_that_the_recipe_does_not_take_names_its_case():
    with pytest.raises(UserError, match=r"lrr=1: unknown option 'finetune.lrr'; did you mean 'lr'"):
        grid_cases(plan({"finetune.lrr": [1]}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("losss", "did you mean 'loss'"),
        ("latency_ms", "not measured in a sweep"),
        ("prune.loss", "the recipe's stages are mask, finetune"),
        ("fd", "needs samples and features"),
    ],
)
def test_objectives_without_a_figure_are_refused_before_any_work(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep(plan(objectives={name: "minimize"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- the folders


def folders(settings, **recipe) -> list[str]:
    whole = plan({"seed": [0]})
    assert isinstance(whole.recipe, dict)
    changed = whole.model_copy(update={"recipe": whole.recipe | recipe})
    run = run_of(case_of(changed, settings), HASHES)
    return [*(stage.folder for stage in run.stages), run.evaluation]


def test_folders_are_named_by_what_decides_their_content():
    mask, tune, evaluation = folders({})
    assert folders({}) == [mask, tune, evaluation]
    other = folders({"finetune.lr": 0.5})
    assert other[0] == mask
    assert other[1] != tune
    assert other[2] != evaluation
    assert not set(folders({"mask.pattern": "1:4"})) & {mask, tune, evaluation}
    assert not set(folders({"seed": 1})) & {mask, tune, evaluation}
    only = folders({"evaluate.problems": 9})
    assert only[:2] == [mask, tune]
    assert only[2] != evaluation


def test_how_a_result_is_made_decides_no_folder():
    same = folders({"finetune.workers": 2, "finetune.checkpoint_every": 7, "device": "auto"})
    assert same == folders({})


def test_what_is_read_decides_the_folders_too(tmp_path):
    """The same names with another content: images were added, a teacher was trained on."""
    case = case_of(plan(), {"finetune.teacher": "there"})
    hashes = {"model": "a", "dataset digits": "b", "teacher there": "c"}
    one = run_of(case, hashes)
    for name in hashes:
        other = run_of(case, hashes | {name: "changed"})
        assert not {s.folder for s in other.stages} & {s.folder for s in one.stages}
        assert (other.id, other.dense) != (one.id, one.dense)
    assert run_of(case, hashes | {"teacher elsewhere": "changed"}) == one


def test_every_file_that_a_case_reads_is_hashed(tmp_path):
    teacher = Path(shutil.copytree(tiny_folder(), tmp_path / "teacher"))
    (tmp_path / "masks.safetensors").write_bytes(b"x")
    for name in ("features.pt", "inception.pth"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text("task: own")
    grid = {
        "finetune.teacher": ["auto", "none", str(teacher)],
        "method": {"own": {"learn.masks": str(tmp_path / "masks.safetensors")}},
        "evaluate.features": ["digits-cnn", str(tmp_path / "features.pt")],
        "evaluate.inception_weights": [str(tmp_path / "inception.pth")],
        "evaluate.zero_shot.folder": [str(tmp_path / "tasks")],
    }
    found = hashes_of(plan(grid))
    assert found.keys() == {
        "model", "dataset digits", f"teacher {teacher}", f"masks {tmp_path / 'masks.safetensors'}",
        f"features {tmp_path / 'features.pt'}",
        f"inception_weights {tmp_path / 'inception.pth'}", f"task_folder {tmp_path / 'tasks'}",
    }  # fmt: skip
    assert found["model"] == found[f"teacher {teacher}"] == hash_folder(tiny_folder())
    (tmp_path / "tasks" / "own.yaml").write_text("task: another")
    tasks = f"task_folder {tmp_path / 'tasks'}"
    assert found[tasks] != hashes_of(plan(grid))[tasks]
    with pytest.raises(UserError, match="no model at"):
        hashes_of(plan({"finetune.teacher": [str(tmp_path / "gone")]}))


def test_a_sweep_from_before_every_byte_of_a_dataset_counted_keeps_its_folders(tmp_path):
    now = hashes_of(plan())
    parts = now["dataset digits"].split("-")
    before = now | {"dataset digits": "-".join(parts[: len(parts) // 2])}
    kept = sweeps.Kept(sweep=plan(), hashes=before, place="here")
    (tmp_path / sweeps.FILE).write_text(kept.model_dump_json())
    assert sweeps._hashes(plan(), tmp_path) == before
    for others in (now, now | {"dataset digits": "aaaa-bbbb"}):
        kept = sweeps.Kept(sweep=plan(), hashes=others, place="here")
        (tmp_path / sweeps.FILE).write_text(kept.model_dump_json())
        assert sweeps._hashes(plan(), tmp_path) == now


def test_every_option_that_names_an_input_is_marked():
    """Whoever adds one finds it here: its content must decide where results lie."""
    from prunedm import options

    named = re.compile(r"\b(file|folder|hub id|a model)\b")
    classes = [c for c in vars(options).values() if isinstance(c, type) and issubclass(c, Options)]
    unmarked = {
        f"{c.__name__}.{name}"
        for c in [*classes, Recipe]
        for name, field in c.model_fields.items()
        if named.search(field.description or "") and name not in c.inputs()
    }
    ways = {"trust_features", "split"}  # of reading an input, and none themselves
    assert {name for name in unmarked if name.split(".")[1] not in ways} <= {
        "SampleOptions.format",
        "ExportOptions.opset",
        "EvaluateOptions.depth",
    }


@pytest.mark.parametrize("option", ["features", "inception_weights"])
def test_a_changed_feature_file_changes_the_evaluation_alone(option, tmp_path):
    case = case_of(plan(), {f"evaluate.{option}": str(tmp_path / "f")})
    key = f"{option} {tmp_path / 'f'}"
    one, other = (run_of(case, {"model": "a", "dataset digits": "b", key: h}) for h in "xy")
    assert one.stages == other.stages
    assert (one.id, one.dense) != (other.id, other.dense)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("finetune.lrr", "'finetune.lrr' to vary; did you mean 'lr'"),
        ("fintune.lr", "'fintune.lr' to vary; did you mean 'finetune'"),
        ("seed.x", "seed is not a stage"),
        ("learn.steps", "learn is not among the stages"),
    ],
)
def test_a_field_that_no_stage_has_is_refused_before_the_first_trial(field, message, tmp_path):
    search = {"space": {field: [1, 2]}, "trials": 2}
    one = plan({}, search=search, objectives={"loss": "minimize"})
    with pytest.raises(UserError, match=message):
        sweep(one, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["workers", "threads"])
def test_fewer_than_no_workers_are_refused(option, tmp_path):
    with pytest.raises(UserError, match=f"{option} = -1: give at least 1"):
        sweep(plan(), tmp_path / "out", **{option: -1})
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("no")

    monkeypatch.setattr(sweeps, "Grid", fail)
    with pytest.raises(UserError, match="no"):
        sweep(plan(), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"dear")
    with pytest.raises(UserError, match="holds no sweep; give another folder"):
        sweep(plan(), tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.png"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"state": "gone"}', b"[" * 9999])
def test_damaged_files_of_a_run_are_one_line_or_done_without(content, tmp_path):
    store, run = Store(tmp_path), run_of(case_of(plan(), {}), HASHES)
    store.write(run)
    assert store.read(run.id) == run
    for name in ("run.json", "status.json"):
        (store.folder(run.id) / name).write_bytes(content)
    (tmp_path / "sweep.json").write_bytes(content)
    assert store.status(run.id) == Status()
    with pytest.raises(UserError, match=r"run\.json is damaged .*; delete .* and start the sweep"):
        store.read(run.id)
    with pytest.raises(UserError, match=r"sweep\.json is damaged .*; delete it"):
        read_kept(tmp_path)


def test_cases_that_come_to_the_same_are_one_run():
    said = []
    progress = SimpleNamespace(say=said.append)
    runs = sweeps._runs(plan({"seed": [0], "learn.lr": [0.1, 0.2]}), HASHES, progress)
    assert [run.label for run in runs] == ["seed=0 lr=0.1"]
    assert said == ["seed=0 lr=0.2: the same as seed=0 lr=0.1"]


# ------------------------------------------------------------------------------------- a sweep


def test_a_sweep_from_end_to_end(in_process, tmp_path, monkeypatch):
    """Four runs, the masks of two made once each; then nothing is left to do."""
    prunings = []
    verb = import_module("prunedm.stages.verbs.prune")
    prune = verb.prune
    monkeypatch.setattr(
        verb, "prune", lambda request: prunings.append(request.options.pattern) or prune(request)
    )
    out = tmp_path / "out"
    rows = sweep(plan(), out, progress=Silent())
    assert [row.status.state for row in rows] == ["done"] * 4
    assert sorted(in_process) == sorted(row.label for row in rows)
    assert len(list((out / "stages").glob("mask-*[0-9a-f]"))) == 2
    made = [p for p in (out / "stages").iterdir() if p.is_dir()]
    assert len(made) == 2 + 4 + 4 + 1  # masks, tunings, evaluations, the dense model's
    assert {row.values["bytes_packed"] for row in rows[:2]} != {
        row.values["bytes_packed"] for row in rows[2:]
    }
    for row in rows:
        assert row.values["loss"] == row.evaluation.figures.loss
        assert row.evaluation.figures.latency_ms is None
    best = min(rows, key=lambda row: row.values["loss"])
    assert best.best
    in_process.clear()
    again = sweep(plan(), out)
    assert in_process == []
    assert [row.values for row in again] == [row.values for row in rows]
    more = plan({"mask.pattern": ["2:4", "1:4"], "finetune.lr": [1e-3, 1e-4, 1e-5]})
    assert [row.status.state for row in sweep(more, out)] == ["done"] * 6
    assert len(in_process) == 2
    assert [row.label for row in rows_of(out)] == [case.label for case in grid_cases(more)]


def failing() -> Sweep:
    return plan({"mask.targets": [[], ["nothing"]], "finetune.lr": [1e-3]})


def test_a_failed_run_is_kept_and_stops_no_other(in_process, tmp_path, capsys):
    out, store = tmp_path / "out", Store(tmp_path / "out")
    good, bad = sweep(failing(), out)
    assert (good.status.state, bad.status.state) == ("done", "failed")
    assert "nothing" in bad.status.error
    assert bad.status.stage == "mask"
    assert bad.status.error in store.log(bad.run.id).read_text(encoding="utf-8")
    assert bad.values == {"loss": None, "bytes_packed": None}
    assert (good.best, bad.best) == (True, False)
    in_process.clear()
    sweep(failing(), out)
    assert in_process == []
    sweep(failing(), out, retry=True)
    assert in_process == [bad.label]
    with contextlib.suppress(SystemExit):
        main(["sweep", "show", str(out)])
    assert f"failed: {bad.label}" in capsys.readouterr().out.replace("\n", " ")
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "Failed runs" in page
    assert "nothing" in page


def test_a_failed_evaluation_fails_the_run_and_is_taken_again(in_process, tmp_path, monkeypatch):
    """What a failed step leaves out is not taken for the best of all."""
    from prunedm.evaluation import size as measuring

    def broken(*_):
        raise RuntimeError("out of memory")

    one, out = plan({"seed": [0]}, objectives={"macs": "minimize"}), tmp_path / "out"
    count = measuring.count_macs
    monkeypatch.setattr(measuring, "count_macs", broken)
    (row,) = sweep(one, out)
    assert (row.status.state, row.values["macs"], row.best) == ("failed", None, False)
    assert "macs: RuntimeError: out of memory" in row.status.error
    monkeypatch.setattr(measuring, "count_macs", count)
    (row,) = sweep(one, out, retry=True)
    assert row.status.state == "done"
    assert row.values["macs"] > 0


def test_only_some_runs(in_process, tmp_path):
    rows = sweep(plan(), tmp_path / "out", only=["pattern=1:4", "lr=0.001"])
    assert in_process == ["pattern=1:4 lr=0.001"]
    assert [row.status.state for row in rows] == ["waiting", "waiting", "done", "waiting"]
    with pytest.raises(UserError, match=r"only = lr=7: no run has that; there are lr=0\.0001, lr="):
        sweep(plan(), tmp_path / "out", only=["lr=7"])
    with pytest.raises(UserError, match="only = lr=7: no run has that"):
        planned(plan(), tmp_path / "out", ["lr=7"])
    rows = planned(plan(), tmp_path / "out", ["pattern=1:4"])
    assert [row.status.state for row in rows] == ["done", "waiting"]


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    dead, alive = 2**22 + 1, os.getpid()  # above Linux's largest number of a process
    names = [f"runs/a/status.json.{socket.gethostname()}-{dead}"]
    others = [
        f"runs/a/status.json.{socket.gethostname()}-{alive}",
        f"runs/a/status.json.elsewhere-{dead}",
        "runs/a/status.json",
    ]
    for name in [*names, *others]:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_grid_that_nobody_could_run_is_refused_at_once():
    hundred = {"mask.seed": list(range(100)), "finetune.seed": list(range(101))}
    with pytest.raises(UserError, match="grid: 10,100 runs; 10,000 are allowed"):
        grid_cases(plan(hundred))


def test_the_exit_code_tells_of_failed_runs(monkeypatch, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("grid: {seed: [0]}\n")
    for state, code in (("done", 0), ("failed", 1)):
        found = Row("x", {}, Status(state=state, error="e"), {"loss": None, "bytes_packed": None})
        monkeypatch.setattr(sweeps, "sweep", lambda *_, found=found, **__: [found])
        (tmp_path / "out").mkdir(exist_ok=True)
        try:
            main(["sweep", str(file), str(tmp_path / "out")])
            ended = 0
        except SystemExit as stop:
            ended = stop.code
        assert (ended or 0) == code


def test_a_run_that_others_have_is_not_started(tmp_path, in_process):
    store, runs = Store(tmp_path), sweeps._runs(plan(), HASHES, Silent())
    grid = sweeps.Grid(runs, store)
    assert not grid.over()
    with store.lock(runs[0].id):
        assert store.is_alive(runs[0].id)
        first = grid.next([])
        assert first.id != runs[0].id
        assert chain.main(str(tmp_path), runs[0].id) == workers.BUSY
    assert not store.is_alive(runs[0].id)
    other = sweeps.Grid(runs, Store(tmp_path))  # of another scheduler
    assert other.next([]).id == runs[0].id
    assert {grid.next([]).id, other.next([]).id} == {run.id for run in runs[1:]} - {first.id}
    assert grid.next([]) is None


def test_runs_that_share_a_missing_stage_are_not_started_together(tmp_path):
    """The second run takes the other masks, so that it need not wait for the first one's."""
    runs = sweeps._runs(plan(), HASHES, Silent())
    grid = sweeps.Grid(runs, Store(tmp_path))
    first = grid.next([])
    second = grid.next([first])
    assert (first.settings["mask.pattern"], second.settings["mask.pattern"]) == ("2:4", "1:4")
    assert grid.next([first, second]) is not None  # waits, but starts at once when it may


def test_a_stage_is_made_by_one_run_at_a_time(tmp_path):
    import threading

    store, order = Store(tmp_path), []
    inside, go = threading.Event(), threading.Event()

    def hold():
        with store.stage_lock("mask-1"):
            inside.set()
            go.wait(10)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    said = []

    def say(text):
        said.append(text)
        go.set()

    chain._alone(store, "mask-1", SimpleNamespace(say=say), lambda: order.append("second"))
    thread.join()
    assert order == ["first", "second"]
    assert said == ["waiting for mask-1, which another run is making"]


# ------------------------------------------------------------------------------------- workers


def test_slots_share_the_cores_or_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert slots(0, 0, []) == [Slot(0, "", 8)]
    assert slots(3, 0, []) == [Slot(k, "", 2) for k in range(3)]
    assert slots(0, 0, ["0", "3"]) == [Slot(0, "0", 4), Slot(1, "3", 4)]
    assert slots(1, 2, ["0", "3"])[0].environment == {
        "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with pytest.raises(UserError, match="there are 2 GPUs"):
        slots(3, 0, ["0", "3"])
    with pytest.raises(UserError, match="there are 8 cores"):
        slots(3, 4, [])


@pytest.mark.parametrize(
    ("said", "code", "state", "error"),
    [
        ("done", 0, "done", ""),
        ("failed", 2, "failed", "own words"),
        ("running", -9, "failed", "killed by SIGKILL (out of memory?)"),
        ("running", -11, "failed", "killed by SIGSEGV"),
        ("waiting", 1, "failed", "ended with exit code 1"),
        ("stopped", 130, "stopped", ""),
        ("stopped", -9, "failed", "killed by SIGKILL (out of memory?)"),
    ],
)
def test_how_a_job_ended(said, code, state, error, tmp_path):
    store, (run, *_) = Store(tmp_path), sweeps._runs(plan(), HASHES, Silent())
    store.write(run)
    own = "own words" if said == "failed" else ""
    store.set_status(run.id, Status(state=said, error=own))
    found = outcome(store, Worker(run, Slot(0), Ended(code)))
    assert (found.state, found.error) == (state, error)
    assert store.status(run.id) == found


@pytest.mark.parametrize(("said", "state"), [("stopped", "pruned"), ("done", "done")])
def test_a_job_that_was_given_up_is_pruned_unless_it_was_faster(said, state, tmp_path):
    store, (run, *_) = Store(tmp_path), sweeps._runs(plan(), HASHES, Silent())
    store.write(run)
    store.set_status(run.id, Status(state=said))
    assert outcome(store, Worker(run, Slot(0), Ended(130), ended_early=True)).state == state


# ------------------------------------------------------------------------------------- results


def row(**values) -> Row:
    return Row("", {}, Status(state="done"), values)


def test_the_front_is_what_no_other_beats():
    """Against the definition, pair by pair, in three objectives with ties and gaps."""
    rng = random.Random(0)
    ways = {"a": "minimize", "b": "maximize", "c": "minimize"}
    for _ in range(30):
        rows = [row(**{k: rng.choice([None, 1.0, 2.0, 3.0, 4.0]) for k in ways}) for _ in range(9)]
        mark_best(rows, ways)
        whole = [r for r in rows if None not in r.values.values()]

        def beats(x, y):
            better = [
                (x.values[k] < y.values[k]) if w == "minimize" else (x.values[k] > y.values[k])
                for k, w in ways.items()
            ]
            equal = [x.values[k] == y.values[k] for k in ways]
            return all(b or e for b, e in zip(better, equal, strict=True)) and any(better)

        for r in rows:
            expected = r in whole and not any(beats(o, r) for o in whole if o is not r)
            assert r.best is expected


def test_objectives_come_from_the_evaluation_the_records_and_the_clock(in_process, tmp_path):
    out, store = tmp_path / "out", Store(tmp_path / "out")
    names = ["macs", "finetune.loss", "seconds", "mask.nonzero", "finetune.nothing"]
    rows = sweep(plan({"seed": [0]}, objectives=dict.fromkeys(names, "minimize")), out)
    (only,) = rows
    run = only.run
    records = [json.loads((store.stage(s.folder) / "record.json").read_text()) for s in run.stages]
    assert only.values["finetune.loss"] == records[1]["figures"]["loss"]
    assert only.values["mask.nonzero"] == records[0]["figures"]["nonzero"]
    assert only.values["seconds"] == pytest.approx(sum(r["wall_time_s"] for r in records))
    assert only.values["macs"] == only.evaluation.figures.macs > 0
    assert only.values["finetune.nothing"] is None
    assert value_of(store, run, "sparsity") == only.evaluation.figures.sparsity


def test_the_page_before_anything_is_measured(tmp_path):
    kept = sweeps.Kept(sweep=plan(), hashes=hashes_of(plan()), place="here")
    (tmp_path / sweeps.FILE).write_text(kept.model_dump_json())
    rows = rows_of(tmp_path)
    assert [r.status.state for r in rows] == ["waiting"] * 4
    text = write_page(rows, read_kept(tmp_path).sweep, tmp_path).read_text(encoding="utf-8")
    assert text.count("<tr>") == 5
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_escapes_what_data_says(in_process, tmp_path):
    label = "<script>alert(1)</script>"
    drawn = {"evaluate.depth": "full", "evaluate.samples": 4, "evaluate.sampling_steps": 2}
    drawn["evaluate.skip_fid"] = True
    grid = {"method": {label: {"mask.score": "random"} | drawn}}
    rows = sweep(plan(grid), tmp_path / "out")
    text = write_page(rows, plan(grid), tmp_path / "out").read_text(encoding="utf-8")
    assert label not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "data:image/png;base64," in text  # the samples


def test_an_interrupted_sweep_lets_go_of_its_runs(in_process, tmp_path, monkeypatch):
    def killed(store, run, slot):
        raise Killed

    monkeypatch.setattr(sweeps, "start", killed)
    with pytest.raises(Killed) as interruption:  # which holds on to the frames, as a notebook does
        sweep(plan(), tmp_path / "out")
    assert interruption.value
    (run, *_) = rows_of(tmp_path / "out")
    assert Store(tmp_path / "out").claim(run.run.id)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 0.025812, "0.02581"), ("bytes_packed", 903_000, "0.903 MB"), ("macs", 49.5e6, "49.5M"),
        ("seconds", 34.4, "34 s"), ("loss", None, "–"),
    ],
)  # fmt: skip
def test_values_in_words(name, value, text):
    assert shown(name, value) == text


def test_times_in_words():
    assert [in_words(s) for s in (5, 99, 720, 12_240)] == ["5 s", "99 s", "12 min", "3.4 h"]


def test_show_of_a_folder_without_a_sweep_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "show", str(tmp_path)])
    assert "holds no sweep; make one: prunedm sweep FILE.yaml" in capsys.readouterr().err


# ------------------------------------------------------------------------------ real processes


def launch(file: Path, out: Path) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "prunedm", "sweep", str(file), str(out), "--workers", "1"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def weights(out: Path) -> dict[str, str]:
    return {p.name: hash_folder(p) for p in (out / "stages").glob("finetune-*") if p.is_dir()}


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    """kill -9 of the sweep in the middle of a training: its child ends too, and nothing is lost."""
    recipe = RECIPE | {
        "model": str(tiny_folder()),
        "finetune": TUNE | {"steps": 600, "checkpoint_every": 20},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"recipe": recipe, "grid": {"finetune.lr": [1e-3, 1e-4]}}))
    assert launch(file, tmp_path / "whole").wait(300) == 0
    out = tmp_path / "killed"
    process = launch(file, out)
    deadline = time.monotonic() + 120
    while not list(out.glob("stages/finetune-*.partial/resume/checkpoint.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = [p.parent.name for p in out.glob("runs/*/status.json")]
    store = Store(out)
    while store.is_alive(run):  # the child notices that its parent is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert store.status(run).state == "stopped"
    assert launch(file, out).wait(300) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert len(weights(out)) == 2
    log = store.log(run).read_text(encoding="utf-8")
    assert log.count("mask:") == 2  # made, then done already
    assert [r.values for r in rows_of(out)] == [r.values for r in rows_of(tmp_path / "whole")]
