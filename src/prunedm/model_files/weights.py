"""A denoiser's weight files: finding them, checking them, and filling a network from them.

Names, shapes and types are checked before any tensor is read. Tensors are copied one by one into
their own memory, so nothing depends on the file's alignment or on later changes of the file.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from prunedm.errors import UserError, first_line
from prunedm.model_files.configs import build, describe_network, shown
from prunedm.reading import check_regular

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers, of transformers
LARGE = 1 << 30  # weights from which a network keeps the types of the file
# .fp16 comes before the shard's number in some repositories, after it in others
_NAME = re.compile(
    rf"(?:{'|'.join(STEMS)})" + r"(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.(safetensors|bin)"
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DDP and of torch.compile
_REPEATED = 4  # times the size of a .bin file that its tensors may reach: some are tied
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> tuple[list[Path], str]:
    """The files to read, all shards of one variant, and that variant ("" is the plain one).

    safetensors before .bin, the plain variant before fp16, fp16 before others.
    """
    found: dict[tuple[bool, bool, bool, str], list[Path]] = {}
    for path in sorted(path for stem in STEMS for path in folder.glob(f"{stem}[.-]*")):
        if match := _NAME.fullmatch(path.name):
            variant = match[1] or match[2] or ""
            rank = (match[3] == "bin", variant != "", variant != "fp16", variant)
            found.setdefault(rank, []).append(path)
    if not found:
        raise UserError(
            f"{folder} has no weights: {STEMS[0]}.safetensors is missing; "
            "copy or download the whole folder"
        )
    best = min(found)
    return found[best], best[-1]


@dataclass(frozen=True)
class Types:
    """Types of stored tensors: the most common one, and exceptions by name."""

    most: torch.dtype = torch.float32
    others: Mapping[str, torch.dtype] = field(default_factory=dict)


def load_network(config: Mapping[str, Any], folder: Path) -> tuple[Any, Types, str]:
    """The network of a checked config with the folder's weights, their stored types, the variant.

    A network of fewer than `LARGE` weights becomes float32, a larger one keeps the stored types. Raises
    `UserError` where config and files disagree, a file is damaged, or a weight is not finite.
    """
    shapes = describe_network(config, folder / "config.json")
    files, variant = weight_files(folder)
    with ExitStack() as open_files:
        try:
            stored = Stored(files, open_files)
            names = _current_names(shapes, stored.shapes, folder)
            _check_shapes(shapes, {n: stored.shapes[old] for n, old in names.items()}, folder)
            large = sum(math.prod(shape) for shape in stored.shapes.values()) >= LARGE
            state = {
                name: _whole(stored.take(old), name, folder, keep=large)
                for name, old in names.items()
            }
        except UserError:
            raise
        except Exception as error:  # safetensors and torch raise many types for damaged files
            raise UserError(
                f"cannot load weights in {folder}: {first_line(error)[:160]}; download it again?"
            ) from error
    others = {new: stored.types[old] for new, old in names.items() if old in stored.types}
    return filled(config, state), Types(stored.dtype, others), variant


def filled(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """A network that owns these tensors, in evaluation mode."""
    with init_empty_weights():  # buffers that are not in the file keep their values
        network = build(config)
    missing, _ = network.load_state_dict(state, assign=True, strict=False)
    assert set(missing) <= tied(network), missing
    if missing:
        network.tie_weights()
    return network.eval()


def tied(network: Any) -> set[str]:
    """Names of parameters tied to others, such as a language model's head to its embedding."""
    if not getattr(network.config, "tie_word_embeddings", False):
        return set()
    return set(getattr(network, "_tied_weights_keys", None) or ())


def check_state(config: Mapping[str, Any], state: dict[str, torch.Tensor], path: Path) -> None:
    """Check a `state` and make its floats float32 in place. Raises `UserError` as `load_network`."""
    shapes = describe_network(config, path.with_name("config.json"))
    _check_shapes(shapes, {n: tuple(t.shape) for n, t in state.items()}, path)
    for name, tensor in state.items():
        state[name] = _whole(tensor, name, path)


class Stored:
    """The contents of weight files: shapes by name, and each tensor for reading once."""

    def __init__(self, files: list[Path], open_files: ExitStack) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read: dict[str, Any] = {}
        sizes: Counter[str] = Counter()
        kinds: dict[str, str] = {}
        for path in files:
            if not path.is_file():  # opening a pipe would hang
                raise UserError(f"{path} is not a file")
            for name, shape, kind, read in self._tensors(path, open_files):
                if name in self.shapes:
                    raise UserError(f"{path}: {name} is in another shard too")
                self.shapes[name], self._read[name] = shape, read
                sizes[kind] += math.prod(shape)
                kinds[name] = kind
        self.total = sizes.total()
        most = sizes.most_common(1)[0][0] if sizes else ""
        self.dtype = _TYPES.get(most, torch.float32)  # most of the numbers'; float32 for .bin files
        self.types = {n: _TYPES.get(k, torch.float32) for n, k in kinds.items() if k != most}

    def take(self, name: str) -> torch.Tensor:
        # popped: tensors of a .bin file are in memory, and let go of one by one
        tensor: torch.Tensor = self._read.pop(name)()
        return tensor

    def _tensors(self, path: Path, open_files: ExitStack) -> Iterator[tuple[str, Any, str, Any]]:
        if path.suffix == ".safetensors":
            file = open_files.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield (
                    name,
                    tuple(part.get_shape()),
                    part.get_dtype(),
                    lambda n=name: file.get_tensor(n),
                )
            return
        state = read_bin(path)
        for name, tensor in state.items():
            yield str(name), tuple(tensor.shape), "", lambda t=tensor: t


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a torch.save file, read without executing anything.

    Raises `UserError` for anything else in it, and for tensors many times as large as the file.
    """
    size = check_regular(path).stat().st_size
    if is_zipfile(path):
        with ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise UserError(f"{path} is packed, which torch.save never does; get it again")
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state if isinstance(state, dict) else {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"cannot load weights in {path}: {shown(name)} is not a tensor")
    if sum(t.numel() * t.element_size() for t in state.values()) > _REPEATED * size:
        raise UserError(f"{path} claims more numbers than it holds; get it again")
    return state


def _current_names(network: Any, stored: Mapping[str, object], folder: Path) -> dict[str, str]:
    """Names of the network's state => names in the file, from wrappers or old versions."""
    names: dict[str, str] = {}
    for old in stored:
        if names.setdefault(new := _WRAPPERS.sub("", old), old) != old:
            raise UserError(f"weights in {folder} hold {new} twice, as {names[new]} and {old}")
    if hasattr(network, "_fix_state_dict_keys_on_load"):  # diffusers: query => to_q etc.
        network._fix_state_dict_keys_on_load(names)
    return names


def _check_shapes(network: Any, stored: Mapping[str, tuple[int, ...]], where: Path) -> None:
    again = tied(network) - stored.keys()
    wanted = {n: tuple(t.shape) for n, t in network.state_dict().items() if n not in again}
    start = f"weights in {where} are not those of its config.json"
    for kind, names in (
        ("missing", wanted.keys() - stored.keys()),
        ("unexpected", stored.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(f"{start}: {len(names)} {kind} tensors, first {min(names)[:100]}")
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise UserError(f"{start}: {name} is {stored[name]}, and by the config {shape}")


def _whole(tensor: torch.Tensor, name: str, where: Path, *, keep: bool = False) -> torch.Tensor:
    """A copy, float32 unless `keep`. Raises `UserError` unless it holds finite floats."""
    if not tensor.is_floating_point():
        raise UserError(f"{where}: {name} holds {tensor.dtype}, which are not weights")
    dtype = tensor.dtype if keep else torch.float32
    copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    check_finite(copy, name, where)
    return copy


def check_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """Raise `UserError` for NaN and infinities."""
    ends = tensor.aminmax() if tensor.numel() else ()  # needs no mask in memory
    if not all(bool(end.isfinite()) for end in ends):
        raise UserError(f"{where}: {name} has NaN or infinite values; get the weights again")
