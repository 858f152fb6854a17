"""Packages that only some formats need."""

from collections.abc import Sequence
from importlib.util import find_spec

from prunedm.errors import UserError

ONNX = ("onnx", "onnxscript", "onnxruntime")
OPENVINO = ("openvino",)


def require(what: str, packages: Sequence[str], extra: str) -> None:
    """Raise `UserError` with the `pip install` to run where one of the packages is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}; run: pip install 'prunedm[{extra}]'")
