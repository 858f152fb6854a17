"""The commands that run one stage, from the table of verbs."""

from collections.abc import Callable
from inspect import Parameter as Argument
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from prunedm.cli.frame import Config, Model, Out, Overwrite, app, check_names, watched_terminal
from prunedm.cli.parameters import (
    Given,
    argument,
    command,
    keyword,
    options_in,
    options_of,
    sections_of,
)
from prunedm.configuration import combined, merged, preset_file, read_options
from prunedm.errors import UserError
from prunedm.options import LearnOptions
from prunedm.options.presets import preset_options
from prunedm.recipe import describe
from prunedm.stages.table import VERBS, Stage

Table = dict[str, Any]


def _train_preset(name: str, given: Table) -> Table:
    return combined(read_options(preset_file("train", name)), given)


def _learn_preset(name: str, given: Table) -> Table:
    estimator = given.get("estimator", LearnOptions().estimator)
    return combined(preset_options(name, estimator), LearnOptions.nested(given))


# verb -> the help of --preset, and a function of its name and the options given over it
PRESETS: dict[str, tuple[str, Callable[[str, Table], Table]]] = {
    "train": ("a packaged configuration: digits", _train_preset),
    "learn": (
        "quick, standard, best, efficient, fine or maskpro-llm: see `prunedm presets`",
        _learn_preset,
    ),
}


def _run(stage: Stage, given: Given) -> None:
    table = options_in(stage.options, given)
    config = given.get("config")
    if "preset" in given:
        below = read_options(config) if config else {}
        table, config = PRESETS[stage.verb][1](given["preset"], combined(below, table)), None
    options = merged(stage.options, config, table)
    out, source = given["out"], given.get("model", "")
    if stage.reads == "models":
        source = _labels(given["models"])
    names = source.values() if isinstance(source, dict) else [source]
    check_names(*names, dataset=getattr(options, "dataset", ""))
    with watched_terminal(out, stage.verb) as terminal:
        overwrite = bool(given.get("overwrite"))
        record, made = stage(source, out, options, progress=terminal, overwrite=overwrite)
        terminal.say(f"{out}: {describe(record.figures, record.wall_time_s, made)}")
        terminal.result(record.figures, made=made)
    from prunedm.console import SHOWN

    if stage.verb in SHOWN:
        SHOWN[stage.verb](out)


_MODELS = Annotated[list[str], Parameter(help="models; the others are compared with the first")]
_PLACES = {
    "model": [argument("model", Model), argument("out", Out)],
    "models": [
        argument("models", _MODELS).replace(kind=Argument.POSITIONAL_ONLY),
        keyword("out", Out, Argument.empty),
    ],
    "nothing": [argument("out", Out)],
}


def stage_command(stage: Stage, *, everything: bool = False) -> Callable[..., None]:
    """The command of a verb. everything: its help shows all options."""
    arguments = [*_PLACES[stage.reads], *options_of(stage.options, everything=everything)]
    if stage.verb in PRESETS:
        preset = Annotated[str | None, Parameter(help=PRESETS[stage.verb][0])]
        arguments.append(keyword("preset", preset, None))
    arguments += [keyword("config", Config, None), keyword("overwrite", Overwrite, False)]
    text, sections = stage.help, sections_of(stage.options)
    if sections and not everything:
        text += f"\n\nMore options, by --help-all: {', '.join(sections)}."
    return command(stage.verb, text, arguments, lambda given: _run(stage, given))


for _stage in VERBS.values():
    app.command(stage_command(_stage))


def _labels(models: list[str]) -> dict[str, str]:
    """Folder names; whole paths where two names are equal."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    if len(set(names)) < len(names):
        raise UserError("compare was given the same model twice")
    return dict(zip(names, models, strict=True))
