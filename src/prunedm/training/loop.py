"""One training loop for all training: denoisers from scratch, fine-tuning, mask logits.

Callers give the module and its objective. The loop has the rest: batches by step number, learning
rate schedule, clipping, EMA, checkpoints, exact resume, and stopping on NaN.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from prunedm.errors import NotFinite, UserError
from prunedm.options import LoopOptions
from prunedm.progress import Bar, Progress
from prunedm.randomness import seed_for
from prunedm.task import Batch, Task
from prunedm.training import processes
from prunedm.training.checkpoint import (
    History,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    save_parameters,
)
from prunedm.training.compiling import compiled
from prunedm.training.ema import Ema
from prunedm.training.tracking import Shown, Tracking, new_run, tracked

Objective = Callable[[nn.Module, Batch, int], torch.Tensor]  # (module, batch, step) -> loss
Observe = Callable[[nn.Module], dict[str, float]]  # figures recorded with the held-out loss
Show = Callable[[nn.Module], Shown]  # further data for trackers alone
FLUSH_EVERY = 10  # steps between reads of the losses, each of which waits for the device


def fit(
    module: nn.Module,
    objective: Objective,
    *,
    problems: Task,
    options: LoopOptions,
    accelerator: Accelerator,
    checkpoint: Path,
    progress: Progress,
    label: str,
    after_step: Callable[[int], None] = lambda step: None,
    validate: Callable[[nn.Module], float] | None = None,
    observe: Observe = lambda module: {},
    show: Show = lambda module: Shown(),
    optimizer: torch.optim.Optimizer | None = None,
    best: Path | None = None,
    compiles: bool = False,
) -> History:
    """Train `module` in place; with `ema_decay` it ends with the averaged weights.

    Continues from `checkpoint` if that file exists, to the same bits as an uninterrupted run.
    `after_step(step)` may change the module (masks). `optimizer` (default AdamW) follows the schedule
    from its own learning rates; those after the first are tracked by `name`. `best`: a file for the
    parameters with the lowest held-out loss, the initial ones included. With `compiles` only the steps
    run compiled. Raises `UserError` on a loss that is not finite; the checkpoint stays valid.
    """
    optimizer, folder = optimizer or adamw(module, options), checkpoint.parent.parent
    peaks = [group["lr"] for group in optimizer.param_groups]
    prepared, optimizer = accelerator.prepare(module, optimizer)
    ema = Ema(module, options.ema_decay) if options.ema_decay else None
    state = TrainingState(
        module,
        optimizer,
        ema,
        History(),
        scaler=accelerator.scaler,
        processes=accelerator.num_processes,
    )
    load_checkpoint(checkpoint, state)
    _compare_threads(state, label, progress)
    state.run = state.run or new_run()
    take_step = partial(
        _step,
        compiled(prepared, accelerator.device, progress) if compiles else prepared,
        objective,
        prepared=prepared,
        batches=problems.batches(
            _index_lists(options, state.done, accelerator), workers=options.workers
        ),
        optimizer=optimizer,
        accelerator=accelerator,
        clip=options.clip,
    )
    with (
        tracked(
            options, folder, state.run, state.done, progress, here=accelerator.is_main_process
        ) as tracking,
        progress.task(label, options.steps, state.done) as bar,
    ):
        run = _Run(state, accelerator, checkpoint, validate, observe, show, best, tracking, bar)
        if best and state.done == 0:
            run.look()
        prepared.train()
        while state.done < options.steps:
            step = state.done
            torch.manual_seed(seed_for(options.seed, "dropout", _draw(step, accelerator)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_share(options, step)
            run.pending.append(take_step(step=step))
            after_step(step)
            if ema is not None:
                ema.update(module)
            state.done += 1
            run.after_step(options)
            bar.advance(1, _note(state.history))
    if ema is not None:
        ema.copy_to(module)
    _end_autocast(module)
    module.eval()
    return state.history


def _end_autocast(module: nn.Module) -> None:
    """Give the module its class's call back: accelerate's way drops transformers' decorators too."""
    for name in ("forward", "_original_forward"):
        vars(module).pop(name, None)


def make_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerate context of one stage, also for several processes."""
    # else every stage of a process would keep the precision and device of the first
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.accumulation,
            cpu=options.device == "cpu" or processes.without_gpus(),
        )
    except ValueError as error:
        raise UserError(
            f"mixed_precision = {options.mixed_precision!r}: {error}; try bf16 or no"
        ) from error
    if accelerator.device.type == "cpu":
        # several processes have "cpu:0", to which torch copies tensors from "cpu": references to the
        # weights' memory (masks) would then be stale
        accelerator.state.device = torch.device("cpu")
    return accelerator


def adamw(module: nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters, with the options' learning rate, decay and beta2."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, options.beta2)
    )


def learning_rate_share(options: LoopOptions, step: int) -> float:
    """Share of the peak rate: linear warm-up, then constant or cosine to zero."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


def _compare_threads(state: TrainingState, label: str, progress: Progress) -> None:
    """Warn where the number of threads changed, which splits sums otherwise and changes last bits."""
    here = torch.get_num_threads()
    if state.threads != here:
        progress.say(
            f"{label}: began with {state.threads} threads and continues with {here}, which gives other "
            f"last bits; OMP_NUM_THREADS={state.threads} gives those of an unbroken run"
        )
        state.threads = here


@dataclass
class _Run:
    """What the loop does between steps: losses, held-out losses, the best state, checkpoints."""

    state: TrainingState
    accelerator: Accelerator
    checkpoint: Path
    validate: Callable[[nn.Module], float] | None
    observe: Observe
    show: Show
    best: Path | None
    tracking: Tracking
    bar: Bar
    pending: list[torch.Tensor] = field(default_factory=list)  # losses still on the device

    def after_step(self, options: LoopOptions) -> None:
        """Do whatever is due after a step."""
        done, module = self.state.done, self.state.module
        last = done == options.steps
        checkpoint_due = _due(done, options.checkpoint_every) and not last
        if len(self.pending) >= FLUSH_EVERY or last or checkpoint_due:
            self.flush()
        if _due(done, options.validate_every) or last:
            self.look()
        if checkpoint_due and self.accelerator.is_main_process and _is_finite(module):
            save_checkpoint(self.checkpoint, self.state)

    def flush(self) -> None:
        """Move losses, averaged over processes, to the history; stop at one that is not finite.

        All processes stop, since the others would wait for one that stopped alone.
        """
        state = self.state
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
        self.pending.clear()
        for step, loss in enumerate(losses, start=state.done - len(losses)):
            _check_finite(loss, "loss", step, self.checkpoint)
        state.history.losses.extend(losses)
        first, *more = state.optimizer.param_groups
        rates = {f"lr_{group.get('name', k)}": group["lr"] for k, group in enumerate(more, 1)}
        rates["lr"] = first["lr"]
        self._tell({"loss": sum(losses) / len(losses)} | rates)

    def look(self) -> None:
        """Measure the held-out loss and other figures of the averaged parameters."""
        if self.validate is None:
            return
        state = self.state
        mode = state.module.training
        with _averaged(state.module, state.ema):
            try:
                held_out, figures = self.validate(state.module), self.observe(state.module)
            except NotFinite:  # the message depends on the step
                held_out, figures = math.nan, {}
            _check_finite(held_out, "held-out loss", state.done - 1, self.checkpoint)
            state.history.held_out.append((state.done, held_out))
            for name, value in figures.items():
                state.history.observed.setdefault(name, []).append((state.done, value))
            if self.best and self.accelerator.is_main_process and state.history.at_best:
                save_parameters(self.best, state.module)
            self.tracking.show(lambda: self.show(state.module), state.done)
        state.module.train(mode)
        self._tell({"held_out_loss": held_out} | figures)

    def _tell(self, figures: dict[str, float]) -> None:
        self.tracking.log(figures, self.state.done)
        self.bar.figures(figures, self.state.done)


def _draw(step: int, accelerator: Accelerator) -> int:
    """A number unique to this step in this process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return int(step * world + rank)


def _step(
    module: nn.Module,
    objective: Objective,
    *,
    prepared: nn.Module,
    batches: Iterator[Batch],
    step: int,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    clip: float,
) -> torch.Tensor:
    """One optimizer step over the accumulated batches; the mean loss, still on the device.

    module: the module to call: `prepared` (by accelerate) or its compiled form.
    """
    total = torch.zeros((), device=accelerator.device)
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches).to(accelerator.device)
        with accelerator.accumulate(prepared):
            with accelerator.autocast():
                loss = objective(module, batch, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(prepared.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach().float() / accelerator.gradient_accumulation_steps
    return total


def _index_lists(options: LoopOptions, done: int, accelerator: Accelerator) -> list[range]:
    """Problem indices of all remaining batches; processes take neighbouring slices."""
    size, rank, world = options.batch_size, accelerator.process_index, accelerator.num_processes
    first, last = done * options.accumulation, options.steps * options.accumulation
    starts = [(k * world + rank) * size for k in range(first, last)]
    return [range(start, start + size) for start in starts]


def _check_finite(loss: float, what: str, step: int, checkpoint: Path) -> None:
    if not math.isfinite(loss):
        if step <= 0 and what == "loss":  # no weight has changed: not the learning rate's fault
            raise UserError(
                f"{what} is {loss} at the first step: give another model, masks or data"
            )
        if step < 0:
            raise UserError(f"{what} is {loss} before the first step: give another model or masks")
        kept = f"; the last good state is in {checkpoint}" if checkpoint.exists() else ""
        raise UserError(f"{what} is {loss} at step {step}: lower --lr or raise --warmup{kept}")


def _is_finite(module: nn.Module) -> bool:
    """Whether weights are finite; after a finite loss with an infinite gradient they are not."""
    return all(bool(p.isfinite().all()) for p in module.parameters())


@contextmanager
def _averaged(module: nn.Module, ema: Ema | None) -> Iterator[None]:
    """Within the context the module has the EMA's parameters, if any."""
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
