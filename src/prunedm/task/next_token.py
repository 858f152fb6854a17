"""Next-token prediction: the task of causal language models.

Letters: N sequences of L tokens, V words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from prunedm.task import Batch, Criterion, Task

MOST_LOGITS = 1 << 26  # of a batch that is only measured: 256 MiB in float32, and some copies


class NextToken(Task):
    """A seeded, endless stream of token sequences; tokens_SL: S sequences of L tokens.

    vocabulary: words V of the network that is asked; 0 where its logits are few.
    """

    def __init__(self, tokens_SL: torch.Tensor, *, vocabulary: int = 0, **stream: Any) -> None:
        """`stream`: the arguments of `Task`."""
        super().__init__(**stream)
        self.tokens_SL, self.vocabulary = tokens_SL, vocabulary

    def fitting(self, size: int) -> int:
        """So many sequences that their logits stay below `MOST_LOGITS`, but one at least."""
        logits = self.tokens_SL.shape[1] * max(1, self.vocabulary)
        return min(size, max(1, MOST_LOGITS // logits))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Sequences, with the next tokens as targets."""
        numbers = tuple(map(self.number, numbers))
        tokens_NL = self.tokens_SL[[self.item(p, len(self.tokens_SL)) for p in numbers]].long()
        return Batch(
            {"input_ids": tokens_NL},
            tokens_NL[:, 1:],
            numbers=numbers,
            criterion=CROSS_ENTROPY,
        )


def token_losses(logits_NLV: torch.Tensor, tokens_NL: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each sequence's tokens after its first, in float32: (N, L - 1)."""
    logits_NVL = logits_NLV[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(logits_NVL, tokens_NL, reduction="none")


def cross_entropies(logits_NLV: torch.Tensor, tokens_NL: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's token losses: (N,)."""
    return token_losses(logits_NLV, tokens_NL).mean(1)


def divergences(logits_NLV: torch.Tensor, wanted_NLV: torch.Tensor) -> torch.Tensor:
    """KL(wanted || own) of each sequence, mean over tokens, float32: (N,) (Hinton et al. 2015)."""
    own, wanted = (logits.float().log_softmax(-1) for logits in (logits_NLV, wanted_NLV))
    return F.kl_div(own, wanted, log_target=True, reduction="none").sum(-1).mean(1)


CROSS_ENTROPY = Criterion(cross_entropies, divergences)
