"""Mask learning: an estimator trains the logits, and optionally the weights with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from prunedm.architecture import answer
from prunedm.learning import make_estimator
from prunedm.learning.learner import Learner
from prunedm.learning.logits import MaskLogits
from prunedm.learning.memo import Memo
from prunedm.masks import Masks
from prunedm.options import LearnOptions
from prunedm.progress import Progress
from prunedm.randomness import generator_for
from prunedm.task import Batch, Task
from prunedm.training.checkpoint import History, load_parameters
from prunedm.training.loop import fit
from prunedm.training.tracking import Shown, distribution

GIB = 1 << 30


@dataclass(frozen=True)
class Learned:
    """The chosen masks and those of the last step, the chosen logits, and the training history."""

    masks: Masks
    last: Masks
    logits: dict[str, torch.Tensor]
    history: History


def learn_masks(
    denoiser: nn.Module,
    logits: MaskLogits,
    *,
    teacher: nn.Module | None,
    problems: Task,
    options: LearnOptions,
    accelerator: Accelerator,
    resume: Path,
    progress: Progress,
    hard_loss: Callable[[Masks], float],
    pictures: Callable[[Masks], dict[str, np.ndarray]] = lambda masks: {},
) -> Learned:
    """Train `logits` to minimise the loss of `denoiser` under their masks.

    teacher: the network whose output is the target; None takes the unmasked denoiser, which must
    then be frozen. hard_loss: the loss of the denoiser under hard masks, which is reported since
    soft masks have a lower loss. pictures: its samples under hard masks, for trackers. A frozen
    denoiser is unchanged afterwards; a trained one keeps its new weights, unmasked.
    """
    assert teacher is not None or not options.train_weights
    best = resume / "best.safetensors"
    learner = make_learner(denoiser, logits, options, teacher=teacher, device=accelerator.device)
    history = fit(
        learner,
        partial(learning_objective, options=options, accelerator=accelerator),
        problems=problems,
        options=options,
        accelerator=accelerator,
        checkpoint=resume / "checkpoint.safetensors",
        progress=progress,
        label="mask learning",
        validate=lambda _: hard_loss(logits.mode()),
        after_step=lambda _: learner.estimator.after_step(logits, learner.weights),
        observe=lambda _: logits.observe(options.distribution),
        show=lambda _: shown(logits, pictures),
        optimizer=make_optimizer(learner, options),
        best=best,
    )
    learner.to("cpu")
    last = logits.mode()
    if options.keep == "best":
        accelerator.wait_for_everyone()
        load_parameters(best, learner)
    denoiser.to("cpu").requires_grad_(True)
    masks = logits.mode()
    masks.check_pattern()
    return Learned(masks, last, logits.by_layer([g.detach() for g in logits.groups]), history)


def shown(logits: MaskLogits, pictures: Callable[[Masks], dict[str, np.ndarray]]) -> Shown:
    """For trackers: sparsity and pictures of the hard masks, and the distribution of the logits."""
    masks = logits.mode()
    found = distribution("logits", torch.cat([group.flatten() for group in logits.groups]))
    sparsity = {"sparsity": 1 - masks.kept / masks.total}
    return Shown(sparsity | dict(found.figures), found.histograms, pictures(masks))


def learning_objective(
    module: nn.Module,
    batch: Batch,
    step: int,
    *,
    options: LearnOptions,
    accelerator: Accelerator,
) -> torch.Tensor:
    """The loss of one step; every process and step draws its own masks."""
    draw = step * accelerator.num_processes + accelerator.process_index
    generator = generator_for(options.seed, "masks", draw, accelerator.device)
    loss: torch.Tensor = module(batch, step / max(1, options.steps - 1), generator)
    return loss


def make_learner(
    denoiser: nn.Module,
    logits: MaskLogits,
    options: LearnOptions,
    *,
    teacher: nn.Module | None,
    device: torch.device,
) -> Learner:
    """The module to train, on `device`."""
    denoiser.to(device).requires_grad_(options.train_weights)
    teacher = denoiser if teacher is None else teacher.to(device).eval().requires_grad_(False)
    if not options.train_weights:
        denoiser.eval()
    repeats = options.dataset_size > 0
    outputs = Memo(int(options.memo_memory * GIB) if repeats else 0)
    return Learner(
        denoiser,
        logits.to(device),
        make_estimator(options),
        wanted=lambda batch: outputs(batch, lambda b: answer(teacher, b.inputs)),
        share=options.distill,
        train_weights=options.train_weights,
        mask_loss_weight=options.mask_loss_weight,
        keep_magnitude=options.keep_magnitude,
        first_losses=Memo(GIB if repeats and not options.train_weights else 0),
    )


def make_optimizer(learner: Learner, options: LearnOptions) -> torch.optim.Optimizer:
    """One learning rate for the logits, another for weights trained by AdamW."""
    assert options.lr is not None
    plain = learner.estimator.optimizer == "sgd"
    logits = list(learner.logits.parameters())
    groups = [{"params": logits, "lr": options.lr, "weight_decay": 0.0, "plain": plain}]
    if options.train_weights:
        weights = list(learner.denoiser.parameters())
        groups.append({"params": weights, "lr": options.weight_lr, "name": "weights"})
    return PlainOrAdamW(groups, weight_decay=options.weight_decay, betas=(0.9, options.beta2))


class PlainOrAdamW(torch.optim.AdamW):
    """AdamW, with stateless gradient descent for parameter groups marked `plain`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("plain"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * parameter.grad)
                        parameter.grad = None
        return super().step(closure)
