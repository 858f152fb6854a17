"""What must follow when layers get narrower: the constructors of diffusers are the oracle."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
)
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention
from diffusers.models.transformers.transformer_ltx import LTXAttention
from diffusers.models.transformers.transformer_ovis_image import OvisImageSingleTransformerBlock
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.models.upsampling import Upsample2D
from narrowing import FAMILIES
from torch import nn

from prunedm.networks import widths
from prunedm.networks.widths import attributes, narrow_layer, resize, sizes, sync_attributes

# of attentions; they say nothing of a layer that gets narrower with the heads
CONSTANT = {
    "rescale_output_factor": "a factor that happens to be whole",
    "mlp_mult_factor": "layers that a feed-forward's gate takes",
    "cross_attention_dim_head": "a flag in its classes",
    "hidden_size": "the residual stream",
    "d_model": "the residual stream",
    "output_dim": "the residual stream",
    "dim_heads": "of one head; twice that is made where attention is differential",
    "head_width": "of one head",
    "sliding_window": "positions",
    "chunk_size": "frames",
}
DERIVED = {"sliceable_head_dim", "num_key_value_groups", "mlp_hidden_dim"}
KNOWN = {
    *widths._FOLLOWS,
    *widths._HEADS,
    *widths._KV_HEADS,
    *widths._PER_HEAD,
    *CONSTANT,
} | DERIVED


def told(network: nn.Module) -> dict[str, dict]:
    """Everything that modules say about widths, by the module's name."""
    lists = ("_tp_packed_row_blocks", "_tp_packed_col_blocks", "normalized_shape", "dim")
    return {
        name: attributes(module)
        | {"scale": getattr(module, "scale", None)}
        | {own: getattr(module, own) for own in lists if hasattr(module, own)}
        for name, module in network.named_modules()
    }


def flux_block(cls: type):
    return lambda n: _with_heads(cls(32, 4, 8, mlp_ratio=n), n)


def _with_heads(block: nn.Module, heads: int) -> nn.Module:
    """Its constructor ties the heads to the stream; an attention of its own has any."""
    block.attn = FluxAttention(query_dim=32, heads=heads, dim_head=8, pre_only=True)
    hidden = block.mlp_hidden_dim
    block.proj_out = nn.Linear(8 * heads + hidden, 32)
    block.proj_out._tp_packed_row_blocks = [8 * heads, hidden]
    return block


ONE_HEAD = {"heads": 1, "residual_connection": True}
WIDE_AND_NARROW = {
    "self": lambda n: Attention(32, heads=n, dim_head=8),
    "one head": lambda n: Attention(32, dim_head=8 * n, norm_num_groups=2, **ONE_HEAD),
    "stream": lambda n: Attention(8 * n, dim_head=8, norm_num_groups=2, **ONE_HEAD),
    "unscaled": lambda n: Attention(32, heads=n, dim_head=8, scale_qk=False),
    "cross": lambda n: Attention(32, cross_attention_dim=12, heads=n, dim_head=8),
    "text": lambda n: Attention(32, cross_attention_dim=3 * n, heads=4, dim_head=8),
    "joint": lambda n: Attention(
        32, heads=n, dim_head=8, added_kv_proj_dim=12, context_pre_only=False, out_context_dim=12
    ),
    "last joint": lambda n: Attention(
        32, heads=n, dim_head=8, added_kv_proj_dim=12, context_pre_only=True, qk_norm="rms_norm"
    ),
    "grouped": lambda n: Attention(32, heads=n, kv_heads=n // 2, dim_head=8),
    "one for all": lambda n: Attention(32, heads=n, kv_heads=1, dim_head=8),
    "across heads": lambda n: Attention(
        32, heads=n, kv_heads=n, dim_head=8, qk_norm="rms_norm_across_heads"
    ),
    "flux": lambda n: FluxAttention(32, heads=n, dim_head=8, added_kv_proj_dim=12, out_dim=None),
    "flux single": flux_block(FluxSingleTransformerBlock),
    "ovis single": flux_block(OvisImageSingleTransformerBlock),
    "flux 2 single": lambda n: Flux2ParallelSelfAttention(32, n, 8, mlp_ratio=float(n)),
    "wan": lambda n: WanAttention(32, n, 8),
    "wan image": lambda n: WanAttention(32, n, 8, added_kv_proj_dim=12, cross_attention_dim_head=8),
    "ltx": lambda n: LTXAttention(32, heads=n, kv_heads=n, dim_head=8, cross_attention_dim=12),
    "resnet": lambda n: ResnetBlock2D(
        in_channels=8 * n, out_channels=48, temb_channels=12, groups=4
    ),
    "resnet inside": lambda n: ResnetBlock2D(
        in_channels=8 * n, temb_channels=12, groups=4, time_embedding_norm="scale_shift", down=True
    ),
    "down": lambda n: Downsample2D(8 * n, use_conv=True, out_channels=4 * n),
    "up": lambda n: Upsample2D(8 * n, use_conv=True, out_channels=4 * n),
}


@pytest.mark.parametrize("make", WIDE_AND_NARROW.values(), ids=WIDE_AND_NARROW)
def test_a_narrowed_module_says_what_a_narrow_one_is_built_with(make):
    wide, narrow = make(4), make(2)
    before = {name: sizes(module) for name, module in wide.named_modules()}
    after = {name: sizes(module) for name, module in narrow.named_modules()}
    changed = {name: own for name, own in after.items() if own != before[name]}
    assert changed
    resize(wide, changed)
    for module in (wide, narrow):
        if getattr(module, "to_add_out", None) is None:  # which this would be the width of
            module.out_context_dim = None
    assert told(wide) == told(narrow)
    shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (wide, narrow)]
    assert shapes[0] == shapes[1]


def check_dense(network: nn.Module) -> None:
    """The rules leave a dense network as it is, and know every number that its attentions hold."""
    before = told(network)
    sync_attributes(network)
    after = told(network)
    for name, module in network.named_modules():
        if type(network).__name__ == "Kandinsky3UNet":  # its constructor says 8 of any heads
            (
                before[name].pop("sliceable_head_dim", None),
                after[name].pop("sliceable_head_dim", None),
            )
        assert after[name] == before[name], name
        if hasattr(module, "to_q") or "Attention" in type(module).__name__:
            assert attributes(module).keys() <= KNOWN, name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_rules_hold_in_dense_networks(family):
    with torch.device("meta"):
        check_dense(getattr(diffusers, family.cls)(**family.config))


DEPTHS = ("num_layers", "num_single_layers", "depth", "num_refiner_layers", "num_blocks")


@pytest.mark.slow
def test_rules_hold_in_all_networks_of_diffusers():
    checked = 0
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if "Transformer" in name or "UNet" in name else None
        if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
            continue
        known = inspect.signature(cls.__init__).parameters
        shallow = {key: 1 for key in DEPTHS if key in known and isinstance(known[key].default, int)}
        try:
            with torch.device("meta"):
                network = cls(**shallow)
        except (TypeError, ValueError):  # it has no defaults, or needs its layers
            continue
        check_dense(network)
        checked += 1
    assert checked >= 60


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (4, 6)),
        (nn.Conv1d(6, 4, 3), (4, 6, 3)),
        (nn.Conv2d(6, 4, 3, bias=False), (4, 6, 3, 3)),
        (nn.Conv3d(6, 4, 1), (4, 6, 1, 1, 1)),
        (nn.Embedding(4, 6), (4, 6)),
    ],
)
def test_layers_keep_what_is_named(layer, shape):
    weight = layer.weight.detach().clone()
    if isinstance(layer, nn.Embedding):  # a row is an input
        narrow_layer(layer, None, torch.tensor([1, 2, 5]))
        assert torch.equal(layer.weight, weight[:, [1, 2, 5]])
        assert sizes(layer) == {"in": 4, "out": 3}
        return
    narrow_layer(layer, torch.tensor([1, 2, 5]), torch.tensor([0, 3]))
    assert torch.equal(layer.weight, weight[[0, 3]][:, [1, 2, 5]])
    assert sizes(layer) == {"in": 3, "out": 2}
    assert layer(torch.ones(1, 3, *shape[2:])).shape[1] == 2


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        diffusers.models.normalization.RMSNorm(6, eps=1e-6),
        diffusers.models.normalization.FP32LayerNorm(6),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_keep_what_is_named(norm):
    nn.init.normal_(norm.weight)
    weight = norm.weight.detach().clone()
    narrow_layer(norm, None, torch.tensor([1, 4]))
    assert sizes(norm) == {"channels": 2}
    assert torch.equal(norm.weight, weight[[1, 4]])
    inputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    fresh = type(norm)(2, eps=norm.eps)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(norm(inputs), fresh(inputs))


def test_depthwise_convolutions_keep_one_group_a_channel():
    layer = nn.Conv2d(6, 6, 3, groups=6)
    weight = layer.weight.detach().clone()
    narrow_layer(layer, None, torch.tensor([1, 4]))
    assert sizes(layer) == {"in": 2, "out": 2, "groups": 2}
    assert torch.equal(layer.weight, weight[[1, 4]])
    network = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6))
    resize(network, {"0": {"in": 2, "out": 2, "groups": 2}})
    assert network(torch.ones(1, 2, 3, 3)).shape == (1, 2, 1, 1)
