"""Scores against materialised unfolds and hand-made gradients; every score with every mechanism."""

import numpy as np
import pytest
import torch
from helpers import problems, tiny_model
from torch import nn
from torch.nn import functional as F

from prunedm.calibration import input_square_means, loss_gradients
from prunedm.diffusion import ProblemBatch
from prunedm.layers import prunable_layers
from prunedm.masks import Pattern
from prunedm.removal.nm import nm_masks
from prunedm.removal.weights import weight_masks
from prunedm.scores import SCORES, score_layers
from prunedm.scores.magnitude import magnitude
from prunedm.scores.random import random
from prunedm.scores.taylor import taylor
from prunedm.scores.wanda import wanda

CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "strided, padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
}


class OneLayer(nn.Module):
    """A denoiser of one layer, which says nothing of the timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_NCHW, timesteps_N, labels_N=None, return_dict=True):
        if isinstance(self.layer, nn.Linear):  # channels last
            return (self.layer(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        return (self.layer(x_NCHW),)


def batches_of(inputs_NCHW: torch.Tensor, sizes) -> list[ProblemBatch]:
    parts = inputs_NCHW.split(sizes)
    return [ProblemBatch(part, torch.zeros(len(part)), part) for part in parts]


def square_means(layer: nn.Module, inputs_NCHW: torch.Tensor, sizes) -> torch.Tensor:
    denoiser = OneLayer(layer)
    return input_square_means(denoiser, {"layer": layer}, batches_of(inputs_NCHW, sizes))["layer"]


def random_inputs(channels: int = 5) -> torch.Tensor:
    """float64, of a different scale in every channel and at every position."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1, channels, 8, 7, generator=generator, dtype=torch.float64)
    return scale * torch.randn(6, channels, 8, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_square_means_are_those_of_a_materialised_unfold(kind):
    layer = nn.Conv2d(5, 2, **CONVOLUTIONS[kind]).double()
    inputs = random_inputs()
    unfolded_NKP = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    expected = unfolded_NKP.square().mean((0, 2)).reshape(5, *layer.kernel_size)
    for sizes in ([6], [1, 3, 2]):
        means = square_means(layer, inputs, sizes)
        assert means.dtype == torch.float64
        torch.testing.assert_close(means, expected, rtol=1e-10, atol=0)


def test_square_means_of_a_linear_layer_are_those_of_its_rows():
    inputs = random_inputs()
    expected = np.mean(inputs.numpy() ** 2, axis=(0, 2, 3))
    means = square_means(nn.Linear(5, 5).double(), inputs, [2, 4])
    torch.testing.assert_close(means, torch.from_numpy(expected), rtol=1e-10, atol=0)


def test_square_means_leave_no_hooks_behind():
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser)
    means = input_square_means(denoiser, layers, [problems().batch(range(2))])
    assert set(means) == set(layers)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
    for name, layer in layers.items():
        assert means[name].shape == layer.weight.shape[1:]
        assert (means[name] > 0).all()


def test_gradients_are_those_of_the_mean_loss_however_it_is_batched():
    denoiser = tiny_model().denoiser.double()
    layers = prunable_layers(denoiser)
    whole = problems().batch(range(7))
    noisy, target = whole.noisy_NCHW.double(), whole.target_NCHW  # losses are float32
    whole = ProblemBatch(noisy, whole.timesteps_N, target)
    loss = F.mse_loss(denoiser(noisy, whole.timesteps_N).sample, target.double())
    weights = [layer.weight for layer in layers.values()]
    expected = torch.autograd.grad(loss, weights)
    parts = [
        ProblemBatch(noisy[a:b], whole.timesteps_N[a:b], target[a:b])
        for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    for batches in ([whole], parts):
        gradients = loss_gradients(denoiser, layers, batches)
        for gradient, oracle in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient, oracle, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in denoiser.parameters())


def test_taylor_foretells_the_change_of_the_loss():
    denoiser = tiny_model().denoiser.double()
    layers = {"mid_block.resnets.0.conv1": denoiser.mid_block.resnets[0].conv1}
    batch = problems().batch(range(4))
    batch = ProblemBatch(batch.noisy_NCHW.double(), batch.timesteps_N, batch.target_NCHW.double())
    scores = score_layers(denoiser, layers, "taylor", batches=[batch])
    (name, layer), step = next(iter(layers.items())), 1e-3

    def loss() -> float:
        with torch.no_grad():
            prediction = denoiser(batch.noisy_NCHW, batch.timesteps_N).sample
        return float(F.mse_loss(prediction, batch.target_NCHW))

    largest = np.unravel_index(int(scores[name].argmax()), layer.weight.shape)
    with torch.no_grad():
        before = loss()
        layer.weight[largest] *= 1 - step
    assert abs(loss() - before) / step == pytest.approx(float(scores[name].max()), rel=0.01)


def test_each_score_is_its_formula():
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    other = torch.tensor([[-4.0, 0.5], [7.0, -1.0]])
    assert magnitude(weight, other).tolist() == [[1, 2], [0, 3]]
    assert random(weight, other) is other
    assert taylor(weight, other).tolist() == [[4, 1], [0, 3]]
    assert wanda(weight, torch.tensor([16.0, 0.25]).double()).tolist() == [[4, 1], [0, 1.5]]


def test_wanda_weighs_each_tap_of_a_kernel_by_its_own_inputs():
    weight = torch.full((2, 1, 1, 2), -2.0)  # O I kh kw
    scores = wanda(weight, torch.tensor([[[9.0, 0.0]]]).double())
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[[[6, 0]]]] * 2


def test_random_scores_are_seeded_and_differ_between_layers():
    layers = prunable_layers(tiny_model().denoiser)
    one, again, other = (
        score_layers(nn.Identity(), layers, "random", seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], again[name]) for name in layers)
    assert not any(torch.equal(one[name], other[name]) for name in layers)
    first, second = (score.ravel()[:100] for score in list(one.values())[:2])
    assert not torch.equal(first, second)


KINDS = {
    "3x3": r"resnets\.0\.conv1$",
    "1x1": r"conv_shortcut$",
    "strided": r"downsamplers\.0\.conv$",
    "linear": r"to_q$|time_emb_proj$",
}


@pytest.fixture(scope="module", params=SCORES)
def scored(request):
    """(score's name, layers, scores of them) on the tiny model."""
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser)
    batches = [problems().batch(range(4)), problems().batch(range(4, 6))]
    return layers, score_layers(denoiser, layers, request.param, batches=batches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_every_score_makes_exact_nm_masks(scored, kind, text):
    layers, scores = scored
    names = list(prunable_layers(tiny_model().denoiser, [KINDS[kind]]))
    pattern = Pattern.parse(text)
    masks = nm_masks({n: layers[n] for n in names}, scores, pattern)
    assert list(masks.by_layer) == names
    for name, mask in masks:
        score, shape = scores[name], mask.shape
        assert score.shape == layers[name].weight.shape == shape
        score_OGM = score.reshape(*shape[:2], -1).unflatten(1, (-1, pattern.m)).transpose(2, 3)
        mask_OGM = mask.reshape(*shape[:2], -1).unflatten(1, (-1, pattern.m)).transpose(2, 3)
        assert (mask_OGM.sum(-1) == pattern.n).all()
        worst_kept = score_OGM.masked_fill(~mask_OGM, torch.inf).amin(-1)
        best_removed = score_OGM.masked_fill(mask_OGM, -torch.inf).amax(-1)
        assert (worst_kept >= best_removed).all()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_score_makes_exact_weight_masks(scored, scope, ratio):
    layers, scores = scored
    masks = weight_masks(scores, ratio, scope=scope)
    assert list(masks.by_layer) == list(layers)
    pools = [[name] for name in layers] if scope == "layer" else [list(layers)]
    for pool in pools:
        score = torch.cat([scores[name].ravel() for name in pool])
        kept = torch.cat([masks.by_layer[name].ravel() for name in pool])
        assert int((~kept).sum()) == round(ratio * len(score))
        assert score[kept].min() >= score[~kept].max()
