"""The only reader and writer of model folders.

A model folder is a diffusers pipeline folder (`model_index.json`, `unet/` or `transformer/`,
`scheduler/`, companions) or a language model of transformers. Folders written by prunedm also have
`masks.safetensors` and `record.json`. Nothing in a folder is ever executed: class names are looked up
in diffusers and transformers, weights are safetensors (or `.bin` read as plain tensors).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs, architecture_named, architecture_of, example
from prunedm.errors import UserError
from prunedm.hub import find
from prunedm.masks import Masks, load_masks, save_masks
from prunedm.model_files.companions import Companions, components, hash_files
from prunedm.model_files.configs import (
    check_timesteps,
    class_name,
    read_network_config,
)
from prunedm.model_files.language_models import load_language_model
from prunedm.model_files.schedule import FoundScheduler, find_scheduler
from prunedm.model_files.tokenizer import FILES as TOKENIZER_FILES
from prunedm.model_files.tokenizer import Tokenizer
from prunedm.model_files.weights import (
    LARGE,
    Types,
    check_state,
    filled,
    load_network,
    weight_files,
)
from prunedm.networks.narrowed import Narrowed
from prunedm.packed import load_packed
from prunedm.reading import read_object
from prunedm.record import Record, read_record, write_json, write_record
from prunedm.task.codec import Codec, Latents, Pixels
from prunedm.task.condition import Classes, Condition, Prompts, Unconditional
from prunedm.task.process import Process, process_of
from prunedm.task.prompts import PromptEncoder

MASKS_FILE = "masks.safetensors"
PACKED_FILE = "packed.safetensors"  # weights and masks in one file, by `export`
EXPORT_FILE = "export.json"
# names of components that can be pruned, in order of preference
DENOISERS = ("unet", "transformer", "prior", "decoder")


@dataclass
class Model:
    """A trained model: the network, its noise scheduler if any, masks if any, and its record."""

    denoiser: Any  # a network of diffusers or transformers, or a narrowed one
    scheduler: Any  # None for language models
    masks: Masks | None = None
    record: Record | None = None
    name: str = ""
    hash: str = ""
    pipeline: str = "DDPMPipeline"
    dtype: torch.dtype = torch.float32  # of most stored weights; small networks compute in float32
    # of the other weights, by name
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    component: str = "unet"  # the network's folder in the pipeline
    companions: Companions | None = None
    tokenizer: Tokenizer | None = None  # of language models
    notes: tuple[str, ...] = ()  # choices and assumptions made while loading, for the user
    scheduler_file: Path | None = None  # where one was given in place of the folder's
    scheduler_assumed: bool = False

    @property
    def architecture(self) -> Architecture:
        """The record of the denoiser's class."""
        return architecture_of(self.denoiser)

    @property
    def process(self) -> Process:
        """The noise that the denoiser was trained with."""
        return process_of(self.scheduler)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one noisy sample."""
        return self.architecture.shape(self.denoiser)

    @cached_property
    def unasked(self) -> str:
        """Why the network cannot be run, so that only methods without runs work; "" if it can."""
        name = type(self.denoiser).__name__
        if self.architecture.text:
            return ""
        if architecture_named(name) is None:
            return (
                f"how to call a {name} is not known; docs/guides/add-a-family.md says what to add"
            )
        try:
            assert self.codec
            assert self.condition
        except UserError as error:
            return str(error)
        return ""

    @cached_property
    def codec(self) -> Codec:
        """Converts between images and samples. Raises `UserError` for image-conditioned models."""
        shape, companions = self.sample_shape, self.companions
        if companions is None or not companions.autoencoder:
            return Pixels(shape)
        autoencoder = companions.load_autoencoder()
        channels = autoencoder.config.latent_channels
        if channels != shape[0]:
            raise UserError(
                f"{self.name} takes samples of {shape[0]} channels, and its autoencoder makes "
                f"{channels}: image-conditioned models are not supported yet"
            )
        return Latents(autoencoder, shape, key=companions.key(companions.autoencoder))

    @cached_property
    def condition(self) -> Condition:
        """The denoiser's inputs besides noise and time.

        Raises `UserError` where it needs prompts and the folder has no text encoders.
        """
        encode, companions = self.architecture.prompts, self.companions
        if encode is not None:
            names = companions.names if companions is not None else []
            encoders = [n for n in names if n.startswith(("text_encoder", "tokenizer"))]
            if companions is None or not encoders:
                raise UserError(
                    f"{self.name} needs prompts, and has no text encoders beside it; give the folder "
                    "of its whole pipeline"
                )
            others = [n for n in companions.names if n not in encoders]
            return Prompts(
                PromptEncoder(
                    companions.folder,
                    self.pipeline,
                    encode,
                    leave_out=[self.component, *others],
                    key=companions.key(*encoders),
                )
            )
        classes = self.architecture.classes(self.denoiser)
        return Unconditional() if classes == 0 else Classes(classes)

    @property
    def interface(self) -> dict[str, Any]:
        """What the network takes and gives: models with another interface do not compare."""
        if self.architecture.text:
            return {"vocabularies": self.denoiser.config.vocab_size}
        return {
            "image shapes": self.sample_shape,
            "output channels": self.denoiser.config.out_channels,
            "numbers of classes": self.architecture.classes(self.denoiser),
        }

    def differs_from(self, other: "Model") -> str:
        """The first part of the interface in which two models differ, with both values; or ""."""
        own, theirs = self.interface, other.interface
        if own.keys() != theirs.keys():
            return "kinds of data (images, texts)"
        return next((f"{n} ({own[n]}, {theirs[n]})" for n in own if own[n] != theirs[n]), "")

    def example(self, count: int = 1, *, seed: int = 0) -> Inputs:
        """Inputs for tracing, timing, counting and export: noise at all levels."""
        if self.architecture.text:
            return example(self.denoiser, count, seed=seed)
        last = float(self.process.timesteps(torch.ones(1, dtype=torch.float64)))
        return example(self.denoiser, count, last=last, seed=seed)

    def round_to_dtype(self) -> None:
        """Round the weights to the values of the saved file, so that figures describe those."""
        with self.stored():
            pass

    @contextmanager
    def stored(self) -> Iterator[Any]:
        """Within the context, the network has its weights in the types of the file."""
        memory = memory_dtype(self.denoiser)
        _set_dtype(self.denoiser, self.dtype, self.other_dtypes)
        try:
            yield self.denoiser
        finally:
            _set_dtype(self.denoiser, memory, {} if memory else self.other_dtypes)

    @property
    def conditional(self) -> bool:
        """Whether the denoiser needs class labels."""
        return self.architecture.classes(self.denoiser) != 0


def load(source: str | Path, *, scheduler: str | Path | None = None) -> Model:
    """A model from a folder, a hub id, or the embedded 'digits'.

    Also accepts a checkpoint-N of a diffusers training folder, or its unet or unet_ema; the noise
    schedule is then the run's. `scheduler`: a folder or scheduler_config.json to use instead.
    `Model.notes` lists choices and assumptions. Raises `UserError` where it is not a model, its class
    is not supported, or its files are damaged.
    """
    folder, notes = model_folder(source)
    index, exported = (_description(folder / name) for name in ("model_index.json", EXPORT_FILE))
    if not (folder / PACKED_FILE).exists() and exported:
        raise UserError(
            f"{source} is an exported file, which only `sample` takes; give the model folder that it "
            "was made from, or a packed export"
        )
    component, where = denoiser_in(index, folder)
    config = read_network_config(where)
    record = architecture_named(class_name(config)) or Architecture()
    found = (
        FoundScheduler(None) if record.text else find_scheduler(folder, scheduler, record.scheduler)
    )
    check_timesteps(config, found.scheduler, where)
    if (folder / PACKED_FILE).exists():
        denoiser, masks, types = _load_packed(config, folder)
    else:
        read = load_language_model if record.text else load_network
        denoiser, types, variant = read(config, where)
        masks = load_masks(folder / MASKS_FILE) if (folder / MASKS_FILE).exists() else None
        notes += [f"weights of the variant {variant}"] if variant else []
    model = Model(
        denoiser=denoiser,
        scheduler=found.scheduler,
        masks=masks,
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder, *([found.file] if found.file and not scheduler else [])),
        pipeline=str(index.get("_class_name") or exported.get("pipeline") or record.pipeline),
        dtype=types.most,
        other_dtypes=types.others,
        component=component or record.component,
        companions=Companions(folder, index, component) if index else None,
        tokenizer=Tokenizer(folder) if record.text else None,
        notes=(*notes, *[found.note] * bool(found.note)),
        scheduler_file=found.file if scheduler else None,
        scheduler_assumed=found.assumed,
    )
    if masks is not None:
        masks.check_pattern()
    _refuse_violations(model, str(source))
    return model


def denoiser_in(index: Mapping[str, Any], folder: Path) -> tuple[str, Path]:
    """The pipeline's component to prune ("" without a model_index.json), and its folder.

    Old hub repositories (google/ddpm-cifar10-32) keep everything in the root. Raises `UserError` for
    a pipeline without a denoiser.
    """
    names = components(index)
    found = next((name for name in DENOISERS if name in names), "")
    if index and not found:
        raise UserError(
            f"{folder} has no {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]} among its components "
            f"({', '.join(names)}); give the folder of the network itself"
        )
    return found, folder / found if (folder / found).is_dir() else folder


def model_folder(source: str | Path) -> tuple[Path, list[str]]:
    """The folder with a model_index.json or config.json, and notes on how it was chosen.

    A training checkpoint gives its averaged weights, which the run itself saves and samples from.
    Raises `UserError` where there is no model.
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
        f"{source} is not a model folder (no model_index.json or config.json); "
        "give a diffusers pipeline folder, a hub id, or digits"
    )


def _description(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def save(model: Model, folder: Path) -> None:
    """Write a model folder. Raises `UserError` if a masked weight is not zero.

    The folder must be new or a stage's working folder, which gets its final name when complete.
    """
    _refuse_violations(model, str(folder))
    place = folder / model.component
    place.mkdir(parents=True, exist_ok=True)
    with model.stored() as network:
        network.save_pretrained(place, safe_serialization=True)
    _forget_origin(place / "config.json")
    if model.scheduler is not None:
        model.scheduler.save_pretrained(folder / "scheduler")
        write_json(_index(model), folder / "model_index.json")
    for beside in (model.companions, model.tokenizer):
        if beside is not None:
            beside.carry(folder)
    if model.masks is not None:
        save_masks(model.masks, folder / MASKS_FILE)
    if model.record is not None:
        write_record(model.record, folder)


def _index(model: Model) -> dict[str, Any]:
    """The input's model_index.json with this network and scheduler."""
    name = type(model.denoiser).__name__
    library = "prunedm" if isinstance(model.denoiser, Narrowed) else "diffusers"
    given = model.companions.index if model.companions is not None else {}
    own = {
        "_class_name": model.pipeline,
        "_diffusers_version": model.denoiser.config["_diffusers_version"],
        "scheduler": ["diffusers", type(model.scheduler).__name__],
        model.component: [library, name],
    }
    return {**own, **given, **own}


def hash_folder(folder: Path, *others: Path) -> str:
    """A hash of weights, masks, configurations, companions and `others`, not of the folder's name."""
    named = components(_description(folder / "model_index.json"))
    companions = [folder / n for n in named if n not in ("scheduler", *DENOISERS)]
    own = [folder, folder / "scheduler", *(folder / name for name in DENOISERS)]
    parts = {path for place in own for path in place.glob("*") if _is_part_of_model(path)}
    parts |= {path for place in companions for path in place.rglob("*") if path.is_file()}
    return hash_files(sorted(parts), folder, others)


def _is_part_of_model(path: Path) -> bool:
    if not path.is_file():  # a folder or dangling link does not count, and a pipe would hang
        return False
    configurations = ("model_index.json", "config.json", "scheduler_config.json", EXPORT_FILE)
    return path.name in (*configurations, *TOKENIZER_FILES) or path.suffix in (
        ".safetensors",
        ".bin",
    )


def size_on_disk(folder: Path) -> int:
    """Bytes of the denoiser's weight files."""
    folder, _ = model_folder(folder)
    if (folder / PACKED_FILE).exists():
        return (folder / PACKED_FILE).stat().st_size
    _, where = denoiser_in(_description(folder / "model_index.json"), folder)
    files, _ = weight_files(where)
    return sum(path.stat().st_size for path in files)


def memory_dtype(network: Any) -> torch.dtype | None:
    """The type that a network of this size computes in: float32; None (its own) for large ones."""
    return torch.float32 if sum(p.numel() for p in network.parameters()) < LARGE else None


def _set_dtype(network: Any, dtype: torch.dtype | None, others: Mapping[str, torch.dtype]) -> None:
    for name, tensor in network.state_dict(keep_vars=True).items():
        if (wanted := others.get(name, dtype)) and tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted)


def _forget_origin(config: Path) -> None:
    # diffusers records the path of the loaded model, so hashes of equal models would differ
    kept = {key: value for key, value in read_object(config).items() if key != "_name_or_path"}
    write_json(kept, config)


def _refuse_violations(model: Model, where: str) -> None:
    violations = model.masks.violations(model.denoiser) if model.masks is not None else {}
    if violations:
        layer, count = next(iter(violations.items()))
        raise UserError(
            f"{where}: masks do not hold in {len(violations)} layers, first {layer} with {count} "
            "weights; apply the masks again, or remove masks.safetensors"
        )


def _load_packed(config: dict[str, Any], folder: Path) -> tuple[Any, Masks | None, Types]:
    """A float32 denoiser from one file of weights and masks."""
    path = folder / PACKED_FILE
    state, masks = load_packed(path)
    types = Counter(tensor.dtype for tensor in state.values())
    dtype = max(types.items(), key=lambda kind: kind[1], default=(torch.float32, 0))[0]
    check_state(config, state, path)
    return filled(config, state), masks, Types(dtype)


def save_config(model: Model, folder: Path) -> None:
    """Write config.json and the scheduler or tokenizer, where weights are stored otherwise."""
    if model.tokenizer is not None:
        model.denoiser.config.save_pretrained(folder)
        model.tokenizer.carry(folder)
        return
    model.denoiser.save_config(folder)
    _forget_origin(folder / "config.json")
    model.scheduler.save_pretrained(folder / "scheduler")
