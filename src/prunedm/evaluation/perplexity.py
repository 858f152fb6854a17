"""Perplexity: exp of the mean negative log-likelihood a token.

The papers' protocol (GPTQ, SparseGPT, Wanda): windows of one length without overlap, each token but the
first of a window counted once. The strided one (transformers' documentation): windows overlap, and only
the tokens that come new with each are counted, so that all have a long context.
"""

import math

import torch
from torch import nn

from prunedm.architecture import answer
from prunedm.evaluation.loss import MEASURED
from prunedm.evaluation.metric import Measurement, Metric, Subject, fixed
from prunedm.networks.inference import evaluating
from prunedm.task.next_token import NextToken, token_losses


@torch.no_grad()
def strided_perplexity(
    network: nn.Module, tokens_T: torch.Tensor, window: int, stride: int, *, device: torch.device
) -> float:
    """Of a text of T tokens, in windows of at most `window` that begin every `stride` tokens."""
    total, counted, seen = 0.0, 0, 1  # the first token has no context
    with evaluating(network):
        for start in range(0, len(tokens_T), stride):
            end = min(start + window, len(tokens_T))
            ids_1L = tokens_T[None, start:end].long().to(device)
            losses = token_losses(answer(network, {"input_ids": ids_1L}), ids_1L[:, 1:])[0]
            new = losses[max(seen, start + 1) - start - 1 :]  # losses[k] is of token start + k + 1
            total, counted, seen = total + float(new.double().sum()), counted + len(new), end
            if end == len(tokens_T):
                break
    return math.exp(total / counted)


def _strided(of: Subject) -> dict[str, float]:
    task = of.problems().task
    if not of.stride or not isinstance(task, NextToken):
        return {}
    text_T = task.tokens_SL.flatten()
    length = task.tokens_SL.shape[1]
    return {
        "perplexity_strided": strided_perplexity(
            of.denoiser, text_T, length, of.stride, device=of.device
        )
    }


PERPLEXITY = Metric(
    "perplexity",
    "perplexity",
    "exp of the mean negative log-likelihood a token, in windows of one length without overlap",
    fixed(2),
    MEASURED,
    conditions="Perplexity: windows of {length} tokens of {dataset} without overlap; the first token of "
    "each is not counted.",
    of="texts",
)
STRIDED = Metric(
    "perplexity_strided",
    "perplexity, strided",
    "the same in overlapping windows, of which only the tokens that come new are counted",
    fixed(2),
    Measurement("strided perplexity", "problems", _strided),
    conditions="Strided perplexity: windows of {length} tokens, one every {stride}.",
    of="texts",
)
