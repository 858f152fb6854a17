"""Which N of every M weights to keep, learned: logits, and estimators of the gradient they follow."""

from prunedm import tables
from prunedm.learning.estimator import Estimator, Method
from prunedm.options import LearnOptions
from prunedm.tables import Table

ESTIMATORS: Table[Method] = tables.ESTIMATORS


def make_estimator(options: LearnOptions) -> Estimator:
    """The options' estimator, fresh."""
    return ESTIMATORS[options.estimator].make(options)
