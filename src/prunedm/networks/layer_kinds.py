"""What the package must know about a class of layers: its weight, patches and widths.

Each of these layers multiplies patches of its input by one matrix, y[P, O] = x[P, K] W[O, K]^T + b.
To add a class, add a line to `KINDS`.

Letters: N problems; O, I output and input channels; P positions (pixels, tokens) of all problems;
K columns: kernel taps times input channels, the channel innermost, so that M consecutive columns
are one N:M group. `taps` and `positions` have as many axes as the convolution has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Side = Literal["in", "out"]
CHUNK = 1 << 24  # entries of patches held at once


@dataclass(frozen=True)
class LayerKind:
    """One class of layers.

    inputs, outputs: names of the attributes with its widths.
    axes: number of position axes after the channels; 0 where the channels come last.
    transposed: whether its weight is stored as [I, O].
    """

    inputs: str
    outputs: str
    axes: int = 0
    transposed: bool = False

    @property
    def channel_axis(self) -> int:
        """The channel axis of the layer's input and output."""
        return -1 - self.axes


KINDS: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LayerKind("in_features", "out_features"),
    nn.Conv1d: LayerKind("in_channels", "out_channels", axes=1),
    nn.Conv2d: LayerKind("in_channels", "out_channels", axes=2),
    nn.Conv3d: LayerKind("in_channels", "out_channels", axes=3),
    # by name, to avoid importing transformers
    "transformers.pytorch_utils.Conv1D": LayerKind("nx", "nf", transposed=True),
}
NAMES = "Linear, Conv1d, Conv2d, Conv3d or Conv1D"


def find_kind(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer by its class or a base class; None for other modules."""
    for base in type(layer).__mro__:
        kind = KINDS.get(base) or KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    return None


def kind_of(layer: nn.Module) -> LayerKind:
    """As `find_kind`, for a layer that is known to have one."""
    kind = find_kind(layer)
    assert kind is not None, f"a {type(layer).__name__} is none of {NAMES}"
    return kind


def oriented(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A view of a tensor in the weight's shape as [O, I, *taps], as masks and scores are, or back."""
    kind = find_kind(layer)
    return weight.t() if kind is not None and kind.transposed else weight


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as [O, I, *taps], a view: writing to it changes the layer."""
    return oriented(layer, layer.get_parameter("weight"))


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution (outputs read only inputs of their group); 1 for other layers."""
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return groups


def to_matrix(weight: torch.Tensor) -> torch.Tensor:
    """W[O, I, *taps] => W[O, K]. A view for linear layers, a copy for kernels of several taps."""
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_matrix` for a weight [O, I, *taps], from values in any shape."""
    outputs, inputs, *taps = shape
    return matrix.reshape(outputs, *taps, inputs).movedim(-1, 1)


def width_of(layer: nn.Module, side: Side) -> int:
    """Channels that a layer reads or makes, over all its groups; a GroupNorm's on both sides."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    kind = kind_of(layer)
    size: int = getattr(layer, kind.inputs if side == "in" else kind.outputs)
    return size


def patches(layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A layer's input as rows x[P, K] for its matrix, in chunks of at most about `CHUNK` entries.

    A grouped convolution has the columns of all groups, one group after the other.
    """
    axes = kind_of(layer).axes
    if not axes:
        x_PK = x.reshape(-1, x.shape[-1])
        yield from x_PK.split(max(1, CHUNK // x_PK.shape[1]))
        return
    view = _padded(layer, x)  # becomes (N, I, *positions, *taps), always a view
    for axis in range(axes):
        view = _taps_behind(layer, view, axis, 2 + axis)
    view = view.unflatten(1, (groups_of(layer), -1))
    positions, taps = range(3, 3 + axes), range(3 + axes, 3 + 2 * axes)
    view = view.permute(0, *positions, 1, *taps, 2)
    across, columns = view.shape[2 : 1 + axes].numel(), view.shape[1 + axes :].numel()
    problems = max(1, CHUNK // (view.shape[1] * across * columns))
    lines = max(1, CHUNK // (problems * across * columns))
    for some in view.split(problems):
        for part in some.split(lines, dim=1):
            yield part.reshape(-1, columns)


def tap_means(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Means over positions of the inputs that each weight of one output multiplies: (N, I, *taps).

    The means of `patches`, without building them. For a grouped convolution, I counts the channels
    of all groups; `for_weight` assigns them to the weights.
    """
    axes = kind_of(layer).axes
    if not axes:
        return x.reshape(len(x), -1, x.shape[-1]).mean(1)
    return _tap_means(layer, _padded(layer, x), axes)


def for_weight(layer: nn.Module, means: torch.Tensor) -> torch.Tensor:
    """(I, *taps) in a shape that broadcasts with the layer's weight [O, I of its group, *taps]."""
    groups = groups_of(layer)
    if groups == 1:
        return means
    each = width_of(layer, "out") // groups
    return means.unflatten(0, (groups, -1)).repeat_interleave(each, 0)


def _tap_means(layer: nn.Module, x: torch.Tensor, axes: int) -> torch.Tensor:
    """The last axis first: the taps of the others then run over sums along it."""
    if not axes:
        return x
    unfolded = _taps_behind(layer, x, axes - 1, x.ndim - 1)
    means = [_tap_means(layer, tap.mean(-1), axes - 1) for tap in unfolded.unbind(-1)]
    return torch.stack(means, -1)


def _padded(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input of a convolution with its padding, in any mode, "same" included."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _taps_behind(layer: nn.Module, x: torch.Tensor, axis: int, dim: int) -> torch.Tensor:
    """Unfold `dim` along a kernel axis: positions stay in `dim`, taps become the last axis."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    spread = layer.dilation[axis]
    reach = spread * (layer.kernel_size[axis] - 1) + 1
    return x.unfold(dim, reach, layer.stride[axis])[..., ::spread]
