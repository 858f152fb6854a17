"""Images from the embedded digits, a hub id, a dataset folder or an image folder."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageMode
from torch.utils.data import ConcatDataset, Subset

from prunedm.data.content import content_hash
from prunedm.data.files import (
    SUFFIXES,
    FolderFiles,
    check_whole,
    find_images,
    locate,
    open_image,
    shown,
)
from prunedm.data.hub import open_hub
from prunedm.data.labels import Labels, file_captions, file_labels
from prunedm.data.splits import HELD_OUT, choose, held_out, splits_of_paths
from prunedm.data.tables import Tables, find_dataset, open_files, open_folder, table_files
from prunedm.errors import UserError

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# modes whose bands are not plain grey or RGB values, and what they become
_EIGHT_BITS = {
    "P": "RGB", "PA": "RGBA", "1": "L", "LAB": "RGB", "YCbCr": "RGB", "HSV": "RGB", "CMYK": "RGB",
    "RGBX": "RGB",
}  # fmt: skip
# v / 257, rounded; a table, because a large image in floats would take gigabytes
_SIXTEEN = (np.arange(1 << 16) / 257).round().astype(np.uint8)

Size = int | tuple[int, int]  # a side, or height and width


class ImageSet:
    """A finite, ordered set of images of one shape.

    `images[i]` is uint8 CHW; `images.label(i)` its class or None; `captions[i]` its text. `source` is
    any sequence of PIL images, file paths, files' bytes, or uint8 HW / HWC arrays, decoded and resized
    on access. `unlabelled` says why there are no labels, and `left_out` which images were left out.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        name: str,
        size: Size,
        channels: int,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        convert: bool = False,
        unlabelled: str = "",
        left_out: str = "",
    ) -> None:
        if len(source) == 0:
            raise UserError(f"dataset {name!r} holds no images; give a folder or dataset with some")
        self.source, self.name = source, name
        self.labels, self.captions = labels, captions
        self.size, self.channels, self.convert = size, channels, convert
        self.unlabelled, self.left_out = unlabelled, left_out

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self._open(index)
        if not self._fits(image.mode, index):
            image = image.convert("L" if self.channels == 1 else "RGB")
        height, width = sides(self.size)
        array = np.asarray(_fitted(image, height, width), dtype=np.uint8)
        return torch.from_numpy(array.reshape(height, width, self.channels).copy()).permute(2, 0, 1)

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Two hashes of the content: of a sample, for compatibility with old records, and of every byte.

        Raises `UserError` for the first image that cannot be read or does not fit the model.
        """
        kind = f"{self.channels} {self.convert}"
        whole = content_hash(self.source, self._check, kind)
        return f"{self._sample_hash()}-{whole}"

    def _sample_hash(self) -> str:
        """A hash of the length, 64 evenly spaced images, and all labels and captions."""
        digest = hashlib.sha256(f"{len(self)}x{self.channels}x{self.size}".encode())
        for index in np.linspace(0, len(self) - 1, min(64, len(self))).astype(int):
            digest.update(self[int(index)].contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(np.asarray(self.labels, dtype="<i8").tobytes())
        for caption in self.captions or ():
            digest.update(caption.encode() + b"\0")
        return digest.hexdigest()[:16]

    def _check(self, index: int, item: Any) -> None:
        """Raise now what would otherwise fail when the image is read, after hours of training."""
        if not isinstance(item, (Path, bytes)):
            return
        name = self._name(index, item)
        try:
            mode = check_whole(item, name)
        except UserError as error:
            raise UserError(f"{error}; replace it by an intact one, or remove it") from error
        self._fits(_mode_in_8_bits(mode, name), index)

    def _fits(self, mode: str, index: int) -> bool:
        """Whether the image has the model's channels. Raises `UserError` if not, unless converting."""
        bands = len(ImageMode.getmode(mode).bands)
        if bands != self.channels and not self.convert:
            raise UserError(
                f"image {index} of {self.name!r} has {bands} channels ({mode}), "
                f"the model takes {self.channels}; pass --convert-channels to convert"
            )
        return bands == self.channels

    def _open(self, index: int) -> Image.Image:
        item = self.source[index]
        name = self._name(index, item)
        return _eight_bits(open_image(item, name), name)

    def _name(self, index: int, item: Any) -> str:
        return shown(item) if isinstance(item, Path) else f"image {index} of {self.name!r}"


@dataclass(frozen=True)
class _Source:
    """An opened dataset: the images of each split, and their labels."""

    sizes: Mapping[str, int]
    images: Callable[[str], Sequence[Any]]
    labels: Callable[[str], Labels]
    captions: Callable[[str, str], list[str] | None]  # (split, column) -> texts, if any
    left_out: str = ""


def load_images(
    name: str,
    *,
    split: str,
    size: Size,
    channels: int,
    convert: bool = False,
    labels: Literal["if any", "none", "needed"] = "if any",
    captions: bool = False,
    label_column: str = "",
    caption_column: str = "",
    image_column: str = "",
) -> ImageSet:
    """Images of `split` ("train" or "test") by name: digits, a folder, or a hub id.

    Where labels are needed and the held-out images have none, some of the training images are held out
    instead. Raises `UserError` for an unknown name, for a dataset without images, and where captions
    are requested and an image has none.
    """
    found = _open(name, size, label_column, image_column, caption_column)

    def labels_of(part: str) -> Labels:
        return Labels() if labels == "none" else found.labels(part)

    part, shared = choose(
        found.sizes, split, name, lambda part: labels != "needed" or not labels_of(part).absent
    )
    source, known = found.images(part), labels_of(part)
    texts = found.captions(part, caption_column) if captions else None
    left_out = [f"{count:,} of {other}" for other, count in found.sizes.items() if other != part]
    if shared:
        picked = held_out(len(source), split)
        left_out += [f"{len(source) - len(picked):,} others"] * (len(picked) < len(source))
        source = _pick(source, picked)
        known = replace(known, values=known.values and [known.values[i] for i in picked])
        texts = texts and [texts[i] for i in picked]
    return ImageSet(
        source,
        name=name if is_embedded(name) else str(locate(name) or name),
        size=size,
        channels=channels,
        convert=convert,
        labels=known.values,
        captions=texts,
        unlabelled=known.why,
        left_out=", ".join(filter(None, [*left_out, found.left_out])),
    )


def all_images(name: str, *, size: Size, channels: int, image_column: str = "") -> ImageSet:
    """All images of a folder, whatever its splits; for digits and the hub the held-out ones, if any."""
    found = _open(name, size, "", image_column)
    if (locate(name) is None or is_embedded(name)) and set(HELD_OUT) & set(found.sizes):
        return load_images(
            name, split="test", size=size, channels=channels, labels="none",
            image_column=image_column,
        )  # fmt: skip
    parts = [found.images(split) for split in found.sizes]
    return ImageSet(
        _together(parts), name=name, size=size, channels=channels, left_out=found.left_out
    )


def _pick(source: Sequence[Any], indices: Sequence[int]) -> Any:
    if isinstance(source, list):
        return [source[i] for i in indices]
    return Subset(source, indices)  # type: ignore[arg-type]


def _together(parts: Sequence[Sequence[Any]]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):  # of files
        return sorted((path for part in parts for path in part), key=lambda path: path.parts)
    return ConcatDataset(parts)  # type: ignore[arg-type]


def _open(
    name: str, size: Size, label_column: str, image_column: str, caption_column: str = ""
) -> _Source:
    if is_embedded(name):
        _refuse_columns(
            "digits has", label=label_column, image=image_column, caption=caption_column
        )
        return _digits(size)
    path, beside = find_dataset(name), ""
    if path is not None and path.is_dir():
        found = find_images(path)
        files = table_files(path, found)
        beside = f"{len(found.files):,} image files" if found.files else ""
        if not files:
            _refuse_columns(f"{shown(name)!r} is a folder of images and has", image=image_column)
            return _folder(path, found, label_column)
        tables = open_folder(path, files, name)
    elif path is not None:
        tables = open_files(path.parent, [path], name)
    else:
        tables = open_hub(name)
    opened = Tables(name, tables, image_column, label_column)
    sizes = {split: len(table) for split, table in tables.items()}
    return _Source(sizes, opened.images, opened.labels, opened.captions, beside)


def is_embedded(name: str) -> bool:
    """Whether a name means the embedded digits: a folder of that name has priority, unless a model."""
    path = locate(name)
    return name == "digits" and (path is None or (path / "model_index.json").exists())


def _refuse_columns(what: str, **columns: str) -> None:
    for kind, column in columns.items():
        if column:
            raise UserError(f"--{kind}-column {column}: {what} no columns; leave it out")


def _folder(folder: Path, found: FolderFiles, label_column: str) -> _Source:
    if not found.files:
        rest = f", but {found.rest()}" if found.left_out else ""
        raise UserError(
            f"folder {shown(folder)!r} holds no images ({', '.join(SUFFIXES[:5])} ...){rest}"
        )
    inner = {path: path.parts[len(folder.parts) : -1] for path in found.files}
    groups: dict[str, list[Path]] = {}
    for path, split in splits_of_paths(inner).items():
        groups.setdefault(split, []).append(path)
    if "" in groups:  # beside other folders
        groups["others" if "train" in groups else "train"] = groups.pop("")
    training = next(iter({"train"} & set(groups) or groups))
    labels = cache(lambda: file_labels(folder, groups, training, label_column))
    return _Source(
        {split: len(files) for split, files in groups.items()},
        lambda split: groups[split],
        lambda split: labels()(split),  # noqa: PLW0108 - read on demand
        lambda split, column: file_captions(folder, groups[split], column),
        found.rest(),
    )


def _digits(size: Size) -> _Source:
    drawn = {split: digits(split, size) for split in ("train", "test")}
    return _Source(
        {split: len(images) for split, (images, _) in drawn.items()},
        lambda split: list(drawn[split][0]),
        lambda split: Labels(drawn[split][1]),
        lambda split, _: [DIGITS[digit] for digit in drawn[split][1]],
    )


@cache
def digits(split: str, size: Size) -> tuple[np.ndarray, tuple[int, ...]]:
    """scikit-learn's 1,797 handwritten digits: NHW uint8 of this size, every sixth held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = [i for i in range(len(bunch.target)) if (i % 6 == 5) == (split == "test")]
    images = [
        Image.fromarray((bunch.images[i] * 255 / 16).round().astype(np.uint8)).resize(
            sides(size)[::-1], Image.Resampling.BICUBIC
        )
        for i in chosen
    ]
    return np.stack([np.asarray(image) for image in images]), tuple(bunch.target[chosen].tolist())


def to_model_range(images_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 => float32 -1..1."""
    return images_NCHW.float() / 127.5 - 1


def to_uint8(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Float -1..1 => uint8 0..255, rounded (truncation darkens images and worsens FID)."""
    return ((images_NCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest central crop of that aspect ratio, resized."""
    if image.size == (width, height):
        return image
    across = min(image.width, image.height * width // height)
    down = min(image.height, image.width * height // width)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """`image` with 8-bit bands; numpy would wrap 16-bit values and read 1-bit ones as 0 and 1."""
    mode = _mode_in_8_bits(image.mode, name)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_SIXTEEN[np.asarray(image)])
    return image.convert(mode)


def _mode_in_8_bits(mode: str, name: str) -> str:
    if mode in ("I", "F"):
        raise UserError(f"{name} has {mode} pixels, whose range is unknown; save it in 8 bits")
    return "L" if mode.startswith("I;16") else _EIGHT_BITS.get(mode, mode)
