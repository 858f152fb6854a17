"""Tiny random networks of many families, narrowed by hand, for tests of what narrowing must hold."""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
from torch import nn

from prunedm.networks.blocks import drop_blocks
from prunedm.networks.narrowed import as_narrowed
from prunedm.networks.widths import narrow_layer

SIZES = {"num_attention_heads": 4, "attention_head_dim": 8}
UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}
SEED = 3


def drawn(*shape: int) -> torch.Tensor:
    """Noise, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Family:
    """A class, a tiny config, inputs, and what is cut from it: by the name of the module."""

    cls: str
    config: dict
    inputs: dict
    hidden: dict[str, int] = field(
        default_factory=dict
    )  # feed-forward => halves of its first layer
    heads: tuple[str, ...] = ()  # attentions, of whose heads 1 and 2 stay
    resnets: tuple[str, ...] = ()  # of whose inner channels half stay
    block: str = ""  # dropped

    def network(self, **options) -> nn.Module:
        """A random one with the same weights every time, also where diffusers starts with zeros."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            network = getattr(diffusers, self.cls)(**(self.config | options)).eval()
            for parameter in network.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape)
        return network


FAMILIES = {
    "unet2d": Family(
        "UNet2DModel",
        UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        {"sample": drawn(2, 3, 8, 8), "timestep": torch.tensor(7)},
        heads=("mid_block.attentions.0", "down_blocks.1.attentions.0"),
        resnets=("mid_block.resnets.0", "up_blocks.0.resnets.1"),
        block="mid_block.attentions.0",
    ),
    "unet2d_condition": Family(
        "UNet2DConditionModel",
        UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,  # which are heads
            "cross_attention_dim": 12,
        },
        {
            "sample": drawn(2, 4, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": drawn(2, 5, 12),
        },
        hidden={"down_blocks.1.attentions.0.transformer_blocks.0.ff": 2},
        heads=(
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
        ),
        resnets=("down_blocks.1.resnets.0",),
        block="mid_block.attentions.0",
    ),
    "dit": Family(
        "DiTTransformer2DModel",
        SIZES | {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8},
        {
            "hidden_states": drawn(2, 4, 8, 8),
            "timestep": torch.tensor([7, 9]),
            "class_labels": torch.tensor([1, 4]),
        },
        hidden={"transformer_blocks.0.ff": 1, "transformer_blocks.2.ff": 1},
        heads=("transformer_blocks.0.attn1",),
        block="transformer_blocks.1",
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        SIZES
        | {
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "cross_attention_dim": 32,
            "caption_channels": 6,
            "use_additional_conditions": False,
        },
        {
            "hidden_states": drawn(2, 4, 8, 8),
            "timestep": torch.tensor([7, 9]),
            "encoder_hidden_states": drawn(2, 5, 6),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        hidden={"transformer_blocks.0.ff": 1},
        heads=("transformer_blocks.0.attn1", "transformer_blocks.2.attn2"),
        block="transformer_blocks.1",
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        SIZES
        | {
            "sample_size": 8,
            "num_layers": 3,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (1,),
        },
        {
            "hidden_states": drawn(2, 4, 8, 8),
            "timestep": torch.tensor([7.0, 9.0]),
            "encoder_hidden_states": drawn(2, 5, 12),
            "pooled_projections": drawn(2, 10),
        },
        hidden={"transformer_blocks.0.ff": 1, "transformer_blocks.1.ff_context": 1},
        heads=(
            "transformer_blocks.1.attn",
            "transformer_blocks.1.attn2",
            "transformer_blocks.2.attn",
        ),
        block="transformer_blocks.0",
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        SIZES
        | {
            "attention_head_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
        },
        {
            "hidden_states": drawn(2, 16, 4),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": drawn(2, 5, 12),
            "pooled_projections": drawn(2, 10),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        hidden={"transformer_blocks.0.ff": 1, "single_transformer_blocks.0": 1},
        heads=("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        block="single_transformer_blocks.1",
    ),
    "wan": Family(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 10,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        },
        {
            "hidden_states": drawn(1, 4, 2, 8, 8),
            "timestep": torch.tensor([7]),
            "encoder_hidden_states": drawn(1, 5, 10),
        },
        hidden={"blocks.0.ffn": 1},
        block="blocks.1",
    ),
    "lumina2": Family(  # three query heads share a key head
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 12,
        },
        {
            "hidden_states": drawn(2, 4, 8, 8),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": drawn(2, 5, 12),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
        block="layers.0",
    ),
}


@torch.no_grad()
def output(network: nn.Module, family: Family) -> torch.Tensor:
    """The network's answer to the family's inputs."""
    weight = next(network.parameters())

    def cast(value: object) -> object:
        content = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(weight.dtype) if content else value

    return network(**{n: cast(v) for n, v in family.inputs.items()}, return_dict=False)[0]


def cut_hidden(network: nn.Module, name: str, halves: int, *, silence: bool = False) -> None:
    """Two of three hidden units stay."""
    block = network.get_submodule(name)
    offset = 0
    if hasattr(block, "proj_mlp"):  # Flux's last layer reads the attention first
        makes, reads = block.proj_mlp, block.proj_out
        offset = block.attn.to_q.out_features
    else:
        makes, reads = block.net[0].proj, block.net[2]
    count = reads.in_features - offset
    kept = torch.tensor([unit for unit in range(count) if unit % 3])
    keep_in = torch.cat([torch.arange(offset), offset + kept])
    if silence:
        return silence_inputs(reads, keep_in)
    narrow_layer(makes, None, torch.cat([kept + half * count for half in range(halves)]))
    return narrow_layer(reads, keep_in, None)


def cut_heads(network: nn.Module, name: str, *, silence: bool = False) -> None:
    """Heads 1 and 2 stay, of both streams."""
    attention = network.get_submodule(name)
    size = attention.to_q.out_features // attention.heads
    kept = torch.arange(size, 3 * size)
    readers = [getattr(attention, "to_add_out", None)]
    readers += [attention.to_out[0]] if getattr(attention, "to_out", None) else []
    for reader in filter(None, readers):
        silence_inputs(reader, kept) if silence else narrow_layer(reader, kept, None)
    if not hasattr(attention, "to_out") or attention.to_out is None:  # Flux's single blocks
        reader = network.get_submodule(name.rpartition(".")[0]).proj_out
        rest = torch.arange(attention.to_q.out_features, reader.in_features)
        keep_in = torch.cat([kept, rest])
        silence_inputs(reader, keep_in) if silence else narrow_layer(reader, keep_in, None)
    if not silence:
        for child in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            if isinstance(layer := getattr(attention, child, None), nn.Linear):
                narrow_layer(layer, None, kept)
        attention.heads = 2


def cut_resnet(network: nn.Module, name: str, *, silence: bool = False) -> None:
    """The even norm groups of the inner channels stay."""
    block = network.get_submodule(name)
    size = block.norm2.num_channels // block.norm2.num_groups
    kept = (torch.arange(block.norm2.num_channels) // size % 2 == 0).nonzero().flatten()
    if silence:
        return silence_inputs(block.conv2, kept)
    for layer in (block.conv1, block.time_emb_proj, block.norm2):
        narrow_layer(layer, None, kept)
    block.norm2.num_groups //= 2
    return narrow_layer(block.conv2, kept, None)


def cut(network: nn.Module, family: Family, *, silence: bool = False) -> nn.Module:
    """All that the family says, cut out, or silenced: the same function by another way."""
    for name in family.heads:
        cut_heads(network, name, silence=silence)
    for name, halves in family.hidden.items():
        cut_hidden(network, name, halves, silence=silence)
    for name in family.resnets:
        cut_resnet(network, name, silence=silence)
    return network


def slim(family: Family, **options) -> nn.Module:
    """A network with everything cut that the family says, and a block dropped."""
    network = family.network(**options)
    cut(network, family)
    drop_blocks(network, [family.block])
    return as_narrowed(network)


def silence_inputs(layer: nn.Module, kept: torch.Tensor) -> None:
    """The other inputs count for nothing."""
    gone = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    layer.weight.data[:, gone] = 0


def silence_block(network: nn.Module, name: str) -> None:
    """A block whose branches add zero."""
    ends = ("to_out.0", "to_add_out", "net.2", "proj_out", "conv2")
    ends += ("linear_2", "norm2.weight")  # Lumina
    block = network.get_submodule(name)
    for own, parameter in block.named_parameters():
        layer = own.rpartition(".")[0]
        if any(layer == end or layer.endswith("." + end) for end in ends):
            parameter.data.zero_()


Cut = Callable[[nn.Module, Family], nn.Module]
