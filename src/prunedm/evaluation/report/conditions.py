"""Under which conditions the figures hold, in words."""

from collections.abc import Sequence

from markupsafe import Markup

from prunedm.evaluation import table
from prunedm.evaluation.report.figures import header
from prunedm.evaluation.report.words import text
from prunedm.evaluation.results import EMA, Evaluation
from prunedm.system.neighbours import disturbance
from prunedm.tables import METRICS

_OPTIONAL = ("fd", "psnr_db", "latency_ms")  # figures with a sentence of their own


def conditions_in_words(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Markup]]]:
    """Labels and sentences; models of one set of conditions share the words."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        # how weights came to be is each model's own
        groups.setdefault(e.conditions.model_dump_json(exclude={"weights"}), []).append(e)
    return [(", ".join(e.label for e in group), _sentences(group)) for group in groups.values()]


def _sentences(group: Sequence[Evaluation]) -> list[Markup]:
    """A sentence for every figure that was measured, and which were not."""
    values = group[0].conditions.model_dump()
    missing = {c.key for c in METRICS.values() if not any(table.known(c, e) for e in group)}
    missing -= {"nm_valid"}  # a model without masks has none to check
    names = [header(column, group) for column in METRICS.values() if column.key in missing]
    drawn = not {"fd", "psnr_db"} <= missing
    return [
        text("conditions.loss", **values),
        *([text("conditions.model", **values)] if values["prediction"] else []),
        *_weights(group),
        *(text(f"conditions.{key}", **values) for key in _OPTIONAL if key not in missing),
        *_disturbed(group),
        *([text("conditions.spacing", **values)] if drawn and values["spacing"] else []),
        text("conditions.size"),
        text("conditions.device", **values),
        *([text("conditions.threads", **values)] if values["threads"] else []),
        *(
            [
                text(
                    "conditions.missing",
                    english=Markup(", ").join(names),
                    chinese=Markup("、").join(names),
                )
            ]
            if names
            else []
        ),
    ]


def _disturbed(group: Sequence[Evaluation]) -> list[Markup]:
    others = max((t.others for e in group for t in e.figures.timings), default=0.0)
    return [text("conditions.disturbed", others=f"{others:.0%}")] if disturbance(others) else []


def _weights(group: Sequence[Evaluation]) -> list[Markup]:
    """What the weights are, of models that are the same in it; nothing where no record tells."""
    found: dict[str, list[str]] = {}
    for e in group:
        found.setdefault(e.conditions.weights, []).append(e.label)
    return [
        text(
            f"conditions.weights.{'ema' if kind.startswith(EMA) else 'last'}",
            labels=", ".join(labels),
            decay=kind.removeprefix(EMA),
        )
        for kind, labels in found.items()
        if kind
    ]
