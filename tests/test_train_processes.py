"""Training from scratch in two processes, against one with the same global batch.

Run as a script, this file is what each process does.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, Killed, torchrun

from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.options import TrainOptions
from prunedm.record import read_record
from prunedm.stages import train
from prunedm.training import loop, processes

pytestmark = pytest.mark.slow

WORLD, SIZE = 2, 4
COMMON = {
    "unet": TINY,
    "steps": 6,
    "lr": 1e-3,
    "warmup": 2,
    "accumulation": 2,
    "clip": 0.5,
    "ema_decay": 0.6,
    "flip": True,
    "validate_every": 2,
    "checkpoint_every": 2,
    "validation_problems": 8,
    "device": "cpu",
}
SHARED = TrainOptions(batch_size=SIZE, **COMMON)


def main(place: Path) -> None:
    """What each process does; two runs are killed in all of them, and one is gone on with."""
    train(place / "two", SHARED)
    for name in ("resumed", "left"):
        killed_at(3, place / name)
        processes.wait_for_all()
    train(place / "resumed", SHARED)


def killed_at(step: int, out: Path) -> None:
    take_step = loop._step

    def killed(*arguments, **named):
        if named["step"] == step:
            raise Killed
        return take_step(*arguments, **named)

    loop._step = killed
    try:
        train(out, SHARED)
    except Killed:
        loop._step = take_step


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    torchrun(__file__, place, home=place, world=WORLD)
    return place


def parameters(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load(folder).denoiser.parameters()])


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_two_processes_end_where_one_with_their_whole_batch_ends(place, tmp_path):
    one, _ = train(tmp_path / "one", TrainOptions(batch_size=WORLD * SIZE, **COMMON))
    train(tmp_path / "start", TrainOptions(batch_size=1, **COMMON | {"steps": 1, "lr": 1e-12}))
    two = read_record(place / "two")
    assert two.figures["processes"] == WORLD
    assert "processes" not in one.figures
    for key in ("losses", "held_out"):
        curves = [torch.tensor(r.figures["curve"][key]) for r in (one, two)]
        assert torch.allclose(*curves, rtol=1e-4), key
    assert files(place / "two") == files(tmp_path / "one")
    start, alone, together = map(parameters, (tmp_path / "start", tmp_path / "one", place / "two"))
    # Adam blows rounding up where gradients are 0
    assert (alone - together).norm() < 1e-2 * (alone - start).norm()


def test_two_processes_resume_to_the_same_bits(place):
    assert load(place / "resumed").hash == load(place / "two").hash
    curves = [read_record(place / name).figures["curve"] for name in ("resumed", "two")]
    assert curves[0] == curves[1]
    assert not (place / "resumed.partial").exists()


def test_what_two_processes_began_one_does_not_go_on_with(place):
    checkpoint = place / "left.partial" / "resume" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    with pytest.raises(UserError, match="run in 2 processes, this one has 1; launch 2 again"):
        train(place / "left", SHARED)
    assert checkpoint.read_bytes() == before
    assert not (place / "left").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
