"""2:4 layers as sparse GEMMs: linear layers, and convolutions on channels-last images.

A weight becomes W[O, K] with K in channels-last order, (kernel row, kernel column, input channel), so
that groups of four input channels stay adjacent. N images, C or I input channels, O outputs.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from prunedm.masks import Pattern
from prunedm.networks.layer_kinds import find_kind, kind_of, to_matrix, weight_of, width_of
from prunedm.networks.layers import why_not_nm
from prunedm.sparse_kernels.gemm import CUDA_KERNELS, Gemm, Kernel

_PATCH_BYTES = 1 << 28  # most bytes of unfolded pixels at a time
_ROW_MULTIPLE = 8  # of pixels; PyTorch pads anything else by a copy, at each GEMM


class SparseLinear(nn.Module):
    """A linear layer as a sparse GEMM; inputs are cast to the weight's type, as by autocast."""

    def __init__(self, layer: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        self.in_features, self.out_features = width_of(layer, "in"), width_of(layer, "out")
        self.gemm = kernel.pack(weight_of(layer).detach().contiguous())
        self.bias = copy.deepcopy(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x[..., I] => y[..., O]."""
        x_BK = x.to(self.gemm.dtype).reshape(-1, self.in_features)
        y_BO: torch.Tensor = self.gemm(x_BK, self.bias)
        return y_BO.reshape(*x.shape[:-1], self.out_features)


class SparseConv2d(nn.Module):
    """A convolution as sparse GEMMs: NCHW in, NCHW with channels-last strides out.

    `form` "im2col": one GEMM over unfolded pixels, a few images at a time to bound memory. "shifted":
    one GEMM per kernel tap, summed; at stride 1 nothing is unfolded, because in the list of all pixels
    of the padded images a tap is a shift. The sum is rounded once per tap. For a kernel of one tap
    both forms are the same.
    """

    def __init__(self, layer: nn.Conv2d, kernel: Kernel, form: str = "im2col") -> None:
        super().__init__()
        assert form in ("im2col", "shifted"), form
        self.form = form
        self.kernel_size, self.stride = _pair(layer.kernel_size), _pair(layer.stride)
        assert not isinstance(layer.padding, str)
        self.padding = _pair(layer.padding)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        weight_OK = to_matrix(layer.weight.detach())
        parts = weight_OK.split(layer.in_channels, 1) if form == "shifted" else [weight_OK]
        self.gemms = nn.ModuleList(kernel.pack(part) for part in parts)
        self.bias = copy.deepcopy(layer.bias)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        first = self.gemms[0]
        assert isinstance(first, Gemm)
        x_NCHW = x_NCHW.to(first.dtype, memory_format=torch.channels_last)
        if self.form == "shifted":
            whole = self.stride == (1, 1)
            y_NHWO = self._shifted(x_NCHW) if whole else self._tap_by_tap(x_NCHW)
        else:
            images = self._images_at_once(x_NCHW)
            parts = [self._im2col(part) for part in x_NCHW.split(images)]
            y_NHWO = torch.cat(parts) if len(parts) > 1 else parts[0]
        return y_NHWO.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def _im2col(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """=> y[N, H', W', O] by one GEMM over x[N, H', W', kh * kw * I]."""
        x_NHWK = torch.cat(self._taps(x_NCHW), -1)
        y_BO = self.gemms[0](x_NHWK.reshape(-1, x_NHWK.shape[-1]), self.bias)
        return y_BO.reshape(*x_NHWK.shape[:3], self.out_channels)

    def _tap_by_tap(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """=> y[N, H', W', O]; each tap's pixels are copied."""
        out_h, out_w = self._out_size(x_NCHW, self.padding)
        taps = [x_NHWC.reshape(-1, self.in_channels) for x_NHWC in self._taps(x_NCHW)]
        y_BO = self.gemms[0](taps[0], self.bias)
        for k in range(1, len(taps)):
            y_BO = y_BO + self.gemms[k](taps[k])
        return y_BO.reshape(len(x_NCHW), out_h, out_w, self.out_channels)

    def _shifted(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """=> y[N, H', W', O] at stride 1; windows across two rows are computed and discarded."""
        count, _, height, width = x_NCHW.shape
        (top, left), (kernel_h, kernel_w) = self.padding, self.kernel_size
        padded = (height + 2 * top, width + 2 * left)
        pixels = count * padded[0] * padded[1]
        rows = pixels + -pixels % _ROW_MULTIPLE
        shifts = [i * padded[1] + j for i in range(kernel_h) for j in range(kernel_w)]
        x_PC = x_NCHW.new_zeros(rows + shifts[-1], self.in_channels)
        inner_NHWC = x_PC[:pixels].view(count, *padded, self.in_channels)
        inner_NHWC[:, top : top + height, left : left + width] = x_NCHW.permute(0, 2, 3, 1)
        y_PO = self.gemms[0](x_PC[:rows], self.bias)
        for k in range(1, len(shifts)):
            y_PO = y_PO + self.gemms[k](x_PC[shifts[k] : shifts[k] + rows])
        out_h, out_w = self._out_size(x_NCHW, self.padding)
        y_NHWO = y_PO[:pixels].reshape(count, *padded, self.out_channels)
        return y_NHWO[:, :out_h, :out_w]

    def _taps(self, x_NCHW: torch.Tensor) -> list[torch.Tensor]:
        """The inputs x[N, H', W', I] of each kernel tap, row by row of the kernel."""
        top, left = self.padding
        if top or left:
            x_NCHW = F.pad(x_NCHW, (left, left, top, top))
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        (step_h, step_w), (out_h, out_w) = self.stride, self._out_size(x_NCHW, (0, 0))
        last_h, last_w = step_h * (out_h - 1) + 1, step_w * (out_w - 1) + 1
        return [
            x_NHWC[:, i : i + last_h : step_h, j : j + last_w : step_w]
            for i in range(self.kernel_size[0])
            for j in range(self.kernel_size[1])
        ]

    def _out_size(self, x_NCHW: torch.Tensor, padding: tuple[int, int]) -> tuple[int, int]:
        height, width = x_NCHW.shape[2:]
        return (
            (height + 2 * padding[0] - self.kernel_size[0]) // self.stride[0] + 1,
            (width + 2 * padding[1] - self.kernel_size[1]) // self.stride[1] + 1,
        )

    def _images_at_once(self, x_NCHW: torch.Tensor) -> int:
        height, width = self._out_size(x_NCHW, self.padding)
        taps = self.kernel_size[0] * self.kernel_size[1]
        patches = height * width * taps * self.in_channels * x_NCHW.element_size()
        return max(1, _PATCH_BYTES // patches)


def forms(layer: nn.Module) -> tuple[str, ...]:
    """The ways a layer can become GEMMs; one where all are the same."""
    if weight_of(layer)[0, 0].numel() == 1:
        return ("gemm",)
    return ("im2col", "shifted")


def to_sparse(layer: nn.Module, kernel: Kernel, form: str) -> nn.Module:
    """The layer in one of its `forms`."""
    if not kind_of(layer).axes:
        return SparseLinear(layer, kernel)
    assert isinstance(layer, nn.Conv2d)
    return SparseConv2d(layer, kernel, "im2col" if form == "gemm" else form)


def candidates(
    layer: nn.Module, dtype: torch.dtype, kernels: Sequence[Kernel]
) -> tuple[list[tuple[Kernel, str]], list[str]]:
    """The kernels and forms that support a 2:4 layer in this type, and why others do not."""
    weight = weight_of(layer)
    outputs, inputs = weight.shape[:2]
    found, refused = [], []
    for kernel in kernels:
        for form in forms(layer):
            columns = inputs if form == "shifted" else weight[0].numel()
            reason = kernel.why_not(outputs, columns, dtype)
            found += [(kernel, form)] * (reason is None)
            refused += [f"{kernel.name}: {reason}"] * (reason is not None)
    return found, list(dict.fromkeys(refused))


def why_not_sparse(
    layer: nn.Module, dtype: torch.dtype, kernels: Sequence[Kernel] = CUDA_KERNELS
) -> str | None:
    """None where a linear layer or Conv2d can run as a 2:4 GEMM of `dtype`, else the reason."""
    kind = find_kind(layer)
    if kind is None or kind.axes not in (0, 2):
        return f"a {type(layer).__name__} is neither a linear layer nor a Conv2d"
    reason = why_not_nm(layer, 4)
    if reason is not None:
        return reason
    if isinstance(layer, nn.Conv2d):
        if _pair(layer.dilation) != (1, 1):
            return "dilated convolution"
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return f"padding {layer.padding!r} with {layer.padding_mode}"
    full_G = ~Pattern(2, 4).valid_in(weight_of(layer).detach())
    if full_G.any():
        return f"not 2:4: {int(full_G.sum()):,} of {len(full_G):,} groups keep more than 2 of 4"
    found, refused = candidates(layer, dtype, kernels)
    return None if found else "; ".join(refused)


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return height, width
