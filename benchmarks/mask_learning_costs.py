"""The cost of mask learning relative to plain training: ratios of medians, timed in turns."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench import learner_of

from prunedm.evaluation.speed import in_turns
from prunedm.folder import Model
from prunedm.learning.distribution import DISTRIBUTIONS
from prunedm.learning.learner import Learner
from prunedm.options import LearnOptions
from prunedm.stages.inputs import images_for, training_problems
from prunedm.task import Batch, predict

REPEATS = 15
SAMPLED = 36_000_000  # weights


def costs(dense: Model, loop: dict[str, Any]) -> dict[str, Any]:
    """Ratios of a mask-learning step, of a policy gradient's mask and of sampling; bytes a weight."""
    options = LearnOptions(**loop)
    images = images_for(dense, options, "train")
    batch = training_problems(dense, options, images).batch(range(options.batch_size))
    precise = options.mixed_precision == "bf16"
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precise)
    train = _training_step(dense, batch, autocast)
    learner, learn = _learning_step(dense, LearnOptions(**loop), batch, autocast)
    new, known, plain = _in_turns(lambda: learn(fresh=True), lambda: learn(fresh=False), train)
    weights = sum(mask.numel() for _, mask in learner.logits.first)
    policy, forward = _policy_gradient(
        dense, LearnOptions(**loop | {"estimator": "policy-gradient"}), batch, autocast
    )
    return {
        "step_ratio_new_problems": new / plain,
        "step_ratio_known_problems": known / plain,
        "training_step_s": plain,
        "bytes_a_weight": learner.state_bytes / weights,  # type: ignore[attr-defined]
        "mask_bytes_a_weight": sum(m.nbytes for _, m in learner.logits.first) / weights,
        "policy_gradient_ratio": policy / forward,
        **_sampling(),
    }


def _training_step(dense: Model, batch: Batch, autocast: Any) -> Callable[[], None]:
    """Forward, backward, AdamW over all weights."""
    denoiser = dense.denoiser
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=0.0)

    def step() -> None:
        denoiser.requires_grad_(True)
        with autocast():
            loss = batch.losses(predict(denoiser, batch)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        denoiser.requires_grad_(False)

    return step


def _learning_step(
    dense: Model, options: LearnOptions, batch: Batch, autocast: Any
) -> tuple[Learner, Callable[..., None]]:
    learner, optimizer = learner_of(dense, options)
    generator = torch.Generator().manual_seed(0)
    outputs = learner.wanted

    def step(fresh: bool) -> None:
        learner.wanted = (lambda b: predict(dense.denoiser, b)) if fresh else outputs
        with autocast():
            loss = learner(batch, 0.5, generator)
        loss.backward()
        optimizer.step()
        parameters = list(learner.logits.parameters())
        adam = [t for state in optimizer.state.values() for t in state.values()]
        held = [*parameters, *(p.grad for p in parameters), *adam]
        learner.state_bytes = sum(t.nbytes for t in held)  # type: ignore[attr-defined]
        optimizer.zero_grad()

    return learner, step


def _policy_gradient(
    dense: Model, options: LearnOptions, batch: Batch, autocast: Any
) -> tuple[float, float]:
    """Seconds of one complete mask of the policy gradient, and of one forward pass."""
    learner, optimizer = learner_of(dense, options)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        with autocast():
            loss = learner(batch, 0.5, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        with autocast():
            for _ in range(options.policy_gradient.samples):
                batch.losses(predict(dense.denoiser, batch)).mean()

    return _in_turns(step, forward)


@torch.no_grad()
def _sampling() -> dict[str, float]:
    """Time of 2:4 masks for 36M weights, drawing included, over that of `torch.rand` of that size."""
    generator = torch.Generator().manual_seed(0)
    logits_GM = torch.randn(SAMPLED // 4, 4, generator=generator)

    def rand() -> torch.Tensor:
        return torch.rand(SAMPLED // 4, 4, generator=generator)

    names = list(DISTRIBUTIONS)
    *sampled, filled = _in_turns(
        *(lambda name=name: DISTRIBUTIONS[name](logits_GM, 2).sample(rand()) for name in names),
        rand,
    )
    return {f"sampling_ratio {n}": s / filled for n, s in zip(names, sampled, strict=True)}


def _in_turns(*sides: Callable[[], Any]) -> list[float]:
    """Median seconds of each side."""
    return list(map(statistics.median, in_turns(sides, repeats=REPEATS, warmup=1)))
