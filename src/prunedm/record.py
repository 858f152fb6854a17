"""record.json: what a stage did, with what, on what, and what came out. One in every folder we write."""

import hashlib
import json
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from prunedm.errors import UserError

FILE = "record.json"
MISSING = "not installed"
_PACKAGES = ("prunedm", "torch", "diffusers", "numpy", "torch-pruning")
_EXTRAS = ("onnx", "onnxruntime", "openvino", "nncf", "tensorrt")  # named where installed


class Source(BaseModel):
    """A model folder or dataset that went in: where it was, and the hash of what it held."""

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
        return {"stage": self.stage, "options": finite(self.options), "inputs": hashes}

    def lineage(self) -> list["Record"]:
        """All records from the first model to this one."""
        return [*self.history, self]


def read_record(folder: Path) -> Record | None:
    """The folder's record, or None where it has none (a foreign model)."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def file_hash(path: Path) -> str:
    """The first 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def write_record(record: Record, folder: Path) -> None:
    write_json(record.model_dump(mode="json"), folder / FILE)


def write_json(value: Any, path: Path) -> None:
    """Numbers that are not finite become null: JSON has none."""
    text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, within lists and tables too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions, device and time of now, as the record's fields."""
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
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
