"""Causal language models of transformers: Llama (Touvron et al. 2023) and its kin."""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs

LENGTH = 128  # tokens of an example


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """The shared names; keys and values are not cached."""
    return dict(inputs) | {"use_cache": False}


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """Random tokens (N, L)."""
    length = min(LENGTH, network.config.max_position_embeddings)
    tokens = torch.randint(network.config.vocab_size, (count, length), generator=generator)
    return {"input_ids": tokens}


RECORD = Architecture(
    component="",
    told=told,
    more=more,
    protect=("lm_head", r".*embed_tokens"),
    blocks=(r"model\.layers\.\d+",),
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
)
