"""What a layer makes good, against least squares on materialised inputs."""

from copy import deepcopy

import pytest
import torch
from language import network
from torch import nn

from prunedm.masks import Pattern
from prunedm.networks.chain import blocks_in_turn, chained_blocks, with_dense
from prunedm.networks.layers import prunable_layers
from prunedm.removal.corrections import Dense, corrections, results
from prunedm.removal.obs import obs_prune
from prunedm.task import Batch, predict
from prunedm.task.next_token import NextToken

TOKENS = torch.randint(257, (11, 24), generator=torch.Generator().manual_seed(0))
DAMPING = 1e-3


class Residual(nn.Module):
    """x + second(|first(x)|); (N, L, 6) in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()

    def forward(self, sample: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (sample + self.second(self.first(sample).abs()),)


def hidden(seed: int) -> torch.Tensor:
    return torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(seed)).double()


def batches(x_NLD: torch.Tensor) -> list[Batch]:
    return [Batch({"sample": part}, part) for part in x_NLD.split([2, 3])]


def ridge(x_PK: torch.Tensor, wanted_PO: torch.Tensor, near_OK: torch.Tensor) -> torch.Tensor:
    """V of the least |x V^T - wanted|^2 + damping |V - near|^2: (O, K)."""
    damping = DAMPING * x_PK.square().sum(0).mean()
    root_KK = damping.sqrt() * torch.eye(x_PK.shape[1], dtype=x_PK.dtype)
    rows, due = torch.cat([x_PK, root_KK]), torch.cat([wanted_PO, root_KK @ near_OK.T])
    return torch.linalg.lstsq(rows, due).solution.T


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_layer_is_fitted_to_the_dense_results_on_its_own_inputs(share):
    """With nothing removed: `first` to its dense output, `second` to the dense sum."""
    dense, made = Residual(), Residual()
    old, seen = hidden(0), hidden(0) + 0.3 * hidden(1)  # what was pruned before changed the inputs
    whole = {name: torch.ones_like(getattr(made, name).weight) == 1 for name in ("first", "second")}
    obs_prune(
        made,
        whole,
        batches=batches(seen),
        dense=Dense(dense, batches(old)),
        correction=share,
        damping=DAMPING,
        refits=200,
    )
    w_OK = dense.first.weight.detach()
    x_PK, due_PO = seen.flatten(0, 1), (old @ w_OK.T).flatten(0, 1)
    fitted = w_OK + share * (ridge(x_PK, due_PO, w_OK) - w_OK)
    torch.testing.assert_close(made.first.weight.detach(), fitted, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        x_PK = made.first(seen).abs().flatten(0, 1)
        due_PO = (dense(old)[0] - seen - dense.second.bias).flatten(0, 1)
    w_OK = dense.second.weight.detach()
    fitted = w_OK + share * (ridge(x_PK, due_PO, w_OK) - w_OK)
    torch.testing.assert_close(made.second.weight.detach(), fitted, rtol=1e-6, atol=1e-8)


def test_a_layer_with_other_positions_than_in_the_dense_network_is_left_as_it_is():
    made, dense = Residual(), Residual()
    layers = {"first": made.first, "second": made.second}
    beside = Dense(dense, batches(torch.cat([hidden(0), hidden(1)], dim=1)))
    assert corrections(made, layers, batches(hidden(0)), beside, weigh=torch.ones_like) == {}


@pytest.mark.parametrize(
    ("cls", "config", "added"),
    [
        ("LlamaForCausalLM", {}, {"self_attn.o_proj", "mlp.down_proj"}),
        ("GPT2LMHeadModel", {}, {"attn.c_proj", "mlp.c_proj"}),
        (
            "OPTForCausalLM",
            {"ffn_dim": 64, "word_embed_proj_dim": 32},
            {"self_attn.out_proj", "fc2"},
        ),
        ("GPTNeoXForCausalLM", {}, {"mlp.dense_4h_to_h"}),  # attention and MLP side by side
        ("Gemma3ForCausalLM", {"head_dim": 8}, set()),  # norms stand between
    ],
)
def test_layers_whose_output_is_added_to_the_stream_are_found(cls, config, added):
    made = network(cls, **config)
    found = results(made, prunable_layers(made), Batch({"input_ids": TOKENS}, TOKENS))
    name = next(iter(chained_blocks(made)))
    own = {layer.removeprefix(f"{name}.") for layer in found.added if layer.startswith(f"{name}.")}
    assert own == added
    assert found.added <= set(found.results)


def test_the_dense_copies_give_what_the_dense_network_gave():
    made = network()
    problems = NextToken(TOKENS, seed=0, purpose="test")
    turns = list(blocks_in_turn(deepcopy(made), problems, 11, size=4))
    beside = with_dense(blocks_in_turn(made, problems, 11, size=4))
    for (_, _, due), (_, block, _, (dense, inputs)) in zip(turns, beside, strict=True):
        assert torch.equal(inputs.hidden_SLD, due.hidden_SLD)
        for parameter in block.parameters():
            parameter.data.mul_(0.5)
        batch = inputs.batch(range(4))
        assert not torch.allclose(predict(dense, batch), predict(block, batch))


def test_blocks_in_turn_end_closer_to_the_dense_network_where_they_make_good():
    problems, dense = NextToken(TOKENS, seed=0, purpose="test"), network()
    errors = {}
    for share in (0.0, 1.0):
        made = network()
        turns = with_dense(blocks_in_turn(made, problems, 11, size=4))
        for _, block, inputs, (before, own) in turns:
            obs_prune(
                block,
                dict.fromkeys(prunable_layers(block, protect=()), Pattern(2, 4)),
                batches=inputs.stream(11, size=4),
                dense=Dense(before, own.stream(11, size=4)),
                correction=share,
            )
        with torch.no_grad():
            hidden_states = [m.model(TOKENS).last_hidden_state for m in (made, dense)]
        errors[share] = float((hidden_states[0] - hidden_states[1]).square().mean())
    assert errors[1.0] < 0.8 * errors[0.0]
