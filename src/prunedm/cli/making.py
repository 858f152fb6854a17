"""Commands that make models: run, train, prune, learn, finetune, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import (
    Config,
    Flat,
    Model,
    Out,
    Overwrite,
    app,
    check_names,
    report,
    show_comparison,
    watched_terminal,
)
from prunedm.configuration import merge_file, parse_settings, preset_file
from prunedm.errors import UserError
from prunedm.options import ExportOptions, FinetuneOptions, LearnOptions, PruneOptions, TrainOptions
from prunedm.options.presets import with_preset
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
    recipe = merge_file(recipe, file, parse_settings(set_))
    out = out or Path("runs") / (file.stem if file else Path(recipe.model).resolve().name)
    target(out)
    if dry_run:
        from prunedm.console import Terminal, plan_table

        plan_table(plan_recipe(recipe, out))
        for line in unused(recipe):
            Terminal().say(line)
        return
    check_names(recipe.model, recipe)
    with watched_terminal(out, "run") as terminal:
        report_folder = run_recipe(recipe, out, progress=terminal, overwrite=overwrite)
    show_comparison(report_folder)


def _places(places: Sequence[Path], config: Path | None) -> tuple[Path | None, Path | None]:
    """The recipe's file, by its name, and the folder, each where there is one."""
    files = [place for place in places if place.suffix in (".yaml", ".yml")]
    folders = [place for place in places if place not in files]
    if len(files) > 1 or len(folders) > 1 or (files and config):
        raise UserError(
            f"run takes one recipe and one folder, not {' '.join(map(str, [*places, config or '']))}"
        )
    return (files[0] if files else config), (folders[0] if folders else None)


@app.command
def train(
    out: Out,
    *,
    options: Annotated[TrainOptions, Flat] = TrainOptions(),
    preset: Annotated[str | None, Parameter(help="a packaged configuration: digits")] = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a dense model from scratch; --preset digits makes the embedded one."""
    options = merge_file(options, config)
    if preset is not None:
        options = merge_file(options, preset_file("train", preset))
    report("train", out, options, overwrite=overwrite)


@app.command
def prune(
    model: Model,
    out: Out,
    *,
    options: Annotated[PruneOptions, Flat] = PruneOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Remove channels, single weights, or N:M weights, by a score or by OBS."""
    report("prune", model, out, merge_file(options, config), overwrite=overwrite)
    from prunedm.console import pruning_table

    pruning_table(out / "pruning_stats.json")


@app.command
def learn(
    model: Model,
    out: Out,
    *,
    options: Annotated[LearnOptions, Flat] = LearnOptions(),
    preset: Annotated[
        str | None,
        Parameter(help="quick, standard, best, efficient or fine: see `prunedm presets`"),
    ] = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn which N of every M weights to keep; the weights stay as they are."""
    options = merge_file(options, config)
    if preset is not None:
        options = with_preset(options, preset)
    report("learn", model, out, options, overwrite=overwrite)


@app.command
def finetune(
    model: Model,
    out: Out,
    *,
    options: Annotated[FinetuneOptions, Flat] = FinetuneOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the weights that are left, masks held exactly; distils from the dense model."""
    report("finetune", model, out, merge_file(options, config), overwrite=overwrite)


@app.command
def export(
    model: Model,
    out: Out,
    *,
    options: Annotated[ExportOptions, Flat] = ExportOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one file for another runtime: packed, ONNX, OpenVINO, torch.export, TensorRT; int8 too."""
    report("export", model, out, merge_file(options, config), overwrite=overwrite)
    from prunedm.console import export_lines

    export_lines(out)
