"""fid and stats: distances between two sets of images, and statistics of one set.

Neither writes a folder: `fid` returns figures, `stats` writes one file.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from prunedm.errors import UserError
from prunedm.evaluation.features import FeatureNetwork, extract, load_features
from prunedm.evaluation.fid import (
    Statistics,
    bootstrap_error,
    check_comparable,
    frechet_distance,
    statistics,
)
from prunedm.evaluation.image_source import Images, open_side
from prunedm.evaluation.kid import LEAST_IMAGES, kernel_distance, kernel_unit
from prunedm.evaluation.manifold import precision_recall, share_error
from prunedm.options import FidOptions, StatsOptions
from prunedm.progress import Progress, Silent
from prunedm.record import environment
from prunedm.stages import statistics_file
from prunedm.stages.inputs import device_for
from prunedm.stages.workplace import Workplace
from prunedm.system.places import target


@dataclass
class _Side:
    """One of the two sets: its statistics and, if given as images, its features (N, D)."""

    name: str
    statistics: Statistics
    features_ND: torch.Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    left_out: str = ""

    def figures(self) -> dict[str, Any]:
        """`images` is None and `features` "" where a statistics file does not name them."""
        stats_of = self.statistics
        return {
            "name": self.name,
            "kind": "statistics" if self.features_ND is None else "images",
            "images": stats_of.count or None,
            "features": stats_of.features,
            "dim": stats_of.dim,
            "biased": 0 < stats_of.count <= stats_of.dim,
            "skipped": self.skipped,
            "left_out": self.left_out,
        }


def fid(
    a: str,
    b: str,
    options: FidOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures of generated images `a` against real ones `b`; each may be given as statistics.

    Swapping them keeps the Fréchet distance and exchanges precision and recall. Raises `UserError`
    for sets that cannot be read or compared, and for too few images.
    """
    found = [_open(name, options) for name in (a, b)]
    network = None
    if any(isinstance(side, Images) for side in found):
        network = _network(options)
        _check_early(found, network, options)
    left, right = (
        _side(name, side, network, options, progress or Silent())
        for name, side in zip((a, b), found, strict=True)
    )
    sides = (left, right)
    check_comparable(left.statistics, right.statistics)
    for side in sides:
        _check_enough(side.name, side.statistics.count, left.statistics.dim, options.force)
    figures: dict[str, Any] = {
        "fd": frechet_distance(left.statistics, right.statistics, force=options.force),
        "fd_se": _distance_error(left, right, options),
        **_sample_figures(left, right, options),
    }
    a_figures, b_figures = left.figures(), right.figures()
    return figures | {
        "features": a_figures["features"] or b_figures["features"] or "FD",
        "dim": left.statistics.dim,
        "biased": a_figures["biased"] or b_figures["biased"],
        "a": a_figures,
        "b": b_figures,
        "notes": _comparison_notes(a_figures, b_figures),
        "options": options.model_dump(mode="json"),
        **environment(options.device),
    }


def stats(
    source: str,
    out: str | Path,
    options: StatsOptions,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write mean and covariance of the features of `source` to `out`, an .npz as pytorch-fid's.

    The file appears only when whole; one with the same images and options is not `made` again.
    Raises `UserError` where `out` holds anything else, unless `overwrite`, and for images that are
    too few or cannot be read.
    """
    out = check_file(out, ".npz", overwrite=True)
    found = _open(source, options)
    if isinstance(found, Statistics):
        raise UserError(f"{source!r} holds statistics already; give images")
    network = _network(options)
    _check_early([found], network, options)
    basis = statistics_file.made_of(options, network.name)
    kept = statistics_file.done_already(
        out, found, basis, batch_size=options.batch_size, overwrite=overwrite
    )
    content, place = statistics_file.Content(), Workplace.of(out)
    if kept is None:
        make_place(out)
        with place.held():
            if out.exists() and not overwrite:
                raise UserError(f"{out} was made by another command in the meantime; use that file")
            side = _side(source, found, network, options, progress or Silent(), content=content)
            _check_enough(source, side.statistics.count, side.statistics.dim, options.force)
            statistics_file.write(side.statistics, place, basis, content)
    else:
        place.tidy()
        side = _Side(source, kept, skipped=found.skipped)
    figures = side.figures() | {"kind": "images"}
    return figures | {"notes": _side_notes(figures), "made": kept is None}


def check_file(out: str | Path, suffix: str, *, overwrite: bool) -> Path:
    """`out` as a path. Raises `UserError` for another suffix, or where it may not be replaced."""
    out = target(out)
    if out.suffix != suffix:
        raise UserError(f"{str(out)!r} is not a {suffix} file; give a name that ends in {suffix}")
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists; give another file, or --overwrite")
    return out


def make_place(out: Path) -> None:
    """Make the folder of `out`; raises `OSError` where nothing can be written into it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=out.parent):
        pass


def _open(name: str, options: StatsOptions) -> Images | Statistics:
    return open_side(
        name,
        split=options.split,
        res=options.res,
        count=options.num_samples,
        skip_bad=options.skip_bad,
    )


def _network(options: StatsOptions) -> FeatureNetwork:
    weights = options.inception_weights or None
    return load_features(options.features, weights=weights, trust=options.trust_features)


def _check_early(
    sides: list[Images | Statistics], network: FeatureNetwork, options: StatsOptions
) -> None:
    """Raise `UserError` for what would fail only after computing all features."""
    images = [side for side in sides if isinstance(side, Images)]
    dims = [network(next(side.batches(1))).shape[1] for side in images]
    likeness = Statistics(torch.zeros(dims[0]).numpy(), torch.empty(0).numpy(), 0, network.name)
    for side in sides:
        if isinstance(side, Statistics):
            check_comparable(side, likeness)
            _check_enough("statistics", side.count, side.dim, options.force)
        else:
            _check_enough(side.name, side.count, dims[0], options.force)


def _side(
    name: str,
    found: Images | Statistics,
    network: FeatureNetwork | None,
    options: StatsOptions,
    progress: Progress,
    *,
    content: statistics_file.Content | None = None,
) -> _Side:
    if isinstance(found, Statistics):
        return _Side(name, found)
    assert network is not None
    batches = found.batches(options.batch_size)
    features_ND = extract(
        network,
        content.of(batches) if content else batches,
        device=device_for(options.device),
        progress=progress,
        total=found.batch_count(options.batch_size),
    )
    own = statistics(features_ND, features=network.name)
    return _Side(name, own, features_ND, found.skipped, found.left_out)


def _check_enough(name: str, count: int, dim: int, force: bool) -> None:
    if 0 < count <= dim and not force:
        raise UserError(
            f"{name}: {count} images are too few for {dim} features, the distance would be mostly "
            f"bias; give more than {dim} images, or features of fewer dimensions, or --force"
        )


def _distance_error(left: _Side, right: _Side, options: FidOptions) -> float | None:
    """Standard error over the images of both sides; a side of statistics counts as exact."""
    squares = [
        bootstrap_error(
            side.features_ND.numpy(), other.statistics, draws=options.draws, seed=options.seed
        )
        ** 2
        for side, other in ((left, right), (right, left))
        if side.features_ND is not None
    ]
    return math.sqrt(sum(squares)) if squares else None


def _sample_figures(left: _Side, right: _Side, options: FidOptions) -> dict[str, Any]:
    """KID, precision and recall; None where a side has no or too few images."""
    names = ("kid", "kid_se", "precision", "precision_se", "recall", "recall_se")
    figures: dict[str, Any] = dict.fromkeys(names)
    a_ND, b_ND = left.features_ND, right.features_ND
    if a_ND is None or b_ND is None:
        return figures
    fewest = min(len(a_ND), len(b_ND))
    if options.kid and fewest >= LEAST_IMAGES:
        unit = kernel_unit(b_ND, right.statistics.features)
        figures["kid"], figures["kid_se"] = kernel_distance(
            a_ND / unit,
            b_ND / unit,
            subset=options.kid_subset,
            subsets=options.kid_subsets,
            seed=options.seed,
        )
    if options.prc and fewest > options.neighbours:
        device = device_for(options.device)
        precision, recall = precision_recall(
            b_ND.to(device), a_ND.to(device), neighbours=options.neighbours
        )
        figures["precision"], figures["recall"] = precision, recall
        figures["precision_se"] = share_error(precision, len(a_ND))
        figures["recall_se"] = share_error(recall, len(b_ND))
    return figures


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures of `fid` for the user, each with its standard error and conditions."""
    options, sides = figures["options"], [figures["a"], figures["b"]]
    sets = " against ".join(_described(side) for side in sides)
    said = [f"{figures['features']} {_with_error(figures, 'fd', '.5g')}: {sets}"]
    if figures["kid"] is not None:
        name = "KID" if figures["features"] == "FID" else "KD"
        subset = min(options["kid_subset"], *(side["images"] for side in sides))
        said.append(
            f"{name} {_with_error(figures, 'kid', '.4g')}: "
            f"{options['kid_subsets']} subsets of {subset:,} images"
        )
    if figures["precision"] is not None:
        said.append(
            f"precision {_with_error(figures, 'precision', '.4f')}, "
            f"recall {_with_error(figures, 'recall', '.4f')}: {options['neighbours']} neighbours"
        )
    return said + figures["notes"]


def _comparison_notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Remarks on a comparison, from the figures of its two sides."""
    notes = _side_notes(a) + _side_notes(b)
    without = [side["name"] for side in (a, b) if side["kind"] == "statistics"]
    if not without:
        return notes
    holds = "holds" if len(without) == 1 else "hold"
    error = (
        "the standard error is over the images of the other side"
        if len(without) == 1
        else "no standard error either"
    )
    return [
        *notes,
        f"no KID, precision and recall: {' and '.join(without)} {holds} statistics and no images; "
        + error,
    ]


def _side_notes(side: dict[str, Any]) -> list[str]:
    """Remarks on one set: too few images, unknown origin, images left out."""
    notes, name = [], side["name"]
    if side["biased"]:
        notes.append(
            f"biased: {side['images']:,} images of {name} are too few for {side['dim']:,} features; "
            "compare it only with distances at the same number of images"
        )
    if not (side["images"] and side["features"]):
        notes.append(f"{name} does not say how many images it covers, or in which features")
    if side["left_out"]:
        notes.append(f"not counted of {name}: {side['left_out']}")
    if side["skipped"]:
        notes.append(
            f"left out of {name}: {len(side['skipped']):,} that cannot be read, "
            f"first {side['skipped'][0]}"
        )
    return notes


def _described(side: dict[str, Any]) -> str:
    count = f"{side['images']:,}" if side["images"] else "an unknown number of"
    return f"{count} images of {side['name']}"


def _with_error(figures: dict[str, Any], name: str, digits: str) -> str:
    error = figures[f"{name}_se"]
    return format(figures[name], digits) + ("" if error is None else f" ± {error:.2g}")
