"""The command line: what goes wrong is one line and exit code 2; what wins; a whole run."""

import io
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY, tiny_folder
from PIL import Image

from prunedm.cli import main, verbs
from prunedm.cli import run as run_command
from prunedm.configuration import merged, preset_file
from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.masks import Masks, Pattern, save_masks
from prunedm.options import FinetuneOptions, LearnOptions, PruneOptions, TrainOptions
from prunedm.recipe import Recipe
from prunedm.record import read_record

QUICK = {"batch_size": 4, "validation_problems": 4, "device": "cpu"}
TABLE = {key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items()}


def call(*words: object) -> int:
    """The exit code of `prunedm words...`, in this process."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def write(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


# ------------------------------------------------------------------------------- bad input


def _copy(place: Path) -> Path:
    return Path(shutil.copytree(tiny_folder(), place / "copy"))


def _weights(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def no_weights(place: Path):
    model = _copy(place)
    _weights(model).unlink()
    return ["prune", model, place / "out"], ["copy/unet", "diffusion_pytorch_model.safetensors"]


def truncated_weights(place: Path):
    model = _copy(place)
    _weights(model).write_bytes(_weights(model).read_bytes()[:3000])
    return ["prune", model, place / "out"], ["copy/unet", "download it again"]


def other_weights(place: Path):
    model = _copy(place)
    shutil.copy(_weights(tiny_folder(num_class_embeds=3)), _weights(model))
    return ["prune", model, place / "out"], ["copy/unet", "class_embedding"]


def no_model(place: Path):
    (place / "photos").mkdir()
    (place / "photos" / "a.png").write_bytes(b"")
    return ["finetune", place / "photos", place / "out"], ["photos is not a model", "config.json"]


def no_folder(place: Path):
    return ["sample", "/nowhere/model", place / "out"], ["'/nowhere/model'", "hub id", "digits"]


def other_model_class(place: Path):
    model = _copy(place)
    config = model / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet3DModel"))
    return ["evaluate", model, place / "out"], ["UNet3DModel", "UNet2DModel"]


def damaged_json(place: Path):
    model = _copy(place)
    (model / "model_index.json").write_text("{")
    return ["evaluate", model, place / "out"], ["model_index.json", "not JSON"]


def damaged_masks(place: Path):
    model = _copy(place)
    (model / "masks.safetensors").write_bytes(b"no")
    return ["finetune", model, place / "out"], ["masks.safetensors", "damaged"]


def broken_masks(place: Path):
    model = _copy(place)
    shape = load(model).denoiser.mid_block.attentions[0].to_q.weight.shape
    mask = torch.tensor([1, 0, 1, 0]).bool().repeat(shape[0], shape[1] // 4)
    name = "mid_block.attentions.0.to_q"
    save_masks(Masks.uniform({name: mask}, Pattern(2, 4)), model / "masks.safetensors")
    return ["finetune", model, place / "out"], [name, "remove masks.safetensors"]


def masks_file_there(place: Path):
    (place / "m.safetensors").write_bytes(b"precious")
    words = ["masks", "extract", tiny_folder(), place / "m.safetensors"]
    return words, ["m.safetensors exists", "--overwrite"]


def masks_of_a_dense_model(place: Path):
    words = ["masks", "extract", tiny_folder(), place / "new" / "m.safetensors"]
    return words, ["has no masks", "zero", "prune it first"]


def masks_without_a_file(place: Path):
    return ["masks", "show", place / "m.safetensors"], ["m.safetensors", "not a masks file"]


def loss_with_masks_of_another_model(place: Path):
    save_masks(Masks({"gone": torch.ones(2, 4).bool()}), place / "m.safetensors")
    words = ["loss", tiny_folder(), place / "out", "--masks", place / "m.safetensors"]
    return words, ["masks are of another model", "gone", "no such layer"]


def loss_targets_without_masks(place: Path):
    return ["loss", tiny_folder(), place / "out", "--targets", "mid_block"], ["give --masks"]


def unknown_dataset(place: Path):
    words = ["prune", tiny_folder(), place / "out", "--dataset", "/no/such/images"]
    return words, ["unknown dataset '/no/such/images'"]


def empty_image_folder(place: Path):
    (place / "images").mkdir()
    words = ["prune", tiny_folder(), place / "out", "--dataset", place / "images"]
    return words, ["images' holds no images", ".png"]


def colour_images(place: Path):
    (place / "images").mkdir()
    Image.new("RGB", (8, 8)).save(place / "images" / "a.png")
    words = ["finetune", tiny_folder(), place / "out", "--dataset", place / "images"]
    return words, ["3 channels", "the model takes 1", "--convert-channels"]


def broken_image(place: Path):
    (place / "images").mkdir()
    (place / "images" / "a.png").write_bytes(b"no")
    words = ["finetune", tiny_folder(), place / "out", "--dataset", place / "images"]
    return words, ["cannot read", "a.png"]


def unlabelled_images(place: Path):
    (place / "images").mkdir()
    Image.new("L", (8, 8)).save(place / "images" / "a.png")
    model = tiny_folder(num_class_embeds=3)
    return ["prune", model, place / "out", "--dataset", place / "images"], ["no labels"]


def nan_loss(place: Path):
    words = ["finetune", tiny_folder(), place / "out", "--lr", "1e3", "--weight-decay", "1e6"]
    loop = [
        "--steps",
        "30",
        "--batch-size",
        "2",
        "--validation-problems",
        "2",
        "--clip",
        "0",
        "--warmup=0",
    ]
    return [*words, *loop], ["nan at step", "lower --lr"]


def no_space_below_a_file(place: Path):
    (place / "file").write_text("")
    words = ["prune", tiny_folder(), place / "file" / "out", "--score=magnitude", "--pictures=0"]
    return words, [str(place / "file"), "choose another place"]


def foreign_folder(place: Path):
    (place / "mine").mkdir()
    (place / "mine" / "a.txt").write_text("dear")
    words = ["prune", tiny_folder(), place / "mine", "--overwrite"]
    return words, ["mine exists", "give another folder"]


def unknown_stage_to_run(place: Path):
    return ["run", place / "out", "--model", tiny_folder(), "--stages", "lern"], ["'lern'", "learn"]


def damaged_yaml(place: Path):
    (place / "a.yaml").write_text("steps: [")
    return ["train", place / "out", "--config", place / "a.yaml"], ["cannot read", "a.yaml"]


def missing_yaml(place: Path):
    return ["train", place / "out", "--config", place / "a.yaml"], ["a.yaml", "is missing"]


def yaml_without_a_table(place: Path):
    write(place / "a.yaml", [1, 2])
    return ["run", place / "out", "--config", place / "a.yaml"], ["a.yaml", "no table"]


def unknown_preset(place: Path):
    return ["train", place / "out", "--preset", "cats"], ["no preset 'cats'", "digits"]


def the_same_model_twice(place: Path):
    return ["compare", tiny_folder(), tiny_folder(), "--out", place / "out"], ["same model twice"]


def too_few_samples(place: Path):
    words = ["evaluate", "--model", tiny_folder(sample_size=16), "--out", place / "out"]
    return [*words, "--samples", "30"], ["30 samples are too few", "64", "--skip-fid"]


BAD_INPUT = [
    no_weights, truncated_weights, other_weights, no_model, no_folder, other_model_class,
    damaged_json, damaged_masks, broken_masks, unknown_dataset, empty_image_folder, colour_images,
    broken_image, unlabelled_images, nan_loss, no_space_below_a_file, foreign_folder,
    unknown_stage_to_run, damaged_yaml, missing_yaml, yaml_without_a_table, unknown_preset,
    the_same_model_twice, too_few_samples, masks_file_there, masks_of_a_dense_model,
    masks_without_a_file, loss_with_masks_of_another_model, loss_targets_without_masks,
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    words, expected = case(tmp_path)
    before = files(tmp_path)
    code = call(*words)
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("prunedm: ")
    assert told.count("\n") == 1
    for word in expected:
        assert word in told
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune", "digits", "OUT", "--target", "params=0"], ["params=0", "between 0 and 1"]),
        (["prune", "digits", "OUT", "--target", "params=1"], ["params=1", "removes 30 %"]),
        (["prune", "digits", "OUT", "--target", "1.5"], ["1.5", "between 0 and 1"]),
        (["prune", "digits", "OUT", "--target=-0.2"], ["-0.2", "between 0 and 1"]),
        (["prune", "digits", "OUT", "--target", "nan"], ["nan", "between 0 and 1"]),
        (["prune", "digits", "OUT", "--target", "size=0.3"], ["'size'", "params, macs, channels"]),
        (["prune", "digits", "OUT", "--target", "params=x"], ["'x'", "params=0.3"]),
        (["prune", "digits", "OUT", "--pattern", "4:4"], ["'4:4'", "0 < N < M", "2:4"]),
        (["prune", "digits", "OUT", "--pattern", "0:4"], ["'0:4'", "0 < N < M", "2:4"]),
        (["learn", "digits", "OUT", "--pattern", "4:2"], ["'4:2'", "0 < N < M", "2:4"]),
        (["learn", "digits", "OUT", "--pattern", "2-4"], ["'2-4'", "0 < N < M", "2:4"]),
        (["learn", "digits", "OUT", "--tau", "0", "1"], ["tau", "greater than 0"]),
        (["run", "OUT", "--mask.pattern", "4:2"], ["mask.pattern", "'4:2'", "2:4"]),
        (["run", "OUT", "--prune.target", "2"], ["prune.target", "between 0 and 1"]),
        (["run", "OUT", "--learn.steps", "0"], ["learn.steps", "greater than or equal to 1"]),
        (["run", "OUT", "--learn.stpes", "3"], ["--learn.stpes", "--learn.steps"]),
        (["prune", "digits", "OUT", "--patern", "2:4"], ["--patern", "--pattern"]),
        (["prune", "digits", "OUT", "--score", "magic"], ["magic", "magnitude"]),
        (["prune", "digits"], ["out"]),
        (["prnue", "digits", "OUT"], ["prnue", "prune"]),
        (["sample", "digits", "OUT", "--count", "many"], ["many", "int"]),
        (["run", "OUT", "--device", "gpu"], ["gpu", "auto"]),
        (["loss", "digits", "OUT", "--split", "dev"], ["dev", "test"]),
        (["loss", "digits", "OUT", "--max-batches", "0"], ["max_batches", "equal to 1"]),
        (["masks", "extract", "digits", "OUT"], ["out", "try out.safetensors"]),
        (["masks", "extract", "digits", "OUT", "--patern", "2:4"], ["--patern", "--pattern"]),
        (["masks", "shwo", "digits"], ["shwo", "show"]),
    ],
)
def test_bad_options_are_one_line_that_names_value_and_way_out(words, expected, tmp_path, capsys):
    code = call(*(tmp_path / "out" if word == "OUT" else word for word in words))
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("prunedm: ")
    assert told.count("\n") == 1
    for word in expected:
        assert word.lower() in told.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "table", "expected"),
    [
        ("run", {"lern": {"steps": 5}}, ["'lern'", "'learn'"]),
        ("run", {"learn": {"stpes": 5}}, ["'learn.stpes'", "'steps'"]),
        ("run", {"learn": {"steps": "x"}}, ["learn.steps", "'x'", "integer"]),
        ("run", {"prune": {"target": 1.5}}, ["prune.target"]),
        ("prune", {"patern": "2:4"}, ["'patern'", "'pattern'"]),
        ("prune", {"zzzzzzzzz": 1}, ["'zzzzzzzzz'", "known are"]),
        ("train", {"unet": TABLE | {"sampel_size": 8}}, ["unet.sampel_size", "'sample_size'"]),
    ],
)
def test_bad_yaml_names_the_file_the_key_and_the_nearest(
    command, table, expected, tmp_path, capsys
):
    config = write(tmp_path / "recipe.yaml", table)
    model = [] if command in ("run", "train") else [tiny_folder()]
    assert call(command, *model, tmp_path / "out", "--config", config) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for word in expected if "unet" in table else [str(config), *expected]:
        assert word in told
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_debug_shows_where(tmp_path):
    with pytest.raises(UserError):
        main(["prune", "/nowhere/model", str(tmp_path / "out"), "--debug"])


def test_a_fault_of_ours_is_told_as_one(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("prunedm.stages.verbs.sample.sample", broken)
    assert call("sample", tiny_folder(), tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert told.startswith("prunedm: internal error: RuntimeError: two lines; --debug")
    assert told.count("\n") == 1


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prunedm.stages.verbs.sample.sample", stopped)
    assert call("sample", tiny_folder(), tmp_path / "out") == 130
    assert "the same command continues" in capsys.readouterr().err


# ------------------------------------------------------------------------------- what wins


def caught(monkeypatch, name: str, *words: object):
    """The options that the command hands to its stage."""
    seen = []

    def stage(request):
        seen.append(request.options)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"prunedm.stages.verbs.{name}.{name}", stage)
    assert call(name, *words) == 130
    return seen[0]


def caught_recipe(monkeypatch, *words: object) -> Recipe:
    seen = []

    def run(recipe, *_, **__):
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "run_recipe", run)
    assert call("run", *words) == 130
    return seen[0]


@pytest.mark.parametrize(
    "words", [["--batch-size", "7"], ["--batch_size", "7"], ["--batch-size=7"]]
)
def test_hyphen_and_underscore_are_the_same(words, monkeypatch):
    assert caught(monkeypatch, "learn", "digits", "out", *words).batch_size == 7


@pytest.mark.parametrize("key", ["batch-size", "batch_size"])
def test_hyphen_and_underscore_are_the_same_in_yaml(key, monkeypatch, tmp_path):
    config = write(tmp_path / "a.yaml", {"learn": {key: 7}, "convert-channels": True})
    recipe = caught_recipe(monkeypatch, "out", "--config", config, "--stages", "learn")
    assert recipe.stage_options("learn").batch_size == 7
    assert recipe.convert_channels is True


def test_defaults_then_file_then_command_line(monkeypatch, tmp_path):
    config = write(tmp_path / "a.yaml", {"steps": 5, "lr": 0.5})
    words = ["digits", "out", "--config", config, "--steps", "9", "--flip"]
    options = caught(monkeypatch, "finetune", *words)
    assert options == FinetuneOptions(steps=9, lr=0.5, flip=True)


def test_the_command_line_wins_even_with_the_default_value(monkeypatch, tmp_path):
    default = LearnOptions().steps
    config = write(tmp_path / "a.yaml", {"steps": 5})
    words = ["digits", "out", "--config", config, "--steps", default]
    assert caught(monkeypatch, "learn", *words).steps == default


def test_nested_options_merge_one_by_one(monkeypatch, tmp_path):
    table = {"learn": {"steps": 5, "lr": 0.5}, "seed": 3, "mask": {"pattern": "1:4"}}
    config = write(tmp_path / "a.yaml", table)
    words = ["out", "--config", config, "--learn.steps", "3", "--finetune.lr", "0.1"]
    words += ["--set", "stages=[mask, learn, finetune]"]
    recipe = caught_recipe(monkeypatch, *words)
    learn = recipe.stage_options("learn")
    assert (learn.steps, learn.lr, recipe.seed) == (3, 0.5, 3)
    assert recipe.stage_options("mask").pattern == "1:4"
    assert recipe.stage_options("finetune").lr == 0.1


def test_a_stage_keeps_the_recipes_defaults_for_what_is_not_said(monkeypatch, tmp_path):
    config = write(tmp_path / "a.yaml", {"mask": {"pattern": "1:4"}, "recover": {"lr": 0.1}})
    recipe = caught_recipe(monkeypatch, "out", "--config", config, "--finetune.distill", "0.5")
    plain = Recipe()
    mask, recover = recipe.stage_options("mask"), recipe.stage_options("recover")
    assert (mask.mechanism, mask.pattern) == ("obs-nm", "1:4")
    assert (recover.steps, recover.lr) == (plain.stage_options("recover").steps, 0.1)
    tuned = recipe.stage_options("finetune")
    assert (tuned.steps, tuned.distill) == (plain.stage_options("finetune").steps, 0.5)
    assert plain.stage_options("mask").mechanism == "obs-nm"


def test_shared_options_reach_every_stage_that_has_none_of_its_own():
    stages = [{"prune": {}}, {"finetune": None}, {"learn": LearnOptions(seed=9)}]
    recipe = Recipe(seed=4, device="cpu", flip=True, stages=stages)
    found = [recipe.stage_options(name) for name in ("prune", "finetune", "learn")]
    assert [options.seed for options in (*found, recipe.evaluation())] == [4, 4, 9, 4]
    assert {options.flip for options in (*found, recipe.evaluation())} == {True}
    assert {options.device for options in found} == {"cpu"}
    assert isinstance(found[0], PruneOptions)


def test_the_preset_lies_below_file_and_command_line(monkeypatch, tmp_path):
    preset = merged(TrainOptions, preset_file("train", "digits"))
    assert preset.unet["sample_size"] == 16
    config = write(tmp_path / "a.yaml", {"batch_size": 5, "unet": {"norm_num_groups": 4}})
    words = ["out", "--preset", "digits", "--config", config, "--steps", "7"]
    options = caught(monkeypatch, "train", *words)
    assert (options.steps, options.batch_size, options.lr) == (7, 5, preset.lr)
    assert options.unet == preset.unet | {"norm_num_groups": 4}


def test_models_of_one_name_get_labels_that_differ():
    assert verbs._labels(["a/x", "b/y"]) == {"x": "a/x", "y": "b/y"}
    assert verbs._labels(["a/x", "b/x"]) == {"a-x": "a/x", "b-x": "b/x"}


# ------------------------------------------------------------------------ whole processes


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from prunedm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'datasets', 'sklearn', 'matplotlib', 'scipy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done, spent = processor_seconds(code)
    _, needed = processor_seconds("import cyclopts, pydantic, rich.table, psutil, yaml")
    assert done.returncode == 0, done.stderr
    for command in ("run", "train", "prune", "learn", "finetune", "sample", "evaluate", "compare"):
        assert command in done.stdout
    for command in ("analyze", "loss", "masks"):
        assert command in done.stdout
    assert spent < 5 * needed  # 2.2 on a quiet machine, 3.5 on a busy one


def processor_seconds(code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# the hub is asked first, for one process imports all that either needs
WHOLE = """
import runpy, sys
from prunedm import load
try: load("someone/nothing")
except ValueError as error: print(error)
sys.stdout.flush()
runpy.run_module("prunedm", run_name="__main__", alter_sys=True)
"""


def test_the_error_line_is_all_that_a_process_writes_to_stderr_and_a_hub_is_asked_once(tmp_path):
    words, expected = truncated_weights(tmp_path)
    own = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", WHOLE, *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in expected)
    assert done.stdout.count("\n") == 1
    assert "cannot get model 'someone/nothing': no such folder, and the hub says" in done.stdout


RECIPE = {
    "device": "cpu",
    "seed": 1,
    "prune": {"pictures": 2, "calibration-problems": 8},
    "recover": {"steps": 3, "batch_size": 4, "validation_problems": 4},
    "stages": ["prune", "recover", "mask", "learn", "finetune"],
    "mask": {"calibration_problems": 8, "pictures": 0},
    "learn": {"steps": 3, "batch_size": 4, "validation_problems": 4},
    "finetune": {"steps": 3, "batch_size": 4, "validation_problems": 4},
    "evaluate": {
        "depth": "quick", "problems": 8, "samples": 0, "latency_batch": 1, "latency_repeats": 1
    },
}  # fmt: skip
FOLDERS = ["1-prune", "2-recover", "3-mask", "4-learn", "5-finetune"]


def test_a_whole_run_and_again(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["run", out, "--model", tiny_folder(), "--config", write(tmp_path / "r.yaml", RECIPE)]
    assert call(*words, "--learn.steps", "2") == 0
    told = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [*FOLDERS, "report"]
    report = (out / "report" / "report.html").read_text()
    for name in FOLDERS:
        assert f"{name}: loss" in told
        assert name in report
    assert str(out / "report" / "report.html") in told.replace("\n", "")
    final = load(out / "5-finetune")
    assert str(final.masks.pattern) == "2:4"
    assert [r.stage for r in final.record.lineage()] == [
        "prune", "finetune", "prune", "learn", "finetune"
    ]  # fmt: skip
    assert read_record(out / "4-learn").options["steps"] == 2
    assert {r.seed for r in final.record.lineage()} == {1}

    before = files(tmp_path)
    assert call(*words, "--learn.steps", "2") == 0
    told = capsys.readouterr().out
    assert told.count("done already") == 6  # the report too
    assert files(tmp_path) == before

    shutil.rmtree(out / "5-finetune")
    shutil.rmtree(out / "report")
    assert call(*words, "--learn.steps", "2") == 0
    assert capsys.readouterr().out.count("done already") == 4
    assert files(out / "4-learn") == {
        name.removeprefix("out/4-learn/"): stamp
        for name, stamp in before.items()
        if name.startswith("out/4-learn/")
    }
    assert load(out / "5-finetune").hash == final.hash  # the same seed, the same bits

    assert call(*words, "--learn.steps", "3") == 0
    told = capsys.readouterr().out.replace("\n", " ")
    assert told.count("done already") == 3
    assert "4-learn: made again, for it held another steps (2, now 3)" in told
    assert "5-finetune: made again, for it held another model (its content has changed)" in told
    assert read_record(out / "4-learn").options["steps"] == 3


def test_a_run_without_some_stages(tmp_path):
    out = tmp_path / "out"
    words = ["run", out, "--model", tiny_folder(), "--config", write(tmp_path / "r.yaml", RECIPE)]
    assert call(*words, "--stages", "learn", "--stages", "prune") == 0
    assert sorted(p.name for p in out.iterdir()) == ["1-prune", "2-learn", "report"]


def test_what_a_run_needs_at_its_end_is_looked_for_at_its_start(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["run", out, "--model", tiny_folder(), "--config", write(tmp_path / "r.yaml", RECIPE)]
    words += ["--evaluate.depth", "full", "--evaluate.samples", "9"]
    assert call(*words, "--evaluate.features", "/no/net.pt") == 2
    assert "'/no/net.pt'" in capsys.readouterr().err
    assert call(*words, "--evaluate.skip-fid", "--evaluate.sampler", "dimm") == 2
    assert "'dimm'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    table = RECIPE | {"recover": RECIPE["recover"] | {"steps": 60, "checkpoint_every": 5}}
    config = write(tmp_path / "r.yaml", table)
    words = ["--model", tiny_folder(), "--config", config]
    assert call("run", tmp_path / "whole", *words) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "prunedm", "run", str(out), *map(str, words)]
    checkpoint = out / "2-recover.partial" / "resume" / "checkpoint.safetensors"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9
    assert checkpoint.exists()
    assert not (out / "2-recover").exists()
    assert call("run", out, *words) == 0
    for name in FOLDERS:
        assert load(out / name).hash == load(tmp_path / "whole" / name).hash
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
def test_python_dash_m_is_the_command(tmp_path):
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "prunedm", "--version"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == "0.1.0"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune", "digitz", "out"], "did you mean 'digits'?"),
        (["finetune", "digits", "out", "--dataset", "digitz"], "unknown dataset 'digitz'"),
        (["compare", "digits", "notes.txt", "--out", "out"], "no model at 'notes.txt'"),
        (["run", "--set", "dataset=imgs.zip"], "unknown dataset 'imgs.zip'"),
    ],
)
def test_names_of_nothing_are_refused_before_pytorch_is_imported(
    words, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prunedm.folder")
    assert call(*words) == 2
    assert expected in capsys.readouterr().err
    assert "prunedm.folder" not in sys.modules


def test_a_terminal_of_ascii_gets_every_line(tmp_path, monkeypatch):
    """The work was done, and then "±" could not be written."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    words = ["loss", str(tiny_folder()), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--problems", "4", "--convert-channels"])
    assert not end.value.code
    sys.stdout.flush()
    assert b" ? " in written.getvalue()
