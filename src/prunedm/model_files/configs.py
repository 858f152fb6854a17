"""Configurations from others, checked against the class's signature before anything is built.

Types come from the annotations of `__init__` and ranges from the tables below. A network that still
cannot be built or run is detected on torch's meta device, which has shapes without data.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import UNet2DModel
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunedm.architecture import (
    ARCHITECTURES,
    ENDINGS,
    Shape,
    answer,
    architecture_named,
    example_shapes,
)
from prunedm.errors import UserError, first_line, nearest, shortened
from prunedm.networks.narrowed import PREFIX, narrowed
from prunedm.reading import read_object

Range = tuple[float, float]
WIDTH: Range = (1, 16_384)  # channels; the widest of diffusers' UNets has 2,560
UNET_RANGES: Mapping[str, Range] = {
    "sample_size": (1, 8192),
    "in_channels": (1, 1024),
    "out_channels": (1, 2048),
    "time_embedding_dim": WIDTH,
    "freq_shift": (-1, 1),
    "block_out_channels": WIDTH,
    "layers_per_block": (1, 16),
    "mid_block_scale_factor": (1e-6, 1e6),
    "downsample_padding": (0, 16),
    "dropout": (0, 1),
    "attention_head_dim": WIDTH,
    "norm_num_groups": WIDTH,
    "attn_norm_num_groups": WIDTH,
    "norm_eps": (0, 1),
    "num_class_embeds": (1, 1_000_000),
    "num_train_timesteps": (1, 100_000),
}
NETWORK_RANGES: Mapping[str, Range] = {
    "sample_size": (1, 8192),
    "in_channels": (1, 4096),
    "out_channels": (1, 4096),
    "num_layers": (0, 512),
    "num_single_layers": (0, 512),
    "num_attention_heads": (1, 1024),
    "attention_head_dim": (1, 65_536),
    "patch_size": (1, 256),
    "block_out_channels": (1, 65_536),
    "layers_per_block": (1, 64),
    "dropout": (0, 1),
}
SCHEDULER_RANGES: Mapping[str, Range] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "dynamic_thresholding_ratio": (0, 1),
    "clip_sample_range": (1e-6, 1e6),
    "sample_max_value": (1e-6, 1e6),
    "steps_offset": (0, 1000),
    "solver_order": (1, 4),
    "shift": (1e-3, 1000),
    "flow_shift": (1e-3, 1000),
    "base_shift": (-10, 10),
    "max_shift": (-10, 10),
}
MOST_REPEATED = 1024  # layers, or experts, of a language model
LARGEST_SIZE = 1 << 40  # and any other number in its configuration
LONGEST = 100_000  # values in a list: betas, one per timestep
MOST_LAYERS = 64  # blocks times layers per block
# choices with the same values in all classes
_CLOSED = ("beta_schedule", "prediction_type", "timestep_spacing")


def shown(value: object) -> str:
    """A value in error messages."""
    return shortened(repr(value), most=60)


def check_config(
    config: Mapping[str, Any], cls: Any, where: object, ranges: Mapping[str, Range]
) -> None:
    """Raise `UserError` naming the first value of the wrong type or out of range.

    Names that the class does not know are ignored, as in diffusers.
    """
    for name, annotation in _annotations(cls).items():
        if name not in config:
            continue
        value, default = config[name], inspect.signature(cls.__init__).parameters[name].default
        own = list(default) if isinstance(default, tuple) else default
        if type(value) is type(own) and value == own:
            continue  # some defaults in diffusers contradict their annotation
        try:
            _adapter(cls, name).validate_json(json.dumps(value))
        except (ValidationError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {name} = {shown(value)} is not {_in_words(annotation)}"
            ) from error
        endless = isinstance(default, float) and math.isinf(default)  # lambda_min_clipped
        _check_numbers(name, value, where, ranges.get(name), endless=endless)


def class_name(config: Mapping[str, Any]) -> str:
    """The class named in a config.json of diffusers or transformers; "" for none."""
    named = config.get("_class_name") or config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    return name if isinstance(name, str) else ""


def network_class(name: str) -> Any:
    """A network class of diffusers, narrowed or not, or of transformers; None for other names."""
    dense = name.removeprefix(PREFIX)
    found = library_class(dense, "diffusers", "ModelMixin")
    if found is None and name.endswith(tuple(ENDINGS)):
        found = library_class(dense, "transformers", "PreTrainedModel")
    return narrowed(found) if found is not None and name.startswith(PREFIX) else found


def library_class(name: str, library: str, base: str) -> Any:
    """The class of this name in a library, if it derives from `base`; else None."""
    module = import_module(library)
    if library == "transformers":
        module.logging.disable_progress_bar()  # of every file that it reads or writes
    cls = getattr(module, name, None) if name.isidentifier() else None
    known = isinstance(cls, type) and name != base and issubclass(cls, getattr(module, base))
    return cls if known else None


def read_network_config(folder: Path) -> dict[str, Any]:
    """A network's config.json, checked. Raises `UserError` for unknown classes and bad values."""
    path = folder / "config.json"
    config = read_object(path)
    name = class_name(config)
    cls = network_class(name)
    if not name:
        raise UserError(
            f"{path} names no class (_class_name of diffusers, architectures of transformers)"
        )
    if cls is None:
        raise UserError(
            f"{folder} holds a {shown(name).strip(chr(39))}, which neither diffusers nor transformers "
            f"has; supported: their networks, by the class's name{nearest(name, list(ARCHITECTURES))}"
        )
    if not hasattr(cls, "from_config"):
        check_language_config(config, path)
        return config
    if issubclass(cls, UNet2DModel):
        check_unet_config(config, path)
    else:
        check_config(config, getattr(cls, "dense_class", cls), path, NETWORK_RANGES)
    known = inspect.signature(cls.__init__).parameters
    # an EMA's config also has its decay, about which diffusers would warn at every load
    return {n: value for n, value in config.items() if n in known or n.startswith("_")}


def check_language_config(config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError` for sizes that no model has, and for quantised weights.

    Types and the rest are transformers' own to check.
    """
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the weights are quantised, and pruning needs them as they were trained; give "
            "the original model"
        )
    for name, value in config.items():
        most = MOST_REPEATED if re.search(r"(^|_)(layers?|experts)$", name) else LARGEST_SIZE
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
            raise UserError(f"{where}: {name} = {shown(value)} is out of range; at most {most:,}")


def build(config: Mapping[str, Any]) -> Any:
    """The network of a checked config, with initial weights."""
    cls = network_class(class_name(config))
    if hasattr(cls, "from_config"):
        return cls.from_config(dict(config))
    return cls(cls.config_class.from_dict(dict(config)))


def check_unet_config(config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError` for values that are not supported in a UNet2DModel."""
    check_config(config, UNet2DModel, where, UNET_RANGES)
    if config.get("sample_size") is None:
        raise UserError(
            f'{where} has no sample_size; add the side of its training images: "sample_size": 32'
        )
    if config.get("time_embedding_type") == "learned" and not config.get("num_train_timesteps"):
        raise UserError(
            f"{where}: time_embedding_type = 'learned' needs num_train_timesteps, the scheduler's"
        )
    blocks = config.get("block_out_channels", ())
    layers = len(blocks) * config.get("layers_per_block", 2)
    if layers > MOST_LAYERS:
        raise UserError(
            f"{where} describes {layers} layers in its blocks; {MOST_LAYERS} are allowed"
        )
    own, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if out not in (own, 2 * own):
        raise UserError(
            f"{where}: {own} channels come in and {out} go out; supported are as many as come in, or "
            "twice as many, with a learned variance (no image-conditioned models)"
        )


def check_timesteps(config: Mapping[str, Any], scheduler: Any, where: object) -> None:
    """Raise `UserError` where the scheduler has more timesteps than a learned embedding."""
    known = config.get("num_train_timesteps")
    wanted = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if config.get("time_embedding_type") == "learned" and known and wanted and wanted > known:
        raise UserError(
            f"{where} has learned embeddings of {known} timesteps, and the scheduler {wanted}; give "
            "both the same num_train_timesteps, or another --scheduler"
        )


def describe_network(config: Mapping[str, Any], where: object) -> Any:
    """The network of a checked config on the meta device, tried once on example shapes.

    Cached, so callers must not change it. Raises `UserError` where diffusers cannot build it, or it
    cannot run on images of its size.
    """
    try:
        return _described(json.dumps(dict(config), sort_keys=True))
    except UserError as error:
        raise UserError(f"{where} describes {error}") from error


@lru_cache(maxsize=16)
def _described(config: str) -> Any:
    values = json.loads(config)
    try:
        with torch.device("meta"):
            network = build(values).eval()
    except Exception as error:  # diffusers and torch raise many types
        raise UserError(f"no {class_name(values)}: {first_line(error)[:160]}") from error
    record = architecture_named(type(network).__name__)
    if record is not None and not record.text:
        _check_runs(network, record.shape(network))
    return network


def _check_runs(network: Any, shape: Shape) -> None:
    _, height, width = shape
    try:
        with torch.device("meta"), torch.no_grad():
            made_NCHW = answer(network, example_shapes(network, 2))
    except NotImplementedError:  # an operation without a meta kernel
        return
    except Exception as error:
        raise UserError(
            f"a network that cannot run on {height}x{width} images: {first_line(error)[:160]}"
        ) from error
    if made_NCHW.shape[2:] != (height, width):
        raise UserError(f"a network that makes {tuple(made_NCHW.shape)} of {height}x{width}")


@cache
def _annotations(cls: Any) -> dict[str, Any]:
    """Annotations of the parameters of `__init__`."""
    hints = get_type_hints(cls.__init__)
    names = [n for n in inspect.signature(cls.__init__).parameters if n in hints]
    return {n: hints[n] if n in _CLOSED else _any_text(hints[n]) for n in names}


def _any_text(annotation: Any) -> Any:
    """`str | None` in place of a Literal: a config converted from another class may have its values."""
    free = "Literal[" in str(annotation) and "fixed_small" not in str(annotation)
    return str | None if free else annotation


@cache
def _adapter(cls: Any, name: str) -> TypeAdapter[Any]:
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return TypeAdapter(_annotations(cls)[name], config=strict)


def _in_words(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"Literal\[(.*?)\]", r"one of \1", text.replace("numpy.ndarray | ", "")).replace(
        "typing.", ""
    )


def _check_numbers(
    name: str, value: Any, where: object, allowed: Range | None, *, endless: bool = False
) -> None:
    values = value if isinstance(value, list | tuple) else [value]
    if len(values) > (LONGEST if name == "trained_betas" else MOST_LAYERS):
        raise UserError(f"{where}: {name} is a list of {len(values)} values")
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, float) and not (math.isfinite(number) or endless):
            raise UserError(f"{where}: {name} = {shown(value)} is not finite")
        low, high = allowed or (-1e9, 1e9)
        if not (low <= number <= high or endless):
            raise UserError(
                f"{where}: {name} = {shown(value)} is out of range; it goes from {low:g} to {high:g}"
            )
