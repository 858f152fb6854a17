"""A `UNet2DModel` whose config carries the width of every module that was narrowed.

diffusers' own config can only say `block_out_channels`; after channel pruning each layer has a
width of its own. `widths` maps a module's name to what differs from the dense architecture:
Conv2d, Linear: `in`, `out`; GroupNorm: `channels`, `groups`; Attention: `heads`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from prunedm.errors import UserError

Widths = dict[str, dict[str, int]]
_Init = TypeVar("_Init", bound=Callable[..., None])


def _with_widths(init: _Init) -> _Init:
    """Sign `init` with the dense arguments plus `widths`: diffusers reads config keys there."""
    dense = inspect.signature(UNet2DModel.__init__)
    widths = inspect.Parameter("widths", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = dense.replace(parameters=[*dense.parameters.values(), widths])
    setattr(init, "__signature__", signature)  # noqa: B010 (functions have no such attribute for mypy)
    return init


class PrunedUNet2DModel(UNet2DModel):
    """The dense architecture of `UNet2DModel`'s arguments, narrowed to `widths`.

    Args (besides those of `UNet2DModel`, which describe the dense architecture):
        widths: module name -> its sizes, for every module that differs from the dense architecture.
    """

    # diffusers writes this into model_index.json, and wants ModelMixin in the module it names.
    __module__ = "prunedm"

    @register_to_config
    @_with_widths
    def __init__(
        self, *args: Any, widths: Mapping[str, Mapping[str, int]] | None = None, **dense: Any
    ):
        super().__init__(*args, **dense)
        resize(self, widths or {})


def from_resized(denoiser: UNet2DModel) -> PrunedUNet2DModel:
    """The narrowed `denoiser` as a model that can be saved; it shares the parameters of `denoiser`.

    It is built from the config alone and must take every tensor, so it is known to load again.
    """
    config = _dense_config(denoiser)
    with torch.device("meta"):
        model = PrunedUNet2DModel(**config, widths=widths_of(denoiser))
    trainable = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    for name, parameter in model.named_parameters():  # loading imposes these on the shared ones
        parameter.requires_grad_(trainable[name])
    model.load_state_dict(denoiser.state_dict(keep_vars=True), assign=True)
    sources = dict(denoiser.named_modules())
    for name, module in model.named_modules():
        module.training = sources[name].training
        if isinstance(module, Attention):
            module.processor = sources[name].processor
    return model


def widths_of(denoiser: UNet2DModel) -> Widths:
    """Sizes of the modules that differ from the dense architecture of `denoiser.config`."""
    with torch.device("meta"):
        dense = UNet2DModel(**_dense_config(denoiser))
    before = {name: _sizes(module) for name, module in dense.named_modules()}
    after = {name: _sizes(module) for name, module in denoiser.named_modules()}
    return {name: sizes for name, sizes in after.items() if sizes and sizes != before[name]}


def resize(denoiser: UNet2DModel, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Give the named modules new sizes, with freshly initialised parameters, in place.

    Modules are changed rather than replaced: diffusers registers some convolutions under two names.
    """
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    for name, sizes in widths.items():
        if name not in modules:
            raise UserError(f"widths: the architecture has no module named {name!r}")
        _check_sizes(name, modules[name], sizes)
        _set_sizes(modules[name], sizes)
    sync_attributes(denoiser)


def sync_attributes(denoiser: nn.Module) -> None:
    """Derive what composite modules say (and diffusers asserts) about widths from their layers.

    Raises UserError where the layers of one block do not fit each other.
    """
    for name, module in denoiser.named_modules():
        if isinstance(module, ResnetBlock2D):
            _sync_resnet(name, module)
        elif isinstance(module, Attention):
            _sync_attention(name, module)
        elif isinstance(module, (Upsample2D, Downsample2D)):
            conv = getattr(module, "conv", None) or getattr(module, "Conv2d_0", None)
            if isinstance(conv, nn.Conv2d):
                module.channels, module.out_channels = conv.in_channels, conv.out_channels


def replace_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put `value` in the place of parameter `name`, trainable if the old one was."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))


def set_layer_widths(module: nn.Module, width_in: int, width_out: int) -> None:
    """Set the width attributes of a Conv2d, Linear or GroupNorm; parameters stay."""
    if isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = width_in, width_out
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = width_in, width_out
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = width_out
    else:
        raise TypeError(f"a {type(module).__name__} has no width")


def _dense_config(denoiser: UNet2DModel) -> dict[str, Any]:
    names = list(inspect.signature(UNet2DModel.__init__).parameters)[1:]
    return {name: denoiser.config[name] for name in names}


def _sizes(module: nn.Module) -> dict[str, int]:
    if isinstance(module, nn.Conv2d):
        return {"in": module.in_channels, "out": module.out_channels}
    if isinstance(module, nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, nn.GroupNorm):
        return {"channels": module.num_channels, "groups": module.num_groups}
    if isinstance(module, Attention):
        return {"heads": module.heads}
    return {}


def _check_sizes(name: str, module: nn.Module, sizes: Mapping[str, int]) -> None:
    expected = _sizes(module)
    if set(sizes) != set(expected):
        kind, asked = type(module).__name__, sorted(sizes)
        raise UserError(
            f"widths: {name!r} is a {kind}, described by {sorted(expected)}, not by {asked}"
        )
    if any(not isinstance(size, int) or size < 1 for size in sizes.values()):
        raise UserError(f"widths: {name!r} needs whole numbers of 1 or more, got {dict(sizes)}")
    if "groups" in sizes and sizes["channels"] % sizes["groups"]:
        channels, groups = sizes["channels"], sizes["groups"]
        raise UserError(f"widths: {name!r}: {groups} norm groups do not divide {channels} channels")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise UserError(f"widths: {name!r} is a grouped convolution, which cannot be resized")


def _set_sizes(module: nn.Module, sizes: Mapping[str, int]) -> None:
    if isinstance(module, Attention):
        module.heads = sizes["heads"]
        return
    assert isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm))
    if isinstance(module, nn.GroupNorm):
        module.num_groups = sizes["groups"]
        shape = [sizes["channels"]]
    else:
        shape = [sizes["out"], sizes["in"], *module.weight.shape[2:]]
    set_layer_widths(module, sizes.get("in", 0), shape[0])
    if module.weight is not None:
        replace_parameter(module, "weight", module.weight.new_empty(shape))
    if module.bias is not None:
        replace_parameter(module, "bias", module.bias.new_empty(shape[0]))
    module.reset_parameters()


def _sync_resnet(name: str, block: ResnetBlock2D) -> None:
    c_in, c_mid, c_out = block.conv1.in_channels, block.conv1.out_channels, block.conv2.out_channels
    _agree(name, "norm1", block.norm1.num_channels, c_in)
    _agree(name, "norm2", block.norm2.num_channels, c_mid)
    _agree(name, "conv2", block.conv2.in_channels, c_mid)
    if block.time_emb_proj is not None:
        factor = 2 if block.time_embedding_norm == "scale_shift" else 1
        _agree(name, "time_emb_proj", block.time_emb_proj.out_features, factor * c_mid)
    if block.conv_shortcut is not None:
        _agree(name, "conv_shortcut", block.conv_shortcut.in_channels, c_in)
        _agree(name, "conv_shortcut", block.conv_shortcut.out_channels, c_out)
    else:
        _agree(name, "conv2", c_out, c_in)
    block.in_channels, block.out_channels = c_in, c_out
    for resampler in (
        block.upsample,
        block.downsample,
    ):  # these have no convolution to derive it from
        if isinstance(resampler, (Upsample2D, Downsample2D)):
            resampler.channels = resampler.out_channels = c_in


def _sync_attention(name: str, attention: Attention) -> None:
    stream, inner, heads = attention.to_q.in_features, attention.to_q.out_features, attention.heads
    for child in ("to_k", "to_v"):
        _agree(name, child, getattr(attention, child).in_features, stream)
        _agree(name, child, getattr(attention, child).out_features, inner)
    _agree(name, "to_out.0", attention.to_out[0].in_features, inner)
    _agree(name, "to_out.0", attention.to_out[0].out_features, stream)
    if attention.group_norm is not None:
        _agree(name, "group_norm", attention.group_norm.num_channels, stream)
    if inner % heads:
        raise UserError(f"widths: {name!r}: {heads} heads do not divide {inner} channels")
    attention.query_dim = attention.cross_attention_dim = stream
    attention.out_dim = attention.out_context_dim = stream
    attention.inner_dim = attention.inner_kv_dim = inner
    attention.sliceable_head_dim = heads
    attention.scale = (inner // heads) ** -0.5 if attention.scale_qk else 1.0


def _agree(block: str, child: str, width: int, expected: int) -> None:
    if width != expected:
        raise UserError(
            f"widths: '{block}.{child}' is {width} wide where its block needs {expected}"
        )
