"""A pipeline's components besides the pruned network: copied unchanged, loaded where needed.

A companion is a component named in model_index.json: an autoencoder, text encoders, tokenizers,
feature extractors, a safety checker, or a second denoiser.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunedm.errors import UserError, first_line
from prunedm.model_files.configs import library_class
from prunedm.reading import check_regular
from prunedm.tensor_cache import remembered, text_key, times_of

AUTOENCODERS = ("vae", "vqvae")
REMEMBERED = 1 << 28  # bytes from which a hash is cached under the files' sizes and times


class Companions:
    """The components of a pipeline folder, except the denoiser and the scheduler.

    index: its model_index.json. Raises `UserError` where a component in the index is missing.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], denoiser: str) -> None:
        self.folder, self.index = folder, index
        self.names = [n for n in components(index) if n not in (denoiser, "scheduler")]
        for name in self.names:
            if not (folder / name).is_dir():
                raise UserError(
                    f"{folder} has no folder {name!r}, which its model_index.json names; copy or "
                    "download the whole pipeline"
                )

    @property
    def autoencoder(self) -> str:
        """The name of the autoencoder, or ""."""
        return next((name for name in AUTOENCODERS if name in self.names), "")

    def load_autoencoder(self) -> Any:
        """Raises `UserError` where it is damaged, or its class is not in diffusers."""
        name, place = str(self.index[self.autoencoder][1]), self.folder / self.autoencoder
        cls = library_class(name, "diffusers", "ModelMixin")
        if cls is None:
            raise UserError(f"{place}: {name} is not an autoencoder of diffusers")
        try:
            return cls.from_pretrained(place, use_safetensors=True, local_files_only=True)
        except Exception as error:  # diffusers raises many types
            raise UserError(f"cannot load {place}: {first_line(error)[:160]}") from error

    def key(self, *names: str) -> str:
        """A hash of these components' files."""
        return hash_files([path for name in names for path in self.files(name)], self.folder)

    def files(self, name: str) -> list[Path]:
        """All files of a component, in order."""
        return sorted(path for path in (self.folder / name).rglob("*") if not path.is_dir())

    def carry(self, folder: Path) -> None:
        """Put all of them into another folder, as hard links or copies."""
        for name in self.names:
            for path in self.files(name):
                link(check_regular(path), folder / path.relative_to(self.folder))


def components(index: Mapping[str, Any]) -> list[str]:
    """Names of the components present according to a model_index.json."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1]
    ]


def hash_files(paths: list[Path], folder: Path, others: tuple[Path, ...] = ()) -> str:
    """A hash of names and contents, cached by sizes and times where the files are large.

    `others` are outside `folder`, and count under their own names.
    """
    named = [(str(path.relative_to(folder)), path) for path in paths]
    named += [(path.name, path) for path in others]
    if sum(check_regular(path).stat().st_size for path in paths) < REMEMBERED:
        return _hash(named)
    stats = [(name, str(path.resolve()), *times_of(path)) for name, path in named]
    return remembered("hashes", text_key(json.dumps(stats)), lambda: _hash(named))


def _hash(named: list[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in named:
        digest.update(name.encode())
        for chunk in _chunks(path):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _chunks(path: Path) -> Iterator[bytes]:
    with check_regular(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def link(source: Path, place: Path) -> None:
    """Put a file at another place too: as a link to its content, or as a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), place)
    except OSError:  # another disk, or a system without hard links
        shutil.copy2(source, place)
