"""compare: several models on the same problems and the same noise; one table, one report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from prunedm.errors import UserError
from prunedm.evaluation.paired import psnr
from prunedm.evaluation.report import write_report
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.speed import latencies
from prunedm.evaluation.table import csv_text, markdown_table
from prunedm.folder import Model, load
from prunedm.options import EvaluateOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record, Source, write_json
from prunedm.stages.evaluate import evaluate, read_evaluation, read_samples
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import data_source, device_for, images_for, source_of

RESULTS = "detailed_results.json"
REPORT = "report.html"
_Rows = TypeAdapter(list[Evaluation])


def compare(
    models: Mapping[str, str | Path],
    out: str | Path,
    options: EvaluateOptions = EvaluateOptions(),
    *,
    title: str = "",
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Evaluate `models` (label -> folder, the first is the dense one) and write the report.

    Files: `report.html`, `comparison_table.csv`, `comparison_report.md`, `detailed_results.json`,
    and a folder per model under `evaluations/`.
    """
    if not models:
        raise UserError("compare needs at least one model; the first is the one to compare with")
    progress = progress or Silent()
    loaded = {label: load(path) for label, path in models.items()}
    inputs: dict[str, Source] = {label: source_of(model) for label, model in loaded.items()}
    images = images_for(next(iter(loaded.values())), options, "test")
    inputs["held-out images"] = data_source(images)

    def make(folder: Path) -> dict[str, Any]:
        done = folder / RESUME / "evaluations"
        for label, path in models.items():
            progress.say(f"evaluating {label}")
            evaluate(path, done / label, options, label=label, progress=progress)
        results = _together(loaded, done, options)
        samples = {label: read_samples(done / label) for label in models}
        drawn = {label: images for label, images in samples.items() if images is not None}
        _add_psnr(results, drawn)
        _write(results, drawn, folder, title or "prunedm: dense and pruned models")
        done.rename(folder / "evaluations")
        return {"models": list(models)}

    return run_stage("compare", out, options=options, inputs=inputs, make=make, overwrite=overwrite)


def read_comparison(folder: Path) -> list[Evaluation]:
    """The rows that `compare` wrote."""
    text = (folder / RESULTS).read_text(encoding="utf-8")
    return _Rows.validate_json(text)


def _together(
    models: Mapping[str, Model], done: Path, options: EvaluateOptions
) -> list[Evaluation]:
    """All evaluations, with latencies measured again in turns: times minutes apart do not compare."""
    results = [read_evaluation(done / label) for label in models]
    timings = latencies(
        [model.denoiser for model in models.values()],
        next(iter(models.values())).sample_shape,
        batch=options.latency_batch,
        repeats=options.latency_repeats,
        device=device_for(options.device),
    )
    for result, timing in zip(results, timings, strict=True):
        result.figures.latency_ms = timing.median_ms
        result.figures.latency_spread_ms = timing.spread_ms
    return results


def _add_psnr(results: list[Evaluation], samples: Mapping[str, np.ndarray]) -> None:
    dense = samples.get(results[0].label)
    for result in results[1:]:
        if dense is not None and result.label in samples:
            median = float(np.median(psnr(samples[result.label], dense)))
            result.figures.psnr_db = median if np.isfinite(median) else None  # inf: the same images


def _write(
    results: list[Evaluation], samples: Mapping[str, np.ndarray], folder: Path, title: str
) -> None:
    write_json([result.model_dump(mode="json") for result in results], folder / RESULTS)
    (folder / "comparison_table.csv").write_text(csv_text(results), encoding="utf-8")
    (folder / "comparison_report.md").write_text(markdown_table(results), encoding="utf-8")
    write_report(results, samples, folder / REPORT, title=title)
