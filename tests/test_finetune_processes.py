"""Fine-tuning in two processes, against one with the same global batch.

Run as a script, this file is what each process does.
"""

import sys
from pathlib import Path

import pytest
import torch
from helpers import Killed, tiny_model, torchrun

from prunedm.folder import load, save
from prunedm.options import FinetuneOptions, PruneOptions
from prunedm.record import read_record
from prunedm.stages import finetune, prune
from prunedm.training import loop, processes

pytestmark = pytest.mark.slow

WORLD, SIZE, STEPS = 2, 4, 6
COMMON = {
    "steps": STEPS,
    "lr": 1e-3,
    "warmup": 2,
    "accumulation": 2,
    "clip": 0.5,
    "ema_decay": 0.6,
    "validate_every": 2,
    "checkpoint_every": 2,
    "validation_problems": 8,
    "device": "cpu",
}
MIXTURES = {
    "output": {},
    "everything": {"match_features": 0.5, "match_sensitivity": 0.5, "sensitivity_every": 4},
}


def main(place: Path) -> None:
    """What each process does; "killed" is interrupted in all of them, and gone on with."""
    for name, mixture in MIXTURES.items():
        options = FinetuneOptions(batch_size=SIZE, **COMMON, **mixture)
        finetune(place / "hybrid", place / f"{name}-two", options)
    options = FinetuneOptions(batch_size=SIZE, **COMMON)
    step = loop._step

    def killed(*arguments, **named):
        if named["step"] == 3:
            raise Killed
        return step(*arguments, **named)

    loop._step = killed
    try:
        finetune(place / "hybrid", place / "killed", options)
    except Killed:
        loop._step = step
    assert (place / "killed.partial" / "resume" / "checkpoint.safetensors").exists()
    processes.wait_for_all()
    finetune(place / "hybrid", place / "killed", options)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    save(tiny_model(), place / "dense")
    prune(place / "dense", place / "narrow", PruneOptions(score="magnitude", pictures=0))
    options = PruneOptions(mechanism="nm", score="magnitude", pictures=0)
    prune(place / "narrow", place / "hybrid", options)
    torchrun(__file__, place, home=place, world=WORLD)
    return place


def parameters(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load(folder).denoiser.parameters()])


@pytest.mark.parametrize("name", list(MIXTURES))
def test_two_processes_end_where_one_with_their_whole_batch_ends(name, launched, tmp_path):
    options = FinetuneOptions(batch_size=WORLD * SIZE, **COMMON, **MIXTURES[name])
    one, _ = finetune(launched / "hybrid", tmp_path / "one", options)
    two = read_record(launched / f"{name}-two")
    assert two.figures["processes"] == WORLD
    assert "processes" not in one.figures
    for key in ("losses", "held_out"):
        curves = [torch.tensor(r.figures["curve"][key]) for r in (one, two)]
        assert torch.allclose(*curves, rtol=1e-4), key
    start, alone, together = (
        parameters(folder)
        for folder in (launched / "hybrid", tmp_path / "one", launched / f"{name}-two")
    )
    # Adam blows rounding up where gradients are 0
    assert (alone - together).norm() < 1e-2 * (alone - start).norm()
    model = load(launched / f"{name}-two")
    assert model.masks.violations(model.denoiser) == {}


def test_two_processes_resume_to_the_same_bits(launched):
    assert load(launched / "killed").hash == load(launched / "output-two").hash
    curves = [read_record(launched / n).figures["curve"] for n in ("killed", "output-two")]
    assert curves[0] == curves[1]
    assert not list(launched.glob("*.partial"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
