"""Searches: what Optuna proposes, is told, and shares between processes."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import Ended, Killed, tiny_folder

from prunedm.errors import UserError
from prunedm.evaluation.results import Conditions, Evaluation, Figures
from prunedm.experiments import sweep as sweeps
from prunedm.experiments.inputs import hashes_of
from prunedm.experiments.plan import Sweep
from prunedm.experiments.search import SETTINGS, Searching
from prunedm.experiments.store import Run, Status, Store
from prunedm.experiments.study import open_study
from prunedm.experiments.sweep import rows_of, sweep
from prunedm.experiments.workers import Worker
from prunedm.record import write_json
from prunedm.stages.evaluating.measure import RESULTS
from prunedm.system.running import Entry

optuna = pytest.importorskip("optuna")

RECIPE = {
    "convert_channels": True,
    "device": "cpu",
    "stages": ["mask", "finetune"],
    "evaluate": {"depth": "quick"},
}
SPACE = {
    "finetune.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "finetune.steps": {"low": 100, "high": 500, "step": 50},
    "mask.pattern": ["2:4", "1:4"],
}


def plan(objectives=None, **search) -> Sweep:
    search = {"trials": 6, "space": SPACE} | search
    objectives = objectives or {"loss": "minimize"}
    recipe = RECIPE | {"model": str(tiny_folder())}
    return Sweep(recipe=recipe, search=search, objectives=objectives)


def loss_of(settings: dict) -> float:
    """Lowest at lr = 1e-3 and 500 steps; 1:4 costs."""
    lr, steps = settings.get("finetune.lr", 1e-3), settings.get("finetune.steps", 500)
    return (math.log10(lr) + 3) ** 2 + (500 - steps) / 500 + (settings.get("mask.pattern") == "1:4")


def finish(store: Store, run: Run) -> None:
    """What a run's process leaves, with figures that are a function of its settings."""
    conditions = Conditions(
        dataset="none", problems=1, samples=0, sampler="", seed=0, features="", reference=0,
        device="", dtype="", latency_batch=1,
    )  # fmt: skip
    size = 100 if run.settings.get("mask.pattern") == "1:4" else 200
    figures = Figures(
        loss=loss_of(run.settings), params=1, nonzero=1, macs=1, bytes_disk=1, bytes_packed=size
    )
    result = Evaluation(label="", model="", hash="", figures=figures, conditions=conditions)
    folder = store.stage(run.evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(result.model_dump(mode="json"), folder / RESULTS)
    store.set_status(run.id, Status(state="done", seconds=1.0))


@pytest.fixture
def runs(monkeypatch):
    """Runs take no time; returns the settings of those started. Killed at `runs.die_at`."""
    return fake_runs(monkeypatch)


class Started(list):
    die_at = -1


def fake_runs(monkeypatch) -> Started:
    started = Started()

    def start(store, run, slot):
        store.write(run)
        started.append(run.settings)
        if len(started) == started.die_at:
            started.die_at = -1
            raise Killed
        finish(store, run)
        return Worker(run, slot, Ended())

    monkeypatch.setattr(sweeps, "start", start)
    monkeypatch.setattr(sweeps, "_LOOK_EVERY", 0.0)
    return started


def trials(plan_: Sweep, out: Path) -> list:
    return open_study(plan_, out, hashes_of(plan_)).get_trials()


def test_proposals_are_of_the_space_and_results_are_told(runs, tmp_path):
    rows = sweep(plan(trials=12), tmp_path / "out")
    found = trials(plan(), tmp_path / "out")
    assert [t.state.name for t in found] == ["COMPLETE"] * 12
    for trial in found:
        settings = json.loads(trial.user_attrs[SETTINGS])
        assert 1e-5 <= settings["finetune.lr"] <= 1e-1
        assert settings["finetune.steps"] in range(100, 501, 50)
        assert isinstance(settings["finetune.steps"], int)
        assert trial.value == pytest.approx(loss_of(settings))
    assert [row.settings for row in rows] == runs
    (best,) = [row for row in rows if row.best]
    assert best.values["loss"] == min(row.values["loss"] for row in rows)


def test_nothing_is_proposed_twice_over(runs, tmp_path):
    """Three settings in eight trials: each is run once, and all its trials are told."""
    small = plan(trials=8, space={"mask.pattern": ["2:4", "1:4", "4:8"]}, sampler="random")
    rows = sweep(small, tmp_path / "out")
    assert len(runs) == len(rows) <= 3
    assert sorted(n for row in rows for n in row.numbers) == list(range(8))
    values = [t.value for t in trials(small, tmp_path / "out")]
    assert None not in values


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("random", "nsga2", "gp")]


@pytest.mark.parametrize("sampler", ["tpe", *_SLOW])
def test_an_interrupted_search_proposes_what_an_unbroken_one_does(sampler, runs, tmp_path):
    study = plan(trials=14, sampler=sampler, study="same")
    sweep(study, tmp_path / "whole")
    whole = list(runs)
    runs.clear()
    cut = runs.die_at = len(whole) - 1  # after the random start; nsga2 comes to some runs twice
    assert cut > 5
    with pytest.raises(Killed):
        sweep(study, tmp_path / "cut")
    rows = sweep(study, tmp_path / "cut")
    assert runs == [*whole[:cut], *whole[cut - 1 :]]  # the one that was cut off, once more
    assert [row.settings for row in rows] == whole
    assert [t.state.name for t in trials(study, tmp_path / "cut")] == ["COMPLETE"] * 14


@pytest.mark.slow  # 48 trials
def test_a_search_learns(runs, tmp_path):
    """On a smooth valley TPE's later proposals are lower than random ones."""
    mean = {}
    for sampler in ("tpe", "random"):
        runs.clear()
        sweep(plan(trials=24, sampler=sampler), tmp_path / sampler)
        losses = [loss_of(settings) for settings in runs[-10:]]
        mean[sampler] = sum(losses) / len(losses)
    assert mean["tpe"] < 0.75 * mean["random"]


def test_several_objectives_have_optunas_front(runs, tmp_path):
    both = plan({"loss": "minimize", "bytes_packed": "minimize"}, trials=10, sampler="nsga2")
    rows = sweep(both, tmp_path / "out")
    expected = {t.number for t in open_study(both, tmp_path / "out", hashes_of(both)).best_trials}
    assert {n for row in rows if row.best for n in row.numbers} == expected
    assert 0 < len(expected) < 10


def entry(held_out: list) -> Entry:
    return Entry(
        pid=1, process_started=0, host="", command="", cwd="", out=Path("/x"), started=0,
        updated=0, held_out=held_out,
    )  # fmt: skip


def test_a_trial_that_lags_behind_is_given_up(tmp_path):
    """Of the median pruner: its best so far is worse than the median of whole trials at that step."""
    pruned = plan(pruner="median", pruner_patience=3, trials=5)
    store = Store(tmp_path)
    source = Searching(pruned, store, hashes_of(pruned), "here")
    for loss in (0.1, 0.2, 0.3):
        run = source.next([])
        store.write(run)
        store.set_status(run.id, Status(state="running", stage="finetune"))
        assert not source.watch(run, entry([(50, loss), (100, loss)]))
        finish(store, run)
        source.finished(run, store.status(run.id))
    run = source.next([])
    store.write(run)
    store.set_status(run.id, Status(state="running", stage="finetune"))
    assert not source.watch(run, entry([]))
    assert source.watch(run, entry([(50, 0.25)]))
    assert source.watch(run, entry([(50, 0.25), (100, 0.26)]))
    source.finished(run, Status(state="pruned"))
    store.set_status(run.id, Status(state="pruned"))
    kept = sweeps.Kept(sweep=pruned, hashes=hashes_of(pruned), place="here")
    (tmp_path / sweeps.FILE).write_text(kept.model_dump_json())
    row = rows_of(tmp_path)[-1]
    assert (row.status.state, row.values, row.best) == ("pruned", {"loss": None}, False)
    *_, last = trials(pruned, tmp_path)
    assert last.state.name == "PRUNED"
    assert list(last.intermediate_values.values()) == [0.25, 0.26]
    assert not source.over()
    assert source.next([]) is not None


def test_losses_of_the_stage_before_are_not_this_ones(tmp_path):
    """A stage loads for seconds before its first step, with the old losses still to be read."""
    store = Store(tmp_path)
    study = plan(pruner="median")
    study = study.model_copy(update={"recipe": study.recipe | {"stages": ["learn", "finetune"]}})
    source = Searching(study, store, hashes_of(study), "here")
    run = source.next([])
    store.write(run)
    old = entry([(50, 0.15)]).model_copy(update={"task_started": 5.0})
    store.set_status(run.id, Status(state="running", stage="learn", stage_started=4.0))
    source.watch(run, old)
    store.set_status(run.id, Status(state="running", stage="finetune", stage_started=6.0))
    source.watch(run, old)
    source.watch(run, old.model_copy(update={"task_started": 7.0}))
    (trial,) = trials(study, tmp_path)
    assert trial.intermediate_values == {50: 0.15, 450: 0.15}  # after learn's 400 steps


def test_settings_that_the_recipe_refuses_are_one_failed_trial(runs, tmp_path):
    space = {"finetune.match_features": [0.0, 1.0]}  # which needs a teacher
    study = plan(trials=6, space=space, sampler="random")
    study = study.model_copy(update={"recipe": study.recipe | {"finetune": {"teacher": "none"}}})
    rows = sweep(study, tmp_path / "out")
    failed = [row for row in rows if row.status.state == "failed"]
    assert runs == [{"finetune.match_features": 0.0}]
    assert failed
    assert all("give --teacher" in row.status.error for row in failed)
    assert sum(len(row.numbers) for row in rows) == 6


def test_held_out_losses_count_only_in_stages_of_the_recipe(tmp_path):
    store = Store(tmp_path)
    source = Searching(plan(pruner="median"), store, hashes_of(plan()), "here")
    run = source.next([])
    store.write(run)
    store.set_status(run.id, Status(state="running", stage="dense"))
    source.watch(run, entry([(50, 0.15)]))
    (trial,) = trials(plan(), tmp_path)
    assert trial.intermediate_values == {}


def test_a_failed_run_is_told_and_counts(monkeypatch, runs, tmp_path):
    def start(store, run, slot):
        store.write(run)
        store.set_status(run.id, Status(state="failed", error="broken"))
        return Worker(run, slot, Ended(2))

    monkeypatch.setattr(sweeps, "start", start)
    rows = sweep(plan(trials=3), tmp_path / "out")
    assert [t.state.name for t in trials(plan(), tmp_path / "out")] == ["FAIL"] * 3
    assert [row.status.error for row in rows] == ["broken"] * 3
    assert not any(row.best for row in rows)


def test_a_trial_of_another_machine_is_taken_over_when_it_is_silent(tmp_path, monkeypatch):
    """Its lock cannot be seen from here; its sign of life in the storage can."""
    study = plan(trials=1, storage=f"sqlite:///{tmp_path}/both.db", study="both")
    other = Searching(study, Store(tmp_path / "other"), hashes_of(study), "there")
    run = other.next([])
    here = Searching(study, Store(tmp_path / "here"), hashes_of(study), "here")
    assert here.next([]) is None
    assert not here.over()
    monkeypatch.setattr("prunedm.experiments.search._SILENT", -1.0)
    assert here.next([]).id == run.id
    monkeypatch.undo()
    assert other.next([run]) is None


def test_more_trials_go_on_with_the_same_study(runs, tmp_path):
    sweep(plan(trials=3), tmp_path / "out")
    rows = sweep(plan(trials=5), tmp_path / "out")
    assert len(rows) == len(runs) == 5


def test_another_space_or_objective_needs_another_study(runs, tmp_path):
    sweep(plan(trials=2), tmp_path / "out")
    other = plan(trials=4, space=SPACE | {"mask.pattern": ["2:4", "4:8"]})
    with pytest.raises(UserError, match=r"name another search\.study"):
        sweep(other, tmp_path / "out")
    with pytest.raises(UserError, match=r"is of objectives {'loss': 'minimize'}, the file {'macs'"):
        sweep(plan({"macs": "minimize"}), tmp_path / "out")
    longer = plan(trials=4)
    longer = longer.model_copy(update={"recipe": longer.recipe | {"finetune": {"steps": 7}}})
    with pytest.raises(UserError, match="is of another recipe, model or data; name another"):
        sweep(longer, tmp_path / "out")


def test_only_and_retry_are_for_grids(tmp_path):
    for words in ({"only": ["x"]}, {"retry": True}):
        with pytest.raises(UserError, match="for the runs of a grid"):
            sweep(plan(), tmp_path / "out", **words)


def test_a_storage_that_cannot_be_opened_warns_of_nothing_before(tmp_path, recwarn):
    """SQLAlchemy does, of arguments that SQLite does not take."""
    with pytest.raises(UserError, match=r"cannot open storage .*password=\*\*\*"):
        sweep(plan(storage=f"sqlite:///{tmp_path}/gone/x.db?password=hunter22"), tmp_path / "out")
    assert not [w for w in recwarn.list if "Query string" in str(w.message)]


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot open storage nonsense://x"):
        sweep(plan(storage="nonsense://x"), tmp_path / "out")


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from prunedm.experiments import sweep as sweeps
from prunedm.experiments.plan import Sweep
from prunedm.experiments.workers import Worker
from helpers import Ended
from test_search import finish

def start(store, run, slot):
    store.write(run)
    with store.lock(run.id):  # nobody else has it
        with open(sys.argv[3] + ".started", "a") as file:
            file.write(run.id + "\\n")
        time.sleep(0.02)
        finish(store, run)
    return Worker(run, slot, Ended())

sweeps.start, sweeps._LOOK_EVERY = start, 0.0
plan = Sweep.model_validate_json(Path(sys.argv[2]).read_text())
gate = Path(sys.argv[4])
Path(sys.argv[3] + ".ready").touch()
while not gate.exists():
    time.sleep(0.01)
sweeps.sweep(plan, Path(sys.argv[3]))
"""


@pytest.mark.slow  # four interpreters with PyTorch
@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_at_once_on_one_study(shared, tmp_path):
    """They share one database; with one folder (shared) or each its own, as machines have."""
    study = plan(trials=16, study="both", storage=f"sqlite:///{tmp_path}/both.db")
    (tmp_path / "plan.json").write_text(study.model_dump_json())
    places = [tmp_path / "out"] * 2 if shared else [tmp_path / "one", tmp_path / "two"]
    gate = tmp_path / "gate"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path / "plan.json"),
             str(place), str(gate)],
            stderr=subprocess.PIPE,
        )
        for place in places
    ]  # fmt: skip
    ready = {Path(f"{place}.ready") for place in places}
    while not all(path.exists() for path in ready) and all(w.poll() is None for w in workers):
        time.sleep(0.02)
    gate.touch()
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    # one that both were at last asks for a trial too many, which has no run
    found = [t for t in trials(study, places[0]) if SETTINGS in t.user_attrs]
    assert [t.state.name for t in found] == ["COMPLETE"] * 16
    started = [
        line for place in set(places) for line in Path(f"{place}.started").read_text().split()
    ]
    assert len(started) == len(set(started)) == 16  # no run was made by both
    for place in set(places):
        rows = rows_of(place)
        assert len(rows) == 16  # of the other machine's, the storage tells the figures
        assert None not in [row.values["loss"] for row in rows]
    if not shared:
        assert all(Path(f"{place}.started").read_text() for place in places)
