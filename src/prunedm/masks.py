"""Masks: which weights of which layers are kept (True) or held at zero (False)."""

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from prunedm.errors import UserError, first_line
from prunedm.networks.layer_kinds import oriented
from prunedm.networks.layers import to_groups
from prunedm.reading import parse_json


@dataclass(frozen=True)
class Pattern:
    """N kept of every M consecutive input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(f"pattern {self} is not 0 < N < M; try 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def count(self) -> int:
        """C(M, N): the number of possible masks of a group."""
        return math.comb(self.m, self.n)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """'2:4' => Pattern(2, 4)."""
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise UserError(f"pattern {text!r} is not of the form N:M; try 2:4")
        return cls(int(n), int(m))

    def kept_in(self, weight: torch.Tensor) -> torch.Tensor:
        """Number of non-zeros in each group of a weight or mask [O, I, *taps]: (G,)."""
        return (to_groups(weight, self.m) != 0).sum(1)

    def valid_in(self, weight: torch.Tensor) -> torch.Tensor:
        """Whether each group has at most N non-zeros, as hardware requires: boolean, (G,)."""
        return self.kept_in(weight) <= self.n


@dataclass(frozen=True)
class Masks:
    """Boolean masks by layer name, each in the shape of its layer's weight as [O, I, *taps].

    `patterns`: for layers whose masks are N:M; the others are unstructured.
    """

    by_layer: Mapping[str, torch.Tensor]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)

    @classmethod
    def uniform(cls, by_layer: Mapping[str, torch.Tensor], pattern: Pattern) -> "Masks":
        """Masks that all have the same pattern."""
        return cls(by_layer, dict.fromkeys(by_layer, pattern))

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of all layers, or None where they differ or some have none."""
        found = {self.patterns.get(name) for name in self.by_layer}
        return found.pop() if len(found) == 1 else None

    @property
    def pattern_text(self) -> str:
        """All patterns, sparsest first: "1:4, 2:4"; "" where all masks are unstructured."""
        return ", ".join(
            map(str, sorted(set(self.patterns.values()), key=lambda p: (p.n / p.m, p.m)))
        )

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.by_layer.items())

    @property
    def kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.by_layer.values())

    @property
    def total(self) -> int:
        return sum(mask.numel() for mask in self.by_layer.values())

    @torch.no_grad()
    def apply_(self, denoiser: nn.Module) -> None:
        """Zero the removed weights in place. Raises `UserError` where masks belong to another model."""
        for _, weight, mask in self._pairs(denoiser):
            weight.mul_(mask.to(weight.device))

    @contextmanager
    def applied(self, denoiser: nn.Module) -> Iterator[None]:
        """Within the context the removed weights are zero; afterwards they are restored."""
        before = [(weight, weight.detach().clone()) for _, weight, _ in self._pairs(denoiser)]
        self.apply_(denoiser)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in before:
                    weight.copy_(value)

    def hold(self, denoiser: nn.Module) -> Callable[[], None]:
        """A function that zeroes the removed weights again, in one call on the weights' device."""
        weights, masks = [], []
        for _, weight, mask in self._pairs(denoiser):
            weights.append(weight.detach())
            masks.append(mask.to(weight.device, weight.dtype))

        def apply() -> None:
            torch._foreach_mul_(weights, masks)

        return apply

    def violations(self, denoiser: nn.Module) -> dict[str, int]:
        """Number of weights that should be zero but are not, for the layers with any."""
        counts = {
            name: int(((weight != 0) & ~mask.to(weight.device)).sum())
            for name, weight, mask in self._pairs(denoiser)
        }
        return {name: count for name, count in counts.items() if count}

    def check_fits(self, denoiser: nn.Module) -> None:
        """Raise `UserError` naming the first layer that the denoiser lacks or has in another shape."""
        for _ in self._pairs(denoiser):
            pass

    def only(self, names: Container[str]) -> "Masks":
        """The masks of these layers."""
        by_layer = {name: mask for name, mask in self if name in names}
        return Masks(by_layer, {n: p for n, p in self.patterns.items() if n in by_layer})

    def valid_groups(self, name: str) -> float | None:
        """Share of a layer's groups with exactly N kept; None where its mask is unstructured.

        0 where the shape has no groups along input channels: a file may claim anything.
        """
        pattern, mask = self.patterns.get(name), self.by_layer[name]
        if pattern is None:
            return None
        if mask.ndim < 2 or not mask.numel() or mask.shape[1] % pattern.m:
            return 0.0
        kept_G = pattern.kept_in(mask)
        return int((kept_G == pattern.n).sum()) / len(kept_G)

    def validity(self, network: nn.Module) -> float | None:
        """Share of the weights' groups with at most N non-zeros; None where no layer is N:M."""
        pairs = ((self.patterns.get(name), weight) for name, weight, _ in self._pairs(network))
        valid = [pattern.valid_in(weight) for pattern, weight in pairs if pattern]
        return float(torch.cat(valid).double().mean()) if valid else None

    @property
    def compliance(self) -> float:
        """Share of groups with exactly N kept over all N:M layers; 0 without any."""
        groups = {name: self.by_layer[name].numel() // p.m for name, p in self.patterns.items()}
        exact = sum(count * (self.valid_groups(name) or 0.0) for name, count in groups.items())
        return exact / sum(groups.values()) if groups else 0.0

    def check_pattern(self) -> None:
        """Raise `UserError` unless every group of every N:M layer keeps exactly N."""
        for name, pattern in self.patterns.items():
            if self.valid_groups(name) != 1:
                raise UserError(f"masks of {name} are not {pattern}, though they claim to be")

    def _pairs(self, denoiser: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        modules = dict(denoiser.named_modules())
        for name, mask in self:
            weight = getattr(modules.get(name), "weight", None)
            if weight is not None:
                weight = oriented(modules[name], weight)
            if weight is None or weight.shape != mask.shape:
                found = "no such layer" if weight is None else f"shape {tuple(weight.shape)}"
                raise UserError(
                    f"masks are of another model: {name} has {found}, its mask {tuple(mask.shape)}"
                )
            yield name, weight, mask


def save_masks(masks: Masks, path: Path) -> None:
    """One bit per weight, in row-major order; shapes and patterns go into the metadata."""
    packed = {name: pack_bits(mask) for name, mask in masks}
    metadata = {
        "shapes": json.dumps({n: list(mask.shape) for n, mask in masks}, sort_keys=True),
        "patterns": json.dumps({n: str(p) for n, p in masks.patterns.items()}, sort_keys=True),
    }
    path.write_bytes(sorted_header(save(packed, metadata=metadata)))


def sorted_header(file: bytes) -> bytes:
    """The file with its header sorted: safetensors orders metadata randomly, and files are hashed."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


def load_masks(path: Path) -> Masks:
    """Masks written by `save_masks`. Raises `UserError` where the file is damaged or another kind."""
    if not path.is_file():
        raise UserError(f"{path} is not a masks file: it is not a file at all")
    try:
        tensors, metadata = read_tensors(path)
        shapes, claimed = (json_table(metadata, key) for key in ("shapes", "patterns"))
        for kind, table in (("shape", shapes), ("pattern", claimed)):
            if unknown := table.keys() - tensors.keys():
                raise ValueError(f"a {kind} for {min(unknown)[:60]}, without a mask")
        by_layer = {
            n: unpack_bits(tensors[n], count_of(shapes[n], n)).reshape(shapes[n])
            for n in sorted(tensors)
        }
        patterns = {name: Pattern.parse(str(claimed[name])) for name in claimed}
    except Exception as error:  # safetensors and torch raise many types
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)[:160]
        raise UserError(f"{path} is not a masks file, or is damaged ({reason})") from error
    return Masks(by_layer, patterns)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises what safetensors raises."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def json_table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object in the metadata. Raises `ValueError` where it is missing or something else."""
    if key not in metadata:
        raise ValueError(f"{key} is missing")
    table = parse_json(metadata[key], key)
    if not isinstance(table, dict):
        raise ValueError(f"{key} is not a JSON object")
    return table


def count_of(shape: Any, name: str) -> int:
    """Elements in a shape that a file claims. Raises `ValueError` unless it is a shape."""
    known = isinstance(shape, list) and 0 < len(shape) <= 8
    if not (known and all(type(size) is int and size > 0 for size in shape)):
        raise ValueError(f"{name} has shape {str(shape)[:60]}")
    return math.prod(shape)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Any boolean tensor => uint8 (ceil(count / 8),), row-major, highest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy().reshape(-1)))


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`, bool (count,). Raises `ValueError` for another number of bits."""
    # checked before anything of that size is allocated; and numpy would pad with zeros
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise ValueError(f"{bits.numel()} bytes of bits for {count} weights")
    flat = np.unpackbits(bits.cpu().numpy()).astype(bool)
    if flat[count:].any():
        raise ValueError(f"bits are set behind the last of {count} weights")
    return torch.from_numpy(flat[:count])
