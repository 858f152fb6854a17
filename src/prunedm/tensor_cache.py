"""Expensive tensors, cached on disk under a hash of their input."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prunedm.reading import check_regular

Tensors = dict[str, torch.Tensor]


def cache_folder() -> Path:
    """$PRUNEDM_CACHE, or prunedm in the user's cache folder; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get("PRUNEDM_CACHE") or Path(base) / "prunedm")


class TensorCache:
    """One file per entry, in a folder for `kind` and the `maker`'s key."""

    def __init__(self, kind: str, maker: str) -> None:
        self.folder = cache_folder() / kind / maker

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The entry, computed where it is missing or cannot be read."""
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            if path.is_file():
                return load_file(path)
        except (OSError, SafetensorError):
            pass  # truncated by a crash: computed again
        tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
        _keep(path, lambda aside: save_file(tensors, aside))
        return tensors


def remembered(kind: str, key: str, compute: Callable[[], str]) -> str:
    """A short text, cached in its own file in a folder for `kind`."""
    path = cache_folder() / kind / key
    with suppress(OSError):
        if text := path.read_text(encoding="utf-8"):
            return text
    found = compute()
    _keep(path, lambda aside: aside.write_text(found, encoding="utf-8"))
    return found


def content_key(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, type and values."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def text_key(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def times_of(path: Path) -> tuple[int, ...]:
    """Size, times and inode: they change with a file's content, and need no reading."""
    stat = check_regular(path).stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _keep(path: Path, write: Callable[[Path], object]) -> None:
    aside = path.with_name(f"{path.name}.{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        aside.replace(path)
    except OSError:  # without a cache (full or read-only disk) only time is lost
        with suppress(OSError):
            aside.unlink(missing_ok=True)
