"""Mask learning: the logits are trained, the weights are frozen, one soft mask a step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call

from prunedm.diffusion import DenoisingProblems, ProblemBatch, predict, problem_losses
from prunedm.layers import to_groups
from prunedm.learning.relaxation import RelaxedMasks, temperature
from prunedm.masks import Masks
from prunedm.options import LearnOptions
from prunedm.progress import Progress
from prunedm.randomness import seed_for
from prunedm.training.checkpoint import History
from prunedm.training.loop import fit


@dataclass(frozen=True)
class Learned:
    """The masks, how they were found, and the share of groups that differ from the first ones."""

    masks: Masks
    history: History
    groups_changed: float


def learn_masks(
    denoiser: nn.Module,
    relaxed: RelaxedMasks,
    *,
    problems: DenoisingProblems,
    options: LearnOptions,
    accelerator: Accelerator,
    checkpoint: Path,
    progress: Progress,
    hard_loss: Callable[[Masks], float],
) -> Learned:
    """Train `relaxed` so that `denoiser` under its masks loses little; the denoiser is untouched.

    `hard_loss(masks)` is what is reported: the loss of the soft mask flatters.
    """
    denoiser.to(accelerator.device).eval().requires_grad_(False)
    weights = {name: denoiser.get_parameter(f"{name}.weight") for name in relaxed.shapes}
    first = relaxed.mode()

    def objective(module: nn.Module, batch: ProblemBatch, step: int) -> torch.Tensor:
        tau = temperature(options.tau, step, options.steps)
        generator = torch.Generator(accelerator.device)
        draw = step * accelerator.num_processes + accelerator.process_index
        generator.manual_seed(seed_for(options.seed, "gumbel", draw))
        soft = module(tau, generator)
        masked = {f"{name}.weight": weights[name] * soft[name] for name in weights}
        output = functional_call(denoiser, masked, _arguments(batch), {"return_dict": False})[0]
        with torch.no_grad():
            to_data = options.objective == "data"
            target = batch.target_NCHW if to_data else predict(denoiser, batch)
        return problem_losses(output, target).mean()

    history = fit(
        relaxed,
        objective,
        problems=problems,
        options=options,
        accelerator=accelerator,
        checkpoint=checkpoint,
        progress=progress,
        label="mask learning",
        validate=lambda _: hard_loss(relaxed.mode()),
    )
    masks = relaxed.to("cpu").mode()
    masks.check_pattern()
    denoiser.to("cpu").requires_grad_(True)
    return Learned(masks, history, groups_changed(first, masks))


def groups_changed(before: Masks, after: Masks) -> float:
    """Share of N:M groups in which the kept weights differ."""
    assert before.pattern is not None
    m = before.pattern.m
    changed = [
        (to_groups(mask.cpu(), m) != to_groups(after.by_layer[name].cpu(), m)).any(1)
        for name, mask in before
    ]
    return float(torch.cat(changed).float().mean())


def _arguments(batch: ProblemBatch) -> tuple[torch.Tensor | None, ...]:
    return batch.noisy_NCHW, batch.timesteps_N, batch.labels_N
