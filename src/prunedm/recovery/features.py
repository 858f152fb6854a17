"""Feature matching: the outputs of a network's blocks, student against teacher."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunedm.architecture import architecture_of
from prunedm.errors import UserError
from prunedm.networks.layers import hooked

_TINY = 1e-12


class BlockOutputs:
    """The latest outputs of a network's blocks, by name, NCHW or NLC."""

    def __init__(self) -> None:
        self._found: dict[str, torch.Tensor] = {}

    def take(self, count: int) -> dict[str, torch.Tensor]:
        """The first `count` rows of each output, which are then forgotten."""
        rows = {name: output_NCHW[:count] for name, output_NCHW in self._found.items()}
        self._found.clear()  # else a whole pass would stay in memory
        return rows

    def keep(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        # a down block also returns its skips, in a tuple; two-stream blocks return the image last
        parts = output if isinstance(output, tuple) else (output,)
        self._found[name] = [part for part in parts if torch.is_tensor(part)][-1]


@contextmanager
def block_outputs(denoiser: nn.Module) -> Iterator[BlockOutputs]:
    """Within the context, record the outputs of a network's blocks."""
    outputs = BlockOutputs()
    blocks = {name: denoiser.get_submodule(name) for name in block_names(denoiser)}
    with hooked(blocks, outputs.keep):
        yield outputs


def block_names(network: nn.Module) -> list[str]:
    """Names of the blocks in execution order. Raises `UserError` where none are known."""
    names = [name for name, _ in network.named_modules()]
    patterns = architecture_of(network).blocks
    blocks = [name for p in patterns for name in names if re.fullmatch(p, name)]
    if not blocks:
        raise UserError(
            f"match_features: the blocks of a {type(network).__name__} are not known; "
            "give --match-features 0"
        )
    return blocks


def feature_losses(
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    *,
    reordered: bool = False,
) -> torch.Tensor:
    """Mean over the blocks of `block_losses`: (N,)."""
    assert student.keys() == teacher.keys()
    losses = [block_losses(student[k], teacher[k], reordered=reordered) for k in student]
    return torch.stack(losses).mean(0)


def block_losses(
    student_NCHW: torch.Tensor, teacher_NDHW: torch.Tensor, *, reordered: bool = False
) -> torch.Tensor:
    """Relative distance between one block's outputs: (N,).

    Equal widths: |s - t|^2 / |t|^2 of each problem (FitNets, Romero et al. 2015, without the
    projection). Other widths or `reordered` channels: one minus linear CKA, which compares the
    similarities of positions.
    """
    student_NCP, teacher_NDP = _positions(student_NCHW), _positions(teacher_NDHW)
    if student_NCP.shape == teacher_NDP.shape and not reordered:
        apart_N = (student_NCP - teacher_NDP).square().sum((1, 2))
        return apart_N / teacher_NDP.square().sum((1, 2)).clamp_min(_TINY)
    return 1 - alignment(student_NCP, teacher_NDP)


def alignment(student_NCP: torch.Tensor, teacher_NDP: torch.Tensor) -> torch.Tensor:
    """Linear CKA of each problem over its P positions (Kornblith et al. 2019): (N,), 0 to 1.

    The cosine between the P x P similarities of positions, S^T S and T^T T, computed through
    channels: <S^T S, T^T T> = |S T^T|^2. Neither the order nor the number of channels matters, so
    no projection has to be learned. For segmentation: Liu et al. 2019 (pair-wise distillation).
    """
    student_NCP = student_NCP - student_NCP.mean(2, keepdim=True)
    teacher_NDP = teacher_NDP - teacher_NDP.mean(2, keepdim=True)
    own_N = _energy(student_NCP, student_NCP) * _energy(teacher_NDP, teacher_NDP)
    return _energy(student_NCP, teacher_NDP) / own_N.clamp_min(_TINY).sqrt()


def _positions(output_NCHW: torch.Tensor) -> torch.Tensor:
    """At least float32: (N, C, P); tokens are (N, P, C)."""
    output_NCHW = output_NCHW.mT if output_NCHW.ndim == 3 else output_NCHW
    return output_NCHW.to(torch.promote_types(output_NCHW.dtype, torch.float32)).flatten(2)


def _energy(a_NCP: torch.Tensor, b_NDP: torch.Tensor) -> torch.Tensor:
    """|A B^T|^2 over mean positions: (N,)."""
    with torch.autocast(a_NCP.device.type, enabled=False):  # bf16 would drown small differences
        return (a_NCP @ b_NDP.mT / a_NCP.shape[2]).square().sum((1, 2))
