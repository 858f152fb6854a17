"""Modules of `torch.export.save`, run operator by operator, so that a file is data and not a program.

`torch.export.load` unpickles parts of the archive and evaluates expressions that stand in it, so a
file could run anything. Here its graph is read as JSON, its weights as raw numbers, and only ATen
operators and arithmetic on sizes are called.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import nn

from prunedm.errors import UserError

SCHEMA = 8  # major version of the graph's layout: torch 2.6 and later
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_FILES = {"from_file", "save"}  # operators that would read or write them
_SIZES: dict[str, Callable[..., Any]] = {
    "_operator.add": operator.add, "_operator.sub": operator.sub, "_operator.mul": operator.mul,
    "_operator.floordiv": operator.floordiv, "_operator.mod": operator.mod,
    "_operator.truediv": operator.truediv, "_operator.neg": operator.neg,
    "_operator.eq": operator.eq, "_operator.ne": operator.ne, "_operator.lt": operator.lt,
    "_operator.le": operator.le, "_operator.gt": operator.gt, "_operator.ge": operator.ge,
    "torch.sym_int": torch.sym_int, "torch.sym_float": torch.sym_float,
    "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min, "math.trunc": math.trunc,
}  # fmt: skip
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last,
    3: torch.channels_last_3d, 4: torch.preserve_format,
}  # fmt: skip
_PLAIN = {
    "as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists",
}  # fmt: skip
_LISTS = {
    "as_tensors": "as_tensor", "as_nested_tensors": "as_tensors", "as_floats": "as_float",
    "as_sym_ints": "as_sym_int", "as_sym_floats": "as_sym_float", "as_sym_bools": "as_sym_bool",
    "as_optional_tensors": "as_optional_tensor",
}  # fmt: skip
_UNIONS = {"as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"}
_CODED: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_float": float,  # infinity is written as a string
    "as_scalar_type": _DTYPES.__getitem__,
    "as_memory_format": _MEMORY_FORMATS.__getitem__,
    "as_layout": {7: torch.strided}.__getitem__,
}
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # what a bad graph runs into


def is_exported(path: Path) -> bool:
    """Whether a file is an archive of `torch.export.save` (TorchScript's are zip files too)."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        names = archive.namelist()
    return any(
        name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names
    )


def load_exported(path: Path) -> nn.Module:
    """The module of one uint8 NCHW tensor and one output, on the CPU.

    Raises `UserError` for damaged files, batches of fixed size, training mode, and for anything but
    ATen operators: control flow, other libraries' operators, pickled objects.
    """
    try:
        with ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            program = json.loads(archive.read(f"{root}/models/model.json"))
            if program["schema_version"]["major"] != SCHEMA:
                raise UserError(
                    f"{str(path)!r} has export schema {program['schema_version']['major']}, not "
                    f"{SCHEMA}; export it anew, or give a TorchScript file"
                )
            tensors = _read_tensors(archive, root, "weights") | _read_tensors(
                archive, root, "constants"
            )
        return _Exported(program["graph_module"], tensors)
    except UserError as error:
        raise UserError(f"{str(path)!r}: {error}") from error
    except (OSError, BadZipFile, RuntimeError, *_WRONG) as error:
        raise UserError(
            f"{str(path)!r} is damaged or no file of torch.export.save (torch 2.8 or later): "
            f"{type(error).__name__} {error}; save it anew, or give a TorchScript file"
        ) from error


class _Exported(nn.Module):
    """A graph of ATen operators. Values are dropped after their last use."""

    def __init__(self, graph_module: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        graph = graph_module["graph"]
        self.nodes = [n for n in graph["nodes"] if not _is_check(n["target"])]
        self.operators = [_operator(n["target"]) for n in self.nodes]
        self.held: dict[str, str] = {}  # graph name -> buffer name
        self._bind(graph_module["signature"]["input_specs"], tensors)
        outputs = [name for output in graph["outputs"] for name in _names(output)]
        if len(outputs) != 1:
            raise UserError(f"gives {len(outputs)} outputs; export a module that gives one")
        self.output = outputs[0]
        self.shape = _check_input(graph["tensor_values"][self.input])
        for node in self.nodes:
            _check_arguments(node)
        self.spent = self._last_uses()

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Raises `RuntimeError` where the graph cannot take the images."""
        self._check_shape(images_NCHW)
        device = images_NCHW.device
        values: dict[str, Any] = {k: getattr(self, name) for k, name in self.held.items()}
        values[self.input] = images_NCHW
        try:
            for node, call, spent in zip(self.nodes, self.operators, self.spent, strict=True):
                positional, named = _arguments(node, values, device)
                _assign(node["outputs"], call(*positional, **named), values)
                for name in spent:
                    del values[name]
            result: torch.Tensor = values[self.output]
        except _WRONG as error:
            raise RuntimeError(f"the exported graph fails: {error}") from error
        return result

    def _bind(self, specs: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
        inputs = []
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                inputs.append(content["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                name = f"tensor_{len(self.held)}"
                self.register_buffer(name, tensors[content[f"{kind}_name"]])
                self.held[content["arg"]["name"]] = name
            else:
                raise UserError(f"takes a {kind}; only tensors are supported")
        if len(inputs) != 1:
            raise UserError(f"takes {len(inputs)} inputs; export a module of one")
        self.input = inputs[0]

    def _last_uses(self) -> list[list[str]]:
        last: dict[str, int] = {}
        for number, node in enumerate(self.nodes):
            for argument in [*(i["arg"] for i in node["inputs"]), *node["outputs"]]:
                last |= dict.fromkeys(_names(argument), number)
        last.pop(self.output, None)
        return [[name for name, at in last.items() if at == n] for n in range(len(self.nodes))]

    def _check_shape(self, images_NCHW: torch.Tensor) -> None:
        wrong = [
            w for w, g in zip(self.shape, images_NCHW.shape, strict=True) if w not in (None, g)
        ]
        if wrong:
            raise RuntimeError(f"it was exported for images of shape {tuple(self.shape[1:])}")


def _read_tensors(archive: ZipFile, root: str, what: str) -> dict[str, torch.Tensor]:
    """Raw numbers of the archive by name; several names may view one record."""
    folder = f"{root}/data/{what}"
    config = json.loads(archive.read(f"{folder}/model_{what}_config.json"))["config"]
    tensors = {}
    for name, entry in config.items():
        if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
            raise UserError(
                f"{name} is pickled, and unpickling can run code; give a TorchScript file"
            )
        meta = entry["tensor_meta"]
        sizes, strides = ([k["as_int"] for k in meta[key]] for key in ("sizes", "strides"))
        raw = bytearray(archive.read(f"{folder}/{entry['path_name']}"))
        dtype = _DTYPES[meta["dtype"]]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).clone()
    return tensors


def _operator(target: str) -> Callable[..., Any]:
    if target in _SIZES:
        return _SIZES[target]
    match = _ATEN.fullmatch(target)
    found = match and getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if not match or match[1] in _FILES or not isinstance(found, torch._ops.OpOverload):
        raise UserError(f"calls {target}; only ATen operators are run, so give a TorchScript file")
    return found


def _is_check(target: str) -> bool:
    """Checks of the traced device and sizes: the device is another one where a GPU is used."""
    return target.startswith(("torch.ops.aten._assert_", "torch.ops.aten.sym_constrain_range"))


def _check_input(meta: dict[str, Any]) -> list[int | None]:
    """Sizes of the input, None where any will do."""
    if _DTYPES.get(meta["dtype"]) != torch.uint8:
        raise UserError("takes no uint8 images; export a module that does")
    sizes = [size.get("as_int") for size in meta["sizes"]]
    if len(sizes) != 4 or sizes[0] is not None:
        raise UserError(
            "has a batch of fixed size, or no NCHW input; export it with "
            "dynamic_shapes=({0: torch.export.Dim('n')},)"
        )
    return sizes


def _check_arguments(node: dict[str, Any]) -> None:
    known = _PLAIN | set(_LISTS) | set(_CODED) | _UNIONS | {"as_tensor", "as_device"}
    for argument in node["inputs"]:
        ((kind, content),) = argument["arg"].items()
        if kind not in known:
            raise UserError(f"{node['target']} has an argument {kind}; give a TorchScript file")
        if argument["name"] in ("training", "train") and content is True:
            raise UserError("was exported in training mode; call .eval() first and export it anew")


def _names(argument: Any) -> Iterable[str]:
    """Names of the values that an argument refers to, or that an output has."""
    if isinstance(argument, list):
        return [name for item in argument for name in _names(item)]
    if not isinstance(argument, dict):
        return []
    own = [argument[key] for key in ("name", "as_name") if isinstance(argument.get(key), str)]
    return own + [name for item in argument.values() for name in _names(item)]


def _arguments(
    node: dict[str, Any], values: dict[str, Any], device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    positional, named = [], {}
    for argument in node["inputs"]:
        ((kind, content),) = argument["arg"].items()
        value = _value(kind, content, values, device)
        if argument.get("kind") == 1 or node["target"] in _SIZES:
            positional.append(value)
        else:
            named[argument["name"]] = value
    return positional, named


def _value(kind: str, content: Any, values: dict[str, Any], device: torch.device) -> Any:
    if kind in ("as_tensor", "as_name"):
        return values[content["name"] if kind == "as_tensor" else content]
    if kind == "as_device":
        return device
    if kind in _UNIONS:
        ((kind, content),) = content.items()
        return _value(kind, content, values, device)
    if kind in _LISTS:
        return [_value(_LISTS[kind], item, values, device) for item in content]
    return _CODED[kind](content) if kind in _CODED else content


def _assign(outputs: list[dict[str, Any]], result: Any, values: dict[str, Any]) -> None:
    if len(outputs) == 1 and "as_tensors" not in outputs[0]:
        result = [result]
    names = [name for output in outputs for name in _names(output)]
    if names:
        values.update(zip(names, result, strict=True))
