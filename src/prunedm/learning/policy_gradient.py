"""Policy gradients (Williams 1992) for masks: they need only values of the loss.

This allows losses without a gradient: FID, quantised or compiled models, human scores.
"""

from collections.abc import Sequence

import torch

from prunedm.learning.distribution import DISTRIBUTIONS, Distribution
from prunedm.learning.estimator import Estimator, Method, Trial, uniforms
from prunedm.learning.logits import MaskLogits

Groups = list[torch.Tensor]  # one tensor a pattern


class ClassicPolicyGradient(Estimator):
    """MaskPro's rule (2025): one mask per step, its residual to the first mask, a moving average.

    l <- l - lr (r - delta) d log P(mask) / d l,  r = f(mask) - f(mask_0),  delta <- 0.99 delta + 0.01 r.
    """

    optimizer = "sgd"
    delta: torch.Tensor

    def __init__(self, family: str = "conditional-bernoulli", decay: float = 0.99) -> None:
        super().__init__()
        self.family, self.decay = family, decay
        self.register_buffer("delta", torch.zeros(()))

    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        distributions = logits.distributions(self.family)
        noise = uniforms(list(logits.groups), trial.generator)
        masks = [d.sample(u_GM) for d, u_GM in zip(distributions, noise, strict=True)]
        loss = trial.loss(logits.by_layer(masks)).float()
        with torch.no_grad():
            residual = loss - trial.first_loss()
            advantage = residual - self.delta
            self.delta.lerp_(residual, 1 - self.decay)
            gradients = [advantage * d.score(m) for d, m in zip(distributions, masks, strict=True)]
        return with_gradients(loss, list(logits.groups), gradients)


class PolicyGradient(Estimator):
    """Several masks per step, compared with each other, in one block of groups at a time.

    Draws come in antithetic pairs (u, 1 - u). The advantage of a draw is its loss minus the mean loss
    of the other pairs (leave-one-out; its own partner is not independent), divided by a running
    standard deviation, so that the learning rate is in units of logits. Groups outside the block stay
    at their mode: their draws would only add noise.
    """

    optimizer = "sgd"
    variance: torch.Tensor

    def __init__(
        self,
        family: str = "conditional-bernoulli",
        *,
        samples: int = 8,
        explore: float = 0.1,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        assert samples >= 4, "to leave one pair out takes two"
        assert samples % 2 == 0, "draws come in pairs"
        self.family, self.samples, self.explore, self.decay = family, samples, explore, decay
        self.register_buffer("variance", torch.zeros(()))

    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        """The mean loss of the draws, whose gradient is sum_k A_k d log P(draw k) / d l / samples."""
        blocks = [_block(len(l_GM), self.explore, trial.generator) for l_GM in logits.groups]
        inside = [l_GM[block] for l_GM, block in zip(logits.groups, blocks, strict=True)]
        explored = [
            DISTRIBUTIONS[self.family](l_GM, pattern.n)
            for l_GM, pattern in zip(inside, logits.patterns, strict=True)
        ]
        modes = [d.mode() for d in logits.distributions(self.family)]
        usual, changed = trial.masked(logits.by_layer(modes)), logits.layers_of(blocks)
        draws, losses = [], []
        for _ in range(self.samples // 2):
            noise = uniforms(inside, trial.generator)
            for u in (noise, [1 - u_GM for u_GM in noise]):
                draws.append([d.sample(u_GM) for d, u_GM in zip(explored, u, strict=True)])
                tried = [
                    mode_GM.index_copy(0, block, part)
                    for mode_GM, block, part in zip(modes, blocks, draws[-1], strict=True)
                ]
                masked = trial.masked(logits.by_layer(tried, changed))
                losses.append(trial.loss_of({**usual, **masked}).float())
        losses_K = torch.stack(losses)
        with torch.no_grad():
            advantage_K = leave_pair_out(losses_K) / self._scale(losses_K) / self.samples
            gradients = [_weighted_scores(d, k, advantage_K, draws) for k, d in enumerate(explored)]
        return with_gradients(losses_K.mean(), inside, gradients)

    def _scale(self, losses_K: torch.Tensor) -> torch.Tensor:
        """Running standard deviation of a step's losses; the first step uses its own."""
        now = losses_K.var()
        before = torch.where(
            self.variance == 0, now, self.variance
        )  # of earlier steps only, so no bias
        self.variance.copy_(before.lerp(now, 1 - self.decay))
        return before.sqrt().clamp_min(torch.finfo(now.dtype).tiny)


def leave_pair_out(losses_K: torch.Tensor) -> torch.Tensor:
    """Each loss minus the mean loss of the other pairs, (K,); pairs are neighbours."""
    pairs = len(losses_K) // 2
    sums_P = losses_K.reshape(pairs, 2).sum(1)
    others_P = (sums_P.sum() - sums_P) / (2 * (pairs - 1))
    return losses_K - others_P.repeat_interleave(2)


def with_gradients(
    value: torch.Tensor, logits: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A scalar with this value whose backward pass gives the logits these gradients."""
    pairs = zip(logits, gradients, strict=True)
    slope = torch.stack([(l_GM * g_GM).sum() for l_GM, g_GM in pairs]).sum()
    return value + (slope - slope.detach())  # adds exactly zero


def _weighted_scores(
    distribution: Distribution, k: int, advantage_K: torch.Tensor, draws: Sequence[Groups]
) -> torch.Tensor:
    """sum over draws of advantage * d log P(draw) / d l, for parameter k; advantages sum to 0."""
    gradient = torch.zeros_like(distribution.logits_GM)
    for advantage, draw in zip(advantage_K, draws, strict=True):
        gradient += advantage * distribution.relative_score(draw[k])
    return gradient


def _block(groups: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Indices of consecutive groups, cyclic, so that each group is equally likely to be inside."""
    size, device = max(1, round(share * groups)), generator.device
    start = torch.randint(groups, (), generator=generator, device=device)
    return (start + torch.arange(size, device=device)) % groups


POLICY_GRADIENT = Method(
    lambda options: PolicyGradient(
        options.distribution,
        samples=options.policy_gradient.samples,
        explore=options.policy_gradient.explore,
    ),
    lr=1.0,
    logits=3.0,
)
CLASSIC = Method(lambda options: ClassicPolicyGradient(options.distribution), lr=50.0, logits=10.0)
