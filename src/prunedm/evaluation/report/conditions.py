"""Under which conditions the figures hold, in words."""

from collections.abc import Sequence

from markupsafe import Markup

from prunedm.evaluation.columns import COLUMNS
from prunedm.evaluation.report.figures import figure, header
from prunedm.evaluation.report.words import text
from prunedm.evaluation.results import Evaluation

_OPTIONAL = ("fd", "psnr_db", "latency_ms")  # figures with a sentence of their own


def conditions_in_words(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Markup]]]:
    """Labels and sentences; models of one set of conditions share the words."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        groups.setdefault(e.conditions.model_dump_json(), []).append(e)
    return [(", ".join(e.label for e in group), _sentences(group)) for group in groups.values()]


def _sentences(group: Sequence[Evaluation]) -> list[Markup]:
    """A sentence for every figure that was measured, and which were not."""
    values = group[0].conditions.model_dump()
    missing = {c.key for c in COLUMNS if all(figure(e, c.key) is None for e in group)}
    missing -= {"nm_valid"}  # a model without masks has none to check
    names = [header(column, group) for column in COLUMNS if column.key in missing]
    return [
        text("conditions.loss", **values),
        *(text(f"conditions.{key}", **values) for key in _OPTIONAL if key not in missing),
        text("conditions.size"),
        text("conditions.device", **values),
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
