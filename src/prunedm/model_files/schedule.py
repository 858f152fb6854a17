"""The noise schedule that a denoiser was trained with: beside it, in the run it came from, or given."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunedm.errors import UserError, first_line
from prunedm.model_files.configs import SCHEDULER_RANGES, check_config, shown
from prunedm.reading import read_object
from prunedm.system.places import expanded
from prunedm.task.process import process_of, scheduler_class

FILE = "scheduler_config.json"
ABOVE = 2  # folders: run/checkpoint-500/unet_ema


@dataclass(frozen=True)
class Found:
    """A scheduler, and what a user is to know of where it comes from ("": from the folder itself)."""

    scheduler: Any
    note: str = ""
    file: Path | None = None  # outside of the model's folder
    assumed: bool = False


def find_scheduler(
    folder: Path, given: str | Path | None = None, default: str = "DDPMScheduler"
) -> Found:
    """The one that is `given` (a folder or a file), the folder's, its run's, or the paper's.

    default: the class whose defaults are the paper's.
    """
    if given:
        file = _given(expanded(given))
        return Found(scheduler := read_scheduler(file), _note(scheduler, file), file)
    own = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    if (own / FILE).exists():
        return Found(read_scheduler(own / FILE))
    for above in list(Path(os.path.abspath(folder)).parents)[:ABOVE]:  # noqa: PTH100 (links stay)
        places = [above / "scheduler" / FILE]
        places += [above / FILE] if (above / "model_index.json").exists() else []
        for file in places:
            if file.is_file():
                return Found(scheduler := read_scheduler(file), _note(scheduler, file), file)
    scheduler = scheduler_class(default)()
    return Found(
        scheduler,
        f"no scheduler in or above {folder}: assuming {_in_words(scheduler)}; "
        "if it was trained otherwise, give --scheduler FOLDER",
        assumed=True,
    )


def read_scheduler(path: Path) -> Any:
    """The scheduler of a scheduler_config.json. Raises `UserError` where it is none, or broken."""
    config = read_object(path)
    name = config.get("_class_name")
    cls = scheduler_class(name) if isinstance(name, str) else None
    if cls is None:
        raise UserError(f"{path} names no diffusers scheduler: {shown(name)}")
    check_config(config, cls, path, SCHEDULER_RANGES)
    try:
        scheduler = cls.from_config(config)
        process_of(scheduler).check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # diffusers raises whatever it likes
        raise UserError(f"{path} describes no {name}: {first_line(error)[:160]}") from error
    return scheduler


def _given(path: Path) -> Path:
    for file in (path, path / FILE, path / "scheduler" / FILE):
        if file.is_file():
            return file
    raise UserError(
        f"--scheduler {path}: no {FILE} there; give that file, its folder, or the run's folder"
    )


def _note(scheduler: Any, file: Path) -> str:
    return f"noise schedule of {file}: {_in_words(scheduler)}"


def _in_words(scheduler: Any) -> str:
    process = process_of(scheduler)
    return f"{process.schedule_in_words()}, {process.prediction}"
