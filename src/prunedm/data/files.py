"""Finding the image files of a folder, and opening one safely: bounded, upright, never a pipe."""

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

# Pillow's raster formats; none that it hands to other programs (EPS, WMF), no icons or documents.
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
    "TGA": (".tga",),  # last, because it has no magic number
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# folders left by systems, besides hidden ones
DROPPINGS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN")
SHEETS = ("grid.png", "samples.png")  # in folders of prunedm: many images on one sheet
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as in `datasets`
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, AttributeError,
    OverflowError, MemoryError, RuntimeError, struct.error, zlib.error, AssertionError,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip  # what Pillow raises on arbitrary bytes
_ORIENTATION = ExifTags.Base.Orientation


@dataclass
class FolderFiles:
    """The image and parquet files of a folder, subfolders included, in the order of their paths."""

    files: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> how many

    def rest(self) -> str:
        """The files that were left out, in words."""
        return ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))


def find_images(folder: Path) -> FolderFiles:
    """All images below a folder. Links are followed, and each folder is read once.

    Hidden and system files and folders are left out, and so are sheets of many images in folders of
    prunedm. A pipe with an image's name counts, and is refused when it is opened.
    """
    found = FolderFiles()
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:  # not recursive: folders may be nested thousands deep
        waiting += _walk(waiting.pop(), found, seen)
    for paths in (found.files, found.tables):
        paths.sort(key=lambda path: path.parts)
    found.left_out = +found.left_out
    return found


def _walk(folder: str, found: FolderFiles, seen: set[tuple[int, int]]) -> list[str]:
    """Add a folder's files to `found`; returns its subfolders, the first of them last."""
    inner: list[str] = []
    try:
        place = Path(folder).stat()
        with os.scandir(folder) as listing:
            # real folders before links, so that a link does not give its images another name
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
    """As `Path.suffix`, without building a path for each of many thousand files."""
    stem, dot, end = name.rpartition(".")
    return (dot + end).lower() if stem else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link loop
        return False


def locate(name: str) -> Path | None:
    """The existing path of this name, with "~" resolved, or None."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown user
        return None


def open_image(item: Any, name: str) -> Image.Image:
    """An upright PIL image from an image, a path, an array, or a file's bytes. `name` is for errors.

    The first frame of an animation. Raises `UserError` where it cannot be read.
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
    """The mode of an image file. Raises `UserError` if it is truncated.

    A file that looks truncated is decoded to make sure.
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
    """Whether checksums or end markers show it to be complete; False where only decoding could."""
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
    """Reads the header only. Raises one of `BROKEN`, also above Pillow's limit on pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(BytesIO(item) if isinstance(item, bytes) else item, formats=_formats())


@cache
def _formats() -> list[str]:
    """Those that this Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation, if that can be read."""
    return ImageOps.exif_transpose(image) if orientation(image) > 1 else image


def orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except BROKEN:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def shown(name: object) -> str:
    """A name for a message: at most a line, and without a URL's user and password."""
    text = re.sub(r"(:/{1,2})[^/@\s]+@", r"\1***@", masked(str(name)))
    return text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}"


def reason(error: BaseException) -> str:
    """The message of one of `BROKEN`, in one line."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels, like a decompression bomb"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"
    return first_line(error)
