"""MaskProEvaluator: the same figures from Python, as plain dicts and arrays."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_folder, tiny_model

import prunedm
from prunedm.architecture import example
from prunedm.errors import UserError
from prunedm.evaluation.profiling import peak_memory
from prunedm.evaluation.size import packed_bytes
from prunedm.evaluation.speed import one_call
from prunedm.folder import load, save
from prunedm.options import PruneOptions, SampleOptions
from prunedm.stages import prune, sample


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    out = tmp_path_factory.mktemp("masked") / "out"
    options = PruneOptions(mechanism="nm", score="magnitude", pictures=0, device="cpu")
    prune(tiny_folder(), out, options)
    return out


@pytest.fixture(scope="module")
def evaluator(masked):
    found = prunedm.MaskProEvaluator(model_checkpoint=masked, baseline_model=tiny_folder())
    found.load_models()
    return found


def test_nothing_is_there_before_load_models(masked):
    evaluator = prunedm.MaskProEvaluator(masked)
    for call in (
        evaluator.analyze_sparsity,
        evaluator.generate_samples,
        evaluator.benchmark_inference_speed,
    ):
        with pytest.raises(UserError, match="call load_models"):
            call()


def test_sparsity_is_what_can_be_counted(evaluator, masked):
    found = evaluator.analyze_sparsity()
    model = load(masked)
    parameters = list(model.denoiser.parameters())
    total = sum(p.numel() for p in parameters)
    zeros = sum(int((p == 0).sum()) for p in parameters)
    assert found["sparsity"] == pytest.approx(zeros / total)
    assert (found["pattern"], found["nm_compliance"]) == ("2:4", 1.0)
    for name, mask in model.masks:
        layer = found["layers"][name]
        assert layer["sparsity"] == 0.5
        assert (layer["pattern"], layer["valid"]) == ("2:4", 1.0)
        assert layer["shape"] == tuple(mask.shape)
    assert found["baseline"]["params"] == found["params"] == total
    dense = packed_bytes(tiny_model().denoiser, None)
    assert found["compression"] == dense / packed_bytes(model.denoiser, model.masks) > 1
    json.dumps(found)


def test_samples_are_those_of_the_sample_command(evaluator, masked, tmp_path):
    drawn = evaluator.generate_samples(3, sampling_steps=2, seed=5)
    assert (drawn.dtype, drawn.shape) == (np.uint8, (3, 8, 8, 1))
    options = SampleOptions(count=3, sampling_steps=2, seed=5, format="npz", device="cpu")
    for source, baseline in ((masked, False), (tiny_folder(), True)):
        out = tmp_path / str(baseline)
        sample(source, out, options)
        ours = evaluator.generate_samples(3, baseline=baseline, sampling_steps=2, seed=5)
        assert np.array_equal(ours, np.load(out / "samples.npz")["images"])
    with pytest.raises(UserError, match="at least one"):
        evaluator.generate_samples(0)


def test_speed_is_by_batch_size_and_beside_the_baseline(evaluator):
    found = evaluator.benchmark_inference_speed((1, 2), repeats=2)
    for name in ("model", "baseline"):
        assert list(found[name]["timings"]) == [1, 2]
        timing = found[name]["timings"][2]
        assert timing["images_per_s"] == pytest.approx(2000 / timing["median_ms"])
    ours, theirs = (found[name]["timings"][1]["median_ms"] for name in ("model", "baseline"))
    assert found["speedup"][1] == theirs / ours
    unet = tiny_model().denoiser
    with torch.inference_mode():
        peak = peak_memory(unet, one_call(unet, example(unet, 2))) / 1e6
    assert found["baseline"]["peak_memory_mb"] == pytest.approx(peak)
    json.dumps(found)
    for wrong in ({"batch_sizes": ()}, {"batch_sizes": (0,)}, {"repeats": 0}):
        with pytest.raises(UserError, match="give one or more"):
            evaluator.benchmark_inference_speed(**wrong)


def test_the_baseline_is_the_records_dense_model_or_none(masked, tmp_path):
    found = prunedm.MaskProEvaluator(masked)
    found.load_models()
    assert found.baseline.hash == load(tiny_folder()).hash
    alone = prunedm.MaskProEvaluator(tiny_folder())
    alone.load_models()
    assert alone.baseline is None
    assert "compression" not in alone.analyze_sparsity()
    assert list(alone.benchmark_inference_speed((1,), repeats=1)) == ["model"]
    with pytest.raises(UserError, match="there is no baseline"):
        alone.generate_samples(1, baseline=True)


def test_a_dense_model_that_is_gone_is_done_without(tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    save(tiny_model(), dense)
    prune(dense, out, PruneOptions(mechanism="nm", score="magnitude", pictures=0, device="cpu"))
    dense.rename(tmp_path / "moved")
    found = prunedm.MaskProEvaluator(out)
    found.load_models()
    assert found.baseline is None
    assert str(dense) in found.missing
    assert found.analyze_sparsity()["nm_compliance"] == 1.0
    with pytest.raises(UserError, match=r"there is no baseline.*dense.*give baseline_model"):
        found.generate_samples(1, baseline=True)
    found = prunedm.MaskProEvaluator(out, dense)
    with pytest.raises(UserError, match="no model at"):
        found.load_models()


def test_a_baseline_of_other_images_is_refused(masked, tmp_path):
    save(tiny_model(in_channels=3, out_channels=3), tmp_path / "rgb")
    evaluator = prunedm.MaskProEvaluator(masked, tmp_path / "rgb")
    with pytest.raises(UserError, match=r"images of \(1, 8, 8\), the baseline of \(3, 8, 8\)"):
        evaluator.load_models()
