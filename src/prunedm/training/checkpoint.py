"""The state of a training run in one safetensors file: no pickle, replaced atomically."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from prunedm.errors import UserError
from prunedm.reading import check_regular, parse_json
from prunedm.training.ema import Ema


@dataclass
class History:
    """Training loss of every step, and held-out losses as (steps done, loss) pairs.

    observed: further figures by name, as (steps done, value) pairs.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    observed: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def at_best(self) -> bool:
        """Whether the last held-out loss is lower than all others."""
        *before, last = [loss for _, loss in self.held_out]
        return all(last < loss for loss in before)

    def as_figures(self, points: int = 200) -> dict[str, object]:
        """For the record: training losses averaged to at most `points`, and held-out losses."""
        stride = max(1, -(-len(self.losses) // points))
        chunks = [self.losses[k : k + stride] for k in range(0, len(self.losses), stride)]
        means = [sum(chunk) / len(chunk) for chunk in chunks]
        curve = {"stride": stride, "losses": means, "held_out": self.held_out}
        return {"curve": curve | ({"observed": self.observed} if self.observed else {})}


@dataclass
class TrainingState:
    """Everything that determines the rest of a run after `done` steps."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    history: History
    done: int = 0
    scaler: torch.amp.GradScaler | None = None  # type: ignore[name-defined]  # of fp16
    run: str = ""  # the tracker's id of this run
    processes: int = 1  # sharing every step
    threads: int = field(default_factory=torch.get_num_threads)  # CPU threads of the steps so far


class _Facts(BaseModel):
    """A checkpoint's data besides tensors; old ones lack `observed`, `processes` and `threads`."""

    model_config = ConfigDict(extra="allow")

    done: int = Field(ge=0)
    ema_updates: int = Field(ge=0)
    losses: list[float]
    held_out: list[tuple[int, float]]
    observed: dict[str, list[tuple[int, float]]] = {}
    scaler: dict[str, Any] = {}
    run: str = ""
    processes: int | None = None
    threads: int | None = None


def save_checkpoint(path: Path, state: TrainingState) -> None:
    """Write the state atomically: an existing file is complete even if the process is killed."""
    tensors = _module_state(state.module)
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(v) for key, v in values.items()}
    if state.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.shadow.items()}
    facts = {
        "done": state.done,
        "ema_updates": state.ema.updates if state.ema else 0,
        "losses": state.history.losses,
        "held_out": state.history.held_out,
        "observed": state.history.observed,
        "scaler": state.scaler.state_dict() if state.scaler else {},
        "run": state.run,
        "processes": state.processes,
        "threads": state.threads,
    }
    _write(path, tensors, {"facts": json.dumps(facts)})


def _module_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor once: language models tie their head to the embedding."""
    state = module.state_dict()
    once = {t.data_ptr(): name for name, t in reversed(state.items()) if t.numel()}
    return {f"module.{n}": t.detach() for n, t in state.items() if once.get(t.data_ptr(), n) == n}


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Restore in place what `save_checkpoint` wrote; without a file nothing changes.

    Raises `UserError` where the file is damaged, of another module, or of another number of
    processes, whose steps used other problems.
    """
    if not path.exists():
        return
    tensors, written = _read(path)
    try:
        facts = _Facts.model_validate(written)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    own = _module_state(state.module)
    if {n: t.shape for n, t in own.items()} != {
        n: t.shape for n, t in tensors.items() if n.startswith("module.")
    }:
        raise UserError(f"checkpoint {path} is of another model; delete it to start again")
    processes = facts.processes
    if processes not in (None, state.processes):
        raise UserError(
            f"checkpoint {path} is of a run in {processes} processes, this one has "
            f"{state.processes}; launch {processes} again, or delete it to start again"
        )
    try:
        _restore(state, own, tensors, facts)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _restore(
    state: TrainingState,
    own: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    facts: _Facts,
) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[key] = tensor
    if len({frozenset(values) for values in optimizer_state.values()}) > 1:
        raise KeyError("the optimizer's state is not whole")
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": optimizer_state})
    if state.ema is not None:
        shadow = {n.removeprefix("ema."): t for n, t in tensors.items() if n.startswith("ema.")}
        if shadow.keys() != state.ema.shadow.keys():
            raise KeyError("the averaged weights are not whole")
        state.ema.load(shadow, facts.ema_updates)
    state.history.losses[:] = facts.losses
    state.history.held_out[:] = facts.held_out
    state.history.observed = facts.observed
    state.done, state.run = facts.done, facts.run
    state.threads = facts.threads or state.threads
    if state.scaler is not None and facts.scaler:
        state.scaler.load_state_dict(facts.scaler)


def save_parameters(path: Path, module: nn.Module) -> None:
    """Write the parameters alone."""
    _write(path, {name: p.detach() for name, p in module.named_parameters()}, {"facts": "{}"})


def load_parameters(path: Path, module: nn.Module) -> None:
    """Restore in place what `save_parameters` wrote."""
    tensors, _ = _read(path)
    try:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[name])
    except (KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, aside, metadata=metadata)
    aside.replace(path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            facts = parse_json((file.metadata() or {})["facts"], "facts")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    return tensors, facts


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"checkpoint {path} is damaged ({reason}); delete it to start again")
