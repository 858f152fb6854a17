"""The embedded digits model is good enough that damage shows."""

import pytest
import torch

from prunedm.evaluation.features import load_digits_cnn
from prunedm.folder import load, size_on_disk
from prunedm.hub import find
from prunedm.sampling import make_sampler, sample_batches


def _confidences(
    count: int, steps: int = 50, batch: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    model = load("digits")
    batches = sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, "ddim"),
        count=count,
        steps=steps,
        codec=model.codec,
        condition=model.condition,
        batch_size=batch,
    )
    probabilities = load_digits_cnn().logits(torch.cat(list(batches))).softmax(1)
    return probabilities.max(1)


@pytest.mark.slow
def test_ninety_percent_of_500_samples_are_sure_digits_of_all_classes():
    confidence, digit = _confidences(500)
    assert (confidence > 0.9).float().mean() >= 0.9
    assert digit.unique().numel() == 10


def test_a_few_samples_are_digits():
    confidence, digit = _confidences(40, steps=15, batch=40)
    assert (confidence > 0.9).float().mean() >= 0.8
    assert digit.unique().numel() >= 8


def test_it_is_small_and_says_how_it_was_made():
    model = load("digits")
    assert size_on_disk(find("digits")) <= 3_000_000
    assert 0.9e6 < sum(p.numel() for p in model.denoiser.parameters()) < 1.3e6
    assert model.record is not None
    assert model.record.stage == "train"
    assert model.record.options["dataset"] == "digits"
    assert next(model.denoiser.parameters()).dtype == torch.float32
