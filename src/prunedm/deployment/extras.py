"""Packages that only some formats need."""

from importlib.util import find_spec

from prunedm.errors import UserError

# what a format imports, and the extra of prunedm that installs it
_NEEDS = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "tensorrt": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": (("openvino",), "openvino"),
}
_NEEDS_INT8 = {"openvino": (("openvino", "nncf"), "openvino")}


def require(format: str, *, precision: str = "fp32") -> None:
    """Raise `UserError` with the `pip install` to run where a format's packages are missing."""
    needs = _NEEDS_INT8.get(format) if precision == "int8" else None
    packages, extra = needs or _NEEDS.get(format, ((), ""))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{format} needs {', '.join(missing)}; run: pip install 'prunedm[{extra}]'")
