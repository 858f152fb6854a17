"""Sizes, work and loss figures against hand counts."""

import numpy as np
import pytest
import torch
from helpers import noise_images, problems, tiny_model
from torch import nn

from prunedm.architecture import example
from prunedm.errors import UserError
from prunedm.evaluation.loss import LossEstimate, denoising_loss, fixed_batches
from prunedm.evaluation.paired import median_error, psnr, ssim, window_for
from prunedm.evaluation.profiling import kernel, peak_memory
from prunedm.evaluation.size import (
    count_macs,
    count_nonzero,
    count_parameters,
    layer_sparsity,
    nm_validity,
    packed_bytes,
)
from prunedm.evaluation.speed import Way, dtype_in_words, timings
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.removal.nm import nm_masks


def hand_macs(unet, size: int) -> int:
    """Sum over layers of positions x weights, and the two attention products."""
    total, half = 0, size // 2  # two levels: the second and the middle run at half the size
    for name, layer in unet.named_modules():
        coarse = name.startswith(("down_blocks.1", "mid_block", "up_blocks.0"))
        fine_again = name.startswith("up_blocks.0.upsamplers") or "downsamplers" in name
        side = half if coarse or "downsamplers" in name else size
        side = size if fine_again and "upsamplers" in name else side
        if isinstance(layer, nn.Conv2d):
            total += side * side * layer.weight.numel()
        elif isinstance(layer, nn.Linear):
            tokens = half * half if ".to_" in name else 1  # embeddings once an image
            total += tokens * layer.weight.numel()
    tokens, width = half * half, 32
    return total + 2 * tokens * tokens * width  # q k^T, and the weights times v


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("options", [{}, {"in_channels": 3, "num_class_embeds": 4}])
def test_macs_are_those_counted_by_hand(size, options):
    unet = tiny_model(**options).denoiser
    assert len([n for n, _ in unet.named_modules() if n.endswith("to_q")]) == 1
    inputs = example(unet) | {"sample": torch.zeros(1, unet.config.in_channels, size, size)}
    assert count_macs(unet, inputs) == hand_macs(unet, size)


def test_macs_do_not_see_zeros():
    unet = tiny_model().denoiser
    dense = count_macs(unet, example(unet))
    masks_of(unet).apply_(unet)
    assert count_macs(unet, example(unet)) == dense


def masks_of(unet, text: str = "2:4", targets=()) -> Masks:
    layers = prunable_layers(unet, targets)
    scores = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    return nm_masks(layers, scores, Pattern.parse(text))


def test_parameters_and_nonzeros():
    layer = nn.Conv2d(4, 2, 3)
    assert count_parameters(layer) == 2 * 4 * 9 + 2
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias[:] = torch.tensor([-0.0, 1.0])
    assert count_nonzero(layer) == 4 * 9 + 1


def test_nonzeros_fall_by_what_the_masks_remove():
    unet = tiny_model().denoiser
    before, masks = count_nonzero(unet), masks_of(unet)
    masks.apply_(unet)
    assert masks.kept == masks.total // 2
    assert before - count_nonzero(unet) == masks.total - masks.kept


@pytest.mark.parametrize(("text", "share"), [("2:4", 0.5625), ("1:4", 0.3125), ("4:8", 0.5625)])
def test_packed_layers_take_their_values_and_one_bit_a_weight(text, share):
    unet = tiny_model().denoiser
    masks, half = masks_of(unet, text), 2 * count_parameters(unet)
    assert packed_bytes(unet, None) == half
    assert packed_bytes(unet, masks) == half - (1 - share) * 2 * masks.total


def test_packed_bits_round_up_to_bytes():
    layer = nn.Sequential(nn.Linear(3, 3, bias=False))
    masks = Masks({"0": torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()})
    assert packed_bytes(layer, masks) == 3 * 2 + 2


def test_nm_validity_looks_at_weights_and_says_what_is_dense():
    unet = tiny_model().denoiser
    masks = masks_of(unet, targets=["mid_block"])
    masks.apply_(unet)
    validity = nm_validity(unet, masks)
    assert (validity["pattern"], validity["nm_valid"]) == ("2:4", 1.0)
    assert validity["nm_layers"] == len(masks.by_layer)
    assert set(validity["nm_dense"]) == set(prunable_layers(unet)) - set(masks.by_layer)
    assert set(validity["nm_dense"].values()) == {"left dense"}
    name, mask = next(iter(masks))
    with torch.no_grad():  # a third weight in one group
        unet.get_submodule(name).weight[tuple((~mask).nonzero()[0])] = 1.0
    assert nm_validity(unet, masks)["nm_valid"] == pytest.approx(1 - 4 / masks.total, abs=1e-7)


def test_nm_validity_of_weights_that_are_not_pruned_is_zero():
    unet = tiny_model().denoiser
    assert nm_validity(unet, masks_of(unet))["nm_valid"] == 0
    none = {"pattern": "", "nm_valid": None, "nm_layers": 0, "nm_dense": {}}
    assert nm_validity(unet, None) == none
    assert nm_validity(unet, Masks(masks_of(unet).by_layer)) == none


def test_nm_validity_names_the_layers_that_do_not_fit():
    unet = tiny_model(block_out_channels=(8, 12), norm_num_groups=2, attention_head_dim=4).denoiser
    dense = nm_validity(unet, masks_of(unet, "4:8"))["nm_dense"]
    assert dense["mid_block.resnets.0.conv1"] == "12 input channels are not a multiple of 8"
    assert "down_blocks.0.resnets.0.conv1" not in dense


@pytest.mark.parametrize("count", [8, 9])
def test_standard_error_takes_antithetic_pairs_as_one(count):
    losses = np.random.default_rng(0).random(count)
    estimate = LossEstimate.of(torch.from_numpy(losses))
    pairs = [(losses[2 * k] + losses[2 * k + 1]) / 2 for k in range(4)]
    assert estimate.mean == pytest.approx(losses.mean(), rel=1e-12)
    assert estimate.standard_error == pytest.approx(np.std(pairs, ddof=1) / 2, rel=1e-12)


def test_perfectly_antithetic_losses_have_no_error_and_one_pair_has_no_estimate():
    assert LossEstimate.of(torch.tensor([0.25, 0.75] * 3)).standard_error == 0
    assert np.isnan(LossEstimate.of(torch.tensor([0.25, 0.75])).standard_error)


def test_the_loss_is_the_mean_square_by_hand_in_any_batches():
    unet = tiny_model(dropout=0.5).denoiser.train()
    stream = problems(noise_images(7))
    estimate = denoising_loss(unet, [stream.batch(range(3)), stream.batch(range(3, 10))])
    assert unet.training
    unet.eval()
    expected = []
    for p in range(10):
        batch = stream.batch([p])
        with torch.no_grad():
            output = unet(batch.inputs["sample"], batch.inputs["timestep"]).sample
        expected.append(np.mean((output.numpy() - batch.target.numpy()).astype(float) ** 2))
    np.testing.assert_allclose(estimate.per_problem_N, expected, rtol=1e-5)
    assert estimate.mean == pytest.approx(np.mean(expected), rel=1e-5)


def test_fixed_batches_are_the_first_problems():
    batches = fixed_batches(problems(noise_images(7)), 205)
    assert [len(batch) for batch in batches] == [100, 100, 5]
    whole = problems(noise_images(7)).batch(range(205))
    assert torch.equal(
        torch.cat([batch.inputs["sample"] for batch in batches]), whole.inputs["sample"]
    )


def test_psnr_by_hand():
    reference = np.full((3, 2, 2, 1), 100, np.uint8)
    images = reference.copy()
    images[1] = 0  # squared error 10,000 everywhere: the difference must not wrap
    images[2, 0, 0, 0] = 102  # 4 / 4 = 1
    expected = [np.inf, 20 * np.log10(255 / 100), 20 * np.log10(255)]
    np.testing.assert_allclose(psnr(images, reference), expected, rtol=1e-12)


def test_latencies_are_positive_and_for_the_batch_asked():
    unet = tiny_model(num_class_embeds=3).denoiser
    found = timings([(unet, example(unet, 2))] * 2, Way(2), repeats=2)
    assert [timing.batch for timing in found] == [2, 2]
    assert all(timing.median_ms > 0 and timing.spread_ms >= 0 for timing in found)


def test_pairs_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="not pairs"):
        psnr(np.zeros((2, 4, 4, 1), np.uint8), np.zeros((1, 4, 4, 1), np.uint8))


def brute_ssim(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Wang et al. 2004, every window of every channel by itself; a, b are HWC."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for y in range(a.shape[0] - window + 1):
        for x in range(a.shape[1] - window + 1):
            for c in range(a.shape[2]):
                p = a[y : y + window, x : x + window, c].astype(float)
                q = b[y : y + window, x : x + window, c].astype(float)
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                cov = (weights * (p - mp) * (q - mq)).sum()
                c1, c2 = 6.5025, 58.5225
                values.append(
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                )
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("shape", "window"), [((14, 13, 3), 11), ((11, 11, 1), 11), ((8, 9, 1), 7), ((7, 7, 1), 7)]
)
def test_ssim_is_that_of_windows_one_by_one(shape, window):
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    noise = rng.normal(0, 20, reference.shape)
    images = np.clip(reference + noise, 0, 255).astype(np.uint8)
    images[1] = 255 - reference[1]
    assert window_for(shape[:2]) == window
    expected = [brute_ssim(a, b, window) for a, b in zip(images, reference, strict=True)]
    np.testing.assert_allclose(ssim(images, reference), expected, rtol=1e-9)
    assert expected[1] < 0 < expected[0] < 1
    np.testing.assert_allclose(ssim(reference, reference), 1)


def test_the_error_of_a_median_is_that_of_its_distribution():
    values = np.random.default_rng(0).normal(0, 1, 4000)
    exact = np.sqrt(np.pi / 2 / 4000)  # of the median of a normal sample
    assert median_error(values) == pytest.approx(exact, rel=0.2)
    assert median_error(np.ones(5)) == 0


class Steps(nn.Module):
    """Holds `x + 1` (1 MiB), twice of it beside, then only a concatenation of 2 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))
        self.register_buffer("table", torch.zeros(500))

    def forward(self, x):
        a = x + 1
        b = a * 2
        del a
        return torch.cat([b, b]).relu_()


def test_peak_memory_is_weights_and_the_most_that_is_held_at_once():
    module, x = Steps(), torch.zeros(1024, 256)
    with torch.no_grad():
        assert peak_memory(module, lambda: module(x)) == 6000 + 3 * 2**20


def test_the_kernel_is_the_operator_that_ran_longest():
    x = torch.zeros(256, 256)
    assert kernel(lambda: torch.mm(x, x) + x[0, 0]) == "dense (mm)"


def test_timings_say_how_each_call_was_made():
    unet = tiny_model().denoiser
    (plain,) = timings([(unet, example(unet, 2))], Way(2), repeats=2)
    assert (plain.batch, plain.dtype, plain.compiled) == (2, "float32", False)
    assert plain.threads == torch.get_num_threads()
    assert plain.kernel.startswith("dense (")
    assert plain.images_per_s == pytest.approx(2000 / plain.median_ms)
    seen = []
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    (half,) = timings([(unet, example(unet))], Way(1, bf16=True), repeats=1)
    assert half.dtype == "bf16 autocast"
    assert set(seen) == {torch.bfloat16}


def test_a_compiled_call_is_one_that_was_compiled(monkeypatch):
    unet = tiny_model().denoiser
    monkeypatch.setattr(torch, "compile", lambda module: module)
    with pytest.raises(UserError, match="compiled nothing"):
        timings([(unet, example(unet))], Way(1, compiled=True), repeats=1)


@pytest.mark.slow
def test_compiled_calls_are_timed():
    unet = tiny_model().denoiser
    (found,) = timings([(unet, example(unet))], Way(1, compiled=True), repeats=2)
    assert found.compiled
    assert found.median_ms > 0


def test_layers_are_counted_on_their_weights():
    unet = tiny_model().denoiser
    masks = masks_of(unet, targets=["mid_block"])
    masks.apply_(unet)
    found = {layer.name: layer for layer in layer_sparsity(unet, masks)}
    assert list(found) == list(prunable_layers(unet))
    for name, layer in found.items():
        weight = unet.get_submodule(name).weight
        assert layer.shape == tuple(weight.shape)
        assert layer.nonzero == int((weight != 0).sum())
        if name in masks.by_layer:
            assert (layer.pattern, layer.valid, layer.why_dense) == ("2:4", 1.0, "")
            assert layer.nonzero == layer.weights // 2
        else:
            assert (layer.pattern, layer.valid, layer.why_dense) == ("", None, "left dense")
    name = next(iter(masks.by_layer))
    with torch.no_grad():
        unet.get_submodule(name).weight.fill_(1.0)
    assert layer_sparsity(unet, masks)[list(found).index(name)].valid == 0
    assert all(layer.why_dense == "" for layer in layer_sparsity(unet, None))


@pytest.mark.parametrize(
    ("device", "capability", "allowed", "words"),
    [
        ("cuda", (9, 0), True, "float32 (TF32 convolutions)"),
        ("cuda", (9, 0), False, "float32"),
        ("cuda", (7, 5), True, "float32"),
        ("cpu", (9, 0), True, "float32"),
    ],
)
def test_the_type_says_where_convolutions_are_rounded(
    monkeypatch, device, capability, allowed, words
):
    class Weight:
        dtype = torch.float32

    class OnDevice(nn.Module):
        def parameters(self, recurse=True):
            Weight.device = torch.device(device)
            return iter([Weight])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert dtype_in_words(OnDevice()) == words
    assert dtype_in_words(nn.Linear(1, 1).half()) == "float16"
