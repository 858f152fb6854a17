"""The presets of `learn` for the terminal: a table with costs and times, or one as YAML."""

import math
from importlib import resources

import yaml
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from prunedm.learning import ESTIMATORS
from prunedm.options import LearnOptions
from prunedm.options.learn import EstimatorName, PolicyGradientOptions
from prunedm.options.presets import PAPERS, PRESETS, network_passes, preset_options, with_preset

SHOWN: tuple[EstimatorName, ...] = ("relaxed", "policy-gradient-classic")


class StepSeconds(BaseModel):
    """Seconds of one step: `new` with new problems, `known` with repeated ones."""

    new: float
    known: float


class StepTiming(BaseModel):
    """Seconds measured on one machine with one model, by `benchmarks/presets.py`.

    step_s: by estimator and batch size. validation_s: for one held-out loss of `problems` problems.
    """

    model: str
    parameters: int
    kind: str  # CPU or GPU
    device: str
    created: str
    command: str
    problems: int
    validation_s: float
    step_s: dict[str, dict[int, StepSeconds]]


class Timings(BaseModel):
    """The packaged file."""

    measured: list[StepTiming] = []


def read_timings() -> list[StepTiming]:
    file = resources.files("prunedm") / "assets" / "presets" / "learn-times.json"
    return Timings.model_validate_json(file.read_text(encoding="utf-8")).measured


def expected_seconds(options: LearnOptions, timing: StepTiming) -> float | None:
    """Expected seconds of steps and held-out losses; None where no step was timed."""
    options = options.filled()
    step_s = timing.step_s.get(options.estimator, {}).get(options.batch_size)
    if step_s is None:
        return None
    cycle = -(-options.dataset_size // options.batch_size)
    new = min(options.steps, cycle)
    # held-out losses: of the dense model, the first and the kept masks, and during learning
    looks = 3 + math.ceil(options.steps / (options.validate_every or options.steps))
    look_s = timing.validation_s * options.validation_problems / timing.problems
    return new * step_s.new + (options.steps - new) * step_s.known + looks * look_s


def print_table(console: Console) -> None:
    """Every preset with sizes, rates, cost and expected time, and notes on the figures."""
    timings = read_timings()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in PRESETS:
        table.add_column(name, justify="right", no_wrap=True)
    presets = PRESETS.values()
    table.add_row("for", *(p.purpose for p in presets))
    table.add_row("in the old scripts", *(p.config for p in presets))
    table.add_row("problems", *(f"{p.dataset_size:,}" for p in presets))
    table.add_row("batch size", *(str(p.batch_size) for p in presets))
    for estimator in SHOWN:
        _add_estimator(table, estimator, timings)
    console.print(table)
    for line in _notes(timings):
        console.print(line, highlight=False, markup=False)


def _add_estimator(table: Table, estimator: EstimatorName, timings: list[StepTiming]) -> None:
    default = LearnOptions.model_fields["estimator"].default
    given = LearnOptions(estimator=estimator)
    all_of = [with_preset(given, name).filled() for name in PRESETS]
    passes = [network_passes(options) for options in all_of]
    table.add_section()
    label = estimator.removeprefix("policy-gradient-")
    table.add_row(f"[bold]{label}[/]" + " (default)" * (estimator == default))
    table.add_row("  lr, logits", *(f"{o.lr:g}, {o.logits:g}" for o in all_of))
    table.add_row("  steps", *(f"{o.steps:,}" for o in all_of))
    table.add_row("  problems seen", *(f"{p.seen:,}" for p in passes))
    table.add_row("  forward passes", *(f"{p.forward:,}" for p in passes))
    table.add_row("  backward passes", *(f"{p.backward:,}" for p in passes))
    for timing in timings:
        seconds = [expected_seconds(options, timing) for options in all_of]
        shown = ["–" if s is None else duration(s) for s in seconds]
        table.add_row(f"  {timing.kind}, {timing.model}", *shown)
    if not any(timing.kind == "GPU" for timing in timings):
        table.add_row("  GPU", *["–"] * len(PRESETS))
    if estimator == "policy-gradient-classic":
        table.add_row("  GPU, old guides", *(f"~{p.old_time}" for p in PRESETS.values()))


def _notes(timings: list[StepTiming]) -> list[str]:
    others = [
        f"{name}: lr {method.lr:g}, logits {method.logits:g}"
        for name, method in ESTIMATORS.items()
        if name not in SHOWN
    ]
    measured = [
        f"{t.kind}, {t.model} ({t.parameters / 1e6:.1f}M parameters): on {t.device}; seconds per step, "
        f"measured {t.created[:10]} by {t.command}, times steps"
        for t in timings
    ]
    samples = PolicyGradientOptions().samples
    untimed = {"CPU", "GPU"} - {timing.kind for timing in timings}
    return [
        "classic: --estimator policy-gradient-classic. "
        f"Other estimators: {'; '.join(others)}. straight-through and sr-ste take the steps of "
        f"relaxed; policy-gradient tries as many masks as classic, {samples} per step.",
        *measured,
        *(f"{kind}: not measured yet; benchmarks/presets.py does it" for kind in sorted(untimed)),
        "old guides: what they expected on their GPU, with their code. They give a limit of steps for "
        "standard only (15,000); the others have the old default, 10,000.",
        f"{', '.join(PAPERS)}: a paper's settings, with its estimator.",
        "prunedm learn MODEL OUT --preset NAME takes one; prunedm presets NAME prints it as YAML.",
    ]


def duration(seconds: float) -> str:
    """In a unit that leaves about two digits: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def yaml_text(name: str, estimator: EstimatorName) -> str:
    """The preset as YAML for `--config`, with all other options as comments at their defaults.

    Raises `UserError` where there is no such preset.
    """
    own = {"estimator": estimator} | preset_options(name, estimator)
    full = LearnOptions(**own).filled()
    own = {"estimator": full.estimator, "lr": full.lr, "logits": full.logits} | own
    every = full.model_dump(mode="json")
    own, rest = {k: every[k] for k in own}, {k: v for k, v in every.items() if k not in own}
    purpose = PRESETS[name].purpose if name in PRESETS else "a paper's settings"
    comments = "".join(f"# {line}\n" for line in _dump(rest).splitlines())
    return (
        f"# prunedm learn MODEL OUT --config FILE: preset {name}, {purpose}\n"
        f"{_dump(own)}\n# at their defaults:\n{comments}"
    )


def _dump(options: dict[str, object]) -> str:
    return yaml.safe_dump(options, sort_keys=False)
