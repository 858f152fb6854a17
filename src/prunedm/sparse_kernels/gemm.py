"""GEMMs by a 2:4 weight: PyTorch's on sparse tensor cores, and a reference of the packed format.

Of each group of four along K two values are stored with their positions (Mishra et al. 2021,
"Accelerating Sparse Deep Neural Networks"). Shapes: y[B, O] = x[B, K] W[O, K]^T. For inference only:
no gradients.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from prunedm.errors import first_line
from prunedm.networks.layers import to_groups

HALF = (torch.float16, torch.bfloat16)
FIRST = (8, 0)  # compute capability of Ampere, the first with sparse tensor cores


class Gemm(nn.Module):
    """`x_BK W_OK^T + bias_O` for the W[O, K] that it was made from."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which inputs must have too."""
        return next(chain(self.parameters(), self.buffers())).dtype

    def forward(self, x_BK: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError


class PackedGemm(Gemm):
    """The reference, for any device and type; needs memory for B * O * K/2 numbers."""

    values_OS: torch.Tensor
    column_OS: torch.Tensor

    def __init__(self, weight_OK: torch.Tensor) -> None:
        super().__init__()
        outputs, columns = weight_OK.shape
        values_GN, index_GN = pack(weight_OK)
        group_G = torch.arange(len(index_GN), device=index_GN.device) % (columns // 4)
        # first, since it gives the type
        self.register_buffer("values_OS", values_GN.reshape(outputs, -1))
        self.register_buffer("column_OS", (4 * group_G[:, None] + index_GN).reshape(outputs, -1))

    def forward(self, x_BK: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        y_BO = torch.einsum("bos,os->bo", x_BK[:, self.column_OS], self.values_OS)
        return y_BO if bias_O is None else y_BO + bias_O


class SemiStructuredGemm(Gemm):
    """PyTorch's, on sparse tensor cores. `.to()` has no effect on the packed weight."""

    def __init__(self, weight_OK: torch.Tensor, backend: str = "CUSPARSELT") -> None:
        super().__init__()
        packed = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "prototype"
            sparse_OK = packed.from_dense(weight_OK.detach().contiguous())
        self.weight = nn.Parameter(sparse_OK, requires_grad=False)

    def forward(self, x_BK: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x_BK.contiguous(), self.weight, bias_O)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> "SemiStructuredGemm":
        return self  # in inference mode even a `.to()` the same device raises

    def __deepcopy__(self, memo: dict[int, object]) -> "SemiStructuredGemm":
        return self  # the packed weight is immutable, and cuSPARSELt's cannot be cloned


@dataclass(frozen=True)
class Kernel:
    """A 2:4 GEMM: how W[O, K] is packed, the multiples that O and K must be, and its types."""

    name: str
    pack: Callable[[torch.Tensor], Gemm]
    rows: int = 1
    columns: int = 4
    dtypes: tuple[torch.dtype, ...] = ()  # any

    def why_not(self, outputs: int, columns: int, dtype: torch.dtype) -> str | None:
        """None where it supports W[O, K] of this type, else the reason."""
        if self.dtypes and dtype not in self.dtypes:
            return f"no GEMM of {in_words(dtype)}"
        if outputs % self.rows:
            return f"{outputs} outputs are not a multiple of {self.rows}"
        if columns % self.columns:
            return f"{columns} weights per output are not a multiple of {self.columns}"
        return None


PACKED = Kernel("reference", PackedGemm)
CUDA_KERNELS = (
    Kernel("cuSPARSELt", partial(SemiStructuredGemm, backend="CUSPARSELT"), 16, 16, HALF),
    Kernel("CUTLASS", partial(SemiStructuredGemm, backend="CUTLASS"), 32, 64, HALF),
)


def find_kernels(device: torch.device, dtype: torch.dtype) -> tuple[list[Kernel], str]:
    """The sparse kernels that work there, tried on a small matrix; and the reason if none does."""
    if device.type != "cuda":
        return [], f"the denoiser is on {device.type}, not on an NVIDIA GPU"
    if dtype not in HALF:
        return [], f"there is no sparse GEMM of {in_words(dtype)}; use float16 or bfloat16"
    name = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < FIRST:
        return [], f"{name} has no sparse tensor cores; they came with compute capability 8.0"
    works, errors = [], []
    for kernel in CUDA_KERNELS:
        try:
            _try_kernel(kernel, device, dtype)
            works.append(kernel)
        # a build without the library, an unsupported architecture, a changed interface
        except (RuntimeError, AttributeError) as error:
            reason = first_line(error)
            errors.append(f"{kernel.name}: {reason[:100]}")
    return works, "" if works else f"no sparse GEMM runs on {name} ({'; '.join(errors)})"


def pack(weight_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two values_GN of each group of four in W[O, K], and their positions index_GN, ascending.

    With fewer than two non-zeros, the first zeros of the group fill up.
    """
    weight_GM = to_groups(weight_OK, 4)
    taken_GM = weight_GM != 0
    assert int(taken_GM.sum(1).max()) <= 2, "weight is not 2:4"
    first_GN = taken_GM.byte().argsort(dim=1, descending=True, stable=True)[:, :2]
    index_GN = first_GN.sort(1).values
    return weight_GM.gather(1, index_GN), index_GN


def in_words(dtype: torch.dtype) -> str:
    """torch.float16 => "float16"."""
    return str(dtype).removeprefix("torch.")


def _try_kernel(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `RuntimeError` where a 2:4 GEMM does not run or gives a wrong result."""
    groups = torch.tensor([1, 0, 2, 0, 0, 1, 0, -1, 0, 0, 1, 1, 0, 2, 0, 0])
    weight_OK = groups.to(device, dtype).repeat(128, 8)
    x_BK = (torch.arange(64 * 128, device=device) % 7).to(dtype).reshape(64, 128)
    if not torch.equal(kernel.pack(weight_OK)(x_BK), x_BK @ weight_OK.T):
        raise RuntimeError("wrong product")
