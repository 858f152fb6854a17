"""The command line: parse, call a stage, print. Nothing heavy is imported before a command runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prunedm import __version__
from prunedm.configuration import merge_file, preset_file
from prunedm.errors import UserError
from prunedm.messages import one_line
from prunedm.options import (
    AnalyzeOptions,
    EvaluateOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    PruneOptions,
    SampleOptions,
    TrainOptions,
)
from prunedm.recipe import Recipe, describe
from prunedm.recipe import run as run_recipe

if TYPE_CHECKING:
    from prunedm.record import Record

app = App(
    name="prunedm",
    help="Make diffusion models small and fast, and prove what is left still works.\n\n"
    "`prunedm run` does everything on the embedded digits model. Every stage takes options from "
    "`--config FILE.yaml`; the command line wins. `--debug` shows tracebacks.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # `main` says how to go on
)
masks = App(name="masks", help="Masks of any model: take them out into a file, or look at them.")
app.command(masks)
Flat = Parameter(name="*")
Config = Annotated[Path | None, Parameter(help="YAML file of options; the command line wins")]
Overwrite = Annotated[bool, Parameter(help="replace OUT if it holds another result", negative=())]
Model = Annotated[str, Parameter(help="a model folder, a hub id like owner/name, or digits")]
Out = Annotated[Path, Parameter(help="the new folder")]


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
    _show_comparison(run_recipe(recipe, out, progress=Terminal(), overwrite=overwrite))


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
    _report(stage, out, options, overwrite=overwrite)


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

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)
    pruning_table(out / "pruning_stats.json")


@app.command
def analyze(
    model: Model,
    out: Out,
    *,
    options: Annotated[AnalyzeOptions, Flat] = AnalyzeOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure what layers see at each noise level: JSON, heat map, and which score to try."""
    from prunedm.console import analysis_table
    from prunedm.stages import analyze as stage

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)
    analysis_table(out)


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

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)


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

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)


@app.command
def sample(
    model: Model,
    out: Out,
    *,
    options: Annotated[SampleOptions, Flat] = SampleOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw images; image i depends on the seed and i alone. An interrupted run continues."""
    from prunedm.stages import sample as stage

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)


@app.command
def evaluate(
    model: Model,
    out: Out,
    *,
    options: Annotated[EvaluateOptions, Flat] = EvaluateOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure one model: loss, FD, size, speed, sparsity."""
    from prunedm.console import evaluation_table
    from prunedm.stages import evaluate as stage
    from prunedm.stages.evaluate import read_evaluation

    _report(stage, model, out, merge_file(options, config), overwrite=overwrite)
    evaluation_table([read_evaluation(out)])


@app.command
def loss(
    model: Model,
    out: Out,
    *,
    options: Annotated[LossOptions, Flat] = LossOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the denoising loss batch by batch, with other masks put on first if wanted."""
    from prunedm.console import loss_line
    from prunedm.stages import loss as stage

    loss_line(_report(stage, model, out, merge_file(options, config), overwrite=overwrite))


@masks.command
def extract(
    model: Model,
    out: Annotated[Path, Parameter(help="the new file, NAME.safetensors")],
    *,
    pattern: Annotated[str | None, Parameter(help="keep just N of every M, as 2:4")] = None,
    targets: Annotated[
        tuple[str, ...],
        Parameter(help="only this prefix or expression of layers; repeat it", negative=()),
    ] = (),
    overwrite: Annotated[bool, Parameter(help="replace OUT if it is there", negative=())] = False,
) -> None:
    """Write a model's masks, or those of its zeros, to one file."""
    from prunedm.console import extraction_lines
    from prunedm.stages.masks import extract_to

    extraction_lines(
        out, *extract_to(model, out, targets=targets, pattern=pattern, overwrite=overwrite)
    )


@masks.command
def show(
    source: Annotated[str, Parameter(help="a masks file, a model folder, a hub id, or digits")],
) -> None:
    """Print the masks of every layer, and whether their N:M patterns hold."""
    from prunedm.console import masks_table
    from prunedm.stages.masks import read_masks

    found = read_masks(source)
    masks_table(found)
    found.check_pattern()


@app.command
def compare(
    models: Annotated[list[str], Parameter(help="models; the first is the one to compare with")],
    /,
    *,
    out: Out,
    options: Annotated[EvaluateOptions, Flat] = EvaluateOptions(),
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure several models on the same problems and noise; table and report.html."""
    from prunedm.stages import compare as stage

    labels = _labels(models)
    _report(stage, labels, out, merge_file(options, config), overwrite=overwrite)
    _show_comparison(out)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user can mend, 130 when interrupted."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it can", 130)
    except Exception as error:
        message = one_line(error)
        if debug:
            raise
        if message is None:
            _fail(f"internal error: {type(error).__name__}: {error}; --debug shows where", 1)
        _fail(str(message), 2)


def _fail(message: str, code: int) -> None:
    print("prunedm:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


def _report(
    stage: Callable[..., tuple["Record", bool]], *arguments: Any, overwrite: bool
) -> "Record":
    """Run a stage with bars, and say in one line what came out."""
    from prunedm.console import Terminal

    terminal = Terminal()
    record, made = stage(*arguments, progress=terminal, overwrite=overwrite)
    out = next(a for a in reversed(arguments) if isinstance(a, Path))
    terminal.say(f"{out}: {describe(record.figures, record.wall_time_s, made)}")
    return record


def _show_comparison(folder: Path) -> None:
    from prunedm.console import Terminal, evaluation_table
    from prunedm.stages.compare import REPORT, read_comparison

    evaluation_table(read_comparison(folder))
    Terminal().say(f"report: {(folder / REPORT).resolve()}")


def _labels(models: list[str]) -> dict[str, str]:
    """Folder names, made different by their parents' where two are the same."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    if len(set(names)) < len(names):
        raise UserError("compare was given the same model twice")
    return dict(zip(names, models, strict=True))
