"""report.html: the whole result on one self-contained page, in English and Chinese (`words`).

All data are escaped, and the page's content security policy forbids every request and every script
but the one inside it.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prunedm.errors import UserError
from prunedm.evaluation import table
from prunedm.evaluation.report.checks import check_lines
from prunedm.evaluation.report.conditions import conditions_in_words
from prunedm.evaluation.report.figures import header, key_figures, meaning, rows, warnings
from prunedm.evaluation.report.layers import layer_bars, left_dense
from prunedm.evaluation.report.plots import Curve, curve_of, loss_curves, panels
from prunedm.evaluation.report.samples import GAP, sheets
from prunedm.evaluation.report.stages import failures, timeline, total_time
from prunedm.evaluation.report.timings import timing_blocks
from prunedm.evaluation.report.words import attribute, text
from prunedm.evaluation.results import Evaluation


def write_report(
    evaluations: Sequence[Evaluation],
    samples: Mapping[str, np.ndarray],
    path: Path,
    *,
    title: str,
) -> Path:
    """Write one self-contained HTML file; the first evaluation is the dense model.

    `samples` holds uint8 NHWC images by label, image i of every model from the same noise; some
    models may have none. Replaces `path`.
    """
    if not evaluations:
        raise UserError("a report needs at least one evaluated model")
    template = report_environment().get_template("page.html.j2")
    path.write_text(template.render(page(evaluations, samples, title=title)), encoding="utf-8")
    return path


def report_environment(*more: BaseLoader) -> Environment:
    """The page's template environment; templates are looked up in `more` first."""
    environment = Environment(
        loader=ChoiceLoader([*more, PackageLoader("prunedm.evaluation.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"text": text, "attribute": attribute, "own": _own(environment)}
    return environment


def page(
    evaluations: Sequence[Evaluation], samples: Mapping[str, np.ndarray], *, title: str
) -> dict[str, Any]:
    """Everything the template shows, in the page's order."""
    dense_loss, curves = evaluations[0].figures.loss, training_curves(evaluations)
    drawn = zip(curves, loss_curves(curves, dense=dense_loss), strict=True)
    quality = header(table.quality(evaluations), evaluations)
    return {
        "title": title,
        "version": metadata.version("prunedm"),
        "labels": [e.label for e in evaluations],
        "key_figures": key_figures(evaluations),
        "columns": [(c, header(c, evaluations), meaning(c)) for c in table.measured(evaluations)],
        "rows": rows(evaluations),
        "warnings": warnings(evaluations),
        "checks": check_lines(evaluations),
        "sheets": sheets(evaluations, samples),
        "gap": GAP,
        "quality": quality,
        "panels": panels(evaluations, quality),
        "bars": layer_bars(evaluations),
        "timings": timing_blocks(evaluations),
        "curves": [(curve, svg) for curve, svg in drawn if svg],
        "dense_loss": "" if dense_loss is None else f"{dense_loss:.4f}",
        "stages": timeline(evaluations),
        "total_time": total_time(evaluations),
        "failures": failures(evaluations),
        "foreign": [e.label for e in evaluations if e.record is None],
        "conditions": conditions_in_words(evaluations),
        "left_dense": left_dense(evaluations),
    }


def training_curves(evaluations: Sequence[Evaluation]) -> list[Curve]:
    """The training of each stage that kept its losses."""
    return [
        curve_of(e.label, e.curve.get("losses", ()), e.curve.get("held_out", ()))
        for e in evaluations
        if e.curve.get("losses") or e.curve.get("held_out")
    ]


def _own(environment: Environment) -> dict[str, Markup]:
    """The page's style and script, and the script's hash for the policy."""
    assert environment.loader
    style, script = (
        Markup(environment.loader.get_source(environment, name)[0])
        for name in ("style.css", "script.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return {"style": style, "script": script, "script_hash": Markup(f"sha256-{digest}")}
