"""Sets of images to measure: a folder, an array in an .npz, or whatever `--dataset` takes.

Images keep their size, or are cropped to the middle square and resized by Pillow's antialiased
Lanczos, as training images are. Shapes: N images, C channels, H W pixels.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image

from prunedm.data import SUFFIXES, ImageSet, load_images
from prunedm.errors import UserError
from prunedm.evaluation.fid import Statistics, load_statistics
from prunedm.record import FILE as RECORD

ARRAYS = ("images", "arr_0")  # keys of an .npz of images
DIGITS_SIZE = 16  # of the embedded model
_SHEETS = ("grid.png", "samples.png")  # of our own folders: many images on one
_SAMPLES = "samples.npz"
_GREY = ("1", "L", "LA", "La", "I", "F")
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip  # what Pillow raises on files of noise


class _SetError(UserError):
    """A fault of the whole set, which leaving out one image does not mend."""


class Images(ImageSet):
    """The first `count` readable images, in order, of one size unless `res` is given.

    They are grey where all files are, or where the first image is. After a pass, `skipped` names
    what was left out for `skip_bad`.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        name: str,
        res: int | None = None,
        count: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(source, name=name, size=res or 0, channels=0)
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
        return self.channels, self.size or height, self.size or width

    def __getitem__(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 CHW."""
        if self.size:
            return super().__getitem__(index)
        array = np.asarray(self._open(index), dtype=np.uint8)
        array_HWC = array.reshape(*array.shape[:2], self.channels)
        return torch.from_numpy(array_HWC.copy()).permute(2, 0, 1)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """uint8 NCHW batches of at most `size`; one is held at a time.

        Raises `UserError` for images that cannot be read, unless they are to be skipped.
        """
        self.skipped = []
        batch, left = [], self.count
        for index in range(len(self)):
            image_CHW = self._readable(index)
            if image_CHW is not None:
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

    def _readable(self, index: int) -> torch.Tensor | None:
        try:
            return self[index]
        except _SetError:
            raise
        except UserError as error:
            if not self.skip_bad:
                raise UserError(f"{error}; mend it, or --skip-bad to go on without it") from error
            self.skipped.append(self._label(index))
            return None

    def _look(self) -> None:
        """Shape of the set: by the headers of all files that are asked for, else of one image."""
        if isinstance(self.source[0], Path):
            grey = [self._compare(index, *found) for index, found in self._headers()]
        else:
            grey = [self._compare(index, *found) for index, found in self._first_readable()]
        if self._first is None:
            raise UserError(f"no image of {self.name!r} can be read; give other images")
        self.channels = 1 if all(grey) else 3

    def _headers(self) -> Iterator[tuple[int, tuple[tuple[int, int], str]]]:
        for index in range(self.count):
            try:
                with Image.open(self.source[index]) as image:
                    found = image.size, image.mode
            except _BROKEN as error:
                if self.skip_bad:
                    continue
                raise UserError(
                    f"cannot read {self._label(index)}: {error}; mend it, or --skip-bad to go on "
                    "without it"
                ) from error
            yield index, found

    def _first_readable(self) -> Iterator[tuple[int, tuple[tuple[int, int], str]]]:
        self.channels = 3  # nothing is refused yet
        for index in range(len(self)):
            try:
                image = self._decode(index)
            except _SetError:
                raise
            except UserError:
                if self.skip_bad:
                    continue
                raise
            yield index, (image.size, image.mode)
            return

    def _open(self, index: int) -> Image.Image:
        image = self._decode(index)
        grey = self._compare(index, image.size, image.mode)
        if not grey and self.channels == 1:
            raise _SetError(
                f"{self._label(index)} has colours, and the first of {self.name!r} is grey; "
                "give images of one kind"
            )
        return image.convert("L" if self.channels == 1 else "RGB")

    def _decode(self, index: int) -> Image.Image:
        try:
            return super()._open(index)
        except UserError:
            raise
        except _BROKEN as error:
            raise UserError(f"cannot read {self._label(index)}: {error}") from error

    def _compare(self, index: int, size: tuple[int, int], mode: str) -> bool:
        """Whether an image is grey. Raises `UserError` for another size than the first's."""
        first, wanted = self._first = self._first or (self._label(index), size)
        if size != wanted and not self.size:
            raise _SetError(
                f"{first} has {wanted[0]}x{wanted[1]} pixels and {self._label(index)} "
                f"{size[0]}x{size[1]}; --res N brings all to one size"
            )
        return mode in _GREY or mode.startswith("I;16")

    def _label(self, index: int) -> str:
        item = self.source[index] if isinstance(self.source, list) else None
        return str(item) if isinstance(item, Path) else f"image {index} of {self.name!r}"


def open_side(
    name: str,
    *,
    split: str = "test",
    res: int | None = None,
    count: int | None = None,
    skip_bad: bool = False,
) -> Images | Statistics:
    """Images or statistics by name: a folder, an .npz of either, or a dataset.

    A folder's own images are taken, all of them and in order of their names; a folder without any
    is a dataset, of which `split` counts. Raises `UserError` for what is none of these.
    """
    path = Path(name).expanduser()
    if path.suffix == ".npz" or path.is_file():
        found = _open_npz(path)
        if isinstance(found, Statistics):
            return found
        return Images(found, name=str(path), res=res, count=count, skip_bad=skip_bad)
    source: Sequence[Any] = _own_images(path) if path.is_dir() else []
    if not source:
        size = res or DIGITS_SIZE  # decides what "digits" are drawn at, and nothing else
        source = load_images(name, split=split, size=size, channels=3).source
    return Images(source, name=name, res=res, count=count, skip_bad=skip_bad)


def _own_images(folder: Path) -> Sequence[Any]:
    """The folder's images without those of subfolders; of our own folders, the samples."""
    ours = (folder / RECORD).exists()
    if ours and (folder / _SAMPLES).exists():
        found = _open_npz(folder / _SAMPLES)
        assert not isinstance(found, Statistics)
        return found
    arrays = sorted(path.name for path in folder.glob("*.npz"))
    sheets = {Path(name).with_suffix(".png").name for name in arrays}  # as `evaluate` draws them
    others = sorted(path for path in folder.iterdir() if path.name not in {*arrays, *sheets})
    if arrays and not others:
        raise UserError(
            f"{str(folder)!r} holds its images as {', '.join(arrays)}; give one of these files"
        )
    return [
        path
        for path in others
        if path.suffix.lower() in SUFFIXES and not (ours and path.name in _SHEETS)
    ]


def _open_npz(path: Path) -> "Statistics | _Rows":
    try:
        with ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, BadZipFile) as error:
        raise UserError(f"cannot read {str(path)!r} as an .npz: {error}") from error
    if {"mu", "sigma"} <= keys:
        return load_statistics(path)
    found = [key for key in ARRAYS if key in keys]
    if not found:
        raise UserError(
            f"{str(path)!r} holds {sorted(keys)}; give uint8 NHWC images as 'images' or 'arr_0', "
            "or statistics as 'mu' and 'sigma'"
        )
    return _Rows(path, found[0])


class _Rows(Sequence[np.ndarray]):
    """Images of an array in an .npz, HW or HWC, read one by one: the array is never whole in memory."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        try:
            self._file = ZipFile(path).open(f"{key}.npy")  # noqa: SIM115 - read row by row later
            version = np.lib.format.read_magic(self._file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, by_column, dtype = read(self._file)
        except (OSError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {key} of {str(path)!r}: {error}; save it anew") from error
        single = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        coloured = len(shape) == 4 and shape[3] == 3
        if dtype != np.uint8 or by_column or not (single or coloured):
            raise UserError(
                f"{key} of {str(path)!r} is {dtype} {shape}; images are uint8 (N, H, W, 1 or 3)"
            )
        self._count: int = shape[0]
        self.row_shape: tuple[int, ...] = shape[1:3] if single else shape[1:]
        self._start, self._bytes = self._file.tell(), math.prod(self.row_shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        try:
            self._file.seek(self._start + index * self._bytes)  # nowhere, where rows follow
            raw = self._file.read(self._bytes)
        except (OSError, EOFError, BadZipFile, zlib.error) as error:
            raise _SetError(f"{str(self.path)!r} is damaged ({error}); save it anew") from error
        if len(raw) < self._bytes:
            raise _SetError(f"{str(self.path)!r} ends at image {index}; save it anew")
        return np.frombuffer(raw, dtype=np.uint8).reshape(self.row_shape)
