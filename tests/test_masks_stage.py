"""masks: extracted from files, masked models and zeros; projected and told; shown; never lost."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from helpers import tiny_folder, tiny_model
from safetensors.torch import save_file

from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.folder import MASKS_FILE, Model, load, save
from prunedm.masks import Masks, Pattern, load_masks, save_masks
from prunedm.networks.layers import prunable_layers, to_groups
from prunedm.options import PruneOptions
from prunedm.removal.nm import nm_masks
from prunedm.stages import prune
from prunedm.stages.masks import extract_masks, extract_to, masks_from

NAME = "mid_block.attentions.0.to_q"


def scores(model: Model) -> dict[str, torch.Tensor]:
    layers = prunable_layers(model.denoiser)
    return {name: layer.get_parameter("weight").detach().abs() for name, layer in layers.items()}


def masked(text: str | None, *, foreign: bool = False, **unet) -> Model:
    """A tiny model with N:M masks by magnitude, or with half of its weights gone."""
    model, found = tiny_model(**unet), scores(tiny_model(**unet))
    if text is None:
        masks = Masks({n: s > s.median() for n, s in found.items()})
    else:
        masks = nm_masks(prunable_layers(model.denoiser), found, Pattern.parse(text))
    masks.apply_(model.denoiser)
    model.masks = None if foreign else masks
    return model


def equal(one: Masks, other: Masks) -> bool:
    return (
        set(one.by_layer) == set(other.by_layer)
        and all(torch.equal(mask, other.by_layer[name]) for name, mask in one)
        and one.patterns == other.patterns
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A 2:4 model folder that the prune stage wrote."""
    folder = tmp_path_factory.mktemp("masks") / "pruned"
    wanted = PruneOptions(
        mechanism="nm", score="magnitude", pictures=0, calibration_problems=4, device="cpu"
    )
    prune(tiny_folder(), folder, wanted)
    return folder


@pytest.fixture
def foreign(pruned, tmp_path) -> Path:
    """The same weights without a word on how they came about."""
    folder = Path(copytree(pruned, tmp_path / "foreign"))
    (folder / MASKS_FILE).unlink()
    (folder / "record.json").unlink()
    return folder


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# ---------------------------------------------------------------------------------- extract


def test_own_masks_come_out_as_they_are(pruned, tmp_path):
    out = tmp_path / "new" / "m.safetensors"
    masks, found, made = extract_to(pruned, out)
    assert made
    assert out.read_bytes() == (pruned / MASKS_FILE).read_bytes()
    assert equal(masks, load_masks(out))
    assert found.lines() == [f"masks from {pruned}"]
    assert [path.name for path in out.parent.iterdir()] == ["m.safetensors"]


def test_zeros_of_a_foreign_folder_give_the_same_masks_and_pattern(pruned, foreign):
    masks, found = extract_masks(load(foreign))
    assert equal(masks, load(pruned).masks)
    assert masks.pattern == Pattern(2, 4)
    assert found.origin == f"the zeros of {foreign}"
    assert (found.without_zeros, found.stray, found.groups_changed) == ((), (), 0)


@pytest.mark.parametrize("text", ["1:2", "1:4", "4:8", "3:16", None])
def test_patterns_of_zeros_are_found_or_left_unstructured(text):
    masks, _ = extract_masks(masked(text, foreign=True))
    assert equal(masks, masked(text).masks)
    assert masks.pattern_text == (text or "")


def test_layers_without_zeros_or_with_a_few_by_chance_are_left_out_and_counted():
    model = tiny_model()
    names = list(prunable_layers(model.denoiser))
    with torch.no_grad():
        model.denoiser.get_submodule(names[0]).weight[0, 0] = 0  # 9 of thousands
        model.denoiser.get_submodule(NAME).weight[:, ::2] = 0
    masks, found = extract_masks(model)
    assert list(masks.by_layer) == [NAME]
    assert masks.patterns == {NAME: Pattern(1, 2)}
    assert found.stray == (names[0],)
    assert set(found.without_zeros) == {*names} - {names[0], NAME}
    rest = next(name for name in names[1:] if name != NAME)
    assert found.lines()[1:] == [
        f"left out: {len(names) - 2} layers without zeros, first {rest}",
        f"left out: 1 layer with less than 1% zeros, as if by chance, first {names[0]}",
    ]


def test_a_dense_model_has_nothing_to_extract():
    with pytest.raises(UserError, match=r"^tiny has no masks, and in no layer .*; prune it first"):
        extract_masks(tiny_model())


@pytest.mark.parametrize("foreign", [True, False])
def test_targets_narrow_what_is_extracted(foreign):
    masks, _ = extract_masks(masked("2:4", foreign=foreign), targets=["mid_block"])
    assert list(masks.by_layer) == list(prunable_layers(tiny_model().denoiser, ["mid_block"]))
    assert masks.pattern == Pattern(2, 4)
    model = masked("2:4")
    model.masks = model.masks.only([NAME])
    with pytest.raises(UserError, match=r"no masks of down_blocks in tiny; give other targets"):
        extract_masks(model, targets=["down_blocks"])


@pytest.mark.parametrize("foreign", [True, False])
def test_an_unstructured_model_is_projected_and_told(foreign):
    model, before = masked(None, foreign=foreign), masked(None).masks
    masks, found = extract_masks(model, pattern=Pattern(2, 4))
    masks.check_pattern()
    assert masks.pattern == Pattern(2, 4)
    over = under = layers = 0
    for name, mask in masks:
        kept_G, was_GM = to_groups(mask, 4).sum(1), to_groups(before.by_layer[name], 4)
        assert (kept_G == 2).all()
        over += int((was_GM.sum(1) > 2).sum())
        under += int((was_GM.sum(1) < 2).sum())
        layers += bool((mask != before.by_layer[name]).any())
        stays = (was_GM & to_groups(mask, 4)).sum(1)  # the mask's own are kept first
        assert torch.equal(stays, was_GM.sum(1).clamp_max(2))
    assert found.groups_changed == over + under > 0
    (told,) = found.lines()[1:]
    assert told.startswith(f"projected to 2:4: {over + under:,} groups of {layers} layers changed")
    assert f"{over:,} kept more than 2, so the smallest |w| went" in told
    assert f"{under:,} kept fewer, so" in told


def test_a_pattern_that_holds_already_changes_nothing():
    model = masked("2:4")
    masks, found = extract_masks(model, pattern=Pattern(4, 8))
    assert found.lines()[1:] == ["every group was 4:8 already"]
    assert masks.pattern == Pattern(4, 8)
    assert all(torch.equal(mask, model.masks.by_layer[name]) for name, mask in masks)


def test_layers_that_cannot_take_the_pattern_stay_out_and_say_why():
    shape = {"block_out_channels": (12, 24), "attention_head_dim": 8}
    model = masked(None, **shape)
    masks, found = extract_masks(model, pattern=Pattern(4, 8))
    reasons = set(found.ineligible.values())
    assert "12 input channels are not a multiple of 8" in reasons
    assert set(masks.by_layer) | set(found.ineligible) == set(model.masks.by_layer)
    told = "\n".join(found.lines())
    assert all(f"left out, as {reason}: " in told for reason in reasons)
    assert all(name in told for name in found.ineligible)
    with pytest.raises(UserError, match=r"5:16|7:11"):
        extract_masks(model, pattern=Pattern(7, 11))


def test_weights_that_are_not_finite_cannot_be_projected():
    model = masked(None)
    model.denoiser.get_submodule(NAME).weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"weights of {NAME} are not all finite"):
        extract_masks(model, pattern=Pattern(2, 4))


def test_a_file_is_never_overwritten_in_silence(pruned, tmp_path):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(
        UserError, match=r"m\.safetensors exists and holds other .* or --overwrite$"
    ):
        extract_to(pruned, out)
    assert out.read_bytes() == b"precious"
    extract_to(pruned, out, overwrite=True)
    assert equal(load_masks(out), load(pruned).masks)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(UserError, match=r"d\.safetensors exists and is not a file"):
        extract_to(pruned, tmp_path / "d.safetensors", overwrite=True)
    with pytest.raises(UserError, match=r"is not the name of a masks file; try m\.safetensors"):
        extract_to(pruned, tmp_path / "m")


def test_the_same_masks_again_are_done_already(pruned, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert extract_to(pruned, out)[2]
    before = out.stat()
    for overwrite in (False, True):
        assert not extract_to(pruned, out, overwrite=overwrite)[2]
    with pytest.raises(SystemExit, match="0"):
        main(["masks", "extract", str(pruned), str(out)])
    assert "done already" in capsys.readouterr().out
    assert out.stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_of_yours_beside_the_masks_is_never_touched(pruned, tmp_path):
    (tmp_path / "m.safetensors.partial").write_text("precious")
    extract_to(pruned, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors.partial").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.safetensors.partial"}


def test_a_write_that_fails_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")

    def full(masks, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prunedm.stages.masks.save_masks", full)
    with pytest.raises(OSError, match="No space"):
        extract_to(pruned, out, overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(out.name, b"precious")]


# ------------------------------------------------------------------------------- masks_from


def test_masks_come_from_a_file_a_masked_model_or_zeros(pruned, foreign, tmp_path):
    denoiser = tiny_model().denoiser
    file = tmp_path / "m.safetensors"
    extract_to(pruned, file)
    found = {source: masks_from(source, denoiser) for source in (str(file), pruned, foreign)}
    assert all(equal(masks, load(pruned).masks) for masks, _ in found.values())
    assert found[str(file)][1].source.path == str(file)
    assert found[pruned][1].source.hash == load(pruned).hash
    assert len({extraction.source.hash for _, extraction in found.values()}) == 3


def test_fill_ins_go_by_the_weights_that_the_masks_are_for(tmp_path):
    dense, before = tiny_model().denoiser, masked("1:4").masks
    save_masks(before, tmp_path / "m.safetensors")
    masks, found = masks_from(tmp_path / "m.safetensors", dense, pattern=Pattern(2, 4))
    expected = nm_masks(prunable_layers(dense), scores(tiny_model()), Pattern(2, 4))
    assert equal(masks, expected)  # the largest of a group, then the largest of the others
    assert found.groups_changed == before.total // 4
    assert "kept more" not in found.lines()[1]


@pytest.mark.parametrize("kind", ["file", "model"])
def test_masks_of_another_model_name_the_first_mismatch(kind, tmp_path):
    other = masked("2:4", block_out_channels=(8, 32))
    source = tmp_path / "m.safetensors"
    if kind == "file":
        save_masks(other.masks, source)
    else:
        source = tmp_path / "model"
        save(other, source)
    first = min(
        n for n, mask in other.masks if mask.shape != scores(tiny_model())[n].shape
    )  # a file is sorted by name
    with pytest.raises(UserError, match=rf"^masks are of another model: {first} has shape \("):
        masks_from(source, tiny_model().denoiser)


def test_a_file_that_breaks_its_pattern_is_refused(tmp_path):
    mask = masked("2:4").masks.by_layer[NAME].clone()
    mask[0, 0] ^= True
    save_masks(Masks({NAME: mask}, {NAME: Pattern(2, 4)}), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=f"masks of {NAME} are not 2:4"):
        masks_from(tmp_path / "m.safetensors", tiny_model().denoiser)


# ------------------------------------------------------------------------------------- show


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each layer's row."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if "_block" in line}


def test_show_prints_every_layer_of_a_model_a_file_and_zeros(pruned, foreign, tmp_path, capsys):
    extract_to(pruned, tmp_path / "m.safetensors")
    shown = []
    for source in (pruned, foreign, tmp_path / "m.safetensors"):
        assert call("masks", "show", source) == 0
        shown.append(capsys.readouterr().out)
    found = load(pruned).masks
    expected = {n: ["x".join(map(str, mask.shape)), "50.0%", "2:4", "yes"] for n, mask in found}
    assert [rows(text) for text in shown] == [expected] * 3
    last = shown[0].splitlines()[-1]
    count = len(found.by_layer)
    assert last.startswith(f"{count} layers, {found.total:,} weights, 50.0% kept")
    assert last.endswith(f"in {count} of {count} (2:4)")


def test_show_tells_valid_from_broken_and_unstructured(tmp_path, capsys):
    good = torch.tensor([[1, 0, 1, 0]] * 8).bool()
    broken = good.clone()
    broken[0, 0] = False
    masks = Masks(
        {"a_block": good, "b_block": broken, "c_block": broken},
        {"a_block": Pattern(2, 4), "b_block": Pattern(2, 4)},
    )
    save_masks(masks, tmp_path / "m.safetensors")
    assert call("masks", "show", tmp_path / "m.safetensors") == 2
    told = capsys.readouterr()
    assert rows(told.out) == {
        "a_block": ["8x4", "50.0%", "2:4", "yes"],
        "b_block": ["8x4", "46.9%", "2:4", "no:", "87.50%"],
        "c_block": ["8x4", "46.9%", "unstructured", "–"],
    }
    assert "exactly N of every M input channels in 1 of 3 (2:4)" in told.out
    assert told.err == "prunedm: masks of b_block are not 2:4, though they claim to be\n"


def test_show_of_unstructured_masks_is_no_error(tmp_path, capsys):
    save_masks(masked(None).masks, tmp_path / "m.safetensors")
    assert call("masks", "show", tmp_path / "m.safetensors") == 0
    assert all(row[-2:] == ["unstructured", "–"] for row in rows(capsys.readouterr().out).values())


@pytest.mark.parametrize("kind", ["rubbish", "weights", "missing", "dense"])
def test_what_holds_no_masks_gives_one_line(kind, tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    if kind == "rubbish":
        path.write_bytes(b"rubbish")
    elif kind == "weights":
        save_file({"a": torch.zeros(3)}, path)
    assert call("masks", "show", tiny_folder() if kind == "dense" else path) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert ("prune it first" if kind == "dense" else "not a masks file") in told.err


def test_extract_tells_what_it_did(pruned, tmp_path, capsys):
    words = ["masks", "extract", pruned, tmp_path / "m.safetensors", "--pattern"]
    assert call(*words, "1:4", "--targets", "mid_block") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"masks from {pruned}"
    assert told[1].startswith("projected to 1:4: ")
    assert told[2].startswith(f"{tmp_path / 'm.safetensors'}: ")
    assert told[2].endswith("(1:4)")
    masks = load_masks(tmp_path / "m.safetensors")
    assert list(masks.by_layer) == sorted(prunable_layers(tiny_model().denoiser, ["mid_block"]))
    assert call(*words, "1:4") == 2
    assert "--overwrite" in capsys.readouterr().err
    for wrong in ("4:4", "2:32"):
        assert call(*words, wrong, "--overwrite") == 2
        assert "try 2:4" in capsys.readouterr().err
    assert equal(load_masks(tmp_path / "m.safetensors"), masks)
