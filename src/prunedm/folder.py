"""The only reader and writer of model folders.

A model folder is a diffusers pipeline folder (`model_index.json`, `unet/`, `scheduler/`) and, where
we wrote it, `masks.safetensors` and `record.json`. Nothing in a folder is ever executed: class names
are looked up in the short tables below, weights are safetensors (or `.bin` read as plain tensors).
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunedm.diffusion import example, sample_shape
from prunedm.errors import UserError
from prunedm.hub import find
from prunedm.masks import Masks, load_masks, save_masks
from prunedm.model_files.configs import read_unet_config
from prunedm.model_files.schedule import find_scheduler
from prunedm.model_files.weights import check_state, filled, load_network, weight_files
from prunedm.narrowed import Narrowed
from prunedm.packed import load_packed
from prunedm.reading import read_object
from prunedm.record import Record, read_record, write_json, write_record

MASKS_FILE = "masks.safetensors"
PACKED_FILE = "packed.safetensors"  # weights and masks in one, as `export` writes them
EXPORT_FILE = "export.json"
_DIFFUSERS = "DDPMPipeline"


@dataclass
class Model:
    """A trained diffusion model: the denoiser, its noise scheduler, masks if any, and its record."""

    denoiser: Any  # of a class of DENOISERS
    scheduler: Any
    masks: Masks | None = None
    record: Record | None = None
    name: str = ""
    hash: str = ""
    pipeline: str = "DDPMPipeline"
    dtype: torch.dtype = torch.float32  # of the weights on disk; in memory they are float32
    notes: tuple[str, ...] = ()  # what was found, chosen or assumed besides what the folder says
    scheduler_file: Path | None = None  # where it was given, instead of the folder's
    scheduler_assumed: bool = False

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return sample_shape(self.denoiser)

    def example(self, count: int = 1, *, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs to trace, time, count and export with: noise at timesteps from first to last.

        Classes come in turn.
        """
        last = self.scheduler.config.num_train_timesteps - 1
        return example(self.denoiser, count, last=last, seed=seed)

    def round_to_dtype(self) -> None:
        """Give the weights the values that the saved file will hold, so figures are of those."""
        _set_dtype(self.denoiser, self.dtype)
        _set_dtype(self.denoiser, torch.float32)

    @property
    def conditional(self) -> bool:
        """Whether the denoiser wants class labels."""
        return getattr(self.denoiser, "class_embedding", None) is not None


def load(source: str | Path, *, scheduler: str | Path | None = None) -> Model:
    """A model from a folder, a hub id, or the embedded 'digits'.

    A diffusers training folder's checkpoint-N will do, and its unet or unet_ema: the noise schedule is
    then the run's. `scheduler`: a folder or scheduler_config.json to take instead. `Model.notes` says
    what was chosen or assumed. Raises `UserError` where it is no model, of an unsupported class, or
    its files are damaged.
    """
    folder, notes = model_folder(source)
    index, exported = (_description(folder / name) for name in ("model_index.json", EXPORT_FILE))
    _refuse_other_components(index, folder)
    if not (folder / PACKED_FILE).exists() and exported:
        raise UserError(
            f"{source} is an exported file, which only `sample` takes; give the model folder that it "
            "was made from, or a packed export"
        )
    found = find_scheduler(folder, scheduler)
    if (folder / PACKED_FILE).exists():
        denoiser, masks, dtype = _load_packed(folder)
    else:
        where = _component(folder, "unet")
        denoiser, dtype, variant = load_network(read_unet_config(where), where)
        masks = load_masks(folder / MASKS_FILE) if (folder / MASKS_FILE).exists() else None
        notes += [f"weights of the variant {variant}"] if variant else []
    model = Model(
        denoiser=denoiser,
        scheduler=found.scheduler,
        masks=masks,
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder, *([found.file] if found.file and not scheduler else [])),
        pipeline=str(index.get("_class_name") or exported.get("pipeline") or _DIFFUSERS),
        dtype=dtype,
        notes=(*notes, *[found.note] * bool(found.note)),
        scheduler_file=found.file if scheduler else None,
        scheduler_assumed=found.assumed,
    )
    if masks is not None:
        masks.check_pattern()
        _refuse_violations(model, str(source))
    return model


def model_folder(source: str | Path) -> tuple[Path, list[str]]:
    """The folder with a model_index.json or config.json, and what was chosen to come to it.

    Of a training checkpoint the averaged weights: those that the run itself saves and samples from.
    """
    folder = find(source)
    names = ("model_index.json", "config.json", EXPORT_FILE)
    if any((folder / name).exists() for name in names):
        return folder, []
    unets = [name for name in ("unet_ema", "unet") if (folder / name / "config.json").is_file()]
    if unets:
        other = f"; give {folder / unets[1]} for the unaveraged ones" if unets[1:] else ""
        return folder / unets[0], [f"weights of {folder / unets[0]}{other}"]
    checkpoints = [p.parent for p in folder.glob("checkpoint-*/unet*/") if p.is_dir()]
    if checkpoints:
        last = max(checkpoints, key=lambda p: (len(p.name), p.name))
        raise UserError(f"{source} is a training run that has saved no model yet; give {last}")
    raise UserError(
        f"{source} is no model folder (no model_index.json or config.json); "
        "give a diffusers pipeline folder, a hub id, or digits"
    )


def _description(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def save(model: Model, folder: Path) -> None:
    """Write a model folder. Raises `UserError` if a masked weight is not zero.

    The folder must be new or a stage's working folder: stages give it its final name when whole.
    """
    _refuse_violations(model, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    _set_dtype(model.denoiser, model.dtype)
    model.denoiser.save_pretrained(folder / "unet", safe_serialization=True)
    _set_dtype(model.denoiser, torch.float32)
    _forget_origin(folder / "unet" / "config.json")
    model.scheduler.save_pretrained(folder / "scheduler")
    cls = type(model.denoiser).__name__
    library = "prunedm" if isinstance(model.denoiser, Narrowed) else "diffusers"
    index = {
        "_class_name": model.pipeline,
        "_diffusers_version": model.denoiser.config["_diffusers_version"],
        "scheduler": ["diffusers", type(model.scheduler).__name__],
        "unet": [library, cls],
    }
    write_json(index, folder / "model_index.json")
    if model.masks is not None:
        save_masks(model.masks, folder / MASKS_FILE)
    if model.record is not None:
        write_record(model.record, folder)


def hash_folder(folder: Path, *others: Path) -> str:
    """A hash of weights, masks, configurations and `others`, whatever the folder is called."""
    digest = hashlib.sha256()
    parts = sorted(path for path in folder.rglob("*") if _is_part_of_model(path, folder))
    for path in (*parts, *others):
        digest.update((path.name if path in others else str(path.relative_to(folder))).encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _is_part_of_model(path: Path, folder: Path) -> bool:
    if path.parent not in (folder, folder / "unet", folder / "scheduler"):
        return False
    configurations = ("model_index.json", "config.json", "scheduler_config.json", EXPORT_FILE)
    return path.name in configurations or path.suffix in (".safetensors", ".bin")


def size_on_disk(folder: Path) -> int:
    """Bytes of the denoiser's weight files."""
    folder, _ = model_folder(folder)
    if (folder / PACKED_FILE).exists():
        return (folder / PACKED_FILE).stat().st_size
    files, _ = weight_files(_component(folder, "unet"))
    return sum(path.stat().st_size for path in files)


def _set_dtype(denoiser: Any, dtype: torch.dtype) -> None:
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(dtype)


def _forget_origin(config: Path) -> None:
    # diffusers notes the path a model was loaded from, so equal models would differ in their hash
    kept = {key: value for key, value in read_object(config).items() if key != "_name_or_path"}
    write_json(kept, config)


def _refuse_other_components(index: dict[str, Any], folder: Path) -> None:
    # a latent pipeline's UNet would load, and be taken for one that works on pixels
    for name, value in index.items():
        if not name.startswith("_") and name not in ("unet", "scheduler") and value != [None, None]:
            raise UserError(
                f"{folder} has a component {name!r}; supported: unet and scheduler only"
            )


def _refuse_violations(model: Model, where: str) -> None:
    if model.masks is None:
        return
    violations = model.masks.violations(model.denoiser)
    if violations:
        layer, count = next(iter(violations.items()))
        raise UserError(
            f"{where}: masks do not hold in {len(violations)} layers, first {layer} with {count} "
            "weights; apply the masks again, or remove masks.safetensors"
        )


def _component(folder: Path, name: str) -> Path:
    # old hub repositories (google/ddpm-cifar10-32) keep everything in the root
    return folder / name if (folder / name).is_dir() else folder


def _load_packed(folder: Path) -> tuple[Any, Masks | None, torch.dtype]:
    """A denoiser from one file of weights and masks; its arithmetic is float32 as everywhere."""
    config, path = read_unet_config(folder), folder / PACKED_FILE
    state, masks = load_packed(path)
    types = Counter(tensor.dtype for tensor in state.values())
    dtype = max(types.items(), key=lambda kind: kind[1], default=(torch.float32, 0))[0]
    check_state(config, state, path)
    return filled(config, state), masks, dtype


def save_config(model: Model, folder: Path) -> None:
    """The denoiser's config.json and the scheduler, for a folder whose weights are elsewhere."""
    model.denoiser.save_config(folder)
    _forget_origin(folder / "config.json")
    model.scheduler.save_pretrained(folder / "scheduler")
