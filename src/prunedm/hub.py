"""Finding a model: a folder, the embedded one, or a snapshot from the hub."""

import difflib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from itertools import islice
from pathlib import Path

from prunedm.errors import UserError, first_line, shortened
from prunedm.system.places import expanded

EMBEDDED = ("digits",)
PROBE_SECONDS = 5.0
_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja"]  # configurations and tokenizers
_KINDS = {
    "PyTorch weights": (".pt", ".pth", ".bin", ".ckpt", ".pkl"),
    "weights without a config.json": (".safetensors",),
    "an archive": (".zip", ".tar", ".gz", ".tgz", ".7z"),
    "an exported network": (".onnx", ".pt2", ".engine", ".xml"),
    "a configuration": (".json", ".yaml", ".yml"),
    "images": (".npz", ".npy", ".png", ".jpg", ".jpeg", ".parquet"),
}


def find(source: str | Path) -> Path:
    """The local folder of a model. Raises `UserError` where there is none."""
    folder = find_locally(source)
    return _snapshot(str(source)) if folder is None else folder


def find_locally(source: str | Path) -> Path | None:
    """The folder, or None for a hub id. Raises `UserError` for anything else."""
    name = str(source)
    try:
        path = expanded(source)
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:  # too long
        raise UserError(f"no model at {shortened(name)!r}: {error.strerror}") from error
    if name in EMBEDDED:
        return Path(str(resources.files("prunedm") / "assets" / name))
    if exists:
        raise UserError(_about_file(path))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"no model at {shortened(name)!r}: give a folder, a hub id like owner/name, or digits"
            + near(name, EMBEDDED)
        )
    return None


def _about_file(path: Path) -> str:
    suffix, above = path.suffix.lower(), path.parent
    kind = next((kind for kind, suffixes in _KINDS.items() if suffix in suffixes), "a file")
    around = [above, above.parent]
    model = next((f for f in around if (f / "model_index.json").exists()), None)
    model = model or next((f for f in around if (f / "config.json").exists()), None)
    way = f"give {model}" if model else "give the folder with model_index.json, or unet/config.json"
    return f"{shortened(str(path))} is {kind}, and not a model folder; {way}"


def near(name: str, also: Sequence[str] = ()) -> str:
    """The end of a message: a similar neighbouring folder or name in `also`, or ""."""
    path, beside = Path(name), list[Path]()
    with suppress(OSError, ValueError):  # no such folder, or an impossible name
        path = expanded(name)
        beside = [p for p in islice(path.parent.iterdir(), 1000) if p.is_dir()]
    known = {p.name: str(p) for p in beside} | {name: name for name in also}
    found = difflib.get_close_matches(path.name, known, n=1, cutoff=0.6)
    return f"; did you mean {known[found[0]]!r}?" if found else ""


def _snapshot(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    why = why_silent(lambda limit: HfApi().model_info(hub_id, timeout=limit))
    problem = "none of this name that you may read" if why is None else why
    local = {"local_files_only": True} if problem else {}  # from an earlier download
    try:
        folder = Path(
            snapshot_download(hub_id, allow_patterns=[*_BESIDE, "*.safetensors"], **local)
        )
        if not any(folder.rglob("*.safetensors")):
            binary = [*_BESIDE, "*.bin"]
            folder = Path(snapshot_download(hub_id, allow_patterns=binary, **local))
    except Exception as error:  # network, authentication, no such repository
        raise UserError(
            f"cannot get model {hub_id!r}: no such folder, and the hub says: "
            f"{problem or first_line(error)[:160]}{near(hub_id, EMBEDDED)}"
        ) from error
    return folder


def why_silent(question: Callable[[float], object]) -> str | None:
    """Why the hub does not answer; "" where it does, None where it has nothing of that name.

    `question` takes a time limit in seconds. It runs in a thread that may be abandoned, since the
    limit does not cover the DNS look-up of the hub.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    answers: list[str | None] = []

    def ask() -> None:
        try:
            question(PROBE_SECONDS)
            answers.append("")
        except RepositoryNotFoundError:
            answers.append(None)
        except OfflineModeIsEnabled:
            answers.append("HF_HUB_OFFLINE is set")
        except Exception as error:
            answers.append(first_line(error)[:160])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"no answer in {PROBE_SECONDS:g} s"
