"""Arrays in untrusted .npz files: a header is believed only where the file bears it out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL import Image

from prunedm.data.files import shown
from prunedm.errors import UserError, first_line
from prunedm.reading import check_regular

IMAGES = ("images", "arr_0")  # names of arrays that hold images
LARGEST = 1 << 30  # most bytes of an array that is read whole
_CHUNK = 1 << 20
_DEFLATE = 1100  # most that a file can expand by
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Damaged(UserError):
    """A fault of the whole file, which skipping an image does not solve."""


class Header(NamedTuple):
    shape: tuple[int, ...]
    by_column: bool
    dtype: np.dtype[Any]


@contextmanager
def _reading(path: Path, key: str = "") -> Iterator[None]:
    """Turn what zipfile, zlib and numpy raise, a dozen types, into one-line errors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{key} of {shown(path)!r}" if key else f"{shown(path)!r} as an .npz"
        reason = f"it is damaged ({error})" if isinstance(error, BadZipFile) else first_line(error)
        raise Damaged(f"cannot read {what}: {shown(reason)}; save it again") from error


def keys(path: Path) -> set[str]:
    """The names of a file's arrays."""
    check_regular(path)
    with _reading(path), ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[IO[bytes], Header]]:
    """The array's file after its header, and the header."""
    check_regular(path)
    with _reading(path, key), ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        yield file, _header(archive, file, path, key)


def header_of(path: Path, key: str) -> Header:
    """An array's header. Raises `Damaged` where the file cannot hold what it claims."""
    with _opened(path, key) as (_, header):
        return header


def read_array(path: Path, key: str) -> np.ndarray:
    """One array of numbers or strings, whole, with its checksum verified."""
    with _opened(path, key) as (file, header):
        if header.dtype.kind not in "fiubU" or file_bytes(header) > LARGEST:
            raise Damaged(f"{key} of {shown(path)!r} is {header.dtype} {header.shape}, not numbers")
        raw = file.read(file_bytes(header) + 1)  # to the end, where the checksum is verified
        array = np.frombuffer(raw, dtype=header.dtype, count=math.prod(header.shape))
        return array.reshape(header.shape, order="F" if header.by_column else "C")


def file_bytes(header: Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize


def _header(archive: ZipFile, file: IO[bytes], path: Path, key: str) -> Header:
    """Raises `Damaged` where the file cannot hold what its header claims."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise Damaged(f"{key} of {shown(path)!r} is of .npy version {version}; save it again")
    header = Header(*_HEADERS[version](file))
    entry = archive.getinfo(f"{key}.npy")
    held = min(entry.file_size, _DEFLATE * min(entry.compress_size, path.stat().st_size))
    if file_bytes(header) != entry.file_size - file.tell() or entry.file_size > held:
        raise Damaged(
            f"{key} of {shown(path)!r} claims {header.dtype} {header.shape}, which is not what the "
            "file holds; save it again"
        )
    return header


class Rows(Sequence[np.ndarray]):
    """Images of an array, HW or HWC, read one by one, so that the array is never whole in memory.

    It is read through once at first to verify its checksum, which random access would not.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = check_regular(path)
        with _reading(path, key):
            archive = ZipFile(path)
            with archive.open(f"{key}.npy") as whole:
                shape, by_column, dtype = _header(archive, whole, path, key)
                self._start = whole.tell()
                self._check_kind(key, shape, by_column, dtype)
                while whole.read(_CHUNK):
                    pass
            self._file = archive.open(f"{key}.npy")
        self._count: int = shape[0]
        single = len(shape) == 3 or shape[3] == 1
        self.row_shape: tuple[int, ...] = shape[1:3] if single else shape[1:]
        self._bytes = math.prod(self.row_shape)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        with _reading(self.path):
            self._file.seek(self._start + index * self._bytes)  # free for consecutive rows
            raw = self._file.read(self._bytes)
        if len(raw) < self._bytes:
            raise Damaged(f"{shown(self.path)!r} ends at image {index}; save it again")
        return np.frombuffer(raw, dtype=np.uint8).reshape(self.row_shape)

    def _check_kind(
        self, key: str, shape: tuple[int, ...], by_column: bool, dtype: np.dtype[Any]
    ) -> None:
        single = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        coloured = len(shape) == 4 and shape[3] == 3
        if dtype != np.uint8 or not (single or coloured):
            raise Damaged(
                f"{key} of {shown(self.path)!r} is {dtype} {shape}; images are uint8 "
                "(N, H, W, 1 or 3)"
            )
        if by_column:
            raise Damaged(
                f"{key} of {shown(self.path)!r} is uint8 in Fortran order; save "
                "np.ascontiguousarray of it"
            )
        if math.prod(shape[1:3]) > (Image.MAX_IMAGE_PIXELS or math.inf) or 0 in shape[1:]:
            raise Damaged(
                f"{key} of {shown(self.path)!r} has images of {shape[1]}x{shape[2]} pixels"
            )
