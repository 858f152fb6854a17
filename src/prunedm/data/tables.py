"""Images in tables of `datasets`: saved ones, any parquet files, or the hub's."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunedm.data.files import BROKEN, SUFFIXES, FolderFiles, locate, open_lazily, shown
from prunedm.data.labels import Labels, caption_column, label_column, number, whole_captions
from prunedm.data.splits import HELD_OUT, split_of, split_of_file, split_of_path
from prunedm.errors import UserError, first_line, nearest
from prunedm.reading import YAML_LIMIT, check_regular, parse_yaml, read_text

if TYPE_CHECKING:
    from datasets import Dataset

# files that `save_to_disk` writes, and what lies beside each; other programs write a state.json too
MARKERS = {"dataset_dict.json": "*/*.arrow", "state.json": "*.arrow"}
# endings of files of texts, and the builder of `datasets` that reads each
TEXTS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv",
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text",
}  # fmt: skip


class Column(Sequence[Any]):
    """A table's images as they are stored, read row by row: a file's bytes or its path."""

    def __init__(self, table: "Dataset", column: str, name: str) -> None:
        self.table, self.column, self.name = table.select_columns([column]), column, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        item = self.table[int(index)][self.column]
        if isinstance(item, dict):
            path = item.get("path")
            item = item.get("bytes") or (Path(path) if path else None)
        if item is None:
            raise UserError(f"cannot read image {index} of {self.name!r}: the row has none")
        return item


@dataclass(frozen=True)
class Tables:
    """One table per split; columns without a name are guessed."""

    name: str
    splits: Mapping[str, "Dataset"]
    image_column: str = ""
    label_column: str = ""

    def images(self, split: str) -> Column:
        import datasets

        table = self.splits[split]
        column = self._image_column(table)
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        return Column(table, column, self.name)

    def labels(self, split: str) -> Labels:
        """Classes of the split's images, numbered by the training split's names."""
        import datasets

        table = self.splits[split]
        scalars = {key: kind for key, kind in table.features.items() if hasattr(kind, "dtype")}
        declared = [key for key, kind in scalars.items() if isinstance(kind, datasets.ClassLabel)]
        possible = [
            key
            for key, kind in scalars.items()
            if isinstance(kind, datasets.Value) and kind.dtype.startswith(_LABEL_TYPES)
        ]
        column, why = label_column(declared, possible, table.column_names, self.label_column)
        if not column:
            columns = shown(", ".join(table.column_names))
            absent = f"no label column among {columns}; name one with --label-column"
            return Labels(why=why or absent, absent=not why)
        first = next(
            (
                s
                for s, other in self.splits.items()
                if s not in HELD_OUT and column in other.features
            ),
            split,
        )
        values = self._values(split, column)
        training = values if first == split else self._values(first, column)
        return number(values, training, lambda i: f"image {i}")

    def captions(self, split: str, wanted: str) -> list[str] | None:
        """The caption of each image, the first of several, or None without a caption column."""
        column = caption_column(self.splits[split].column_names, wanted)
        if column is None:
            return None
        values = self._values(split, column)
        texts = [value[0] if isinstance(value, list) and value else value for value in values]
        return whole_captions(texts, lambda i: f"image {i} of {self.name!r}")

    def _values(self, split: str, column: str) -> list[Any]:
        found: list[Any] = self.splits[split].select_columns([column]).to_dict()[column]
        return found

    def _image_column(self, table: "Dataset") -> str:
        import datasets

        columns = table.column_names
        if self.image_column and self.image_column not in columns:
            wanted = self.image_column
            raise UserError(f"--image-column: no column {wanted!r}{nearest(wanted, columns)}")
        declared = [c for c in columns if isinstance(table.features[c], datasets.Image)]
        found = declared or [c for c in columns if _holds_images(table, c)]
        if self.image_column:
            found = [c for c in columns if c == self.image_column and _holds_images(table, c)]
        usual = [c for c in found if c in ("image", "img")]
        if not found:
            raise UserError(
                f"dataset {self.name!r} has no image column; its columns are {shown(columns)}"
            )
        if len(found) > 1 and len(usual) != 1:
            raise UserError(
                f"dataset {self.name!r} has images in {shown(', '.join(found))}; name one with "
                "--image-column"
            )
        return (usual or found)[0]


_FIRST_ROWS = 10
_README = 1 << 22  # bytes
_LABEL_TYPES = ("int", "uint", "bool", "string", "large_string", "float")


def _holds_images(table: "Dataset", column: str) -> bool:
    """Whether one of a column's first rows is an image; pandas does not declare it."""
    import datasets

    kind = table.features[column]
    if isinstance(kind, datasets.Image):
        return True
    binary = isinstance(kind, datasets.Value) and "binary" in kind.dtype
    if not (binary or (isinstance(kind, dict) and "bytes" in kind)) or not len(table):
        return False
    rows = Column(table, column, "")
    return any(_is_image_at(rows, index) for index in range(min(_FIRST_ROWS, len(rows))))


def _is_image_at(rows: Column, index: int) -> bool:
    try:
        return _is_image(rows[index])
    except UserError:  # the row has none
        return False


def _is_image(item: Any) -> bool:
    try:
        open_lazily(item if isinstance(item, bytes) else check_regular(item))
    except BROKEN:
        return False
    return True


def find_dataset(name: str) -> Path | None:
    """A folder or parquet file of this name, or None if nothing exists there, as for a hub id.

    Raises `UserError` for any other file, with what to give instead.
    """
    path = locate(name)
    if path is None or path.is_dir():
        return path
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"dataset {shown(name)!r} is neither a folder nor a regular file")
    if suffix != ".parquet":
        packed = suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".7z", ".rar", ".zst")
        way = (
            "unpack it and give the folder" if packed
            else "give the folder it is in" if suffix in SUFFIXES
            else "only fid and stats read an .npz; give a folder of images" if suffix == ".npz"
            else "give a folder of images, a parquet file or a hub id"
        )  # fmt: skip
        raise UserError(f"dataset {shown(name)!r} is a file, not a set of images; {way}")
    return path


def table_files(folder: Path, found: FolderFiles) -> list[Path]:
    """The files that make a folder a dataset: from `save_to_disk`, or parquet files with images.

    A table of captions or embeddings beside images is not one. Raises `UserError` where a table of
    images lies beside image files, since either could be meant.
    """
    marked = [folder / name for name, others in MARKERS.items() if (folder / name).is_file()
              and next(folder.glob(others), None)]  # fmt: skip
    if marked:
        return marked
    if not found.files:
        return found.tables
    tables = [path for path in found.tables if _has_image(path)]
    beside = {path.parent for path in found.files}
    for path in tables:
        if path.parent in beside:
            raise UserError(
                f"{shown(folder)!r} holds {len(found.files):,} image files and {path.name}, a table "
                "of images; give one of them, or move one away"
            )
    return tables


def _has_image(path: Path) -> bool:
    """Whether one of a table's first rows holds an image, as bytes or by the path of a file."""
    import pyarrow.parquet
    from pyarrow import types

    try:
        with pyarrow.parquet.ParquetFile(check_regular(path)) as table:
            schema = table.schema_arrow
            if b'"_type": "Image"' in (schema.metadata or {}).get(b"huggingface", b""):
                return True
            columns = [
                name
                for name, kind in zip(schema.names, schema.types, strict=True)
                if types.is_struct(kind) or "binary" in str(kind)
            ]
            rows = next(table.iter_batches(_FIRST_ROWS, columns=columns), None) if columns else None
            return rows is not None and any(map(_is_image, _cells(rows.to_pylist())))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {shown(path)}: {first_line(error)}") from error


def _cells(rows: Sequence[dict[str, Any]]) -> Iterator[Any]:
    for cell in (cell for row in rows for cell in row.values()):
        fields = cell if isinstance(cell, dict) else {"bytes": cell}
        if isinstance(fields.get("bytes"), bytes):
            yield fields["bytes"]
        elif isinstance(fields.get("path"), str):
            yield Path(fields["path"])


def open_folder(folder: Path, files: Sequence[Path], name: str) -> dict[str, "Dataset"]:
    """The splits of a folder for which `table_files` gave `files`."""
    import datasets

    if files[0].name not in MARKERS:
        declared = _declared(folder, files)
        return _open_splits(declared, name) if declared else open_files(folder, files, name)
    with reading(name):
        for path in folder.rglob("*"):
            if not path.is_dir():
                check_regular(path)
        return named_splits(datasets.load_from_disk(str(folder)))


def _declared(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split that README.md declares, as in repositories of the hub; {} for none.

    Parsed here because `datasets` does not limit sizes, and would download remote files. Raises
    `UserError` for several configurations without a default.
    """
    readme = folder / "README.md"
    text = read_text(readme, limit=_README) if readme.exists() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = parse_yaml(head[1], readme) if head and len(head[1]) <= YAML_LIMIT else None
    every = found.get("configs") if isinstance(found, dict) else None
    configs = [c for c in every if isinstance(c, dict)] if isinstance(every, list) else []
    chosen = [
        c for c in configs if c.get("default") or c.get("config_name") == "default"
    ] or configs
    if len(chosen) > 1:
        names = ", ".join(str(c.get("config_name")) for c in chosen)
        raise UserError(
            f"{shown(readme)} names several configurations ({shown(names)}): write `default: true` "
            "under one, or give one of their parquet files"
        )
    groups = _patterns(chosen[0].get("data_files")) if chosen else {}
    matched = {
        split: [path for path in files for pattern in patterns if path.match(pattern)]
        for split, patterns in groups.items()
    }
    return {split: list(dict.fromkeys(paths)) for split, paths in matched.items() if paths}


def _patterns(files: Any) -> dict[str, list[str]]:
    """Path patterns by split, from any form of `data_files`."""
    if isinstance(files, (str, dict)):
        files = [files]
    groups: dict[str, list[str]] = {}
    for entry in files if isinstance(files, list) else []:
        fields = entry if isinstance(entry, dict) else {"path": entry}
        paths = fields.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and path.strip("/"):
                groups.setdefault(str(fields.get("split", "train")), []).append(path)
    return groups


def open_files(
    folder: Path, files: Sequence[Path], name: str, kind: str = "parquet"
) -> dict[str, "Dataset"]:
    """Files below `folder` that the builder `kind` of `datasets` reads, a whole text file as one row.

    Splits are by the names of folders or files.
    """
    groups: dict[str, list[Path]] = {}
    for path in files:
        inner = path.parts[len(folder.parts) : -1]
        split = split_of_path(inner) or split_of_file(path.stem) or "train"
        groups.setdefault(split, []).append(check_regular(path))
    return _open_splits(groups, name, kind)


def _open_splits(
    groups: Mapping[str, Sequence[Path]], name: str, kind: str = "parquet"
) -> dict[str, "Dataset"]:
    import datasets

    files = {split: [str(path) for path in paths] for split, paths in groups.items()}
    how = {"sample_by": "document"} if kind == "text" else {}
    with reading(name):
        return named_splits(datasets.load_dataset(kind, data_files=files, **how))


def named_splits(loaded: Any) -> dict[str, "Dataset"]:
    """Tables by "train", "test" and "validation", others by their own names."""
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}
    named: dict[str, Dataset] = {}
    for raw, table in tables.items():
        split = split_of(str(raw))
        named[str(raw) if not split or split in named else split] = table
    return named


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what `datasets` raises, a dozen types, into one-line errors, and keep it from logging."""
    import datasets

    loudness, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():  # a log file would get every step
        datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"cannot read dataset {shown(name)!r}: {shown(reason)}") from error
    finally:
        datasets.logging.set_verbosity(loudness)
        if not bars:
            datasets.enable_progress_bars()
