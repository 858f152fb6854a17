"""The same samples of every model, as sheets that the page can overlay."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunedm.errors import UserError
from prunedm.evaluation.pictures import data_uri, grid
from prunedm.evaluation.results import Evaluation

SHOWN = 36  # most samples of a model
GAP = 1  # pixels between samples
_PIXELS = 1_200_000  # of a sheet, about: of larger samples fewer are shown
_SHEET = 300  # least width of a sheet on the page, in CSS pixels
_SMALL = 96  # pixels: images up to this size are enlarged pixel by pixel


@dataclass(frozen=True)
class Sheet:
    """Samples of one model on one picture, row by row."""

    label: str
    uri: str  # PNG
    width: int  # as drawn, in CSS pixels
    shown: int
    all: int
    columns: int
    tile: tuple[int, int]  # height, width of an image
    small: bool  # drawn pixel by pixel
    paired: bool  # comparable to the first sheet image by image


def sheets(evaluations: Sequence[Evaluation], samples: Mapping[str, np.ndarray]) -> list[Sheet]:
    """A sheet for every model that has samples, uint8 NHWC, in the order of `evaluations`."""
    unknown = samples.keys() - {e.label for e in evaluations}
    if unknown:
        raise UserError(f"samples of {sorted(unknown)}, which no evaluation describes")
    made: list[Sheet] = []
    for e in evaluations:
        if e.label in samples:
            made.append(_sheet(e.label, samples[e.label], made[0] if made else None))
    return made


def _sheet(label: str, images_NHWC: np.ndarray, first: Sheet | None) -> Sheet:
    height, width = images_NHWC.shape[1:3]
    room = min(SHOWN, max(4, math.isqrt(_PIXELS // (height * width)) ** 2))
    shown = images_NHWC[:room]
    columns = max(1, round(len(shown) ** 0.5))
    picture = grid(shown, columns, gap=GAP)
    small = max(height, width) <= _SMALL
    # by whole multiples, so that all pixels are equally wide
    zoom = max(1, -(-_SHEET // picture.width)) if small else 1
    tile, count = (height, width), len(shown)
    paired = first is None or (first.tile, first.shown) == (tile, count)
    drawn = min(picture.width * zoom, 640)
    uri = data_uri(picture)
    return Sheet(label, uri, drawn, count, len(images_NHWC), columns, tile, small, paired)
