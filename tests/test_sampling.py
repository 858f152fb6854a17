"""Sampling: image i is a function of the seed and i; the stage continues where it was stopped."""

import sys
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    schedulers,
)
from helpers import Killed, tiny_folder, tiny_model
from PIL import Image

from prunedm.data.images import to_uint8
from prunedm.errors import UserError
from prunedm.evaluation.pictures import grid
from prunedm.options import SampleOptions
from prunedm.randomness import generator_for
from prunedm.sampling import make_sampler, sample_batches, set_steps
from prunedm.sampling.schedule import spaced
from prunedm.stages import sample
from prunedm.task.codec import Pixels
from prunedm.task.condition import Classes, Unconditional

SHAPE = (1, 8, 8)
SAMPLERS = ["ddpm", "ddim", "dpm++", "EulerDiscreteScheduler"]
TRAINED = DDPMScheduler()


@pytest.fixture(scope="module")
def denoiser():
    return tiny_model().denoiser


def draw(
    denoiser, count: int, *, sampler: str = "ddim", spacing: str = "trailing", **options
) -> torch.Tensor:
    options = {
        "steps": 3, "codec": Pixels(SHAPE), "condition": Unconditional(), "seed": 0, "batch_size": 4
    } | options  # fmt: skip
    sampler = make_sampler(TRAINED, sampler, spacing)
    return torch.cat(list(sample_batches(denoiser, sampler, count=count, **options)))


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
    assert torch.equal(draw(denoiser, 7, sampler=sampler, starts=[4]), many[4:])
    shifted = draw(denoiser, 7, sampler=sampler, starts=[3]).int()  # other neighbours in its batch
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


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [("trailing", [999, 749, 499, 249, -1]), ("quad", [999, 444, 111, 0, -1])],
)
def test_ddpm_adds_noise_of_each_images_own_stream(denoiser, spacing, timesteps):
    """Against the algorithm written out (Ho et al. 2020, algorithm 2)."""
    torch.manual_seed(123)  # the global generator must not matter
    got = draw(denoiser, 3, sampler="ddpm", spacing=spacing, steps=4)
    torch.manual_seed(7)
    assert torch.equal(draw(denoiser, 3, sampler="ddpm", spacing=spacing, steps=4), got)

    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for index in range(3):
        generator = generator_for(0, "sample", index)
        x = torch.randn(SHAPE, generator=generator)[None].double()
        for t, before in pairwise(timesteps):
            with torch.no_grad():
                noise = denoiser(x.float(), torch.tensor(t), return_dict=False)[0].double()
            now, then = bar[t], bar[before] if before >= 0 else torch.ones((), dtype=torch.float64)
            alpha = now / then
            clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            mean = then.sqrt() * (1 - alpha) / (1 - now) * clean
            mean = mean + alpha.sqrt() * (1 - then) / (1 - now) * x
            sigma = ((1 - then) / (1 - now) * (1 - alpha)).clamp_min(1e-20).sqrt()
            last = t == 0 or before < 0
            fresh = torch.zeros(SHAPE) if last else torch.randn(SHAPE, generator=generator)
            x = mean + sigma * fresh
        assert (to_uint8(x)[0].int() - got[index].int()).abs().max() <= 1


def test_spacings_by_hand():
    assert spaced("uniform", 4, 10).tolist() == [9, 6, 3, 0]
    assert spaced("quad", 4, 10).tolist() == [9, 4, 1, 0]
    assert spaced("uniform", 3, 1000).tolist() == [999, 500, 0]
    assert spaced("quad", 1, 1000).tolist() == [999]
    # k^2 9/49 rounds to 0, 0, 1, 2, 3, 5, 7, 9; what would be there twice moves up
    assert spaced("quad", 8, 10).tolist() == [9, 7, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("spacing", ["uniform", "quad"])
@pytest.mark.parametrize("steps", [2, 10, 50, 100, 999, 1000])
def test_spacings_are_distinct_and_reach_both_ends(spacing, steps):
    timesteps = spaced(spacing, steps, 1000)
    assert len(timesteps) == steps
    assert (np.diff(timesteps) < 0).all()
    assert (timesteps[0], timesteps[-1]) == (999, 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_every_sampler_takes_the_spacing_where_it_can(denoiser, sampler, spacing):
    scheduler = make_sampler(TRAINED, sampler, spacing)
    set_steps(scheduler, 6)
    assert scheduler.timesteps.tolist() == spaced(spacing, 6, 1000).tolist()
    images = draw(denoiser, 2, sampler=sampler, spacing=spacing)
    assert not torch.equal(images, draw(denoiser, 2, sampler=sampler))


def test_a_spacing_that_a_sampler_cannot_take_is_refused():
    with pytest.raises(
        UserError, match="'PNDMScheduler' does not support quad spacing; try trailing"
    ):
        make_sampler(TRAINED, "PNDMScheduler", "quad")
    with pytest.raises(UserError, match="unknown spacing 'squared'; try trailing, uniform, quad"):
        make_sampler(TRAINED, "ddim", "squared")
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(
        UserError, match="5 steps of EulerDiscreteScheduler: Cannot set `timesteps`"
    ):
        set_steps(make_sampler(karras, "EulerDiscreteScheduler", "quad"), 5)


def linear(x: torch.Tensor, t: int) -> torch.Tensor:
    """A denoiser in closed form, different at every timestep."""
    return 0.6 * x + 0.3 * np.cos(t)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("spacing", "steps"), [("quad", 7), ("uniform", 4), ("trailing", 3)])
def test_ddim_against_its_formula(prediction, clip, spacing, steps):
    """Song et al. 2021, eq. 12 with sigma = 0, in float64, from each timestep to the next one."""
    trained = DDPMScheduler(prediction_type=prediction, clip_sample=clip)
    sampler = make_sampler(trained, "ddim", spacing)
    set_steps(sampler, steps)
    x = wanted = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0)).double()
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    timesteps = sampler.timesteps.tolist()
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        x = sampler.step(linear(x, t), torch.tensor(t), x).prev_sample
        now, then = bar[t], 1.0 if after is None else bar[after]
        output, signal, sigma = linear(wanted, t), now**0.5, (1 - now) ** 0.5
        if prediction == "epsilon":
            clean, noise = (wanted - sigma * output) / signal, output
        elif prediction == "sample":
            clean, noise = output, (wanted - signal * output) / sigma
        else:
            clean, noise = signal * wanted - sigma * output, signal * output + sigma * wanted
        clean = clean.clamp(-1, 1) if clip else clean
        wanted = then**0.5 * clean + (1 - then) ** 0.5 * noise
        assert torch.allclose(x, wanted, rtol=2e-4, atol=1e-4), t


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("thresholding", [True, False])
def test_ddim_is_diffusers_own_where_timesteps_are_even(prediction, final, thresholding):
    config = {"prediction_type": prediction, "set_alpha_to_one": final}
    trained = DDIMScheduler(thresholding=thresholding, sample_max_value=1.5, **config)
    theirs = DDIMScheduler.from_config(trained.config, timestep_spacing="trailing")
    ours = make_sampler(trained, "ddim")
    theirs.set_timesteps(10)
    set_steps(ours, 10)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        x = ours.step(linear(x, int(t)), t, x).prev_sample
        y = theirs.step(linear(y, int(t)), t, y).prev_sample
        assert torch.equal(x, y)


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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("FlowMatchEulerDiscreteScheduler", "it has a noise schedule of its own"),
        ("EDMEulerScheduler", "it has a noise schedule of its own"),
        ("UnCLIPScheduler", "only supports `beta_schedule`: 'squaredcos_cap_v2'"),
        ("IPNDMScheduler", "it has a noise schedule of its own"),
        ("DDIMInverseScheduler", "it goes from image to noise"),
        ("RePaintScheduler", "its steps take model_output, timestep, sample, original_image, mask"),
        ("VQDiffusionScheduler", "missing 1 required"),
    ],
)
def test_a_scheduler_for_other_models_is_refused(name, why):
    with pytest.raises(UserError, match=f"'{name}' cannot sample from this model: .*{why}.*; try"):
        make_sampler(TRAINED, name)


def test_a_scheduler_whose_noise_is_not_each_images_own_is_refused(monkeypatch):
    """As `DPMSolverSDEScheduler`'s, which needs a package that we do not."""
    module = sys.modules["prunedm.sampling.schedule"]

    class Brownian(EulerDiscreteScheduler):
        @classmethod
        def from_config(cls, config, **more):
            made = EulerDiscreteScheduler.from_config(config, **more)
            made.register_to_config(noise_sampler_seed=None)
            return made

    monkeypatch.setattr(module, "scheduler_class", lambda _: Brownian)
    with pytest.raises(UserError, match="its noise would depend on an image's neighbours"):
        make_sampler(TRAINED, "Brownian")


class OneImage(torch.nn.Module):
    """The best denoiser of data that are one grey image."""

    def __init__(self) -> None:
        super().__init__()
        self.grey = torch.nn.Parameter(torch.tensor(0.25))
        self.place = torch.arange(1000.0)

    def forward(self, sample, timestep, return_dict=False):
        bar = float(np.interp(float(timestep[0]), self.place, TRAINED.alphas_cumprod))
        return ((sample - bar**0.5 * self.grey) / (1 - bar) ** 0.5,)


def supported() -> list[str]:
    found = []
    for name in dir(schedulers):
        try:
            make_sampler(TRAINED, name)
        except UserError:
            continue
        found.append(name)
    return found


def test_every_scheduler_of_diffusers_is_refused_or_draws_by_the_seed_alone():
    names, grey = supported(), round((0.25 + 1) * 127.5)
    assert {"DDPMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"} <= set(names)
    for name in names:
        torch.manual_seed(1)
        whole = draw(OneImage(), 3, sampler=name, steps=6, batch_size=3).int()
        torch.manual_seed(2)
        single = draw(OneImage(), 3, sampler=name, steps=6, batch_size=1).int()
        assert (whole - single).abs().max() <= 1, name
        assert abs(whole.float().mean() - grey) < 20, name


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
    assert Classes(3).drawn(range(7))["class_labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert Classes(3, only=2).drawn(range(4))["class_labels"].tolist() == [2, 2, 2, 2]
    with pytest.raises(UserError, match="label 3 is not below the model's 3 classes"):
        Classes(3, only=3)


def test_an_image_has_its_own_class_whatever_its_batch():
    model = tiny_model(num_class_embeds=3).denoiser
    torch.nn.init.normal_(model.class_embedding.weight, std=3.0)
    turn = draw(model, 5, condition=Classes(3))
    for label in range(3):
        same = draw(model, 5, condition=Classes(3, only=label))
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


def watched(monkeypatch, *, fail_at: int | None = None) -> list[range]:
    """Which images are drawn from now on, batch by batch; that batch is interrupted."""
    from prunedm.sampling import draw as module

    draw_batch, drawn = module._sample, []

    def watching(*arguments, **named):
        drawn.append(named["indices"])
        if len(drawn) - 1 == fail_at:
            raise Killed
        return draw_batch(*arguments, **named)

    monkeypatch.setattr(module, "_sample", watching)
    return drawn


@pytest.mark.parametrize("good_batches", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bits(whole, tmp_path, monkeypatch, good_batches):
    drawn = watched(monkeypatch, fail_at=good_batches)
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


def interrupted(out, *, good_batches: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, fail_at=good_batches)
        with pytest.raises(Killed):
            sample(tiny_folder(), out, OPTIONS)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"NUMPY") + 150] ^= 1
    file.write_bytes(bytes(content))


def _other_size(file):
    np.savez(file, images=np.zeros((2, 8, 8, 1), np.uint8))


@pytest.mark.parametrize("harm", [_cut, _flip_a_bit, _other_size, lambda f: f.write_bytes(b"")])
def test_a_harmed_batch_is_drawn_again(whole, tmp_path, monkeypatch, harm):
    interrupted(tmp_path / "out", good_batches=2)
    harm(tmp_path / "out.partial" / "resume" / "batch-000000.npz")
    drawn = watched(monkeypatch)
    sample(tiny_folder(), tmp_path / "out", OPTIONS)
    assert drawn == [range(0, 3), range(6, 9)]
    assert np.array_equal(pngs(tmp_path / "out"), pngs(whole))


def test_a_run_of_another_batch_size_is_not_gone_on_with(tmp_path):
    interrupted(tmp_path / "out", good_batches=1)
    other = OPTIONS.model_copy(update={"batch_size": 2})
    with pytest.raises(UserError, match=r"unfinished run with another batch_size \(3, now 2\)"):
        sample(tiny_folder(), tmp_path / "out", other)


@pytest.mark.parametrize("form", ["png", "npz"])
def test_one_batch_is_in_memory_at_a_time(tmp_path, monkeypatch, form):
    module = sys.modules["prunedm.stages.verbs.sample"]
    read, alive, most = module._read, weakref.WeakSet(), []

    class Watched(np.ndarray):
        __hash__ = object.__hash__

    def watching(file):
        most.append(len(alive))
        batch = read(file).view(Watched)
        alive.add(batch)
        return batch

    monkeypatch.setattr(module, "_read", watching)
    monkeypatch.setattr(module, "_is_whole", lambda *_: False)
    options = OPTIONS.model_copy(update={"count": 12, "format": form})
    sample(tiny_folder(), tmp_path / "out", options)
    assert len(most) == 4
    assert max(most) <= 1  # the one before


def test_what_cannot_be_drawn_fails_before_any_work(tmp_path):
    for changes, message in (
        ({"sampling_steps": 1001}, "1001 sampling steps: the model has 1000"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'"),
        ({"sampler": "PNDMScheduler", "spacing": "quad"}, "does not support quad spacing"),
    ):
        with pytest.raises(UserError, match=message):
            sample(tiny_folder(), tmp_path / "out", OPTIONS.model_copy(update=changes))
    assert not any(tmp_path.iterdir())


def test_quad_spacing_reaches_the_images(tmp_path, denoiser):
    sample(tiny_folder(), tmp_path / "out", OPTIONS.model_copy(update={"spacing": "quad"}))
    direct = draw(tiny_model().denoiser, 7, steps=2, batch_size=3, spacing="quad")
    assert np.array_equal(pngs(tmp_path / "out"), direct.permute(0, 2, 3, 1).numpy())


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
