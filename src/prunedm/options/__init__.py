"""Every stage's options, typed. The command line, YAML files and the docs come from these classes."""

from prunedm.options.base import (
    PATH_OPTIONS,
    CalibrationOptions,
    DataOptions,
    Group,
    Leaf,
    LoopOptions,
    ModelName,
    ModelOptions,
    Options,
    Precision,
    ScoreName,
    ScoreOptions,
)
from prunedm.options.distance import FidOptions, StatsOptions
from prunedm.options.export import ExportOptions
from prunedm.options.learn import EstimatorName, LearnOptions
from prunedm.options.marks import How, Input, OneOf
from prunedm.options.measure import AnalyzeOptions, EvaluateOptions, LossOptions, SampleOptions
from prunedm.options.prune import TARGETS, Mechanism, PruneOptions, parse_target
from prunedm.options.train import FinetuneOptions, TrainOptions
