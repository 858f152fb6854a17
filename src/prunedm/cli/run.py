"""The command that runs a whole recipe: run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import Config, Overwrite, app, check_names, watched_terminal
from prunedm.cli.parameters import Argument, Given, command, keyword, options_of
from prunedm.configuration import nested, parse_settings
from prunedm.errors import UserError
from prunedm.recipe import Recipe
from prunedm.recipe import plan as plan_recipe
from prunedm.recipe import run as run_recipe
from prunedm.recipe_draft import FIELDS, read_draft
from prunedm.stages import STAGES
from prunedm.system.places import expanded, target


def _run(given: Given) -> None:
    file, out = _places([expanded(place) for place in given.get("places", ())], given.get("config"))
    flags = {name.replace("__", "."): given[name] for name in given if name in _OF_THE_RECIPE}
    draft = read_draft(file, parse_settings(given.get("set_", ())), nested(flags))
    recipe, lines = draft.recipe(), [*draft.old_form(str(file)), *draft.unused()]
    out = out or Path("runs") / (file.stem if file else Path(recipe.model).resolve().name)
    target(out)
    if given.get("dry_run"):
        from prunedm.console import Terminal, plan_table

        plan_table(plan_recipe(recipe, out))
        for line in lines:
            Terminal().say(line)
        return
    check_names(recipe.model, dataset=recipe.dataset)
    with watched_terminal(out, "run") as terminal:
        for line in lines:
            terminal.say(line)
        overwrite = bool(given.get("overwrite"))
        report_folder = run_recipe(recipe, out, progress=terminal, overwrite=overwrite)
    from prunedm.console import comparison_tables

    comparison_tables(report_folder)


def _recipe_options(*, everything: bool = False) -> list[Argument]:
    """Options of the recipe, and of its stages and report by name or verb, which the help hides."""
    own = options_of(Recipe, everything=everything)
    names = {name: verb for name, (verb, _) in FIELDS.items()} | {verb: verb for verb in STAGES}
    return [option for option in own if option.name not in ("stages", "evaluate")] + [
        option
        for name, verb in names.items()
        for option in options_of(STAGES[verb].options, within=name, everything=everything)
    ]


_PLACES = Annotated[
    tuple[Path, ...],
    Parameter(help="[RECIPE.yaml] [OUT]: the recipe, and the folder of all stages", negative=()),
]
_STAGES = Annotated[
    tuple[str, ...], Parameter(help="only these of the recipe's stages; repeat it", negative=())
]
_SET = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="NAME=VALUE over the recipe file: mask.pattern=1:4, finetune.2.steps=100; "
        "--mask.pattern 1:4 does the same",
        negative=(),
    ),
]
_DRY_RUN = Annotated[
    bool, Parameter(help="only show every stage, its folder, and whether it is done", negative=())
]
_OF_THE_RECIPE = {option.name for option in _recipe_options()} | {"stages"}
_HELP = """Compress a model from end to end and report, by a recipe: a list of stages.

The default one prunes channels, recovers, sets N:M masks, fine-tunes, and compares. A stage is skipped
where its options and inputs are the same, and made again where they changed. OUT is runs/ and the
recipe's name, or the model's."""


def run_command(*, everything: bool = False) -> Callable[..., None]:
    """The command. everything: its help shows the options of all stages."""
    arguments = [
        keyword("places", _PLACES, ()).replace(kind=Argument.POSITIONAL_ONLY),
        *_recipe_options(everything=everything),
        keyword("stages", _STAGES, ()),
        keyword("config", Config, None),
        keyword("set_", _SET, ()),
        keyword("dry_run", _DRY_RUN, False),
        keyword("overwrite", Overwrite, False),
    ]
    text = _HELP if everything else f"{_HELP}\n\nMore options, by --help-all: those of all stages."
    return command("run", text, arguments, _run)


app.command(run_command())


def _places(places: Sequence[Path], config: Path | None) -> tuple[Path | None, Path | None]:
    """The recipe file, recognized by its suffix, and the folder; None where not given."""
    files = [place for place in places if place.suffix in (".yaml", ".yml")]
    folders = [place for place in places if place not in files]
    if len(files) > 1 or len(folders) > 1 or (files and config):
        raise UserError(
            f"run takes one recipe and one folder, not {' '.join(map(str, [*places, config or '']))}"
        )
    return (files[0] if files else config), (folders[0] if folders else None)
