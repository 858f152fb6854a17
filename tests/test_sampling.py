"""Sampling: image i is a function of the seed and i; the stage continues where it was stopped."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from helpers import Killed, tiny_folder, tiny_model
from PIL import Image

from prunedm.data import to_uint8
from prunedm.errors import UserError
from prunedm.evaluation.pictures import grid
from prunedm.options import SampleOptions
from prunedm.randomness import generator_for
from prunedm.sampling import class_labels, make_sampler, sample_batches
from prunedm.stages import sample

SHAPE = (1, 8, 8)
SAMPLERS = ["ddpm", "ddim", "dpm++", "EulerDiscreteScheduler"]
TRAINED = DDPMScheduler()


@pytest.fixture(scope="module")
def denoiser():
    return tiny_model().denoiser


def draw(denoiser, count: int, *, sampler: str = "ddim", **options) -> torch.Tensor:
    options = {"steps": 3, "shape": SHAPE, "seed": 0, "batch_size": 4} | options
    batches = sample_batches(denoiser, make_sampler(TRAINED, sampler), count=count, **options)
    return torch.cat(list(batches))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_how_many_are_drawn(denoiser, sampler):
    many = draw(denoiser, 7, sampler=sampler)
    assert many.shape == (7, *SHAPE)
    assert many.dtype == torch.uint8
    for count in (1, 4, 5):
        assert torch.equal(draw(denoiser, count, sampler=sampler), many[:count])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_can_start_in_the_middle(denoiser, sampler):
    many = draw(denoiser, 7, sampler=sampler)
    assert torch.equal(draw(denoiser, 7, sampler=sampler, first=4), many[4:])
    shifted = draw(denoiser, 7, sampler=sampler, first=3).int()  # other neighbours in its batch
    assert (shifted - many[3:].int()).abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_size_moves_no_pixel_by_more_than_rounding(denoiser, sampler):
    one, three, four = (
        draw(denoiser, 6, sampler=sampler, batch_size=size).int() for size in (1, 3, 4)
    )
    assert (one - four).abs().max() <= 1
    assert (three - four).abs().max() <= 1


def test_images_and_seeds_differ(denoiser):
    images = torch.cat([draw(denoiser, 4), draw(denoiser, 4, seed=1)])
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_ddpm_adds_noise_of_each_images_own_stream(denoiser):
    """Against the algorithm written out (Ho et al. 2020, algorithm 2), on trailing timesteps."""
    torch.manual_seed(123)  # the global generator must not matter
    got = draw(denoiser, 3, sampler="ddpm", steps=4)
    torch.manual_seed(7)
    assert torch.equal(draw(denoiser, 3, sampler="ddpm", steps=4), got)

    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for index in range(3):
        generator = generator_for(0, "sample", index)
        x = torch.randn(SHAPE, generator=generator)[None].double()
        for t, before in ((999, 749), (749, 499), (499, 249), (249, -1)):
            with torch.no_grad():
                noise = denoiser(x.float(), torch.tensor(t), return_dict=False)[0].double()
            now, then = bar[t], bar[before] if before >= 0 else torch.ones((), dtype=torch.float64)
            alpha = now / then
            clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            mean = then.sqrt() * (1 - alpha) / (1 - now) * clean
            mean = mean + alpha.sqrt() * (1 - then) / (1 - now) * x
            sigma = ((1 - then) / (1 - now) * (1 - alpha)).clamp_min(1e-20).sqrt()
            fresh = torch.randn(SHAPE, generator=generator) if before >= 0 else torch.zeros(SHAPE)
            x = mean + sigma * fresh
        assert (to_uint8(x)[0].int() - got[index].int()).abs().max() <= 1


def test_ddim_against_diffusers_own_pipeline_loop(denoiser):
    sampler = DDIMScheduler.from_config(TRAINED.config, timestep_spacing="trailing")
    x = torch.stack([torch.randn(SHAPE, generator=generator_for(5, "sample", i)) for i in range(4)])
    sampler.set_timesteps(5)
    for t in sampler.timesteps:
        with torch.no_grad():
            x = sampler.step(denoiser(x, t).sample, t, x, eta=0.0).prev_sample
    wanted = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(draw(denoiser, 4, steps=5, seed=5), wanted)


def test_mode_and_weights_are_left_as_they_were(denoiser):
    denoiser.train()
    before = [p.clone() for p in denoiser.parameters()]
    draw(denoiser, 2, batch_size=2)
    assert denoiser.training
    denoiser.eval()
    assert all(map(torch.equal, before, denoiser.parameters()))


def test_unknown_samplers_and_too_many_steps_are_refused(denoiser):
    for name in ("dimm", "UNet2DModel", "__doc__"):
        with pytest.raises(UserError, match=rf"unknown sampler '{name}'; try ddpm, ddim, dpm\+\+"):
            make_sampler(TRAINED, name)
    with pytest.raises(UserError, match="2000 sampling steps: the model has 1000"):
        draw(denoiser, 1, steps=2000)


def test_the_noise_schedule_is_the_trained_one():
    trained = DDPMScheduler(
        num_train_timesteps=50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    sampler = make_sampler(trained, "dpm++")
    assert torch.equal(sampler.alphas_cumprod, trained.alphas_cumprod)
    assert sampler.config.prediction_type == "v_prediction"
    sampler.set_timesteps(5)
    assert sampler.timesteps[0] == 49  # from pure noise


def test_class_labels_by_hand():
    assert class_labels(3, 7, None).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert class_labels(3, 4, 2).tolist() == [2, 2, 2, 2]
    with pytest.raises(UserError, match="label 3 is not below the model's 3 classes"):
        class_labels(3, 4, 3)


def test_an_image_has_its_own_class_whatever_its_batch():
    model = tiny_model(num_class_embeds=3).denoiser
    torch.nn.init.normal_(model.class_embedding.weight, std=3.0)
    turn = draw(model, 5, labels=class_labels(3, 5, None))
    for label in range(3):
        same = draw(model, 5, labels=class_labels(3, 5, label))
        equal = [i for i in range(5) if (turn[i].int() - same[i].int()).abs().max() <= 1]
        assert equal == [i for i in range(5) if i % 3 == label]


# -------------------------------------------------------------------------------- stage


OPTIONS = SampleOptions(count=7, batch_size=3, sampling_steps=2, device="cpu")


def pngs(folder) -> np.ndarray:
    files = sorted(p for p in folder.glob("*.png") if p.name != "grid.png")
    assert [p.name for p in files] == [f"{k:06d}.png" for k in range(len(files))]
    return np.stack([np.asarray(Image.open(p)) for p in files])[..., None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "out"
    sample(tiny_folder(), out, OPTIONS)
    return out


def test_the_stage_writes_exactly_the_images_asked_for(whole, tmp_path):
    images = pngs(whole)
    assert images.shape == (7, 8, 8, 1)
    direct = draw(tiny_model().denoiser, 7, steps=2, batch_size=3).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, direct)
    assert np.array_equal(np.asarray(Image.open(whole / "grid.png")), np.asarray(grid(direct, 8)))
    assert {p.name for p in whole.iterdir()} == {
        "grid.png", "record.json", *(f"{k:06d}.png" for k in range(7))
    }  # fmt: skip

    record, _ = sample(
        tiny_folder(), tmp_path / "npz", OPTIONS.model_copy(update={"format": "npz"})
    )
    with np.load(tmp_path / "npz" / "samples.npz", allow_pickle=False) as file:
        assert np.array_equal(file["images"], images)
    assert record.figures == {"images": 7}
    assert {p.name for p in (tmp_path / "npz").iterdir()} == {
        "grid.png", "record.json", "samples.npz"
    }  # fmt: skip


@pytest.mark.parametrize("good_batches", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bits(whole, tmp_path, monkeypatch, good_batches):
    from prunedm import sampling

    draw_batch, drawn = sampling._sample, []

    def killed(*arguments, **named):
        drawn.append(named["indices"])
        if len(drawn) == good_batches + 1:
            raise Killed
        return draw_batch(*arguments, **named)

    monkeypatch.setattr(sampling, "_sample", killed)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        sample(tiny_folder(), out, OPTIONS)
    assert not out.exists()
    sample(tiny_folder(), out, OPTIONS)
    all_batches = [
        range(0, 3),
        range(3, 6),
        range(6, 9),
    ]  # the last one padded, to one compute size
    assert drawn == all_batches[: good_batches + 1] + all_batches[good_batches:]
    assert np.array_equal(pngs(out), pngs(whole))


def test_one_class_or_all_in_turn(tmp_path):
    source = tiny_folder(num_class_embeds=3)
    sample(source, tmp_path / "turn", OPTIONS)
    sample(source, tmp_path / "one", OPTIONS.model_copy(update={"label": 1}))
    turn, one = pngs(tmp_path / "turn"), pngs(tmp_path / "one")
    assert [i for i in range(7) if np.array_equal(turn[i], one[i])] == [1, 4]
    with pytest.raises(UserError, match="label 3 is not below"):
        sample(source, tmp_path / "none", OPTIONS.model_copy(update={"label": 3}))
    assert not (tmp_path / "none").exists()


def test_a_label_for_a_model_without_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="label = 1: the model has no classes"):
        sample(tiny_folder(), tmp_path / "out", OPTIONS.model_copy(update={"label": 1}))


def test_colour_images_keep_their_channels(tmp_path):
    source = tiny_folder(in_channels=3, out_channels=3)
    sample(source, tmp_path / "out", SampleOptions(count=2, batch_size=2, sampling_steps=1))
    assert Image.open(tmp_path / "out" / "000001.png").mode == "RGB"


def test_the_folder_is_what_diffusers_samples_from_too():
    pipeline = DDPMPipeline.from_pretrained(tiny_folder())
    output = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert output.shape == (1, 8, 8, 1)
