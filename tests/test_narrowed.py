"""Narrowed networks of any family: their function is the silenced one, and returns to the bit."""

import json

import diffusers
import pytest
import torch
from narrowing import FAMILIES, cut, cut_heads, output, silence_block, slim
from torch import nn

import prunedm
from prunedm.errors import UserError
from prunedm.networks.blocks import Skipped, drop_blocks, dropped_blocks
from prunedm.networks.narrowed import Narrowed, as_narrowed, narrowed, widths_of
from prunedm.networks.widths import attributes, sync_attributes

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def own_memory(network: nn.Module) -> nn.Module:
    """Weights aligned as those of a new network, not as in a mapped file: kernels differ by that."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    return network


@ALL
def test_it_computes_what_the_dense_network_does_with_silenced_units(family):
    silenced = family.network()
    cut(silenced, family, silence=True)
    silence_block(silenced, family.block)
    network, dense = slim(family), family.network()
    assert torch.allclose(output(network, family), output(silenced, family), atol=2e-6)
    assert not torch.allclose(output(network, family), output(dense, family), atol=2e-3)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in dense.parameters())


@ALL
def test_a_dropped_block_computes_what_a_silenced_one_does(family):
    network, silenced = family.network(), family.network()
    drop_blocks(network, [family.block])
    silence_block(silenced, family.block)
    assert torch.allclose(output(network, family), output(silenced, family), atol=1e-6)


@ALL
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_it_comes_back_to_the_bit(tmp_path, family, low_cpu_mem_usage):
    if not low_cpu_mem_usage and family.cls.startswith("Wan"):
        pytest.skip("diffusers refuses it for classes that keep layers in float32")
    network = slim(family)
    network.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()].count(".safetensors") == 1
    cls = getattr(prunedm, f"Pruned{family.cls}")
    assert type(network) is cls
    loaded, loading = cls.from_pretrained(
        tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, output_loading_info=True
    )
    assert not any(loading.values())
    assert torch.equal(output(own_memory(loaded), family), output(network, family))
    assert loaded.config.dropped == dropped_blocks(loaded) == [family.block]
    assert loaded.config.widths == widths_of(loaded)
    held = {name: attributes(module) for name, module in network.named_modules()}
    assert held == {name: attributes(module) for name, module in loaded.named_modules()}


def test_the_type_of_the_file_stays_and_shards_are_read(tmp_path):
    family = FAMILIES["sd3"]
    network = slim(family).to(torch.bfloat16)
    network.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(network).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(output(loaded, family), output(network, family))


def test_one_class_each_and_none_for_what_is_no_model():
    cls = narrowed(diffusers.FluxTransformer2DModel)
    assert cls is narrowed(cls) is prunedm.PrunedFluxTransformer2DModel
    assert issubclass(cls, diffusers.FluxTransformer2DModel)
    assert issubclass(cls, Narrowed)
    for name in ("PrunedDDPMPipeline", "PrunedNothing", "PrunedDDPMScheduler", "Pruned"):
        with pytest.raises(AttributeError, match=name):
            getattr(prunedm, name)
    with pytest.raises(UserError, match="DDPMScheduler is not a model class"):
        narrowed(diffusers.DDPMScheduler)


def test_narrowing_goes_on_from_a_narrowed_network(tmp_path):
    family = FAMILIES["sd3"]
    network = slim(family)
    drop_blocks(network, ["transformer_blocks.2"])
    cut(network, type(family)("", {}, {}, hidden={"transformer_blocks.1.ff": 1}))
    as_narrowed(network).save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert loaded.config.dropped == ["transformer_blocks.0", "transformer_blocks.2"]
    assert torch.equal(output(loaded, family), output(network, family))


def test_heads_that_were_not_set_are_noticed():
    """Without norms of queries, diffusers runs on with heads of another size."""
    family = FAMILIES["dit"]
    network = family.network()
    cut_heads(network, family.heads[0])
    network.get_submodule(family.heads[0]).heads = 4
    assert output(network, family).isfinite().all()
    sync_attributes(network)  # narrower heads are what it says now, and what is saved
    assert network.get_submodule(family.heads[0]).scale == 4**-0.5
    network.get_submodule(family.heads[0]).heads = 3
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn1.*3 heads do not divide 16"):
        as_narrowed(network)


def test_query_heads_that_share_keys_stay_in_proportion():
    family = FAMILIES["lumina2"]
    network = family.network()
    attention = network.layers[1].attn
    heads = [attention.heads, attention.to_q.out_features // attention.to_k.out_features]
    assert heads == [6, 3]
    for layer, positions in ((attention.to_q, 24), (attention.to_k, 8), (attention.to_v, 8)):
        prunedm.networks.widths.narrow_layer(layer, None, torch.arange(positions))
    prunedm.networks.widths.narrow_layer(attention.to_out[0], torch.arange(24), None)
    attention.heads = 3
    silenced = family.network()
    silenced.layers[1].attn.to_out[0].weight.data[:, 24:] = 0
    as_narrowed(network)
    assert torch.allclose(output(network, family), output(silenced, family), atol=2e-6)
    prunedm.networks.widths.narrow_layer(attention.to_q, None, torch.arange(20))
    prunedm.networks.widths.narrow_layer(attention.to_out[0], torch.arange(20), None)
    attention.heads = 5
    with pytest.raises(UserError, match="5 heads cannot share 2 keys"):
        as_narrowed(network)


FLUX, SD3, DIT = FAMILIES["flux"], FAMILIES["sd3"], FAMILIES["dit"]
FF, ATTENTION = "transformer_blocks.0.ff", "transformer_blocks.0.attn"


@pytest.mark.parametrize(
    ("family", "widths", "message"),
    [
        (SD3, {f"{FF}.net.2": {"in": -3, "out": 32}}, r"net\.2.* 1 or more"),
        (SD3, {f"{FF}.net.2": {"in": True, "out": 32}}, r"net\.2.* 1 or more"),
        (SD3, {f"{FF}.net.2": {"in": 10**12, "out": 32}}, r"net\.2.*10{12} wide .*128 wide before"),
        (SD3, {f"{FF}.net.2": {"in": 96, "out": 32}}, r"net\.0\.proj.*128 wide.*needs 96"),
        (SD3, {f"{FF}.net.2": {"in": 96}}, r"net\.2.*Linear.*in, out"),
        (SD3, {f"{FF}.net.9": {"in": 96, "out": 32}}, r"no module named .*net\.9"),
        (SD3, {f"{FF}.net.2": 4}, "not a table"),
        (SD3, [3], "not a table"),
        (SD3, {FF: {"heads": 4}}, r"ff.*FeedForward.*nothing"),
        (SD3, {ATTENTION: {"heads": 3}}, "3 heads do not divide 32"),
        (SD3, {ATTENTION: {"heads": 8}}, "8 wide .*4 wide before"),
        (SD3, {f"{ATTENTION}.add_q_proj": {"in": 32, "out": 16}}, r"add_q_proj.*16 wide.*needs 32"),
        (SD3, {f"{ATTENTION}.norm_q": {"channels": 0}}, r"norm_q.* 1 or more"),
        (
            FLUX,
            {"single_transformer_blocks.0.proj_out": {"in": 96, "out": 32}},
            r"proj_mlp.*needs 64",
        ),
    ],
)
def test_widths_that_do_not_fit_are_refused(family, widths, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        narrowed(getattr(diffusers, family.cls))(**family.config, widths=widths)


@pytest.mark.parametrize(
    ("family", "dropped", "message"),
    [
        ("dit", ["transformer_blocks.9"], r"no block named 'transformer_blocks\.9'"),
        ("dit", ["transformer_blocks.1", "transformer_blocks.1"], "not one of a row"),
        ("dit", [""], "no block named ''"),
        ("dit", [7], "no block named 7"),
        ("dit", "transformer_blocks.1", "not a list"),
        ("dit", 3, "not a list"),
        ("dit", ["transformer_blocks"], "not one of a row"),
        ("dit", ["proj_out_1"], "not one of a row"),
        (
            "dit",
            ["transformer_blocks.0"],
            "also uses parts of",
        ),  # its embedding of times and classes
        ("unet2d", ["down_blocks.0"], "DownBlock2D returns more than"),
        ("unet2d", ["down_blocks.0.downsamplers.0"], "changes the size"),
        ("unet2d", ["up_blocks.1.resnets.0"], "48 channels into 16"),
        ("unet2d", ["conv_in"], "not one of a row"),
    ],
)
def test_blocks_that_cannot_be_left_out_are_refused(family, dropped, message):
    family = FAMILIES[family]
    with torch.device("meta"), pytest.raises(UserError, match=message):
        narrowed(getattr(diffusers, family.cls))(**family.config, dropped=dropped)


def test_a_damaged_config_is_refused_by_from_pretrained(tmp_path):
    network = slim(FAMILIES["sd3"])
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["widths"]["transformer_blocks.1.ff_context.net.2"]["in"] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="128 wide before"):
        type(network).from_pretrained(tmp_path)


def test_what_no_config_can_say_is_refused():
    network = FAMILIES["pixart"].network()
    table = network.transformer_blocks[0].scale_shift_table
    network.transformer_blocks[0].scale_shift_table = nn.Parameter(table[:3])
    with pytest.raises(UserError, match=r"0\.scale_shift_table is \(3, 32\), but \(6, 32\) when"):
        as_narrowed(network)
    network = FAMILIES["pixart"].network()
    network.transformer_blocks[0].attn1.to_q.extra = 7
    with pytest.raises(UserError, match=r"to_q\.extra is 7, which a config cannot say"):
        as_narrowed(network)


def test_the_blocks_that_stay_keep_their_names():
    network = slim(FAMILIES["sd3"])
    assert isinstance(network.transformer_blocks[0], Skipped)
    assert not any(name.startswith("transformer_blocks.0.") for name in network.state_dict())
    assert any(name.startswith("transformer_blocks.2.") for name in network.state_dict())
