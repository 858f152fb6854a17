"""Post-training quantisation to int8, with ranges taken from denoising problems over all timesteps.

Activations of a diffusion model change their range with the noise level (Shang et al. 2023, PTQ4DM;
Li et al. 2023, Q-Diffusion), so calibration sees the sampler's whole range and not one step. Weights
are symmetric by output channel, so zeros stay zeros; the first and last convolution, whose error
would be added to the image at every step, stay in floating point.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from prunedm.errors import UserError

ENDS = ("conv_in", "conv_out", "time_embedding")  # not quantised

Inputs = dict[str, np.ndarray]


def quantize_onnx(source: Path, target: Path, batches: Iterable[Inputs]) -> None:
    """QDQ form: int8 weights and activations around Conv, Gemm and MatMul.

    `batches` are inputs by name. Raises `UserError` where ONNX Runtime cannot quantise the file.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Inputs | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_ends(onnx.load(str(prepared))),
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"ONNX Runtime cannot quantise this model: {error}") from error


def _ends(model: Any) -> list[str]:
    """Nodes that take a weight of `ENDS`, by name."""
    names = tuple(f"unet.{end}" for end in ENDS)
    return [n.name for n in model.graph.node if any(i.startswith(names) for i in n.input)]


def quantize_openvino(model: Any, batches: Iterable[Inputs], count: int) -> Any:
    """A model with int8 convolutions and products; of `count` batches."""
    import nncf

    ends = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul")
        and any(f".{end}" in op.get_friendly_name() for end in ENDS)
    ]
    return nncf.quantize(
        model,
        nncf.Dataset(list(batches)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=count,
        ignored_scope=nncf.IgnoredScope(names=ends),
    )
