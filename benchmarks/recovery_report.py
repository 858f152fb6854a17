"""The section of `docs/results.md` that `recovery.py` writes."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
DATA = "data loss alone"


def markdown(result: Row, *, samples: str, features: str) -> str:
    """Contest, control, goals."""
    parts = [
        f"```\n{result['command']}\n```",
        f"{result['device']}. Data: `benchmarks/results/{result['name']}.json`.",
        _contest(result, samples, features),
        _control(result),
    ]
    return "\n\n".join([*parts, *([_goals(result)] if result["goals"] else [])])


def _contest(result: Row, samples: str, features: str) -> str:
    rows, dense, lines = result["contest"], result["dense"], []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        mixtures = {m: [r for r in own if r["mixture"] == m] for m in _names(own)}
        # the learning rate that suits the data loss best is its own
        data = [m for m in mixtures if m.startswith(DATA)]
        seeds = max(len(mixtures[m]) for m in data)
        alone = min((m for m in data if len(mixtures[m]) == seeds), key=lambda m: _gap(mixtures[m]))
        lines += [_line(kind, mixtures[m], mixtures[alone]) for m in mixtures]
    return (
        f"Fine-tuning for {result['seconds']:.0f} s by every mixture, from the same start; mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}. The gap is the loss less the dense model's on the same problems:\n\n"
        "| pruning | matched | seeds | step | steps | wall time | loss before | loss after | gap left "
        "| to the best of data alone | FD |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["mixture"] for row in rows))


def _gap(rows: Sequence[Row]) -> float:
    return _mean(rows, "gap")


def _line(kind: str, own: Sequence[Row], alone: Sequence[Row]) -> str:
    gap, others = _gap(own), {row["seed"]: row["gap"] for row in alone}
    # where the data loss alone reaches the dense loss, there is no gap to compare with
    comparable = all(value > 0 for value in others.values())
    ratios = [{"ratio": row["gap"] / others[row["seed"]]} for row in own] if comparable else []
    ratio = f"{_mean(ratios, 'ratio'):.2f}x{_spread(ratios, 'ratio', 2)}" if ratios else "–"
    return (
        f"| {kind} | {own[0]['mixture']} | {len(own)} | {1000 * _mean(own, 'step_s'):.0f} ms | "
        f"{_mean(own, 'steps'):.0f} | {_mean(own, 'seconds'):.0f} s | {_mean(own, 'start'):.4f} | "
        f"{_mean(own, 'loss'):.5f}{_spread(own, 'loss', 5)} | {gap:+.5f}{_spread(own, 'gap', 5)} | "
        f"**{ratio}** | {_mean(own, 'fd'):.1f}{_spread(own, 'fd', 1)} |"
    )


def _control(result: Row) -> str:
    row, dense = result["control"], result["dense"]
    return (
        f"Control: the dense model itself, trained on by the data loss for {result['seconds']:.0f} s, "
        f"ends at {row['loss']:.5f} ({row['gap'] / dense['loss']:+.1%}; gap {row['gap']:+.5f} ± "
        f"{row['gap_se']:.5f})."
    )


def _goals(result: Row) -> str:
    dense = result["dense"]
    lines = [
        f"| {row['kind']} | {row['mixture']} | {row['seconds'] / 60:.1f} min | {row['steps']:,} | "
        f"{row['loss']:.5f} | **{row['over']:+.1%}** | {row['fd']:.1f} "
        f"({row['fd'] / dense['fd'] - 1:+.0%}) |"
        for row in result["goals"]
    ]
    return (
        f"From the dense model to the end within {result['goal_seconds'] / 60:.0f} minutes "
        "(goals: 2:4 within 1 % of the dense loss; 2:4 on 30 % fewer parameters within 5 % of loss "
        "and FD):\n\n"
        "| pruning | matched | wall time | last steps | loss | to dense | FD |\n"
        "|---|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _spread(rows: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in rows]
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
