"""The file that `stats` writes, with a record by which it recognizes its own result."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.evaluation.fid import Statistics, load_statistics, save_statistics
from prunedm.evaluation.image_source import Images
from prunedm.options import StatsOptions
from prunedm.stages.evaluating.quality import feature_files
from prunedm.stages.workplace import Workplace

_NOT_IDENTITY = {"device", "force", "features", "inception_weights"}


class Content:
    """The hash of a stream of images."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def of(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the same batches (uint8 NCHW), hashing them."""
        for batch_NCHW in batches:
            for image_CHW in batch_NCHW:
                self._digest.update(str(tuple(image_CHW.shape)).encode())
                self._digest.update(image_CHW.contiguous().numpy().tobytes())
            yield batch_NCHW

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()[:16]


def made_of(options: StatsOptions, features: str) -> dict[str, Any]:
    """What decides the statistics besides the images."""
    files = feature_files(options.features, options.inception_weights)
    return {
        "features": features,
        "files": {role: source.hash for role, source in files.items()},
        "options": options.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }


def done_already(
    out: Path, images: Images, basis: dict[str, Any], *, batch_size: int, overwrite: bool
) -> Statistics | None:
    """The statistics in `out` if they are the wanted ones; None where they must be computed.

    Raises `UserError` where `out` holds anything else, unless `overwrite`.
    """
    if not out.exists():
        return None
    kept = _record(out)
    same = kept is not None and {k: kept.get(k) for k in basis} == basis
    if same and kept is not None:
        content = Content()
        for _ in content.of(images.batches(batch_size)):
            pass
        if kept.get("images") == content.hash:
            return load_statistics(out)
    if not overwrite:
        what = "statistics of other images or options" if kept else "something else"
        raise UserError(f"{out} exists and holds {what}; give another file, or --overwrite")
    return None


def write(stats: Statistics, place: Workplace, basis: dict[str, Any], content: Content) -> None:
    """Write aside, then rename: the file appears only when whole."""
    partial = place.file
    record = json.dumps(basis | {"images": content.hash}, sort_keys=True)
    try:
        save_statistics(stats, partial, record=record)
        partial.replace(place.out)
    finally:
        partial.unlink(missing_ok=True)


def _record(path: Path) -> dict[str, Any] | None:
    """The file's record of its origin; None where it has none."""
    with suppress(Exception):  # numpy raises many types for a foreign file
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            found = json.loads(str(file["record"]))
        return found if isinstance(found, dict) else None
    return None
