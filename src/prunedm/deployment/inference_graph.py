"""The denoiser in a form that suits runtimes: the same function in fewer and cheaper operations.

A small UNet spends half of its time between convolutions. Group normalization is the worst: runtimes
reorder channels-last images to take statistics, and back. Here statistics are taken by channel, joined
to groups as small (N, C) tables, and applied as one multiply and add. The time embedding, which is
constant over an image, goes into the same tables:

    GroupNorm(x + e) = a x + b,   a = w / sqrt(var + eps),   b = bias + a (e - mean)

with mean and var of x + e over a group's channels and pixels, from the channels' mean m and mean
square q of x alone: m + e and q + 2 e m + e^2. Attention reads channels-last images as tokens.

Shapes: N images, C channels, H W pixels, G groups, L tokens.
"""

import copy
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from prunedm.architecture import answer
from prunedm.networks.layers import replace_module


class InferenceDenoiser(nn.Module):
    """`denoiser` for export, sharing its weights: `(sample NCHW, timestep N[, class_labels N]) -> NCHW`.

    Equal to the denoiser up to rounding. Blocks of unknown kinds stay unchanged. Module names are the
    denoiser's with the prefix `unet.`, so that weights are found by name.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        shared = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in denoiser.parameters()
        }
        self.unet = copy.deepcopy(denoiser, shared).eval()
        for name, module in list(self.unet.named_modules()):
            if isinstance(module, nn.GroupNorm):
                replace_module(self.unet, name, GroupAffine(module))
        # replaced blocks keep their children, so inner names do not change
        for name, module in list(self.unet.named_modules()):
            if isinstance(module, ResnetBlock2D) and _is_plain_resnet(module):
                replace_module(self.unet, name, _Resnet(module))
            elif isinstance(module, Attention) and _is_plain_attention(module):
                replace_module(self.unet, name, _SelfAttention(module))
            elif isinstance(module, Upsample2D) and _is_plain_upsampling(module):
                replace_module(self.unet, name, _Upsample(module))
        self.eval()  # the new modules too

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoiser's output; timesteps are floats, one per image."""
        given = {} if class_labels is None else {"class_labels": class_labels}
        return answer(self.unet, {"sample": sample, "timestep": timestep} | given)


class HalfInside(nn.Module):
    """A module that takes and gives float32 and computes in `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output: torch.Tensor = self.module(sample.to(self.dtype), timestep, class_labels)
        return output.float()


class GroupAffine(nn.Module):
    """`nn.GroupNorm` as one multiply and add per channel."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        channels = norm.num_channels
        self.weight = norm.weight if norm.affine else nn.Parameter(torch.ones(channels))
        self.bias = norm.bias if norm.affine else nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, shift_NC: torch.Tensor | None = None) -> torch.Tensor:
        """x is NCHW or NCL; with a shift, the norm of x + shift."""
        dims = tuple(range(2, x.ndim))
        pixels = x[0, 0].numel()
        mean_NC = x.mean(dims)
        # runtimes compute a norm in one pass and without overflow, unlike a mean of squares
        square_NC = torch.linalg.vector_norm(x, 2, dims).square() / pixels
        if shift_NC is not None:
            square_NC = square_NC + shift_NC * (2 * mean_NC + shift_NC)
            mean_NC = mean_NC + shift_NC
        grouped = (self.groups, -1)
        mean_NG1 = mean_NC.unflatten(1, grouped).mean(2, keepdim=True)
        square_NG1 = square_NC.unflatten(1, grouped).mean(2, keepdim=True)
        variance_NG1 = (square_NG1 - mean_NG1.square()).clamp_min(0)
        a_NGc = torch.rsqrt(variance_NG1 + self.eps) * self.weight.unflatten(0, grouped)
        b_NGc = self.bias.unflatten(0, grouped) - a_NGc * mean_NG1
        a_NC, b_NC = a_NGc.flatten(1), b_NGc.flatten(1)
        if shift_NC is not None:
            b_NC = b_NC + a_NC * shift_NC
        ones = (1,) * len(dims)
        return x * a_NC.unflatten(1, (-1, *ones)) + b_NC.unflatten(1, (-1, *ones))


class _Rebuilt(nn.Module):
    """A block that keeps the children of another, under their names."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)


class _Resnet(_Rebuilt):
    """`ResnetBlock2D` with its time embedding inside the second norm."""

    norm1: GroupAffine
    norm2: GroupAffine
    conv1: nn.Module
    conv2: nn.Module
    time_emb_proj: nn.Module

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__(block)
        self.upsample, self.downsample = block.upsample, block.downsample
        self.scale = block.output_scale_factor

    def forward(
        self, x_NCHW: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        hidden = F.silu(self.norm1(x_NCHW))
        resample = self.upsample or self.downsample
        if resample is not None:
            x_NCHW, hidden = resample(x_NCHW), resample(hidden)
        hidden = self.conv1(hidden)
        hidden = self.norm2(hidden, self.time_emb_proj(F.silu(temb)))
        hidden = self.conv2(F.silu(hidden))
        shortcut = getattr(self, "conv_shortcut", None)
        output = (x_NCHW if shortcut is None else shortcut(x_NCHW)) + hidden
        return output if self.scale == 1 else output / self.scale


class _SelfAttention(_Rebuilt):
    """`Attention` over pixels, channels last."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.heads = attention.heads
        self.residual = attention.residual_connection
        self.scale = attention.rescale_output_factor

    def forward(self, x_NCHW: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm = getattr(self, "group_norm", None)
        hidden = x_NCHW if norm is None else norm(x_NCHW)
        hidden_NLC = hidden.permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (
            project(hidden_NLC).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed_NLC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output_NLC = self.to_out[0](mixed_NLC)
        output = output_NLC.unflatten(1, x_NCHW.shape[2:]).permute(0, 3, 1, 2)
        if self.residual:
            output = output + x_NCHW
        return output if self.scale == 1 else output / self.scale


class _Upsample(_Rebuilt):
    """`Upsample2D` without its branches on the batch size, which would fix it in the exported graph."""

    def forward(
        self, x_NCHW: torch.Tensor, output_size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        scale = 2.0 if output_size is None else None
        larger = F.interpolate(x_NCHW, size=output_size, scale_factor=scale, mode="nearest")
        conv = getattr(self, "conv", None)
        return larger if conv is None else conv(larger)


def _is_plain_resnet(block: ResnetBlock2D) -> bool:
    return (
        block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
        and isinstance(block.norm1, GroupAffine)
        and isinstance(block.norm2, GroupAffine)
    )


def _is_plain_upsampling(block: Upsample2D) -> bool:
    plain = block.interpolate and not block.use_conv_transpose and block.norm is None
    return plain and (not block.use_conv or block.name == "conv")


def _is_plain_attention(attention: Attention) -> bool:
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.is_cross_attention
        and (attention.group_norm is None or isinstance(attention.group_norm, GroupAffine))
    )
