"""Every stage's options, typed. The command line, YAML files and the docs come from these classes."""

from prunedm.options.base import (
    CalibrationOptions,
    DataOptions,
    LoopOptions,
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

__all__ = [
    "ESTIMATOR_DEFAULTS",
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
    "LearnOptions",
    "LoopOptions",
    "LossOptions",
    "Mechanism",
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
