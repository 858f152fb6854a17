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
from prunedm.options import EvaluateOptions, LearnOptions, Options
from prunedm.options.presets import preset_named
from prunedm.stages import STAGES
from prunedm.stages.table import Stage

Table = dict[str, Any]


def _train_preset(name: str, given: Table) -> Table:
    return combined(read_options(preset_file("train", name)), given)


def _learn_preset(name: str, given: Table) -> Table:
    estimator = given.get("estimator", LearnOptions().estimator)
    return combined(preset_named(name).options(estimator), LearnOptions.nested(given))


# the help of --preset, and what was given over a preset of that name
PRESETS: dict[str, tuple[str, Callable[[str, Table], Table]]] = {
    "train": ("a packaged configuration: digits", _train_preset),
    "learn": ("quick, standard, best, efficient or fine: see `prunedm presets`", _learn_preset),
}


def _run(stage: Stage, given: Given) -> None:
    table = options_in(stage.options, given)
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


def stage_command(stage: Stage, *, everything: bool = False) -> Callable[..., None]:
    """The command of a verb; `everything`: its help shows all options."""
    arguments = [argument("model", Model)] if stage.reads == "model" else []
    arguments += [argument("out", Out), *options_of(stage.options, everything=everything)]
    if stage.verb in PRESETS:
        preset = Annotated[str | None, Parameter(help=PRESETS[stage.verb][0])]
        arguments.append(keyword("preset", preset, None))
    arguments += [keyword("config", Config, None), keyword("overwrite", Overwrite, False)]
    text = stage.help + ("" if everything else more_options(stage.options))
    return command(stage.verb, text, arguments, lambda given: _run(stage, given))


def more_options(kind: type[Options]) -> str:
    """A sentence of the help about the options that it leaves out."""
    sections = sections_of(kind)
    return f"\n\nMore options, by --help-all: {', '.join(sections)}." if sections else ""


for _stage in STAGES.values():
    app.command(stage_command(_stage))


def _compare(given: Given) -> None:
    models, out = _labels(given["models"]), given["out"]
    options = merged(EvaluateOptions, given.get("config"), options_in(EvaluateOptions, given))
    check_names(*models.values(), dataset=options.dataset)
    from prunedm.console import comparison_tables
    from prunedm.stages import compare

    with watched_terminal(out, "compare") as terminal:
        overwrite = bool(given.get("overwrite"))
        record, made = compare(models, out, options, progress=terminal, overwrite=overwrite)
        told(terminal, out, record, made=made)
    comparison_tables(out)


_MODELS = Annotated[list[str], Parameter(help="models; the first is the one to compare with")]


def compare_command(*, everything: bool = False) -> Callable[..., None]:
    """As `stage_command`; it reads several models."""
    text = "Measure several models on the same problems and noise; table and report.html."
    arguments = [
        argument("models", _MODELS).replace(kind=Argument.POSITIONAL_ONLY),
        keyword("out", Out, Argument.empty),
        *options_of(EvaluateOptions, everything=everything),
        keyword("config", Config, None),
        keyword("overwrite", Overwrite, False),
    ]
    text += "" if everything else more_options(EvaluateOptions)
    return command("compare", text, arguments, _compare)


app.command(compare_command())


def _labels(models: list[str]) -> dict[str, str]:
    """Folder names, made different by their parents' where two are the same."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    if len(set(names)) < len(names):
        raise UserError("compare was given the same model twice")
    return dict(zip(names, models, strict=True))
