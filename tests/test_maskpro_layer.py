"""Masks inside layers: no trace after unwrapping, exact N:M, gradients by finite differences."""

from copy import deepcopy

import pytest
import torch
from helpers import output, tiny_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import prunedm
from prunedm.errors import UserError
from prunedm.learning.layer import (
    MaskProLayer,
    maskpro_layers,
    separate_parameters,
    unwrap_model,
    wrap_model_with_maskpro,
)
from prunedm.learning.sparsity import check_nm_compatibility, get_model_sparsity_summary
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers, to_groups
from prunedm.removal.nm import nm_mask

LAYERS = {
    "linear": (lambda: nn.Linear(16, 6), (5, 16)),
    "linear without bias": (lambda: nn.Linear(8, 3, bias=False), (5, 8)),
    "convolution": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 4, 4)),
    "circular": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), (2, 8, 5, 5)),
}


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A seeded layer, and an input to it."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make(), torch.randn(shape)


def ones(model: nn.Module) -> None:
    for layer in maskpro_layers(model).values():
        layer.set_mask(torch.ones_like(layer.weight))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_mask_of_ones_changes_no_bit(kind, training):
    layer, x = made(kind)
    wrapped = MaskProLayer(layer, 2, 4).train(training)
    wrapped.set_mask(torch.ones_like(layer.weight))
    assert torch.equal(wrapped(x), layer(x))
    wrapped.set_mask(None)
    assert not torch.equal(wrapped(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_ones_change_no_bit_of_a_unet(training):
    dense, wrapped = tiny_model().denoiser, tiny_model().denoiser
    wrap_model_with_maskpro(wrapped, 2, 4)
    ones(wrapped)
    assert torch.equal(output(wrapped.train(training)), output(dense.train(training)))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_hard_mask_is_that_of_magnitude_and_exactly_n_m(kind, pattern):
    layer, x = made(kind)
    wanted = Pattern.parse(pattern)
    wrapped = MaskProLayer(layer, wanted.n, wanted.m).eval()
    mask = wrapped.get_mask()
    assert mask.dtype == torch.bool
    assert torch.equal(mask, nm_mask(layer.weight.detach().abs(), wanted))
    assert (to_groups(mask, wanted.m).sum(1) == wanted.n).all()
    by_hand = deepcopy(layer)
    by_hand.weight.data *= mask
    assert torch.equal(wrapped(x), by_hand(x))


def test_draws_follow_the_global_seed_as_dropout_does():
    layer, x = made("linear")
    runs = []
    for seed in (3, 3, 4):
        wrapped = MaskProLayer(layer, 2, 4, lead=0.1).train()
        torch.manual_seed(seed)
        runs.append([wrapped(x) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_layers_of_one_model_draw_apart():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].load_state_dict(model[0].state_dict())
    wrap_model_with_maskpro(model.train(), 2, 4, lead=0.0)
    assert not torch.equal(model[0](torch.ones(1, 8)), model[1](torch.ones(1, 8)))


def test_relaxed_gradients_reach_logits_and_weights():
    wrapped = wrap_model_with_maskpro(tiny_model().denoiser.train(), 2, 4, temperature=0.7)
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wrapped(sample, torch.tensor([3, 700])).sample.square().mean().backward()
    layers = maskpro_layers(wrapped)
    assert set(layers) == set(prunable_layers(tiny_model().denoiser))
    assert all(layer.mask_logits.grad.abs().max() > 0 for layer in layers.values())
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers.values())


def test_the_relaxed_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    wrapped = MaskProLayer(nn.Linear(8, 2), 2, 4, temperature=0.8).double().train()
    x = torch.randn(3, 8, dtype=torch.float64)

    def loss(logits):
        torch.manual_seed(0)  # the same noise again
        return torch.func.functional_call(wrapped, {"mask_logits": logits}, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, wrapped.mask_logits.detach().requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_meets_the_same_mask_again(reentrant):
    layer, x = made("linear")
    x.requires_grad_()
    gradients = []
    for run in (
        lambda wrapped: wrapped(x),
        lambda wrapped: checkpoint(wrapped, x, use_reentrant=reentrant),
    ):
        wrapped = MaskProLayer(layer, 2, 4, lead=0.1).train()
        torch.manual_seed(0)
        run(wrapped).square().sum().backward()
        gradients.append((layer.weight.grad, wrapped.mask_logits.grad))
        layer.weight.grad = None
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("target_layers", "wanted"),
    [(None, ()), (["mid_block", "up_.*conv"], ["mid_block", "up_.*conv"]), ("to_q", ["to_q"])],
)
def test_wrap_and_unwrap_leave_no_trace(target_layers, wanted):
    model = tiny_model().denoiser
    modules, before, text = dict(model.named_modules()), bits(model), repr(model)
    parameters, here = list(model.parameters()), output(model)
    assert wrap_model_with_maskpro(model.train(), 2, 4, target_layers) is model
    output(model)
    model.eval()
    masks = unwrap_model(model, apply_masks=False)
    after = dict(model.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert equal(bits(model), before)
    assert torch.equal(output(model), here)
    assert repr(model) == text
    assert not any(module.training for module in model.modules())
    assert masks.by_layer.keys() == prunable_layers(model, wanted).keys()


def test_unwrapping_applies_the_masks_that_evaluation_saw():
    model = wrap_model_with_maskpro(tiny_model().denoiser, 2, 4)
    here = output(model)
    masks = unwrap_model(model)
    assert masks.pattern == Pattern(2, 4)
    masks.check_pattern()
    assert not masks.violations(model)
    assert not maskpro_layers(model)
    assert torch.equal(output(model), here)


def test_a_module_with_two_names_is_wrapped_and_unwrapped_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

        def forward(self, x):
            return self.second(x)

    model, x = Twice(), torch.ones(1, 8)
    original = model.first
    wrap_model_with_maskpro(model.eval(), 1, 4)
    assert isinstance(model.second, MaskProLayer)
    assert model.second is model.first
    assert list(unwrap_model(model).by_layer) == ["first"]
    assert model.first is model.second is original
    assert torch.equal(model(x), original(x))


def test_the_state_dict_of_a_wrapped_model_loads_again():
    model = wrap_model_with_maskpro(tiny_model().denoiser, 2, 4)
    other = wrap_model_with_maskpro(tiny_model().denoiser, 2, 4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(output(model), output(other))
    first, second = unwrap_model(model), unwrap_model(other)
    assert all(torch.equal(mask, second.by_layer[name]) for name, mask in first)
    assert torch.equal(output(model), output(other))


def test_a_wrapped_unet_copies_and_converts():
    model = wrap_model_with_maskpro(tiny_model().denoiser, 2, 4)
    copy, here = deepcopy(model), output(model)
    assert torch.equal(output(copy), here)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(output(model), here)
    layer = maskpro_layers(copy)["mid_block.attentions.0.to_q"]
    assert layer.weight is layer.original_layer.weight
    model.to(torch.bfloat16)
    layer = maskpro_layers(model)["mid_block.attentions.0.to_q"]
    assert layer.weight.dtype == layer.original_layer.weight.dtype == torch.bfloat16
    assert layer(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parameters_are_parted_without_rest_or_overlap():
    model = tiny_model().denoiser
    dense = list(model.parameters())
    wrap_model_with_maskpro(model, 2, 4)
    weights, logits = separate_parameters(model)
    assert [id(p) for p in weights] == [id(p) for p in dense]
    assert {id(p) for p in weights} | {id(p) for p in logits} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in weights} & {id(p) for p in logits}
    named = {name for name, p in model.named_parameters() if any(p is x for x in logits)}
    assert named == {name for name, _ in model.named_parameters() if "mask_logits" in name}


@pytest.mark.parametrize(
    ("layer", "pattern", "message"),
    [
        (nn.Linear(6, 2), (2, 4), "6 input channels are not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=2), (2, 4), "grouped convolution"),
        (nn.GroupNorm(2, 4), (2, 4), "GroupNorm cannot be 2:4: it is not a Linear"),
        (nn.Linear(8, 2), (4, 4), "0 < N < M"),
        (parametrizations.weight_norm(nn.Linear(8, 2)), (2, 4), "parametrization"),
    ],
)
def test_layers_that_cannot_be_n_m_are_refused(layer, pattern, message):
    with pytest.raises(UserError, match=message):
        MaskProLayer(layer, *pattern)
    if pattern[0] < pattern[1]:
        assert check_nm_compatibility(layer, *pattern)


def test_what_cannot_be_wrapped_stays_and_is_named():
    model = tiny_model().denoiser
    reasons = check_nm_compatibility(model, 1, 3)
    wrap_model_with_maskpro(model, 1, 3)
    wrapped = maskpro_layers(model)
    assert set(wrapped) == {
        name
        for name, x in prunable_layers(tiny_model().denoiser).items()
        if x.weight.shape[1] == 48
    }
    assert reasons.keys() >= prunable_layers(tiny_model().denoiser).keys() - set(wrapped)
    assert reasons["mid_block.attentions.0.to_q"] == "32 input channels are not a multiple of 3"
    assert not check_nm_compatibility(nn.Linear(8, 2), 2, 4)
    assert "conv_in" not in maskpro_layers(wrap_model_with_maskpro(tiny_model().denoiser, 2, 4))


@pytest.mark.parametrize(
    ("target", "message"),
    [("nowhere", "matches no layer; there are"), ("conv_in", "protected"), ("(", "not a regular")],
)
def test_targets_that_match_nothing_are_refused_before_anything_changes(target, message):
    model = tiny_model().denoiser
    with pytest.raises(UserError, match=message):
        wrap_model_with_maskpro(model, 2, 4, ["mid_block", target])
    assert not maskpro_layers(model)


def test_other_misuse_is_refused():
    with pytest.raises(UserError, match=r"use MaskProLayer\(layer, 2, 4\)"):
        wrap_model_with_maskpro(nn.Linear(8, 8), 2, 4)
    model = wrap_model_with_maskpro(nn.Sequential(nn.Linear(8, 8)), 2, 4)
    with pytest.raises(UserError, match="all are wrapped already"):
        wrap_model_with_maskpro(model, 2, 4)
    with pytest.raises(UserError, match=r"shape \(4,\), the layer's weight \(8, 8\)"):
        model[0].set_mask(torch.ones(4))


def test_the_summary_by_hand():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 3]]))
        model[3].weight.copy_(torch.tensor([[0.0, 1, 1], [1, 1, 1]]))
    wrap_model_with_maskpro(model, 2, 4, ["^0$"])
    summary = get_model_sparsity_summary(model)
    assert summary["overall_stats"] == {
        "overall_sparsity": 26 / 56,
        "total_parameters": 32 + 4 + 12 + 6 + 2,
        "masked_parameters": 16 + 9 + 1,
        "nm_compliance": 1.0,
    }
    assert list(summary["layer_stats"]) == ["0", "2", "3"]
    assert summary["layer_stats"]["0"] == {
        "shape": (4, 8),
        "sparsity": 0.5,
        "n": 2,
        "m": 4,
        "nm_compliance": 1.0,
    }
    assert summary["layer_stats"]["2"]["n"] == 1
    assert summary["layer_stats"]["3"]["nm_compliance"] is None
    mask = model[0].get_mask()
    mask[0, :4] = True  # one of 8 + 3 groups
    model[0].set_mask(mask)
    overall = get_model_sparsity_summary(model)["overall_stats"]
    assert overall["nm_compliance"] == pytest.approx(10 / 11)
    assert overall["masked_parameters"] == 24
    assert unwrap_model(model).patterns == {}


def test_the_summary_survives_unwrapping():
    model = wrap_model_with_maskpro(tiny_model().denoiser, 2, 4)
    wrapped = get_model_sparsity_summary(model)
    unwrap_model(model)
    assert get_model_sparsity_summary(model) == wrapped
    dense = get_model_sparsity_summary(tiny_model().denoiser)["overall_stats"]
    assert (dense["masked_parameters"], dense["nm_compliance"]) == (0, 0.0)


def test_the_public_names():
    assert prunedm.MaskProLayer is MaskProLayer
    assert prunedm.wrap_model_with_maskpro is wrap_model_with_maskpro
    assert prunedm.get_model_sparsity_summary is get_model_sparsity_summary
