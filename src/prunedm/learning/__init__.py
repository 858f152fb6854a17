"""Learning which N of every M weights to keep: logits, and estimators of their gradient."""

from prunedm import tables
from prunedm.learning.estimator import Estimator, Method
from prunedm.options import LearnOptions
from prunedm.tables import Table

ESTIMATORS: Table[Method] = tables.ESTIMATORS


def make_estimator(options: LearnOptions) -> Estimator:
    """A new estimator by the options."""
    return ESTIMATORS[options.estimator].make(options)
