"""Where a model is: a folder, the embedded one, or the hub's snapshot."""

from importlib import resources
from pathlib import Path

from prunedm.errors import UserError, first_line

EMBEDDED = ("digits",)


def find(source: str | Path) -> Path:
    """The local folder of a model: itself, the embedded one, or the hub's snapshot."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if str(source) in EMBEDDED:
        return Path(str(resources.files("prunedm") / "assets" / str(source)))
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(
            f"no model at {str(source)!r}: give a folder, a hub id like owner/name, or digits"
        )
    return _snapshot(str(source))


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # network, authentication, no such repository
        raise UserError(
            f"cannot get model {hub_id!r}: no such folder, and the hub says: {first_line(error)}"
        ) from error
    return folder
