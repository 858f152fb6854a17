"""Every stage's options, typed. The command line, YAML files and the docs come from these classes."""

from prunedm.options.base import (
    CalibrationOptions,
    DataOptions,
    Input,
    LoopOptions,
    ModelName,
    ModelOptions,
    Options,
    Precision,
    ScoreName,
    ScoreOptions,
)
from prunedm.options.distance import FidOptions, StatsOptions
from prunedm.options.export import PRECISIONS, ExportOptions
from prunedm.options.learn import ESTIMATOR_DEFAULTS, EstimatorName, LearnOptions
from prunedm.options.measure import AnalyzeOptions, EvaluateOptions, LossOptions, SampleOptions
from prunedm.options.prune import TARGETS, Mechanism, PruneOptions, parse_target
from prunedm.options.train import FinetuneOptions, TrainOptions

# names of the options, of any stage, that say what is read
PATH_OPTIONS = frozenset(
    name
    for options in (
        AnalyzeOptions, EvaluateOptions, ExportOptions, FidOptions, FinetuneOptions, LearnOptions,
        LossOptions, PruneOptions, SampleOptions, StatsOptions, TrainOptions,
    )
    for name in options.inputs()
)  # fmt: skip

__all__ = [
    "ESTIMATOR_DEFAULTS",
    "PATH_OPTIONS",
    "PRECISIONS",
    "TARGETS",
    "AnalyzeOptions",
    "CalibrationOptions",
    "DataOptions",
    "EstimatorName",
    "EvaluateOptions",
    "ExportOptions",
    "FidOptions",
    "FinetuneOptions",
    "Input",
    "LearnOptions",
    "LoopOptions",
    "LossOptions",
    "Mechanism",
    "ModelName",
    "ModelOptions",
    "Options",
    "Precision",
    "PruneOptions",
    "SampleOptions",
    "ScoreName",
    "ScoreOptions",
    "StatsOptions",
    "TrainOptions",
    "parse_target",
]
