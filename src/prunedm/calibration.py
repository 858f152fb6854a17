"""Statistics of layers over a stream of denoising problems. Memory does not grow with the stream."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunedm.diffusion import ProblemBatch, predict, problem_losses
from prunedm.progress import Progress, Silent


def input_square_means(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[ProblemBatch],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Mean over problems and positions of each layer's squared inputs, in float64.

    Linear: (I,). Conv2d: (I, kh, kw), what an unfold of the inputs would give, without the unfold.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares, count = _square_sums(layer, inputs[0].detach())
            sums[name] = sums.get(name, 0) + squares
            counts[name] = counts.get(name, 0) + count

        return hook

    denoiser.eval()  # dropout would blur the statistics
    batches = list(batches)
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    bars = (progress or Silent()).task("activations", len(batches))
    with _hooks(handles), torch.no_grad(), bars as bar:
        for batch in batches:
            predict(denoiser, batch.to(device))
            bar.advance()
    return {name: sums[name] / counts[name] for name in sums}


def loss_gradients(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[ProblemBatch],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Gradient of the mean denoising loss over all problems, by layer, of the weight's shape."""
    denoiser.eval()
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = list(batches)
    count = sum(len(batch) for batch in batches)
    with (progress or Silent()).task("gradients", len(batches)) as bar:
        for cpu_batch in batches:
            batch = cpu_batch.to(device)
            loss = problem_losses(predict(denoiser, batch), batch.target_NCHW).sum() / count
            gradients = torch.autograd.grad(loss, list(weights.values()))
            torch._foreach_add_(list(totals.values()), list(gradients))
            bar.advance()
    return totals


def _square_sums(layer: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sums of squared inputs per input channel (and tap), and the number of terms in each."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows.square().sum(0, dtype=torch.float64), len(rows)
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer.padding, tuple)
    (pad_h, pad_w), (step_h, step_w) = layer.padding, layer.stride
    squares_IHW = nn.functional.pad(
        inputs.square().sum(0, dtype=torch.float64), (pad_w, pad_w, pad_h, pad_h)
    )
    taps_h, taps_w = layer.kernel_size
    out_h = (squares_IHW.shape[1] - layer.dilation[0] * (taps_h - 1) - 1) // step_h + 1
    out_w = (squares_IHW.shape[2] - layer.dilation[1] * (taps_w - 1) - 1) // step_w + 1
    sums = squares_IHW.new_empty(squares_IHW.shape[0], taps_h, taps_w)
    for r in range(taps_h):
        for s in range(taps_w):
            top, left = r * layer.dilation[0], s * layer.dilation[1]
            window = squares_IHW[
                :, top : top + step_h * out_h : step_h, left : left + step_w * out_w : step_w
            ]
            sums[:, r, s] = window.sum((1, 2))
    return sums, inputs.shape[0] * out_h * out_w


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
