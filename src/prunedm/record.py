"""record.json: a stage's options, inputs, environment and figures. One in every folder we write."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from prunedm.options import PATH_OPTIONS
from prunedm.reading import check_regular, read_as
from prunedm.system.places import bare, located, portable

FILE = "record.json"
MISSING = "not installed"
_PACKAGES = ("prunedm", "torch", "diffusers", "numpy", "torch-pruning")
_EXTRAS = ("onnx", "onnxruntime", "openvino", "nncf", "tensorrt")  # named where installed


class Source(BaseModel):
    """A model folder or dataset used as input: its place, and the hash of its content.

    On disk a local path is relative to the folder of the record, in memory it is absolute.
    """

    path: str
    hash: str


class Record(BaseModel):
    """One stage's record; `history` holds those of all stages before it, oldest first."""

    stage: str
    options: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Source] = Field(default_factory=dict)
    seed: int | None = None
    created: str = ""
    wall_time_s: float = 0.0
    device: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    figures: dict[str, Any] = Field(default_factory=dict)
    history: list["Record"] = Field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the stage, its options and the hashes of its inputs."""
        hashes = {role: source.hash for role, source in self.inputs.items()}
        return comparable({"stage": self.stage, "options": self.options, "inputs": hashes})

    def lineage(self) -> list["Record"]:
        """All records from the first model to this one."""
        return [*self.history, self]


def read_record(folder: Path) -> Record | None:
    """The folder's record, or None where it has none (a foreign model)."""
    return read_record_file(folder / FILE, folder)


def read_record_file(path: Path, folder: Path, way_out: str = "") -> Record | None:
    """The record in file `path`, about `folder`; None where there is no such file.

    Raises `UserError` where it is damaged.
    """
    if not path.exists():
        return None
    way_out = way_out or f"make {folder} again, or delete this file to continue without it"
    record = read_as(Record, path, way_out)
    return with_paths(record, lambda text: located(text, folder))


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with only the last part of paths, whose content is compared by hash."""
    options = {
        name: bare(str(value)) if value and name in PATH_OPTIONS else finite(value)
        for name, value in identity["options"].items()
    }
    return identity | {"options": options}


def with_paths(record: Record, change: Callable[[str], str]) -> Record:
    """A copy with every path in sources and options changed, also in its history."""
    inputs = {
        role: source.model_copy(update={"path": change(source.path)})
        for role, source in record.inputs.items()
    }
    options = {
        name: change(value) if name in PATH_OPTIONS and isinstance(value, str) else value
        for name, value in record.options.items()
    }
    history = [with_paths(stage, change) for stage in record.history]
    return record.model_copy(update={"inputs": inputs, "options": options, "history": history})


def file_hash(path: Path) -> str:
    """The first 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    with check_regular(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def bare_paths(record: Record | None) -> Record | None:
    """A copy with only the last part of local paths, for files that are only displayed."""
    return None if record is None else with_paths(record, bare)


def write_record(record: Record, folder: Path, name: str = FILE) -> None:
    """Write `record` with paths relative to the folder, or to the one a working folder becomes."""
    told = with_paths(record, lambda text: portable(text, folder))
    write_json(told.model_dump(mode="json"), folder / name)


def write_json(value: Any, path: Path, aside: Path | None = None) -> None:
    """Write aside and rename: a reader sees either the old or the new file.

    Numbers that are not finite become null. The name of `aside` is fixed, so that the next write
    replaces what a kill left behind.
    """
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n", aside)


def replace_text(path: Path, text: str, aside: Path | None = None) -> None:
    """As `write_json`, for any text."""
    aside = aside or path.with_name(f"{path.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """A copy with None for numbers that are not finite, also within lists and tables."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def environment(device: str = "auto") -> dict[str, Any]:
    """Current versions, device and time, as fields of a record."""
    versions = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    extras = {name: _version(name) for name in _EXTRAS}
    versions |= {name: version for name, version in extras.items() if version != MISSING}
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"versions": versions, "device": device_name(device), "created": created}


def device_name(device: str = "auto") -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return _installed(package)
    except metadata.PackageNotFoundError:
        return MISSING


@cache  # the metadata of all packages takes 50 ms to read; what is missing may be installed yet
def _installed(package: str) -> str:
    return metadata.version(package)
