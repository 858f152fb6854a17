"""Configurations that others wrote, checked against the class's signature before anything is built.

Types come from the annotations of `__init__`, ranges from the tables below, and what still cannot be
built or run is found out on torch's meta device, which holds shapes and no numbers.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import UNet2DModel
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunedm.architecture import answer
from prunedm.errors import UserError, first_line, shortened
from prunedm.narrowed import narrowed
from prunedm.reading import read_object

DENOISERS = {cls.__name__: cls for cls in (UNet2DModel, narrowed(UNet2DModel))}
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
}
LONGEST = 100_000  # values in a list: betas, one a timestep
MOST_LAYERS = 64  # blocks times layers of each
_CLOSED = ("beta_schedule", "prediction_type", "timestep_spacing")  # choices that all classes share


def shown(value: object) -> str:
    """A value as an error names it."""
    return shortened(repr(value), most=60)


def check_config(
    config: Mapping[str, Any], cls: Any, where: object, ranges: Mapping[str, Range]
) -> None:
    """Raise `UserError` naming the first value that is of another type, or out of its range.

    Names that the class does not know are left alone, as diffusers leaves them.
    """
    for name, annotation in _annotations(cls).items():
        if name not in config:
            continue
        value, default = config[name], inspect.signature(cls.__init__).parameters[name].default
        own = list(default) if isinstance(default, tuple) else default
        if type(value) is type(own) and value == own:
            continue  # some of diffusers' own defaults are not of their annotated type
        try:
            _adapter(cls, name).validate_json(json.dumps(value))
        except (ValidationError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {name} = {shown(value)} is not {_in_words(annotation)}"
            ) from error
        endless = isinstance(default, float) and math.isinf(default)  # lambda_min_clipped
        _check_numbers(name, value, where, ranges.get(name), endless=endless)


def read_unet_config(folder: Path) -> dict[str, Any]:
    """A denoiser's config.json, its values checked. Raises `UserError`."""
    path = folder / "config.json"
    config = read_object(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in DENOISERS:
        raise UserError(
            f"{folder} holds a {shown(name).strip(chr(39))}; "
            f"supported denoisers: {', '.join(DENOISERS)}"
        )
    check_unet_config(config, path)
    known = inspect.signature(DENOISERS[name].__init__).parameters
    # an EMA's config also has its decay, of which diffusers would complain at every step
    return {n: value for n, value in config.items() if n in known or n.startswith("_")}


def check_unet_config(config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError` for values that no UNet of ours has."""
    check_config(config, UNet2DModel, where, UNET_RANGES)
    if config.get("sample_size") is None:
        raise UserError(
            f'{where} has no sample_size; add the side of its training images: "sample_size": 32'
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


def describe_network(config: Mapping[str, Any], where: object) -> Any:
    """The network of a checked config on the meta device: shapes alone, run once on shapes alone.

    One for all who ask about the same config: nobody may change it. Raises `UserError` where diffusers
    cannot build it, or it cannot run on images of its size.
    """
    try:
        return _described(json.dumps(dict(config), sort_keys=True))
    except UserError as error:
        raise UserError(f"{where} describes {error}") from error


@lru_cache(maxsize=16)
def _described(config: str) -> Any:
    values = json.loads(config)
    cls = DENOISERS[values["_class_name"]]
    try:
        with torch.device("meta"):
            network = cls.from_config(values).eval()
    except Exception as error:  # diffusers and torch raise whatever they like
        raise UserError(f"no {cls.__name__}: {first_line(error)[:160]}") from error
    _check_runs(network)
    return network


def _check_runs(network: Any) -> None:
    size, channels = network.config.sample_size, network.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.device("meta"), torch.no_grad():
            zeros_N = torch.zeros(2, dtype=torch.long)
            inputs = {"sample": torch.zeros(2, channels, height, width), "timestep": zeros_N}
            if network.class_embedding is not None:
                inputs["class_labels"] = zeros_N
            made_NCHW = answer(network, inputs)
    except NotImplementedError:  # an operation that knows no meta device
        return
    except Exception as error:
        raise UserError(
            f"a network that cannot run on {height}x{width} images: {first_line(error)[:160]}"
        ) from error
    if made_NCHW.shape != (2, network.config.out_channels, height, width):
        raise UserError(f"a network that makes {tuple(made_NCHW.shape)} of {height}x{width}")


@cache
def _annotations(cls: Any) -> dict[str, Any]:
    """Of the parameters that have one."""
    hints = get_type_hints(cls.__init__)
    names = [n for n in inspect.signature(cls.__init__).parameters if n in hints]
    return {n: hints[n] if n in _CLOSED else _any_text(hints[n]) for n in names}


def _any_text(annotation: Any) -> Any:
    """Text for a choice of texts: a config that came by way of another class may have its words."""
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
