"""The README's Python example runs as it stands, and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from prunedm.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
DOCS = (Path(__file__).parent.parent / "docs" / "index.md").read_text(encoding="utf-8")


def _commands(text: str) -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("prunedm ")]


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    before, after = map(float, capsys.readouterr().out.split("\n")[-2].split(" => "))
    assert after < before
    assert len(list((tmp_path / "demo" / "images").glob("0*.png"))) == 8


@pytest.mark.parametrize("command", sorted({*_commands(README), *_commands(DOCS)}))
def test_every_command_in_the_guides_parses(command):
    _, bound, unused, _ = app.parse_known_args(shlex.split(command)[1:])
    assert not unused
    assert bound.arguments or command == "prunedm run"
