"""How OpenMP's threads wait for one another: a moment of spinning, then asleep.

PyTorch's threads spin while they wait (libgomp: 300,000 rounds). Beside other busy processes they spin
on the very cores that the work needs: a call of 50 ms takes seconds. docs/log.md has the figures.
"""

import os

_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN = "1000"  # rounds: enough for the next parallel loop, and microseconds where there is none


def spin_briefly() -> None:
    """Before torch is imported, unless the user has set a policy; child processes inherit it."""
    if not any(name in os.environ for name in _POLICIES):
        os.environ["GOMP_SPINCOUNT"] = SPIN
