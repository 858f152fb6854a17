"""One-shot pruning with weight update: SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774).

For each layer, with H = X^T X of its inputs (weighted by time as in OBS-Diff, 2025, and by the
positions' influence on the model's output as in GuidedQuant, 2025): a sweep over the columns
removes weights and adjusts the later columns to compensate. The sweep cannot correct columns that
it has passed, so in the end the kept weights are fitted once more, all together.

Letters: O output channels; K columns, ordered (*taps, I); B columns of a block; S of a span.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.masks import Pattern
from prunedm.networks.layer_kinds import find_kind, from_matrix, groups_of, to_matrix, weight_of
from prunedm.networks.layers import why_not_nm
from prunedm.progress import Progress, Silent
from prunedm.removal.corrections import Dense, corrections, results
from prunedm.removal.input_grams import columns_of, input_grams, log_time_weights
from prunedm.removal.nm import nm_mask
from prunedm.removal.swaps import refit, swap_search
from prunedm.task import Batch

Choice = Pattern | float | torch.Tensor
Choose = Callable[[torch.Tensor, int], torch.Tensor]  # saliency_OS, its first column => keep_OS

BLOCK = 128  # columns whose updates are gathered before the later columns are updated
FIT_STEPS = 30  # of conjugate gradients; the loss no longer changes from 20 on
DAMPINGS = 6  # attempts, each with ten times the damping


def obs_prune(
    denoiser: nn.Module,
    choices: Mapping[str, Choice],
    *,
    batches: Sequence[Batch],
    time_weights: tuple[float, float] = (1.2, 0.8),
    damping: float = 0.01,
    swaps: int = 0,
    refits: int = FIT_STEPS,
    guidance: float = 0.0,
    dense: Dense | None = None,
    correction: float = 1.0,
    memory: int = 2 << 30,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Prune the named layers in place; returns their masks (True = kept).

    `choices`, by layer: an N:M pattern; the share of the layer's weights to remove; or a boolean
    mask of the weight's shape [O, I, *taps], whose kept weights are then only updated.
    `time_weights`: of problems at the noisiest timestep and at the last one, logarithmic between.
    `damping`: added to the diagonal of H, as a share of its mean.
    `swaps`: rounds of a search for better N:M masks after the sweep (removal/swaps.py).
    `refits`: steps of conjugate gradients that fit the kept weights together in the end.
    `guidance`: the power of a position's influence on the model's output that weighs it; 0 is
    SparseGPT's H = X^T X (removal/input_grams.py).
    `dense`, `correction`: the network before anything was pruned, and the share of what was lost since
    that each layer makes good (removal/corrections.py); without guidance.
    `memory`: bytes of Grams held at once. Layers are taken in execution order, as many as fit and at
    least one; each such set reads `batches` once, with the earlier layers already pruned.
    Raises `UserError` for a choice that does not fit its layer, and a Gram without an inverse.
    """
    layers = {name: denoiser.get_submodule(name) for name in choices}
    for name, layer in layers.items():
        _check(name, layer, choices[name])
    if not batches:
        raise UserError("OBS looks at the layers' inputs; give it at least one denoising problem")
    was_training = denoiser.training
    denoiser.eval()
    weigh = partial(log_time_weights, ends=time_weights)
    first = results(denoiser, layers, batches[0])
    order = list(first.results)
    if missed := sorted(layers.keys() - set(order)):
        raise UserError(f"{missed[0]} takes no part in the forward pass; leave it out")
    sets = _sets_that_fit(layers, order, memory, alone=first.added if dense else set())
    masks: dict[str, torch.Tensor] = {}
    total = len(sets) * len(batches) * (2 if dense else 1) + len(layers)
    with (progress or Silent()).task("second-order pruning", total) as bar:
        for names in sets:
            some = {name: layers[name] for name in names}
            grams = input_grams(denoiser, some, batches, weigh=weigh, guidance=guidance, bar=bar)
            shifts = {}
            if dense:
                shifts = corrections(denoiser, some, batches, dense, weigh=weigh, bar=bar)
            for name in names:
                masks[name] = _prune_layer(
                    name,
                    layers[name],
                    grams.pop(name),
                    choices[name],
                    damping,
                    shift_OK=correction * shifts[name] if name in shifts else None,
                    swaps=swaps,
                    refits=refits,
                )
                bar.advance(note=name)
    denoiser.train(was_training)
    return {name: masks[name] for name in choices}


def _check(name: str, layer: nn.Module, choice: Choice) -> None:
    if find_kind(layer) is None or groups_of(layer) != 1:
        raise UserError(
            f"{name}: OBS takes linear layers and convolutions of one group; leave it out"
        )
    shape = weight_of(layer).shape
    if isinstance(choice, Pattern):
        if reason := why_not_nm(layer, choice.m):
            raise UserError(f"pattern {choice} does not fit {name}: {reason}")
    elif isinstance(choice, torch.Tensor):
        if choice.dtype != torch.bool or choice.shape != shape:
            raise UserError(
                f"the mask of {name} is {choice.dtype} {tuple(choice.shape)}; it must be boolean "
                f"{tuple(shape)}"
            )
    elif not 0 <= choice < 1:
        raise UserError(f"{name}: the share to remove is {choice}; it must be in [0, 1)")


def _sets_that_fit(
    layers: Mapping[str, nn.Module], order: Sequence[str], memory: int, alone: Collection[str] = ()
) -> list[list[str]]:
    """Consecutive layers whose Grams fit in `memory` together; at least one each. alone: sets of one."""
    sets: list[list[str]] = []
    held = 0
    for name in order:
        size = columns_of(layers[name]) ** 2 * max(4, layers[name].get_parameter("weight").itemsize)
        if not sets or held + size > memory or name in alone or sets[-1][-1] in alone:
            sets.append([])
            held = 0
        sets[-1].append(name)
        held += size
    return sets


@torch.no_grad()
def _prune_layer(
    name: str,
    layer: nn.Module,
    gram_KK: torch.Tensor,
    choice: Choice,
    damping: float,
    *,
    shift_OK: torch.Tensor | None,
    swaps: int,
    refits: int,
) -> torch.Tensor:
    """Replace the layer's weight; returns its mask. shift: what it has to make good, (S' - S)^T X."""
    weight = weight_of(layer)
    w_OK = to_matrix(weight.detach().to(gram_KK.device, torch.float64)).clone()
    h_KK = gram_KK.double()
    dead_K = h_KK.diagonal() == 0
    w_OK[:, dead_K] = 0
    h_KK, u_KK = _damped_factor(h_KK, damping, name)
    if shift_OK is not None:
        w_OK += shift_OK.double() @ u_KK.T @ u_KK
    choose, span = _chooser(choice, w_OK, u_KK)
    swept_OK, keep_OK = _sweep(w_OK, u_KK, choose, span)
    if swaps and isinstance(choice, Pattern):
        single = (tensor.float() for tensor in (w_OK, swept_OK, h_KK))
        dense_OK, found_OK, h32_KK = single
        found_OK, keep_OK = swap_search(dense_OK, found_OK, keep_OK, h32_KK, choice, rounds=swaps)
        swept_OK = found_OK.double()
    residual_OK = (w_OK - swept_OK) @ h_KK
    fitted_OK, _ = refit(swept_OK, residual_OK, keep_OK, h_KK, steps=refits)
    weight.copy_(from_matrix(fitted_OK, weight.shape))
    return from_matrix(keep_OK, weight.shape).contiguous()


def _damped_factor(
    h_KK: torch.Tensor, damping: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The damped H, and the upper triangular U with H^-1 = U^T U.

    The rows of U from i on belong to the inverse of H without its first i rows and columns: what
    the sweep needs once columns 0..i-1 are frozen.
    """
    mean = h_KK.diagonal().mean()
    identity_KK = torch.eye(len(h_KK), dtype=h_KK.dtype, device=h_KK.device)
    share = damping
    for _ in range(DAMPINGS):
        damped_KK = h_KK + share * mean * identity_KK
        dead_K = damped_KK.diagonal() == 0  # no damping, or all inputs are zero
        damped_KK.diagonal()[dead_K] = mean if mean > 0 else 1
        # H = R R^T with R upper, by a Cholesky from the last column to the first; U = R^-1
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower_KK).all()):
            inverse_KK = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False)
            return damped_KK, inverse_KK.flip(0, 1)
        share = 10 * max(share, 1e-6)
    raise UserError(
        f"{name}: H has no inverse even with damping {share / 10:g}; its inputs may not be finite"
    )


def _chooser(choice: Choice, w_OK: torch.Tensor, u_KK: torch.Tensor) -> tuple[Choose, int]:
    """How the sweep chooses what to keep, and for how many columns at once."""
    if isinstance(choice, Pattern):
        pattern = choice
        return lambda saliency_OM, _: nm_mask(saliency_OM, pattern), pattern.m
    if isinstance(choice, torch.Tensor):
        given_OK = to_matrix(choice).to(w_OK.device)
        return lambda saliency_OB, first: given_OK[:, first : first + saliency_OB.shape[1]], BLOCK
    # How many weights each block loses is ranked over the whole layer beforehand, so the total is
    # exact; which ones is decided when the sweep reaches the block, after earlier updates.
    planned_OK = _without_lowest(_saliency(w_OK, u_KK), round(choice * w_OK.numel()))

    def choose(saliency_OB: torch.Tensor, first: int) -> torch.Tensor:
        count = int((~planned_OK[:, first : first + saliency_OB.shape[1]]).sum())
        return _without_lowest(saliency_OB, count)

    return choose, BLOCK


def _saliency(w_OS: torch.Tensor, u_SS: torch.Tensor) -> torch.Tensor:
    """w^2 / [H^-1]_ii: the error left by removing a weight once later ones compensate."""
    return (w_OS / u_SS.diagonal()).square()


def _without_lowest(score: torch.Tensor, count: int) -> torch.Tensor:
    flat = score.reshape(-1)
    lowest = flat.sort(stable=True).indices[:count]
    keep = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, lowest, False)
    return keep.reshape(score.shape)


def _sweep(
    w_OK: torch.Tensor, u_KK: torch.Tensor, choose: Choose, span: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune column by column, updating the later ones (SparseGPT, algorithm 1): weights, mask."""
    w_OK, columns = w_OK.clone(), w_OK.shape[1]
    keep_OK = torch.ones_like(w_OK, dtype=torch.bool)
    block = span * max(1, BLOCK // span)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w_OB, keep_OB = w_OK[:, start:stop], keep_OK[:, start:stop]  # views
        u_BB = u_KK[start:stop, start:stop]
        error_OB = torch.zeros_like(w_OB)
        for i in range(stop - start):
            if i % span == 0:
                part = slice(i, i + span)
                saliency_OS = _saliency(w_OB[:, part], u_BB[part, part])
                keep_OB[:, part] = choose(saliency_OS, start + i)
            error_OB[:, i] = w_OB[:, i].masked_fill(keep_OB[:, i], 0) / u_BB[i, i]
            w_OB[:, i:] -= error_OB[:, i, None] * u_BB[i, i:]
        w_OK[:, stop:] -= error_OB @ u_KK[start:stop, stop:]
    return w_OK * keep_OK, keep_OK
