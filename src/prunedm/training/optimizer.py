"""AdamW and its learning rate over the steps."""

import math

import torch
from torch import nn

from prunedm.options import LoopOptions


def adamw(module: nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """Over all parameters that want gradients, with the options' learning rate, decay and beta2."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, options.beta2)
    )


def learning_rate_share(options: LoopOptions, step: int) -> float:
    """Of the peak: linear warm-up, then constant or cosine to zero."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))
