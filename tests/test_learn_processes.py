"""Mask learning in two processes, against both shares worked out in one.

Run as a script, this file is what each process does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import noise_images, problems, tiny_folder, tiny_model, torchrun
from safetensors.torch import load_file, save_file
from torch import nn

from prunedm.architecture import answer
from prunedm.folder import load
from prunedm.learning import ESTIMATORS
from prunedm.learning.logits import MaskLogits
from prunedm.learning.trainer import Learned, learn_masks, make_learner
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import LearnOptions
from prunedm.progress import Silent
from prunedm.randomness import seed_for
from prunedm.removal.nm import nm_masks
from prunedm.scores import score_layers
from prunedm.training.loop import make_accelerator

WORLD, SIZE = 2, 3
TAU = (1.0, 1.0)
KEEP = {"policy-gradient": "best"}
COMMON = {"batch_size": SIZE, "samples": 4, "explore": 1.0, "tau": TAU, "device": "cpu"}


def options_for(name: str, **changes) -> LearnOptions:
    given = {"estimator": name, "train_weights": name == "sr-ste", "lr": 1.0, "logits": 1.0}
    return LearnOptions(**(COMMON | {"steps": 3} | given | changes)).filled()


def small_denoiser() -> nn.Module:
    denoiser = tiny_model(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).denoiser
    torch.manual_seed(1)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def first_masks(denoiser: nn.Module) -> Masks:
    layers = prunable_layers(denoiser)
    return nm_masks(layers, score_layers(denoiser, layers, "random"), Pattern(2, 4))


def make_logits(denoiser: nn.Module) -> MaskLogits:
    first = first_masks(denoiser)
    return MaskLogits(first, {n: denoiser.get_parameter(f"{n}.weight").detach() for n, _ in first})


def learned(name: str, place: Path, **changes) -> tuple[nn.Module, Learned]:
    options, denoiser = options_for(name, **changes), small_denoiser()
    batch = problems().batch(range(2))

    @torch.no_grad()
    def hard_loss(masks: Masks) -> float:
        with masks.applied(denoiser):
            return float(answer(denoiser, batch.inputs).square().mean())

    return denoiser, learn_masks(
        denoiser,
        make_logits(denoiser),
        teacher=small_denoiser() if options.train_weights else None,
        problems=problems(noise_images()),
        options=options,
        accelerator=make_accelerator(options),
        resume=place / name,
        progress=Silent(),
        hard_loss=hard_loss,
    )


def plain_descent(learner, options) -> torch.optim.Optimizer:
    """A step of it is the gradient."""
    return torch.optim.SGD(learner.logits.parameters(), lr=options.lr)


def main(place: Path) -> None:
    from prunedm.learning import trainer

    rank = int(os.environ["RANK"])
    for name in ESTIMATORS:
        every = {"validate_every": 1, "checkpoint_every": 2}
        denoiser, found = learned(name, place / "runs", keep=KEEP.get(name, "last"), **every)
        weights = {f"weight.{key}": p.detach() for key, p in denoiser.named_parameters()}
        masks = {f"mask.{key}": mask for key, mask in found.masks}
        _save(found.logits | masks | weights, place / f"{name}-{rank}.safetensors")
    trainer.make_optimizer = plain_descent
    for name in ("relaxed", "policy-gradient", "policy-gradient-classic"):
        _, found = learned(name, place / "step", steps=1, keep="last")
        _save(found.logits, place / f"step-{name}-{rank}.safetensors")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    torchrun(__file__, place, home=place, world=WORLD)
    return place


def expected_step(name: str) -> dict[str, torch.Tensor]:
    """The logits less the mean of both processes' gradients, each of its own problems and draws."""
    options = options_for(name, steps=1)
    gradients = []
    for rank in range(WORLD):
        denoiser = small_denoiser()
        logits = make_logits(denoiser)
        learner = make_learner(denoiser, logits, options, teacher=None, device=torch.device("cpu"))
        batch = problems(noise_images()).batch(range(rank * SIZE, (rank + 1) * SIZE))
        generator = torch.Generator().manual_seed(seed_for(options.seed, "masks", rank))
        learner(batch, 0.0, generator).backward()
        gradients.append(logits.groups[0].grad)
    assert not torch.allclose(*gradients)
    return logits.by_layer([logits.groups[0].detach() - torch.stack(gradients).mean(0)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_both_processes_end_with_the_same_logits_masks_and_weights(name, launched):
    one, two = (load_file(launched / f"{name}-{rank}.safetensors") for rank in range(WORLD))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(two[key], value), key
    start = make_logits(small_denoiser())
    before = start.by_layer([g.detach() for g in start.groups])
    moved = any(not torch.equal(one[key], value) for key, value in before.items())
    assert moved or KEEP.get(name) == "best"  # which may be the start
    assert (launched / "runs" / name / "checkpoint.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relaxed", "policy-gradient", "policy-gradient-classic"])
def test_a_step_is_the_mean_of_both_processes_gradients(name, launched):
    found = load_file(launched / f"step-{name}-0.safetensors")
    start = make_logits(small_denoiser())
    before = start.by_layer([g.detach() for g in start.groups])
    for key, wanted in expected_step(name).items():
        moved, due = found[key] - before[key], wanted - before[key]
        assert (moved - due).norm() <= 1e-4 * due.norm() + 1e-6, key


@pytest.mark.slow
def test_a_stage_of_two_processes_writes_one_folder_and_speaks_once(tmp_path):
    words = ["-m", "prunedm", "learn", str(tiny_folder()), str(tmp_path / "out"), "--device", "cpu"]
    few = ["--steps", "3", "--batch-size", "4", "--validation-problems", "8", "--keep", "last"]
    said = torchrun(*words, *few, world=WORLD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    model = load(tmp_path / "out")
    model.masks.check_pattern()
    assert len(model.record.figures["curve"]["losses"]) == 3
    assert said.count("=>") == 1
    single = [sys.executable, *words, *few]
    again = subprocess.run(single, capture_output=True, text=True, timeout=300, check=False)
    assert "done already" in again.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
