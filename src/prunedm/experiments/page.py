"""sweep.html: all runs on one self-contained page: table, Pareto front, samples, failures."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader

from prunedm.errors import masked
from prunedm.evaluation.report import page as figures_page
from prunedm.evaluation.report import report_environment
from prunedm.evaluation.report.plots import panels
from prunedm.evaluation.report.words import text
from prunedm.evaluation.results import Evaluation
from prunedm.experiments.plan import Sweep, case_of
from prunedm.experiments.results import Row, evaluation_of
from prunedm.experiments.store import Store, own_name
from prunedm.experiments.workers import log_tail
from prunedm.record import read_record, replace_text
from prunedm.stages.evaluating.measure import SAMPLES, read_images
from prunedm.tables import METRICS

FILE = "sweep.html"
SHOWN = 12  # runs whose samples are shown, the Pareto front first
_PARTS = ("quality", "sheets", "gap", "rows", "columns", "labels", "warnings", "conditions")


def write_page(rows: Sequence[Row], plan: Sweep, out: Path) -> Path:
    """Write OUT/sweep.html, replacing an older one."""
    environment = report_environment(PackageLoader("prunedm.experiments"))
    drawn = environment.get_template("sweep.html.j2").render(page(rows, plan, out))
    replace_text(out / FILE, masked(drawn), own_name(out / FILE))
    return out / FILE


def page(rows: Sequence[Row], plan: Sweep, out: Path) -> dict[str, Any]:
    """Everything the template shows."""
    store = Store(out)
    figures = _figures(rows, store, f"prunedm sweep: {out.resolve().name}")
    fields, model = ", ".join(plan.fields()), Path(case_of(plan, {}).recipe.model).name
    return figures | {
        "lead": text("sweep.lead", model=model, count=len(rows), fields=fields),
        "tiles": _tiles(rows, plan, store),
        "directions": ", ".join(f"{name}: {way}" for name, way in plan.objectives.items()),
        "objectives": [
            {"header": header_of(name), "arrow": {"minimize": " ↓"}.get(way, " ↑")}
            for name, way in plan.objectives.items()
        ],
        "table": [_line(number, row, plan) for number, row in enumerate(rows, start=1)],
        "broken": [
            {"label": r.label, "error": r.status.error, "tail": log_tail(store.log(r.run.id))}
            for r in rows
            if r.status.state == "failed" and r.run
        ],
    }


def _figures(rows: Sequence[Row], store: Store, title: str) -> dict[str, Any]:
    """The parts that the page shares with a report; empty where no run is measured yet."""
    measured = [row for row in rows if row.evaluation is not None]
    known = (evaluation_of(store, row.run.dense, "dense") for row in measured if row.run)
    dense = next(filter(None, known), None)
    common = {"title": title, "version": metadata.version("prunedm")}
    if dense is None:
        return common | {key: [] for key in ("panels", *_PARTS)}
    evaluations: list[Evaluation] = [dense, *(row.evaluation for row in measured if row.evaluation)]
    shown = sorted(measured, key=lambda row: not row.best)[:SHOWN]
    folders = {row.label: row.run.evaluation for row in shown if row.run}
    folders["dense"] = next(row.run.dense for row in measured if row.run)
    samples = {label: read_images(store.stage(f) / SAMPLES) for label, f in folders.items()}
    whole = figures_page(
        evaluations, {k: v for k, v in samples.items() if v is not None}, title=title
    )
    numbered = [
        row.evaluation.model_copy(update={"label": str(number)})
        for number, row in enumerate(rows, start=1)
        if row.evaluation
    ]
    drawn = {"panels": panels([dense, *numbered], whole["quality"])}
    return common | {key: whole[key] for key in _PARTS} | drawn


def _tiles(rows: Sequence[Row], plan: Sweep, store: Store) -> list[dict[str, Any]]:
    states = [row.status.state for row in rows]
    others = ", ".join(
        f"{states.count(s)} {s}"
        for s in ("failed", "pruned", "stopped", "running", "waiting")
        if s in states
    )
    tiles = [
        {
            "name": text("sweep.tile.done"),
            "big": states.count("done"),
            "story": text(
                "sweep.tile.done.story", count=len(rows), others=others or text("sweep.tile.none")
            ),
        }
    ]
    for name, way in list(plan.objectives.items())[:2]:
        known = [row for row in rows if row.values[name] is not None]
        if known:
            best = sorted(known, key=lambda row: not row.best)  # among equals, one of the front
            pick = min if way == "minimize" else max
            chosen = pick(best, key=lambda row: row.values[name] or 0.0)
            tiles.append(
                {
                    "name": text("sweep.tile.best", name=header_of(name)),
                    "big": shown(name, chosen.values[name]),
                    "story": chosen.label,
                }
            )
    spent, alone = _seconds(rows, store)
    if spent:
        story = text("sweep.tile.time.story", alone=in_words(alone)) if alone > 1.05 * spent else ""
        tiles.append({"name": text("sweep.tile.time"), "big": in_words(spent), "story": story})
    return tiles


def _seconds(rows: Sequence[Row], store: Store) -> tuple[float, float]:
    """Seconds of all stages counted once each, and counted once per run."""
    once: dict[str, float] = {}
    alone = 0.0
    for row in rows:
        for stage in row.run.stages if row.run else []:
            record = read_record(store.stage(stage.folder))
            if record is not None:
                once[stage.folder] = record.wall_time_s
                alone += record.wall_time_s
    return sum(once.values()), alone


def _line(number: int, row: Row, plan: Sweep) -> dict[str, Any]:
    return {
        "number": number,
        "label": row.label,
        "best": row.best,
        "cells": [shown(name, row.values[name]) for name in plan.objectives],
        "state": text(f"sweep.state.{row.status.state}", stage=row.status.stage),
        "time": in_words(row.status.seconds) if row.status.seconds else "–",
        "folder": f"stages/{row.run.stages[-1].folder}" if row.run and row.run.stages else "–",
    }


def shown(name: str, value: float | None) -> str:
    """An objective's value as the other tables write it."""
    if value is None:
        return "–"
    if name.startswith("bytes"):
        return f"{value / 1e6:.3g} MB"
    if name in ("params", "nonzero", "macs"):
        return f"{value / 1e6:.3g}M"
    return in_words(value) if name == "seconds" else f"{value:.4g}"


def header_of(objective: str) -> str:
    """A metric's name in the tables; another objective's own."""
    return METRICS[objective].header if objective in METRICS else objective


def in_words(seconds: float) -> str:
    """ "34 s", "12 min", "3.4 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
