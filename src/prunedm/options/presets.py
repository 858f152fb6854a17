"""Named settings of `prunedm learn`: the five of the old MaskPro scripts, for every estimator, and those
of papers, which name their estimator too."""

import math
from dataclasses import dataclass
from typing import Any

from prunedm.errors import UserError, nearest
from prunedm.options.base import whole_steps
from prunedm.options.learn import EstimatorName, LearnOptions, PolicyGradientOptions

POLICY_GRADIENTS = ("policy-gradient", "policy-gradient-classic")


@dataclass(frozen=True)
class Preset:
    """One of the old configurations.

    passes: over the problems, for estimators that use the gradient of the loss. masks: masks that a
    policy gradient tries; the classic one tries one per step, with learning rate `lr` and initial
    lead `logits`, which other estimators set themselves. old_time: the old documents' estimate.
    """

    purpose: str
    config: str
    dataset_size: int
    batch_size: int
    lr: float
    logits: float
    passes: int
    masks: int
    old_time: str

    def options(self, estimator: EstimatorName) -> dict[str, Any]:
        """What the preset sets; the rest keeps the estimator's defaults."""
        update: dict[str, Any] = {"dataset_size": self.dataset_size, "batch_size": self.batch_size}
        if estimator not in POLICY_GRADIENTS:
            steps = self.passes * math.ceil(self.dataset_size / self.batch_size)
            trained = {"train_weights": True} if estimator == "sr-ste" else {}
            return update | {"steps": steps} | trained
        if estimator == "policy-gradient":
            samples = PolicyGradientOptions().samples
            own = {"policy_gradient": {"samples": samples}}
            return update | {"steps": self.masks // samples} | own
        rare = {"validate_every": 500, "checkpoint_every": 500}  # a step is a forward pass
        return update | {"steps": self.masks, "lr": self.lr, "logits": self.logits} | rare


# sizes, rates, leads and the 15,000 of standard are the old scripts'. The step limits of the others
# are not documented: 10,000 was the default of --max_step
PRESETS: dict[str, Preset] = {
    "quick": Preset(
        "first look", "config 1", 5_000, 16, lr=0.5, logits=3.0,
        passes=1, masks=10_000, old_time="30 min",
    ),
    "standard": Preset(
        "everyday", "config 2", 20_000, 64, lr=1.0, logits=5.0,
        passes=2, masks=15_000, old_time="2 h",
    ),
    "best": Preset(
        "most data", "config 3", 50_000, 32, lr=2.0, logits=7.0,
        passes=2, masks=10_000, old_time="6 h",
    ),
    "efficient": Preset(
        "busy GPU", "config 4", 25_000, 128, lr=1.5, logits=6.0,
        passes=2, masks=10_000, old_time="3 h",
    ),
    "fine": Preset(
        "long run", "config 5", 30_000, 32, lr=0.8, logits=10.0,
        passes=4, masks=10_000, old_time="8 h",
    ),
}  # fmt: skip


# MaskPro (Sun et al. 2025) on language models: frozen weights, the loss under each drawn mask against
# that under the first masks, with a moving average
PAPERS: dict[str, dict[str, Any]] = {
    "maskpro-llm": {
        "estimator": "policy-gradient-classic",
        "distribution": "plackett-luce",
        "distill": 0.0,
        "lr": 50.0,
        "logits": 10.0,
        "steps": 10_000,
        "dataset_size": 512,
        "batch_size": 32,
        "validate_every": 500,
        "checkpoint_every": 500,
    },
}


def preset_options(name: str, estimator: EstimatorName) -> dict[str, Any]:
    """What a preset sets. Raises `UserError` that suggests the nearest one."""
    if name in PAPERS:
        return PAPERS[name]
    if name not in PRESETS:
        raise UserError(f"no preset {name!r} of learn{nearest(name, [*PRESETS, *PAPERS])}")
    return PRESETS[name].options(estimator)


def with_preset(given: LearnOptions, name: str) -> LearnOptions:
    """Defaults < the preset < what was set in `given`."""
    below, above = preset_options(name, given.estimator), given.given()
    groups = {
        key: below[key] | above[key] for key in below.keys() & above if isinstance(below[key], dict)
    }
    return LearnOptions.model_validate(below | above | groups)


@dataclass(frozen=True)
class NetworkPasses:
    """Cost of learning in problems through the network, held-out losses excluded."""

    seen: int
    forward: int
    backward: int


def network_passes(options: LearnOptions) -> NetworkPasses:
    """Cost of `options`, where outputs of repeated problems fit into `memo_memory`.

    A new problem also costs a pass of the dense model and, with the classic rule, one under the
    first masks.
    """
    options = options.filled()
    cycle = whole_steps(options.dataset_size, options)
    seen = options.steps * options.batch_size * options.accumulation
    distinct = min(seen, cycle) if cycle else seen
    tried = seen * (
        options.policy_gradient.samples if options.estimator == "policy-gradient" else 1
    )
    first = distinct if options.estimator == "policy-gradient-classic" else 0
    dense = distinct if options.distill else 0
    by_value = options.estimator in POLICY_GRADIENTS and not options.train_weights
    return NetworkPasses(seen, tried + first + dense, 0 if by_value else tried)
