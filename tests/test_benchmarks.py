"""The published tables are what the benchmarks make of their records, and their commands still parse."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
DOCS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RECORDS = [
    path
    for path in sorted((BENCHMARKS / "results").glob("*.json"))
    if f"<!-- {path.stem}: begin -->" in DOCS and "name" in json.loads(path.read_text())
]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_published_section_is_that_of_its_record(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    _, script, *given = shlex.split(result["command"])
    benchmark = import_module(Path(script).stem)
    body = (
        benchmark.markdown(result, benchmark.PARSER.parse_args(given))
        if "arguments" in signature(benchmark.markdown).parameters
        else benchmark.markdown(result)
    )
    begin, end = (f"<!-- {path.stem}: {which} -->" for which in ("begin", "end"))
    published = DOCS.partition(f"{begin}\n")[2].partition(f"\n{end}")[0]
    assert re.sub(r"\n\n\*Disturbed: .*\*$", "", published) == body


def test_a_section_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    bench = import_module("bench")
    monkeypatch.setattr(bench, "DOCS", tmp_path / "results.md")
    bench.DOCS.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    bench.into_docs("x", r"new \1")
    assert bench.DOCS.read_text() == "a\n<!-- x: begin -->\nnew \\1\n<!-- x: end -->\nb\n"
    with pytest.raises(AssertionError, match="no section y"):
        bench.into_docs("y", "")


def test_options_have_the_types_of_their_defaults():
    parser = import_module("bench").parser_of(
        "A title.\n\nMore.", {"model": "digits", "lr": (1e-3, "of it"), "flip": False, "sizes": [1]}
    )
    found = vars(parser.parse_args(["me", "--lr", "1", "--sizes", "2", "3"]))
    assert found == {"name": "me", "model": "digits", "lr": 1.0, "flip": False, "sizes": [2, 3]}
    assert isinstance(found["lr"], float)
    assert parser.description == "A title."


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(p.stem for p in BENCHMARKS.glob("*.py")))
def test_every_script_says_what_it_takes(script):
    path = BENCHMARKS / f"{script}.py"
    if "__main__" in path.read_text(encoding="utf-8"):
        found = subprocess.run(
            [sys.executable, str(path), "--help"], capture_output=True, text=True, check=True
        )
        assert "usage" in found.stdout
