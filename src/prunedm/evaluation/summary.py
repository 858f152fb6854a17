"""evaluation_summary.md and comparison_report.md: the results in words and tables."""

from collections.abc import Sequence

from prunedm.evaluation.metric import Metric
from prunedm.evaluation.paired import WINDOW, window_for
from prunedm.evaluation.results import EMA, Asked, Evaluation, StepResult, Timing
from prunedm.evaluation.speed import WARMUP
from prunedm.evaluation.table import header, markdown_table, measured, warnings
from prunedm.system.neighbours import disturbance


def comparison_text(rows: Sequence[Evaluation]) -> str:
    """The table, what its columns mean, and what in it does not compare."""
    parts = ["# Comparison", "", markdown_table(rows)]
    parts += [_meaning(column, rows) for column in measured(rows)]
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
    """Table, asked beside got, timings, conditions; the last line names what failed, if anything.

    `notes` go with the conditions; empty ones are left out.
    """
    parts = [f"# {title}", "", markdown_table(rows)]
    parts += _section("Asked and got", _asked_lines(rows))
    parts += _section("Against the dense model, on the same problems", _change_lines(rows))
    parts += _section("Timings", _timing_lines(rows))
    conditions = [*_condition_lines(rows), *(f"* {note}" for note in notes if note)]
    parts += _section("Conditions", conditions)
    skipped = [s for s in steps if s.status == "skipped"]
    parts += _section("Skipped", [f"* {_named(s)}: {s.error}" for s in skipped])
    last = f"All {len(steps)} steps done."
    if failures:
        again = "The same command with --overwrite measures again."
        last = f"Failed: {'; '.join(failures)}. {again}"
    if skipped and not failures:
        last = f"{len(steps) - len(skipped)} steps done, {len(skipped)} skipped, none failed."
    return "\n".join([*parts, "", last]) + "\n"


def _meaning(column: Metric, rows: Sequence[Evaluation]) -> str:
    return f"* **{header(column, rows)}**: {column.meaning}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _asked_lines(rows: Sequence[Evaluation]) -> list[str]:
    """Every pruning once, with the label of the first row that has it."""
    seen: dict[str, str] = {}
    for row in rows:
        for asked in row.asked:
            seen.setdefault(_asked(asked), row.label)
    return [f"* {label}: {text}" for text, label in seen.items()]


def _asked(asked: Asked) -> str:
    wanted, got = (f"{v:.4g}" if isinstance(v, float) else v for v in (asked.asked, asked.got))
    return f"{asked.what} {wanted} asked, {got} got" + (
        f" ({asked.reason})" if asked.reason else ""
    )


def _change_lines(rows: Sequence[Evaluation]) -> list[str]:
    lines = []
    for row in rows[1:]:
        change, error = row.figures.loss_change, row.figures.loss_change_se
        if change is not None:
            spread = "" if error is None else f" ± {error:.5f}"
            lines.append(f"* {row.label}: loss {change:+.5f}{spread}")
    return lines


def _timing_lines(rows: Sequence[Evaluation]) -> list[str]:
    lines = [
        "| model | batch | type | threads | compiled | kernel | ms | images/s |",
        "| --- | ---: | --- | ---: | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        lines += [_timing(row.label, timing) for timing in row.figures.timings]
    return lines if len(lines) > 2 else []


def _timing(label: str, t: Timing) -> str:
    cells = (
        label, t.batch, t.dtype, t.threads, "yes" if t.compiled else "no", t.kernel,
        f"{t.median_ms:.2f} ± {t.spread_ms:.2f}", f"{t.images_per_s:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _disturbed(row: Evaluation) -> str:
    said = disturbance(max((t.others for t in row.figures.timings), default=0.0))
    return f"; {said}" if said else ""


def _condition_lines(rows: Sequence[Evaluation]) -> list[str]:
    """Of the last model, which was measured deepest; `warnings` says where others differ."""
    c, row = rows[-1].conditions, rows[-1]
    lines = [
        f"* loss: {c.problems} held-out problems of {c.dataset}, seed {c.seed}; ± is one standard "
        f"error over antithetic pairs{_model(row)}",
        f"* latency: one denoiser call, median of {c.latency_repeats} after {WARMUP} to warm up, ± "
        f"half the distance between the quartiles; {c.device}, {c.dtype}{_threads(row)}"
        f"{_disturbed(row)}",
    ]
    if row.samples_file:
        spacing = f", {c.spacing} timesteps" if c.spacing else ""
        lines.insert(
            1,
            f"* samples: {c.samples} by {c.sampler}{spacing}, seed {c.seed}, the same noise for all",
        )
    if row.figures.fd is not None:
        lines.insert(
            2,
            f"* {c.features}: against {c.reference} held-out images; ± by bootstrap over the samples",
        )
    if row.figures.peak_memory_batch is not None:
        lines.append(f"* peak memory: one call at batch {row.figures.peak_memory_batch}")
    for e in rows:
        state = {True: "gives the same output to the bit", False: "DIFFERS", None: "not checked"}
        lines.append(f"* {e.label}: {_weights(e)}; loaded again {state[e.reloads]}")
    return lines + [f"* {line}" for line in warnings(rows)]


def _model(row: Evaluation) -> str:
    """What the denoiser gives, and on which noise schedule."""
    c = row.conditions
    return f"; predicts {c.prediction}, noise {c.schedule}" if c.prediction else ""


def _threads(row: Evaluation) -> str:
    # the name of a processor has them already
    threads = row.conditions.threads
    return f", {threads} threads" if threads and "threads" not in row.conditions.device else ""


def _weights(row: Evaluation) -> str:
    """Whether the weights are an average over training."""
    kind = row.conditions.weights
    if kind.startswith(EMA):
        return f"averaged weights (EMA), decay {kind.removeprefix(EMA)}"
    return f"weights {kind or 'as they came'}"


def ssim_note(size: tuple[int, ...]) -> str:
    """What to know about SSIM on small images; "" on others."""
    window = window_for(size)
    small = f"SSIM: windows of {window} pixels, as images of {size[0]}x{size[1]} have no {WINDOW}"
    return small if window < WINDOW else ""


def _named(step: StepResult) -> str:
    return f"{step.model}: {step.step}" if step.model else step.step
