"""Datasets of the hub: one short request, and the cache where the hub does not answer."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from prunedm.data.files import shown
from prunedm.data.tables import named_splits
from prunedm.errors import UserError, first_line
from prunedm.hub import near, why_silent

if TYPE_CHECKING:
    from datasets import Dataset

_ID = re.compile(r"((?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95})(?::(\w[\w.-]{0,95}))?")
# names in papers: the repository, its configuration, and files where the whole is too large to fetch
KNOWN: Mapping[str, tuple[str, str, dict[str, str]]] = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", {}),
    "c4": (
        "allenai/c4",
        "",
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}
_FILES = re.compile(
    r".*\.(zip|tar|t?gz|tgz|bz2|xz|7z|rar|np[yz]|pt|pth|ckpt|bin|safetensors|parquet|arrow|csv|jsonl?"
    r"|h5|hdf5|mat|pkl|txt|png|jpe?g|webp|gif|tiff?|bmp)",
    re.IGNORECASE,
)


@cache
def open_hub(name: str) -> dict[str, "Dataset"]:
    """The splits of the hub's dataset `name`; owner/name:config selects one of its configurations.

    Raises `UserError` at once for what cannot be a hub id, and within seconds for an id that the hub
    does not know, or that is not cached while the hub cannot be reached.
    """
    start = f"unknown dataset {shown(name)!r}: no such folder"
    meant = near(name)
    match = _ID.fullmatch(name)
    if match is None or _FILES.fullmatch(match[1]):
        raise UserError(start + meant)
    repository, preset, files = KNOWN.get(match[1], (match[1], "", {}))
    config = match[2] or preset
    import datasets
    from huggingface_hub import HfApi

    why = why_silent(lambda limit: HfApi().dataset_info(repository, timeout=limit))
    if why is None:
        raise UserError(f"{start}, and the hub has none of this name that you may read{meant}")

    try:
        with offline(bool(why)):
            how = {"data_files": files} if files else {"name": config} if config else {}
            return named_splits(datasets.load_dataset(repository, **how))
    except Exception as error:  # a dozen types, all of which mean "not available"
        reason = (
            f"the hub cannot be reached ({why})" if why else f"the hub says: {first_line(error)}"
        )
        raise UserError(f"{start}, and {shown(reason)}{meant}") from error


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Put `datasets` and the hub's client offline; they read the environment only once."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
