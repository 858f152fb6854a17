"""Sets of images to measure: a folder, an array in an .npz, or whatever `--dataset` takes.

Images keep their size, or are cropped to the central square and resized by Pillow's antialiased
Lanczos filter, as training images are. Shapes: N images, C channels, H W pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import numpy as np
import torch
from PIL import Image

from prunedm.data.arrays import IMAGES, Damaged, Rows, keys
from prunedm.data.files import (
    BROKEN,
    find_images,
    locate,
    open_lazily,
    orientation,
    reason,
    shown,
)
from prunedm.data.images import ImageSet, all_images, is_embedded, load_images, sides
from prunedm.data.tables import table_files
from prunedm.errors import UserError
from prunedm.evaluation.fid import Statistics, load_statistics
from prunedm.reading import check_regular
from prunedm.record import FILE as RECORD

DIGITS_SIZE = 16  # of the embedded model
_SAMPLES = "samples.npz"
_TURNED = {"exif", "xmp", "XML:com.adobe.xmp"}  # metadata that may hold an orientation
Found = TypeVar("Found")
_GREY = ("1", "L", "LA", "La", "I", "F")


class Images(ImageSet):
    """The first `count` readable images, in order, of one size unless `res` is given.

    They are grey where all files are, or, for other sources, where the first image is. After a pass,
    `skipped` names the images that were left out because of `skip_bad`.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        name: str,
        res: int | None = None,
        count: int | None = None,
        skip_bad: bool = False,
        left_out: str = "",
    ) -> None:
        super().__init__(source, name=name, size=res or 0, channels=0, left_out=left_out)
        if count is not None and count > len(source):
            raise UserError(
                f"{name!r} holds {len(source)} images; {count} were asked for with --num-samples"
            )
        self.count, self.skip_bad = len(source) if count is None else count, skip_bad
        self.skipped: list[str] = []
        self._first: tuple[str, tuple[int, int]] | None = None
        self._look()

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        assert self._first is not None
        width, height = self._first[1]
        return self.channels, *(sides(self.size) if self.size else (height, width))

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 CHW."""
        if self.size:
            return super().__getitem__(index)
        array = np.asarray(self._open(index), dtype=np.uint8)
        array_HWC = array.reshape(*array.shape[:2], self.channels)
        return torch.from_numpy(array_HWC.copy()).permute(2, 0, 1)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """uint8 NCHW batches of at most `size`, one at a time in memory.

        Raises `UserError` for images that cannot be read, unless they are to be skipped.
        """
        self.skipped = []
        batch, left = [], self.count
        for index in range(len(self)):
            image_CHW = self._unless_bad(self.__getitem__, index)
            if image_CHW is None:
                self.skipped.append(self._label(index))
            else:
                batch.append(image_CHW)
            if len(batch) == min(size, left):
                yield torch.stack(batch)
                batch, left = [], left - len(batch)
            if not left:
                return
        if batch:
            yield torch.stack(batch)

    def batch_count(self, size: int) -> int:
        return math.ceil(self.count / size)

    def _unless_bad(self, look: Callable[[int], Found], index: int) -> Found | None:
        """`look(index)`, or None for an image that cannot be read and is to be skipped."""
        try:
            return look(index)
        except Damaged:
            raise
        except UserError as error:
            if self.skip_bad:
                return None
            raise UserError(f"{error}; repair it, or pass --skip-bad to leave it out") from error

    def _look(self) -> None:
        """Shape of the set: from the headers of all requested files, else from the first image."""
        files = isinstance(self.source, list) and isinstance(self.source[0], Path)
        self.channels = 3  # nothing is refused yet
        grey: list[bool] = []
        for index in range(self.count if files else len(self)):
            found = self._unless_bad(self._header if files else self._size_and_mode, index)
            if found is not None:
                grey.append(self._compare(index, *found))
            if grey and not files:
                break
        if self._first is None:
            raise UserError(f"no image of {self.name!r} can be read; give other images")
        self.channels = 1 if all(grey) else 3

    def _header(self, index: int) -> tuple[tuple[int, int], str]:
        """Upright size and mode from a file's header (a PNG's orientation may come after the pixels)."""
        path = check_regular(self.source[index])
        try:
            with open_lazily(path) as image:
                turned = bool(_TURNED & image.info.keys()) and orientation(image) > 4
                return (image.size[::-1] if turned else image.size), image.mode
        except BROKEN as error:
            raise UserError(f"cannot read {shown(path)}: {reason(error)}") from error

    def _size_and_mode(self, index: int) -> tuple[tuple[int, int], str]:
        image = self._decode(index)
        return image.size, image.mode

    def _open(self, index: int) -> Image.Image:
        image = self._decode(index)
        grey = self._compare(index, image.size, image.mode)
        if not grey and self.channels == 1:
            raise Damaged(
                f"{self._label(index)} has colours, and the first of {self.name!r} is grey; "
                "give images of one kind"
            )
        return image.convert("L" if self.channels == 1 else "RGB")

    def _decode(self, index: int) -> Image.Image:
        try:
            return super()._open(index)
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"cannot read {self._label(index)}: {reason(error)}") from error

    def _compare(self, index: int, size: tuple[int, int], mode: str) -> bool:
        """Whether an image is grey. Raises `UserError` for a size that differs from the first's."""
        first, wanted = self._first = self._first or (self._label(index), size)
        if size != wanted and not self.size:
            raise Damaged(
                f"{first} has {wanted[0]}x{wanted[1]} pixels and {self._label(index)} "
                f"{size[0]}x{size[1]}; --res N resizes all to one size"
            )
        return mode in _GREY or mode.startswith("I;16")

    def _label(self, index: int) -> str:
        item = self.source[index] if isinstance(self.source, list) else None
        return str(item) if isinstance(item, Path) else f"image {index} of {self.name!r}"


def open_side(
    name: str,
    *,
    split: str | None = None,
    res: int | None = None,
    count: int | None = None,
    skip_bad: bool = False,
) -> Images | Statistics:
    """Images or statistics by name: a folder, an .npz of either, or a dataset.

    A folder stands for all its images, subfolders included, in order of their paths, unless a split is
    given; digits and datasets of the hub for their held-out images. Raises `UserError` for anything
    else.
    """
    path = locate(name) or Path(name)
    options: dict[str, Any] = {"name": name, "res": res, "count": count, "skip_bad": skip_bad}
    if path.suffix == ".npz" or (path.suffix != ".zip" and path.is_file() and is_zipfile(path)):
        found = _open_npz(path)
        return found if isinstance(found, Statistics) else Images(found, **options)
    if path.is_dir() and not split and not is_embedded(name):
        source, left_out = _own_images(path)
        if source:
            return Images(source, **options, left_out=left_out)
    size = res or DIGITS_SIZE  # only digits are drawn at it
    images = (
        load_images(name, split=split, size=size, channels=3, labels="none")
        if split
        else all_images(name, size=size, channels=3)
    )
    return Images(images.source, **options, left_out=images.left_out)


def _own_images(folder: Path) -> tuple[Sequence[Any], str]:
    """A folder's images, and in words what else it holds; none for a dataset's folder.

    In folders that prunedm wrote these are the samples; elsewhere all images, subfolders included.
    """
    ours = (folder / RECORD).exists()
    if ours and (folder / _SAMPLES).exists():
        rows = _open_npz(folder / _SAMPLES)
        assert not isinstance(rows, Statistics)
        return rows, ""
    found = find_images(folder)
    if table_files(folder, found):
        return [], ""
    arrays = _arrays(folder)
    sheets = {path.with_suffix(".png") for path in arrays}  # as `evaluate` draws them
    files = [
        path for path in found.files if path not in sheets and (path.parent == folder or not ours)
    ]
    if not files and (arrays or (ours and found.files)):
        held = ", ".join(path.name for path in arrays) or "subfolders"
        raise UserError(
            f"{shown(folder)!r} holds its images as {shown(held)}; give one of these files"
        )
    return files, found.rest()


def _arrays(folder: Path) -> list[Path]:
    """The .npz files, if they hold images and not, say, latents."""
    arrays = sorted(folder.glob("*.npz"))
    return arrays if arrays and set(IMAGES) & keys(arrays[0]) else []


def _open_npz(path: Path) -> "Statistics | Rows":
    held = keys(path)
    if {"mu", "sigma"} <= held:
        return load_statistics(path)
    found = [key for key in IMAGES if key in held]
    if not found:
        raise UserError(
            f"{shown(path)!r} holds {shown(sorted(held))}; give uint8 NHWC images as 'images' or "
            "'arr_0', or statistics as 'mu' and 'sigma'"
        )
    return Rows(path, found[0])
