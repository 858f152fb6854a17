"""Blocks in turn: each sees what the blocks before it make, as they are by then."""

import pytest
import torch
from language import language_model, network, text_file
from torch import nn

import prunedm
from prunedm.folder import load
from prunedm.masks import Pattern
from prunedm.networks.chain import blocks_in_turn, chained_blocks
from prunedm.networks.layers import hooked, prunable_layers
from prunedm.options import PruneOptions
from prunedm.removal.obs import obs_prune
from prunedm.task import next_token
from prunedm.task.next_token import NextToken

CLASSES = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "Gemma3ForCausalLM": {"head_dim": 8, "sliding_window": 8},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
TOKENS = torch.randint(257, (11, 24), generator=torch.Generator().manual_seed(0))


def problems() -> NextToken:
    return NextToken(TOKENS, seed=0, purpose="test")


@pytest.mark.parametrize("cls", CLASSES)
def test_blocks_see_what_the_whole_network_gives_them(cls):
    made = network(cls, **CLASSES[cls])
    blocks, due = chained_blocks(made), dict[str, torch.Tensor]()
    assert len(blocks) == 2

    def keep(name: str, _: nn.Module, inputs: tuple, output: object) -> None:
        due[name] = output[0] if isinstance(output, tuple) else output

    with hooked(blocks, keep), torch.no_grad():
        made(TOKENS)
    seen = []
    for name, block, inputs in blocks_in_turn(made, problems(), len(TOKENS), size=4):
        found = [block(sample=batch.inputs["sample"])[0] for batch in inputs.stream(11, size=4)]
        torch.testing.assert_close(torch.cat(found), due[name], rtol=1e-5, atol=1e-6)
        seen.append(name)
    assert seen == list(blocks)


def test_a_changed_block_is_seen_by_those_behind_it_and_the_head_is_not_run(monkeypatch):
    made = network()
    monkeypatch.setattr(made, "lm_head", None)  # a call would fail
    ((_, first, before),) = [
        t for k, t in enumerate(blocks_in_turn(made, problems(), 11, size=4)) if not k
    ]
    whole = [inputs.hidden_SLD for _, _, inputs in blocks_in_turn(made, problems(), 11, size=4)]
    assert torch.equal(whole[0], before.hidden_SLD)
    for name, block, inputs in blocks_in_turn(made, problems(), 11, size=4):
        if name.endswith(".0"):
            block.block.mlp.down_proj.weight.data.zero_()
        else:
            assert not torch.equal(inputs.hidden_SLD, whole[1])
    assert first.block is made.model.layers[0]


def test_obs_in_turn_is_obs_with_the_whole_network():
    """Block by block on kept inputs, or the whole network once for each block's layers."""
    pattern, options = Pattern(2, 4), {"swaps": 3, "guidance": 0.0}
    turn, whole = network(), network()
    layers = list(prunable_layers(turn))
    masks = {}
    for name, block, inputs in blocks_in_turn(turn, problems(), 11, size=4):
        own = [layer for layer in layers if layer.startswith(f"{name}.")]
        choices = {layer.replace(f"{name}.", "block.", 1): pattern for layer in own}
        found = obs_prune(block, choices, batches=inputs.stream(11, size=4), **options)
        masks |= {layer: found[layer.replace(f"{name}.", "block.", 1)] for layer in own}
    due = {}
    for k in range(2):  # one set of layers each: a memory that all of them fit into
        own = {layer: pattern for layer in layers if layer.startswith(f"model.layers.{k}.")}
        due |= obs_prune(whole, own, batches=problems().stream(11, size=4), **options)
    for layer in layers:
        assert torch.equal(masks[layer], due[layer])
        torch.testing.assert_close(
            turn.get_submodule(layer).weight,
            whole.get_submodule(layer).weight,
            rtol=1e-4,
            atol=1e-5,
        )


def test_logits_bound_how_many_sequences_are_measured_at_a_time():
    assert NextToken(TOKENS, seed=0, purpose="test").fitting(64) == 64
    wide = NextToken(torch.zeros(3, 2048), vocabulary=32_000, seed=0, purpose="test")
    assert wide.fitting(64) == 1
    small = NextToken(torch.zeros(3, 256), vocabulary=4096, seed=0, purpose="test")
    assert small.fitting(100) == 64


@pytest.mark.parametrize("mechanism", ["nm", "obs-nm"])
def test_blocks_are_asked_in_the_batches_that_fit_the_network(mechanism, tmp_path, monkeypatch):
    """The options ask for more at a time than the logits allow."""
    monkeypatch.setattr(next_token, "MOST_LOGITS", 3 * 64 * 257)
    score = {"score": "wanda"} if mechanism == "nm" else {}
    options = PruneOptions(
        mechanism=mechanism, **score, dataset=str(text_file()), device="cpu",
        calibration_problems=8, calibration_batch=8,
    )  # fmt: skip
    prunedm.prune(language_model(), tmp_path / "out", options)
    made = load(tmp_path / "out")
    assert made.masks.validity(made.denoiser) == 1
