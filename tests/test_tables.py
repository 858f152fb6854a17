"""Tables of methods, and options by method: one file and one line add one, and nothing hides it."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from helpers import tiny_folder

from prunedm.cli.parameters import options_of, sections_of
from prunedm.cli.verbs import stage_command
from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.options import ExportOptions, FinetuneOptions, LearnOptions, PruneOptions
from prunedm.record import read_record
from prunedm.scores.score import Score
from prunedm.stages import STAGES, export, finetune, prune
from prunedm.stages.exporting.job import Format, Written
from prunedm.tables import ESTIMATORS, FORMATS, MECHANISMS, SCORES, TRACKERS, Table
from prunedm.training.services import Service


@pytest.mark.parametrize("table", [SCORES, MECHANISMS, ESTIMATORS, FORMATS, TRACKERS], ids="+".join)
def test_every_line_names_an_object(table):
    for name in table:
        assert table[name] is table[name]
    assert "gone" not in table
    with pytest.raises(KeyError):
        table["gone"]


def add(monkeypatch, table: Table, name: str, value: object) -> None:
    """One file and one line."""
    module = ModuleType("toy_methods")
    module.TOY = value
    monkeypatch.setitem(sys.modules, "toy_methods", module)
    monkeypatch.setitem(table.places, name, "toy_methods:TOY")


def test_a_score_is_one_file_and_one_line(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"Input should be 'random'.* or 'fluctuation'"):
        PruneOptions(score="smallest")
    add(monkeypatch, SCORES, "smallest", Score(lambda weight, _: 1 / (1 + weight.abs())))
    options = PruneOptions(mechanism="nm", score="smallest", pictures=0, convert_channels=True)
    prune(tiny_folder(), tmp_path / "out", options)
    dense, masked = load(tiny_folder()).denoiser, load(tmp_path / "out")
    name, mask = next(iter(masked.masks))
    weight_G4 = dense.get_parameter(f"{name}.weight").abs().movedim(1, -1).reshape(-1, 4)
    kept_G4 = mask.movedim(1, -1).reshape(-1, 4)
    assert torch.equal(kept_G4.sum(1), torch.full((len(kept_G4),), 2))
    largest_kept = torch.where(kept_G4, weight_G4, 0).amax(1)
    smallest_removed = torch.where(kept_G4, torch.inf, weight_G4).amin(1)
    assert bool((largest_kept <= smallest_removed).all())


def test_a_format_is_one_file_and_one_line(monkeypatch, tmp_path):
    def write(job) -> Written:
        (job.folder / "model.txt").write_text(str(job.options.precision))
        return Written(["model.txt"], job.shapes(), 0.0, 0.0)

    add(monkeypatch, FORMATS, "text", Format(("fp16", "fp32"), write))
    with pytest.raises(ValueError, match="text takes no int8; there are fp16, fp32"):
        ExportOptions(format="text", precision="int8")
    export(tiny_folder(), tmp_path / "out", ExportOptions(format="text"))
    assert (tmp_path / "out" / "model.txt").read_text() == "fp16"
    assert read_record(tmp_path / "out").options["format"] == "text"


def test_a_tracker_is_one_file_and_one_line(monkeypatch, tmp_path):
    class Memory(Service):
        name = "memory"
        logged: ClassVar[list] = []

        def check_usable(self, options):
            pass

        def settings(self, options, *, folder, run, done):
            return {"title": folder.name}

        def start(self, options, settings):
            return SimpleNamespace(
                log=lambda figures, step: self.logged.append((step, sorted(figures))),
                store_init_configuration=lambda options: None,
                finish=lambda: self.logged.append(settings["title"]),
            )

    with pytest.raises(ValueError, match=r"Input should be 'none'.* or 'swanlab'"):
        FinetuneOptions(tracker="memory")
    add(monkeypatch, TRACKERS, "memory", Memory())
    options = FinetuneOptions(
        steps=1, tracker="memory", track_images=0, batch_size=2, validation_problems=2
    )
    finetune(tiny_folder(), tmp_path / "out", options)
    assert Memory.logged == [(1, ["loss", "lr"]), (1, ["held_out_loss"]), "out.partial"]


# ----------------------------------------------------------------------------- options by method


@pytest.mark.parametrize(
    ("kind", "flat", "nested"),
    [
        (PruneOptions, {"obs_damping": 0.5, "over_time": "max"},
         {"obs": {"damping": 0.5}, "wanda": {"over_time": "max"}}),
        (PruneOptions, {"candidates": ("2:4",)}, {"sensitivity": {"candidates": ["2:4"]}}),
        (LearnOptions, {"samples": 4, "tau": (1.0, 0.5)},
         {"policy_gradient": {"samples": 4}, "relaxed": {"tau": [1.0, 0.5]}}),
        (FinetuneOptions, {"sensitivity_every": 2}, {"sensitivity": {"every": 2}}),
    ],
)  # fmt: skip
def test_flat_names_are_those_of_groups(kind, flat, nested):
    options = kind(**nested)
    assert kind(**flat) == options
    assert {name: options.flat()[name] for name in flat} == json.loads(json.dumps(flat))
    assert kind.model_validate(options.flat()) == kind.model_validate(options.model_dump())
    assert kind(**flat).model_dump(exclude_unset=True) == options.model_dump(exclude_unset=True)


def test_a_flat_name_and_its_group_are_put_together():
    options = PruneOptions(obs={"swaps": 1, "damping": 0.1}, obs_damping=0.5)
    assert (options.obs.swaps, options.obs.damping) == (1, 0.5)
    with pytest.raises(ValueError, match=r"obs\n"):
        PruneOptions(obs=3, obs_damping=0.5)


def test_a_record_names_options_as_before():
    """So that folders of before the groups are known as done."""
    names = PruneOptions().identity()
    assert {"obs_damping", "obs_time_weights", "candidates", "sensitivity_problems"} <= names.keys()
    assert {"round_to", "over_time", "sweep_images", "reduction"} <= names.keys()
    assert not {"obs", "wanda", "channels", "device"} & names.keys()
    assert {"tau", "samples", "explore", "sr_ste_decay"} <= LearnOptions().identity().keys()


def test_a_folder_of_before_the_groups_is_done(tmp_path):
    options = PruneOptions(mechanism="nm", score="magnitude", pictures=0, convert_channels=True)
    prune(tiny_folder(), tmp_path / "out", options)
    file = tmp_path / "out" / "record.json"
    record = json.loads(file.read_text())
    assert record["options"]["obs_swaps"] == 15
    del record["options"]["obs_swaps"]  # and of before the option
    file.write_text(json.dumps(record))
    assert prune(tiny_folder(), tmp_path / "out", options)[1] is False
    other = PruneOptions(**options.model_dump(exclude_unset=True), obs_swaps=3)
    with pytest.raises(UserError, match=r"another obs_swaps \(15, now 3\)"):
        prune(tiny_folder(), tmp_path / "out", other)


@pytest.mark.parametrize("verb", STAGES)
def test_flags_of_a_verb_are_its_own(verb):
    names = [
        name
        for option in options_of(STAGES[verb].options)
        for name in option.annotation.__metadata__[0].name
    ]
    assert len(names) == len(set(names))


def test_short_names_of_grouped_options_are_flags_too():
    (found,) = [o for o in options_of(PruneOptions) if o.name == "obs_damping"]
    assert found.annotation.__metadata__[0].name == ("--obs-damping", "--damping")


@pytest.mark.parametrize("verb", STAGES)
def test_the_help_of_a_verb_is_short_and_names_the_rest(verb):
    kind = STAGES[verb].options
    shown = [o for o in options_of(kind) if o.annotation.__metadata__[0].show]
    assert len(shown) + len(("--preset", "--config", "--overwrite")) < 25
    text = stage_command(STAGES[verb]).__doc__
    assert all(section in text for section in sections_of(kind))
    every = options_of(kind, everything=True)
    assert all(o.annotation.__metadata__[0].show for o in every)


HELP = """
import sys
from prunedm.cli import main
from prunedm.options import LearnOptions, PruneOptions
PruneOptions(score="taylor", mechanism="obs-nm"), LearnOptions(estimator="sr-ste", train_weights=True)
try: main(sys.argv[1:])
except SystemExit as stop: assert not stop.code
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["learn", "--help-all"]])
def test_help_and_options_import_nothing_heavy(words):
    subprocess.run(
        [sys.executable, "-c", HELP, *words], check=True, capture_output=True, timeout=120
    )
