"""OpenMP's threads spin briefly, unless the user wants otherwise."""

import os
import subprocess
import sys

import pytest

SHOWN = "import os, sys, prunedm; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "1000 False"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
    ],
)
def test_the_policy_is_set_before_torch_is_imported_and_left_to_the_user(given, wanted):
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], env=own | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == wanted
