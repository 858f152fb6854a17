"""Continuations of prompts by a language model: text i is a function of (seed, i)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prunedm.networks.inference import evaluating
from prunedm.randomness import seed_for


@torch.no_grad()
def continuations(
    network: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """What the network writes behind each prompt, in at most `tokens` tokens.

    tokenizer: transformers'. temperature: 0 takes the likeliest token each time.
    """
    device = next(network.parameters()).device
    end = tokenizer.eos_token_id
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with evaluating(network):
        for index, prompt in enumerate(prompts):
            given = tokenizer(prompt, return_tensors="pt").to(device)
            given.pop("token_type_ids", None)
            cuda = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed_for(seed, "continuation", index))
                made = network.generate(**given, **how, max_new_tokens=tokens, pad_token_id=end)
            yield tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
