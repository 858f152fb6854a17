"""OBS against references that invert H anew at each step, direct solutions and enumeration."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from diffusers import UNet2DModel
from helpers import TINY, batch_of, problems, tiny_model
from torch import nn
from torch.nn import functional as F

from prunedm.errors import UserError
from prunedm.masks import Pattern
from prunedm.networks import layer_kinds
from prunedm.networks.layers import prunable_layers, to_groups, why_not_nm
from prunedm.removal import input_grams as grams_module
from prunedm.removal import obs
from prunedm.removal.input_grams import input_grams, log_time_weights
from prunedm.removal.obs import obs_prune
from prunedm.task import Batch

LAYERS = {
    "1x1": lambda: nn.Conv2d(8, 4, 1),
    "3x3": lambda: nn.Conv2d(8, 4, 3),
    "padded": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "same": lambda: nn.Conv2d(8, 4, 3, padding="same"),
    "strided": lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(8, 4, 3, dilation=2, padding=1),
    "oblong": lambda: nn.Conv2d(8, 4, (1, 3), (2, 1), padding=(0, 2), dilation=(1, 2)),
    "linear": lambda: nn.Linear(8, 4),
}
CHOICES = {"2:4": Pattern(2, 4), "1:4": Pattern(1, 4), "4:8": Pattern(4, 8), "half": 0.5}


class OneLayer(nn.Module):
    """A denoiser of one layer, which says nothing of the timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if isinstance(self.layer, nn.Linear):  # channels last
            return (self.layer(sample.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        return (self.layer(sample),)


def one_layer(kind: str = "linear") -> OneLayer:
    torch.manual_seed(1)
    return OneLayer(LAYERS[kind]().double())


def inputs(count: int = 6, channels: int = 8) -> torch.Tensor:
    """float64, correlated over channels and neighbours, of a different scale in every channel."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, channels, 7, 8, generator=generator, dtype=torch.float64)
    smooth = F.avg_pool2d(noise, 3, 1, 1) + 0.2 * noise
    return torch.einsum("ij,njhw->nihw", mixing * torch.linspace(0.3, 2, channels)[:, None], smooth)


def batches_of(x_NCHW: torch.Tensor, sizes=(6,)) -> list[Batch]:
    timesteps = torch.linspace(0, 999, len(x_NCHW)).long()
    parts = zip(x_NCHW.split(sizes), timesteps.split(sizes), strict=True)
    return [batch_of(x, t, x) for x, t in parts]


def unfolded(layer: nn.Module, x_NCHW: torch.Tensor) -> torch.Tensor:
    """Materialised: N P K, columns in the order (kh, kw, I)."""
    if isinstance(layer, nn.Linear):
        return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)
    padding = (layer.dilation[0], layer.dilation[1]) if layer.padding == "same" else layer.padding
    columns_NKP = F.unfold(x_NCHW, layer.kernel_size, layer.dilation, padding, layer.stride)
    by_tap = columns_NKP.unflatten(1, (x_NCHW.shape[1], -1)).transpose(1, 2)
    return by_tap.flatten(1, 2).transpose(1, 2)


def weights_of(batches) -> torch.Tensor:
    return torch.cat([log_time_weights(b.level_N, (1.2, 0.8)) for b in batches])


def gram_of(layer: nn.Module, x_NCHW: torch.Tensor) -> torch.Tensor:
    x_NPK = unfolded(layer, x_NCHW)
    return torch.einsum("n,npk,npl->kl", weights_of(batches_of(x_NCHW, len(x_NCHW))), x_NPK, x_NPK)


def damped(h_KK: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    return h_KK + share * h_KK.diagonal().mean() * torch.eye(len(h_KK), dtype=h_KK.dtype)


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """O K, in the order of the Gram's columns."""
    ordered = weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight
    return ordered.detach().flatten(1).clone()


def prune(denoiser: nn.Module, choice, x_NCHW: torch.Tensor, **options) -> torch.Tensor:
    batches = options.pop("batches", None) or batches_of(x_NCHW, len(x_NCHW))
    chosen = {"layer": choice}
    return obs_prune(denoiser, chosen, batches=batches, **options)["layer"]


def reference_sweep(w_OK: torch.Tensor, h_KK: torch.Tensor, choice) -> tuple:
    """Exact OBS in the order of the columns, with the inverse of what is left of H at each column."""
    w, columns = w_OK.clone(), w_OK.shape[1]
    gains = torch.stack([torch.linalg.inv(h_KK[i:, i:])[0, 0] for i in range(columns)])
    keep = torch.ones_like(w, dtype=torch.bool)
    for i in range(columns):
        if isinstance(choice, Pattern) and i % choice.m == 0:
            for o in range(len(w)):
                saliency = w[o, i : i + choice.m] ** 2 / gains[i : i + choice.m]
                keep[o, i + saliency.argsort()[: choice.m - choice.n]] = False
        elif not isinstance(choice, Pattern) and i == 0:  # one block holds all columns
            lowest = (w**2 / gains).flatten().argsort()[: round(choice * w.numel())]
            keep.view(-1)[lowest] = False
        inverse = torch.linalg.inv(h_KK[i:, i:])
        for o in range(len(w)):
            if not keep[o, i]:
                w[o, i:] -= w[o, i] / inverse[0, 0] * inverse[0]
    return w * keep, keep


def least_squares(w_OK: torch.Tensor, keep_OK: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    """Row by row, the kept weights that minimise (w - w0) H (w - w0)^T."""
    best = torch.zeros_like(w_OK)
    for o, keep in enumerate(keep_OK):
        best[o, keep] = torch.linalg.solve(h_KK[keep][:, keep], (h_KK @ w_OK[o])[keep])
    return best


def errors(w_OK: torch.Tensor, dense_OK: torch.Tensor, h_KK: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ok,kl,ol->o", w_OK - dense_OK, h_KK, w_OK - dense_OK)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("chunk", [1, 500, 1 << 24])
def test_grams_are_those_of_a_materialised_unfold(kind, chunk, monkeypatch):
    monkeypatch.setattr(layer_kinds, "CHUNK", chunk)
    monkeypatch.setattr(grams_module, "ROWS", 7)
    denoiser, x = one_layer(kind), inputs()
    for sizes in (6, [1, 3, 2]):
        batches = batches_of(x, sizes)
        gram = input_grams(
            denoiser,
            {"layer": denoiser.layer},
            batches,
            weigh=lambda level_N: log_time_weights(level_N, (1.2, 0.8)),
        )["layer"]
        torch.testing.assert_close(gram, gram_of(denoiser.layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [2, 6])
def test_unfolds_are_bounded_whatever_the_batch(count, monkeypatch):
    sizes = []
    monkeypatch.setattr(layer_kinds, "CHUNK", 2000)
    monkeypatch.setattr(grams_module, "_add_upper", lambda _, x_PK: sizes.append(x_PK.numel()))
    denoiser = one_layer("padded")
    batches = batches_of(inputs(count), count)
    input_grams(denoiser, {"layer": denoiser.layer}, batches, weigh=torch.ones_like)
    assert max(sizes) <= 2000
    assert sum(sizes) == count * 7 * 8 * 72


def test_tokens_folded_into_the_batch_have_their_problems_weights():
    class Folding(OneLayer):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            rows = sample.permute(0, 2, 3, 1).reshape(len(sample) * 7, 8, 8)
            return (self.layer(rows),)

    denoiser, x = Folding(nn.Linear(8, 4).double()), inputs()
    options = {"weigh": lambda level_N: log_time_weights(level_N, (1.2, 0.8))}
    gram = input_grams(denoiser, {"layer": denoiser.layer}, batches_of(x), **options)["layer"]
    torch.testing.assert_close(gram, gram_of(denoiser.layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_columns_of_weight_and_gram_are_in_one_order(kind):
    layer, x = one_layer(kind).layer, inputs()
    y_NCHW = OneLayer(layer)(x, None)[0]
    by_hand = unfolded(layer, x) @ matrix(layer.weight).T + layer.bias
    torch.testing.assert_close(y_NCHW.flatten(2).transpose(1, 2), by_hand)


def test_time_weights_fall_logarithmically_from_the_noisiest_step():
    weights = log_time_weights(torch.tensor([999, 990, 900, 0]).double() / 999, (1.2, 0.8))
    expected = torch.tensor([1.2, 1.2 - 0.4 / 3, 1.2 - 0.8 / 3, 0.8], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["linear", "padded"])
@pytest.mark.parametrize("choice", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), 0.4])
def test_the_sweep_is_exact_obs_and_the_fit_is_the_joint_solution(kind, choice):
    denoiser, x = one_layer(kind), inputs()
    w_OK, h_KK = matrix(denoiser.layer.weight), damped(gram_of(denoiser.layer, x))
    swept, keep = reference_sweep(w_OK, h_KK, choice)
    _, u_KK = obs._damped_factor(gram_of(denoiser.layer, x), 0.01, "layer")
    ours, our_keep = obs._sweep(w_OK, u_KK, *obs._chooser(choice, w_OK, u_KK))
    assert torch.equal(our_keep, keep)
    torch.testing.assert_close(ours, swept, rtol=1e-8, atol=1e-10)
    alone = one_layer(kind)
    prune(alone, choice, x, refits=0)
    torch.testing.assert_close(matrix(alone.layer.weight), swept, rtol=1e-8, atol=1e-10)
    mask = prune(denoiser, choice, x, refits=200)
    assert torch.equal(matrix(mask), keep)
    fitted = matrix(denoiser.layer.weight)
    torch.testing.assert_close(fitted, least_squares(w_OK, keep, h_KK), rtol=1e-6, atol=1e-8)
    assert (errors(fitted, w_OK, h_KK) <= errors(swept, w_OK, h_KK) * (1 + 1e-9)).all()


@pytest.mark.parametrize("choice", [Pattern(2, 4), 0.5])
def test_the_usual_number_of_fitting_steps_is_enough(choice):
    denoiser, x = one_layer("padded"), inputs()
    w_OK, h_KK = matrix(denoiser.layer.weight), damped(gram_of(denoiser.layer, x))
    keep = matrix(prune(denoiser, choice, x))
    best = errors(least_squares(w_OK, keep, h_KK), w_OK, h_KK)
    assert (errors(matrix(denoiser.layer.weight), w_OK, h_KK) <= 1.01 * best).all()


def test_two_of_four_comes_near_the_best_of_all_masks():
    """Summed over 64 rows; a mask drawn blindly is over four times the best."""
    torch.manual_seed(0)
    denoiser, x = OneLayer(nn.Linear(8, 64).double()), inputs()
    w_OK, h_KK = matrix(denoiser.layer.weight), damped(gram_of(denoiser.layer, x))
    pairs = [torch.zeros(4).index_fill(0, torch.tensor(c), 1) for c in combinations(range(4), 2)]
    every = [torch.cat(halves).bool().expand(64, 8) for halves in product(pairs, pairs)]
    all_EO = torch.stack([errors(least_squares(w_OK, k, h_KK), w_OK, h_KK) for k in every])
    best_O = all_EO.amin(0)
    prune(denoiser, Pattern(2, 4), x)
    found_O = errors(matrix(denoiser.layer.weight), w_OK, h_KK)
    assert (found_O >= best_O * (1 - 1e-9)).all()
    assert found_O.sum() < 1.5 * best_O.sum()
    assert all_EO.mean(0).sum() > 4 * best_O.sum()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_counts_are_exact_and_what_is_removed_is_zero(kind, choice):
    denoiser = one_layer(kind)
    mask = prune(denoiser, CHOICES[choice], inputs())
    weight = denoiser.layer.weight
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    assert (weight[~mask] == 0).all()
    if isinstance(CHOICES[choice], Pattern):
        kept = to_groups(mask, CHOICES[choice].m).sum(1)
        assert (kept == CHOICES[choice].n).all()
    else:
        assert int((~mask).sum()) == round(0.5 * mask.numel())


@pytest.mark.parametrize("choice", ["2:4", "half"])
def test_ties_zero_weights_and_zero_inputs_keep_the_count(choice):
    for weight, x in ((0, inputs()), (1, inputs()), (1, 0 * inputs())):
        denoiser = one_layer("3x3")
        nn.init.constant_(denoiser.layer.weight, weight)
        mask = prune(denoiser, CHOICES[choice], x)
        assert int(mask.sum()) * 2 == mask.numel()
        if choice == "2:4":
            assert (to_groups(mask, 4).sum(1) == 2).all()
        assert torch.isfinite(denoiser.layer.weight).all()


def test_dead_inputs_get_no_weight_and_disturb_nothing():
    x = inputs()
    x[:, [1, 4, 5, 6]] = 0
    denoiser = one_layer("padded")
    mask = prune(denoiser, Pattern(2, 4), x)
    assert (denoiser.layer.weight[:, [1, 4, 5, 6]] == 0).all()
    assert mask[:, 7].all()  # the only live input of its group
    denoiser = one_layer("padded")
    mask = prune(denoiser, 0.5, x)
    assert mask[:, [0, 2, 3, 7]].all()


def test_a_given_mask_is_kept_and_its_weights_are_updated():
    denoiser, x = one_layer("strided"), inputs()
    dense = denoiser.layer.weight.detach().clone()
    given = torch.rand(dense.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    h_KK = damped(gram_of(denoiser.layer, x))
    assert torch.equal(prune(denoiser, given, x), given)
    updated = matrix(denoiser.layer.weight)
    assert (updated[~matrix(given)] == 0).all()
    best = errors(least_squares(matrix(dense), matrix(given), h_KK), matrix(dense), h_KK)
    assert (errors(updated, matrix(dense), h_KK) <= 1.01 * best).all()
    assert (errors(matrix(dense * given), matrix(dense), h_KK) > 1.5 * best).all()


def test_blocks_of_columns_change_nothing(monkeypatch):
    results = []
    for block in (1, 12, 128):
        monkeypatch.setattr(obs, "BLOCK", block)
        denoiser = one_layer("3x3")
        prune(denoiser, Pattern(2, 4), inputs(), refits=0)
        results.append(denoiser.layer.weight.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-8, atol=1e-10)


def test_batches_change_nothing():
    results = []
    for sizes in (6, [1, 2, 3]):
        denoiser = one_layer("padded")
        prune(denoiser, 0.5, inputs(), batches=batches_of(inputs(), sizes))
        results.append(denoiser.layer.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("choice", ["2:4", "half"])
def test_outputs_stay_nearer_than_after_magnitude_and_wanda(choice):
    x = inputs(40)
    layer = one_layer("padded").layer
    with torch.no_grad():
        dense = layer(x)
    gains = unfolded(layer, x).square().mean((0, 1)).sqrt()

    def error(denoiser) -> float:
        with torch.no_grad():
            return float((denoiser.layer(x) - dense).square().mean())

    ours = one_layer("padded")
    prune(ours, CHOICES[choice], x)
    for gain in (torch.ones_like(gains), gains):  # magnitude, Wanda
        other = one_layer("padded")
        score_OK = matrix(layer.weight).abs() * gain
        score = score_OK.reshape(4, 3, 3, 8).permute(0, 3, 1, 2)
        mask = (
            obs.nm_mask(score, Pattern(2, 4))
            if choice == "2:4"
            else score > score.flatten().sort().values[score.numel() // 2 - 1]
        )
        assert int(mask.sum()) * 2 == mask.numel()
        other.layer.weight.data *= mask
        assert error(ours) < 0.5 * error(other)


def eligible(denoiser: nn.Module) -> dict[str, Pattern]:
    layers = prunable_layers(denoiser)
    return {n: Pattern(2, 4) for n, layer in layers.items() if why_not_nm(layer, 4) is None}


def pruned_tiny(batches, **options) -> tuple[UNet2DModel, dict[str, torch.Tensor]]:
    denoiser = tiny_model().denoiser
    masks = obs_prune(denoiser, eligible(denoiser), batches=batches, **options)
    return denoiser, masks


def test_memory_decides_how_many_layers_share_a_pass(monkeypatch):
    passes = []
    original = obs.input_grams

    def record(denoiser, layers, *args, **options):
        passes.append(list(layers))
        return original(denoiser, layers, *args, **options)

    monkeypatch.setattr(obs, "input_grams", record)
    batches = [problems().batch(range(4))]
    roomy, _ = pruned_tiny(batches)
    assert len(passes) == 1
    needed = sum(m.weight[0].numel() ** 2 * 4 for m in map(roomy.get_submodule, passes[0]))
    order = passes.pop()
    just, _ = pruned_tiny(batches, memory=needed)
    assert passes == [order]
    assert torch.equal(just.conv_out.weight, roomy.conv_out.weight)
    for name in order:
        assert torch.equal(just.get_submodule(name).weight, roomy.get_submodule(name).weight)
    passes.clear()
    pruned_tiny(batches, memory=needed - 1)
    assert len(passes) == 2
    passes.clear()
    pruned_tiny(batches, memory=1)
    assert passes == [[name] for name in order]


def test_layers_go_in_the_order_of_execution_each_after_those_before_it():
    """Layer by layer, a layer's Gram is that of the inputs from already pruned layers."""
    batches = [problems().batch(range(4))]
    denoiser, _ = pruned_tiny(batches, memory=1)
    again = tiny_model().denoiser
    names = list(eligible(again))
    forwards = {}
    for name in names:

        def count(*_, name=name) -> None:
            forwards.setdefault(name, len(forwards))

        again.get_submodule(name).register_forward_pre_hook(count)
    with torch.no_grad():
        again(batches[0].inputs["sample"], batches[0].inputs["timestep"])
    for name in sorted(names, key=forwards.__getitem__):  # one call each, in that order
        obs_prune(again, {name: Pattern(2, 4)}, batches=batches)
    for name in names:
        expected = again.get_submodule(name).weight
        torch.testing.assert_close(denoiser.get_submodule(name).weight, expected)


def test_nothing_is_left_behind():
    untouched = tiny_model().denoiser.state_dict()
    batches = [problems().batch(range(4)), problems().batch(range(4, 6))]
    denoiser = tiny_model().denoiser.train()
    masks = obs_prune(denoiser, eligible(denoiser), batches=batches)
    assert denoiser.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())
    assert all(p.grad is None and p.requires_grad for p in denoiser.parameters())
    assert list(masks) == list(eligible(denoiser))
    for name, value in denoiser.state_dict().items():
        assert value.dtype == untouched[name].dtype
        assert torch.equal(value, untouched[name]) == (name.removesuffix(".weight") not in masks)


def test_an_error_leaves_no_hooks():
    denoiser = one_layer()
    with pytest.raises(RuntimeError):  # inputs of another width
        prune(denoiser, 0.5, inputs(channels=4))
    assert not denoiser.layer._forward_pre_hooks


def test_an_indefinite_gram_is_damped_until_it_has_an_inverse():
    h_KK = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    damped_KK, u_KK = obs._damped_factor(h_KK, 0.01, "layer")
    torch.testing.assert_close(u_KK.T @ u_KK, torch.linalg.inv(damped_KK))
    assert float(damped_KK[0, 0] - h_KK[0, 0]) == pytest.approx(0.1 * 0.65)


@pytest.mark.parametrize(
    ("kind", "choice", "message"),
    [
        ("linear", Pattern(2, 3), "pattern 2:3 does not fit layer: 8 input channels"),
        ("linear", 1.0, "must be in"),
        ("linear", torch.ones(4, 7, dtype=torch.bool), "must be boolean"),
        ("linear", torch.ones(4, 8), "must be boolean"),
    ],
)
def test_choices_that_do_not_fit_are_named(kind, choice, message):
    with pytest.raises(UserError, match=message):
        prune(one_layer(kind), choice, inputs())


def test_what_cannot_be_pruned_is_named():
    with pytest.raises(UserError, match="layer: H has no inverse"):
        prune(one_layer(), 0.5, inputs() * torch.nan)
    with pytest.raises(UserError, match="at least one"):
        obs_prune(one_layer(), {"layer": 0.5}, batches=[])
    grouped = OneLayer(nn.Conv2d(8, 4, 3, groups=2).double())
    with pytest.raises(UserError, match=r"layer: OBS takes .* convolutions of one group"):
        prune(grouped, 0.5, inputs())
    idle = one_layer()
    idle.other = nn.Linear(4, 4)
    with pytest.raises(UserError, match="other takes no part"):
        obs_prune(idle, {"other": 0.5}, batches=batches_of(inputs()))


def test_class_labels_reach_the_denoiser():
    denoiser = UNet2DModel(**TINY, num_class_embeds=3).eval()
    batch = problems().batch(range(3))
    batch = replace(batch, inputs={**batch.inputs, "class_labels": torch.tensor([0, 1, 2])})
    masks = obs_prune(denoiser, eligible(denoiser), batches=[batch])
    assert all((to_groups(mask, 4).sum(1) == 2).all() for mask in masks.values())


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_swaps_lower_the_layers_error_and_keep_n(kind):
    """On the layer's own outputs, which H measures; other choices than patterns have no swaps."""
    batches = [batch_of(inputs(), torch.zeros(6, dtype=torch.long), inputs())]
    errors = {}
    for rounds in (0, 20):
        dense, pruned = one_layer(kind), one_layer(kind)
        masks = obs_prune(pruned, {"layer": Pattern(1, 4)}, batches=batches, swaps=rounds)
        assert (to_groups(masks["layer"], 4).sum(1) == 1).all()
        assert (pruned.layer.weight[~masks["layer"]] == 0).all()
        with torch.no_grad():
            outputs = [net(inputs(), None)[0] for net in (dense, pruned)]
        errors[rounds] = float((outputs[0] - outputs[1]).square().mean())
    assert errors[20] < 0.98 * errors[0]
