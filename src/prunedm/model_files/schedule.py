"""The noise schedule of a denoiser: beside it, in its training run, or given."""

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
class FoundScheduler:
    """A scheduler, and a note for the user about its origin ("": the model folder itself)."""

    scheduler: Any
    note: str = ""
    file: Path | None = None  # where it is outside the model folder
    assumed: bool = False


def find_scheduler(
    folder: Path, given: str | Path | None = None, default: str = "DDPMScheduler"
) -> FoundScheduler:
    """The scheduler that is `given` (folder or file), or the folder's, its run's, or the default.

    default: the class whose defaults are the original paper's. Raises `UserError` where a file is
    damaged, or nothing is found at `given`.
    """
    own = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    if given:
        files = [_given(expanded(given))]
    elif (own / FILE).exists():
        return FoundScheduler(read_scheduler(own / FILE))
    else:
        files = []
        for above in list(Path(os.path.abspath(folder)).parents)[:ABOVE]:  # noqa: PTH100 (links stay)
            files.append(above / "scheduler" / FILE)
            files += [above / FILE] if (above / "model_index.json").exists() else []
    for file in filter(Path.is_file, files):
        scheduler = read_scheduler(file)
        return FoundScheduler(scheduler, f"noise schedule of {file}: {_in_words(scheduler)}", file)
    scheduler = scheduler_class(default)()
    return FoundScheduler(
        scheduler,
        f"no scheduler in or above {folder}: assuming {_in_words(scheduler)}; "
        "if it was trained otherwise, give --scheduler FOLDER",
        assumed=True,
    )


def read_scheduler(path: Path) -> Any:
    """The scheduler of a scheduler_config.json. Raises `UserError` where it is damaged or unknown."""
    config = read_object(path)
    name = config.get("_class_name")
    cls = scheduler_class(name) if isinstance(name, str) else None
    if cls is None:
        raise UserError(f"{path} does not name a diffusers scheduler: {shown(name)}")
    check_config(config, cls, path, SCHEDULER_RANGES)
    try:
        scheduler = cls.from_config(config)
        process_of(scheduler).check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # diffusers raises many types
        raise UserError(f"{path} does not describe a {name}: {first_line(error)[:160]}") from error
    return scheduler


def _given(path: Path) -> Path:
    for file in (path, path / FILE, path / "scheduler" / FILE):
        if file.is_file():
            return file
    raise UserError(
        f"--scheduler {path}: no {FILE} there; give that file, its folder, or the run's folder"
    )


def _in_words(scheduler: Any) -> str:
    process = process_of(scheduler)
    return f"{process.schedule_in_words()}, {process.prediction}"
