"""Influence of positions against Jacobians in full, and what guided Grams make of it."""

from itertools import product

import pytest
import torch
from helpers import batch_of, problems, tiny_model
from torch import nn

from prunedm.networks import layer_kinds
from prunedm.networks.layers import prunable_layers
from prunedm.removal.input_grams import FLOOR, influence, input_grams, random_signs
from prunedm.task import Batch


class Scaled(nn.Module):
    """A layer, then a factor of each pixel: the square of the factor is the pixel's influence."""

    def __init__(self, layer: nn.Module, factor_YX: torch.Tensor, channels: int) -> None:
        super().__init__()
        self.layer, self.factor_YX, self.channels = layer, factor_YX, channels

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if isinstance(self.layer, nn.Linear):
            y_NCHW = self.layer(sample.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            y_NCHW = self.layer(sample)
        return (y_NCHW * self.factor_YX,)


def batch(count: int = 3, size: int = 5) -> Batch:
    x = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(0)).double()
    return batch_of(x, torch.linspace(0, 999, count).long(), x, numbers=tuple(range(count)))


def test_the_mean_over_all_signs_is_the_jacobian_squared():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    rest = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 1, 3, padding=1)).double()

    def draw(signs: tuple[float, ...]) -> torch.Tensor:
        z = conv(x)
        v = torch.tensor(signs).reshape(1, 1, 2, 2)
        (found,) = influence(rest(z), v, [conv], [z])
        return found

    mean_P = torch.stack([draw(signs) for signs in product((-1.0, 1.0), repeat=4)]).mean(0)
    jacobian = torch.autograd.functional.jacobian(rest, conv(x)).reshape(4, 3, 4)
    torch.testing.assert_close(mean_P, jacobian.square().sum((0, 1)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("guidance", [0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
@pytest.mark.parametrize("kind", ["conv", "strided", "linear"])
def test_guided_grams_weigh_each_position(kind, chunk, guidance, monkeypatch):
    monkeypatch.setattr(layer_kinds, "CHUNK", chunk)
    layer = {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "strided": nn.Conv2d(4, 4, 3, stride=2, padding=1),
        "linear": nn.Linear(4, 4),
    }[kind].double()
    size = 3 if kind == "strided" else 5
    factor = torch.linspace(-2, 3, size * size, dtype=torch.float64).reshape(size, size)
    some = batch()
    denoiser = Scaled(layer, factor, 4)
    gram = input_grams(
        denoiser, {"layer": layer}, [some], weigh=lambda level_N: 1 + level_N, guidance=guidance
    )["layer"]
    if kind == "linear":
        x_NPK = some.inputs["sample"].permute(0, 2, 3, 1).flatten(1, 2)
    else:
        unfolded = nn.functional.unfold(some.inputs["sample"], 3, padding=1, stride=layer.stride)
        x_NPK = unfolded.unflatten(1, (4, 9)).transpose(1, 2).flatten(1, 2).transpose(1, 2)
    e_P = (4 * factor.flatten().square()).clamp_min(FLOOR).pow(guidance)
    weights_N = 1 + some.level_N
    expected = torch.einsum("n,p,npk,npl->kl", weights_N, e_P, x_NPK, x_NPK)
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-9)


def grams(denoiser: nn.Module, batches, **options) -> dict[str, torch.Tensor]:
    layers = prunable_layers(denoiser)
    return input_grams(denoiser, layers, batches, weigh=torch.ones_like, guidance=0.5, **options)


def test_batches_change_nothing():
    denoiser, stream = tiny_model().denoiser, problems()
    whole = grams(denoiser, [stream.batch(range(6))])
    parts = grams(denoiser, [stream.batch(range(4)), stream.batch(range(4, 6))])
    for name, gram in whole.items():
        torch.testing.assert_close(parts[name], gram, rtol=1e-3, atol=1e-4 * float(gram.max()))


def test_signs_are_those_of_a_problem_wherever_it_is_read():
    stream, like_NCHW = problems(), torch.zeros(1, 1, 8, 8)
    whole = random_signs(stream.batch(range(6)), 0, like_NCHW)
    assert torch.equal(random_signs(stream.batch(range(4, 6)), 0, like_NCHW), whole[4:])
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(whole.mean())) < 0.1
    unnumbered = batch_of(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2))
    assert not torch.equal(
        random_signs(unnumbered, 0, like_NCHW), random_signs(unnumbered, 2, like_NCHW)
    )


def test_a_frozen_model_has_the_same_grams_and_nothing_is_left_behind():
    batches = [problems().batch(range(4))]
    denoiser = tiny_model().denoiser
    expected = grams(denoiser, batches)
    assert all(p.grad is None for p in denoiser.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    for name, gram in grams(denoiser.requires_grad_(False), batches).items():
        torch.testing.assert_close(gram, expected[name])


def test_where_nothing_is_heard_all_positions_count_alike():
    layer, some = nn.Conv2d(4, 4, 1).double(), batch()
    options = {"weigh": torch.ones_like}
    deaf = Scaled(layer, torch.zeros(5, 5).double(), 4)
    plain = input_grams(deaf, {"layer": layer}, [some], **options)["layer"]
    guided = input_grams(deaf, {"layer": layer}, [some], guidance=0.5, **options)["layer"]
    torch.testing.assert_close(guided / guided.trace(), plain / plain.trace())
