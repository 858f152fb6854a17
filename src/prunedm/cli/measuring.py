"""Commands that change nothing: sample, evaluate, compare, loss, analyze."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import Config, Flat, Model, Out, Overwrite, app, report, show_comparison
from prunedm.configuration import merge_file
from prunedm.errors import UserError
from prunedm.options import AnalyzeOptions, EvaluateOptions, LossOptions, SampleOptions


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
    report("sample", model, out, merge_file(options, config), overwrite=overwrite)


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
    report("evaluate", model, out, merge_file(options, config), overwrite=overwrite)
    show_comparison(out)


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
    labels = _labels(models)
    report("compare", labels, out, merge_file(options, config), overwrite=overwrite)
    show_comparison(out)


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
    record = report("loss", model, out, merge_file(options, config), overwrite=overwrite)
    from prunedm.console import loss_line

    loss_line(record)


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
    report("analyze", model, out, merge_file(options, config), overwrite=overwrite)
    from prunedm.console import analysis_table

    analysis_table(out)


def _labels(models: list[str]) -> dict[str, str]:
    """Folder names, made different by their parents' where two are the same."""
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = [model.strip("/").replace("/", "-") for model in models]
    if len(set(names)) < len(names):
        raise UserError("compare was given the same model twice")
    return dict(zip(names, models, strict=True))
