"""A sample of the faults from outside; `pytest -m slow` tries all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .sample import INPUTS, KILLS

ROOT = Path(__file__).parents[2]


def found(folder: Path, *options: str, patience: int) -> Any:
    """What `python -m tests.faults` wrote."""
    out = folder / "faults.json"
    command = [sys.executable, "-m", "tests.faults", *options, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=patience, check=False
    )
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_sample_of_kills_is_survived_and_of_inputs_answered_in_one_line(tmp_path):
    """One test: what is slow is the server's start."""
    sample = found(tmp_path, "--sample", patience=300)
    kills, inputs = sample["kills"], sample["inputs"]
    assert kills["faults"] == []
    assert kills["counts"]["bit_exact"] == kills["counts"]["kills"] == sum(KILLS.values())
    assert inputs["faults"] == []
    assert inputs["counts"]["inputs"] == len(INPUTS)


@pytest.mark.slow
def test_every_kill_is_survived_and_nothing_is_made_twice(tmp_path):
    assert found(tmp_path, "--kills", "50", "--jobs", "2", patience=7200)["kills"]["faults"] == []


@pytest.mark.slow
def test_every_damaged_input_is_answered_in_one_line_or_used(tmp_path):
    inputs = found(tmp_path, "--inputs", "all", "--jobs", "2", patience=7200)["inputs"]
    assert inputs["faults"] == []
    assert inputs["counts"]["inputs"] >= 1000
