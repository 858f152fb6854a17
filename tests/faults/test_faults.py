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


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Any:
    return found(tmp_path_factory.mktemp("faults"), "--sample", patience=300)


def test_of_a_sample_of_kills_every_one_is_survived_and_nothing_is_made_twice(sample):
    counts = sample["kills"]["counts"]
    assert sample["kills"]["faults"] == []
    assert counts["survived"] == counts["bit_exact"] == counts["kills"] == sum(KILLS.values())


@pytest.mark.parametrize("name", INPUTS)
def test_a_damaged_input_is_answered_in_one_line_or_used(sample, name):
    assert sample["inputs"]["counts"]["inputs"] == len(INPUTS)
    assert [fault for fault in sample["inputs"]["faults"] if fault["name"] == name] == []


@pytest.mark.slow
def test_every_kill_is_survived_and_nothing_is_made_twice(tmp_path):
    assert found(tmp_path, "--kills", "50", "--jobs", "2", patience=7200)["kills"]["faults"] == []


@pytest.mark.slow
def test_every_damaged_input_is_answered_in_one_line_or_used(tmp_path):
    inputs = found(tmp_path, "--inputs", "all", "--jobs", "2", patience=7200)["inputs"]
    assert inputs["faults"] == []
    assert inputs["counts"]["inputs"] >= 1000
