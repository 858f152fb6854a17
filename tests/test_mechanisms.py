"""Every mechanism with every score, as `prune` runs them: exact, protected layers whole, loadable."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from helpers import noise_images, tiny_model

from prunedm.architecture import example
from prunedm.architectures import unet2d
from prunedm.errors import UserError
from prunedm.evaluation.size import count_parameters
from prunedm.folder import Model, load, save
from prunedm.masks import Pattern
from prunedm.networks.layers import is_under, layer_positions, prunable_layers, to_groups
from prunedm.options import PruneOptions
from prunedm.progress import Silent
from prunedm.removal.channels.target import planned_macs
from prunedm.scores import SCORES
from prunedm.stages.pruning.job import PruneJob
from prunedm.tables import MECHANISMS

CONDITIONAL = {
    "num_class_embeds": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
QUICK = {"calibration_problems": 8, "time_bins": 1, "sweep_images": 2, "time_range": "0-3"}
WAYS = {
    "channels": {"mechanism": "channels", "target": "params=0.3", "round_to": 4},
    "weights": {"mechanism": "weights", "target": "weights=0.5"},
    "weights, per layer": {"mechanism": "weights", "target": "weights=0.5", "scope": "layer"},
    "2:4": {"mechanism": "nm"},
    "3:8": {"mechanism": "nm", "pattern": "3:8"},
}
MORE = {
    "obs 2:4": {"mechanism": "obs-nm"},
    "obs 1:4": {"mechanism": "obs-nm", "pattern": "1:4"},
    "obs weights": {"mechanism": "obs-weights", "target": "weights=0.5"},
    "permuted": {"mechanism": "nm", "permute": True, "score": "magnitude"},
    "allocated": {
        "mechanism": "nm",
        "allocation": "sensitivity",
        "target": "params=0.5",
        "score": "magnitude",
        "sensitivity_problems": 4,
    },
    "allocated ratios, obs": {
        "mechanism": "obs-weights",
        "allocation": "sensitivity",
        "target": "macs=0.4",
        "score": "magnitude",
        "sensitivity_problems": 4,
    },
}
ALL = [
    *((f"{way}, {score}", WAYS[way] | {"score": score}) for way in WAYS for score in SCORES),
    *MORE.items(),
]


def job_for(model: Model | None = None, **options) -> PruneJob:
    model = model or tiny_model(**CONDITIONAL)
    labels = [0, 1, 2] * 4 if model.conditional else None
    wanted = PruneOptions(**({"device": "cpu"} | QUICK | options))
    return PruneJob(model, wanted, noise_images(labels=labels), Silent())


def pruned(**options) -> tuple[Model, dict]:
    """A copy of what `prune` makes of these options, which several tests look at."""
    return deepcopy(_pruned_once(**options))


@cache
def _pruned_once(**options) -> tuple[Model, dict]:
    return pruned_anew(**options)


def pruned_anew(**options) -> tuple[Model, dict]:
    job = job_for(**options)
    details = MECHANISMS[job.options.mechanism](job)
    if job.model.masks is not None:
        job.model.masks.apply_(job.model.denoiser)
    return job.model, details


def answer(model: Model, size: int = 8) -> torch.Tensor:
    sample_NCHW = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2]) if model.conditional else None
    with torch.no_grad():
        return model.denoiser(sample_NCHW, torch.tensor([3, 700]), labels).sample


@pytest.mark.parametrize(("name", "options"), ALL, ids=[name for name, _ in ALL])
def test_what_is_left_is_exact_protected_and_loads_again(tmp_path, name, options):
    dense = tiny_model(**CONDITIONAL)
    model, details = pruned(**options)
    if model.masks is None:
        for layer, (before, after) in details["layers"].items():
            assert all(0 < new <= old for old, new in zip(before, after, strict=True)), layer
        assert count_parameters(model.denoiser) < count_parameters(dense.denoiser)
    else:
        model.masks.check_pattern()
        assert not model.masks.violations(model.denoiser)
        for layer, pattern in model.masks.patterns.items():
            kept_G = to_groups(model.masks.by_layer[layer], pattern.m).sum(1)
            assert (kept_G == pattern.n).all()
        every = set(prunable_layers(dense.denoiser))
        assert every == set(model.masks.by_layer) | set(details.get("dense", {}))
    for layer, parameter in dense.denoiser.named_parameters():
        if is_under(layer, unet2d.RECORD.protect) and options["mechanism"] != "channels":
            found = model.denoiser.get_parameter(layer)
            assert torch.equal(found.sort().values, parameter.sort().values)  # or permuted
            assert options.get("permute") or torch.equal(found, parameter)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    for size in (8, 16):
        assert answer(model, size).shape == (2, 1, size, size)
        assert torch.equal(answer(model, size), answer(again, size))


@pytest.mark.parametrize("way", ["weights", "weights, per layer", "2:4", "3:8"])
def test_pruning_what_is_pruned_changes_nothing(way):
    model, _ = pruned(**WAYS[way], score="magnitude")
    before = deepcopy(model.denoiser.state_dict())
    masks, model.masks = model.masks, None
    job = job_for(model, **WAYS[way], score="magnitude")
    MECHANISMS[job.options.mechanism](job)
    model.masks.apply_(model.denoiser)
    assert all(torch.equal(mask, masks.by_layer[name]) for name, mask in model.masks)
    assert all(torch.equal(value, before[n]) for n, value in model.denoiser.state_dict().items())


@pytest.mark.parametrize("target", ["params=0.5", "macs=0.4", "weights=0.6"])
@pytest.mark.parametrize("more", [{}, {"scope": "layer"}, {"allocation": "sensitivity"}])
def test_weights_meet_their_target(target, more):
    options = {"mechanism": "weights", "score": "magnitude", "sensitivity_problems": 4}
    model, details = pruned(target=target, **options, **more)
    kind, wanted = target.split("=")
    dense = tiny_model(**CONDITIONAL).denoiser
    positions = layer_positions(dense, example(dense))
    each = positions if kind == "macs" else dict.fromkeys(positions, 1)
    gone = sum(int((~mask).sum()) * each[name] for name, mask in model.masks)
    layers = prunable_layers(dense).values()
    total = {
        "params": count_parameters(dense),
        "macs": planned_macs(dense, positions),
        "weights": sum(layer.weight.numel() for layer in layers),
    }
    found = gone / total[kind]
    assert found == pytest.approx(float(wanted), rel=0.01)
    assert details["achieved"][kind] == pytest.approx(found, rel=1e-3)
    assert "reason" not in details


@pytest.mark.parametrize("target", ["params=0.25", "macs=0.3", "channels=0.3"])
def test_channels_meet_their_target_or_say_why(target):
    options = {"mechanism": "channels", "score": "magnitude", "target": target}
    kind, wanted = target.split("=")
    _, fine = pruned(**options, round_to=2)
    assert fine["achieved"][kind] == pytest.approx(float(wanted), rel=0.01)
    _, coarse = pruned(**options, round_to=16)
    near = abs(coarse["achieved"][kind] - float(wanted)) <= 0.01 * float(wanted)
    assert near != ("multiples of 16" in coarse.get("reason", ""))


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("widths", [(24, 40), (36, 60)])
def test_odd_widths_are_rounded_as_finely_as_the_target_asks_for(kind, widths):
    listener = Listener()
    odd = {"block_out_channels": widths, "norm_num_groups": 4, "attention_head_dim": 4}
    options = {"mechanism": "channels", "score": "magnitude", "target": f"{kind}=0.3"}
    model = tiny_model(**odd)
    job = PruneJob(model, PruneOptions(**options, device="cpu"), noise_images(), listener)
    details = MECHANISMS["channels"](job)
    assert details["achieved"][kind] == pytest.approx(0.3, rel=0.1)
    assert details["round_to"] < 8
    (said,) = listener.said
    assert f"multiples of {details['round_to']}" in said
    asked = PruneJob(
        tiny_model(**odd), PruneOptions(**options, round_to=16), noise_images(), Silent()
    )
    with pytest.raises(UserError, match="round"):
        MECHANISMS["channels"](asked)


def test_layers_that_cannot_get_narrower_say_so():
    _, fine = pruned(**WAYS["channels"], score="random")
    assert fine["dense"] == {}
    _, coarse = pruned(mechanism="channels", target="macs=0.2", round_to=16, score="random")
    assert coarse["dense"]
    for name, reason in coarse["dense"].items():
        before, after = coarse["layers"][name]
        assert before == after
        assert "cannot be split" in reason


def test_allocation_gives_layers_different_patterns():
    model, details = pruned(**MORE["allocated"])
    assert len(set(model.masks.patterns.values())) > 1 or details["dense"]
    assert details["patterns"] == {n: str(p) for n, p in model.masks.patterns.items()}
    assert details["achieved"]["params"] == pytest.approx(0.5, rel=0.01)


def test_a_permuted_model_computes_the_same_and_keeps_more():
    dense = tiny_model(**CONDITIONAL)
    model, details = pruned(**MORE["permuted"])
    kept = details["permutation"]
    assert all(after >= before - 1e-9 for before, after in kept.values())
    assert any(after > before for before, after in kept.values())
    plain, _ = pruned(**(MORE["permuted"] | {"permute": False}))
    sizes = {
        name: sum(float(p.detach().abs().sum()) for p in m.denoiser.parameters())
        for name, m in (("dense", dense), ("permuted", model), ("plain", plain))
    }
    assert sizes["plain"] < sizes["permuted"] < sizes["dense"]


def test_obs_moves_the_weights_that_stay_and_loses_less():
    dense = tiny_model(**CONDITIONAL)
    options = {"calibration_problems": 64, "time_range": "all"}
    updated, _ = pruned(**MORE["obs 2:4"], **options)
    plain, _ = pruned(mechanism="nm", score="wanda", **options)
    name = "mid_block.resnets.0.conv1"
    mask = updated.masks.by_layer[name]
    weight = dense.denoiser.get_submodule(name).weight
    assert not torch.equal(updated.denoiser.get_submodule(name).weight[mask], weight[mask])
    errors = [float((answer(m) - answer(dense)).square().mean()) for m in (updated, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_reinitialised_weights_are_seeded_and_new():
    options = WAYS["channels"] | {"score": "random"}
    kept, one, again, other = (
        pruned_anew(**options, reinitialise=fresh, seed=seed)[0].denoiser
        for fresh, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    name = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(one.get_parameter(name), again.get_parameter(name))
    assert kept.get_parameter(name).shape == one.get_parameter(name).shape
    assert not torch.equal(kept.get_parameter(name), one.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_a_pattern_that_some_layers_cannot_take_names_them():
    _, details = pruned(mechanism="nm", score="magnitude", pattern="5:12")
    assert details["dense"]
    assert all("not a multiple of 12" in reason for reason in details["dense"].values())
    with pytest.raises(UserError, match="5:7 fits no layer"):
        pruned(mechanism="nm", score="magnitude", pattern="5:7")


def test_labels_beyond_the_models_classes_are_refused():
    with pytest.raises(UserError, match="label 3, and the model 3 classes"):
        tiny_model(**CONDITIONAL).condition.check(noise_images(labels=[0, 3] * 6))


def test_patterns_parse_up_to_sixteen():
    assert PruneOptions(pattern="15:16").pattern == "15:16"
    with pytest.raises(ValueError, match="0 < N < M <= 16"):
        PruneOptions(pattern="2:17")
    assert Pattern.parse("15:16").m == 16


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (WAYS["channels"] | {"score": "magnitude"}, {"max_layer_ratio": 0.4}),
        (WAYS["channels"] | {"score": "magnitude"}, {"reduction": "first"}),
        (WAYS["channels"] | {"score": "magnitude"}, {"round_to": 8}),
        (WAYS["2:4"] | {"score": "wanda", "time_range": "all"}, {"over_problems": "max"}),
        (WAYS["2:4"] | {"score": "wanda", "time_range": "all"}, {"time_range": "late"}),
        (WAYS["2:4"] | {"score": "wanda", "time_bins": 2}, {"over_time": "max"}),
        (WAYS["2:4"] | {"score": "diff-pruning"}, {"sweep_images": 1}),
        (WAYS["2:4"] | {"score": "diff-pruning", "time_range": "0-20"}, {"stop_below": 0.9999}),
        (WAYS["weights"] | {"score": "magnitude"}, {"scope": "row"}),
        (MORE["obs 2:4"], {"obs_damping": 1.0}),
        (MORE["obs 2:4"] | {"time_range": "all"}, {"obs_time_weights": (100.0, 0.01)}),
        (MORE["allocated"], {"candidates": ("1:4",)}),
    ],
)
def test_options_reach_what_they_are_for(base, change):
    one, other = (pruned(**(base | more))[0].denoiser.state_dict() for more in ({}, change))
    same = [n for n in one if one[n].shape == other[n].shape and torch.equal(one[n], other[n])]
    assert len(same) < len(one)


def test_rows_lose_the_same_share():
    model, _ = pruned(mechanism="weights", target="weights=0.5", scope="row", score="magnitude")
    dense = tiny_model(**CONDITIONAL).denoiser
    for name, mask in model.masks:
        kept_OK, size_OK = mask.flatten(1), dense.get_submodule(name).weight.abs().flatten(1)
        assert (kept_OK.sum(1) == size_OK.shape[1] - round(0.5 * size_OK.shape[1])).all()
        assert (
            size_OK.masked_fill(~kept_OK, torch.inf).amin(1)
            >= size_OK.masked_fill(kept_OK, -torch.inf).amax(1)
        ).all()
