"""Every stage on a tiny model: what it writes, what it says, and that both agree."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import TINY, Killed, tiny_folder, tiny_model
from PIL import Image
from safetensors import safe_open
from scipy.linalg import sqrtm

from prunedm.console import pruning_table
from prunedm.data.images import load_images
from prunedm.errors import UserError
from prunedm.evaluation.size import packed_bytes
from prunedm.folder import load, save
from prunedm.networks.layers import prunable_layers, to_groups
from prunedm.options import (
    EvaluateOptions,
    FinetuneOptions,
    LearnOptions,
    PruneOptions,
    SampleOptions,
    TrainOptions,
)
from prunedm.progress import Silent
from prunedm.record import read_record
from prunedm.stages import compare, evaluate, finetune, learn, prune, sample, train
from prunedm.stages.evaluating.measure import _Measuring
from prunedm.stages.inputs import held_out_problems
from prunedm.stages.verbs.compare import read_comparison
from prunedm.stages.verbs.evaluate import read_evaluation, read_samples
from prunedm.stages.verbs.prune import _held_out

SMALL = {"score": "magnitude", "sensitivity_problems": 2}
QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu"}
MEASURE = {
    "problems": 10,
    "sampling_steps": 2,
    "batch_size": 4,
    "latency_batch": 1,
    "latency_repeats": 2,
    "latency_batches": (1,),
    "device": "cpu",
}


class Listener(Silent):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Quadrants(torch.nn.Module):
    """Four features: the mean of each quarter of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).mean(1).flatten(1)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("features") / "quadrants.pt"
    torch.jit.script(Quadrants()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> dict[str, Path]:
    """train -> prune channels -> finetune -> prune nm -> learn -> finetune."""
    place = tmp_path_factory.mktemp("chain")
    folders = {
        name: place / name for name in ("dense", "narrow", "tuned", "nm", "learned", "final")
    }
    loop = {"steps": 4, "warmup": 1} | QUICK
    train(folders["dense"], TrainOptions(unet=TINY, **loop))
    by = {"score": "magnitude", "pictures": 2}
    prune(folders["dense"], folders["narrow"], PruneOptions(**by))
    finetune(folders["narrow"], folders["tuned"], FinetuneOptions(**loop))
    prune(folders["tuned"], folders["nm"], PruneOptions(mechanism="nm", **by))
    learn(folders["nm"], folders["learned"], LearnOptions(steps=4, lr=1.0, **QUICK))
    finetune(folders["learned"], folders["final"], FinetuneOptions(lr=1e-2, **loop))
    return folders


def loss_of(folder: Path, count: int = 8) -> float:
    """The held-out loss, written out."""
    model, total = load(folder), 0.0
    for batch in held_out_problems(model, PruneOptions(), count):
        with torch.no_grad():
            output = model.denoiser(**batch.inputs).sample
        total += float((output - batch.target).square().double().mean((1, 2, 3)).sum())
    return total / count


def nonzero(folder: Path) -> int:
    return sum(int((p != 0).sum()) for p in load(folder).denoiser.parameters())


def params(folder: Path) -> int:
    return sum(p.numel() for p in load(folder).denoiser.parameters())


# ---------------------------------------------------------------------------------- train


def test_train_writes_a_pipeline_and_figures_of_the_weights_in_it(chain):
    record = read_record(chain["dense"])
    assert record.figures["loss"] == pytest.approx(loss_of(chain["dense"]), rel=1e-5)
    assert len(record.figures["curve"]["losses"]) == 4
    assert record.figures["curve"]["held_out"][-1][0] == 4
    assert record.inputs["dataset"].path == "digits"
    pipeline = DiffusionPipeline.from_pretrained(chain["dense"])
    assert tuple(pipeline.unet.config.block_out_channels) == (16, 32)


def test_train_starts_from_the_seed_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, TrainOptions(unet=TINY, steps=2, seed=seed, dropout=0.2, **QUICK))
        torch.rand(3)  # the global generator moves on in between
    a, b, c = (load(tmp_path / name).hash for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_weights_are_saved_as_such_and_measured_as_such(kind, tmp_path):
    record, _ = train(tmp_path / "out", TrainOptions(unet=TINY, steps=2, save_dtype=kind, **QUICK))
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {getattr(torch, kind)}  # noqa: SIM118
    assert record.figures["loss"] == pytest.approx(loss_of(tmp_path / "out"), rel=1e-4)


def test_mixed_precision_does_not_leak_into_the_figures(tmp_path):
    options = TrainOptions(unet=TINY, steps=2, mixed_precision="bf16", **QUICK)
    record, _ = train(tmp_path / "out", options)
    assert record.figures["loss"] == pytest.approx(loss_of(tmp_path / "out"), rel=1e-6)


def test_a_class_conditional_model_goes_through_every_stage(tmp_path, features):
    dense, narrow, masked = (tmp_path / name for name in ("dense", "narrow", "masked"))
    unet = TINY | {"num_class_embeds": 10}
    train(dense, TrainOptions(unet=unet, steps=2, **QUICK))
    assert load(dense).conditional
    prune(dense, narrow, PruneOptions(pictures=2, score="taylor", calibration_problems=4))
    learn(
        narrow,
        masked,
        LearnOptions(steps=2, score="wanda", calibration_problems=4, time_bins=1, **QUICK),
    )
    finetune(masked, tmp_path / "tuned", FinetuneOptions(steps=2, **QUICK))
    sample(
        tmp_path / "tuned", tmp_path / "drawn", SampleOptions(count=2, sampling_steps=1, label=7)
    )
    options = EvaluateOptions(samples=5, features=features, **MEASURE)
    record, _ = evaluate(tmp_path / "tuned", tmp_path / "measured", options)
    assert record.figures["loss"] == pytest.approx(loss_of(tmp_path / "tuned", 10), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet": {}}, "no architecture: give --preset digits"),
        ({"unet": TINY | {"sample_sise": 8}}, r"'unet\.sample_sise'; did you mean 'sample_size'"),
        ({"unet": {"in_channels": 1}}, "unet has no sample_size"),
        ({"unet": TINY | {"sample_size": None}}, "unet has no sample_size"),
        ({"unet": TINY | {"time_embedding_type": "x" * 5000}}, "unet"),
        ({"unet": TINY | {"down_block_types": ("NoBlock",) * 2}}, "unet describes no UNet2DModel"),
        ({"unet": TINY, "scheduler": {"beta_schedul": "linear"}}, "did you mean 'beta_schedule'"),
        (
            {"unet": TINY, "scheduler": {"beta_schedule": "no"}},
            "scheduler: beta_schedule = 'no' is not one of",
        ),
        ({"unet": TINY | {"in_channels": 3, "out_channels": 3}}, "1 channels.*--convert-channels"),
    ],
)
def test_train_refuses_what_diffusers_would_skip(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", TrainOptions(**QUICK, **options))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- prune


def stats_of(folder: Path) -> dict:
    return json.loads((folder / "pruning_stats.json").read_text())


def test_pruning_channels_reaches_its_target_and_says_what_it_did(chain):
    stats, record = stats_of(chain["narrow"]), read_record(chain["narrow"])
    before, after = params(chain["dense"]), params(chain["narrow"])
    assert stats["before"]["params"] == before
    assert stats["after"]["params"] == after
    assert 1 - after / before == pytest.approx(0.3, abs=0.08)  # widths move in steps of 8
    assert record.figures["params_removed"] == pytest.approx(1 - after / before)
    assert stats["before"]["loss"] == pytest.approx(loss_of(chain["dense"], 64), rel=1e-5)
    assert stats["after"]["loss"] == pytest.approx(loss_of(chain["narrow"], 64), rel=1e-5)
    assert record.figures["problems"] == stats["before"]["problems"] == 64
    assert 0 < record.figures["loss_se"] < stats["after"]["loss"]
    layers = {
        name: [layer.weight.shape[1], layer.weight.shape[0]]
        for name, layer in prunable_layers(load(chain["narrow"]).denoiser).items()
    }
    assert {name: widths[1] for name, widths in stats["layers"].items()} == layers
    assert load(chain["narrow"]).masks is None


def test_the_loss_beside_pruning_is_of_as_many_problems_as_asked_for(tmp_path, capsys):
    hashes, dense = set(), tiny_folder()
    for count in (0, 2, 90):
        options = PruneOptions(mechanism="nm", score="magnitude", pictures=0, problems=count)
        record, _ = prune(dense, tmp_path / str(count), options)
        stats = stats_of(tmp_path / str(count))
        hashes.add(load(tmp_path / str(count)).hash)
        assert record.figures.get("problems", 0) == stats["before"].get("problems", 0) == count
        assert ("loss_before" in record.figures) == ("loss" in stats["after"]) == (count > 0)
        pruning_table(tmp_path / str(count))
        assert (f"loss, {count} problems" in capsys.readouterr().out) == (count > 0)
    assert stats["before"]["loss"] == pytest.approx(loss_of(dense, 90), rel=1e-5)
    assert len(hashes) == 1


def test_a_costly_models_loss_is_of_fewer_problems(monkeypatch):
    for macs, count in ((1e6, 64), (2e10, 30), (1e13, 16)):
        monkeypatch.setattr("prunedm.stages.verbs.prune.count_macs", lambda *_, macs=macs: macs)
        found = _held_out(load(tiny_folder()), PruneOptions())
        assert sum(map(len, found)) == count


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", ["narrow", "nm"])
def test_pruning_shows_pictures(chain, stage, when):
    with Image.open(chain[stage] / "vis" / f"{when}_pruning.png") as picture:
        assert picture.size == (2 * 8 + 1, 8)
        assert np.asarray(picture).std() > 0


def test_pruning_nm_keeps_exactly_n_of_every_m_of_the_largest(chain):
    dense, result = load(chain["tuned"]), load(chain["nm"])
    stats = stats_of(chain["nm"])
    assert str(result.masks.pattern) == "2:4"
    for name, mask in result.masks:
        before_GM = to_groups(dense.denoiser.get_parameter(f"{name}.weight"), 4).detach()
        after_GM = to_groups(result.denoiser.get_parameter(f"{name}.weight"), 4).detach()
        assert (to_groups(mask, 4).sum(1) == 2).all()
        largest = np.sort(np.abs(before_GM.numpy()), axis=1)[:, 2:].sum()
        assert np.abs(after_GM.numpy()).sum() == pytest.approx(largest, rel=1e-4)
        assert stats["layers"][name] == 0.5
    assert set(stats["dense"]) == set(prunable_layers(result.denoiser)) - set(result.masks.by_layer)
    assert stats["after"]["nonzero"] == nonzero(chain["nm"])
    assert stats["after"]["params"] == stats["before"]["params"]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_weights_removes_the_share_asked_for(tmp_path, scope):
    options = PruneOptions(
        mechanism="weights",
        score="magnitude",
        target="weights=0.4",
        scope=scope,
        targets=("mid_block",),
        pictures=0,
    )
    record, _ = prune(tiny_folder(), tmp_path / "out", options)
    masks = load(tmp_path / "out").masks
    assert all(name.startswith("mid_block.") for name in masks.by_layer)
    assert masks.kept / masks.total == pytest.approx(0.6, abs=1e-3)
    assert masks.pattern is None
    shares = [1 - float(mask.float().mean()) for _, mask in masks]
    assert (max(shares) - min(shares) < 0.01) == (scope == "layer")
    assert record.figures["nonzero"] == nonzero(tmp_path / "out")
    assert not (tmp_path / "out" / "vis").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "weights", "target": "channels=0.3"}, "weights take weights=0.3"),
        (
            {"mechanism": "weights", "target": "params=0.99"},
            r"params=0.99 cannot be reached: 0\.\d",
        ),
        ({"target": "weights=0.3"}, "channels takes params=0.3"),
        ({"target": "channels=0.9"}, "at most 0.7 of a layer's channels can go; 0.9 was asked"),
        ({"target": "params=0.9"}, r"cannot be reached: 0\.\d+ is the largest here"),
        ({"target": "macs=0.0001"}, "less than one block"),
        ({"mechanism": "nm", "target": "params=0.5"}, "removes what its pattern says"),
        ({"mechanism": "nm", "time_range": "900-1200", "score": "wanda"}, "timesteps are 0-999"),
        ({"mechanism": "obs-nm", "time_range": "900-1200"}, "timesteps are 0-999"),
        (
            {"mechanism": "nm", "allocation": "sensitivity", "target": "channels=0.5"},
            "weights take weights=0.5",
        ),
        ({"mechanism": "nm", "candidates": ("0.5",)}, "'0.5': nm takes patterns like 2:4"),
        ({"mechanism": "weights", "candidates": ("2:4",)}, "'2:4': weights takes ratios like 0.5"),
        ({"mechanism": "nm", "candidates": ("8:32",)}, "at most 16 channels"),
        (
            {"mechanism": "nm", "allocation": "sensitivity", "target": "params=0.9", **SMALL},
            r"params=0.9 cannot be reached: 0\.\d+ is the largest with the candidates 2:4, 1:4",
        ),
        ({"mechanism": "nm", "targets": ("conv_in",)}, "'conv_in' is protected"),
        (
            {"mechanism": "nm", "allocation": "sensitivity", "candidates": ("half",)},
            "candidate 'half' is neither an N:M pattern",
        ),
        ({"targets": ("mid_block",)}, "--targets narrows weights and nm"),
        ({"mechanism": "nm", "targets": ("nowhere",)}, "target 'nowhere' matches no layer"),
        ({"mechanism": "nm", "pattern": "5:7"}, "5:7 fits no layer"),
    ],
)
def test_prune_refuses_and_leaves_nothing(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prune(tiny_folder(), tmp_path / "out", PruneOptions(pictures=0, **options))
    assert not list(tmp_path.iterdir())


def test_a_masked_model_is_not_pruned_again(chain, tmp_path):
    with pytest.raises(UserError, match="has masks already"):
        prune(chain["nm"], tmp_path / "out", PruneOptions())


# -------------------------------------------------------------------------------- finetune


def test_finetuning_holds_masks_exactly_and_moves_the_rest(chain):
    before, after = load(chain["learned"]), load(chain["final"])
    assert set(after.masks.by_layer) == set(before.masks.by_layer)
    for name, mask in after.masks:
        assert torch.equal(mask, before.masks.by_layer[name])
        weight = after.denoiser.get_parameter(f"{name}.weight")
        assert not weight[~mask].any(), name
        assert not torch.equal(weight, before.denoiser.get_parameter(f"{name}.weight")), name
    record = read_record(chain["final"])
    assert record.figures["loss_before"] == pytest.approx(loss_of(chain["learned"]), rel=1e-5)
    assert record.figures["loss"] == pytest.approx(loss_of(chain["final"]), rel=1e-5)


def test_masks_hold_in_the_average_too(chain, tmp_path):
    """Weights that start off their mask would stay in the average for ever; none may be left."""
    options = FinetuneOptions(steps=3, ema_decay=0.9, lr=1e-2, weight_decay=0.1, **QUICK)
    finetune(chain["learned"], tmp_path / "out", options)
    result = load(tmp_path / "out")
    assert result.masks.violations(result.denoiser) == {}


def test_the_teacher_is_the_dense_model_of_the_record(chain):
    for name in ("tuned", "final"):
        teacher = read_record(chain[name]).inputs["teacher"]
        assert teacher.path == str(chain["dense"].resolve())
        assert teacher.hash == load(chain["dense"]).hash


def test_the_teacher_matters(chain, tmp_path):
    losses = []
    for teacher in ("auto", "none", str(chain["nm"])):
        out = tmp_path / f"t{len(losses)}"
        options = FinetuneOptions(steps=2, teacher=teacher, **QUICK)
        losses.append(finetune(chain["narrow"], out, options)[0].figures["curve"]["losses"][0])
    assert len(set(losses)) == 3


def _gone(dense: Path) -> None:
    dense.rename(dense.with_name("moved"))


def _changed(dense: Path) -> None:
    other = tiny_model()
    torch.nn.init.ones_(other.denoiser.conv_in.weight)
    save(other, dense)


@pytest.mark.parametrize(("harm", "words"), [(_gone, "no model at"), (_changed, "has changed")])
def test_a_teacher_that_is_lost_is_told_and_done_without(tmp_path, harm, words):
    dense, narrow = tmp_path / "dense", tmp_path / "narrow"
    save(tiny_model(), dense)
    prune(dense, narrow, PruneOptions(score="magnitude", pictures=0))
    harm(dense)
    listener = Listener()
    options = FinetuneOptions(steps=1, **QUICK)
    record, made = finetune(narrow, tmp_path / "out", options, progress=listener)
    assert made
    assert "teacher" not in record.inputs
    (line,) = listener.said
    assert words in line
    assert str(dense) in line
    assert "training on the data loss alone" in line


def test_a_model_without_a_record_has_no_teacher(tmp_path):
    listener = Listener()
    options = FinetuneOptions(steps=1, **QUICK)
    finetune(tiny_folder(), tmp_path / "out", options, progress=listener)
    assert listener.said == ["no dense parent on record: training on the data loss alone"]


# ---------------------------------------------------------------------- evaluate, compare


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)


COMPARISON_FILES = {
    "comparison_dashboard.png", "comparison_report.md", "comparison_table.csv",
    "detailed_results.json", "evaluation_summary.md", "metrics", "record.json", "report.html",
    "samples", "visualizations", "workflow_results.json",
}  # fmt: skip


def test_evaluation_matches_direct_computation(chain, tmp_path, features):
    out = tmp_path / "out"
    options = EvaluateOptions(samples=8, features=features, **MEASURE)
    record, _ = evaluate(chain["final"], out, options)
    result = read_evaluation(out)
    figures, model = result.figures, load(chain["final"])
    assert {p.name for p in out.iterdir()} == {"evaluation_results.json", *COMPARISON_FILES}
    assert record.figures == figures.model_dump(mode="json")
    assert result.hash == model.hash
    assert figures.loss == pytest.approx(loss_of(chain["final"], 10), rel=1e-5)
    assert figures.params == params(chain["final"])
    assert figures.nonzero == nonzero(chain["final"])
    weights = chain["final"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert figures.bytes_disk == weights.stat().st_size
    assert figures.bytes_packed == packed_bytes(model.denoiser, model.masks) < 2 * figures.params
    assert figures.latency_ms > 0
    assert (figures.pattern, figures.nm_valid) == ("2:4", 1.0)
    assert figures.nm_layers == len(model.masks.by_layer)

    images = read_samples(out)
    drawn = tmp_path / "drawn"
    same_draw = SampleOptions(count=8, sampling_steps=2, batch_size=4, format="npz", device="cpu")
    sample(chain["final"], drawn, same_draw)
    assert np.array_equal(images, np.load(drawn / "samples.npz")["images"])
    held_out = load_images("digits", split="test", size=8, channels=1)
    reference = torch.stack([held_out[i] for i in range(len(held_out))])
    a, b = (
        Quadrants()(x).double().numpy()
        for x in (torch.tensor(images).permute(0, 3, 1, 2), reference)
    )
    assert figures.fd == pytest.approx(frechet(a, b), rel=1e-6)
    conditions = result.conditions
    assert conditions.features == "FD (quadrants)"
    assert (conditions.samples, conditions.reference, conditions.sampler) == (8, 299, "ddim-2")
    assert (conditions.dataset, conditions.problems, conditions.seed) == ("digits", 10, 0)


def test_evaluation_without_samples_has_no_distance(tmp_path):
    record, _ = evaluate(tiny_folder(), tmp_path / "out", EvaluateOptions(samples=0, **MEASURE))
    assert record.figures["fd"] is None
    assert read_samples(tmp_path / "out") is None


def test_what_would_fail_at_the_end_fails_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("prunedm.folder.Model.sample_shape", (1, 16, 16))
    for options, message in (
        ({"samples": 64, "features": "digits-cnn"}, "64 samples are too few.*64 features"),
        ({"samples": 65, "sampler": "dimm", "features": "digits-cnn"}, "unknown sampler 'dimm'"),
        ({"samples": 9, "features": "nowhere.pt"}, r"unknown features 'nowhere\.pt'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(tiny_folder(), tmp_path / "out", EvaluateOptions(**(MEASURE | options)))
    assert not list(tmp_path.iterdir())


def test_comparison_writes_its_files_and_the_figures_of_its_evaluations(chain, tmp_path, features):
    out = tmp_path / "out"
    models = {"dense": chain["dense"], "same": chain["dense"], "final": chain["final"]}
    listener = Listener()
    options = EvaluateOptions(samples=6, features=features, **MEASURE)
    compare(models, out, options, progress=listener)
    assert {p.name for p in out.iterdir()} == COMPARISON_FILES
    rows = {row.label: row for row in read_comparison(out)}
    assert list(rows) == list(models)
    for label, row in rows.items():
        assert row.figures.loss == pytest.approx(loss_of(models[label], 10), rel=1e-5)
        assert row.figures.nonzero == nonzero(models[label])
    dense, final = (read_samples(out, label) for label in ("dense", "final"))
    errors = ((dense.astype(float) - final.astype(float)) ** 2).mean((1, 2, 3))
    psnr = np.median(10 * np.log10(255**2 / errors))
    assert rows["final"].figures.psnr_db == pytest.approx(psnr)
    assert rows["dense"].figures.psnr_db is None
    assert rows["same"].figures.psnr_db is None  # the same images: infinity
    assert rows["same"].figures.loss == rows["dense"].figures.loss
    with (out / "comparison_table.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 3
    assert "final" in (out / "comparison_report.md").read_text()
    report = (out / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert listener.said == [f"evaluating {label}" for label in models]
    assert compare(models, out, options)[1] is False


def test_an_interrupted_comparison_does_not_measure_again(chain, tmp_path, monkeypatch):
    models = {"dense": chain["dense"], "final": chain["final"]}
    options = EvaluateOptions(depth="quick", **MEASURE)
    compare(models, tmp_path / "whole", options)

    class Stop(Listener):
        def say(self, text: str) -> None:
            super().say(text)
            if text == "evaluating final":
                raise Killed

    with pytest.raises(Killed):
        compare(models, tmp_path / "out", options, progress=Stop())
    done = tmp_path / "out.partial" / "resume" / "evaluations"
    assert (done / "dense" / "evaluation_results.json").exists()
    measured = []
    monkeypatch.setattr("prunedm.stages.evaluating.measure._Measuring.all", _noted(measured))
    compare(models, tmp_path / "out", options)
    assert measured == ["final"]
    whole, out = read_comparison(tmp_path / "whole"), read_comparison(tmp_path / "out")
    assert [r.figures.loss for r in whole] == [r.figures.loss for r in out]


def _noted(measured: list[str]):
    """The real measurement, which notes its label first."""
    real = _Measuring.all

    def noting(self):
        measured.append(self.label)
        return real(self)

    return noting


def test_compare_needs_a_model(tmp_path):
    with pytest.raises(UserError, match="at least one model"):
        compare({}, tmp_path / "out", EvaluateOptions())


# --------------------------------------------------------------------------------- lineage


def test_the_lineage_holds_every_stage_in_order(chain):
    records = read_record(chain["final"]).lineage()
    assert [r.stage for r in records] == [
        "train",
        "prune",
        "finetune",
        "prune",
        "learn",
        "finetune",
    ]
    folders = list(chain.values())
    for record, folder in zip(records, folders, strict=True):
        alone = {"history": []}
        assert record.model_copy(update=alone) == read_record(folder).model_copy(update=alone)
    assert not any(record.history for record in records[:-1])  # each stage once, not 2^k times
    for record, source in zip(records[1:], folders[:-1], strict=True):
        assert record.inputs["model"].hash == load(source).hash
        assert record.inputs["model"].path == str(source.resolve())


def test_a_changed_input_is_not_called_done(tmp_path):
    source, out = tmp_path / "model", tmp_path / "out"
    save(tiny_model(), source)
    options = PruneOptions(mechanism="nm", score="magnitude", pictures=0)
    prune(source, out, options)
    assert prune(source, out, options)[1] is False
    other = tiny_model()
    torch.nn.init.ones_(other.denoiser.conv_in.weight)
    save(other, source)
    with pytest.raises(UserError, match="another model"):
        prune(source, out, options)


def test_learn_refuses_masks_whose_weights_are_not_on_disk(tmp_path):
    permuted = PruneOptions(mechanism="nm", score="magnitude", permute=True, pictures=0)
    prune(tiny_folder(), tmp_path / "pruned", permuted)
    with pytest.raises(UserError, match="channels reordered"):
        learn(tmp_path / "pruned", tmp_path / "out", LearnOptions(steps=2, **QUICK))


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "obs-nm", "calibration_problems": 4},
        {"mechanism": "nm", "score": "magnitude", "permute": True},
        {"mechanism": "nm", "allocation": "sensitivity", "target": "params=0.6", **SMALL},
    ],
)
def test_finetune_keeps_the_masks_of_every_mechanism(tmp_path, options):
    prune(tiny_folder(), tmp_path / "pruned", PruneOptions(pictures=0, **options))
    loop = {"steps": 2, "warmup": 1, **QUICK}
    record, _ = finetune(tmp_path / "pruned", tmp_path / "tuned", FinetuneOptions(**loop))
    before, after = load(tmp_path / "pruned").masks, load(tmp_path / "tuned").masks
    assert before.patterns == after.patterns
    for name, mask in before:
        assert torch.equal(mask, after.by_layer[name])
    assert np.isfinite(record.figures["loss"])
