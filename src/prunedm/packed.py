"""The packed weight file: kept values and one bit per position for every masked weight.

docs/packed.md describes the format and contains an independent reader, which the tests run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors.torch import save
from torch import nn

from prunedm.errors import UserError, first_line
from prunedm.masks import (
    Masks,
    Pattern,
    count_of,
    json_table,
    pack_bits,
    read_tensors,
    sorted_header,
    unpack_bits,
)
from prunedm.networks.layer_kinds import NAMES, find_kind, from_matrix, kind_of, oriented, to_matrix
from prunedm.reading import parse_json

FORMAT, VERSIONS = "prunedm-packed", ("1", "2")  # 2: some weights are transposed
Precision = Literal["fp32", "fp16", "bf16", "int8"]
_VALUES, _BITS, _SCALE = ".values", ".bits", ".scale"
_PARTS = tuple(f".weight{part}" for part in (_VALUES, _BITS, _SCALE))
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST = 127  # symmetric int8: -128 is not used
_T = TypeVar("_T")


def save_packed(
    denoiser: nn.Module, masks: Masks | None, path: Path, *, precision: Precision = "fp16"
) -> None:
    """Write the denoiser's state as one packed safetensors file; equal input gives equal bytes.

    int8 applies to the weights of layers (`layer_kinds.KINDS`); all other floats become fp16.
    Raises `UserError` where masks do not hold on the weights, contradict their patterns or belong to
    other layers, and where `precision` cannot hold a value.
    """
    layers = {
        name: module
        for name, module in denoiser.named_modules(remove_duplicate=False)
        if find_kind(module) is not None
    }
    masks = masks or Masks({})
    _check_masks(masks, denoiser, layers)
    tensors: dict[str, torch.Tensor] = {}
    for name, own in denoiser.state_dict().items():
        assert not name.endswith(_PARTS), f"{name} is a name of the format"
        module = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        tensor = own.cpu() if module is None else oriented(module, own.cpu())
        if precision == "int8" and module is not None and tensor.is_floating_point():
            stored, tensors[name + _SCALE] = _quantise(name.removesuffix(".weight"), tensor)
        else:
            stored = _cast(name, tensor, precision)
        mask = None if module is None else masks.by_layer.get(name.removesuffix(".weight"))
        if mask is None:
            tensors[name] = stored
        else:
            mask_K = to_matrix(mask.cpu()).flatten()
            tensors[name + _VALUES] = to_matrix(stored).flatten()[mask_K]
            tensors[name + _BITS] = pack_bits(mask_K)
    turned = [f"{name}.weight" for name, layer in layers.items() if kind_of(layer).transposed]
    _write(path, tensors, _metadata(masks, precision, turned))


def load_packed(path: Path) -> tuple[dict[str, torch.Tensor], Masks | None]:
    """The state that `save_packed` wrote, and its masks, or None without any.

    Floats keep their stored type; int8 weights become float32, q times scale. Raises `UserError`
    where the file is damaged, of another kind, or of another version.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a packed file: it is not a file at all")
    try:
        tensors, metadata = read_tensors(path)
    except Exception as error:  # safetensors and torch raise many types
        raise UserError(
            f"{path} is not a packed file or is damaged ({first_line(error)})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a packed file: its metadata has no format {FORMAT}")
    if metadata.get("version") not in VERSIONS:
        raise UserError(
            f"{path} is of packed version {metadata.get('version')}; "
            f"this prunedm reads {' and '.join(VERSIONS)}; update prunedm"
        )
    try:
        masks = _unpack(tensors, metadata)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); export it again") from error
    return tensors, masks


def packed_matmul(
    values_K: torch.Tensor,
    bits: torch.Tensor,
    x_BI: torch.Tensor,
    pattern: Pattern,
    scale_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T => y[B, O] for a packed Linear weight W[O, I], reading only the kept inputs.

    A reference for kernels: gathers inputs [B, O, J] with J = I N/M kept inputs per output.
    values_K: the K = O J kept values; bits: the packed mask; scale_O: the scale of int8 values.
    Computed in the type of `x_BI`.
    """
    inputs = x_BI.shape[1]
    groups = values_K.numel() // pattern.n
    mask_GM = unpack_bits(bits, groups * pattern.m).reshape(groups, pattern.m)
    assert bool((mask_GM.sum(1) == pattern.n).all()), f"the bits are not {pattern}"
    kept_J = inputs // pattern.m * pattern.n
    index_OJ = mask_GM.reshape(-1, inputs).nonzero()[:, 1].reshape(-1, kept_J).to(x_BI.device)
    values_OJ = values_K.reshape(-1, kept_J).to(x_BI)
    y_BO = torch.einsum("boj,oj->bo", x_BI[:, index_OJ], values_OJ)
    return y_BO if scale_O is None else y_BO * scale_O.to(x_BI)


def _check_masks(masks: Masks, denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    violations = masks.violations(denoiser)
    if violations:
        name, count = next(iter(violations.items()))
        raise UserError(
            f"masks do not hold: {name} has {count} removed weights that are not zero; "
            "apply the masks again"
        )
    masks.check_pattern()
    for name, _ in masks:
        if name not in layers:
            raise UserError(f"masks of {name} cannot be packed: it is not a {NAMES}")


def _cast(name: str, tensor: torch.Tensor, precision: Precision) -> torch.Tensor:
    """A contiguous copy (tied weights may share memory), floats in the chosen type."""
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    cast = tensor.to(FLOATS.get(precision, torch.float16), copy=True).contiguous()
    if bool((cast.isinf() & ~tensor.isinf()).any()):
        wider = "bf16 or fp32" if cast.dtype == torch.float16 else "fp32"
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise UserError(
            f"{name} has values up to {largest:.4g}, too large for {precision}; "
            f"use --precision {wider}"
        )
    return cast


def _quantise(layer: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W[O, ...] => its int8 values, and scale[O] so that W is about q times scale."""
    weight_OR = weight.float().flatten(1)
    scale_O = weight_OR.abs().amax(1) / _LARGEST
    if not bool(scale_O.isfinite().all()):
        raise UserError(f"{layer} has weights that are not finite; int8 has no value for them")
    scale_O[scale_O == 0] = 1
    q_OR = (weight_OR / scale_O[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return q_OR.reshape(weight.shape), scale_O


def _metadata(masks: Masks, precision: Precision, turned: list[str]) -> dict[str, str]:
    shapes = {f"{name}.weight": list(mask.shape) for name, mask in masks}
    patterns = {name: str(pattern) for name, pattern in masks.patterns.items()}
    transposed = {"transposed": json.dumps(turned)} if turned else {}
    return transposed | {
        "format": FORMAT,
        "version": VERSIONS[bool(turned)],
        "precision": precision,
        "shapes": json.dumps(shapes, sort_keys=True),
        "patterns": json.dumps(patterns, sort_keys=True),
    }


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(sorted_header(save(tensors, metadata=metadata)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _unpack(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> Masks | None:
    """Replace the parts of weights in `tensors` by whole weights. Raises `ValueError`."""
    precision = _take(metadata, "precision")
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is none of {', '.join(get_args(Precision))}")
    by_layer = {}
    for name, shape in json_table(metadata, "shapes").items():
        if name in tensors:
            raise ValueError(f"{name} is there twice, packed and whole")
        tensors[name], by_layer[name.removesuffix(".weight")] = _whole(tensors, name, shape)
        if tensors[name].dtype != FLOATS.get(precision, torch.int8):
            raise ValueError(f"{name} is stored as {tensors[name].dtype}, not as {precision}")
        if precision == "int8":
            _take(tensors, name + _SCALE)
    for name in [name for name in tensors if name.endswith(_PARTS)]:
        weight = name.removesuffix(_SCALE)
        if weight == name:
            raise ValueError(f"{name} is of no packed weight")
        tensors[weight] = _dequantise(weight, _take(tensors, weight), tensors.pop(name))
    for name in _transposed(metadata):
        turned = _take(tensors, name)
        if turned.ndim != 2:
            raise ValueError(f"{name} is not a matrix, though it is said to be transposed")
        tensors[name] = turned.T.contiguous()
    claimed = json_table(metadata, "patterns")
    if not claimed.keys() <= by_layer.keys():
        raise ValueError(f"a pattern for {min(claimed.keys() - by_layer.keys())}, not packed")
    masks = Masks(by_layer, {name: Pattern.parse(str(n_m)) for name, n_m in claimed.items()})
    masks.check_pattern()
    return masks if by_layer else None


def _whole(
    tensors: dict[str, torch.Tensor], name: str, shape: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in its stored type and its mask, both of `shape`; removes the parts from `tensors`."""
    count = count_of(shape, name)
    values_K, bits = _take(tensors, name + _VALUES), _take(tensors, name + _BITS)
    mask_flat = unpack_bits(bits, count)
    kept = int(mask_flat.sum())
    if values_K.shape != (kept,):
        raise ValueError(f"{name} has values of shape {tuple(values_K.shape)} for {kept} bits set")
    weight_flat = values_K.new_zeros(len(mask_flat))
    weight_flat[mask_flat] = values_K
    del tensors[name + _VALUES], tensors[name + _BITS]
    return from_matrix(weight_flat, shape).contiguous(), from_matrix(mask_flat, shape).contiguous()


def _dequantise(name: str, q: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    fits = q.dtype == torch.int8 and scale_O.dtype == torch.float32
    if not (fits and q.ndim and scale_O.shape == q.shape[:1] and bool(scale_O.isfinite().all())):
        raise ValueError(f"{name} has a scale that does not fit")
    return q.float() * scale_O.reshape(-1, *[1] * (q.ndim - 1))


def _transposed(metadata: Mapping[str, str]) -> list[str]:
    """Names of weights that are stored as [O, I] and were [I, O]."""
    names = parse_json(metadata.get("transposed", "[]"), "transposed")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("transposed is not a list of names")
    return names


def _take(known: Mapping[str, _T], name: str) -> _T:
    if name not in known:
        raise ValueError(f"{name} is missing")
    return known[name]
