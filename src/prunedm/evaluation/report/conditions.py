"""The conditions that the figures hold under, in sentences."""

from collections.abc import Sequence

from markupsafe import Markup

from prunedm.evaluation import table
from prunedm.evaluation.report.figures import header
from prunedm.evaluation.report.words import Words, text, translated
from prunedm.evaluation.results import EMA, Evaluation
from prunedm.system.neighbours import disturbance
from prunedm.tables import METRICS


def conditions_in_words(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[Words]]]:
    """Labels and sentences: first ("" for the labels) what holds for all, then what differs.

    Models of equal conditions share their sentences.
    """
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        # weights may differ within a group: they have sentences of their own
        groups.setdefault(e.conditions.model_dump_json(exclude={"weights"}), []).append(e)
    told = [(", ".join(e.label for e in group), _sentences(group)) for group in groups.values()]
    first, *others = (sentences for _, sentences in told)
    common = [s for s in first if all(s in sentences for sentences in others)]
    own = [(labels, [s for s in sentences if s not in common]) for labels, sentences in told]
    return [
        ("", [*common, *_weights(evaluations)]),
        *((labels, sentences) for labels, sentences in own if sentences),
    ]


def _sentences(group: Sequence[Evaluation]) -> list[Words]:
    """Those of every metric that was measured, the group's own, and which metrics are missing."""
    figures = {name: value for e in group for name, value in e.figures if value is not None}
    values = figures | group[0].conditions.model_dump()
    known = [c for c in table.metrics(group) if any(table.known(c, e) for e in group)]
    drawn = any("sampler" in column.same for column in known)
    wanted = {
        "samples": drawn or any(e.samples_file for e in group),
        "spacing": drawn and values["spacing"],
        "model": values["prediction"],
        "device": True,
        "threads": values["threads"] and " threads" not in values["device"],
    }
    return [
        *(translated(f"metric.{c.key}.conditions", c.conditions, **values)
          for c in known if c.conditions),
        *(text(f"conditions.{key}", **values) for key, is_told in wanted.items() if is_told),
        *_disturbed(group),
        *_missing(group),
    ]  # fmt: skip


def _disturbed(group: Sequence[Evaluation]) -> list[Words]:
    others = max((t.others for e in group for t in e.figures.timings), default=0.0)
    return [text("conditions.disturbed", others=f"{others:.0%}")] if disturbance(others) else []


def _weights(group: Sequence[Evaluation]) -> list[Words]:
    """Whether weights were averaged in training, for models whose record tells."""
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


def _missing(group: Sequence[Evaluation]) -> list[Words]:
    names = [
        header(column, group)
        for column in METRICS.values()
        # a model without masks has no N:M groups to check, and only texts have windows
        if column.key not in ("nm_valid", "perplexity_strided")
        and column.of in ("", group[0].conditions.kind)
        and not any(table.known(column, e) for e in group)
    ]
    english = Markup(", ").join(name.english for name in names)
    chinese = Markup("、").join(name.chinese for name in names)
    return [text("conditions.missing", names=Words.of(english, chinese))] if names else []
