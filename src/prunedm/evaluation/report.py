"""report.html: the whole result on one page that needs neither network nor scripts."""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from prunedm.errors import UserError
from prunedm.evaluation import table
from prunedm.evaluation.pictures import Curve, curve_of, data_uri, grid, loss_curves
from prunedm.evaluation.results import Evaluation
from prunedm.record import Record

SHOWN = 36  # samples of each model
_SHEET = 300  # pixels: how wide a sheet of samples is drawn, at least
_SMALL = 96  # pixels: images up to here are enlarged pixel by pixel
_KEY_FIGURES = ("params", "bytes_packed", "macs", "fd", "loss")


def write_report(
    evaluations: Sequence[Evaluation],
    samples: Mapping[str, np.ndarray],
    path: Path,
    *,
    title: str,
) -> Path:
    """Write one self-contained HTML file; the first evaluation is the dense model.

    `samples` holds uint8 NHWC images by label, image i of every model from the same noise; it may
    lack models. Replaces `path`.
    """
    if not evaluations:
        raise UserError("a report needs at least one evaluated model")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("prunedm.evaluation").joinpath("report.html.j2")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    path.write_text(template.render(page(evaluations, samples, title=title)), encoding="utf-8")
    return path


def page(
    evaluations: Sequence[Evaluation], samples: Mapping[str, np.ndarray], *, title: str
) -> dict[str, Any]:
    """Everything the template shows, in the page's order."""
    dense, curves = evaluations[0], training_curves(evaluations)
    drawn = loss_curves(curves, dense=dense.figures.loss)
    return {
        "title": title,
        "version": metadata.version("prunedm"),
        "labels": [e.label for e in evaluations],
        "key_figures": key_figures(evaluations),
        "columns": table.COLUMNS,
        "headers": table.headers(evaluations),
        "rows": [(e, [table.cell(c, e, dense) for c in table.COLUMNS]) for e in evaluations],
        "warnings": table.warnings(evaluations),
        "sheets": sheets(evaluations, samples),
        "curves": [
            (c, Markup(svg)) for c, svg in zip(curves, drawn, strict=True) if svg
        ],  # numbers only
        "dense_loss": f"{dense.figures.loss:.4f}",
        "stages": [(record, label, _fields(record)) for record, label in lineage_of(evaluations)],
        "foreign": [e.label for e in evaluations if e.record is None],
        "conditions": conditions_in_words(evaluations),
        "left_dense": left_dense(evaluations),
    }


def key_figures(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """The headline: four figures of the last model, with their change to dense."""
    dense, last = evaluations[0], evaluations[-1]
    columns = {column.key: column for column in table.COLUMNS}
    tiles = []
    for column in map(columns.__getitem__, _KEY_FIGURES):
        now, before = (str(table.cell(column, e, e).figure) for e in (last, dense))
        shown = table.cell(column, last, dense)
        if now != table.NONE:
            story = f"{before} → {shown.figure}" if shown.change else ""
            tiles.append(
                {
                    "name": table.header(column, evaluations),
                    "big": shown.change or shown.value,
                    "story": story or (f"± {shown.spread}" if shown.spread else ""),
                    "tone": shown.tone,
                }
            )
    return tiles[:4]


def sheets(
    evaluations: Sequence[Evaluation], samples: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The same samples of every model that has some, as pictures inside the page."""
    unknown = samples.keys() - {e.label for e in evaluations}
    if unknown:
        raise UserError(f"samples of {sorted(unknown)}, which no evaluation describes")
    return [_sheet(e.label, samples[e.label]) for e in evaluations if e.label in samples]


def _sheet(label: str, images_NHWC: np.ndarray) -> dict[str, Any]:
    shown = images_NHWC[:SHOWN]
    picture = grid(shown, max(1, round(len(shown) ** 0.5)))
    small = max(images_NHWC.shape[1:3]) <= _SMALL
    # whole multiples only, else some pixels would be wider than others
    zoom = max(1, -(-_SHEET // picture.width)) if small else 1
    counts = {"shown": len(shown), "all": len(images_NHWC)}
    width = min(picture.width * zoom, 640)
    return {"label": label, "uri": data_uri(picture), "small": small, "width": width} | counts


def training_curves(evaluations: Sequence[Evaluation]) -> list[Curve]:
    """The training of each stage that has kept its losses."""
    return [
        curve_of(e.label, e.curve.get("losses", ()), e.curve.get("held_out", ()))
        for e in evaluations
        if e.curve.get("losses") or e.curve.get("held_out")
    ]


def lineage_of(evaluations: Sequence[Evaluation]) -> list[tuple[Record, list[str]]]:
    """Every stage on the way to these models, once, with the labels of the models it made."""
    known: list[tuple[Record, list[str]]] = []
    for e in evaluations:
        for record in e.record.lineage() if e.record else []:
            found = [entry for entry in known if _same(entry[0], record)]
            labels = found[0][1] if found else []
            if not found:
                known.append((record, labels))
            if record is e.record:
                labels.append(e.label)
    return known


def _same(one: Record, other: Record) -> bool:
    return one.identity == other.identity and one.created == other.created


def _fields(record: Record) -> dict[str, dict[str, str]]:
    """A record as text: what its <details> list."""
    inputs = {role: f"{source.path}  {source.hash}" for role, source in record.inputs.items()}
    run = {
        "seed": "none" if record.seed is None else str(record.seed),
        "device": record.device or "not recorded",
        "wall time": duration(record.wall_time_s),
        "created": record.created or "not recorded",
    }
    groups = {
        "run": run,
        "inputs": inputs,
        "options": {name: _brief(value) for name, value in record.options.items()},
        "figures": {name: _brief(value) for name, value in record.figures.items()},
        "versions": record.versions,
    }
    return {name: values for name, values in groups.items() if values}


def _brief(value: Any) -> str:
    """A value as JSON; long lists and tables by their length, the record itself has them whole."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, dict)) and len(value) > 12:
        return f"({len(value)} entries in record.json)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """ "48 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def conditions_in_words(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """Under which conditions the figures hold; models of one set of conditions share the words."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        groups.setdefault(e.conditions.model_dump_json(), []).append(e)
    return [(", ".join(e.label for e in group), _sentences(group)) for group in groups.values()]


def _sentences(group: Sequence[Evaluation]) -> list[str]:
    """A sentence for every figure that was measured, and which were not."""
    c = group[0].conditions
    optional = {
        "fd": f"{c.features}: {c.samples} samples by {c.sampler} from seed {c.seed}, against "
        f"{c.reference} held-out images. FD is biased at small n; it is comparable only at equal "
        "n and features.",
        "psnr_db": f"PSNR: images of the same {c.samples} noises by {c.sampler}, against the dense "
        "model's; the median.",
        "latency_ms": f"Latency: one denoiser call with a batch of {c.latency_batch} in {c.dtype} "
        f"on {c.device}; the median, ± half the distance between the quartiles. Other work on the "
        "machine counts.",
    }
    missing = [key for key in optional if all(getattr(e.figures, key) is None for e in group)]
    names = [column.header.split()[0] for column in table.COLUMNS if column.key in missing]
    return [
        f"Loss: {c.problems} held-out denoising problems of {c.dataset}, drawn with seed {c.seed}; "
        "the same images, timesteps and noise for every model. The ± is one standard error.",
        *(sentence for key, sentence in optional.items() if key not in missing),
        "Packed: weights in half precision; layers with N:M masks as their kept values and one bit "
        "a weight. MACs: of one image through the denoiser once, attention included.",
        f"Device: {c.device}. Type: {c.dtype}.",
        *([f"Not measured: {', '.join(names)}."] if names else []),
    ]


def left_dense(evaluations: Sequence[Evaluation]) -> list[tuple[str, dict[str, list[str]]]]:
    """Labels, then reason -> layers; models that leave the same layers dense share an entry."""
    groups: dict[str, tuple[Evaluation, list[str]]] = {}
    for e in evaluations:
        if e.figures.nm_dense:
            key = json.dumps(e.figures.nm_dense, sort_keys=True)
            groups.setdefault(key, (e, []))[1].append(e.label)
    return [(", ".join(labels), _by_reason(e.figures.nm_dense)) for e, labels in groups.values()]


def _by_reason(layers: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for layer, reason in layers.items():
        reasons.setdefault(reason, []).append(layer)
    return reasons
