"""The verbs: each reads a model folder, does one thing, and writes a new folder with a record.

`VERBS` has one record per verb (table.py), and `prunedm.stages.prune` is the function of `prune`'s.
Nothing heavy is imported before a verb is called.
"""

from typing import Any

from prunedm.options import EvaluateOptions
from prunedm.stages.table import STAGES, VERBS

__all__ = ["STAGES", "VERBS", "check_inputs", *VERBS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return VERBS[name].function
    raise AttributeError(f"module 'prunedm.stages' has no attribute {name!r}")


def check_inputs(model: str, options: EvaluateOptions) -> None:
    """Open everything a long run needs at its end. Raises `UserError` where that would fail."""
    from prunedm.folder import load
    from prunedm.sampling import make_sampler
    from prunedm.stages.evaluating.quality import with_features
    from prunedm.stages.inputs import data_for

    loaded = load(model)
    for split in ("train", "test"):
        data = data_for(loaded, options, split)
        data[0]
    with_features(options, data)
    if loaded.scheduler is not None:
        make_sampler(loaded.scheduler, options.sampler)
