"""Permutation: the same function, norm groups whole, and as much kept as brute force finds."""

from itertools import combinations, permutations

import pytest
import torch
from helpers import tiny_model
from test_channels import CONFIGS, problem, unet
from torch import nn

from prunedm.architecture import answer, like_weights
from prunedm.errors import UserError
from prunedm.folder import load, save
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers, why_not_nm
from prunedm.removal import stripes as stripes_module
from prunedm.removal.nm import nm_mask
from prunedm.removal.permutation import Permutation, find_permutation, permute_, permuted
from prunedm.removal.stripes import View, best_content, kept_score, stripe_homes

TWO_FOUR = Pattern(2, 4)
WIDE = {"block_out_channels": (16, 32), "norm_num_groups": 4}


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach().abs() for name, m in prunable_layers(model).items()}


def patterns_of(model: nn.Module, pattern: Pattern = TWO_FOUR) -> dict[str, Pattern]:
    layers = prunable_layers(model).items()
    return {name: pattern for name, layer in layers if why_not_nm(layer, pattern.m) is None}


def found_for(model: nn.Module, pattern: Pattern = TWO_FOUR) -> Permutation:
    return find_permutation(model, problem(model), magnitudes(model), patterns_of(model, pattern))


@pytest.mark.parametrize(
    ("config", "groups"), [*((name, 4) for name in CONFIGS), ("plain", 8), ("heads", 2)]
)
def test_the_network_computes_the_same(config, groups):
    model = unet(**(CONFIGS[config] | WIDE | {"norm_num_groups": groups}))
    permutation = found_for(model)
    model.double()
    inputs = [like_weights(model, problem(model, size)) for size in (8, 16)]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [answer(model, given) for given in inputs]

    before = outputs()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    permute_(model, permutation)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
    assert len(moved) > 5
    for one, other in zip(before, outputs(), strict=True):
        assert float((one - other).abs().max()) < 1e-10 * float(one.abs().max())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, weights[name].flatten().sort().values)


def test_norm_groups_stay_whole():
    model = unet(**(CONFIGS["heads"] | WIDE))
    for (name, side), order in found_for(model).order.items():
        assert torch.equal(order.sort().values, torch.arange(len(order)))
        norm = model.get_submodule(name)
        if isinstance(norm, nn.GroupNorm):
            size = norm.num_channels // norm.num_groups
            group_GS = (order // size).reshape(-1, size)
            assert side == "out"
            assert (group_GS == group_GS[:, :1]).all()


def test_more_of_the_scores_is_kept_and_a_second_search_finds_nothing():
    model = unet(**(CONFIGS["plain"] | WIDE))
    scores, patterns = magnitudes(model), patterns_of(model)

    def kept(by_layer) -> float:
        total = 0.0
        for name, pattern in patterns.items():
            score = by_layer[name].double()
            total += float((score * nm_mask(score, pattern)).sum() / score.sum())
        return total

    permutation = found_for(model)
    claimed = [sum(values) for values in zip(*permutation.kept.values(), strict=True)]
    after = kept(permuted(scores, permutation))
    assert after - kept(scores) == pytest.approx(claimed[1] - claimed[0], rel=1e-6)
    assert claimed[1] > 1.002 * claimed[0]
    permute_(model, permutation)
    assert all(
        torch.equal(magnitudes(model)[n], s) for n, s in permuted(scores, permutation).items()
    )
    again = found_for(model)
    gains = [after - before for before, after in again.kept.values()]
    assert max(gains) < 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4"])
def test_two_stripes_are_as_good_as_brute_force(seed, text):
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    score_RC = torch.rand(30, 8, generator=generator, dtype=torch.float64) ** 3
    views = [View(pattern, score_RC, stripe_homes(torch.arange(8), 4))]
    content_C = best_content(views, [torch.arange(8)], [])

    def kept(first) -> float:
        stripes = [list(first), [c for c in range(8) if c not in first]]
        return sum(
            float(score_RC[:, s].sort(1, descending=True).values[:, : pattern.n].sum())
            for s in stripes
        )

    best = max(kept(first) for first in combinations(range(8), 4))
    assert kept_score(views, content_C) == pytest.approx(best, rel=1e-12)
    assert kept(content_C[:4].tolist()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("two_views", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_swap_of_two_channels_gains_more(monkeypatch, seed, two_views):
    generator = torch.Generator().manual_seed(seed)
    rows = (15, 10)[: 1 + two_views]
    scores = [torch.rand(r, 16, generator=generator, dtype=torch.float64) ** 3 for r in rows]
    views = [
        View(pattern, score_RC, torch.arange(16) // pattern.m)
        for pattern, score_RC in zip((TWO_FOUR, Pattern(4, 8)), scores, strict=False)
    ]

    def kept(content_C) -> float:
        stripes = [
            (view, content_C[view.home_C == home])
            for view in views
            for home in range(int(view.home_C.max()) + 1)
        ]
        return sum(float(v.score_RC[:, c].topk(v.pattern.n, 1).values.sum()) for v, c in stripes)

    calls = []
    kept_with = stripes_module._kept_with
    monkeypatch.setattr(
        stripes_module, "_kept_with", lambda *args: calls.append(1) or kept_with(*args)
    )
    content_C = best_content(views, [torch.arange(16)], [])
    assert len(calls) < 400  # it ended by itself, not by its limit
    assert content_C.sort().values.equal(torch.arange(16))
    best = kept(content_C)
    assert best > kept(torch.arange(16))
    for a, b in combinations(range(16), 2):
        swapped_C = content_C.clone()
        swapped_C[[a, b]] = content_C[[b, a]]
        assert kept(swapped_C) <= best + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_whole_cells_swap_as_brute_force_would(seed):
    generator = torch.Generator().manual_seed(seed)
    score_RC = torch.rand(20, 8, generator=generator, dtype=torch.float64) ** 3
    cells = list(torch.arange(8).reshape(4, 2))  # norm groups of two: pairs stay together
    views = [View(TWO_FOUR, score_RC, stripe_homes(torch.arange(8), 4))]
    content_C = best_content(views, cells, [torch.stack(cells)])
    best = max(
        kept_score(views, torch.stack([cells[k] for k in order]).flatten())
        for order in permutations(range(4))
    )
    assert kept_score(views, content_C) == pytest.approx(best, rel=1e-12)
    for pair in content_C.reshape(4, 2).tolist():
        assert pair[0] // 2 == pair[1] // 2


def test_stripes_that_hold_foreign_channels_are_left():
    places_C = torch.tensor([2, 3, 4, 5, 6, 7])  # the second source of a concatenation, at 2
    assert stripe_homes(places_C, 4).tolist() == [-1, -1, 0, 0, 0, 0]


def test_a_permuted_model_is_saved_and_loaded(tmp_path):
    model = tiny_model(**WIDE)
    permute_(model.denoiser, found_for_tiny(model))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out").denoiser.state_dict()
    assert all(torch.equal(v, loaded[n]) for n, v in model.denoiser.state_dict().items())


def found_for_tiny(model) -> Permutation:
    denoiser = model.denoiser
    return find_permutation(denoiser, model.example(), magnitudes(denoiser), patterns_of(denoiser))


def test_signed_scores_count_by_their_size():
    model = unet(**(CONFIGS["plain"] | WIDE))
    signed = {n: m.weight.detach() for n, m in prunable_layers(model).items()}
    one = find_permutation(model, problem(model), signed, patterns_of(model))
    other = found_for(model)
    assert all(torch.equal(order, other.order[key]) for key, order in one.order.items())


def test_what_does_not_fit_is_named():
    model = unet(**CONFIGS["plain"])
    name, scores = "mid_block.resnets.0.conv1", magnitudes(model)
    for patterns, given, message in (
        ({name: Pattern(2, 5)}, scores, "2:5 does not fit mid_block"),
        ({name: TWO_FOUR}, {}, "has no score"),
        ({"nowhere": TWO_FOUR}, scores, "'nowhere', which is not a layer"),
    ):
        with pytest.raises(UserError, match=message):
            find_permutation(model, problem(model), given, patterns)
    other = unet(block_out_channels=(32, 32), **CONFIGS["plain"])
    with pytest.raises(UserError, match="permutation of another model"):
        permute_(other, found_for(unet(**(CONFIGS["plain"] | WIDE))))
