"""The verbs: each reads a model folder, does one thing, and writes a new folder with a record."""

from prunedm.options import EvaluateOptions
from prunedm.sampling import make_sampler
from prunedm.stages.inputs import images_for
from prunedm.stages.verbs.analyze import analyze
from prunedm.stages.verbs.compare import compare
from prunedm.stages.verbs.evaluate import evaluate, with_features
from prunedm.stages.verbs.export import export
from prunedm.stages.verbs.finetune import finetune
from prunedm.stages.verbs.learn import learn
from prunedm.stages.verbs.loss import loss
from prunedm.stages.verbs.prune import prune
from prunedm.stages.verbs.sample import sample
from prunedm.stages.verbs.train import train


def check_inputs(model: str, options: EvaluateOptions) -> None:
    """Open everything that a long run will need at its end. Raises `UserError` where it would fail."""
    from prunedm.folder import load

    loaded = load(model)
    for split in ("train", "test"):
        images = images_for(loaded, options, split)
        images[0]
    with_features(options, images)
    make_sampler(loaded.scheduler, options.sampler)


__all__ = [
    "analyze",
    "check_inputs",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "learn",
    "loss",
    "prune",
    "sample",
    "train",
]
