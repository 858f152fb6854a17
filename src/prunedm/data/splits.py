"""The training and held-out parts of a dataset, by the names of folders and splits.

The words are those of `datasets`; unlike there, a folder like "test tube" is a class, not a split.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from prunedm.errors import UserError

HELD_OUT_EVERY = 20  # without a test split, every 20th image is held out
HELD_OUT = ("test", "validation")  # the first that exists is the held-out set
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_AFFIX = r"images?|imgs?|data|set|split|\d+"
_NAME = re.compile(
    rf"(?:(?:{_AFFIX})[-._ ]?)*({'|'.join(_SPLIT_OF)})(?:[-._ ]?(?:{_AFFIX}))*", re.IGNORECASE
)
_SHARD = re.compile(r"-\d+-of-\d+.*")


def split_of(name: str) -> str:
    """ "train", "test" or "validation" for a name like "Train", "val2017" or "test_images"; else ""."""
    match = _NAME.fullmatch(name)
    return _SPLIT_OF[match[1].lower()] if match else ""


def splits_of_paths(inner: Mapping[Path, tuple[str, ...]]) -> dict[Path, str]:
    """The split of each file, by the names of its folders.

    A folder `train` that is the only split beside two or more other folders is a class like them.
    """
    found = {path: split_of_path(parts) for path, parts in inner.items()}
    if {"train", ""} != set(found.values()):
        return found
    places = {path: place_of_split(parts) for path, parts in inner.items() if found[path]}
    named = {(inner[path][:place], inner[path][place]) for path, place in places.items()}
    others = {parts[: len(above) + 1] for parts in inner.values() for above, _ in named
              if parts[: len(above)] == above and len(parts) > len(above)}  # fmt: skip
    above, name = next(iter(named))
    siblings = others - {(*above, name)}
    if len(named) == 1 and name.lower() == "train" and len(siblings) > 1:
        return dict.fromkeys(inner, "train")
    return found


def place_of_split(parts: tuple[str, ...]) -> int:
    """The index of the topmost folder that names a split, or the number of folders."""
    return next((k for k, part in enumerate(parts) if split_of(part)), len(parts))


def split_of_path(parts: tuple[str, ...]) -> str:
    """The split that the topmost such folder names, or ""."""
    return next(filter(None, map(split_of, parts)), "")


def split_of_file(stem: str) -> str:
    """The split in the name of a table's file: "cifar-test-00000-of-00001" is test."""
    words = re.split(r"[-._ 0-9]+", _SHARD.sub("", stem).lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "")


def choose(
    splits: Collection[str], wanted: str, name: str, serves: Callable[[str], bool]
) -> tuple[str, bool]:
    """Which of `splits` to read for "train" or "test", and whether it has to be divided between them.

    A held-out split for which `serves` is false counts as missing.
    """
    own = [split for split in splits if split not in HELD_OUT]
    held = next((s for s in HELD_OUT if s in splits and (not own or serves(s))), "")
    if wanted == "test" and held:
        return held, False
    training = "train" if "train" in splits else own[0] if len(own) == 1 else ""
    if training not in splits:
        raise UserError(f"{name!r} has no split 'train'; its splits are {list(splits)}")
    return training, not held


def held_out(count: int, split: str) -> list[int]:
    """Indices of "train" or "test" in a divided set; a small set serves as both."""
    every = HELD_OUT_EVERY
    if count < every:
        return list(range(count))
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]
