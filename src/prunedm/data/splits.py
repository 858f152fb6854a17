"""Which part of a dataset is for training and which is held out, by the names of folders and splits.

The words are those of `datasets`; unlike there, a folder like "test tube" is a class and no split.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from prunedm.errors import UserError

HELD_OUT_EVERY = 20  # where there is no test split, every 20th image is held out
HELD_OUT = ("test", "validation")  # the first that there is, is the held-out set
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
    """The split of each file by the folders that it lies in.

    Where the only split is a folder `train` among two or more others, it is a class like them.
    """
    found = {path: split_of_path(parts) for path, parts in inner.items()}
    if {"train", ""} != set(found.values()):
        return found
    named = {_above_split(parts) for path, parts in inner.items() if found[path]}
    others = {parts[: len(above) + 1] for parts in inner.values() for above, _ in named
              if parts[: len(above)] == above and len(parts) > len(above)}  # fmt: skip
    above, name = next(iter(named))
    siblings = others - {(*above, name)}
    if len(named) == 1 and name.lower() == "train" and len(siblings) > 1:
        return dict.fromkeys(inner, "train")
    return found


def _above_split(parts: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The topmost folder that names a split, and those above it."""
    place = next(k for k, part in enumerate(parts) if split_of(part))
    return parts[:place], parts[place]


def split_of_path(parts: tuple[str, ...]) -> str:
    """That of the topmost folder which names one."""
    return next(filter(None, map(split_of, parts)), "")


def split_of_file(stem: str) -> str:
    """That of a table's file: "cifar-test-00000-of-00001" is test."""
    words = re.split(r"[-._ 0-9]+", _SHARD.sub("", stem).lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "")


def choose(
    splits: Collection[str], wanted: str, name: str, serves: Callable[[str], bool]
) -> tuple[str, bool]:
    """Which of `splits` to read for "train" or "test", and whether to read every 20th as held out.

    A held-out split that does not serve is as if it were not there.
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
    """Indices of the split; a set too small to hold out from serves as both."""
    every = HELD_OUT_EVERY
    if count < every:
        return list(range(count))
    return [i for i in range(count) if (i % every == every - 1) == (split == "test")]
