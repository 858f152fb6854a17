"""The fast denoiser: close to float32, compiled when it pays, and never without a way back."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import tiny_model

from prunedm.errors import UserError
from prunedm.folder import load
from prunedm.options import SampleOptions
from prunedm.progress import Silent
from prunedm.sampling import FastDenoiser, draw, fast, make_sampler, sample_batches
from prunedm.sampling.fast import compiling_pays, count_layers, native_types
from prunedm.stages import sample
from prunedm.task.codec import Pixels
from prunedm.task.condition import Classes, Unconditional

SHAPE = (1, 8, 8)
ASKED = {"codec": Pixels(SHAPE), "condition": Unconditional()}
TIME = torch.tensor(300)


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def denoiser():
    return tiny_model().denoiser


def noise(count: int = 4) -> torch.Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(module, x_NCHW, **more) -> torch.Tensor:
    return module(sample=x_NCHW, timestep=TIME, return_dict=False, **more)[0]


def drawn(denoiser, count: int = 4, *, steps: int = 4, **options) -> torch.Tensor:
    sampler = make_sampler(DDPMScheduler(), "ddim")
    batches = sample_batches(
        denoiser, sampler, count=count, steps=steps, batch_size=4, **ASKED | options
    )
    return torch.cat(list(batches))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Decibels, image by image."""
    error_N = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error_N.clamp_min(1e-9))


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_each_type_is_as_close_as_its_rounding(denoiser, dtype, error):
    wanted = answer(denoiser, noise())
    found = answer(FastDenoiser(denoiser, calls=1, dtype=dtype), noise())
    assert found.dtype == torch.float32
    assert (found - wanted).norm() <= error * wanted.norm()
    assert dtype == torch.float32 or not torch.equal(found, wanted)


def test_ends_times_and_norms_stay_in_float32():
    denoiser = tiny_model(num_class_embeds=3).denoiser
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    copied = FastDenoiser(denoiser, calls=1, dtype=torch.bfloat16).inner
    kinds = {n.replace(".module.", "."): p.dtype for n, p in copied.named_parameters()}
    assert kinds.keys() == before.keys()
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    due = ("conv_in.", "conv_out.", "time_embedding.", "class_embedding.", "conv_norm_out.")
    inside = ("time_emb_proj", "norm1", "norm2", "group_norm")
    assert wide == {n for n in kinds if n.startswith(due) or n.split(".")[-2] in inside}
    assert kinds["mid_block.resnets.0.conv1.weight"] == torch.bfloat16
    assert kinds["mid_block.attentions.0.to_q.weight"] == torch.bfloat16
    after = denoiser.state_dict()  # the given one is left alone
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_labels_reach_the_copy():
    denoiser = tiny_model(num_class_embeds=3).denoiser
    torch.nn.init.normal_(denoiser.class_embedding.weight, std=3.0)
    quick = FastDenoiser(denoiser, calls=1, dtype=torch.bfloat16)
    for label in range(3):
        classes = {"class_labels": torch.full((4,), label)}
        wanted = answer(denoiser, noise(), **classes)
        found = answer(quick, noise(), **classes)
        assert (found - wanted).norm() <= 1e-2 * wanted.norm()
    labels = {"condition": Classes(3)}
    assert psnr(drawn(denoiser, **labels, speed="fast"), drawn(denoiser, **labels)).min() > 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_a_trained_model_are_over_45_db(monkeypatch, dtype):
    monkeypatch.setattr(fast, "native_types", lambda device: [dtype])
    model = load("digits")
    quick, exact = (
        drawn(model.denoiser, 8, steps=8, codec=model.codec, speed=speed)
        for speed in ("fast", "exact")
    )
    assert not torch.equal(quick, exact)
    assert psnr(quick, exact).median() > 45
    assert psnr(quick, exact).min() > 35  # where two digits are about as near, rounding can tell


def test_native_types_end_with_float32(monkeypatch):
    cpu = torch.device("cpu")
    names = ("amx_fp16", "amx_tile", "avx512_bf16")
    for has, kinds in (
        ((), [torch.float32]),
        (("avx512_bf16",), [torch.bfloat16, torch.float32]),
        (names, [torch.float16, torch.bfloat16, torch.float32]),
    ):
        for name in names:
            monkeypatch.setattr(
                torch.cpu, f"_is_{name}_supported", lambda on=name in has: on, raising=False
            )
        assert native_types(cpu) == kinds
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert native_types(torch.device("cuda")) == [torch.float16, torch.float32]


# ---------------------------------------------------------------------------- overflow


def test_images_beyond_float16_are_drawn_in_a_wider_type(monkeypatch, denoiser):
    with torch.no_grad():  # the norm after it takes the factor out, in float32
        denoiser.mid_block.resnets[0].conv1.weight.mul_(1e8)
        denoiser.mid_block.resnets[0].conv1.bias.zero_()
    for module in (fast, draw):
        monkeypatch.setattr(module, "native_types", lambda d: [torch.float16, torch.float32])
    heard = Heard()
    used: list[FastDenoiser] = []
    images = drawn(denoiser, 6, speed="fast", progress=heard, made=used.append)
    assert [call.dtype for call in used] == [torch.float16, torch.float32]
    assert (images.int() - drawn(denoiser, 6).int()).abs().max() <= 1
    assert heard.said == ["this model overflows float16; its images are drawn in a wider type"]


@pytest.mark.parametrize("kinds", [[torch.bfloat16, torch.float32], [torch.float32], None])
def test_a_model_without_finite_images_is_an_error_not_a_picture(monkeypatch, denoiser, kinds):
    with torch.no_grad():
        denoiser.conv_out.bias.fill_(torch.nan)
    for module in (fast, draw):
        monkeypatch.setattr(module, "native_types", lambda d: kinds)
    heard = Heard()
    with pytest.raises(UserError, match="image 0 is not finite: the model's weights are broken"):
        drawn(denoiser, 6, speed="fast" if kinds else "exact", progress=heard)
    assert heard.said == []


# ---------------------------------------------------------------------------- compiling


def test_compiling_has_to_pay_for_itself():
    # 100 layers take 80 s; calls of a second save 0.3 s each
    assert not compiling_pays(1.0, 266, 100)
    assert compiling_pays(1.0, 267, 100)
    assert not compiling_pays(1.0, 267, 200)
    assert not compiling_pays(0.5, 267, 100)
    assert count_layers(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())) == 1


@pytest.fixture
def layer_seconds(request, monkeypatch) -> None:
    monkeypatch.setattr(fast, "SECONDS_PER_LAYER", {"cpu": request.param})


@pytest.fixture
def compiled(monkeypatch) -> list[torch.nn.Module]:
    """Modules that were compiled, by a compiler that changes nothing."""
    modules = []

    class Compiled(torch.nn.Module):
        def __init__(self, module) -> None:
            super().__init__()
            self.forward = module.forward

        def __len__(self) -> int:  # torch's own wrapper cannot be asked for its truth either
            raise TypeError

    def standing_in(module, **options):
        modules.append(module)
        return Compiled(module)

    monkeypatch.setattr(torch, "compile", standing_in)
    return modules


@pytest.mark.parametrize(
    ("layer_seconds", "compiling", "times"),
    [(0.0, "auto", 1), (1e6, "auto", 0), (1e6, "on", 1), (0.0, "off", 0)],
    indirect=["layer_seconds"],
)
@pytest.mark.usefixtures("layer_seconds")
def test_it_is_compiled_once_and_only_if_wanted(compiled, denoiser, compiling, times):
    quick = FastDenoiser(denoiser, calls=4, dtype=torch.float32, compiling=compiling)
    wanted = answer(denoiser, noise())
    for _ in range(4):
        assert torch.allclose(answer(quick, noise()), wanted, atol=1e-5)
    assert compiled == [quick.inner] * times
    assert quick.is_compiled == bool(times)


def test_the_last_calls_are_not_compiled_for(monkeypatch, denoiser, compiled):
    monkeypatch.setattr(fast, "SECONDS_PER_LAYER", {"cpu": 0.0})
    quick = FastDenoiser(denoiser, calls=2)
    for _ in range(2):
        answer(quick, noise())
    assert not compiled


@pytest.mark.parametrize("fails", ["at once", "at the first call"])
def test_where_compiling_fails_it_says_so_once_and_goes_on(monkeypatch, denoiser, fails):
    def failing(*_, **__):
        raise RuntimeError("no C++ compiler\nwith a long story")

    monkeypatch.setattr(
        torch, "compile", failing if fails == "at once" else lambda module, **options: failing
    )
    monkeypatch.setattr(fast, "SECONDS_PER_LAYER", {"cpu": 0.0})
    plain = drawn(denoiser, 6, speed="fast")
    heard = Heard()
    assert torch.equal(drawn(denoiser, 6, speed="fast", progress=heard), plain)
    assert heard.said == [
        "torch.compile does not work here (no C++ compiler); sampling continues without it"
    ]


@pytest.mark.slow
def test_compiled_images_are_over_45_db():
    model = load("digits")
    exact = drawn(model.denoiser, steps=4, codec=model.codec)
    quick = FastDenoiser(model.denoiser, calls=100, compiling="on")
    images = drawn(quick, steps=4, codec=model.codec)
    assert quick.is_compiled
    assert psnr(images, exact).median() > 45


# -------------------------------------------------------------------------------- stage


def test_the_stage_draws_fast_images_that_are_close(tmp_path):
    options = SampleOptions(count=5, batch_size=3, sampling_steps=3, device="cpu", format="npz")
    images = {}
    for speed in ("exact", "fast"):
        record, made = sample(
            "digits", tmp_path / speed, options.model_copy(update={"speed": speed})
        )
        assert made
        assert record.options["speed"] == speed
        kind = str(native_types(torch.device("cpu"))[0]).removeprefix("torch.")
        assert record.figures["images"] == 5
        if speed == "fast":
            assert record.figures["dtype"] == kind
        with np.load(tmp_path / speed / "samples.npz") as file:
            images[speed] = torch.tensor(file["images"])
    assert psnr(images["fast"], images["exact"]).min() > 45
