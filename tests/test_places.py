"""Where results go and inputs are: `~`, links, names that nothing can have; what records say of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tiny_folder

from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.options import FinetuneOptions, LoopOptions, StatsOptions
from prunedm.record import FILE, Record, Source, read_record, write_record
from prunedm.stages.frame import Plan, run_stage
from prunedm.system.places import bare, located, portable, target

QUICK = ["--count", "2", "--sampling-steps", "1", "--device", "cpu"]


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


# ---------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["sample", "MODEL", "~/x", *QUICK], "x"),
        (["sample", "MODEL", "--out=~/x", *QUICK], "x"),
        (["stats", "digits", "~/s.npz", "--features", "digits-cnn", "--num-samples", 80], "s.npz"),
        (["loss", "MODEL", "--out", "~/l", "--problems", 2, "--config", "~/c.yaml"], "l"),
    ],
)
def test_a_tilde_is_the_home_directory(words, made, home, capsys):
    (home / "c.yaml").write_text("batch_size: 2\nconvert_channels: true\n")
    assert call(*[tiny_folder() if word == "MODEL" else word for word in words]) == 0
    assert sorted(path.name for path in home.iterdir()) == ["c.yaml", made]
    assert not list(Path.cwd().iterdir())
    assert "~" not in capsys.readouterr().out


def test_a_tilde_in_options_and_python_too(home):
    (home / "masks").mkdir()
    assert FinetuneOptions(teacher="~/t").teacher == str(home / "t")
    assert StatsOptions(features="~/f.pt").features == str(home / "f.pt")
    make = lambda folder: {}  # noqa: E731
    run_stage("loss", Plan(LoopOptions(), {}, make), "~/out")
    assert (home / "out" / FILE).exists()


NOBODYS = ["", " ", "/", "a\0b", "a\ud800b", "a\udcffb", "x" * 250, "~nobody-of-this-name/x"]


@pytest.mark.parametrize("name", NOBODYS)
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "MODEL", "OUT", *QUICK],
        ["prune", "MODEL", "OUT"],
        ["run", "OUT", "--dry-run"],
        ["masks", "extract", "MODEL", "OUT"],
        ["stats", "digits", "OUT"],
        ["fid", "digits", "digits", "--json", "OUT"],
        ["sweep", "s.yaml", "OUT"],
        ["sweep", "show", "OUT"],
    ],
)
def test_names_that_nothing_can_have_are_one_line_before_any_work(words, name, home, capsys):
    named = [{"MODEL": str(tiny_folder()), "OUT": name}.get(str(w), w) for w in words]
    if words[0] == "run" and not name.strip():
        pytest.skip("an empty word is no place, and run has a place of its own")
    assert call(*named) == 2
    told = capsys.readouterr().err
    assert told.startswith("prunedm: ")
    assert told.count("\n") == 1
    assert len(told) < 700
    assert "internal" not in told
    assert not list(Path.cwd().iterdir())


def test_a_file_or_a_loop_of_links_is_refused_before_any_work(tmp_path):
    make = pytest.fail
    (tmp_path / "file").write_text("dear")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name, words in (("to-file", "no result of prunedm"), ("a", "leads nowhere|exists")):
        with pytest.raises(UserError, match=words):
            run_stage("loss", Plan(LoopOptions(), {}, make), tmp_path / name)
    assert (tmp_path / "file").read_text() == "dear"


def test_the_folder_under_the_shell_stays_the_same_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".").st_ino  # noqa: PTH116
    assert call("sample", tiny_folder(), ".", *QUICK) == 0
    assert os.stat(".").st_ino == before  # noqa: PTH116
    assert {"000000.png", FILE} <= {path.name for path in Path().iterdir()}
    assert call("sample", tiny_folder(), ".", *QUICK, "--seed", 1, "--overwrite") == 0
    assert os.stat(".").st_ino == before  # noqa: PTH116
    assert read_record(Path()).seed == 1


def test_a_link_to_a_masks_file_stays_a_link(tmp_path):
    (tmp_path / "real.npz").write_bytes(b"old")
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    words = ["--features", "digits-cnn", "--num-samples", 80, "--overwrite"]
    assert call("stats", "digits", tmp_path / "link.npz", *words) == 0
    assert (tmp_path / "link.npz").is_symlink()
    assert len((tmp_path / "real.npz").read_bytes()) > 1000


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    name = "x" * 238
    assert target(tmp_path / name).name == name
    run_stage("loss", Plan(LoopOptions(), {}, lambda folder: {}), tmp_path / name)
    assert (tmp_path / name / FILE).exists()


# ---------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", ["digits", "google/ddpm-cifar10-32", "auto", "inception", ""])
def test_names_stay_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable(name, tmp_path) == bare(name) == located(name, tmp_path) == name


@pytest.mark.parametrize("where", ["home/models/a", "home/runs/x/in", "data/a", "home/a b/ü"])
@pytest.mark.parametrize("folder", ["home/runs/x", "scratch/x", "scratch/x/.partial"])
def test_a_path_in_a_record_names_no_machine_and_leads_back(where, folder, home, tmp_path):
    path, place = tmp_path / where, tmp_path / folder
    path.mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    told = portable(str(path), place)
    assert told.startswith(("./", "../", "~/"))
    assert str(tmp_path) not in told
    assert "home" not in told
    real = place.parent if place.name == ".partial" else place
    assert located(told, real) == str(path)


def test_records_lead_to_their_sources_after_a_move_and_old_ones_still_do(tmp_path):
    shutil.copytree(tiny_folder(), tmp_path / "a" / "model")
    source = Source(path=str(tmp_path / "a" / "model"), hash="h")
    options = {"dataset": str(tmp_path / "a"), "teacher": "auto"}
    oldest = Record(stage="train", inputs={"model": source})
    record = Record(stage="prune", inputs={"model": source}, options=options, history=[oldest])
    (tmp_path / "a" / "out").mkdir()
    write_record(record, tmp_path / "a" / "out")
    text = (tmp_path / "a" / "out" / FILE).read_text()
    assert str(tmp_path) not in text
    assert read_record(tmp_path / "a" / "out").model_dump() == record.model_dump()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_record(tmp_path / "b" / "out")
    assert moved.inputs["model"].path == str(tmp_path / "b" / "model")
    assert moved.history[0].inputs["model"].path == str(tmp_path / "b" / "model")
    assert moved.identity | {"options": {}} == record.identity | {"options": {}}
    old = json.loads(text) | {"inputs": {"model": {"path": "/old/model", "hash": "h"}}}
    (tmp_path / "b" / "out" / FILE).write_text(json.dumps(old))
    assert read_record(tmp_path / "b" / "out").inputs["model"].path == "/old/model"


def test_no_file_of_a_chain_names_the_machine(home, tmp_path):
    """Prune, evaluate and export of a model in another folder, data in a third."""
    import numpy as np
    from PIL import Image

    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.fromarray(np.full((8, 8), 60 * k, np.uint8)).save(tmp_path / "images" / f"{k}.png")
    shutil.copytree(tiny_folder(), tmp_path / "models" / "dense")
    pruned, data = tmp_path / "runs" / "pruned", ["--dataset", tmp_path / "images", "--device=cpu"]
    small = ["--score=magnitude", "--pictures=0", "--mechanism=nm"]
    assert call("prune", tmp_path / "models" / "dense", pruned, *small, *data) == 0
    words = ["--depth=quick", "--problems=4", "--latency-repeats=1"]
    assert call("evaluate", pruned, tmp_path / "runs" / "eval", *words, *data) == 0
    assert call("export", pruned, tmp_path / "runs" / "exported") == 0
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]
    rows = json.loads((tmp_path / "runs" / "eval" / "detailed_results.json").read_text())
    assert [row["label"] for row in rows] == ["dense", "pruned"]  # found through the record
    assert call("prune", tmp_path / "models" / "dense", pruned, *small, *data) == 0
