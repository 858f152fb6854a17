"""Scores against materialised unfolds and hand-made gradients; every score with every mechanism."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import batch_of, noise_images, problems, tiny_model
from torch import nn
from torch.nn import functional as F

from prunedm.architecture import example
from prunedm.calibration import (
    RESERVOIR,
    TimeBins,
    input_squares,
    input_variances,
    loss_gradients,
)
from prunedm.errors import UserError
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.removal.channels.groups import channel_groups
from prunedm.removal.channels.plan import block_importance
from prunedm.removal.nm import nm_masks
from prunedm.removal.weights import weight_masks
from prunedm.scores import SCORES, Calibration, score_layers
from prunedm.scores.magnitude import magnitude, magnitude_l2
from prunedm.scores.random import random
from prunedm.scores.taylor import taylor, taylor_multivariable
from prunedm.scores.wanda import OVER_TIME, fluctuation, wanda
from prunedm.task import Batch, predict

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

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if isinstance(self.layer, nn.Linear):  # channels last
            return (self.layer(sample.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        return (self.layer(sample),)


def batches_of(inputs_NCHW: torch.Tensor, sizes, timesteps_N=None) -> list[Batch]:
    timesteps_N = torch.zeros(len(inputs_NCHW)).long() if timesteps_N is None else timesteps_N
    parts = zip(inputs_NCHW.split(sizes), timesteps_N.split(sizes), strict=True)
    return [batch_of(part, t_N, part) for part, t_N in parts]


def squares(layer: nn.Module, inputs_NCHW: torch.Tensor, sizes, **options) -> torch.Tensor:
    """By time bin; one bin unless told."""
    timesteps_N = options.pop("timesteps_N", None)
    options = {"bins": TimeBins(0, 999, 1)} | options
    batches = batches_of(inputs_NCHW, sizes, timesteps_N)
    return input_squares(OneLayer(layer), {"layer": layer}, batches, **options)["layer"]


def random_inputs(channels: int = 5) -> torch.Tensor:
    """float64, of a different scale in every channel and at every position."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(1, channels, 8, 7, generator=generator, dtype=torch.float64)
    return scale * torch.randn(6, channels, 8, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_squares_and_variances_are_those_of_a_materialised_unfold(kind):
    layer = nn.Conv2d(5, 2, **CONVOLUTIONS[kind]).double()
    inputs = random_inputs() + 0.5
    unfolded_NKP = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    shape = (5, *layer.kernel_size)
    for sizes in ([6], [1, 3, 2]):
        square = squares(layer, inputs, sizes)
        assert square.dtype == torch.float64
        expected = unfolded_NKP.square().mean((0, 2)).reshape(1, *shape)
        torch.testing.assert_close(square, expected, rtol=1e-10, atol=0)
        batches = batches_of(inputs, sizes)
        variance = input_variances(OneLayer(layer), {"layer": layer}, batches)["layer"]
        expected = unfolded_NKP.var((0, 2), correction=0).reshape(shape)
        torch.testing.assert_close(variance, expected, rtol=1e-9, atol=0)


def test_squares_of_a_linear_layer_are_those_of_its_rows():
    inputs = random_inputs()
    expected = np.mean(inputs.numpy() ** 2, axis=(0, 2, 3))
    found = squares(nn.Linear(5, 5).double(), inputs, [2, 4])
    torch.testing.assert_close(found[0], torch.from_numpy(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("over", ["mean", "max", "median"])
def test_problems_are_combined_within_their_time_bin(over):
    layer = nn.Conv2d(5, 2, 3, padding=1).double()
    inputs, timesteps_N = random_inputs(), torch.tensor([0, 99, 100, 250, 299, 150])
    unfolded_NKP = F.unfold(inputs, 3, padding=1)
    per_problem = unfolded_NKP.square().mean(2).reshape(6, 5, 3, 3)
    bins = TimeBins(0, 299, 3)
    assert bins.edges == [(0, 99), (100, 199), (200, 299)]
    found = squares(
        layer, inputs, [2, 3, 1], bins=bins, timesteps_N=timesteps_N, over_problems=over
    )
    combine = {"mean": np.mean, "max": np.max, "median": np.median}[over]
    for b, members in enumerate([[0, 1], [2, 5], [3, 4]]):
        expected = torch.from_numpy(combine(per_problem[members].numpy(), axis=0))
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=0)


def test_a_median_over_many_problems_is_of_a_bounded_seeded_sample():
    count = 10 * RESERVOIR
    inputs = torch.arange(count, dtype=torch.float64).sqrt().reshape(count, 1, 1, 1)
    layer = nn.Conv2d(1, 1, 1).double()
    found = [squares(layer, inputs, sizes, over_problems="median") for sizes in ([count], 7)]
    assert torch.equal(*found)  # however they are batched
    assert float(found[0]) == pytest.approx(count / 2, rel=0.25)


def test_every_timestep_has_the_bin_whose_edges_hold_it():
    for bins in (TimeBins(0, 999, 7), TimeBins(100, 500, 10), TimeBins(3, 5, 3)):
        timesteps_N = torch.arange(bins.first, bins.last + 1)
        for t, b in zip(timesteps_N.tolist(), bins.of(timesteps_N / 999).tolist(), strict=True):
            assert bins.edges[b][0] <= t <= bins.edges[b][1]
        assert (bins.edges[0][0], bins.edges[-1][1]) == (bins.first, bins.last)
    with pytest.raises(UserError, match="timesteps 3-5 take 1 to 3"):
        TimeBins(3, 5, 4)


def test_an_empty_time_bin_and_an_unused_layer_are_named():
    layer, unused = nn.Conv2d(5, 2, 1).double(), nn.Linear(2, 2)
    with pytest.raises(UserError, match="6 calibration problems leave a time bin of 2 empty"):
        squares(layer, random_inputs(), [6], bins=TimeBins(0, 999, 2))
    with pytest.raises(UserError, match="unused is never called"):
        input_variances(OneLayer(layer), {"unused": unused}, batches_of(random_inputs(), [6]))


def test_statistics_leave_no_hooks_behind():
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser)
    found = input_squares(denoiser, layers, problems().stream(2), bins=TimeBins(0, 999, 1))
    assert set(found) == set(layers)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())
    for name, layer in layers.items():
        assert found[name].shape == (1, *layer.weight.shape[1:])
        assert (found[name] > 0).all()


def test_norms_are_combined_over_time():
    norms_B = torch.tensor([[1.0, 4.0], [2.0, 9.0], [9.0, 2.0]])
    found = {name: combine(norms_B).tolist() for name, combine in OVER_TIME.items()}
    assert found["mean"] == pytest.approx([4, 5])
    assert found["max"] == [9, 9]
    assert found["median"] == [2, 4]
    # the cleanest bin counts most: weights 3, 2, 1
    assert found["weighted_mean"] == pytest.approx([(3 + 4 + 9) / 6, (12 + 18 + 2) / 6])


def test_diff_pruning_sums_gradients_up_to_the_first_small_loss():
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser, ["mid_block"])
    stream = problems(purpose="sweep")
    batches = [b for _, b in zip(range(4), stream.sweep(3), strict=False)]
    assert [b.inputs["timestep"].tolist() for b in batches] == [[t] * 3 for t in range(4)]
    for target in (b.target for b in batches):
        assert torch.equal(target, batches[0].target)  # the same noise
    weights = [layer.weight for layer in layers.values()]
    losses = [b.losses(predict(denoiser, b)).mean() for b in batches]
    # a threshold between the losses of t = 1 and t = 2 ends the sum with t = 1
    for scale, length in ((1e-6, 2), (1.0, 4)):
        small = [b if t < 2 else _with_loss(denoiser, b, scale) for t, b in enumerate(batches)]
        found = loss_gradients(denoiser, layers, iter(small), stop_below=0.05)
        expected = torch.autograd.grad(sum(losses[:length]) / length, weights, retain_graph=True)
        for gradient, oracle in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(gradient, oracle, rtol=1e-4, atol=1e-8)


def _with_loss(denoiser, batch: Batch, scale: float) -> Batch:
    """The same problems with targets that leave `scale` of the residual."""
    with torch.no_grad():
        output = predict(denoiser, batch)
    target = output + (batch.target - output) * scale
    return replace(batch, target=target)


def test_diff_pruning_goes_through_the_timesteps_of_its_problems():
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser, ["mid_block"])
    stream = problems(time_range=(2, 4))
    calibration = Calibration(stream, sweep_images=2, stop_below=0.0)
    found = score_layers(denoiser, layers, "diff-pruning", calibration=calibration)
    expected = loss_gradients(denoiser, layers, list(stream.sweep(2)))
    assert len(list(stream.sweep(2))) == 3
    for name, layer in layers.items():
        assert torch.equal(found[name], (layer.weight * expected[name]).abs())


def test_gradients_are_those_of_the_mean_loss_however_it_is_batched():
    denoiser = tiny_model().denoiser.double()
    layers = prunable_layers(denoiser)
    whole = problems().batch(range(7))
    noisy, target = whole.inputs["sample"].double(), whole.target  # losses are float32
    whole = batch_of(noisy, whole.inputs["timestep"], target)
    loss = F.mse_loss(denoiser(noisy, whole.inputs["timestep"]).sample, target.double())
    weights = [layer.weight for layer in layers.values()]
    expected = torch.autograd.grad(loss, weights)
    parts = [
        batch_of(noisy[a:b], whole.inputs["timestep"][a:b], target[a:b])
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
    batch = batch_of(
        batch.inputs["sample"].double(), batch.inputs["timestep"], batch.target.double()
    )
    gradients = loss_gradients(denoiser, layers, [batch])
    scores = {n: taylor(layer.weight.detach(), gradients[n]) for n, layer in layers.items()}
    (name, layer), step = next(iter(layers.items())), 1e-3

    def loss() -> float:
        with torch.no_grad():
            prediction = denoiser(batch.inputs["sample"], batch.inputs["timestep"]).sample
        return float(F.mse_loss(prediction, batch.target))

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
    assert magnitude_l2(weight, other).tolist() == [[1, 4], [0, 9]]
    assert taylor(weight, other).tolist() == [[4, 1], [0, 3]]
    assert taylor_multivariable(weight, other).tolist() == [[-4, -1], [0, -3]]
    assert wanda(weight, torch.tensor([4.0, 0.5]).double()).tolist() == [[4, 1], [0, 1.5]]
    assert fluctuation(weight, torch.tensor([16.0, 0.25]).double()).tolist() == [[4, 1], [0, 1.5]]


def test_the_two_reductions_of_taylor_differ_for_channels_only():
    model = tiny_model().denoiser
    group = channel_groups(model, example(model))[0]
    name = group.couplings[0].layer
    effects = torch.ones_like(model.get_submodule(name).weight)
    effects[0].flatten()[::2] = -1.0  # cancel within the first channel
    weight = torch.ones_like(effects)
    summed, signed = taylor(weight, effects), taylor_multivariable(weight, effects)
    assert torch.equal(signed.abs(), summed)
    one, other = (
        block_importance(group, {name: score}, reduction="first") for score in (summed, signed)
    )
    assert one.std() == pytest.approx(0, abs=1e-6)
    assert other[0] < other[1]


def test_wanda_weighs_each_tap_of_a_kernel_by_its_own_inputs():
    weight = torch.full((2, 1, 1, 2), -2.0)  # O I kh kw
    scores = wanda(weight, torch.tensor([[[3.0, 0.0]]]).double())
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
    calibration = Calibration(problems(time_range=(0, 9)), count=8, time_bins=2, sweep_images=2)
    return layers, score_layers(denoiser, layers, request.param, calibration=calibration)


def test_calibration_images_of_another_size_are_refused():
    denoiser, small = tiny_model().denoiser, problems(noise_images(size=4))
    with pytest.raises(UserError, match="calibration images are 1x4x4, the model takes 1x8x8"):
        score_layers(denoiser, prunable_layers(denoiser), "wanda", calibration=Calibration(small))


def test_a_score_that_is_no_number_names_its_layer():
    denoiser = tiny_model().denoiser
    layers = prunable_layers(denoiser)
    name = next(iter(layers))
    layers[name].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"scores of {name} are not finite"):
        score_layers(denoiser, layers, "magnitude")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:8", "15:16"])
def test_every_score_makes_exact_nm_masks(scored, kind, text):
    layers, scores = scored
    names = list(prunable_layers(tiny_model().denoiser, [KINDS[kind]]))
    pattern = Pattern.parse(text)
    masks = nm_masks({n: layers[n] for n in names}, scores, pattern)
    assert list(masks.by_layer) == names
    for name, mask in masks:
        score, shape = scores[name].abs(), mask.shape
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
        score = torch.cat([scores[name].abs().ravel() for name in pool])
        kept = torch.cat([masks.by_layer[name].ravel() for name in pool])
        assert int((~kept).sum()) == round(ratio * len(score))
        assert score[kept].min() >= score[~kept].max()


@pytest.mark.parametrize(
    ("ratio", "removed"),
    [
        (5 / 12, [1, 4]),  # 1 + 4 of 12
        (6 / 12, [1, 4, 2]),
        (0.44, [1, 4]),  # rounds to 5 of 12
        (0.37, [1]),  # 4 of 12: the next would make it 5
        (1.0, [1, 4, 2, 5, 0, 3]),
    ],
)
def test_macs_count_weights_by_their_positions(ratio, removed):
    # in order of score: costs 1 4 1 4 1 1
    scores = {"cheap": torch.tensor([[5.0, 1, -3, 6]]), "dear": torch.tensor([[-2.0, 4]])}
    positions = {"cheap": 1, "dear": 4}
    masks = weight_masks(scores, ratio, scope="global", positions=positions)
    kept = torch.cat([mask.flatten() for _, mask in masks])
    assert (~kept).nonzero().flatten().tolist() == sorted(removed)
