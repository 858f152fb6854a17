"""Heads, hidden units and blocks of language models: found by derivatives, cut exactly, loaded again."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from language import language_model, network, text_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import prunedm
from prunedm.architecture import answer, architecture_of, example
from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.networks.chain import chained_blocks
from prunedm.networks.depth import remove_blocks
from prunedm.networks.layer_kinds import weight_of
from prunedm.networks.layers import layer_positions, prunable_layers
from prunedm.networks.narrowed import Narrowed, as_narrowed
from prunedm.options import ExportOptions, FinetuneOptions, PruneOptions
from prunedm.removal.channels.inner import inner_groups
from prunedm.removal.channels.plan import _plan as plan_of
from prunedm.removal.channels.plan import plan_channels, remove_channels
from prunedm.removal.channels.target import planned_macs
from prunedm.scores import score_layers

# class => configuration, heads of each block's groups of heads, units of its other groups
HEADS = {
    "LlamaForCausalLM": ({"tie_word_embeddings": True}, [2], [64]),
    "Qwen3ForCausalLM": ({"head_dim": 8}, [2], [64]),  # norms over each head
    "Gemma3ForCausalLM": ({"head_dim": 8, "sliding_window": 32}, [2], [64]),
    "PhiForCausalLM": ({"pad_token_id": 0}, [2], [64]),  # both branches read the same norm
    "GPT2LMHeadModel": ({}, [4], [128]),  # one Conv1D for q, k and v
    "GPTNeoXForCausalLM": ({}, [4], [64]),  # one Linear, head by head
    "OPTForCausalLM": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, [4], [64]),
    "MixtralForCausalLM": ({"num_local_experts": 4, "num_experts_per_tok": 2}, [2], []),
    "CodeGenForCausalLM": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, [4], [128]),
}
# and those whose heads cannot be cut: why
HIDDEN = {
    "Olmo2ForCausalLM": {},  # one norm over all heads
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},  # positions by head, from outside the block
    "Phi3ForCausalLM": {"pad_token_id": 0},  # heads are counted in the config alone
    "GptOssForCausalLM": {"head_dim": 8, "num_local_experts": 4},  # a weight a head beside layers
}

ONE_HEAD = {"params": 0.022, "macs": 0.16, "channels": 0.5}  # of Mixtral, whose experts stay


def groups_of(model, round_to=4):
    return inner_groups(
        model, example(model), protect=architecture_of(model).protect, round_to=round_to
    )


def narrow(model, ratio=0.1, kind="params", **options):
    """The model narrowed in place, and a copy in which the readers' columns of the units are zero."""
    zeroed, groups = copy.deepcopy(model), groups_of(model)
    plan = plan_channels(
        model,
        groups,
        scores=score_layers(model, prunable_layers(model), "magnitude"),
        ratio=ratio,
        target_kind=kind,
        positions=layer_positions(model, example(model)),
        **options,
    )
    zero_columns(zeroed, plan)
    remove_channels(model, plan)
    attention = model.config._attn_implementation
    model = as_narrowed(model)
    assert model.config._attn_implementation == attention is not None
    return model, zeroed, plan


@torch.no_grad()
def zero_columns(model, plan):
    """Of the layers that read the units of a plan: as if the units answered with zeros."""
    for (layer, side), kept in plan.keep.items():
        if side == "in":
            weight = weight_of(model.get_submodule(layer))
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[kept] = False
            weight[:, gone] = 0


@pytest.mark.parametrize("cls", HEADS)
def test_heads_and_hidden_units_are_found(cls):
    config, heads, hidden = HEADS[cls]
    model = network(cls, **config)
    found = groups_of(model)
    for name in chained_blocks(model):
        own = [group for group in found if group.name.startswith(f"{name}.")]
        assert [group.channels for group in own if group.heads] == heads
        assert [group.channels for group in own if not group.heads] == hidden


@pytest.mark.parametrize("cls", HIDDEN)
def test_heads_that_cannot_be_cut_alone_are_not_offered(cls):
    assert not [group for group in groups_of(network(cls, **HIDDEN[cls])) if group.heads]


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_units_are_those_of_transformers_tensor_parallel_plan(cls):
    """What a plan splits by columns feeds what it splits by rows, over the same heads or units."""
    model = network(cls, **HEADS[cls][0])
    plan = {
        f"model.{pattern}".replace("*", "0"): how
        for pattern, how in type(model.config).base_model_tp_plan.items()
        if "*" in pattern
    }
    columns = {name for name, how in plan.items() if how.startswith("colwise")}
    rows = {name for name, how in plan.items() if how.startswith("rowwise")}
    first = [g for g in groups_of(model) if g.name.startswith("model.layers.0.")]
    assert {c.layer for g in first for c in g.couplings if c.side == "out"} == columns
    assert {c.layer for g in first for c in g.couplings if c.side == "in"} == rows
    for coupling in (c for group in first if group.heads for c in group.couplings):
        layer = model.get_submodule(coupling.layer)  # heads lie one after the other
        each = (layer.out_features if coupling.side == "out" else layer.in_features) // 2
        assert torch.equal(coupling.index_P // each, coupling.channel_P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_unit_is_found_behind_relu_and_in_half_precision(dtype):
    """A ReLU that is off has no derivative; half types round what is compared."""
    config = HEADS["OPTForCausalLM"][0] | {"ffn_dim": 4096}
    model = network("OPTForCausalLM", **config).to(dtype)
    found = groups_of(model, round_to=16)
    assert [(group.channels, len(group.blocks)) for group in found] == [(4, 4), (4096, 256)] * 2


def test_gated_units_and_interleaved_heads_by_hand():
    llama, neox = network(), network("GPTNeoXForCausalLM")
    (mlp,) = (g for g in groups_of(llama) if g.name == "model.layers.0.mlp.gate_proj")
    assert all(
        torch.equal(c.index_P, c.channel_P) for c in mlp.couplings
    )  # row i of each, column i
    assert len(mlp.couplings) == 3
    (heads,) = (g for g in groups_of(neox) if g.heads and ".0." in g.name)
    maker, reader = heads.couplings
    assert torch.equal(
        maker.index_P // (3 * 8), maker.channel_P
    )  # q, k, v of a head, then the next
    assert torch.equal(reader.index_P // 8, reader.channel_P)


@pytest.mark.parametrize("kind", ["params", "macs", "channels"])
@pytest.mark.parametrize("cls", HEADS)
def test_narrowing_equals_zeroing_and_loads_in_transformers(cls, kind, tmp_path):
    ratio = ONE_HEAD[kind] if cls == "MixtralForCausalLM" else 0.05
    model, zeroed, plan = narrow(network(cls, **HEADS[cls][0]), ratio, kind)
    inputs = example(model)
    made = answer(model, inputs).detach()
    torch.testing.assert_close(made, answer(zeroed, inputs).detach(), atol=1e-5, rtol=1e-5)
    assert plan.figures[f"{kind}_removed"] == pytest.approx(ratio, rel=0.3)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(answer(again, inputs), made)
    tokens = inputs["input_ids"][:, :4]
    told = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(tokens, **told), model.generate(tokens, **told))


def test_planned_macs_are_those_of_the_narrowed_network():
    model, _, plan = narrow(network(head_dim=8), 0.2, "macs")
    readers = [n for n in layer_positions(model, example(model)) if n.endswith("o_proj")]
    positions = layer_positions(model, example(model))
    assert plan.figures["macs_after"] == planned_macs(model, positions, readers=readers)


def prune(source, out, **options):
    told = {"dataset": str(text_file()), "device": "cpu", "calibration_problems": 8, "problems": 4}
    prunedm.prune(source, out, PruneOptions(**told | options))
    return load(out), json.loads((out / "pruning_stats.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM"])
def test_even_widths_keep_the_class_that_plain_transformers_has(cls, tmp_path):
    source = language_model(cls, **HEADS[cls][0])
    options = {"target": "params=0.1", "channels": {"loadable_by": "transformers"}}
    model, stats = prune(source, tmp_path / "out", **options)
    assert not isinstance(model.denoiser, Narrowed)
    assert stats["achieved"]["params"] == pytest.approx(0.1, rel=0.06)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [cls]
    assert "widths" not in config
    assert not config["model_type"].startswith("prunedm")


def test_even_widths_out_of_reach_are_refused_in_one_line(tmp_path):
    options = {"target": "params=0.9", "channels": {"loadable_by": "transformers"}}
    with pytest.raises(UserError, match="cannot be reached with the same widths in all blocks"):
        prune(language_model(), tmp_path / "out", **options)


def test_counts_of_heads_that_a_config_refuses_are_passed_over(tmp_path):
    """LlamaConfig wants heads that divide the stream's width: of 6 heads, 3 or none may go."""
    source = language_model(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8
    )
    options = {"target": "channels=0.34", "channels": {"loadable_by": "transformers"}}
    model, _ = prune(source, tmp_path / "out", **options)
    assert 48 % model.denoiser.config.num_attention_heads == 0
    free, _ = prune(source, tmp_path / "free", target="channels=0.34")
    assert isinstance(free.denoiser, Narrowed)


def test_targets_take_heads_or_hidden_units_alone(tmp_path):
    model, _ = prune(language_model(), tmp_path / "out", target="params=0.1", targets=("mlp",))
    widths = dict(model.denoiser.config.widths.items())
    assert widths
    assert all(".mlp" in name for name in widths)
    with pytest.raises(UserError, match="are cut together"):
        prune(language_model(), tmp_path / "no", target="params=0.1", targets=("up_proj",))


def test_a_narrowed_model_goes_through_the_other_verbs(tmp_path):
    data = {"dataset": str(text_file()), "device": "cpu"}
    prune(language_model(), tmp_path / "slim", target="params=0.1")
    prune(tmp_path / "slim", tmp_path / "nm", mechanism="obs-nm", pattern="2:4")
    tuned = FinetuneOptions(steps=2, batch_size=2, validation_problems=4, **data)
    prunedm.finetune(tmp_path / "nm", tmp_path / "tuned", tuned)
    prunedm.export(
        tmp_path / "tuned", tmp_path / "packed", ExportOptions(format="packed", precision="fp32")
    )
    tokens = example(load(tmp_path / "tuned").denoiser)
    made = [answer(load(tmp_path / name).denoiser, tokens) for name in ("tuned", "packed")]
    assert torch.equal(*made)


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_depth_equals_blocks_that_add_nothing(cls, tmp_path):
    config = HEADS[cls][0] | {"num_hidden_layers": 4}
    dense = network(cls, **config)
    passed = copy.deepcopy(dense)
    names = list(chained_blocks(passed))
    for name in names[1:3]:
        passed.get_submodule(name).forward = lambda x, *_, **__: x
    inputs = example(dense)
    wanted = answer(passed, inputs).detach()
    shallow = remove_blocks(dense, names[1:3])
    assert torch.equal(answer(shallow, inputs), wanted)
    assert shallow.config.num_hidden_layers == 2
    assert not isinstance(shallow, Narrowed)
    shallow.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again, inputs), wanted)
    tokens = inputs["input_ids"][:, :4]  # the cache goes by the blocks' numbers
    cached, whole = (
        again.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_depth_removes_the_blocks_of_least_influence(tmp_path):
    source = tmp_path / "deep"
    model = network(num_hidden_layers=4)
    with torch.no_grad():  # block 2 adds almost nothing
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{name}").weight.mul_(1e-3)
    model.save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((language_model() / file).read_bytes())
    shallow, stats = prune(source, tmp_path / "out", mechanism="depth", target="blocks=0.25")
    assert stats["removed"] == ["model.layers.2"]
    assert stats["influence"]["model.layers.2"] == min(stats["influence"].values()) < 1e-4
    assert stats["achieved"] == {"blocks": 0.25}
    assert shallow.denoiser.config.num_hidden_layers == 3
    slim, _ = prune(tmp_path / "out", tmp_path / "slim", target="params=0.1")
    less, _ = prune(tmp_path / "slim", tmp_path / "less", mechanism="depth", target="blocks=0.3")
    assert isinstance(slim.denoiser, Narrowed)
    assert len(chained_blocks(less.denoiser)) == 2


def test_depth_is_refused_where_numbers_of_blocks_count(tmp_path):
    """GPT-2 may divide by the block's number, MiniCPM3 by the root of how many there are."""
    model = network("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True, n_layer=4)
    with pytest.raises(UserError, match=r"depth: .*scaling would be otherwise"):
        remove_blocks(model, ["transformer.h.0"])
    model = network("BartForCausalLM", d_model=32, decoder_layers=3, encoder_layers=3)
    with pytest.raises(UserError, match="other modules than its config builds"):
        remove_blocks(model, ["model.decoder.layers.1"])


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("LlamaForCausalLM", {"targets": ("mlp",)}),
        ("BloomForCausalLM", {}),
        ("LlamaForCausalLM", {"mechanism": "depth"}),
    ],
)
def test_macs_include_attention_whose_heads_stay(cls, options, tmp_path):
    source = language_model(cls, **(HIDDEN.get(cls, {}) | {"num_hidden_layers": 4}))
    _, stats = prune(source, tmp_path / "out", target="macs=0.2", **options)
    removed = 1 - stats["after"]["macs"] / stats["before"]["macs"]
    assert stats["achieved"]["macs"] == pytest.approx(removed)
    assert removed == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("name", ["xyz", "t5", "clip", "prunedm_llama", ""])
def test_unknown_narrowed_models_are_unknown_to_transformers(name):
    with pytest.raises(ValueError, match="Unrecognized model identifier"):
        transformers.AutoConfig.for_model(f"prunedm_{name}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "depth", "target": "channels=0.3"}, "depth takes params=0.3"),
        ({"mechanism": "nm", "target": "blocks=0.3"}, "is for --mechanism depth"),
        ({"mechanism": "depth", "target": "blocks=0.3", "targets": ("mlp",)}, "whole blocks"),
        ({"target": "weights=0.3"}, "channels takes params=0.3"),
    ],
)
def test_targets_of_other_mechanisms_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prune(language_model(), tmp_path / "out", **options)


def test_narrowed_models_load_once_prunedm_is_imported(tmp_path):
    """In a fresh process: plain transformers says what it lacks, and then has it."""
    prune(language_model(), tmp_path / "out", target="params=0.1")
    code = f"""
import transformers
where = {str(tmp_path / "out")!r}
try:
    transformers.AutoModelForCausalLM.from_pretrained(where)
except ValueError as error:
    assert "prunedm_llama" in str(error), error
else:
    raise SystemExit("it loaded without prunedm")
import prunedm
model = transformers.AutoModelForCausalLM.from_pretrained(where)
assert type(model).__name__ == "PrunedLlamaForCausalLM", type(model)
assert transformers.AutoTokenizer.from_pretrained(where)("text").input_ids
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# sizes of tiny models, under the names of all configurations
TINY = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"vocab_size": 97, "num_experts_per_tok": 2, "rotary_dim": 4, "n_group": 1, "topk_group": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def tiny_of(cls):
    """A network of the class with small sizes, or None where those do not fit together."""
    config = cls.config_class
    names = {f.name for f in dataclasses.fields(config)} | set(config.attribute_map)
    torch.manual_seed(0)
    try:
        made = config(**{name: value for name, value in TINY.items() if name in names})
        with torch.device("meta"):
            large = sum(p.numel() for p in cls(made).parameters()) > 3e7
        model = None if large else cls(made).eval()
        if model is not None:
            with torch.no_grad():
                answer(model, example(model))
    except Exception:
        return None
    return model


# their attention over states is a loop in Python here, minutes each
LOOPS = ("KimiLinearForCausalLM", "NemotronHForCausalLM")


@pytest.mark.slow
def test_classes_of_transformers_that_can_be_narrowed():
    """Of all causal language models that tiny sizes fit: which lose heads and hidden units, exactly."""
    names = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    heads, hidden, neither = [], [], []
    for name in names:
        model = None if name in LOOPS else tiny_of(getattr(transformers, name))
        if model is None or not chained_blocks(model):
            continue
        zeroed, groups = copy.deepcopy(model), groups_of(model)
        heads += [name] * any(group.heads for group in groups)
        hidden += [name] * any(not group.heads for group in groups)
        neither += [name] * (not groups)
        if groups:
            plan = plan_of(model, groups, [(g, 0) for g in range(len(groups))], None)
            zero_columns(zeroed, plan)
            remove_channels(model, plan)
            inputs = example(model)
            try:
                made = answer(as_narrowed(model), inputs)
            except UserError:  # BigBird replaces its attention for short inputs
                neither.append(name)
                continue
            wanted = answer(zeroed, inputs)
            torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4, msg=name)
    print(f"{len(heads)} lose heads, {len(hidden)} hidden units; neither: {', '.join(neither)}")
    assert len(heads) >= 85
    assert len(hidden) >= 110


def changed_config(folder, **changes):
    """The folder with other values in its config.json; a function is given the old value."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        config[name] = value(config[name]) if callable(value) else value
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_widths_that_do_not_fit_are_one_line(tmp_path):
    slim = tmp_path / "slim"
    prune(language_model(), slim, target="params=0.1")
    attention, layer = "model.layers.0.self_attn", "model.layers.0.mlp.down_proj"
    cases = [
        ({"widths": lambda w: w | {attention: {"head_dim": 4}}}, "do not fit each other"),
        (
            {"widths": lambda w: w | {layer: {"in": 4, "out": 32}}},
            r"1 mismatched tensors, first \S+down",
        ),
        ({"widths": lambda w: w | {layer: {"in": 0, "out": 32}}}, "whole numbers of 1 or more"),
        ({"widths": lambda w: w | {"model.other": {"in": 4, "out": 4}}}, "no module named"),
        ({"widths": [1]}, "widths is not a table"),
        ({"architectures": []}, "names no class"),
    ]
    for number, (changes, message) in enumerate(cases):
        folder = shutil.copytree(slim, tmp_path / str(number))
        with pytest.raises(UserError, match=message) as caught:
            load(changed_config(folder, **changes))
        assert "\n" not in str(caught.value)


def test_a_decoder_with_unused_cross_attention_is_narrowed(tmp_path):
    config = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    sizes = {"decoder_ffn_dim": 64, "pad_token_id": 0}
    source = language_model("BartForCausalLM", **config, **sizes)
    _, stats = prune(source, tmp_path / "out", target="params=0.1")
    assert stats["achieved"]["params"] == pytest.approx(0.1, rel=0.2)


def test_what_cannot_be_cut_is_said_in_one_line(tmp_path):
    oss = {"head_dim": 8, "num_local_experts": 4, "pad_token_id": 0}
    cases = [
        (language_model("GptOssForCausalLM", **oss), {"target": "params=0.1"}, "nothing inside"),
        (language_model(), {"mechanism": "depth", "target": "blocks=0.01"}, "one block is 0.5"),
        (language_model(), {"mechanism": "depth", "target": "blocks=0.99"}, "0.5 is all but one"),
        (language_model(), {"mechanism": "depth", "score": "magnitude"}, "leave it out"),
        (
            language_model(),
            {"mechanism": "nm", "channels": {"loadable_by": "transformers"}},
            "is for --mechanism channels",
        ),
    ]
    for number, (source, options, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            prune(source, tmp_path / str(number), **options)
