"""N:M masks by brute force and by hand indexing; masks on disk; masks held during training."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import noise_images, problems, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from prunedm.architecture import architecture_of
from prunedm.errors import UserError
from prunedm.masks import Masks, Pattern, load_masks, save_masks
from prunedm.networks.layer_kinds import from_matrix
from prunedm.networks.layers import prunable_layers, to_groups, why_not_nm
from prunedm.removal.nm import exact_pattern, nm_mask, nm_masks, project
from prunedm.removal.weights import weight_masks
from prunedm.task import predict

LAYERS = {
    "linear": nn.Linear(16, 3),
    "1x1": nn.Conv2d(16, 3, 1),
    "3x3": nn.Conv2d(16, 3, 3, padding=1),
    "strided": nn.Conv2d(16, 2, (2, 3), stride=2),
}
PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "3:8"]


def random_score(shape, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def taps(shape) -> list[tuple]:
    """Indices of all (output, tap) pairs; a slice stands for the input channels."""
    ranges = [range(size) for size in (shape[0], *shape[2:])]
    return [(o, slice(None), *tap) for o, *tap in itertools.product(*ranges)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("text", PATTERNS)
def test_nm_mask_is_the_best_of_all_patterns_along_the_input_channels(kind, text):
    pattern, shape = Pattern.parse(text), LAYERS[kind].weight.shape
    score = random_score(shape)
    mask = nm_mask(score, pattern)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    subsets = list(itertools.combinations(range(pattern.m), pattern.n))
    for index in taps(shape):
        score_I, mask_I = score[index].numpy(), mask[index].numpy()
        for first in range(0, shape[1], pattern.m):
            values = score_I[first : first + pattern.m]
            best = max(subsets, key=lambda subset, values=values: sum(values[list(subset)]))
            assert tuple(mask_I[first : first + pattern.m].nonzero()[0]) == best
    Masks.uniform({"layer": mask}, pattern).check_pattern()


def test_the_hardware_group_is_four_input_channels_at_one_output_and_tap():
    weight = torch.arange(2 * 8 * 3 * 3).reshape(2, 8, 3, 3)
    groups = {tuple(group) for group in to_groups(weight, 4).tolist()}
    expected = {
        tuple(weight[o, 4 * i : 4 * i + 4, r, s].tolist())
        for o, i, r, s in itertools.product(range(2), range(2), range(3), range(3))
    }
    assert groups == expected
    linear = torch.arange(3 * 8).reshape(3, 8)
    assert to_groups(linear, 4).tolist()[1] == linear[0, 4:8].tolist()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("m", [2, 4, 8])
def test_from_matrix_inverts_to_groups(kind, m):
    weight = random_score(LAYERS[kind].weight.shape)
    assert torch.equal(from_matrix(to_groups(weight, m), weight.shape), weight)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_keep_exactly_n_and_the_first(value):
    mask = nm_mask(torch.full((3, 8, 2, 2), value), Pattern(2, 4))
    expected = torch.tensor([True, True, False, False] * 2)
    assert (mask == expected.reshape(1, 8, 1, 1)).all()


def test_layers_that_cannot_take_the_pattern_say_why():
    assert why_not_nm(nn.Conv2d(8, 4, 3), 4) is None
    assert why_not_nm(nn.Linear(8, 3), 4) is None
    assert why_not_nm(nn.Conv2d(6, 4, 3), 4) == "6 input channels are not a multiple of 4"
    assert why_not_nm(nn.Linear(10, 4), 8) == "10 input channels are not a multiple of 8"
    assert why_not_nm(nn.Conv2d(8, 8, 3, groups=8), 4) == "grouped convolution"
    with pytest.raises(AssertionError, match="no groups of 4"):
        to_groups(torch.zeros(2, 6, 2, 2), 4)  # 48 weights: groups would run across taps


def test_nm_masks_leave_out_ineligible_layers_and_refuse_none_at_all():
    layers = {
        "yes": nn.Conv2d(8, 4, 3),
        "no": nn.Linear(6, 4),
        "depth": nn.Conv2d(8, 8, 3, groups=8),
    }
    scores = {name: layer.weight.detach().abs() for name, layer in layers.items()}
    masks = nm_masks(layers, scores, Pattern(2, 4))
    assert list(masks.by_layer) == ["yes"]
    assert (masks.kept, masks.total) == (4 * 8 * 9 // 2, 4 * 8 * 9)
    with pytest.raises(UserError, match=r"2:4 fits no layer: .*6 input channels.*grouped"):
        nm_masks({k: v for k, v in layers.items() if k != "yes"}, scores, Pattern(2, 4))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 3, 3), (4, 8), (5, 4, 1, 1)])
@pytest.mark.parametrize(
    ("patterns", "common", "text"),
    [
        ({}, None, ""),
        ({"a.b": Pattern(2, 4), "c": Pattern(2, 4)}, Pattern(2, 4), "2:4"),
        ({"a.b": Pattern(2, 4), "c": Pattern(1, 4)}, None, "1:4, 2:4"),
        ({"a.b": Pattern(2, 4)}, None, "2:4"),
    ],
)
def test_masks_come_back_from_disk(tmp_path, shape, patterns, common, text):
    masks = Masks({"a.b": random_score(shape) < 0.5, "c": torch.ones(7, 2).bool()}, patterns)
    save_masks(masks, tmp_path / "m.safetensors")
    loaded = load_masks(tmp_path / "m.safetensors")
    assert (loaded.patterns, loaded.pattern, loaded.pattern_text) == (patterns, common, text)
    assert list(loaded.by_layer) == ["a.b", "c"]
    assert all(torch.equal(mask, masks.by_layer[name]) for name, mask in loaded)
    assert loaded.by_layer["c"].dtype == torch.bool


def test_a_mask_takes_one_bit_a_weight_in_row_major_order(tmp_path):
    mask = random_score((3, 7, 2, 2)) < 0.5
    masks = Masks({"layer": mask.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)})
    save_masks(masks, tmp_path / "m.safetensors")
    packed = load_file(tmp_path / "m.safetensors")["layer"]
    assert packed.dtype == torch.uint8
    assert packed.tolist() == list(np.packbits(mask.numpy().ravel()))
    assert len(packed) == -(-3 * 7 * 4 // 8)


def test_equal_masks_make_equal_files(tmp_path):
    for k, names in enumerate(["abc", "cab"] * 4):  # no order, given or random, shows
        masks = Masks(
            {name: random_score((3, 5)) < 0.5 for name in names},
            dict.fromkeys(names, Pattern(2, 4)),
        )
        save_masks(masks, tmp_path / f"{k}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"shapes": "not json"},
        {"shapes": "{}"},
        {"shapes": "[]"},
        {"shapes": json.dumps({"layer": "wide"})},
        {"shapes": json.dumps({"layer": [64, 64]})},  # more weights than bits
        {"shapes": json.dumps({"layer": [2, 4]}), "patterns": json.dumps({"layer": "two:four"})},
    ],
)
def test_a_damaged_masks_file_is_refused_by_name(tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    save_file({"layer": torch.zeros(1, dtype=torch.uint8)}, path, metadata=metadata)
    with pytest.raises(UserError, match=r"m\.safetensors is not a masks file, or is damaged"):
        load_masks(path)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2-4", "a:b", "²:4", "4:4", "5:4", "0:4", "-1:4"]
)
def test_wrong_patterns_name_the_value_and_the_way_out(text):
    with pytest.raises(UserError, match="try 2:4") as error:
        Pattern.parse(text)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_patterns_print_as_they_are_parsed():
    assert Pattern.parse("2:4") == Pattern(2, 4)
    assert str(Pattern.parse("4:8")) == "4:8"


def test_check_pattern_finds_one_wrong_group():
    mask = nm_mask(random_score((2, 8, 3, 3)), Pattern(2, 4))
    mask[1, 4, 2, 2] ^= True
    with pytest.raises(UserError, match="layer are not 2:4"):
        Masks.uniform({"layer": mask}, Pattern(2, 4)).check_pattern()


def tiny_masks(denoiser) -> Masks:
    layers = prunable_layers(denoiser)
    scores = {n: layer.get_parameter("weight").detach().abs() for n, layer in layers.items()}
    return nm_masks(layers, scores, Pattern(2, 4))


def test_violations_name_layers_and_count_weights():
    denoiser = tiny_model().denoiser
    masks = tiny_masks(denoiser)
    assert set(masks.violations(denoiser)) == set(masks.by_layer)
    masks.apply_(denoiser)
    assert masks.violations(denoiser) == {}
    name, mask = next(iter(masks))
    weight = denoiser.get_submodule(name).weight
    with torch.no_grad():
        weight[tuple(i[:3] for i in (~mask).nonzero(as_tuple=True))] = 1e-9
        weight[tuple(i[:2] for i in mask.nonzero(as_tuple=True))] = 0  # no violation
    assert masks.violations(denoiser) == {name: 3}


def test_apply_zeroes_what_is_removed_and_nothing_else():
    dense, denoiser = tiny_model().denoiser, tiny_model().denoiser
    masks = tiny_masks(denoiser)
    masks.apply_(denoiser)
    for name, weight in denoiser.state_dict().items():
        before, mask = dense.state_dict()[name], masks.by_layer.get(name.removesuffix(".weight"))
        keep = mask if mask is not None and name.endswith(".weight") else torch.ones_like(before)
        assert torch.equal(weight, before * keep)


def test_hold_keeps_zeros_through_optimizer_steps_and_trains_the_rest():
    denoiser = tiny_model().denoiser
    masks = tiny_masks(denoiser)
    masks.apply_(denoiser)
    before = {n: denoiser.get_submodule(n).weight.detach().clone() for n, _ in masks}
    hold = masks.hold(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-2)
    for step in range(3):
        batch = problems(noise_images(4)).batch(range(4 * step, 4 * step + 4))
        optimizer.zero_grad()
        batch.losses(predict(denoiser, batch)).mean().backward()
        optimizer.step()
        assert masks.violations(denoiser)
        hold()
        assert masks.violations(denoiser) == {}
    for name, mask in masks:
        weight = denoiser.get_submodule(name).weight
        assert (weight != before[name])[mask].float().mean() > 0.9


@pytest.mark.parametrize("change", ["renamed", "reshaped"])
def test_masks_of_another_model_are_refused(change):
    denoiser = tiny_model().denoiser
    name, mask = next(iter(tiny_masks(denoiser)))
    wrong = {"gone": mask} if change == "renamed" else {name: mask[:, :4]}
    unfit = Masks(wrong)
    for use in (unfit.apply_, unfit.violations, unfit.hold, unfit.check_fits):
        with pytest.raises(UserError, match=rf"another model: {next(iter(wrong))} has"):
            use(denoiser)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weight_masks_remove_exactly_the_lowest(ratio, scope):
    scores = {"a": random_score((3, 5)), "b": 3 * random_score((4, 2, 3, 3), 1)}
    masks = weight_masks(scores, ratio, scope=scope)
    pools = [["a"], ["b"]] if scope == "layer" else [["a", "b"]]
    for pool in pools:
        score = np.concatenate([scores[name].numpy().ravel() for name in pool])
        kept = np.concatenate([masks.by_layer[name].numpy().ravel() for name in pool])
        removed = round(ratio * len(score))
        assert (~kept).sum() == removed
        assert set(score[~kept]) == set(np.sort(score)[:removed])
    assert masks.pattern is None
    assert all(mask.shape == scores[name].shape for name, mask in masks)


def test_weight_masks_of_equal_scores_still_remove_the_exact_count():
    masks = weight_masks({"a": torch.zeros(5, 7), "b": torch.zeros(3)}, 0.4, scope="global")
    assert masks.total - masks.kept == round(0.4 * 38)


def test_targets_are_prefixes_or_regular_expressions():
    denoiser = tiny_model().denoiser
    every = list(prunable_layers(denoiser))
    middle = [name for name in every if name.startswith("mid_block.")]
    assert 0 < len(middle) < len(every)
    assert list(prunable_layers(denoiser, ["mid_block"])) == middle
    assert list(prunable_layers(denoiser, ["mid_block."])) == middle
    conv1 = [name for name in every if name.endswith("conv1")]
    assert list(prunable_layers(denoiser, [r"conv1$"])) == conv1
    assert list(prunable_layers(denoiser, [conv1[0]])) == conv1[:1]
    both = prunable_layers(denoiser, ["mid_block", r"conv1$"])
    assert list(both) == [name for name in every if name in {*middle, *conv1}]


@pytest.mark.parametrize(
    ("target", "message"),
    [("nose", "'nose' matches no layer; .*mid_block"), ("(", "not a regular")],
)
def test_targets_without_a_layer_are_refused(target, message):
    with pytest.raises(UserError, match=message):
        prunable_layers(tiny_model().denoiser, ["mid_block", target])


def test_the_ends_and_embeddings_are_never_among_the_prunable():
    denoiser = tiny_model(num_class_embeds=4).denoiser
    layers = prunable_layers(denoiser)
    every = {n for n, m in denoiser.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {name.split(".")[0] for name in every - set(layers)} <= set(
        architecture_of(denoiser).protect
    )
    assert {name.split(".")[0] for name in layers} == {"down_blocks", "mid_block", "up_blocks"}
    assert set(prunable_layers(denoiser, protect=())) == every
    with pytest.raises(UserError, match="'conv_in' is protected"):
        prunable_layers(denoiser, ["conv_in"])


# ----------------------------------------------------------------- projection and detection


def closest(kept, score, pattern: Pattern) -> tuple:
    """Of all patterns, those that change fewest; of these, the highest score; of these, the first."""

    def merit(subset):
        removed = kept - set(subset)
        added = set(subset) - kept
        return (-len(removed) - len(added), sum(score[list(subset)]))

    return max(itertools.combinations(range(pattern.m), pattern.n), key=merit)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("text", PATTERNS)
def test_projection_is_the_closest_mask_and_the_score_decides(kind, text):
    pattern, shape = Pattern.parse(text), LAYERS[kind].weight.shape
    mask, score = random_score(shape, 3) < pattern.n / pattern.m, random_score(shape, 4) - 0.5
    projected, changed = project(mask, score, pattern)
    differing = 0
    for index in taps(shape):
        before, after, score_I = mask[index], projected[index], score[index].double().numpy()
        for first in range(0, shape[1], pattern.m):
            group = slice(first, first + pattern.m)
            kept = {int(i) for i in before[group].nonzero()}
            expected = closest(kept, score_I[group], pattern)
            assert tuple(int(i) for i in after[group].nonzero()) == expected
            differing += kept != set(expected)
    assert changed == differing > 0
    again, none = project(projected, score, pattern)
    assert torch.equal(again, projected)
    assert none == 0


def test_projection_of_zeros_takes_the_first_and_keeps_the_masks_own():
    weight = torch.tensor([[0.0, 0, 0, 5], [1, 3, 2, 4], [0, 0, 0, 0]])
    projected, changed = project(weight != 0, weight.abs(), Pattern(2, 4))
    assert projected.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert changed == 3


def test_a_kept_zero_score_goes_before_any_removed_one():
    mask = torch.tensor([[True, False, False, True]])
    projected, changed = project(mask, torch.tensor([[0.0, 9, 9, -1]]), Pattern(2, 4))
    assert torch.equal(projected, mask)
    assert changed == 0


@pytest.mark.parametrize("text", [*PATTERNS, "5:16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_pattern_of_a_mask_is_found(text, kind):
    layer, pattern = LAYERS[kind], Pattern.parse(text)
    mask = nm_mask(random_score(layer.weight.shape), pattern)
    assert exact_pattern(layer, mask) == pattern
    mask[0, 0] ^= True
    assert exact_pattern(layer, mask) is None


@pytest.mark.parametrize("value", [True, False])
def test_dense_and_empty_masks_have_no_pattern(value):
    assert exact_pattern(LAYERS["3x3"], torch.full((3, 16, 3, 3), value)) is None


def test_grouped_convolutions_have_no_pattern():
    layer = nn.Conv2d(16, 4, 3, groups=2)
    mask = nm_mask(random_score(layer.weight.shape), Pattern(2, 4))
    assert exact_pattern(layer, mask) is None


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), 0.5),
        (torch.tensor([[1, 0, 1, 0]]), 1.0),
        (torch.ones(2, 6), 0.0),  # no groups of 4
        (torch.ones(4), 0.0),
        (torch.ones(0, 4), 0.0),
    ],
)
def test_share_of_valid_groups(mask, share):
    masks = Masks({"a": mask.bool(), "b": mask.bool()}, {"a": Pattern(2, 4)})
    assert (masks.valid_groups("a"), masks.valid_groups("b")) == (share, None)
    if share < 1:
        with pytest.raises(UserError, match="masks of a are not 2:4"):
            masks.check_pattern()


def test_only_keeps_masks_and_their_patterns():
    mask = torch.ones(1, 4).bool()
    masks = Masks({"a": mask, "b": mask, "c": mask}, {"a": Pattern(2, 4), "b": Pattern(1, 4)})
    few = masks.only({"b", "c"})
    assert (list(few.by_layer), few.patterns) == (["b", "c"], {"b": Pattern(1, 4)})
