"""The table of layers: each against its own forward pass, and against a twin made of other layers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import Conv1D, batch_of, problems
from torch import nn
from torch.nn import functional as F

from prunedm.architecture import answer
from prunedm.calibration import TimeBins, input_squares, input_variances
from prunedm.errors import UserError
from prunedm.evaluation.size import layer_sparsity, nm_validity
from prunedm.learning import ESTIMATORS
from prunedm.learning.layer import MaskProLayer, unwrap_model, wrap_model_with_maskpro
from prunedm.learning.learner import Learner
from prunedm.learning.logits import MaskLogits
from prunedm.learning.memo import Memo
from prunedm.learning.sparsity import get_model_sparsity_summary
from prunedm.masks import Masks, Pattern, load_masks, save_masks
from prunedm.networks import layer_kinds
from prunedm.networks.layer_kinds import (
    KINDS,
    find_kind,
    from_matrix,
    groups_of,
    kind_of,
    patches,
    to_matrix,
    weight_of,
    width_of,
)
from prunedm.networks.layers import layer_positions, prunable_layers, why_not_nm
from prunedm.networks.widths import set_layer_widths
from prunedm.options import LearnOptions
from prunedm.packed import load_packed, save_packed
from prunedm.removal.channels.target import count_params, planned_macs
from prunedm.removal.input_grams import influence, input_grams
from prunedm.removal.nm import nm_mask, nm_masks
from prunedm.removal.obs import obs_prune
from prunedm.removal.permutation import Permutation, permute_
from prunedm.removal.weights import weight_masks
from prunedm.scores import SCORES, Calibration, score_layers
from prunedm.sparse_kernels.gemm import PACKED
from prunedm.sparse_kernels.layers import to_sparse, why_not_sparse
from prunedm.stages.verbs.finetune import observed
from prunedm.task import Times

MODES = ["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SHAPES = {  # of convolutions with 1, 2 or 3 axes; the first 1, 2 or 3 numbers count
    "one tap": {"kernel_size": (1, 1, 1)},
    "padded": {"kernel_size": (3, 2, 3), "padding": (1, 1, 2)},
    "strided": {"kernel_size": (3, 1, 2), "stride": (2, 2, 1), "padding": (1, 0, 0)},
    "dilated": {"kernel_size": (2, 3, 1), "dilation": (3, 2, 1), "padding": (2, 1, 0)},
    "same": {"kernel_size": (4, 3, 3), "padding": "same", "dilation": (1, 2, 1)},
    "valid": {"kernel_size": (2, 3, 1), "padding": "valid"},
    "grouped": {"kernel_size": (3, 3, 2), "padding": (0, 1, 1), "groups": 2},
    "depthwise": {"kernel_size": (3, 1, 2), "padding": "same", "groups": 4},
}


def convolution(axes: int, shape: str, mode: str = "zeros") -> nn.Module:
    torch.manual_seed(0)
    told = {n: v[:axes] if isinstance(v, tuple) else v for n, v in SHAPES[shape].items()}
    return CONVOLUTIONS[axes](4, 8, padding_mode=mode, **told).double()


LAYERS = {
    "Linear": lambda: nn.Linear(4, 6).double(),
    "Conv1D": lambda: Conv1D(6, 4).double(),
    **{
        f"{axes} axes, {shape}, {mode}": lambda a=axes, s=shape, m=mode: convolution(a, s, m)
        for axes, shape, mode in itertools.product(CONVOLUTIONS, SHAPES, MODES)
    },
}


def inputs_of(layer: nn.Module, count: int = 3) -> torch.Tensor:
    """float64, of a different scale in every channel and at every position."""
    generator = torch.Generator().manual_seed(1)
    axes = kind_of(layer).axes
    shape = (4, *(5, 4, 6)[:axes]) if axes else (2, 7, 4)
    scale = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, *shape, generator=generator, dtype=torch.float64) + 0.3


class OneLayer(nn.Module):
    """A network of one layer, which says nothing of the timestep."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep, return_dict=True):
        return (self.layer(sample),)


def batches(x: torch.Tensor, sizes=(1, 2)) -> list:
    times = torch.zeros(len(x)).long()
    return [
        batch_of(a, t, a)
        for a, t in zip(x.split(list(sizes)), times.split(list(sizes)), strict=True)
    ]


def columns_met(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x[P, K] from the layer itself: a weight that is 1 at one column gives what that column meets."""
    groups, found = groups_of(layer), []
    weight = weight_of(layer)
    each, before = len(weight) // groups, weight.detach().clone()
    with torch.no_grad():
        bias, layer.bias = layer.bias, nn.Parameter(torch.zeros_like(layer.bias))
        for group in range(groups):
            for k in range(weight[0].numel()):
                one_OK = torch.zeros(len(weight), weight[0].numel(), dtype=weight.dtype)
                one_OK[group * each, k] = 1
                weight.copy_(from_matrix(one_OK, weight.shape))
                axis = kind_of(layer).channel_axis
                found.append(layer(x).select(axis, group * each).flatten())
        weight.copy_(before)
        layer.bias = bias
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_its_patches_by_its_matrix(name, monkeypatch):
    layer = LAYERS[name]()
    x, groups = inputs_of(layer), groups_of(layer)
    expected = layer(x).movedim(kind_of(layer).channel_axis, -1).flatten(0, -2)
    w_GOK = to_matrix(weight_of(layer)).unflatten(0, (groups, -1))
    for chunk in (1, 300, 1 << 24):
        monkeypatch.setattr(layer_kinds, "CHUNK", chunk)
        x_PGK = torch.cat(list(patches(layer, x))).unflatten(1, (groups, -1))
        y_PO = torch.einsum("pgk,gok->pgo", x_PGK, w_GOK).flatten(1) + layer.bias
        torch.testing.assert_close(y_PO, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_and_grams_meet_what_the_layer_itself_meets(name):
    layer = LAYERS[name]()
    network, layers, x = OneLayer(layer), {"layer": layer}, inputs_of(layer)
    met_PK, groups = columns_met(layer, x), groups_of(layer)
    shape = (groups, *weight_of(layer).shape[2:], -1)

    def by_weight(values_K: torch.Tensor) -> torch.Tensor:
        return values_K.reshape(shape).movedim(-1, 1).flatten(0, 1)  # [I, *taps]

    square = input_squares(network, layers, batches(x), bins=TimeBins(0, 999, 1))["layer"]
    torch.testing.assert_close(square[0], by_weight(met_PK.square().mean(0)))
    variance = input_variances(network, layers, batches(x))["layer"]
    torch.testing.assert_close(variance, by_weight(met_PK.var(0, correction=0)))
    if groups == 1:
        gram = input_grams(network, layers, batches(x), weigh=torch.ones_like)["layer"]
        torch.testing.assert_close(gram, met_PK.T @ met_PK)


@pytest.mark.parametrize("name", ["Linear", "Conv1D"])
def test_tokens_folded_into_the_batch_count_for_their_problem(name):
    class Folding(OneLayer):
        def forward(self, sample, timestep, return_dict=True):
            return (self.layer(sample.flatten(0, 1)),)

    layer = LAYERS[name]()
    x, times = inputs_of(layer), torch.tensor([0, 600, 999])
    folded, plain = (
        input_squares(kind(layer), {"layer": layer}, [batch_of(x, times, x)], bins=bins)["layer"]
        for kind, bins in ((Folding, TimeBins(0, 999, 2)), (OneLayer, TimeBins(0, 999, 2)))
    )
    torch.testing.assert_close(folded, plain)


@pytest.mark.parametrize("axes", CONVOLUTIONS)
@pytest.mark.parametrize("shape", ["grouped", "depthwise"])
@pytest.mark.parametrize("score", ["wanda", "fluctuation"])
def test_a_grouped_convolution_has_the_scores_of_its_groups_apart(score, shape, axes):
    layer = convolution(axes, shape)
    x, groups = inputs_of(layer, 6), layer.groups
    told = {n: v[:axes] if isinstance(v, tuple) else v for n, v in SHAPES[shape].items()}
    parts = []
    for weight, inputs in zip(layer.weight.chunk(groups), x.chunk(groups, 1), strict=True):
        part = CONVOLUTIONS[axes](4 // groups, 8 // groups, **(told | {"groups": 1})).double()
        part.weight = nn.Parameter(weight.detach().clone())
        parts.append(measured(score, part, inputs))
    torch.testing.assert_close(measured(score, layer, x), torch.cat(parts))


def measured(score: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    calibration = SimpleNamespace(
        problems=SimpleNamespace(batch=lambda _: None, times=Times(0, 999, 1000)),
        batches=batches(x, (len(x),)),
        time_bins=1,
        over_time="mean",
        over_problems="mean",
    )
    network = OneLayer(layer)
    return score_layers(network, {"layer": layer}, score, calibration=calibration)["layer"]


def test_a_position_counts_in_the_order_of_the_patches():
    for name in ("Linear", "Conv1D", *(f"{axes} axes, strided, zeros" for axes in CONVOLUTIONS)):
        layer = LAYERS[name]()
        z = layer(inputs_of(layer))
        factor = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).double()
        (found,) = influence(z * factor, torch.ones_like(z), [layer], [z])
        expected = factor.square().movedim(kind_of(layer).channel_axis, -1).sum(-1).flatten()
        torch.testing.assert_close(found, expected)


def test_every_kind_says_its_widths_and_takes_others():
    for make in LAYERS.values():
        layer = make()
        assert (width_of(layer, "in"), width_of(layer, "out")) == (4, len(weight_of(layer)))
        set_layer_widths(layer, 12, 20)
        assert (width_of(layer, "in"), width_of(layer, "out")) == (12, 20)


def test_kinds_are_found_by_class_subclass_and_name():
    class Own(nn.Conv3d):
        pass

    class Conv1D(nn.Module):  # of this name, but not transformers'
        pass

    assert find_kind(Own(4, 4, 1)) is KINDS[nn.Conv3d]
    assert find_kind(LAYERS["Conv1D"]()).transposed
    assert find_kind(Conv1D()) is None
    assert find_kind(nn.ConvTranspose1d(4, 4, 1)) is None
    with pytest.raises(AssertionError, match="a GroupNorm is none of Linear"):
        kind_of(nn.GroupNorm(2, 4))


def test_the_layer_of_transformers_is_the_one_of_these_tests():
    real = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    x = torch.randn(2, 3, 4)
    assert find_kind(real) is find_kind(Conv1D(6, 4))
    y_PO = next(patches(real, x)) @ to_matrix(weight_of(real)).T + real.bias
    torch.testing.assert_close(real(x).flatten(0, 1), y_PO)


class Mixed(nn.Module):
    """A small denoiser with a layer of every kind."""

    config = SimpleNamespace(sample_size=8, in_channels=1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plane = nn.Conv2d(1, 8, 3, padding=1)
        self.volume = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect")
        self.line = nn.Conv1d(8, 12, 3, padding="same", padding_mode="circular")
        self.turned, self.square = Conv1D(16, 12), Conv1D(16, 16)
        self.flat = nn.Linear(16, 1)
        self.double().eval()

    def forward(self, sample, timestep, return_dict=True):
        x = F.silu(self.plane(sample.to(self.plane.weight.dtype)))  # (N, 8, 8, 8)
        x = F.silu(self.in_volume(x.unflatten(2, (2, 4))))  # (N, 8, 2, 4, 8)
        x = F.silu(self.in_line(x.flatten(2)))  # (N, 12, 64)
        x = F.silu(self.turned(x.movedim(1, 2)))  # (N, 64, 16)
        x = self.flat(F.silu(self.square(x)))
        return (x.movedim(1, 2).unflatten(2, (8, 8)),)

    def in_volume(self, x_NCDHW):
        return self.volume(x_NCDHW)

    def in_line(self, x_NCP):
        return self.line(x_NCP)


class Twin(Mixed):
    """The same function, with the same weights in Conv2d and Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        made = {
            "volume": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "line": nn.Conv2d(8, 12, (1, 3), padding="same", padding_mode="circular"),
            "turned": nn.Linear(12, 16),
            "square": nn.Linear(16, 16),
        }
        for name, layer in made.items():
            old = self.get_submodule(name)
            layer.weight = nn.Parameter(weight_of(old).detach().reshape(layer.weight.shape).clone())
            layer.bias = old.bias
            setattr(self, name, layer.eval())

    def in_volume(self, x_NCDHW):
        slices = self.volume(x_NCDHW.movedim(2, 1).flatten(0, 1))  # each one is a row of the batch
        return slices.unflatten(0, (-1, 2)).movedim(1, 2)

    def in_line(self, x_NCP):
        return self.line(x_NCP.unsqueeze(2)).squeeze(2)


def both() -> tuple[Mixed, Twin]:
    return Mixed(), Twin()


def agree(ours: dict, twins: dict, *, exact: bool = False) -> None:
    """Equal tensors by layer, apart from axes of length 1."""
    assert ours.keys() == twins.keys()
    for name, tensor in ours.items():
        other = twins[name].reshape(tensor.shape)
        if exact or tensor.dtype == torch.bool:
            assert torch.equal(tensor, other), name
        else:
            torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {n: weight_of(layer).detach() for n, layer in prunable_layers(network).items()}


def scores_of(network: nn.Module, name: str = "magnitude") -> dict[str, torch.Tensor]:
    calibration = Calibration(problems(), count=8, batch_size=4, time_bins=2, sweep_images=2)
    return score_layers(network, prunable_layers(network), name, calibration=calibration)


def nm(network: nn.Module, pattern: str = "2:4") -> Masks:
    return nm_masks(prunable_layers(network), scores_of(network), Pattern.parse(pattern))


def test_the_twin_computes_the_same():
    ours, twin = both()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    inputs = {"sample": x, "timestep": t}
    torch.testing.assert_close(answer(ours, inputs), answer(twin, inputs), rtol=1e-12, atol=1e-14)
    kinds = {type(layer).__name__ for layer in prunable_layers(ours).values()}
    assert kinds == {"Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}
    agree(weights(ours), weights(twin), exact=True)


@pytest.mark.parametrize("name", [n for n in SCORES if n != "random"])  # drawn in another shape
def test_every_score_is_that_of_the_twin(name):
    ours, twin = (scores_of(network, name) for network in both())
    agree(ours, twin)
    assert all(ours[n].shape == weight.shape for n, weight in weights(Mixed()).items())


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_weights_and_groups_go_as_in_the_twin(scope):
    ours, twin = (scores_of(network, "wanda") for network in both())
    masks, others = (weight_masks(scores, 0.4, scope=scope) for scores in (ours, twin))
    agree(masks.by_layer, others.by_layer)
    for text in ("2:4", "1:2"):
        masks, others = (
            nm_masks(prunable_layers(network), scores, Pattern.parse(text))
            for network, scores in zip(both(), (ours, twin), strict=True)
        )
        assert set(masks.by_layer) == {"volume", "line", "turned", "square", "flat"}
        agree(masks.by_layer, others.by_layer)
        masks.check_pattern()


def test_groups_of_a_transposed_weight_run_along_its_inputs():
    network = Mixed()
    masks = nm(network)
    masks.apply_(network)
    stored_IO = network.square.weight  # [inputs, outputs], as transformers keeps it
    assert ((stored_IO.unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()
    assert not ((stored_IO.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
    assert why_not_nm(network.turned, 8) == "12 input channels are not a multiple of 8"


@pytest.mark.parametrize("swaps", [0, 2])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("choice", ["2:4", 0.5, "given"])
def test_obs_prunes_as_in_the_twin(choice, guidance, swaps):
    found = []
    for network in both():
        chosen = dict.fromkeys(prunable_layers(network), choice)
        if choice == "2:4":
            chosen = nm(network).patterns
        elif choice == "given":
            chosen = weight_masks(scores_of(network), 0.5, scope="layer").by_layer
        masks = obs_prune(
            network,
            chosen,
            batches=problems().stream(8, size=4),
            swaps=swaps,
            guidance=guidance,
        )
        found.append((masks, weights(network)))
    (masks, ours), (others, twin) = found
    agree(masks, others)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, twin[name].reshape(weight.shape), rtol=1e-4, atol=1e-6)
        if name in masks:
            assert not weight[~masks[name]].any()
            assert weight[masks[name]].all()


def test_masks_hold_on_the_stored_weights(tmp_path):
    network = Mixed()
    dense, masks = weights(Mixed()), nm(network)
    with masks.applied(network):
        assert not masks.violations(network)
        assert masks.validity(network) == 1
    agree(weights(network), dense, exact=True)
    expected = {name: int((dense[name] != 0)[~mask].sum()) for name, mask in masks}
    assert masks.violations(network) == expected
    hold = masks.hold(network)
    hold()
    agree(
        {n: weights(network)[n] for n, _ in masks}, {n: dense[n] * m for n, m in masks}, exact=True
    )
    save_masks(masks, tmp_path / "masks.safetensors")
    agree(load_masks(tmp_path / "masks.safetensors").by_layer, dict(masks), exact=True)


def test_what_is_told_of_the_layers_is_that_of_the_twin():
    told = []
    for network in both():
        masks = nm(network)
        before = nm_validity(network, masks)
        masks.apply_(network)
        inputs = {"sample": torch.zeros(3, 1, 8, 8), "timestep": torch.zeros(3)}
        positions = layer_positions(network, inputs)
        layers = layer_sparsity(network, masks)
        told.append(
            {
                "valid": (before, nm_validity(network, masks)),
                "layers": [(x.name, x.weights, x.nonzero, x.valid, x.why_dense) for x in layers],
                "observed": observed(network, masks),
                "macs": planned_macs(network, positions),
                "params": count_params(network),
                "summary": [
                    {k: v for k, v in row.items() if k != "shape"}
                    for row in get_model_sparsity_summary(network)["layer_stats"].values()
                ],
            }
        )
    assert told[0] == told[1]
    assert told[0]["observed"]["compliance"] == 1 > told[0]["valid"][0]["nm_valid"]
    assert told[0]["summary"][4]["nm_compliance"] == 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_packed_weights_are_those_of_the_twin(precision, tmp_path):
    files = []
    for network in both():
        masks = nm(network.float())
        masks.apply_(network)
        path = tmp_path / f"{type(network).__name__}.safetensors"
        save_packed(network, masks, path, precision=precision)
        state, loaded = load_packed(path)
        agree(loaded.by_layer, dict(masks), exact=True)
        assert state.keys() == network.state_dict().keys()
        network.load_state_dict(state)  # of the stored shapes
        assert state["turned.weight"].is_contiguous()
        files.append(weights(network))
    agree(*files, exact=True)


@pytest.mark.parametrize("name", ["volume", "line", "turned", "square", "flat"])
def test_a_wrapped_layer_computes_with_its_masked_weight(name):
    layer = Mixed().get_submodule(name)
    met = inputs_met(name)
    wrapped = MaskProLayer(layer, 2, 4, temperature=0.5)
    mask = wrapped.get_mask()
    assert torch.equal(mask, nm_mask(weight_of(layer).detach().float().abs(), Pattern(2, 4)))
    wrapped.train()(met).square().sum().backward()
    assert wrapped.mask_logits.grad.abs().sum() > 0
    wrapped.set_mask(mask)
    masked = wrapped(met)
    with torch.no_grad():
        weight_of(layer).mul_(mask)
    torch.testing.assert_close(masked, layer(met))


def inputs_met(name: str) -> torch.Tensor:
    network, met = Mixed(), []
    network.get_submodule(name).register_forward_hook(lambda _, inputs, __: met.append(inputs[0]))
    network(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2))
    return met[0].detach()


def test_a_wrapped_network_gives_the_masks_of_its_twin():
    found = []
    for network in both():
        wrap_model_with_maskpro(network, 2, 4)
        summary = get_model_sparsity_summary(network)["overall_stats"]
        assert summary["nm_compliance"] == 1
        found.append(unwrap_model(network))
        assert not found[-1].violations(network)
    agree(found[0].by_layer, found[1].by_layer, exact=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_of_mask_learning_is_that_of_the_twin(estimator):
    found = []
    for network in both():
        masks = nm(network)
        logits = MaskLogits(masks, weights(network), lead=1.0)
        learner = Learner(
            network,
            logits,
            ESTIMATORS[estimator].make(LearnOptions()),
            wanted=lambda b: b.target,
            share=0.0,
            train_weights=estimator == "sr-ste",
            first_losses=Memo(0),
        )
        batch = problems().batch([0, 1, 2])
        loss = learner(batch, 0.5, torch.Generator().manual_seed(0))
        loss.backward()
        learner.estimator.after_step(logits, learner.weights)
        grads = {str(i): g.grad for i, g in enumerate(logits.groups)}
        found.append((loss.detach(), grads, logits.mode().by_layer))
    (loss, grads, mode), (other, twins, others) = found
    torch.testing.assert_close(loss, other)
    agree(grads, twins)
    agree(mode, others, exact=True)


def test_a_permutation_moves_the_inputs_of_a_transposed_layer():
    network = Mixed()
    before = weights(Mixed())["turned"]
    order = torch.arange(12).flip(0)
    permute_(network, Permutation({("turned", "in"): order}, {}))
    assert torch.equal(weight_of(network.turned), before[:, order])


def test_sparse_kernels_take_linear_layers_of_any_storage_and_no_other_convolution():
    network = Mixed()
    assert "not 2:4" in why_not_sparse(network.square, torch.float64, [PACKED])
    nm(network).apply_(network)
    assert why_not_sparse(network.square, torch.float64, [PACKED]) is None
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(to_sparse(network.square, PACKED, "gemm")(x), network.square(x))
    for name in ("line", "volume"):
        layer = network.get_submodule(name)
        reason = f"a {type(layer).__name__} is neither a linear layer nor a Conv2d"
        assert why_not_sparse(layer, torch.float64, [PACKED]) == reason


def test_obs_refuses_what_it_cannot_take():
    for layer in (nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4)):
        with pytest.raises(
            UserError, match=r"layer: OBS takes linear layers and convolutions of one"
        ):
            obs_prune(OneLayer(layer), {"layer": 0.5}, batches=[])
