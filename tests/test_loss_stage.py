"""loss: that of a hand-masked copy, the same bits twice, problem by problem whatever the batch."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_folder, tiny_model

from prunedm.cli import main
from prunedm.data.images import load_images
from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import load, save
from prunedm.masks import Masks, save_masks
from prunedm.networks.layers import prunable_layers
from prunedm.options import FinetuneOptions, LossOptions
from prunedm.record import read_record
from prunedm.stages import finetune, loss
from prunedm.stages.inputs import held_out_problems, problems_on

QUICK = {"problems": 22, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def masks() -> Masks:
    """Unstructured masks of two layers in different blocks."""
    names = ["mid_block.attentions.0.to_q", "down_blocks.0.resnets.0.conv1"]
    layers, draw = prunable_layers(tiny_model().denoiser), torch.Generator().manual_seed(3)
    return Masks({n: torch.rand(layers[n].weight.shape, generator=draw) < 0.4 for n in names})


@pytest.fixture(scope="module")
def file(masks, tmp_path_factory):
    path = tmp_path_factory.mktemp("loss") / "m.safetensors"
    save_masks(masks, path)
    return path


def hand_masked(masks: Masks, *names: str):
    """The tiny model with the masked weights (of these layers) multiplied away."""
    model = load(tiny_folder())
    state = model.denoiser.state_dict()
    for name in names or masks.by_layer:
        state[f"{name}.weight"] *= masks.by_layer[name]
    model.denoiser.load_state_dict(state)
    return model


def arrays(folder):
    return [np.load(folder / name) for name in ("losses.npy", "per_problem.npy")]


def test_it_is_the_loss_of_a_hand_masked_copy(masks, file, tmp_path):
    options = LossOptions(**QUICK, masks=str(file))
    record, made = loss(tiny_folder(), tmp_path / "out", options)
    model = hand_masked(masks)
    expected = denoising_loss(model.denoiser, held_out_problems(model, options, 22))
    per_batch_B, per_problem_N = arrays(tmp_path / "out")
    assert made
    np.testing.assert_allclose(per_problem_N, expected.per_problem_N, rtol=1e-5)
    assert record.figures["loss"] == pytest.approx(expected.mean, rel=1e-6)
    assert record.figures["loss_se"] == pytest.approx(expected.standard_error, rel=1e-5)
    assert per_batch_B.dtype == np.float64
    exact_N = per_problem_N.astype(np.float64)
    means = [exact_N[k : k + 4].mean() for k in range(0, 22, 4)]
    np.testing.assert_allclose(per_batch_B, means, rtol=1e-12)
    shown = {key: record.figures[key] for key in ("batches", "problems", "masked_layers", "kept")}
    kept = masks.kept / masks.total
    assert shown == {"batches": 6, "problems": 22, "masked_layers": 2, "kept": kept}
    assert read_record(tmp_path / "out").figures == record.figures
    assert set(record.inputs) == {"model", "dataset", "masks"}
    dense, _ = loss(tiny_folder(), tmp_path / "dense", LossOptions(**QUICK))
    assert dense.figures["loss"] != record.figures["loss"]
    assert (dense.figures["masked_layers"], dense.figures["kept"]) == (0, 1.0)


def overflowing(folder, value: float = 1e30):
    """A model of finite weights whose output is not."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.fill_(value)
    save(model, folder)
    return folder


def test_a_loss_that_is_not_finite_is_an_error_of_the_stage(tmp_path, capsys):
    overflowing(tmp_path / "m")
    words = ["loss", str(tmp_path / "m"), str(tmp_path / "o"), "--problems", "4", "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    out = "".join(capsys.readouterr())
    assert "the held-out loss is nan on 4 of 4 problems" in " ".join(out.split())
    assert not (tmp_path / "o").exists()


def test_finetune_of_such_a_model_does_not_advise_another_learning_rate(tmp_path):
    overflowing(tmp_path / "m")
    options = FinetuneOptions(steps=2, batch_size=2, validation_problems=4, device="cpu")
    with pytest.raises(UserError, match="weights or its noise schedule are broken") as error:
        finetune(tmp_path / "m", tmp_path / "o", options)
    assert "--lr" not in str(error.value)


def test_targets_narrow_the_masks(masks, file, tmp_path):
    options = LossOptions(**QUICK, masks=str(file), targets=("mid_block",))
    record, _ = loss(tiny_folder(), tmp_path / "out", options)
    model = hand_masked(masks, "mid_block.attentions.0.to_q")
    expected = denoising_loss(model.denoiser, held_out_problems(model, options, 22))
    assert record.figures["loss"] == pytest.approx(expected.mean, rel=1e-6)
    assert record.figures["masked_layers"] == 1
    with pytest.raises(UserError, match="--targets narrows the layers of --masks"):
        loss(tiny_folder(), tmp_path / "no", LossOptions(**QUICK, targets=("mid_block",)))
    assert not (tmp_path / "no").exists()


def test_same_seed_same_bits(file, tmp_path):
    for k, seed in enumerate([0, 0, 1]):
        loss(tiny_folder(), tmp_path / str(k), LossOptions(**QUICK, masks=str(file), seed=seed))
    contents = [
        [(tmp_path / str(k) / n).read_bytes() for n in ("losses.npy", "per_problem.npy")]
        for k in range(3)
    ]
    assert contents[0] == contents[1]
    figures = [read_record(tmp_path / str(k)).figures for k in range(3)]
    assert figures[0] == figures[1]
    assert figures[0]["loss"] != figures[2]["loss"]


def test_a_problem_has_its_loss_whatever_the_batch(tmp_path):
    for size in (1, 4, 22):
        loss(tiny_folder(), tmp_path / str(size), LossOptions(**QUICK | {"batch_size": size}))
    one, four, all_at_once = (arrays(tmp_path / str(size))[1] for size in (1, 4, 22))
    np.testing.assert_allclose(four, one, rtol=1e-5)
    np.testing.assert_allclose(all_at_once, one, rtol=1e-5)
    assert [len(arrays(tmp_path / str(size))[0]) for size in (1, 4, 22)] == [22, 6, 1]


def test_fewer_batches_are_the_first_ones(tmp_path):
    loss(tiny_folder(), tmp_path / "all", LossOptions(**QUICK))
    record, _ = loss(tiny_folder(), tmp_path / "two", LossOptions(**QUICK, max_batches=2))
    assert (record.figures["batches"], record.figures["problems"]) == (2, 8)
    for few, full in zip(arrays(tmp_path / "two"), arrays(tmp_path / "all"), strict=True):
        assert np.array_equal(few, full[: len(few)])
    many, _ = loss(tiny_folder(), tmp_path / "many", LossOptions(**QUICK, max_batches=99))
    assert many.figures["problems"] == 22


def test_one_pair_of_problems_has_no_standard_error(tmp_path):
    record, _ = loss(tiny_folder(), tmp_path / "out", LossOptions(**QUICK | {"problems": 2}))
    assert record.figures["loss_se"] is None
    json.loads((tmp_path / "out" / "record.json").read_text(), parse_constant=pytest.fail)


def test_the_split_is_the_users(tmp_path):
    record, _ = loss(tiny_folder(), tmp_path / "train", LossOptions(**QUICK, split="train"))
    model = load(tiny_folder())
    images = load_images("digits", split="train", size=8, channels=1)
    problems = problems_on(images, model, 0)
    expected = denoising_loss(model.denoiser, [problems.batch(range(22))])
    assert record.figures["loss"] == pytest.approx(expected.mean, rel=1e-6)
    test, _ = loss(tiny_folder(), tmp_path / "test", LossOptions(**QUICK))
    assert test.figures["loss"] != record.figures["loss"]


def test_a_masked_model_is_measured_as_it_is_and_gives_its_masks_to_others(masks, tmp_path):
    model = hand_masked(masks)
    model.masks = masks
    save(model, tmp_path / "masked")
    own, _ = loss(tmp_path / "masked", tmp_path / "own", LossOptions(**QUICK))
    given, _ = loss(
        tiny_folder(), tmp_path / "given", LossOptions(**QUICK, masks=str(tmp_path / "masked"))
    )
    assert own.figures == given.figures
    assert own.figures["masked_layers"] == 2


def test_changed_masks_are_another_result(masks, tmp_path):
    path, options = tmp_path / "m.safetensors", LossOptions(**QUICK)
    save_masks(masks, path)
    options = LossOptions(**QUICK, masks=str(path))
    assert loss(tiny_folder(), tmp_path / "out", options)[1]
    assert not loss(tiny_folder(), tmp_path / "out", options)[1]
    save_masks(Masks({n: ~mask for n, mask in masks}), path)
    with pytest.raises(UserError, match="another masks"):
        loss(tiny_folder(), tmp_path / "out", options)


def test_masks_of_another_model_name_the_first_mismatch(tmp_path):
    path = tmp_path / "m.safetensors"
    save_masks(Masks({"mid_block.gone": torch.ones(2, 4).bool()}), path)
    words = r"masks are of another model: mid_block\.gone has no such layer, its mask \(2, 4\)"
    with pytest.raises(UserError, match=words):
        loss(tiny_folder(), tmp_path / "out", LossOptions(**QUICK, masks=str(path)))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_command_prints_mean_and_standard_error(file, tmp_path, capsys):
    words = ["loss", tiny_folder(), tmp_path / "out", "--masks", file, "--problems", 8]
    for _ in range(2):  # made, then found
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), "--batch-size", "3", "--device", "cpu"])
        assert stop.value.code == 0
        told = " ".join(capsys.readouterr().out.split())
        found = read_record(tmp_path / "out").figures
        assert f"mean {found['loss']:.6f} ± {found['loss_se']:.6f} (standard error)" in told
        assert "8 problems in 3 batches; " in told
        assert told.endswith("kept in 2 masked layers")
