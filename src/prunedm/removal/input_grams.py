"""Gram matrices X^T X of layers' inputs, streamed: memory does not grow with the problems.

*Influence*: a layer's error does not matter equally everywhere; the model's output depends more on
some pixels and timesteps than on others. With random signs v and g = J_z^T v, where J_z are the
derivatives of the model's output by the layer's output z, the mean of g^2 over the signs is the
diagonal of J_z^T J_z, the Gauss-Newton Hessian of a squared loss (Hutchinson 1990; as weights of a
layer's quadratic: GuidedQuant, Kim et al. 2025, arXiv:2505.07004).

Letters: K columns of a layer's weight, ordered (*taps, I) with the input channel innermost, so
that M consecutive columns are one N:M group; P positions (pixels or tokens of all problems);
N problems.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from prunedm.architecture import device_of
from prunedm.networks.layer_kinds import kind_of, patches, weight_of
from prunedm.networks.layers import hooked
from prunedm.progress import Bar
from prunedm.randomness import generator_for
from prunedm.task import Batch, predict

STEPS = 1000  # length of the scale of time weights, whatever the scheduler's number of steps
ROWS = 512  # rows of a Gram computed together; the part below the diagonal is mirrored
Weigh = Callable[[torch.Tensor], torch.Tensor]  # level_N => weights of the problems, (N,)
FLOOR = 1e-30  # of g^2: where nothing has influence, all positions count the same


def columns_of(layer: nn.Module) -> int:
    """Columns of the weight: inputs times kernel taps."""
    return weight_of(layer)[0].numel()


def log_time_weights(level_N: torch.Tensor, ends: tuple[float, float]) -> torch.Tensor:
    """Weights that fall with the logarithm of the denoising step, counted from noise (OBS-Diff 2025).

    `ends`: the weights of the noisiest level (1) and of the cleanest (0), `STEPS` steps later.
    """
    step_N = (STEPS - 1) * (1 - level_N)
    share_N = torch.log1p(step_N) / math.log(STEPS)
    return ends[0] + (ends[1] - ends[0]) * share_N


def input_grams(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    weigh: Weigh,
    guidance: float = 0.0,
    bar: Bar | None = None,
) -> dict[str, torch.Tensor]:
    """sum over problems n, positions p of `weigh(level_n)` e_np^guidance x_np^T x_np: (K, K) a layer.

    e_np is the position's influence on the model's output. A guidance of 0 gives X^T X without a
    backward pass. float64 where the layer's inputs are, else float32.
    """
    grams: dict[str, torch.Tensor] = {}
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # with guidance: input and output
    weights_N = torch.ones(0)  # of the current batch
    device = device_of(denoiser)

    def add(name: str, inputs: torch.Tensor, scale_P: torch.Tensor | None = None) -> None:
        x = scaled(inputs.detach(), weights_N.sqrt())
        if name not in grams:
            grams[name] = x.new_zeros(columns_of(layers[name]), columns_of(layers[name]))
        start = 0
        for x_PK in patches(layers[name], x):
            scaled_PK = x_PK
            if scale_P is not None:
                scaled_PK = x_PK * scale_P[start : start + len(x_PK), None]
                start += len(x_PK)
            _add_upper(grams[name], scaled_PK)

    def hear(
        name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if not guidance:
            add(name, inputs[0])
            return
        if not output.requires_grad:  # the model is frozen
            output.requires_grad_()
        seen.append((name, inputs[0], output))

    with hooked(layers, hear), torch.set_grad_enabled(guidance > 0):
        done = 0
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            weights_N = weigh(batch.level_N).to(device)
            output = predict(denoiser, batch)
            if guidance:
                signs = random_signs(cpu_batch, done, output)
                names, inputs, outputs = zip(*seen, strict=True)
                energies = influence(output, signs, [layers[name] for name in names], outputs)
                seen.clear()
                with torch.no_grad():
                    for name, x, energy_P in zip(names, inputs, energies, strict=True):
                        add(name, x, energy_P.pow(guidance / 2))
            done += len(batch)
            if bar is not None:
                bar.advance()
    for gram in grams.values():
        _mirror(gram)
    return grams


def random_signs(batch: Batch, first: int, output_NCHW: torch.Tensor) -> torch.Tensor:
    """+1 or -1 in the shape of the network's output; depends on each problem's number alone.

    `first`: number of the first problem, where the batch does not tell.
    """
    numbers = batch.numbers or range(first, first + len(batch))
    bits = [
        torch.randint(0, 2, output_NCHW.shape[1:], generator=generator_for(0, "signs", number))
        for number in numbers
    ]
    return (2 * torch.stack(bits) - 1).to(output_NCHW)


def influence(
    output_NCHW: torch.Tensor,
    signs_NCHW: torch.Tensor,
    layers: Sequence[nn.Module],
    outputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """One draw of g^2, summed over the channels, at each position of these layers' outputs: (P,).

    Positions are in the order of `layer_kinds.patches`.
    """
    along = (output_NCHW.float() * signs_NCHW.float()).sum()
    gradients = torch.autograd.grad(along, list(outputs), allow_unused=True)
    found = []
    for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
        g = torch.zeros_like(output) if gradient is None else gradient
        g = g if g.dtype == torch.float64 else g.float()
        found.append(g.square().sum(kind_of(layer).channel_axis).flatten().clamp_min(FLOOR))
    return found


def scaled(x: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """Inputs times one factor per problem, in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    assert len(x) % len(scale_N) == 0, f"{len(x)} rows of inputs for {len(scale_N)} problems"
    scale_N = scale_N.repeat_interleave(len(x) // len(scale_N)).to(x.dtype)  # tokens folded into N
    return x * scale_N.reshape(-1, *[1] * (x.ndim - 1))


def _add_upper(gram_KK: torch.Tensor, x_PK: torch.Tensor) -> None:
    for top in range(0, len(gram_KK), ROWS):
        rows = gram_KK[top : top + ROWS, top:]
        rows.addmm_(x_PK[:, top : top + ROWS].T, x_PK[:, top:])


def _mirror(gram_KK: torch.Tensor) -> None:
    for top in range(0, len(gram_KK), ROWS):
        end = top + ROWS
        gram_KK[end:, top:end] = gram_KK[top:end, end:].T
