"""Causal language models of transformers: Llama (Touvron et al. 2023), GPT-2, Qwen, Mistral, OPT ...

All are told tokens and answer with logits, so one record serves every `...ForCausalLM`.
"""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs

EXAMPLE = 128  # tokens of an example
WINDOW = 2048  # tokens of a sequence unless the model takes fewer: that of the papers' perplexity


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """As named; keys and values are not kept."""
    return dict(inputs) | {"use_cache": False}


def window(network: Any) -> int:
    """Tokens of a sequence, unless a user says another number."""
    return min(WINDOW, getattr(network.config, "max_position_embeddings", None) or WINDOW)


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """Random tokens (N, L)."""
    shape = (count, min(EXAMPLE, window(network)))
    return {"input_ids": torch.randint(network.config.vocab_size, shape, generator=generator)}


RECORD = Architecture(
    component="",
    told=told,
    more=more,
    # heads, embeddings and routers; what projects between widths of the embedding and of the blocks
    protect=(
        "lm_head", "embed_out", r".*embed_tokens", r".*\.wte", r".*\.wpe", r".*\.router",
        r".*\.(mlp|block_sparse_moe|feed_forward)\.gate", r"model\.decoder\.project_(in|out)",
        r".*\.conv1d",
    ),
    blocks=(r"[a-z_0-9]+(\.(decoder|encoder))?\.(layers?|h|blocks)\.\d+",),
    chained=True,
    channels="inside",
    text=True,
    tiny={
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
)  # fmt: skip
