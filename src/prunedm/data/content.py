"""What a set of images holds, every byte of it: one that was replaced is another set."""

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

REMEMBERED = 1000  # images, from which on a hash is kept with what tells that nothing has changed


def content_hash(source: Sequence[Any], look: Callable[[int, Any], None], kind: str) -> str:
    """A hash of the images as they are stored; `look` is told each, and may raise.

    kind: all that `look` depends on. Of many images the hash is kept: of files by their sizes and
    times, of tables by the name that `datasets` gives a content.
    """
    known = _known_by(source) if len(source) >= REMEMBERED else None
    if known is None:
        return _hash(source, look)
    key = text_key(json.dumps([kind, known]))
    return remembered("images", key, lambda: _hash(source, look))


def _known_by(source: Sequence[Any]) -> list[Any] | None:
    """What changes with the content and costs little; None where nothing does."""
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
    """A hash of one image, so that no byte can move from one to the next."""
    if isinstance(item, Path):
        return file_hash(item).encode()
    if isinstance(item, Image.Image):
        item = np.asarray(item)
    about = f"{item.dtype}{item.shape}".encode() if isinstance(item, np.ndarray) else b""
    content = item.tobytes() if isinstance(item, np.ndarray) else item
    return hashlib.sha256(about + content).hexdigest()[:16].encode()
