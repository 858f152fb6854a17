"""Sheets of samples as PNG."""

import base64
import io

import numpy as np
from PIL import Image

from prunedm.errors import UserError

_MODES = {1: "LA", 3: "RGBA"}


def grid(images_NHWC: np.ndarray, columns: int, *, gap: int = 1) -> Image.Image:
    """uint8 images, gray or RGB, row by row on one sheet; the rest is transparent."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] not in _MODES:
        raise UserError(
            f"images are {images_NHWC.dtype} {images_NHWC.shape}; "
            "a grid takes uint8 (N, H, W, 1 or 3)"
        )
    if not len(images_NHWC) or columns < 1:
        raise UserError(f"a grid needs images and columns, not {len(images_NHWC)} and {columns}")
    count, height, width, channels = images_NHWC.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    shape = lines * (height + gap) - gap, columns * (width + gap) - gap, channels + 1
    sheet_HWC = np.zeros(shape, np.uint8)
    for k, image_HWC in enumerate(images_NHWC):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        sheet_HWC[y : y + height, x : x + width, :-1] = image_HWC
        sheet_HWC[y : y + height, x : x + width, -1] = 255
    return Image.fromarray(sheet_HWC, _MODES[channels])


def data_uri(image: Image.Image) -> str:
    """The image as a PNG in a data: URI, so that a page needs no other file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
