"""Channel removal: against a dense model with silenced channels, and against counted costs."""

from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunedm import PrunedUNet2DModel
from prunedm.architecture import answer
from prunedm.networks.layers import layer_positions
from prunedm.networks.narrowed import _dense_config, as_narrowed, widths_of
from prunedm.removal.channels.groups import ChannelGroup, channel_groups
from prunedm.removal.channels.plan import (
    ChannelPlan,
    block_importance,
    plan_channels,
    remove_channels,
)
from prunedm.removal.channels.target import count_params, planned_macs

PROTECTED = ("conv_in", "conv_out", "time_embedding", "class_embedding")
ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 8}
CONFIGS = {
    "plain": PLAIN,
    "one_head": ATTENTION | {"attention_head_dim": None},
    "heads": ATTENTION | {"attention_head_dim": 8, "layers_per_block": 2},
    "classes": ATTENTION | {"attention_head_dim": 8, "num_class_embeds": 5},
    "scale_shift": ATTENTION | {"attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift"},
    "no_attention": PLAIN | {"add_attention": False},
    "no_mid_block": PLAIN | {"mid_block_type": None},
    "resnet_resampling": ATTENTION | RESNET,
    "resnet_blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
}
# Concatenations of equal widths keep norm groups whole, so that removal can be exact.
SIZES = {"block_out_channels": (16, 16), "norm_num_groups": 4, "layers_per_block": 1}


def unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    model = UNet2DModel(sample_size=8, **(SIZES | options)).eval()
    for parameter in model.parameters():  # norms start at 1 and 0, where a wrong index goes unseen
        nn.init.normal_(parameter, std=0.3)
    return model


def problem(model: UNet2DModel, size: int = 8) -> dict[str, torch.Tensor]:
    sample_NCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    inputs = {"sample": sample_NCHW, "timestep": torch.tensor([7, 7])}
    labelled = model.config.num_class_embeds is not None
    return inputs | ({"class_labels": torch.tensor([1, 4])} if labelled else {})


def output(model: UNet2DModel, size: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return answer(model, problem(model, size))


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: torch.rand(m.weight.shape, generator=generator) for n, m in layers.items()}


def groups_of(model: UNet2DModel, **options) -> list[ChannelGroup]:
    return channel_groups(model, problem(model), **options)


def plan_for(model: UNet2DModel, ratio: float = 0.4, round_to: int = 4, **options) -> ChannelPlan:
    positions = layer_positions(model, problem(model))
    options = {"scores": random_scores(model), "positions": positions} | options
    return plan_channels(model, groups_of(model, round_to=round_to), ratio=ratio, **options)


@torch.no_grad()
def silence(model: UNet2DModel, plan: ChannelPlan) -> None:
    """Cut what leaves the removed channels; a narrower single head must not compare by them."""
    for (name, side), keep in plan.keep.items():
        module = model.get_submodule(name)
        gone = torch.ones(module.weight.shape[int(side == "in")], dtype=torch.bool)
        gone[keep] = False
        if side == "in":
            module.weight[:, gone] = 0
        elif name.endswith("to_q") and model.get_submodule(name.removesuffix(".to_q")).heads == 1:
            module.weight[gone] = 0
            module.bias[gone] = 0


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("protect", [PROTECTED, ()], ids=["protected", "free"])
def test_removed_channels_are_as_good_as_silent(options, protect):
    model = unet(**options)
    groups = channel_groups(model, problem(model), protect=protect)
    plan = plan_channels(
        model, groups, scores=random_scores(model), ratio=0.4, target_kind="channels"
    )
    assert not plan.regrouped
    silenced, dense = deepcopy(model), output(model)
    silence(silenced, plan)
    remove_channels(model, plan)
    assert plan.figures["channels_removed"] > 0.25
    assert (output(silenced) - dense).abs().max() > 1e-2
    torch.testing.assert_close(output(model), output(silenced), rtol=1e-5, atol=1e-5)
    assert output(model, size=16).shape[-1] == 16


def test_blocks_align_to_the_larger_norm_groups_of_a_concatenation():
    model = unet(**CONFIGS["plain"])
    blocks = {g.name: {len(b) for b in g.blocks} for g in groups_of(model, round_to=1)}
    assert model.up_blocks[0].resnets[1].norm1.num_channels == 32  # in 4 groups of 8
    assert blocks["up_blocks.0.resnets.0.conv1"] == {4}
    assert blocks["up_blocks.0.resnets.0.conv_shortcut"] == {8}
    joined = {g.name: {len(b) for b in g.blocks} for g in groups_of(model, round_to=8)}
    assert joined["up_blocks.0.resnets.0.conv1"] == {8}


def test_regrouping_takes_the_nearest_group_size():
    model = unet(block_out_channels=(64, 128), norm_num_groups=32, **CONFIGS["plain"])
    plan = plan_for(model, 0.25, target_kind="channels")
    norm = "up_blocks.1.resnets.0.norm1"
    assert norm in plan.regrouped  # 128 + 64 in groups of 6
    width = len(plan.keep[norm, "out"])
    distance = abs(width / plan.norm_groups[norm] - 6)
    assert all(distance <= abs(width / d - 6) for d in range(1, width + 1) if width % d == 0)


@pytest.mark.parametrize("target_kind", ["params", "macs", "channels"])
def test_the_ratio_is_reached_nearly(target_kind):
    model = unet(block_out_channels=(32, 64), norm_num_groups=8, **CONFIGS["one_head"])
    plan = plan_for(model, 0.3, target_kind=target_kind)
    assert plan.figures[f"{target_kind}_removed"] == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_costs_are_those_of_the_pruned_model(options):
    model = unet(**options)
    plan = plan_for(model, 0.3, target_kind="channels")
    macs_before = counted_macs(model)
    remove_channels(model, plan)
    positions = layer_positions(model, problem(model))
    assert plan.figures["macs_before"] == macs_before
    assert plan.figures["macs_after"] == planned_macs(model, positions) == counted_macs(model)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert plan.figures["params_after"] == count_params(model) == real


def counted_macs(model: UNet2DModel) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        batch = len(output(model))
    return counter.get_total_flops() // 2 // batch


def test_protected_layers_are_untouched():
    model = unet(**CONFIGS["classes"])
    before = {n: p.clone() for n, p in model.named_parameters() if n.startswith(PROTECTED)}
    remove_channels(model, plan_for(model, 0.5))
    after = dict(model.named_parameters())
    assert len(before) == 9
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_less_protection_frees_more_but_not_the_interface():
    model = unet(**CONFIGS["classes"])
    layers = {c.layer for g in groups_of(model, protect=()) for c in g.couplings}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= layers
    assert "class_embedding" not in layers
    plain = groups_of(unet(**CONFIGS["plain"]), protect=(), round_to=1)
    sides = {(coupling.layer, coupling.side) for group in plain for coupling in group.couplings}
    assert not sides & {("conv_in", "in"), ("conv_out", "out"), ("time_embedding.linear_2", "out")}
    kept = {c.layer for g in groups_of(model, protect=["down_blocks.0"]) for c in g.couplings}
    assert not any(layer.startswith("down_blocks.0") for layer in kept)


def test_whole_heads_go_and_widths_stay_multiples():
    model = unet(block_out_channels=(32, 64), **CONFIGS["heads"])
    plan = plan_for(model, 0.4)
    assert plan.heads
    for name, heads in plan.heads.items():
        kept = plan.keep[f"{name}.to_q", "out"].reshape(heads, 8)
        assert (kept % 8 == torch.arange(8)).all()
    assert all(len(keep) % 4 == 0 for keep in plan.keep.values())
    remove_channels(model, plan)
    attentions = {n: m for n, m in model.named_modules() if isinstance(m, Attention)}
    assert all(attentions[n].inner_dim == 8 * heads for n, heads in plan.heads.items())


def test_a_narrower_head_keeps_the_scale_of_its_products():
    model = unet(**CONFIGS["one_head"])
    attention = model.mid_block.attentions[0]
    query = attention.to_q.weight.clone()
    plan = plan_for(model, 0.5, target_kind="channels")
    rows = plan.keep["mid_block.attentions.0.to_q", "out"]
    columns = plan.keep.get(("mid_block.attentions.0.to_q", "in"), torch.arange(16))
    remove_channels(model, plan)
    scale = (len(rows) / 16) ** 0.5
    torch.testing.assert_close(attention.to_q.weight, query[rows][:, columns] * scale)
    assert attention.scale == len(rows) ** -0.5


def test_the_least_important_blocks_go():
    model = unet(**CONFIGS["plain"])
    scores = {name: torch.ones_like(score) for name, score in random_scores(model).items()}
    target = "mid_block.resnets.0.conv1"
    scores[target][4:8] = 0.0
    plan = plan_channels(model, groups_of(model), scores=scores, ratio=0.025)
    assert plan.keep[target, "out"].tolist() == [0, 1, 2, 3, *range(8, 16)]
    assert plan.keep["mid_block.resnets.0.conv2", "in"].equal(plan.keep[target, "out"])
    assert plan.norm_groups == {"mid_block.resnets.0.norm2": 3}


def test_importance_by_hand():
    model = unet(**CONFIGS["plain"])
    group = next(g for g in groups_of(model) if g.name == "mid_block.resnets.0.conv1")
    made, used = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"
    scores = {made: torch.zeros(16, 16, 3, 3), used: torch.zeros(16, 16, 3, 3)}
    scores[made] += torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 2, 2, 2, 2])[
        :, None, None, None
    ]
    scores[used] += 5 * torch.tensor([0.0] * 12 + [4.0] * 4)[:, None, None]
    want = {
        "first": [0.5, 1, 1.5, 1],
        "sum": [0.5, 1, 1.5, 5],
        "mean": [0.25, 0.5, 0.75, 2.5],
        "max": [0.5, 1, 1.5, 4],
    }
    for reduction, values in want.items():
        importance_B = block_importance(group, scores, reduction=reduction)
        assert importance_B.tolist() == pytest.approx(values)


def test_no_group_loses_more_than_max_ratio():
    model = unet(block_out_channels=(32, 32), norm_num_groups=8, **CONFIGS["plain"])
    scores = {name: torch.ones_like(score) for name, score in random_scores(model).items()}
    scores["mid_block.resnets.0.conv1"] *= 0  # every block of this group ranks lowest
    plan = plan_channels(model, groups_of(model), scores=scores, ratio=0.3, max_ratio=0.5)
    widths = {group.name: group.channels for group in groups_of(model)}
    for name, channels in widths.items():
        assert len(plan.keep.get((name, "out"), range(channels))) >= channels / 2


def test_an_impossible_ratio_names_the_largest():
    model = unet(**CONFIGS["plain"])
    with pytest.raises(ValueError, match=r"0\.\d+ is the largest") as error:
        plan_for(model, 0.9)
    largest = float(str(error.value).split(": ")[1].split(" ")[0])
    assert plan_for(model, largest).figures["params_removed"] == pytest.approx(largest, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.8, "target_kind": "channels"}, "at most 0.7 of a layer"),
        ({"ratio": 0.3, "scores": {}}, "no score"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_for(unet(**CONFIGS["plain"]), **options)


def test_nothing_to_remove_is_an_error():
    model = unet(**CONFIGS["plain"])
    assert (
        groups_of(model, protect=["time_embedding", "down_blocks", "mid_block", "up_blocks"]) == []
    )
    with pytest.raises(ValueError, match="no layer has two blocks"):
        plan_channels(model, [], scores=random_scores(model), ratio=0.3)


def test_a_pruned_model_can_be_pruned_again():
    model = unet(block_out_channels=(32, 32), norm_num_groups=8, **CONFIGS["one_head"])
    remove_channels(model, plan_for(model, 0.2))
    again = as_narrowed(model)
    plan = plan_for(again, 0.3, target_kind="channels", scores=random_scores(again, seed=3))
    silenced = deepcopy(again)
    silence(silenced, plan)
    remove_channels(again, plan)
    assert not plan.regrouped
    torch.testing.assert_close(output(again), output(silenced), rtol=1e-5, atol=1e-5)
    once_more = as_narrowed(again)
    assert once_more.config.widths == again.config.widths  # kept up by remove_channels


def test_planning_leaves_the_model_alone():
    model = unet(**CONFIGS["heads"]).train().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan_for(model)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("ratio", [0.13, 0.2, 0.31, 0.4])
def test_smaller_blocks_fill_what_the_ranking_leaves(kind, ratio):
    model = unet(block_out_channels=(32, 64), **CONFIGS["heads"])
    plan = plan_channels(
        model,
        groups_of(model),
        scores=random_scores(model),
        ratio=ratio,
        target_kind=kind,
        positions=layer_positions(model, problem(model)),
    )
    assert plan.figures[f"{kind}_removed"] == pytest.approx(ratio, rel=0.01)


def test_the_same_share_of_channels_is_met_over_all_layers_together():
    model = unet(block_out_channels=(32, 64), **CONFIGS["heads"])
    plan = plan_channels(
        model, groups_of(model), scores=random_scores(model), ratio=0.3, target_kind="channels"
    )
    assert plan.figures["channels_removed"] == pytest.approx(0.3, rel=0.01)
    for group in groups_of(model):
        kept = plan.keep.get((group.name, "out"))
        lost = 0 if kept is None else 1 - len(kept) / group.channels
        assert abs(lost - 0.3) <= 1 / len(group.blocks) + 1e-9


@pytest.mark.parametrize("name", ["heads", "classes", "scale_shift", "resnet_resampling"])
def test_removal_is_a_new_small_network_with_the_kept_channels_copied(name):
    model = unet(block_out_channels=(32, 64), **CONFIGS[name])
    dense = deepcopy(model)
    plan = plan_for(model, 0.3)
    remove_channels(model, plan)
    small = PrunedUNet2DModel(**_dense_config(dense), widths=widths_of(model)).eval()
    layers = dict(dense.named_modules())
    with torch.no_grad():
        for layer, module in small.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                value = getattr(layers[layer], kind)
                for axis, side in enumerate(("out", "in")[: value.ndim]):
                    kept = plan.keep.get((layer, side), torch.arange(value.shape[axis]))
                    value = torch.stack([value.select(axis, int(k)) for k in kept], axis)
                parameter.copy_(value)
    torch.testing.assert_close(output(model), output(small), rtol=1e-6, atol=1e-6)
