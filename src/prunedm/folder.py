"""The only reader and writer of model folders.

A model folder is a diffusers pipeline folder (`model_index.json`, `unet/`, `scheduler/`) and, where
we wrote it, `masks.safetensors` and `record.json`. Nothing in a folder is ever executed: class names
are looked up in the short tables below, weights are safetensors (or `.bin` read as plain tensors).
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import safe_open

from prunedm.diffusion import check_scheduler, sample_shape, scheduler_class
from prunedm.errors import UserError, first_line
from prunedm.hub import find
from prunedm.masks import Masks, load_masks, save_masks
from prunedm.packed import load_packed
from prunedm.pruned_unet import PrunedUNet2DModel
from prunedm.reading import read_object
from prunedm.record import Record, read_record, write_json, write_record

MASKS_FILE = "masks.safetensors"
PACKED_FILE = "packed.safetensors"  # weights and masks in one, as `export` writes them
EXPORT_FILE = "export.json"
DENOISERS = {"UNet2DModel": UNet2DModel, "PrunedUNet2DModel": PrunedUNet2DModel}
_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin")


@dataclass
class Model:
    """A trained diffusion model: the denoiser, its noise scheduler, masks if any, and its record."""

    denoiser: Any  # a diffusers model, of a class in DENOISERS
    scheduler: Any
    masks: Masks | None = None
    record: Record | None = None
    name: str = ""
    hash: str = ""
    pipeline: str = "DDPMPipeline"
    dtype: torch.dtype = torch.float32  # of the weights on disk; in memory they are float32

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return sample_shape(self.denoiser)

    def round_to_dtype(self) -> None:
        """Give the weights the values that the saved file will hold, so figures are of those."""
        _set_dtype(self.denoiser, self.dtype)
        _set_dtype(self.denoiser, torch.float32)

    @property
    def conditional(self) -> bool:
        """Whether the denoiser wants class labels."""
        return getattr(self.denoiser, "class_embedding", None) is not None


def load(source: str | Path) -> Model:
    """A model from a folder, a hub id, or the embedded 'digits'.

    Raises `UserError` where it is no model, of an unsupported class, or its weights are damaged.
    """
    folder = find(source)
    index, exported = (
        read_object(folder / name) if (folder / name).exists() else {}
        for name in ("model_index.json", EXPORT_FILE)
    )
    if not index and not (folder / "config.json").exists():
        raise UserError(
            f"{source} is no model folder (no model_index.json or config.json); "
            "give a diffusers pipeline folder, a hub id, or digits"
        )
    _refuse_other_components(index, folder)
    if (folder / PACKED_FILE).exists():
        denoiser, masks, dtype = _load_packed(folder)
    elif exported:
        raise UserError(
            f"{source} is an exported file, which only `sample` takes; give the model folder that it "
            "was made from, or a packed export"
        )
    else:
        denoiser, dtype = _load_denoiser(where := _component(folder, "unet")), _stored_dtype(where)
        masks = load_masks(folder / MASKS_FILE) if (folder / MASKS_FILE).exists() else None
    model = Model(
        denoiser=denoiser,
        scheduler=load_scheduler(folder),
        masks=masks,
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder),
        pipeline=index.get("_class_name") or exported.get("pipeline", "DDPMPipeline"),
        dtype=dtype,
    )
    if masks is not None:
        masks.check_pattern()
        _refuse_violations(model, str(source))
    return model


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
    library = "prunedm" if cls == "PrunedUNet2DModel" else "diffusers"
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


def hash_folder(folder: Path) -> str:
    """A hash of weights, masks and configuration files, whatever the folder is called."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if _is_part_of_model(path, folder)):
        digest.update(str(path.relative_to(folder)).encode())
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
    if (folder / PACKED_FILE).exists():
        return (folder / PACKED_FILE).stat().st_size
    where = _component(folder, "unet")
    return sum(path.stat().st_size for kind in _WEIGHTS for path in where.glob(kind))


def _set_dtype(denoiser: Any, dtype: torch.dtype) -> None:
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(dtype)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type that most of the stored numbers have; float32 for `.bin` files."""
    sizes: Counter[str] = Counter()
    for path in folder.glob(_WEIGHTS[0]):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    most = sizes.most_common(1)[0][0] if sizes else ""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(most, torch.float32)


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


def _load_denoiser(folder: Path) -> Any:
    name = _class_name(read_config(folder), folder)
    if not any(next(folder.glob(kind), None) for kind in _WEIGHTS):
        raise UserError(
            f"{folder} has no weights: diffusion_pytorch_model.safetensors is missing; "
            "copy or download the whole folder"
        )
    try:
        denoiser, loading = DENOISERS[name].from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers wraps the reader's errors in several types
        reason = first_line(error)
        raise UserError(f"cannot load weights in {folder}: {reason}; download it again?") from error
    # diffusers would leave missing tensors at random values, and drop unexpected ones
    for problem in ("missing_keys", "unexpected_keys"):
        if loading[problem]:
            kind, first = problem.replace("_keys", ""), sorted(loading[problem])[0]
            raise UserError(
                f"weights in {folder} are not those of its config.json: "
                f"{len(loading[problem])} {kind} tensors, first {first}"
            )
    return denoiser.eval()


def _load_packed(folder: Path) -> tuple[Any, Masks | None, torch.dtype]:
    """A denoiser from one file of weights and masks; its arithmetic is float32 as everywhere."""
    config = read_config(folder)
    denoiser = DENOISERS[_class_name(config, folder)].from_config(config)
    state, masks = load_packed(folder / PACKED_FILE)
    dtype = max(Counter(t.dtype for t in state.values()).items(), key=lambda kind: kind[1])[0]
    try:
        denoiser.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder / PACKED_FILE} is not of its config.json: {str(error).splitlines()[1].strip()}"
        ) from error
    return denoiser.eval(), masks, dtype


def read_config(folder: Path) -> dict[str, Any]:
    """A denoiser's config.json."""
    return read_object(folder / "config.json")


def save_config(model: Model, folder: Path) -> None:
    """The denoiser's config.json and the scheduler, for a folder whose weights are elsewhere."""
    model.denoiser.save_config(folder)
    _forget_origin(folder / "config.json")
    model.scheduler.save_pretrained(folder / "scheduler")


def _class_name(config: dict[str, Any], folder: Path) -> str:
    name = str(config.get("_class_name"))
    if name not in DENOISERS:
        raise UserError(f"{folder} holds a {name}; supported denoisers: {', '.join(DENOISERS)}")
    return name


def load_scheduler(folder: Path) -> Any:
    """The noise scheduler of a model folder, or the paper's where it has none."""
    where = _component(folder, "scheduler")
    path = where / "scheduler_config.json"
    if not path.exists():
        return DDPMScheduler()  # a bare denoiser folder: the paper's 1,000 linear steps
    config = read_object(path)
    cls = scheduler_class(str(config.get("_class_name")))
    if cls is None:
        raise UserError(f"{path} names no diffusers scheduler: {config.get('_class_name')!r}")
    try:
        scheduler = cls.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} describes no {cls.__name__}: {first_line(error)}") from error
    check_scheduler(scheduler)
    return scheduler
