"""Denoising problems: a function of (seed, purpose, index) alone, and right by hand in float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import batch_of, noise_images, problems, tiny_model

from prunedm.errors import UserError
from prunedm.task import predict, squared_errors
from prunedm.task.process import process_of, scheduler_class

FIELDS = ("sample", "timestep", "class_labels", "target")


def joined(batches) -> dict[str, torch.Tensor]:
    batches = list(batches)
    found = [{**batch.inputs, "target": batch.target} for batch in batches]
    return {field: torch.cat([tensors[field] for tensors in found]) for field in FIELDS}


def labelled(**options):
    images = noise_images(5, labels=[3, 1, 4, 1, 5])
    return problems(images, shuffle=True, flip=True, conditional=True, **options)


def pixels(images) -> list[bytes]:
    return [images[i].contiguous().numpy().tobytes() for i in range(len(images))]


def alpha_bar() -> np.ndarray:
    """Of Ho et al.'s linear schedule, in float64."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_a_problem_does_not_depend_on_its_batch_nor_on_what_was_asked_before():
    whole = joined([labelled().batch(range(12))])
    split = joined(labelled().batch(part) for part in (range(5), range(5, 6), range(6, 12)))
    order = [11, 0, 7, 3, 4, 5, 6, 2, 8, 9, 10, 1]
    mixed = joined([labelled().batch(order)])
    for field in FIELDS:
        assert torch.equal(whole[field], split[field])
        assert torch.equal(whole[field][order], mixed[field])


def test_seeds_purposes_and_indices_differ():
    first = problems().batch(range(64))
    for other in (problems(seed=1), problems(purpose="other")):
        batch = other.batch(range(64))
        assert (batch.inputs["timestep"] == first.inputs["timestep"]).float().mean() < 0.1
        assert not torch.isclose(batch.target, first.target).all(dim=(1, 2, 3)).any()
    assert len({noise.numpy().tobytes() for noise in first.target}) == 64


def test_noise_is_standard_normal():
    noise = problems().batch(range(400)).target.double()  # 25,600 numbers
    assert abs(noise.mean()) < 5 / 160
    assert abs(noise.var() - 1) < 5 * math.sqrt(2) / 160
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / 160


def test_timesteps_are_antithetic_and_uniform():
    stream = problems(scheduler=DDPMScheduler(num_train_timesteps=50))
    t = np.array([stream._step(p) for p in range(4000)])
    assert (t[0::2] + t[1::2] == 49).all()
    counts = np.bincount(t[0::2], minlength=50)  # 2,000 independent draws, 40 expected in each
    assert len(counts) == 50
    assert ((counts - 40) ** 2 / 40).sum() < 49 + 5 * math.sqrt(2 * 49)


def test_each_epoch_visits_every_image_once_in_its_own_order():
    images = noise_images(30)
    names = pixels(images)
    stream = problems(images, shuffle=True)
    order = [names.index(stream[p]["image"].contiguous().numpy().tobytes()) for p in range(90)]
    epochs = [order[0:30], order[30:60], order[60:90]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(30))
    unshuffled = problems(images)
    assert [unshuffled[p]["image"].contiguous().numpy().tobytes() for p in range(30)] == names


def test_flip_mirrors_about_half_and_only_left_to_right():
    images = noise_images(1)
    plain = problems(images)[0]["image"]
    stream = problems(images, flip=True)
    flipped = [not torch.equal(stream[p]["image"], plain) for p in range(400)]
    assert 150 < sum(flipped) < 250
    mirrored = stream[flipped.index(True)]["image"]
    assert torch.equal(mirrored, torch.from_numpy(plain.numpy()[:, :, ::-1].copy()))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noisy_and_target_are_the_closed_forms(kind):
    stream = problems(noise_images(6, channels=3), scheduler=DDPMScheduler(prediction_type=kind))
    batch, items = stream.batch(range(20)), [stream[p] for p in range(20)]
    for k, item in enumerate(items):
        clean = item["image"].numpy().astype(np.float64) / 255 * 2 - 1
        noise, a = item["noise"].numpy().astype(np.float64), alpha_bar()[item["step"]]
        noisy = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
        velocity = math.sqrt(a) * noise - math.sqrt(1 - a) * clean
        target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
        assert batch.inputs["timestep"][k] == item["step"]
        np.testing.assert_allclose(batch.inputs["sample"][k], noisy, rtol=0, atol=2e-6)
        np.testing.assert_allclose(batch.target[k], target, rtol=0, atol=2e-6)


def test_labels_go_with_their_images():
    images = noise_images(5, labels=[3, 1, 4, 1, 5])
    names = pixels(images)
    stream = problems(images, shuffle=True, conditional=True)
    batch = stream.batch(range(10))
    for p in range(10):
        image = names.index(stream[p]["image"].contiguous().numpy().tobytes())
        assert batch.inputs.get("class_labels")[p] == [3, 1, 4, 1, 5][image]
    assert problems(images).batch(range(2)).inputs.get("class_labels") is None


def test_worker_processes_change_nothing():
    lists = [range(0, 4), range(4, 7), [7], range(8, 12)]
    alone, shared = (list(labelled().batches(lists, workers=w)) for w in (0, 2))
    assert [len(batch) for batch in shared] == [4, 3, 1, 4]
    for field in FIELDS:
        assert torch.equal(joined(alone)[field], joined(shared)[field])
        assert torch.equal(joined(alone)[field], joined([labelled().batch(range(12))])[field])


def test_losses_are_means_over_each_problem():
    output_NCHW, target_NCHW = torch.randn(2, 3, 2, 4, 4).to(torch.bfloat16)
    difference = output_NCHW.double().numpy() - target_NCHW.double().numpy()
    expected = (difference**2).reshape(3, -1).mean(1)
    losses = squared_errors(output_NCHW, target_NCHW)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_predict_passes_timesteps_and_labels():
    denoiser = tiny_model(num_class_embeds=3).denoiser
    torch.manual_seed(1)
    noisy, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([2, 0])
    with torch.no_grad():
        together = predict(denoiser, batch_of(noisy, t, noisy, class_labels=labels))
        for k in range(2):
            alone = denoiser(noisy[k : k + 1], int(t[k]), class_labels=labels[k : k + 1]).sample
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-5, atol=1e-6)


def test_only_diffusers_schedulers_are_found():
    assert scheduler_class("DDPMScheduler") is DDPMScheduler
    assert scheduler_class("scheduling_ddpm") is None
    assert scheduler_class("os") is None
    assert scheduler_class("None") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", (0, 999)),
        ("late", (0, 332)),
        ("middle", (333, 666)),
        ("early", (667, 999)),
        ("100-500", (100, 500)),
        ("7-7", (7, 7)),
    ],
)
def test_time_ranges_are_named_by_noise(text, expected):
    assert process_of(DDPMScheduler()).time_range(text) == expected
    drawn = problems(time_range=expected).batch(range(200)).inputs["timestep"]
    assert bool(((drawn >= expected[0]) & (drawn <= expected[1])).all())
    assert bool((drawn[::2] + drawn[1::2] == sum(expected)).all())  # still antithetic
    assert len(drawn.unique()) == (1 if text == "7-7" else pytest.approx(170, abs=30))


@pytest.mark.parametrize("text", ["900-1000", "500-100", "late-early", "-5", ""])
def test_time_ranges_outside_the_scheduler_are_refused(text):
    with pytest.raises(UserError, match=r"0-999|try 100-500"):
        process_of(DDPMScheduler()).time_range(text)


def test_a_stream_is_the_same_problems_drawn_when_asked_for():
    source = problems()
    stream = source.stream(7, size=3)
    assert [len(batch) for batch in stream] == [3, 3, 1] == [len(batch) for batch in stream]
    assert len(stream) == 3
    whole = source.batch(range(7))
    assert torch.equal(
        torch.cat([batch.inputs["sample"] for batch in stream]), whole.inputs["sample"]
    )
    assert torch.equal(stream[2].inputs["sample"], whole.inputs["sample"][6:])


def test_a_sweep_keeps_images_and_noise_and_moves_the_timestep():
    first, second = list(problems(time_range=(5, 6)).sweep(4))
    for batch, timestep in ((first, 5), (second, 6)):
        assert batch.inputs["timestep"].unique().tolist() == [timestep]
    assert torch.equal(first.target, second.target)
    assert not torch.equal(first.inputs["sample"], second.inputs["sample"])


def test_a_cycle_reads_the_same_problems_again_to_the_bit():
    stream, endless = labelled(cycle=6), labelled()
    first, again = stream.batch(range(6)), stream.batch(range(12, 18))
    for field in FIELDS:
        assert torch.equal(joined([first])[field], joined([again])[field])
        assert torch.equal(joined([first])[field], joined([endless.batch(range(6))])[field])
    beyond = endless.batch(range(6, 12))
    assert not torch.equal(stream.batch(range(6, 12)).target, beyond.target)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_say_which_problems_they_are(workers):
    stream = problems(cycle=5)
    batches = list(stream.batches([range(0, 3), [4, 2, 7]], workers=workers))
    assert [batch.numbers for batch in batches] == [(0, 1, 2), (4, 2, 2)]
    assert batches[0].to("cpu").numbers == (0, 1, 2)
    assert problems().batch([7, 5]).numbers == (7, 5)
    assert [batch.numbers for batch in problems().stream(3, size=2)] == [(0, 1), (2,)]


def test_a_cycle_of_whole_batches_repeats_whole_batches():
    """What memories of single problems rely on for equal bits."""
    stream = problems(cycle=8)
    numbers = [stream.batch(range(k, k + 4)).numbers for k in range(0, 24, 4)]
    assert numbers == [(0, 1, 2, 3), (4, 5, 6, 7)] * 3
