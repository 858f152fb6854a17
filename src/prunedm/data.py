"""Images from wherever they are: the embedded digits, a hub id, a dataset folder, an image folder."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from prunedm.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT_EVERY = 20  # where there is no test split, every 20th image is held out


class ImageSet:
    """A finite, ordered set of images of one shape.

    `images[i]` is uint8 CHW; `images.label(i)` its class or None. `source` is any sequence of PIL
    images, file paths, or uint8 HW / HWC arrays, decoded and resized only when asked for.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        name: str,
        size: int,
        channels: int,
        labels: Sequence[int] | None = None,
        convert: bool = False,
    ) -> None:
        if len(source) == 0:
            raise UserError(f"dataset {name!r} holds no images; give a folder or dataset with some")
        self.source, self.labels, self.name = source, labels, name
        self.size, self.channels, self.convert = size, channels, convert

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self._open(index)
        bands = len(image.getbands())
        if bands != self.channels:
            if not self.convert:
                raise UserError(
                    f"image {index} of {self.name!r} has {bands} channels ({image.mode}), "
                    f"the model takes {self.channels}; pass --convert-channels to convert"
                )
            image = image.convert("L" if self.channels == 1 else "RGB")
        array = np.asarray(_square(image, self.size), dtype=np.uint8)
        return torch.from_numpy(array.reshape(self.size, self.size, self.channels).copy()).permute(
            2, 0, 1
        )

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """A hash of the length and 64 evenly spaced decoded images: cheap, and of the content."""
        digest = hashlib.sha256(f"{len(self)}x{self.channels}x{self.size}".encode())
        for index in np.linspace(0, len(self) - 1, min(64, len(self))).astype(int):
            digest.update(self[int(index)].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _open(self, index: int) -> Image.Image:
        name = f"image {index} of {self.name!r}"
        try:
            item = self.source[index]
            if isinstance(item, np.ndarray):
                return Image.fromarray(item)
            if isinstance(item, Path):
                name = str(item)
                item = Image.open(item)
            item.load()
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"cannot read {name}: {error}") from error
        return _eight_bits(item, name)


def load_images(
    name: str, *, split: str, size: int, channels: int, convert: bool = False
) -> ImageSet:
    """Images of `split` ("train" or "test") by name: digits, a folder, or a hub id.

    Raises `UserError` where the name is none of them, or holds no images.
    """
    arguments: dict[str, Any] = {"size": size, "channels": channels, "convert": convert}
    if name == "digits":
        source, classes = digits(split, size)
        return ImageSet(list(source), labels=classes, name="digits", **arguments)
    folder = Path(name).expanduser()
    if folder.is_dir() and not _is_dataset_folder(folder):
        return ImageSet(_image_files(folder, split), name=str(folder), **arguments)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"unknown dataset {name!r}: no such folder")
    table, image_column, label_column = _table(name, folder, split)
    labels = table[label_column] if label_column else None
    images = _Column(table.select_columns([image_column]), image_column)
    return ImageSet(images, labels=labels, name=name, **arguments)


def digits(split: str, size: int) -> tuple[np.ndarray, list[int]]:
    """scikit-learn's 1,797 handwritten digits: NHW uint8 of side `size`, every sixth held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = [i for i in range(len(bunch.target)) if (i % 6 == 5) == (split == "test")]
    images = [
        Image.fromarray((bunch.images[i] * 255 / 16).round().astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for i in chosen
    ]
    return np.stack([np.asarray(image) for image in images]), bunch.target[chosen].tolist()


def to_model_range(images_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 => float32 -1..1."""
    return images_NCHW.float() / 127.5 - 1


def to_uint8(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Float -1..1 => uint8 0..255, rounded (truncation darkens images and costs FID)."""
    return ((images_NCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class _Column(Sequence[Any]):
    """One column of a `datasets` table, decoded row by row."""

    def __init__(self, table: Any, column: str) -> None:
        self.table, self.column = table, column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table[int(index)][self.column]


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """`image` with 8-bit bands; numpy would wrap 16-bit values, and read black and white as 0, 1."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"{name} has {image.mode} pixels, whose range is unknown; save it in 8 bits"
        )
    return image.convert({"P": "RGB", "1": "L"}.get(image.mode, image.mode))


def _is_dataset_folder(folder: Path) -> bool:
    markers = ("dataset_dict.json", "state.json")
    return any((folder / m).exists() for m in markers) or any(folder.rglob("*.parquet"))


def _image_files(folder: Path, split: str) -> list[Path]:
    train, test = folder / "train", folder / "test"
    root = test if split == "test" and test.is_dir() else train if train.is_dir() else folder
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if root == folder and test.is_dir():
        files = [p for p in files if test not in p.parents]
    if not files:
        raise UserError(f"folder {str(root)!r} holds no images ({', '.join(SUFFIXES)})")
    return files if test.is_dir() else [files[i] for i in _held_out(len(files), split)]


def _held_out(count: int, split: str) -> list[int]:
    """Indices of the split; a set too small to hold out from serves as both."""
    every = HELD_OUT_EVERY
    if count < every:
        return list(range(count))
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]


def _table(name: str, folder: Path, split: str) -> tuple[Any, str, str | None]:
    """A `datasets` table of the split, and its image and label columns."""
    import datasets

    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else name)
    except Exception as error:  # datasets raises a dozen types; all mean "not to be had"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"unknown dataset {name!r}: neither 'digits', a folder, nor a reachable hub id ({reason})"
        ) from error
    table = _split_of(loaded if isinstance(loaded, dict) else {"train": loaded}, name, split)
    kinds = {key: type(value).__name__ for key, value in table.features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    if not images:
        raise UserError(f"dataset {name!r} has no image column; its columns are {list(kinds)}")
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    return table, images[0], labels[0] if labels else None


def _split_of(tables: Mapping[str, Any], name: str, split: str) -> Any:
    test = next((other for other in ("test", "validation") if other in tables), None)
    if split == "test" and test:
        return tables[test]
    if "train" not in tables:
        raise UserError(f"dataset {name!r} has no split 'train'; its splits are {list(tables)}")
    table = tables["train"]
    return table if test else table.select(_held_out(len(table), split))
