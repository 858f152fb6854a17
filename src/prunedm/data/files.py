"""Which files of a folder are images, and how one is opened: bounded, upright, and never a pipe."""

import os
import re
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from prunedm.errors import UserError, first_line, masked
from prunedm.reading import check_regular
from prunedm.record import FILE as RECORD

# Pillow's rasters. Not what it hands to other programs (EPS, WMF), nor icons, documents and stubs.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "DIB": (),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "TGA": (".tga",),  # last: it has no mark of its own
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
DROPPINGS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN")  # of systems, beside hidden ones
SHEETS = ("grid.png", "samples.png")  # of our own folders: many images on one
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as `datasets` names them
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, MemoryError, RuntimeError, struct.error, zlib.error, AssertionError,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip  # what Pillow raises on files of noise
_ORIENTATION = ExifTags.Base.Orientation


@dataclass
class Found:
    """Images and parquet files of a folder and of all below it, in the order of their paths."""

    files: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # what, and how many

    def rest(self) -> str:
        """What was left out, in words."""
        return ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))


def find_images(folder: Path) -> Found:
    """Links are followed, and each folder is read once, whatever leads to it.

    Hidden files and folders, and those that systems drop, are left out; so are sheets of many
    images in folders of ours. A pipe with an image's name counts, and is refused when it is opened.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:  # no call within a call: folders may be nested thousands deep
        waiting += _walk(waiting.pop(), found, seen)
    for paths in (found.files, found.tables):
        paths.sort(key=lambda path: path.parts)
    found.left_out = +found.left_out
    return found


def _walk(folder: str, found: Found, seen: set[tuple[int, int]]) -> list[str]:
    """Take in the files of a folder; the folders in it, the last of which is to be read first."""
    inner: list[str] = []
    try:
        place = Path(folder).stat()
        with os.scandir(folder) as listing:
            # real folders first: a link to one must not give its images another name
            entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise UserError(f"cannot read folder {shown(folder)}: {error.strerror}") from error
    if (place.st_dev, place.st_ino) in seen:
        return inner
    seen.add((place.st_dev, place.st_ino))
    names = {entry.name for entry in entries}
    for entry in entries:
        is_folder, suffix = _is_folder(entry), _suffix(entry.name)
        if entry.name.startswith(".") or entry.name in DROPPINGS:
            found.left_out["hidden"] += is_folder or suffix in SUFFIXES
        elif is_folder:
            inner.append(entry.path)
        elif suffix == ".parquet" and entry.name not in METADATA:
            found.tables.append(Path(entry.path))
        elif suffix not in SUFFIXES:
            found.left_out[f"{suffix or 'other'} files"] += entry.name not in (*METADATA, RECORD)
        elif RECORD in names and entry.name in SHEETS:
            found.left_out["sheets"] += 1
        else:
            found.files.append(Path(entry.path))
    return inner[::-1]


def _suffix(name: str) -> str:
    """As `Path.suffix`, without a path for each of many thousand files."""
    stem, dot, end = name.rpartition(".")
    return (dot + end).lower() if stem else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to themselves
        return False


def locate(name: str) -> Path | None:
    """The path that a name stands for, "~" resolved, or None where nothing can be there."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, of an unknown user
        return None


def open_image(item: Any, name: str) -> Image.Image:
    """A PIL image, upright, from itself, a path, an array, or bytes of a file. `name` is for errors.

    Of animations the first frame counts. Raises `UserError` for what cannot be read.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    if isinstance(item, Path):
        check_regular(item)
    try:
        image = item if isinstance(item, Image.Image) else open_lazily(item)
        image.load()
        return upright(image)
    except BROKEN as error:
        raise UserError(f"cannot read {name}: {reason(error)}") from error


def check_whole(item: Path | bytes, name: str) -> str:
    """The mode of an image file that is there to its end. Raises `UserError` for one that is not.

    What looks cut off is decoded, to be sure.
    """
    if isinstance(item, Path):
        check_regular(item)
    try:
        with open_lazily(item) as image:
            mode = image.mode
            if _has_its_end(image, item):
                return mode
    except BROKEN as error:
        raise UserError(f"cannot read {name}: {reason(error)}") from error
    open_image(item, name)
    return mode


def _has_its_end(image: Image.Image, item: Path | bytes) -> bool:
    """By checksums or marks of the format; False where only decoding tells."""
    try:
        if image.format == "PNG":
            image.verify()
            return True
        if image.format == "JPEG":
            return _end_of(item).rstrip(b"\0").endswith(b"\xff\xd9")
    except BROKEN:
        pass
    return False


def _end_of(item: Path | bytes) -> bytes:
    if isinstance(item, bytes):
        return item[-64:]
    with item.open("rb") as file:
        file.seek(-min(64, item.stat().st_size), os.SEEK_END)
        return file.read()


def open_lazily(item: Path | bytes) -> Image.Image:
    """Its header only. Raises one of `BROKEN`; one of more pixels than Pillow thinks safe, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(BytesIO(item) if isinstance(item, bytes) else item, formats=_formats())


@cache
def _formats() -> list[str]:
    """Those that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; one that cannot be read says nothing."""
    return ImageOps.exif_transpose(image) if orientation(image) > 1 else image


def orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except BROKEN:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def shown(name: object) -> str:
    """A name in a message, not longer than a line, and without a URL's password."""
    text = re.sub(r"(:/{1,2})[^/@\s]+@", r"\1***@", masked(str(name)))
    return text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}"


def reason(error: BaseException) -> str:
    """What one of `BROKEN` says, in a line."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, as decompression bombs have"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"
    return first_line(error)
