"""Commands that make models: run, train, prune, learn, finetune, export."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import Config, Flat, Model, Out, Overwrite, app, report, show_comparison
from prunedm.configuration import merge_file, preset_file
from prunedm.options import ExportOptions, FinetuneOptions, LearnOptions, PruneOptions, TrainOptions
from prunedm.recipe import Recipe
from prunedm.recipe import run as run_recipe


@app.command
def run(
    out: Annotated[
        Path | None, Parameter(help="folder of all stages [default: runs/MODEL]")
    ] = None,
    *,
    recipe: Annotated[Recipe, Flat] = Recipe(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Compress a model from end to end and report: prune, recover, mask, learn, finetune, compare."""
    from prunedm.console import Terminal

    recipe = merge_file(recipe, config)
    out = out or Path("runs") / Path(recipe.model).name
    show_comparison(run_recipe(recipe, out, progress=Terminal(), overwrite=overwrite))


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
    from prunedm.stages import train as stage

    options = merge_file(options, config)
    if preset is not None:
        options = merge_file(options, preset_file("train", preset))
    report(stage, out, options, overwrite=overwrite)


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
    from prunedm.console import pruning_table
    from prunedm.stages import prune as stage

    report(stage, model, out, merge_file(options, config), overwrite=overwrite)
    pruning_table(out / "pruning_stats.json")


@app.command
def learn(
    model: Model,
    out: Out,
    *,
    options: Annotated[LearnOptions, Flat] = LearnOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn which N of every M weights to keep; the weights stay as they are."""
    from prunedm.stages import learn as stage

    report(stage, model, out, merge_file(options, config), overwrite=overwrite)


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
    from prunedm.stages import finetune as stage

    report(stage, model, out, merge_file(options, config), overwrite=overwrite)


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
    from prunedm.console import export_lines
    from prunedm.stages import export as stage

    report(stage, model, out, merge_file(options, config), overwrite=overwrite)
    export_lines(out)
