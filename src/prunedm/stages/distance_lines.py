"""What `fid` and `stats` found out, in sentences: figures with their errors, conditions, warnings."""

from typing import Any


def lines(figures: dict[str, Any]) -> list[str]:
    """What `fid` found out, for the user: each figure with its standard error and conditions."""
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


def comparison_notes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What to know of a comparison, from the figures of its two sides."""
    notes = side_notes(a) + side_notes(b)
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


def side_notes(side: dict[str, Any]) -> list[str]:
    """What to know of one set: too few images, unknown origin, images left out."""
    notes, name = [], side["name"]
    if side["biased"]:
        notes.append(
            f"biased: {side['images']:,} images of {name} are too few for {side['dim']:,} features; "
            "compare it only with distances at the same number of images"
        )
    if not (side["images"] and side["features"]):
        notes.append(f"{name} does not say of how many images, or of which features, it is")
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
