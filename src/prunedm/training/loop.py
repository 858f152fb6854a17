"""One training loop for everything that is trained: denoisers from scratch, weights, mask logits.

What changes between them is the module and its objective. What does not is here: batches by step
number, learning rate schedule, clipping, EMA, checkpoints, exact resume, and stopping on NaN.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from prunedm.diffusion import DenoisingProblems, ProblemBatch
from prunedm.errors import UserError
from prunedm.options import LoopOptions
from prunedm.progress import Progress
from prunedm.randomness import seed_for
from prunedm.training import processes
from prunedm.training.checkpoint import (
    History,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    save_parameters,
)
from prunedm.training.ema import Ema

Objective = Callable[[nn.Module, ProblemBatch, int], torch.Tensor]  # (module, batch, step) -> loss
Observe = Callable[[nn.Module], dict[str, float]]  # figures to keep beside the held-out loss
FLUSH_EVERY = 10  # steps between looks at the losses: a look waits for the device


def fit(
    module: nn.Module,
    objective: Objective,
    *,
    problems: DenoisingProblems,
    options: LoopOptions,
    accelerator: Accelerator,
    checkpoint: Path,
    progress: Progress,
    label: str,
    after_step: Callable[[int], None] = lambda step: None,
    validate: Callable[[nn.Module], float] | None = None,
    observe: Observe = lambda module: {},
    optimizer: torch.optim.Optimizer | None = None,
    best: Path | None = None,
) -> History:
    """Train `module` in place; it holds the EMA weights at the end where `ema_decay` is set.

    Continues from `checkpoint` if that file exists, to the same bits as an unbroken run.
    `after_step(step)` may change the module (masks). `optimizer`, AdamW where none is given, follows
    the schedule from the learning rates it has. `best` is a file for the parameters of the lowest
    held-out loss, the start's included. Raises `UserError` on a loss that is not finite; the last
    good state stays in the checkpoint.
    """
    optimizer = optimizer or adamw(module, options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    prepared, optimizer = accelerator.prepare(module, optimizer)
    ema = Ema(module, options.ema_decay) if options.ema_decay else None
    state = TrainingState(module, optimizer, ema, History())
    load_checkpoint(checkpoint, state)
    batches = problems.batches(
        _index_lists(options, state.done, accelerator), workers=options.workers
    )
    pending: list[torch.Tensor] = []
    if best and validate is not None and state.done == 0:
        _look(state, validate(module), observe(module), checkpoint)
        if accelerator.is_main_process:
            save_parameters(best, module)
    prepared.train()
    with progress.task(label, options.steps, state.done) as bar:
        while state.done < options.steps:
            step = state.done
            torch.manual_seed(seed_for(options.seed, "dropout", step))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_share(options, step)
            loss = _step(
                prepared,
                objective,
                batches=batches,
                step=step,
                optimizer=optimizer,
                accelerator=accelerator,
                clip=options.clip,
            )
            pending.append(loss)
            after_step(step)
            if ema is not None:
                ema.update(module)
            state.done += 1
            last = state.done == options.steps
            checkpoint_due = _due(state.done, options.checkpoint_every) and not last
            if len(pending) >= FLUSH_EVERY or last or checkpoint_due:
                _flush(pending, state, checkpoint)
            if validate is not None and (_due(state.done, options.validate_every) or last):
                with _averaged(module, ema):
                    _look(state, validate(module), observe(module), checkpoint)
                    if best and accelerator.is_main_process and state.history.at_best:
                        save_parameters(best, module)
                prepared.train()
            if checkpoint_due and accelerator.is_main_process and _is_finite(module):
                save_checkpoint(checkpoint, state)
            bar.advance(1, _note(state.history))
    if ema is not None:
        ema.copy_to(module)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # autocast ends with the training
    module.eval()
    return state.history


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


def make_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerate context of one stage: one process now, several under `accelerate launch`."""
    # accelerate would hold every stage of a process to the precision and device of the first
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        return Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.accumulation,
            cpu=options.device == "cpu" or processes.without_gpus(),
        )
    except ValueError as error:
        raise UserError(
            f"mixed_precision = {options.mixed_precision!r}: {error}; try bf16 or no"
        ) from error


def _step(
    module: nn.Module,
    objective: Objective,
    *,
    batches: Iterator[ProblemBatch],
    step: int,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    clip: float,
) -> torch.Tensor:
    """One optimizer step over the accumulated batches; the mean loss, still on the device."""
    total = torch.zeros((), device=accelerator.device)
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches).to(accelerator.device)
        with accelerator.accumulate(module):
            with accelerator.autocast():
                loss = objective(module, batch, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach().float() / accelerator.gradient_accumulation_steps
    return total


def _index_lists(options: LoopOptions, done: int, accelerator: Accelerator) -> list[range]:
    """Problem indices of every batch still to come; processes take neighbouring slices."""
    size, rank, world = options.batch_size, accelerator.process_index, accelerator.num_processes
    first, last = done * options.accumulation, options.steps * options.accumulation
    starts = [(k * world + rank) * size for k in range(first, last)]
    return [range(start, start + size) for start in starts]


def _flush(pending: list[torch.Tensor], state: TrainingState, checkpoint: Path) -> None:
    """Move losses to the history; a loss that is not finite stops the run."""
    losses = torch.stack(pending).tolist()
    pending.clear()
    for step, loss in enumerate(losses, start=state.done - len(losses)):
        _check_finite(loss, "loss", step, checkpoint)
    state.history.losses.extend(losses)


def _check_finite(loss: float, what: str, step: int, checkpoint: Path) -> None:
    if not math.isfinite(loss):
        if step < 0:
            raise UserError(f"{what} is {loss} before the first step: give another model or masks")
        kept = f"; the last good state is in {checkpoint}" if checkpoint.exists() else ""
        raise UserError(f"{what} is {loss} at step {step}: lower --lr or raise --warmup{kept}")


def _is_finite(module: nn.Module) -> bool:
    """A finite loss can have a gradient that is not: such weights must not become the good state."""
    return all(bool(p.isfinite().all()) for p in module.parameters())


def _look(
    state: TrainingState, held_out: float, figures: dict[str, float], checkpoint: Path
) -> None:
    """Held-out loss and whatever else is observed, into the history."""
    _check_finite(held_out, "held-out loss", state.done - 1, checkpoint)
    state.history.held_out.append((state.done, held_out))
    for name, value in figures.items():
        state.history.observed.setdefault(name, []).append((state.done, value))


@contextmanager
def _averaged(module: nn.Module, ema: Ema | None) -> Iterator[None]:
    """With the EMA's parameters in the module, where there are any; then as it was."""
    if ema is None:
        yield
        return
    live = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema.copy_to(module)
    yield
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(live[name])


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _note(history: History) -> str:
    recent = history.losses[-50:]
    held_out = f", held out {history.held_out[-1][1]:.4f}" if history.held_out else ""
    return f"loss {sum(recent) / len(recent):.4f}{held_out}" if recent else ""
