"""Weights & Biases."""

import os
from pathlib import Path
from typing import Any

from prunedm.options import LoopOptions
from prunedm.training.services import Service, title_of

# seconds to wait for the server; wandb's own are 90, and forever at the end
_PATIENCE = {"init_timeout": 30.0, "finish_timeout": 600.0}


class Wandb(Service):
    """Local files lie in the stage's folder."""

    name = "wandb"
    can_be_offline = True

    def settings(
        self, options: LoopOptions, *, folder: Path, run: str, done: int
    ) -> dict[str, Any]:
        mode = {} if options.tracker_mode == "auto" else {"mode": "offline"}
        return {"id": run, "name": title_of(folder), "resume": "allow", "dir": str(folder)} | mode

    def start(self, options: LoopOptions, settings: dict[str, Any]) -> Any:
        return super().start(options, settings | {"settings": _limits()})


def _limits() -> dict[str, float]:
    """Our patience, where this version has the setting and the environment does not set it."""
    import wandb

    known = getattr(wandb.Settings, "__annotations__", {})
    return {
        limit: seconds
        for limit, seconds in _PATIENCE.items()
        if limit in known and f"WANDB_{limit.upper()}" not in os.environ
    }


WANDB = Wandb()
