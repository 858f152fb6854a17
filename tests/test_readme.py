"""The README's Python example runs as it stands, on a model that a test can wait for."""

import re
from pathlib import Path

from helpers import tiny_folder

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert example.count('"digits"') == 1
    example = example.replace('"digits"', repr(str(tiny_folder())))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    before, after = map(float, capsys.readouterr().out.split("\n")[-2].split(" => "))
    assert after < before
    assert len(list((tmp_path / "demo" / "images").glob("0*.png"))) == 8
