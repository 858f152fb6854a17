"""The commands that run one stage: MODEL OUT and its options, from the table of stages; and compare."""

from collections.abc import Callable
from inspect import Parameter as Argument
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from prunedm.cli.frame import (
    Config,
    Model,
    Out,
    Overwrite,
    app,
    check_names,
    told,
    watched_terminal,
)
from prunedm.cli.parameters import Given, argument, command, keyword, options_of
from prunedm.configuration import combined, merged, preset_file, read_options
from prunedm.errors import UserError
from prunedm.options import EvaluateOptions
from prunedm.options.presets import preset_named
from prunedm.stages import STAGES
from prunedm.stages.table import Stage

Table = dict[str, Any]


def _train_preset(name: str, given: Table) -> Table:
    return combined(read_options(preset_file("train", name)), given)


def _learn_preset(name: str, given: Table) -> Table:
    estimator = given.get("estimator", STAGES["learn"].options.model_fields["estimator"].default)
    return preset_named(name).options(estimator) | given


# the help of --preset, and what was given over a preset of that name
PRESETS: dict[str, tuple[str, Callable[[str, Table], Table]]] = {
    "train": ("a packaged configuration: digits", _train_preset),
    "learn": ("quick, standard, best, efficient or fine: see `prunedm presets`", _learn_preset),
}


def _run(stage: Stage, given: Given) -> None:
    table = {name: value for name, value in given.items() if name in stage.options.model_fields}
    config = given.get("config")
    if "preset" in given:
        below = read_options(config) if config else {}
        table, config = PRESETS[stage.verb][1](given["preset"], combined(below, table)), None
    options = merged(stage.options, config, table)
    source, out = given.get("model", ""), given["out"]
    check_names(source, dataset=getattr(options, "dataset", ""))
    with watched_terminal(out, stage.verb) as terminal:
        overwrite = bool(given.get("overwrite"))
        record, made = stage(source, out, options, progress=terminal, overwrite=overwrite)
        told(terminal, out, record, made=made)
    from prunedm.console import SHOWN

    if stage.verb in SHOWN:
        SHOWN[stage.verb](out)


def _add(stage: Stage) -> None:
    arguments = [argument("model", Model)] if stage.reads == "model" else []
    arguments += [argument("out", Out), *options_of(stage.options)]
    if stage.verb in PRESETS:
        preset = Annotated[str | None, Parameter(help=PRESETS[stage.verb][0])]
        arguments.append(keyword("preset", preset, None))
    arguments += [keyword("config", Config, None), keyword("overwrite", Overwrite, False)]
    app.command(command(stage.verb, stage.help, arguments, lambda given: _run(stage, given)))


for _stage in STAGES.values():
    _add(_stage)


def _compare(given: Given) -> None:
    models, out = _labels(given["models"]), given["out"]
    table = {name: value for name, value in given.items() if name in EvaluateOptions.model_fields}
    options = merged(EvaluateOptions, given.get("config"), table)
    check_names(*models.values(), dataset=options.dataset)
    from prunedm.console import comparison_tables
    from prunedm.stages import compare

    with watched_terminal(out, "compare") as terminal:
        overwrite = bool(given.get("overwrite"))
        record, made = compare(models, out, options, progress=terminal, overwrite=overwrite)
        told(terminal, out, record, made=made)
    comparison_tables(out)


_MODELS = Annotated[list[str], Parameter(help="models; the first is the one to compare with")]
app.command(
    command(
        "compare",
        "Measure several models on the same problems and noise; table and report.html.",
        [
            argument("models", _MODELS).replace(kind=Argument.POSITIONAL_ONLY),
            keyword("out", Out, Argument.empty),
            *options_of(EvaluateOptions),
            keyword("config", Config, None),
            keyword("overwrite", Overwrite, False),
        ],
        _compare,
    )
)


def _labels(models: list[str]) -> dict[str, str]:
    """Folder names, made different by their parents' where two are the same."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    if len(set(names)) < len(names):
        raise UserError("compare was given the same model twice")
    return dict(zip(names, models, strict=True))
