"""The section of `docs/results.md` that `pruning.py` writes."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunedm.neighbours import Neighbours, disturbance

DOCS = Path(__file__).parent.parent / "docs" / "results.md"
Row = dict[str, Any]


def markdown(
    result: Row,
    *,
    conditions: str,
    scores: Sequence[str],
    alike: dict[str, str],
    settings: Sequence[str],
    more: dict[str, list[str]],
) -> str:
    """All tables. `more`: titles of further tables, and the labels of their rows.

    `alike`: scores whose masks are those of another.
    """
    rows = {row["key"]: row for row in result["rows"]}
    dense = rows["dense"]
    table = [
        f"| {score} | "
        + " | ".join(
            _cell(rows.get(f"{score} / {setting}"), f"as {alike[score]}" if score in alike else "–")
            for setting in settings
        )
        + " |"
        for score in scores
    ]
    head = "| score | " + " | ".join(settings) + " |\n|---|" + "---:|" * len(settings)
    parts = [
        f"```\n{result['command']}\n```",
        f"Dense: {_cell(dense)}. A cell is {conditions}, before any fine-tuning; "
        f"{result['device']}. Data: `benchmarks/results/{result['name']}.json`.",
        "\n".join([head, *table]),
    ]
    gap = {s: rows[f"{s} / 2:4"]["loss"] - dense["loss"] for s in ("obs", "wanda", "magnitude")}
    parts.append(
        f"At 2:4 OBS loses {gap['obs'] / gap['wanda']:.2f}x of what Wanda loses over dense "
        f"({gap['obs']:.4f} against {gap['wanda']:.4f}; magnitude {gap['magnitude']:.4f})."
    )
    for title, labels in more.items():
        body = "\n".join(
            f"| {label} | {_cell(rows[f'{title} / {label}'])} | "
            f"{rows[f'{title} / {label}']['macs'] / 1e6:.0f}M |"
            for label in labels
        )
        parts.append(f"{title}:\n\n| | loss, FD | MACs |\n|---|---:|---:|\n{body}")
    parts.append(_latency_table(result["latency"]))
    kernel, memory = result["kernel"], result["calibration_memory_mb"]
    parts.append(
        f"A 2:4 mask for 36M weights takes {kernel['2:4 ratio']:.1f}x the time of one `torch.abs` and "
        f"copy over them (4:8: {kernel['4:8 ratio']:.1f}x). Peak memory of calibration: "
        + ", ".join(f"{mb:.0f} MB with {count} problems" for count, mb in memory.items())
        + "."
    )
    return "\n\n".join(parts)


def _cell(row: Row | None, missing: str = "–") -> str:
    if row is None:
        return missing
    return f"{row['loss']:.4f} ± {row['loss_se']:.4f}, {row['fd']:.0f}"


def _latency_table(rows: Sequence[Row]) -> str:
    body = "\n".join(
        f"| {r['target']}, round to {r['round_to']} | −{r['macs_removed']:.1%} | "
        f"{r['dense_ms']:.1f} => {r['latency_ms']:.1f} ± {r['spread_ms']:.1f} ms | "
        f"−{r['latency_removed']:.1%} | {r['ratio']:.2f} |"
        for r in rows
    )
    head = "| channels | MACs | latency, batch 16 | change | latency / MACs |"
    return (
        "Real speed, eager float32, timed in turns with dense:\n\n"
        f"{head}\n|---|---:|---:|---:|---:|\n{body}"
    )


def command_line() -> str:
    """What made a section, to be pasted into a shell."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


NEIGHBOURS = Neighbours()  # since the benchmark's start


def into_docs(name: str, body: str) -> None:
    """Replace the section between the two markers of this name; a busy machine is named in it."""
    disturbed = disturbance(NEIGHBOURS.share)
    body += f"\n\n*Disturbed: {disturbed}.*" * bool(disturbed)
    text = DOCS.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"docs/results.md has no section {name}"
    DOCS.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text), encoding="utf-8")
