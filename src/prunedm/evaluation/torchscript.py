"""TorchScript files, whose code is checked before it runs.

TorchScript is a programming language: it can write files, and some of it runs while it is loaded.
Code that only computes on tensors and strings is run; for anything else the user must state trust.

The check does not depend on parsing: it looks at every word, even in strings and comments, and at
whatever could assemble a word otherwise. A file that passes is repacked, so that PyTorch loads exactly
what was checked.
"""

import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import nn

from prunedm.errors import UserError

_MOST_CODE = 16 << 20  # bytes; torchvision's largest have 1 MB
_TENSOR = re.compile(r"[^/]+/(data|constants)/\d+")
_LEFT_OUT = re.compile(r"[^/]+/(code/.+\.debug_pkl|traced_inputs(/\d+|\.pkl))")
_SMALL = re.compile(
    r"[^/]+/(code/[\w/]+\.py|(data|constants)\.pkl|version|byteorder|\.data/\w+|\.\w+)"
)
# operators with harmless string arguments: those of Python's strings and containers, and modes of
# tensor operators. Any other one may take the name of a file
_TEXTS = {
    *dir(str), *dir(dict), *dir(list), "Delete", "Float", "Int", "_set_item", "add", "any", "device",
    "dict", "eq", "ge", "gt", "le", "len", "list", "lt", "ne", "ord", "percentFormat", "slice",
    "sorted", "warn", "__interpolate", "__upsample", "_convolution_mode", "conv1d", "conv2d", "conv3d",
    "div", "div_", "divide", "divide_", "einsum", "gelu", "gelu_", "gelu_backward", "index_reduce",
    "index_reduce_", "meshgrid", "nanquantile", "pad", "pad_sequence", "quantile", "scatter",
    "scatter_", "scatter_reduce", "scatter_reduce_", "searchsorted", "segment_reduce", "stft",
    *(f"linalg_{name}" for name in (
        "cond", "eigh", "eigvalsh", "lstsq", "matrix_norm", "norm", "qr", "svd", "svdvals",
    )),
    *(f"fft_{way}{name}" for way in ("", "i") for name in (
        "fft", "fft2", "fftn", "hfft", "hfft2", "hfftn", "rfft", "rfft2", "rfftn",
    )),
}  # fmt: skip
_PRIM = {
    "NumToTensor", "RaiseException", "TupleIndex", "abs", "data", "device", "dtype", "grad", "index",
    "is_cpu", "is_cuda", "is_meta", "is_mps", "is_nested", "is_quantized", "is_sparse", "itemsize",
    "layout", "max", "min", "name", "nbytes", "rangelist", "requires_grad", "tolist", "type",
    "unchecked_cast", "unchecked_unwrap_optional",
}  # fmt: skip
# C++ classes, which may load libraries or open connections; `num_classes` is an attribute
_CLASSES = re.compile(rb"(?<![A-Za-z0-9]_)classes")
_QUALIFIED = re.compile(r"\b__torch__(?:\.\w+)*")  # classes and functions defined in the archive
_OPS = re.compile(r"\bops\b(?:\s*\.\s*(\w+)\s*\.\s*(\w+))?")
_GETATTR = re.compile(r'\bgetattr\([\w.()\s]*, "\w+"\)')  # with a literal name
_ESCAPE = re.compile(r"""\\(?![nt"'\\])""")  # other escapes could hide a word
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def load_torchscript(path: Path, *, trust: bool) -> nn.Module:
    """The file's module on the CPU; `trust` skips the check.

    Raises `UserError` for damaged files, and without `trust` for code that may do more than compute.
    """
    if _is_exported(path):
        raise UserError(
            f"{str(path)!r} is a file of torch.export, whose reader could run anything in it: trace the "
            "network, torch.jit.save(torch.jit.trace(network.eval(), images_uint8), 'features.pt'), and "
            "give that"
        )
    source = str(path) if trust else _repacked(path)
    with warnings.catch_warnings():  # that advises torch.export
        warnings.simplefilter("ignore", FutureWarning)
        module: nn.Module = torch.jit.load(source, map_location="cpu")
    return module


def _is_exported(path: Path) -> bool:
    """Whether `torch.export.save` wrote the file; TorchScript's are zip files too."""
    if not is_zipfile(path):
        return path.suffix == ".pt2"
    with ZipFile(path) as archive:
        ends = ("/archive_format", "serialized_exported_program.json")
        return any(name.endswith(ends) for name in archive.namelist())


def _repacked(path: Path) -> BytesIO:
    """The archive without its unneeded files, after the check of its code."""
    result, small = BytesIO(), 0
    with ZipFile(path) as archive, ZipFile(result, "w", ZIP_STORED) as new:
        names = [name.casefold() for name in archive.namelist()]
        if len(set(names)) < len(names):
            raise UserError(_refusal(path, "holds a file twice"))
        for entry in archive.infolist():
            name = entry.filename
            if _LEFT_OUT.fullmatch(name):
                continue
            if _SMALL.fullmatch(name):
                small += entry.file_size
            elif not _TENSOR.fullmatch(name) or entry.compress_type != ZIP_STORED:
                raise UserError(_refusal(path, f"holds {name[:60]!r}"))
            if small > _MOST_CODE:
                raise UserError(_refusal(path, f"has more than {_MOST_CODE >> 20} MiB of code"))
            content = archive.read(entry)
            what = "" if _TENSOR.fullmatch(name) else next(_suspects(name, content), "")
            if what:
                raise UserError(_refusal(path, what))
            new.writestr(name, content)
    result.seek(0)
    return result


def _suspects(name: str, content: bytes) -> Iterator[str]:
    """What in a source file or TorchScript pickle may do more than compute."""
    if _CLASSES.search(content):
        yield "uses a class that it does not define"
    if not name.endswith(".py"):
        return
    if not content.isascii():
        yield "is not plain ASCII"
    text = content.decode("ascii", errors="replace")
    if _ESCAPE.search(text):
        yield "spells strings by escapes"
    for namespace, operator in _OPS.findall(_QUALIFIED.sub("(_)", text)):
        if namespace != "aten" and (namespace != "prim" or operator not in _PRIM):
            yield f"calls ops.{namespace}.{operator}" if namespace else "passes operators on"
    yield from (f"calls {word}" for word in sorted(set(_WORD.findall(text))) if _may_open(word))
    plain = None
    while plain != text:  # inside out: getattr(getattr(self, "0"), "1")
        plain, text = text, _GETATTR.sub("(_)", text)
    if re.search(r"\bgetattr\b", text):
        yield "looks names up"


def _may_open(word: str) -> bool:
    """Whether an operator of this name takes strings that are not known to be harmless."""
    if word.startswith("rpc_"):
        return True
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{word}")
    takes_text = any("str" in str(a.type) for schema in schemas for a in schema.arguments)
    return takes_text and word not in _TEXTS


def _refusal(path: Path, what: str) -> str:
    return (
        f"{str(path)!r} is TorchScript that {what}, which could run anything: read it and give "
        "--trust-features"
    )
