"""Texts as sequences of tokens, all of one length, as language models are trained and measured.

Documents are joined by blank lines, tokenized together and cut into windows without overlap: on
wikitext-2 these are the windows of the papers' perplexity (GPTQ, SparseGPT, Wanda).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prunedm.data.files import DROPPINGS, locate, shown
from prunedm.data.hub import open_hub
from prunedm.data.splits import choose, held_out
from prunedm.data.tables import MARKERS, TEXTS, open_files, open_folder
from prunedm.errors import UserError, nearest
from prunedm.reading import check_regular

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("text", "content")  # what a column of texts is called
TOGETHER = 1 << 24  # characters that are tokenized at a time
MOST_TOKENS = 1 << 26  # of a set; calibration reads a few hundred thousand
BLANK_LINE = "\n\n"

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TextSet:
    """S sequences of L tokens, (S, L) int32. `left_out`: what of the source is not among them."""

    tokens_SL: torch.Tensor
    name: str
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.tokens_SL)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tokens_SL[index]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.tokens_SL.shape[1]

    def fingerprint(self) -> str:
        """A hash of every token and of the length: it says the tokenizer too."""
        digest = hashlib.sha256(f"{self.length}".encode())
        digest.update(self.tokens_SL.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_texts(
    name: str, *, split: str, tokenize: Tokenize, length: int, vocabulary: int, column: str = ""
) -> TextSet:
    """Sequences of `split` ("train" or "test") of a file, a folder, or a dataset of the hub.

    Hub names may say a configuration behind a colon (owner/name:config). Where there is no held-out
    split, every 20th sequence is held out. Raises `UserError` where there are no texts, they are
    shorter than one sequence, or a token is not in the model's vocabulary.
    """
    tables, beside = _open(name)
    part, shared = choose({s: len(t) for s, t in tables.items()}, split, name, lambda _: True)
    table = tables[part]
    documents = _documents(table, _column(table, column, name))
    tokens, rest = _tokens(documents, tokenize)
    if len(tokens) < length:
        raise UserError(
            f"{shown(name)} holds {len(tokens):,} tokens, less than one sequence of {length:,}; give "
            "more text, or a smaller --length"
        )
    if int(tokens.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer makes token {int(tokens.max()):,}, and the model knows {vocabulary:,}: "
            "is it another model's tokenizer?"
        )
    count = len(tokens) // length
    tokens_SL = tokens[: count * length].reshape(count, length)
    picked = held_out(count, split) if shared else list(range(count))
    others = [f"{len(t):,} texts of {other}" for other, t in tables.items() if other != part]
    others += [f"{count - len(picked):,} other sequences"] * (len(picked) < count)
    return TextSet(
        tokens_SL[picked],
        str(locate(name) or name),
        ", ".join(filter(None, [*others, beside, rest])),
    )


def _open(name: str) -> tuple[dict[str, "Dataset"], str]:
    """A table a split, and what lies beside its files."""
    path = locate(name)
    if path is None:
        return open_hub(name), ""
    if path.is_dir() and (marked := [path / m for m in MARKERS if (path / m).is_file()]):
        return open_folder(path, marked, name), ""
    files = list(_files(path)) if path.is_dir() else [check_regular(path)]
    kinds = [kind for kind in TEXTS.values() if any(_kind(file) == kind for file in files)]
    if not kinds:
        raise UserError(
            f"{shown(name)} holds no texts ({', '.join(TEXTS)}); give a text file, a table with a "
            "column of texts, or a hub id"
        )
    chosen = [file for file in files if _kind(file) == kinds[0]]
    rest = len(files) - len(chosen)
    return open_files(path, chosen, name, kinds[0]), f"{rest:,} other files" if rest else ""


def _kind(path: Path) -> str:
    return TEXTS.get(path.suffix.lower(), "")


def _files(folder: Path) -> Iterator[Path]:
    """All below a folder in the order of their paths, but hidden ones and what systems drop."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in DROPPINGS)
        yield from (
            check_regular(Path(place) / name)
            for name in sorted(names)
            if not name.startswith(".") and _kind(Path(name))
        )


def _column(table: "Dataset", wanted: str, name: str) -> str:
    """The column of texts: the wanted one, one of the usual names, or the only one there is."""
    texts = [c for c, kind in table.features.items() if "string" in getattr(kind, "dtype", "")]
    if wanted:
        if wanted not in texts:
            raise UserError(f"--text-column: no texts in {wanted!r}{nearest(wanted, texts)}")
        return wanted
    found = [c for c in COLUMNS if c in texts] or texts
    if not found:
        raise UserError(
            f"{shown(name)} has no column of texts; its columns are {shown(table.column_names)}"
        )
    if len(found) > 1 and found[0] not in COLUMNS:
        raise UserError(
            f"{shown(name)} has texts in {shown(', '.join(found))}; name one with --text-column"
        )
    return found[0]


def _documents(table: "Dataset", column: str) -> Iterator[str]:
    for row in table.select_columns([column]):
        if isinstance(text := row[column], str):
            yield text


def _tokens(documents: Iterable[str], tokenize: Tokenize) -> tuple[torch.Tensor, str]:
    """All tokens, (T,) int32, up to `MOST_TOKENS`, and what is not among them."""
    parts: list[torch.Tensor] = []
    rest, total = iter(documents), 0
    while total < MOST_TOKENS and (batch := list(_some(rest))):
        ids = tokenize(BLANK_LINE.join(batch) if not parts else BLANK_LINE + BLANK_LINE.join(batch))
        parts.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
    more = f"what comes after {total:,} tokens" if next(rest, None) is not None else ""
    return torch.cat([*parts, torch.zeros(0, dtype=torch.int32)]), more


def _some(documents: Iterator[str]) -> Iterator[str]:
    """The next documents of `TOGETHER` characters or more."""
    count = 0
    for text in documents:
        yield text
        count += len(text)
        if count >= TOGETHER:
            return
