"""Which N of every M weights to keep, learned: logits, and estimators of the gradient they follow."""

from collections.abc import Callable

from prunedm.learning.estimator import Estimator
from prunedm.learning.policy_gradient import ClassicPolicyGradient, PolicyGradient
from prunedm.learning.relaxation import RelaxedPatterns
from prunedm.learning.sr_ste import SrSte
from prunedm.learning.straight_through import StraightThrough
from prunedm.options import LearnOptions

ESTIMATORS: dict[str, Callable[[LearnOptions], Estimator]] = {
    "relaxed": lambda o: RelaxedPatterns(o.tau),
    "straight-through": lambda o: StraightThrough(o.distribution),
    "policy-gradient": lambda o: PolicyGradient(
        o.distribution, samples=o.samples, explore=o.explore
    ),
    "policy-gradient-classic": lambda o: ClassicPolicyGradient(o.distribution),
    "sr-ste": lambda o: SrSte(o.sr_ste_decay),
}


def make_estimator(options: LearnOptions) -> Estimator:
    """The options' estimator, fresh."""
    return ESTIMATORS[options.estimator](options)
