"""Hashes of image sets over every byte, so that a replaced image makes another set."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from prunedm.data.tables import Column
from prunedm.record import file_hash
from prunedm.tensor_cache import remembered, text_key, times_of

REMEMBERED = 1000  # least images of a set whose hash is cached


def content_hash(source: Sequence[Any], look: Callable[[int, Any], None], kind: str) -> str:
    """A hash of the images as they are stored; `look` is called with each, and may raise.

    kind: all that `look` depends on. For many images the hash is cached: for files by their sizes and
    times, for tables by the fingerprint of `datasets`.
    """
    known = _known_by(source) if len(source) >= REMEMBERED else None
    if known is None:
        return _hash(source, look)
    key = text_key(json.dumps([kind, known]))
    return remembered("images", key, lambda: _hash(source, look))


def _known_by(source: Sequence[Any]) -> list[Any] | None:
    """A cheap key that changes with the content, or None where there is none."""
    if isinstance(source, list) and isinstance(source[0], Path):
        return [[str(path.absolute()), *times_of(path)] for path in source]
    indices = list(source.indices) if isinstance(source, Subset) else None
    table: Any = source.dataset if isinstance(source, Subset) else source
    if isinstance(table, Column) and isinstance(table[0], bytes):
        return [table.table._fingerprint, table.column, indices]
    return None


def _hash(source: Sequence[Any], look: Callable[[int, Any], None]) -> str:
    digest = hashlib.sha256()
    for index in range(len(source)):
        item = source[index]
        look(index, item)
        digest.update(_stored(item))
    return digest.hexdigest()[:16]


def _stored(item: Any) -> bytes:
    """A hash of one image, of fixed length, so that no byte can move from one image to the next."""
    if isinstance(item, Path):
        return file_hash(item).encode()
    if isinstance(item, Image.Image):
        item = np.asarray(item)
    about = f"{item.dtype}{item.shape}".encode() if isinstance(item, np.ndarray) else b""
    content = item.tobytes() if isinstance(item, np.ndarray) else item
    return hashlib.sha256(about + content).hexdigest()[:16].encode()
