"""The command that runs a whole recipe: run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import Config, Flat, Overwrite, app, check_names, watched_terminal
from prunedm.configuration import merged, parse_settings
from prunedm.errors import UserError
from prunedm.places import expanded, target
from prunedm.recipe import Recipe, unused
from prunedm.recipe import plan as plan_recipe
from prunedm.recipe import run as run_recipe


@app.command
def run(
    places: Annotated[
        tuple[Path, ...],
        Parameter(
            help="[RECIPE.yaml] [OUT]: the recipe, and the folder of all stages", negative=()
        ),
    ] = (),
    /,
    *,
    recipe: Annotated[Recipe, Flat] = Recipe(),
    config: Config = None,
    set_: Annotated[
        tuple[str, ...],
        Parameter(
            name="--set", help="NAME=VALUE over the recipe file: learn.pattern=1:4", negative=()
        ),
    ] = (),
    dry_run: Annotated[
        bool,
        Parameter(help="only show every stage, its folder, and whether it is done", negative=()),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Compress a model from end to end and report: prune, recover, mask, learn, finetune, compare.

    A stage is skipped where its options and inputs are the same, and made again where they changed.
    OUT is runs/ and the recipe's name, or the model's.
    """
    file, out = _places([expanded(place) for place in places], config)
    given = recipe.model_dump(exclude_unset=True)
    recipe = merged(Recipe, file, parse_settings(set_), given)
    out = out or Path("runs") / (file.stem if file else Path(recipe.model).resolve().name)
    target(out)
    if dry_run:
        from prunedm.console import Terminal, plan_table

        plan_table(plan_recipe(recipe, out))
        for line in unused(recipe):
            Terminal().say(line)
        return
    check_names(recipe.model, dataset=recipe.dataset)
    with watched_terminal(out, "run") as terminal:
        report_folder = run_recipe(recipe, out, progress=terminal, overwrite=overwrite)
    from prunedm.console import comparison_tables

    comparison_tables(report_folder)


def _places(places: Sequence[Path], config: Path | None) -> tuple[Path | None, Path | None]:
    """The recipe's file, by its name, and the folder, each where there is one."""
    files = [place for place in places if place.suffix in (".yaml", ".yml")]
    folders = [place for place in places if place not in files]
    if len(files) > 1 or len(folders) > 1 or (files and config):
        raise UserError(
            f"run takes one recipe and one folder, not {' '.join(map(str, [*places, config or '']))}"
        )
    return (files[0] if files else config), (folders[0] if folders else None)
