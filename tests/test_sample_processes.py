"""Sampling shared by processes: the same bits whatever their number, also over an interruption.

Run as a script, this file is what each of two processes does: draw one batch, and vanish.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Killed, tiny_folder, tiny_model, torchrun

from prunedm.options import SampleOptions
from prunedm.progress import Silent
from prunedm.stages import sample
from prunedm.training import processes

OPTIONS = SampleOptions(count=10, batch_size=2, sampling_steps=2, device="cpu", format="npz")
NAMES = [f"batch-{k:06d}.npz" for k in range(5)]


def images(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["images"]


def interrupt(after: int, drawn: list[range]) -> None:
    """Let `after` more batches be drawn in this process; they are written to `drawn`."""
    from prunedm.sampling import draw

    draw_batch = draw._sample

    def interrupted(*arguments, **named):
        if len(drawn) == after:
            raise Killed
        drawn.append(named["indices"])
        return draw_batch(*arguments, **named)

    draw._sample = interrupted


def main(out: Path, model: Path) -> None:
    interrupt(1, [])
    try:
        sample(model, out, OPTIONS)
    except Killed:
        os._exit(0)  # no error: torchrun would stop the other process for one


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> np.ndarray:
    out = tmp_path_factory.mktemp("one") / "out"
    sample(tiny_folder(), out, OPTIONS)
    return images(out)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_each_batch_is_drawn_by_one_process(tmp_path, monkeypatch, whole, world):
    """The processes one after the other, without the waiting."""
    module = sys.modules["prunedm.stages.verbs.sample"]
    monkeypatch.setattr(processes, "wait_for_all", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        before = {path.name for path in tmp_path.iterdir()}
        files = module._draw(tiny_model(), OPTIONS, tmp_path, Silent())
        assert [file.name for file in files] == NAMES
        new = {path.name for path in tmp_path.iterdir()} - before
        assert new == set(NAMES[rank::world])
    assert np.array_equal(np.concatenate(list(module._read_all(files))), whole)


@pytest.mark.slow
def test_two_processes_write_one_folder_of_the_same_bits(tmp_path, whole):
    out = tmp_path / "out"
    words = ["-m", "prunedm", "sample", str(tiny_folder()), str(out), "--device", "cpu"]
    few = ["--count", "10", "--batch-size", "2", "--sampling-steps", "2", "--format", "npz"]
    said = torchrun(*words, *few)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {"grid.png", "record.json", "samples.npz"}
    assert np.array_equal(images(out), whole)
    assert said.count("took") == 1


@pytest.mark.slow
def test_what_two_processes_began_one_ends(tmp_path, whole, monkeypatch):
    out = tmp_path / "out"
    torchrun(__file__, out, tiny_folder(), home=tmp_path)
    resume = tmp_path / "out.partial" / "resume"
    assert {path.name for path in resume.iterdir()} == set(NAMES[:2])
    from prunedm.sampling import draw

    monkeypatch.setattr(draw, "_sample", draw._sample)  # put back at the end
    drawn = []
    interrupt(9, drawn)
    sample(tiny_folder(), out, OPTIONS)
    assert drawn == [range(4, 6), range(6, 8), range(8, 10)]
    assert np.array_equal(images(out), whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
