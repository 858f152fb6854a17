"""The denoiser as it is exported: the same function as the denoiser, and the same names of weights."""

from copy import deepcopy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from helpers import tiny_model
from test_narrowed_unet import narrow
from torch import nn

from prunedm import PrunedUNet2DModel
from prunedm.deployment.inference_graph import GroupAffine, InferenceDenoiser

ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# one head of 12 channels in the middle, where the block around it keeps its 32
ONE_HEAD = {
    f"mid_block.attentions.0.{name}": {"in": 32, "out": 12} for name in ("to_q", "to_k", "to_v")
} | {"mid_block.attentions.0.to_out.0": {"in": 12, "out": 32}}
VARIANTS = {
    "plain": {},
    "one head": ATTENTION | {"attention_head_dim": 32},
    "four heads": ATTENTION | {"attention_head_dim": 4},
    "odd groups": {"block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 5},
    "a group a channel": {"norm_num_groups": 16},
    "classes": ATTENTION | {"num_class_embeds": 3},
    "scale and shift": ATTENTION | {"resnet_time_scale_shift": "scale_shift"},
    "resnets that resample": ATTENTION | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "no attention": {"add_attention": False},
    "another scale": {"mid_block_scale_factor": 1.7},
    "oblong": ATTENTION | {"sample_size": (8, 12)},
    "GELU": {"act_fn": "gelu"},
    "skips": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64),
    },
}


def unet(variant: str) -> nn.Module:
    if variant == "narrowed":
        return shaken(narrow())
    if variant == "narrowed head":
        torch.manual_seed(0)
        dense = tiny_model(attention_head_dim=32).denoiser.config
        return shaken(PrunedUNet2DModel(**dense, widths=ONE_HEAD).eval())
    if variant == "no affine norms":
        return without_affine(shaken(tiny_model(**ATTENTION).denoiser))
    return shaken(tiny_model(**VARIANTS[variant]).denoiser)


def shaken(denoiser: nn.Module) -> nn.Module:
    """With norms and biases that are not their initial ones and zeros, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return denoiser


def without_affine(denoiser: nn.Module) -> nn.Module:
    for module in denoiser.modules():
        if isinstance(module, nn.GroupNorm):
            module.affine, module.weight, module.bias = False, None, None
    return denoiser


def inputs(denoiser: nn.Module, count: int) -> list[torch.Tensor]:
    """Noise, a timestep an image from the first to the last, and labels where there are classes."""
    config = denoiser.config
    size = config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, config.in_channels, height, width, generator=generator)
    labels = [torch.arange(count) % config.num_class_embeds] if config.num_class_embeds else []
    return [noise.double(), torch.linspace(0, 999, count), *labels]


ALL = [*VARIANTS, "narrowed", "narrowed head", "no affine norms"]


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_it_is_the_denoiser(variant):
    denoiser = unet(variant)
    exact = deepcopy(denoiser).double()
    graph32, graph64 = InferenceDenoiser(denoiser), InferenceDenoiser(exact)
    for count in (1, 3, 65):  # 64 and more are copied on the way up by diffusers
        given = inputs(denoiser, count)
        due = exact(*given, return_dict=False)[0]
        output = graph64(*given)
        assert output.dtype == torch.float64
        assert (output - due).norm() <= 1e-9 * due.norm()
        output = graph32(given[0].float(), *given[1:])
        assert (output - due).norm() <= 1e-5 * due.norm()


@pytest.mark.parametrize("variant", ALL)
def test_the_source_stays_and_its_names_are_kept(variant):
    denoiser = unet(variant)
    before = {name: t.clone() for name, t in denoiser.state_dict().items()}
    kinds = [type(module) for module in denoiser.modules()]
    gradients = [p.requires_grad for p in denoiser.parameters()]
    graph = InferenceDenoiser(denoiser.train())
    assert [type(module) for module in denoiser.modules()] == kinds
    assert [p.requires_grad for p in denoiser.parameters()] == gradients
    assert denoiser.training
    assert not any(module.training for module in graph.modules())
    own = graph.state_dict()
    for name, tensor in before.items():
        assert torch.equal(own[f"unet.{name}"], tensor), name
    graph.half()  # as for a file in half precision
    assert all(t.dtype == torch.float32 for t in denoiser.state_dict().values())
    assert denoiser.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in denoiser.state_dict().items())


@pytest.mark.parametrize("variant", ["plain", "four heads", "classes", "resnets that resample"])
def test_nothing_slow_is_left(variant):
    """Blocks that are known are replaced, inside of others too."""
    left = (nn.GroupNorm, ResnetBlock2D, Attention, Upsample2D)
    found = [name for name, m in InferenceDenoiser(unet(variant)).named_modules()
             if isinstance(m, left)]  # fmt: skip
    assert found == []


def test_a_block_of_another_kind_stays():
    graph = InferenceDenoiser(unet("scale and shift"))
    assert any(isinstance(module, ResnetBlock2D) for module in graph.modules())
    graph = InferenceDenoiser(unet("GELU"))
    assert any(isinstance(module, ResnetBlock2D) for module in graph.modules())


# ---------------------------------------------------------------------------- group norm


def norm(groups: int, channels: int, *, affine: bool = True, eps: float = 1e-5) -> nn.GroupNorm:
    module = nn.GroupNorm(groups, channels, eps=eps, affine=affine).double()
    generator = torch.Generator().manual_seed(3)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.randn(channels, generator=generator))
            module.bias.copy_(torch.randn(channels, generator=generator))
    return module


def noise(*shape: int, seed: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (3, 6), (6, 6)])
@pytest.mark.parametrize("pixels", [(5, 7), (1, 2), (11,)])
@torch.no_grad()
def test_group_affine_is_group_norm(affine, groups, channels, pixels):
    module = norm(groups, channels, affine=affine)
    x = 3 * noise(4, channels, *pixels) + noise(1, channels, *[1] * len(pixels), seed=5)
    shift_NC = noise(4, channels, seed=6)
    own = GroupAffine(module)
    torch.testing.assert_close(own(x), module(x), rtol=1e-10, atol=1e-10)
    shifted = x + shift_NC.reshape(4, channels, *[1] * len(pixels))
    torch.testing.assert_close(own(x, shift_NC), module(shifted), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_group_affine_takes_a_large_mean():
    module = norm(2, 8)
    x, shift_NC = noise(3, 8, 16, 16) + 100, noise(3, 8, seed=6)
    own = GroupAffine(module)
    torch.testing.assert_close(own(x), module(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        own(x, shift_NC), module(x + shift_NC[:, :, None, None]), rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
def test_group_affine_of_a_constant_image_is_finite():
    """Rounding may make the variance negative; the true one is 0, and epsilon is what is left."""
    module = norm(2, 8, eps=1e-6).float()
    x = torch.full((2, 8, 5, 5), 1234.567)
    output = GroupAffine(module)(x)
    assert output.isfinite().all()
