"""Presets of learn: the old documents' numbers, what wins, what they cost, and how they are shown."""

import math

import pytest
import yaml
from diffusers import UNet2DModel
from helpers import tiny_folder
from rich.console import Console

from prunedm import preset_table
from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.learning import ESTIMATORS
from prunedm.options import LearnOptions
from prunedm.options.presets import PRESETS, network_passes, with_preset
from prunedm.preset_table import (
    StepSeconds,
    StepTiming,
    duration,
    expected_seconds,
    print_table,
    read_timings,
    yaml_text,
)
from prunedm.record import read_record
from prunedm.stages import learn

CLASSIC = "policy-gradient-classic"
# the table of the old scripts' guide: problems, batch, lr, logits, hours on their GPU
OLD = {
    "quick": (5_000, 16, 0.5, 3.0, "30 min"),
    "standard": (20_000, 64, 1.0, 5.0, "2 h"),
    "best": (50_000, 32, 2.0, 7.0, "6 h"),
    "efficient": (25_000, 128, 1.5, 6.0, "3 h"),
    "fine": (30_000, 32, 0.8, 10.0, "8 h"),
}


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def caught(monkeypatch, *words: object) -> LearnOptions:
    """The options that `prunedm learn` hands to its stage."""
    seen = []

    def stage(request):
        seen.append(request.options)
        raise KeyboardInterrupt

    monkeypatch.setattr("prunedm.stages.verbs.learn.learn", stage)
    assert call("learn", "digits", "out", *words) == 130
    return seen[0]


def test_the_numbers_are_the_old_documents():
    found = {}
    for name, preset in PRESETS.items():
        options = with_preset(LearnOptions(estimator=CLASSIC), name).filled()
        sizes = (options.dataset_size, options.batch_size, options.lr, options.logits)
        found[name] = (*sizes, preset.old_time)
    assert found == OLD
    assert with_preset(LearnOptions(estimator=CLASSIC), "standard").steps == 15_000
    assert [preset.config for preset in PRESETS.values()] == [f"config {k}" for k in range(1, 6)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_with_every_estimator(name, estimator):
    preset = PRESETS[name]
    given = LearnOptions(estimator=estimator, train_weights=estimator == "sr-ste")
    options = with_preset(given, name).filled()
    assert options.estimator == estimator
    assert (options.dataset_size, options.batch_size) == OLD[name][:2]
    if estimator == CLASSIC:
        assert options.steps == preset.masks
        return
    assert options.lr == ESTIMATORS[estimator].lr
    assert options.logits == ESTIMATORS[estimator].logits
    if estimator == "policy-gradient":
        assert options.steps * options.policy_gradient.samples == preset.masks
    else:
        seen = options.steps * options.batch_size
        assert preset.passes * options.dataset_size <= seen
        assert seen < preset.passes * (options.dataset_size + options.batch_size)


def test_longer_presets_see_more():
    """In the order of the times that the old documents expected."""
    seen = {name: network_passes(with_preset(LearnOptions(), name)).seen for name in PRESETS}
    assert sorted(seen, key=seen.__getitem__) == ["quick", "standard", "efficient", "best", "fine"]


def test_defaults_then_preset_then_file_then_command_line(monkeypatch, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump({"batch_size": 5, "steps": 6, "estimator": CLASSIC}))
    words = ["--preset", "standard", "--config", config, "--steps", "7"]
    options = caught(monkeypatch, *words)
    assert (options.steps, options.batch_size, options.dataset_size) == (7, 5, 20_000)
    assert (options.lr, options.logits, options.seed) == (1.0, 5.0, 0)
    options = caught(monkeypatch, *words, "--estimator", "relaxed", "--logits", "2")
    assert (options.filled().lr, options.logits) == (0.3, 2.0)


def test_the_command_line_wins_even_with_the_default_value(monkeypatch):
    default = LearnOptions().batch_size
    options = caught(monkeypatch, "--preset", "quick", "--batch-size", default)
    assert options.batch_size == default != PRESETS["quick"].batch_size


def test_what_a_preset_does_not_set_is_not_taken_for_given():
    """A pattern that was not asked for must not contradict the masks of a model."""
    assert "pattern" not in with_preset(LearnOptions(), "best").model_fields_set


def test_an_unknown_preset_names_the_nearest(capsys):
    with pytest.raises(UserError, match="no preset 'fien' of learn; did you mean 'fine'"):
        with_preset(LearnOptions(), "fien")
    assert call("presets", "standrad") == 2
    told = capsys.readouterr().err
    assert told == "prunedm: no preset 'standrad' of learn; did you mean 'standard'?\n"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", PRESETS)
def test_the_yaml_of_a_preset_is_the_preset(name, estimator, tmp_path, monkeypatch, capsys):
    given = LearnOptions(estimator=estimator, train_weights=estimator == "sr-ste")
    preset = with_preset(given, name).filled()
    assert call("presets", name, "--estimator", estimator) == 0
    text = capsys.readouterr().out
    config = tmp_path / "a.yaml"
    config.write_text(text)
    assert caught(monkeypatch, "--config", config) == preset
    # with the comments taken away it holds every option, and says the same
    lines = [line.removeprefix("# ") for line in text.splitlines()[1:]]
    full = yaml.safe_load("\n".join(line for line in lines if line != "at their defaults:"))
    assert full.keys() == LearnOptions.model_fields.keys()
    assert LearnOptions.model_validate(full) == preset


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_preset_whole(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert call("presets") == 0
    told = capsys.readouterr().out
    assert all(len(line.rstrip()) <= width for line in told.splitlines())
    rows = {line[:20].strip(): line[20:].split() for line in told.splitlines()}
    head = next(line for line in told.splitlines() if "quick" in line)
    assert head.split() == list(PRESETS)
    assert rows["problems"] == [f"{old[0]:,}" for old in OLD.values()]
    assert rows["batch size"] == [str(old[1]) for old in OLD.values()]
    assert "…" not in told
    for _, _, lr, logits, hours in OLD.values():
        assert f"{lr:g}, {logits:g}" in told
        assert f"~{hours}" in told


def test_the_packaged_times_cover_what_is_shown():
    timings = read_timings()
    assert {"digits", "cifar10-small"} <= {timing.model for timing in timings}
    for timing in timings:
        assert timing.device
        assert "benchmarks/presets.py" in timing.command
        for name in PRESETS:
            for estimator in preset_table.SHOWN:
                options = with_preset(LearnOptions(estimator=estimator), name)
                seconds = expected_seconds(options, timing)
                assert seconds is not None
                assert seconds > 0


TIMING = StepTiming(
    model="m", parameters=1, kind="CPU", device="d", created="2026-01-01", command="c",
    problems=100, validation_s=2.0, step_s={"relaxed": {10: StepSeconds(new=3.0, known=1.0)}},
)  # fmt: skip


def test_expected_time_is_new_steps_known_steps_and_looks():
    options = LearnOptions(
        dataset_size=35, batch_size=10, steps=9, validate_every=4, validation_problems=50
    )
    # 4 batches hold 35 problems; held out: the dense model, first and kept masks, steps 4, 8 and 9
    assert expected_seconds(options, TIMING) == 4 * 3.0 + 5 * 1.0 + 6 * 1.0
    assert expected_seconds(options.model_copy(update={"batch_size": 20}), TIMING) is None
    assert [duration(s) for s in (45, 100, 5_500)] == ["45 s", "2 min", "1.5 h"]


def test_a_machine_that_was_not_timed_is_said_so(monkeypatch, capsys):
    monkeypatch.setattr(preset_table, "read_timings", lambda: [TIMING])
    print_table(Console(width=80))
    told = capsys.readouterr().out
    assert "GPU: not measured yet" in told
    assert "CPU: not measured yet" not in told


@pytest.mark.parametrize("estimator", ["relaxed", "straight-through", "policy-gradient", CLASSIC])
def test_the_cost_is_what_the_network_does(estimator, tmp_path, monkeypatch):
    counted = {"all": 0, "with gradient": 0}
    counted_forward(monkeypatch, counted)
    options = LearnOptions(
        estimator=estimator, steps=5, dataset_size=6, batch_size=3, samples=4,
        validation_problems=2, validate_every=100, checkpoint_every=0, device="cpu",
    )  # fmt: skip
    learn(tiny_folder(), tmp_path / "out", options)
    passes = network_passes(options)
    assert passes.seen == 15
    # held out: the dense model, first masks, last step, and the masks that are kept
    assert counted == {"all": passes.forward + 4 * 2, "with gradient": passes.backward}


def counted_forward(monkeypatch, counted: dict[str, int]) -> None:
    """Count the images that go through any denoiser, and those whose output has a gradient."""
    original = UNet2DModel.forward

    def forward(self, sample, *arguments, **named):
        output = original(self, sample, *arguments, **named)
        if sample.device.type == "meta":  # a look at the shapes
            return output
        image = output[0] if isinstance(output, tuple) else output.sample
        counted["all"] += len(sample)
        counted["with gradient"] += len(sample) * image.requires_grad
        return output

    monkeypatch.setattr(UNet2DModel, "forward", forward)


def test_a_run_with_a_preset_and_less_of_it(tmp_path, capsys):
    words = ["learn", tiny_folder(), tmp_path / "out", "--preset", "quick", "--device", "cpu"]
    words += ["--validation-problems", "4"]
    assert call(*words, "--steps", "2", "--dataset-size", "8") == 0
    assert "loss" in capsys.readouterr().out
    record = read_record(tmp_path / "out")
    options = record.options
    shown = {key: options[key] for key in ("steps", "dataset_size", "batch_size", "lr", "logits")}
    assert shown == {"steps": 2, "dataset_size": 8, "batch_size": 16, "lr": 0.3, "logits": 1.0}
    assert math.isfinite(record.figures["loss"])


def test_yaml_text_refuses_what_is_no_preset():
    with pytest.raises(UserError, match="no preset"):
        yaml_text("config2", "relaxed")


def test_a_grouped_option_wins_over_the_preset(monkeypatch):
    given = LearnOptions(estimator="policy-gradient", samples=4)
    assert with_preset(given, "quick").policy_gradient.samples == 4
    words = ["--estimator", "policy-gradient", "--preset", "quick", "--samples", "6"]
    assert caught(monkeypatch, *words).policy_gradient.samples == 6


def test_the_papers_preset_sets_its_estimator_unless_told_otherwise(monkeypatch, capsys):
    options = caught(monkeypatch, "--preset", "maskpro-llm")
    assert (options.estimator, options.distribution) == (CLASSIC, "plackett-luce")
    assert (options.lr, options.logits, options.steps, options.distill) == (50, 10, 10_000, 0)
    other = with_preset(LearnOptions(estimator="relaxed", lr=0.2), "maskpro-llm")
    assert (other.estimator, other.lr, other.steps) == ("relaxed", 0.2, 10_000)
    assert call("presets", "maskpro-llm") == 0
    assert "estimator: policy-gradient-classic" in capsys.readouterr().out
