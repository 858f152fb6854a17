"""Datasets of the hub: asked for once and shortly, and taken from the cache where it is silent."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from prunedm.errors import UserError, first_line
from prunedm.image_files import shown
from prunedm.image_tables import named_splits

if TYPE_CHECKING:
    from datasets import Dataset

_WAIT_S = 5.0  # the hub answers in less, or counts as out of reach
_ID = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
_FILES = re.compile(
    r".*\.(zip|tar|t?gz|tgz|bz2|xz|7z|rar|np[yz]|pt|pth|ckpt|bin|safetensors|parquet|arrow|csv|jsonl?"
    r"|h5|hdf5|mat|pkl|txt|png|jpe?g|webp|gif|tiff?|bmp)",
    re.IGNORECASE,
)


def open_hub(name: str) -> dict[str, "Dataset"]:
    """The splits of the hub's dataset `name`.

    Raises `UserError` at once for what cannot be a hub id, and within seconds for an id that the
    hub does not know, or that is not in the cache while the hub cannot be reached.
    """
    start = f"unknown dataset {shown(name)!r}: no such folder"
    near = _near(name)
    if not _ID.fullmatch(name) or _FILES.fullmatch(name):
        raise UserError(start + near)
    why = _silence(name)
    if why is None:
        raise UserError(f"{start}, and the hub has none of this name that you may read{near}")
    import datasets

    try:
        with _offline(bool(why)):
            return named_splits(datasets.load_dataset(name))
    except Exception as error:  # a dozen types; all mean "not to be had"
        reason = (
            f"the hub cannot be reached ({why})" if why else f"the hub says: {first_line(error)}"
        )
        raise UserError(f"{start}, and {shown(reason)}{near}") from error


def _silence(name: str) -> str | None:
    """Why the hub cannot be asked for `name`, "" if it has it, None if it has not."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=_WAIT_S)
            answers.append("")
        except RepositoryNotFoundError:
            answers.append(None)
        except Exception as error:
            answers.append(first_line(error))

    # names are looked up without a time limit: the thread may be left to itself
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_WAIT_S)
    return answers[0] if answers else f"no answer in {_WAIT_S:g} s"


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """`datasets` and the hub's client without a network: they read the variables only once."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if wanted:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _near(name: str) -> str:
    """The end of a message: a folder whose name is nearly this one."""
    path = Path(name).expanduser() if not name.startswith("~") or name[1:2] == "/" else Path(name)
    try:
        folders = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except (OSError, ValueError):
        return ""
    near = get_close_matches(path.name, folders, n=1, cutoff=0.6)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
