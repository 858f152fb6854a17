"""Recipes: what is done is skipped, what changed is made again, and a dry run makes nothing."""

import shutil
from pathlib import Path

import pytest
import yaml
from helpers import Killed, tiny_folder

from prunedm import recipe as recipes
from prunedm.cli import app, main
from prunedm.configuration import parse_settings, read_options
from prunedm.errors import UserError
from prunedm.options import DataOptions, EvaluateOptions, FinetuneOptions, PruneOptions
from prunedm.recipe import Recipe, plan, run
from prunedm.recipe_draft import Draft
from prunedm.record import read_record
from prunedm.training import loop

QUICK = EvaluateOptions(depth="quick", problems=8, latency_repeats=1)
TUNE = {"batch_size": 4, "validation_problems": 8, "validate_every": 0, "checkpoint_every": 2}


MASK = PruneOptions(mechanism="nm", score="magnitude", pictures=0, calibration_problems=8)


def tiny_recipe(*, mask=MASK, finetune=FinetuneOptions(steps=4, **TUNE), **more) -> Recipe:
    settings = {
        "model": str(tiny_folder()),
        "convert_channels": True,
        "device": "cpu",
        "stages": [{"prune": mask, "name": "mask"}, {"finetune": finetune}],
        "evaluate": QUICK,
    }
    return Recipe(**(settings | more))


class Lines:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        from prunedm.progress import Silent

        self.task, self.said = Silent().task, []

    def say(self, text: str) -> None:
        self.said.append(text)


def todo_of(recipe: Recipe, out: Path) -> list[tuple[str, str]]:
    return [(stage.name, stage.todo) for stage in plan(recipe, out)]


def times(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*/record.json")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(tiny_recipe(), out)
    return out


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy of a finished run, for a test to change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_a_dry_run_of_a_new_recipe_makes_nothing(tmp_path):
    out = tmp_path / "out"
    assert todo_of(tiny_recipe(), out) == [
        ("mask", "to do"),
        ("finetune", "after 1-mask"),
        ("report", "after 1-mask"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_recipe_is_done_and_is_not_touched(out):
    assert todo_of(tiny_recipe(), out) == [("mask", ""), ("finetune", ""), ("report", "")]
    before = times(out)
    lines = Lines()
    run(tiny_recipe(), out, progress=lines)
    assert times(out) == before
    assert [line for line in lines.said if "done already" in line] == lines.said


def test_what_changed_and_what_follows_is_made_again(out):
    changed = tiny_recipe(finetune=FinetuneOptions(steps=3, **TUNE))
    before = times(out)
    (_, mask), (_, tune), _ = todo_of(changed, out)
    assert mask == ""
    assert tune == "again: it is of another steps (4, now 3)"
    lines = Lines()
    run(changed, out, progress=lines)
    after = times(out)
    assert after["1-mask"] == before["1-mask"]
    assert after["2-finetune"] != before["2-finetune"]
    assert after["report"] != before["report"]
    assert "2-finetune: made again, for it held another steps (4, now 3)" in lines.said
    assert todo_of(changed, out) == [("mask", ""), ("finetune", ""), ("report", "")]


def test_a_changed_input_changes_what_follows(out):
    """A stage's identity holds its input's content: other masks, and the fine-tuning is another."""
    changed = tiny_recipe(
        mask=PruneOptions(mechanism="nm", score="random", pictures=0, calibration_problems=8)
    )
    (_, mask), (_, tune), _ = todo_of(changed, out)
    assert mask.startswith("again: it is of another score")
    assert tune == "after 1-mask"
    before = times(out)
    run(changed, out)
    assert all(times(out)[name] != before[name] for name in before)


def test_an_interrupted_redo_goes_on(out, monkeypatch):
    """The redo was allowed to replace the old result; to go on with it needs no new permission."""
    changed = tiny_recipe(finetune=FinetuneOptions(steps=6, **TUNE))
    step = loop._step

    def killed(*arguments, **named):
        if named["step"] == 4:
            raise Killed
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(Killed):
        run(changed, out)
    monkeypatch.setattr(loop, "_step", step)
    assert todo_of(changed, out)[1] == ("finetune", "continues from its checkpoint")
    steps = []
    monkeypatch.setattr(
        loop, "_step", lambda *a, **named: steps.append(named["step"]) or step(*a, **named)
    )
    run(changed, out)
    assert steps == [4, 5]


def test_what_is_not_ours_is_never_replaced(out):
    (out / "2-finetune" / "record.json").unlink()
    with pytest.raises(UserError, match="holds no result of prunedm"):
        run(tiny_recipe(), out)
    with pytest.raises(UserError, match="holds no result of prunedm"):
        plan(tiny_recipe(), out)


# ------------------------------------------------------------------------------- lists of stages

LIST = [
    {"prune": {"target": "macs=0.5"}},
    {"finetune": {"steps": 200}},
    {"prune": {"mechanism": "obs-nm"}},
    {"finetune": {"steps": 100}},
    {"export": None},
]


def labelled(table: dict, *settings: dict) -> dict[str, object]:
    """The stages by label, with the options that were given."""
    draft = Draft.of(table)
    for more in settings:
        draft.set(more)
    return {step.label: step.options for step in recipes.steps_of(draft.recipe())}


def test_a_list_has_any_verb_any_number_of_times():
    steps = recipes.steps_of(Draft.of({"stages": LIST, "seed": 3}).recipe())
    assert [(step.label, step.folder, step.stage.verb) for step in steps] == [
        ("prune.1", "1-prune", "prune"),
        ("finetune.1", "2-finetune", "finetune"),
        ("prune.2", "3-prune", "prune"),
        ("finetune.2", "4-finetune", "finetune"),
        ("export", "5-export", "export"),
    ]
    assert {step.options.seed for step in steps} == {3}
    assert [step.options.steps for step in steps[1::2]] == [200, 100]


def test_the_default_recipe_has_its_names():
    assert [step.folder for step in recipes.steps_of(Recipe())] == [
        "1-prune", "2-recover", "3-mask", "4-finetune"
    ]  # fmt: skip
    assert Draft.of({}).recipe() == Recipe()


def test_settings_reach_a_stage_by_name_by_verb_and_by_number():
    assert labelled({"stages": LIST}, {"finetune": {"2": {"steps": 7}}})["finetune.2"].steps == 7
    assert labelled({"stages": LIST}, {"export": {"format": "onnx"}})["export"].format == "onnx"
    named = [{"prune": {}}, {"prune": {"mechanism": "nm"}, "name": "mask"}]
    found = labelled({"stages": named}, {"mask": {"pattern": "1:4"}}, {"prune": {"score": "wanda"}})
    assert (found["mask"].pattern, found["prune"].pattern) == ("1:4", "2:4")
    assert (found["mask"].score, found["prune"].score) == ("taylor", "wanda")
    only = [{"prune": {}, "name": "narrow"}]
    assert labelled({"stages": only}, {"prune": {"score": "wanda"}})["narrow"].score == "wanda"


def test_a_list_of_names_says_which_stages_run():
    assert list(labelled({"stages": LIST}, {"stages": ["export"]})) == ["export"]
    assert list(labelled({}, {"stages": ["learn", "mask"]})) == ["mask", "learn"]


def test_an_evaluate_stage_starts_from_what_the_report_has():
    table = {"stages": [{"evaluate": {"samples": 3}}], "evaluate": {"problems": 9}}
    found = labelled(table, {"evaluate": {"batch_size": 4}}, {"evaluate": {"1": {"seed": 8}}})
    options = found["evaluate"]
    assert (options.samples, options.problems, options.batch_size, options.seed) == (3, 9, 4, 8)
    assert options.sampling_steps == Recipe().evaluation().sampling_steps


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "the list is empty"),
        ([{"prnue": {}}], "no verb 'prnue'; did you mean 'prune'"),
        ([{"prune": {}, "finetune": {}}], "not one verb with options"),
        ([{}], "not one verb with options"),
        ([{"prune": {}}, "finetune"], r"write `- finetune: \{\}`"),
        ([{"prune": 3}], "give it a table of options"),
        ([{"prune": {}, "name": "../mine"}], "name = '../mine': string should match pattern"),
        ([{"prune": {}, "name": 3}, {"learn": None}], "name = '3': string should match pattern"),
        ([{"prune": {"patern": "2:4"}}], "unknown option 'prune.patern'; did you mean 'pattern'"),
        ([{"prune": {}}, {"prune": {"pattern": "4:2"}}], "prune.2.pattern = '4:2'"),
        ([{"prune": {}}, {"train": {}}], "2-train: train starts from nothing; put it first"),
        (
            [{"learn": {}}, {"finetune": {}}, {"prune": {}}],
            "3-prune: the model has masks from 1-learn",
        ),
        (
            [{"prune": {"mechanism": "nm"}}, {"prune": {}}],
            "2-prune: the model has masks from 1-prune",
        ),
        ("distil", "no 'distil'; there are prune, recover"),
        (3, "write a list of verbs"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(stages, message):
    with pytest.raises(UserError, match=message) as caught:
        labelled({"stages": stages})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetune": {"steps": 3}}, "which of 2. write finetune.1.steps or finetune.2.steps"),
        ({"finetune": {"3": {"steps": 3}}}, "finetune.3: there are 2 stages finetune"),
        ({"finetune": 3}, "finetune is a stage; set an option"),
        ({"fintune": {"steps": 3}}, "unknown option 'fintune'; did you mean 'finetune'"),
    ],
)
def test_a_setting_of_no_stage_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        labelled({"stages": LIST}, settings)


def test_fields_beside_a_list_are_refused():
    with pytest.raises(UserError, match="mask: the stages are a list, which has their options"):
        Draft.of({"stages": LIST, "mask": {"pattern": "1:4"}})


def test_the_old_form_reads_as_the_list_that_it_meant():
    table = {"stages": ["mask", "finetune"], "mask": {"pattern": "1:4"}, "seed": 3}
    draft = Draft.of(table)
    (line,) = draft.old_form("a.yaml")
    assert line == (
        "a.yaml: stages are a list now; this one is stages: [{prune: {mechanism: obs-nm, "
        "pattern: '1:4'}, name: mask}, {finetune: {steps: 350}}]"
    )
    now = Draft.of({"seed": 3} | yaml.safe_load("stages:" + line.partition(" stages:")[2]))
    assert now.recipe() == draft.recipe()
    assert now.old_form("a.yaml") == []
    assert Draft.of({"seed": 3}).old_form("a.yaml") == []


def test_leaves_are_made_and_the_next_stage_goes_on_from_the_last_model(tmp_path):
    stages = [
        {"prune": MASK},
        {"loss": {"problems": 4}},
        {"finetune": FinetuneOptions(steps=2, **TUNE)},
        {"export": {}},
    ]
    recipe, out = tiny_recipe(stages=stages), tmp_path / "out"
    run(recipe, out)
    records = {
        folder.parent.name: read_record(folder.parent) for folder in out.glob("*/record.json")
    }
    assert sorted(records) == ["1-prune", "2-loss", "3-finetune", "4-export", "report"]
    assert records["3-finetune"].inputs["model"].path == str((out / "1-prune").resolve())
    assert list(records["report"].figures["models"]) == ["dense", "1-prune", "3-finetune"]
    assert all(todo == "" for _, todo in todo_of(recipe, out))
    shutil.rmtree(out / "2-loss")
    assert [todo for _, todo in todo_of(recipe, out)] == ["", "to do", "", "", ""]


def test_options_of_a_stage_that_is_not_run_are_told():
    draft = Draft.of({"stages": ["mask", "finetune"], "learn": {"steps": 3}})
    assert draft.unused() == ["learn: given options, but not among the stages (mask, finetune)"]
    assert Draft.of({}).unused() == []


# --------------------------------------------------------------------------- files and settings


def test_yaml_values_are_those_of_yaml_1_2(tmp_path):
    """PyYAML reads YAML 1.1, in which 1:4 is 64, `no` is false and 1e-3 is a text."""
    text = "a: 1:4\nb: no\nc: 1e-3\nd: [1, 2.5, true]\ne:\nf: 2026-01-01\ng: -3\nh: off\ni-j: 012\n"
    (tmp_path / "a.yaml").write_text(text)
    values = read_options(tmp_path / "a.yaml")
    assert values == {
        "a": "1:4", "b": "no", "c": 0.001, "d": [1, 2.5, True], "e": None, "f": "2026-01-01",
        "g": -3, "h": "off", "i_j": 12,
    }  # fmt: skip
    assert isinstance(values["c"], float)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "a: !!python/name:os"]
)
def test_yaml_makes_no_objects(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot read"):
        read_options(tmp_path / "a.yaml")


def test_settings_become_tables():
    texts = ["learn.pattern=1:4", "learn.lr=1e-3", "prune.target=channels=0.3", "stages=[mask]"]
    assert parse_settings(texts) == {
        "learn": {"pattern": "1:4", "lr": 0.001},
        "prune": {"target": "channels=0.3"},
        "stages": ["mask"],
    }


@pytest.mark.parametrize("text", ["learn.pattern", "=3", "  =3"])
def test_a_setting_needs_a_name_and_a_value(text):
    with pytest.raises(UserError, match="sets nothing; give NAME=VALUE"):
        parse_settings([text])


def parsed(monkeypatch, *words: object) -> tuple[Recipe, Path]:
    seen = []
    monkeypatch.setattr(
        "prunedm.cli.run.run_recipe", lambda recipe, out, **_: seen.append((recipe, out))
    )
    monkeypatch.setattr("prunedm.console.comparison_tables", lambda folder: None)
    app(["run", *map(str, words)], exit_on_error=False, result_action="return_value")
    return seen[0]


def test_file_then_settings_then_command_line(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [{learn: {pattern: 1:8, steps: 7, lr: 0.5}}]\nseed: 3\n")
    settings = ["--set", "learn.pattern=1:4", "--set", "learn.steps=8"]
    recipe, out = parsed(monkeypatch, file, *settings, "--learn.steps", 9)
    learn = recipe.stage_options("learn")
    assert (learn.pattern, learn.steps, learn.lr) == ("1:4", 9, 0.5)
    assert recipe.seed == 3
    assert out == Path("runs/mine")


def test_the_folder_is_what_is_no_yaml_file(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\n")
    assert parsed(monkeypatch, file, "there")[1] == Path("there")
    recipe, out = parsed(monkeypatch, "there")
    assert (recipe.seed, out) == (0, Path("there"))
    recipe, out = parsed(monkeypatch, "there", "--config", file)
    assert (recipe.seed, out) == (3, Path("there"))
    assert parsed(monkeypatch)[1] == Path("runs/digits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.yaml", "b.yaml"], "one recipe and one folder"),
        (["a", "b"], "one recipe and one folder"),
        (["gone.yaml"], "gone.yaml: it is missing"),
        (["--set", "learn.paternn=1:4"], "did you mean 'pattern'"),
        (["--set", "learn.pattern=3:2"], "is not an N:M"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["run", *words])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_dry_run_shows_stage_folder_and_state(out, capsys, monkeypatch):
    monkeypatch.setattr("prunedm.console.console.width", 200)
    draft = Draft.of(dict(tiny_recipe()))
    monkeypatch.setattr("prunedm.cli.run.read_draft", lambda *_: draft)
    app(["run", str(out), "--dry-run"], exit_on_error=False, result_action="return_value")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mask", str(out / "1-mask"), "done"] in lines
    assert sum(line[-1:] == ["done"] for line in lines) == 3


def test_the_published_schemas_are_those_of_the_code(capsys):
    import json

    folder = Path(__file__).parent.parent / "docs" / "schemas"
    for kind in ("recipe", "sweep"):
        app(["schema", kind], exit_on_error=False, result_action="return_value")
        made = json.loads(capsys.readouterr().out)
        assert json.loads((folder / f"{kind}.schema.json").read_text(encoding="utf-8")) == made
        assert "properties" in made


def test_everything_that_is_said_of_data_is_said_once_for_all_stages():
    given = {
        "dataset": "images/", "label_column": "a", "caption_column": "b", "image_column": "c",
        "text_column": "d", "length": 32, "flip": True, "convert_channels": True, "seed": 3,
        "device": "cpu",
    }  # fmt: skip
    assert given.keys() == DataOptions.model_fields.keys()
    recipe = Recipe(stages=[{"prune": {}}, {"finetune": {"caption_column": "own"}}], **given)
    prune, finetune = (recipe.stage_options(name) for name in ("prune", "finetune"))
    assert {name: getattr(prune, name) for name in given} == given
    assert finetune.caption_column == "own"
    assert recipe.evaluation().caption_column == "b"
