"""Class labels of images, from class folders, metadata files or a table's column.

Names are numbered 0..n-1 in sorted order, as in `datasets` and torchvision; integers stay.
"""

import csv
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from prunedm.data.files import METADATA, shown
from prunedm.data.splits import place_of_split, split_of_path
from prunedm.errors import UserError, first_line, nearest
from prunedm.reading import check_regular, parse_json, read_text

_METADATA_LIMIT = 1 << 28  # bytes, at some 100 a row
# usual names of a caption column, the likeliest first
CAPTIONS = ("text", "caption", "captions", "prompt")
_NAMES = {
    "label",
    "labels",
    "class",
    "classes",
    "category",
    "target",
}  # last words of names
_NUMBERS = {"id", "idx", "index", "name", "number"}  # may follow it


@dataclass(frozen=True)
class Labels:
    """One class per image, or why there are none; `absent` if no image at all has one."""

    values: Sequence[int] | None = None
    why: str = ""
    absent: bool = False


def number(values: Sequence[Any], training: Iterable[Any], name_of: Callable[[int], str]) -> Labels:
    """Classes from raw `values`; names are numbered by those in `training`."""
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain}
    classes = sorted({text for text in map(_plain, training) if isinstance(text, str)})
    numbers = {text: index for index, text in enumerate(classes)}
    faults = [i for i, value in enumerate(plain) if not _is_class(value, numbers)]
    if kinds == {int, str}:
        return Labels(why="some labels are numbers and some are texts")
    if faults:
        value = plain[faults[0]]
        said = (
            "is not labelled" if value is None
            else f"has label {value}, and labels start at 0" if isinstance(value, int)
            else f"is of class {shown(value)!r}, which no training image has"
            if isinstance(value, str)
            else f"has a label that is neither an integer nor a text: {shown(value)}"
        )  # fmt: skip
        return Labels(why=f"{name_of(faults[0])} {said}", absent=len(faults) == len(plain))
    return Labels([numbers.get(value, value) for value in plain])


def _is_class(value: Any, numbers: Mapping[str, int]) -> bool:
    return value in numbers if isinstance(value, str) else isinstance(value, int) and value >= 0


def _plain(value: Any) -> Any:
    """The value as pandas meant it: integers beside gaps are written as floats; "" is a gap too."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return int(value) if isinstance(value, bool) else value


def label_column(
    declared: Sequence[str], possible: Sequence[str], columns: Sequence[str], wanted: str
) -> tuple[str, str]:
    """A table's label column: `declared` classes, else `possible` ones by name.

    Returns "" and the reason where several qualify, "" and "" where none does. Raises `UserError` where
    the `wanted` column is missing.
    """
    if wanted and wanted not in columns:
        raise UserError(f"--label-column: no column {wanted!r}{nearest(wanted, columns)}")
    by_name = [c for c in possible if _names_labels(c)]
    found = [wanted] if wanted else declared or by_name
    if len(found) > 1:
        return "", f"{shown(', '.join(found))} could all be labels; name one with --label-column"
    return found[0] if found else "", ""


def _names_labels(column: str) -> bool:
    """ "label", "fine_label", "class id", but not "target_size"."""
    words = [word for word in re.split(r"[\W_]+", column.lower()) if word]
    while len(words) > 1 and (words[-1] in _NUMBERS or words[-1].isdigit()):
        words.pop()
    return bool(words) and words[-1] in _NAMES


def file_labels(
    root: Path, groups: Mapping[str, Sequence[Path]], training: str, wanted: str
) -> Callable[[str], Labels]:
    """Labels by group of files: from metadata files that have some, else from class folders."""
    found, why = _described(root, groups, wanted)
    if found is None and not why:
        found, why = _class_folders(root, groups, training)
    if found is None:
        return lambda _: Labels(why=why)
    raw = {group: [found.get(_key(path)) for path in files] for group, files in groups.items()}
    return lambda group: number(
        raw[group], raw[training], lambda i: shown(groups[group][i].relative_to(root))
    )


def _key(path: Path) -> str:
    return os.path.normpath(path)


def _class_folders(
    root: Path, groups: Mapping[str, Sequence[Path]], training: str
) -> tuple[dict[str, str] | None, str]:
    """Each file's class: its only folder below those that all training files share. Or why not."""
    depth = len(root.parts)
    folders = {_key(path): path.parts[depth:-1] for files in groups.values() for path in files}
    if len(groups) > 1 or all(map(split_of_path, folders.values())):  # else "train" is a class
        # the topmost folder that names a split is not a class
        places = {path: place_of_split(parts) for path, parts in folders.items()}
        folders = {
            p: (*parts[: places[p]], *parts[places[p] + 1 :]) for p, parts in folders.items()
        }
    own = {folders[_key(path)] for path in groups[training]}
    if len(own) == 1:
        return None, "they lie in one folder; a folder for each class gives labels"
    shared = next(
        (i for i, names in enumerate(zip(*own, strict=False)) if len(set(names)) > 1),
        min(map(len, own)),
    )
    if any(len(parts) > shared + 1 for parts in own):
        return None, "they lie in folders of folders; classes are folders side by side"
    return {path: parts[shared] for path, parts in folders.items() if len(parts) == shared + 1}, ""


def _described(
    root: Path, groups: Mapping[str, Sequence[Path]], wanted: str
) -> tuple[dict[str, Any] | None, str]:
    """Each file's label from metadata files, or None and why, if known."""
    rows = _metadata(root, [path for files in groups.values() for path in files])
    kinds: dict[str, set[type]] = {}
    for _, row in rows:
        for key, value in row.items():
            kinds.setdefault(key, set()).add(type(_plain(value)))
    columns = [key for key in kinds if key != "file_name"]
    possible = [key for key in columns if kinds[key] - {type(None)} <= {int, str}]
    if wanted and not rows:
        raise UserError(f"--label-column {wanted}: {shown(root)!r} has no metadata file")
    column, why = label_column([], possible, columns, wanted)
    if not column:
        return None, why
    return _by_file(rows, column), ""


def _by_file(rows: Sequence[tuple[Path, dict[str, Any]]], column: str) -> dict[str, Any]:
    """Each file's value. Raises `UserError` where two rows of one file disagree."""
    found: dict[str, Any] = {}
    for folder, row in rows:
        name, value = row.get("file_name"), row.get(column)
        if isinstance(name, str) and found.setdefault(_key(folder / name), value) != value:
            raise UserError(
                f"metadata in {shown(folder)!r} has two rows for {shown(name)} that differ in {column}; "
                "keep one"
            )
    return found


def file_captions(root: Path, files: Sequence[Path], wanted: str) -> list[str] | None:
    """The caption of each file from metadata files, or None where they have no caption column.

    Raises `UserError` for a missing column, and for a file without a caption.
    """
    rows = _metadata(root, files)
    column = caption_column({key for _, row in rows for key in row}, wanted)
    if column is None:
        return None
    texts = _by_file(rows, column)
    found = [texts.get(_key(path)) for path in files]
    return whole_captions(found, lambda i: shown(files[i].relative_to(root)))


def caption_column(columns: Collection[str], wanted: str) -> str | None:
    """The wanted caption column, or one of a usual name. Raises `UserError` where it is missing."""
    if wanted and wanted not in columns:
        raise UserError(f"--caption-column: no column {wanted!r}{nearest(wanted, list(columns))}")
    return wanted or next((name for name in CAPTIONS if name in columns), None)


def whole_captions(texts: Sequence[Any], name_of: Callable[[int], str]) -> list[str]:
    """All captions. Raises `UserError` naming the first image without one."""
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        first = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise UserError(
            f"{name_of(first)} has no caption; {len(texts) - len(found)} images have none"
        )
    return found


def _metadata(root: Path, files: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Rows of the metadata files beside or above these files, each with its folder."""
    folders = {path.parent for path in files}
    folders |= {above for folder in folders for above in folder.parents if root in above.parents}
    paths = [folder / name for folder in sorted(folders | {root}) for name in METADATA]
    return [(path.parent, row) for path in paths if os.path.lexists(path) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table: list[dict[str, Any]] = pyarrow.parquet.read_table(
                check_regular(path)
            ).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {shown(path)}: {first_line(error)}") from error
        return table
    text = read_text(path, limit=_METADATA_LIMIT)
    if path.suffix == ".csv":
        return _integers(_csv(text, path))
    rows = [parse_json(line, path) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{shown(path)}: a line is not a JSON object")
    return rows


def _csv(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        lines = list(csv.DictReader(StringIO(text)))
    except csv.Error as error:
        raise UserError(f"cannot read {shown(path)}: {error}") from error
    return [{key: value for key, value in row.items() if key} for row in lines]


def _integers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert the columns of a CSV that hold only integers."""
    for key in {key for row in rows for key in row}:
        texts = [(row.get(key) or "").strip() for row in rows]
        if any(texts) and all(re.fullmatch(r"-?\d{1,18}|", text) for text in texts):
            for row, text in zip(rows, texts, strict=True):
                row[key] = int(text) if text else None
    return rows
