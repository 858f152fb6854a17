"""evaluation_summary.md and comparison_report.md: the results in words and tables."""

from collections.abc import Sequence

from prunedm.evaluation.report.checks import Check, check_lines
from prunedm.evaluation.report.conditions import conditions_in_words
from prunedm.evaluation.report.words import WORDS
from prunedm.evaluation.results import Evaluation, StepResult
from prunedm.evaluation.table import NONE, header, markdown, markdown_table, measured, warnings


def comparison_text(rows: Sequence[Evaluation]) -> str:
    """The table, what its columns mean, and which of its figures do not compare."""
    parts = ["# Comparison", "", markdown_table(rows)]
    parts += [f"* **{header(column, rows)}**: {column.meaning}" for column in measured(rows)]
    parts += ["", *(f"* {line}" for line in warnings(rows))]
    return "\n".join(parts).rstrip() + "\n"


def summary_text(
    title: str,
    rows: Sequence[Evaluation],
    steps: Sequence[StepResult],
    failures: Sequence[str],
    *,
    notes: Sequence[str] = (),
) -> str:
    """Table, checks, timings, conditions with `notes`; the last line names what failed, if anything."""
    parts = [f"# {title}", "", markdown_table(rows)]
    parts += _section("Checks", _checks(rows))
    parts += _section("Timings", _timings(rows))
    conditions = [*_conditions(rows), *notes, *warnings(rows)]
    parts += _section("Conditions", [f"* {line}" for line in conditions])
    skipped = [s for s in steps if s.status == "skipped"]
    parts += _section("Skipped", [f"* {_named(s)}: {s.error}" for s in skipped])
    last = f"All {len(steps)} steps done."
    if failures:
        again = "The same command with --overwrite measures again."
        last = f"Failed: {'; '.join(failures)}. {again}"
    elif skipped:
        last = f"{len(steps) - len(skipped)} steps done, {len(skipped)} skipped, none failed."
    return "\n".join([*parts, "", last]) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _checks(rows: Sequence[Evaluation]) -> list[str]:
    checks = check_lines(rows)
    keys = ("model", "checks.loss", "checks.reload", "checks.asked")
    head = [WORDS["en"][key] for key in keys]
    return [markdown(head, [_check(check) for check in checks], words=head[2:])] if checks else []


def _check(check: Check) -> list[str]:
    asked = [
        f"{asked.what} {' → '.join(asked.texts)}" + f" ({asked.reason})" * bool(asked.reason)
        for asked in check.asked
    ]
    reload = check.reload.english if check.reload else "not checked"
    return [check.label, check.change or NONE, reload, ", ".join(asked) or NONE]


def _timings(rows: Sequence[Evaluation]) -> list[str]:
    rate = "sequences/s" if rows[-1].conditions.kind == "texts" else "images/s"
    head = ["model", "batch", "type", "threads", "compiled", "kernel", "ms", rate]
    body = [
        [
            row.label, t.batch, t.dtype, t.threads, "yes" if t.compiled else "no", t.kernel,
            f"{t.median_ms:.2f} ± {t.spread_ms:.2f}", f"{t.images_per_s:.1f}",
        ]
        for row in rows
        for t in row.figures.timings
    ]  # fmt: skip
    return [markdown(head, body, words=("type", "compiled", "kernel"))] if body else []


def _conditions(rows: Sequence[Evaluation]) -> list[str]:
    return [
        f"{labels}: " * bool(labels) + sentence.english.unescape()
        for labels, sentences in conditions_in_words(rows)
        for sentence in sentences
    ]


def _named(step: StepResult) -> str:
    return f"{step.model}: {step.step}" if step.model else step.step
