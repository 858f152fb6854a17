"""evaluate to each depth: its rows, its files, what fails, and what is missing."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import TINY, Killed, drawn_figures, noise_images, problems, tiny_folder, tiny_model
from PIL import Image

from prunedm.console import comparison_tables
from prunedm.data.images import load_images
from prunedm.errors import UserError
from prunedm.evaluation.features import FeatureNetwork, load_features
from prunedm.evaluation.loss import denoising_loss, streamed_batches
from prunedm.evaluation.metric import Measurement, Metric, fixed
from prunedm.evaluation.paired import SSIM, psnr, ssim
from prunedm.evaluation.results import Evaluation, Figures, Timing
from prunedm.evaluation.speed import timings
from prunedm.evaluation.table import pareto
from prunedm.folder import load, save
from prunedm.masks import save_masks
from prunedm.options import EvaluateOptions, LearnOptions, PruneOptions, TrainOptions
from prunedm.progress import Silent
from prunedm.record import Record
from prunedm.stages import compare, evaluate, learn, prune, train
from prunedm.stages.evaluating.first_masks import under_first_masks
from prunedm.stages.evaluating.measure import Yardstick, asked, weights_in_words
from prunedm.stages.evaluating.quality import features_of, with_features
from prunedm.stages.evaluating.reload import check_reload
from prunedm.stages.evaluating.steps import Steps
from prunedm.stages.inputs import held_out_problems
from prunedm.stages.verbs.compare import read_comparison
from prunedm.stages.verbs.evaluate import read_evaluation, read_samples
from prunedm.tables import METRICS
from prunedm.task import Stream
from prunedm.task.process import process_of

QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu"}
MEASURE = {
    "problems": 10,
    "sampling_steps": 1,
    "batch_size": 4,
    "latency_batch": 2,
    "latency_batches": (1,),
    "latency_repeats": 2,
    "device": "cpu",
}
SHALLOW = EvaluateOptions(depth="quick", **MEASURE)
SAMPLED = EvaluateOptions(samples=6, skip_fid=True, **MEASURE)


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Means(torch.nn.Module):
    """Two features: the means of the upper and the lower half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 1])
        return means.mean(1).flatten(1)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> dict[str, Path]:
    """train -> prune channels -> learn from a score's masks."""
    place = tmp_path_factory.mktemp("chain")
    folders = {name: place / name for name in ("dense", "narrow", "learned")}
    train(folders["dense"], TrainOptions(unet=TINY, steps=2, warmup=1, **QUICK))
    prune(folders["dense"], folders["narrow"], PruneOptions(score="magnitude", pictures=0))
    options = LearnOptions(steps=4, lr=50.0, score="magnitude", keep="last", **QUICK)
    learn(folders["narrow"], folders["learned"], options)
    return folders


@pytest.fixture(scope="module")
def deep(chain, features, tmp_path_factory) -> Path:
    """The learned model, evaluated with its dense model and its first masks."""
    out = tmp_path_factory.mktemp("deep") / "out"
    options = EvaluateOptions(depth="compare", samples=6, features=features, **MEASURE)
    with drawn_figures():
        evaluate(chain["learned"], out, options)
    return out


def steps_of(folder: Path) -> dict[tuple[str, str], dict]:
    workflow = json.loads((folder / "workflow_results.json").read_text())
    return {(step["model"], step["step"]): step for step in workflow["steps"]}


# --------------------------------------------------------------------------------- metrics

# a metric of the user's own, as CONTRIBUTING says: this object, and a line in the table
LARGEST_WEIGHT = Metric(
    "largest_weight",
    "largest |w|",
    "largest magnitude of a weight",
    fixed(3),
    Measurement("extremes", "weights", lambda of: {"largest_weight": _largest(of.denoiser)}),
    better="higher",
)


def _largest(network: torch.nn.Module) -> float:
    return max(float(p.detach().abs().max()) for p in network.parameters())


def test_a_metric_is_an_object_and_a_line(chain, tmp_path, monkeypatch):
    old = tmp_path / "old"
    evaluate(chain["narrow"], old, SHALLOW)
    monkeypatch.setitem(METRICS.places, "largest_weight", "test_evaluate:LARGEST_WEIGHT")
    out = tmp_path / "out"
    evaluate(chain["narrow"], out, SHALLOW)
    wanted = _largest(load(chain["narrow"]).denoiser)
    stored = json.loads((out / "evaluation_results.json").read_text())
    assert stored["figures"]["largest_weight"] == wanted
    assert stored["changes"].keys() >= {"largest_weight", "loss"}
    assert ("narrow", "extremes") in steps_of(out)
    _, row = csv.DictReader((out / "comparison_table.csv").read_text().splitlines())
    assert float(row["largest_weight"]) == wanted
    for name in ("evaluation_summary.md", "comparison_report.md", "report.html"):
        text = (out / name).read_text()
        assert "largest |w|".replace("|", "\\|" * name.endswith("md") or "|") in text, name
        assert f"{wanted:.3f}" in text, name
    assert "largest magnitude of a weight" in (out / "report.html").read_text()
    # a folder from before the metric
    assert read_evaluation(old).figures.largest_weight is None
    assert read_evaluation(old).figures.loss == read_evaluation(out).figures.loss


def test_figures_that_no_metric_has_are_errors():
    with pytest.raises(AttributeError, match="sharpness"):
        _ = Figures().sharpness


# ---------------------------------------------------------------------------------- depths


def test_quick_draws_nothing_and_has_the_dense_row(chain, tmp_path):
    out = tmp_path / "out"
    record, _ = evaluate(chain["learned"], out, SHALLOW)
    dense, own = read_comparison(out)
    assert (dense.label, own.label) == ("dense", "learned")
    assert dense.hash == load(chain["dense"]).hash
    assert own == read_evaluation(out)
    assert record.figures["loss"] == own.figures.loss
    for row in (dense, own):
        assert [t.batch for t in row.figures.timings] == [2]
        assert row.figures.latency_ms == row.figures.timings[0].median_ms
        assert row.reloads is True
        assert row.figures.fd is row.figures.peak_memory_mb is None
    assert read_samples(out) is None
    assert not list((out / "samples").iterdir())


def test_full_measures_the_dense_model_alike(chain, tmp_path, features):
    out = tmp_path / "out"
    options = EvaluateOptions(samples=6, features=features, **MEASURE)
    record, _ = evaluate(chain["learned"], out, options)
    dense, own = read_comparison(out)
    assert (dense.label, own.label) == ("dense", "learned")
    assert Path(record.inputs["features file"].path) == Path(features)
    for row in (dense, own):
        assert [t.batch for t in row.figures.timings] == [2, 1]
        assert row.figures.peak_memory_mb > 4e-6 * row.figures.params
        for key in ("fd", "fd_se", "kid", "kid_se", "precision", "recall_se"):
            assert getattr(row.figures, key) is not None
        assert row.samples_file == f"samples/{row.label}.npz"
    images = read_samples(out), read_samples(out, "dense")
    assert own.figures.psnr_db == pytest.approx(np.median(psnr(*images)))
    assert own.figures.ssim == pytest.approx(np.median(ssim(*images)))
    assert own.figures.identical == 0
    assert dense.figures.psnr_db is dense.figures.identical is None
    last = (out / "evaluation_summary.md").read_text().strip().splitlines()[-1]
    assert last == f"All {len(steps_of(out))} steps done."


def test_comparison_depth_pairs_images_and_losses(deep, chain):
    rows = {row.label: row for row in read_comparison(deep)}
    assert list(rows) == ["dense", "first-masks", "learned"]
    images = {label: read_samples(deep, label) for label in rows}
    losses = {label: np.load(deep / "metrics" / f"loss-{label}.npy") for label in rows}
    paired = json.loads((deep / "metrics" / "paired.json").read_text())
    assert "windows of 7 pixels" in paired["note"]
    for label in ("first-masks", "learned"):
        figures = rows[label].figures
        by_image = psnr(images[label], images["dense"]), ssim(images[label], images["dense"])
        assert figures.psnr_db == pytest.approx(np.median(by_image[0]))
        assert figures.ssim == pytest.approx(np.median(by_image[1]))
        assert paired["models"][label]["psnr_db"] == pytest.approx(by_image[0].tolist())
        change = (losses[label] - losses["dense"]).astype(float)
        assert figures.loss_change == pytest.approx(change.mean(), rel=1e-4)
        pairs = change.reshape(-1, 2).mean(1)
        assert figures.loss_change_se == pytest.approx(pairs.std(ddof=1) / 5**0.5, rel=1e-3)
    assert rows["learned"].figures.fd is not None
    assert rows["dense"].figures.fd is not None


def test_first_and_learned_masks_are_compared_on_the_same_noise(deep, chain):
    found = json.loads((deep / "metrics" / "masks_comparison.json").read_text())
    record = load(chain["learned"]).record
    assert found["groups_changed"] == pytest.approx(record.figures["groups_changed"])
    assert 0 < found["groups_changed"] < 1
    rows = {row.label: row for row in read_comparison(deep)}
    first, learned = rows["first-masks"], rows["learned"]
    assert found["first"]["loss"] == first.figures.loss
    assert found["learned"]["fd"] == learned.figures.fd
    gap = learned.figures.loss - first.figures.loss
    assert found["loss_change"] == pytest.approx(gap, rel=1e-3)
    assert found["loss_change_se"] > 0
    pair = read_samples(deep, "learned"), read_samples(deep, "first-masks")
    assert found["ssim"] == pytest.approx(np.median(ssim(*pair)))
    with Image.open(deep / "visualizations" / "masks.png") as picture:
        assert picture.size == (6 * 9 - 1, 2 * 9 - 1)
    assert first.model == "learned, under the first masks"


def test_comprehensive_has_every_model_of_the_lineage(chain, tmp_path, monkeypatch):
    ways = []

    def fake(asked, way, *, repeats, device):
        ways.append((way.batch, way.bf16, way.compiled))
        timing = Timing(
            batch=way.batch, dtype="x", threads=1, compiled=way.compiled, median_ms=1, spread_ms=0
        )
        return [timing.model_copy() for _ in asked]

    monkeypatch.setattr("prunedm.stages.evaluating.together.timings", fake)
    out = tmp_path / "out"
    options = SAMPLED.model_copy(update={"depth": "comprehensive"})
    evaluate(chain["learned"], out, options)
    labels = [row.label for row in read_comparison(out)]
    assert labels == ["dense", "narrow", "first-masks", "learned"]
    assert ways == [(2, False, False), (1, False, False), (2, True, False), (2, False, True)]
    assert all(read_samples(out, label) is not None for label in labels)


@pytest.mark.parametrize(("fewer", "drawn"), [(3, 3), (0, 0), (50, 6), (None, 6)])
def test_models_in_the_middle_have_a_lighter_yardstick(fewer, drawn):
    options = EvaluateOptions(samples=6, middle_samples=fewer, **MEASURE)
    yard = Yardstick(options, noise_images(), load_features("digits-cnn"), Silent())
    assert yard.lighter().options.samples == drawn
    assert (yard.lighter().network is None) == (fewer is not None)


def test_models_in_the_middle_are_drawn_from_less_and_have_no_fd(chain, tmp_path, features):
    options = EvaluateOptions(samples=6, middle_samples=3, features=features, **MEASURE)
    models = {"dense": chain["dense"], "narrow": chain["narrow"], "last": chain["learned"]}
    compare(models, tmp_path / "out", options)
    dense, middle, last = read_comparison(tmp_path / "out")
    assert dense.figures.fd is not None
    assert last.figures.fd is not None
    assert middle.figures.fd is None
    assert (dense.conditions.samples, middle.conditions.samples) == (6, 3)
    drawn, whole = (read_samples(tmp_path / "out", label) for label in ("narrow", "dense"))
    assert (len(drawn), len(whole)) == (3, 6)
    assert middle.figures.psnr_db == np.median(psnr(drawn, whole[:3]))  # of the same noise


def test_skip_fid_needs_no_network(tmp_path):
    record, _ = evaluate(tiny_folder(), tmp_path / "out", SAMPLED)
    assert record.figures["fd"] is None
    assert read_samples(tmp_path / "out").shape == (6, 8, 8, 1)
    assert steps_of(tmp_path / "out")["tiny", "fd"]["status"] == "skipped"


# ----------------------------------------------------------------------------------- files


def test_the_files_hold_the_figures(deep):
    rows = read_comparison(deep)
    with (deep / "metrics" / "layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == sum(len(row.layers) for row in rows)
    own = [line for line in layers if line["model"] == "learned" and line["pattern"] == "2:4"]
    assert own
    assert all(int(line["nonzero"]) == int(line["weights"]) / 2 for line in own)
    with (deep / "metrics" / "timings.csv").open() as file:
        timings = list(csv.DictReader(file))
    assert [(t["model"], t["batch"]) for t in timings] == [
        (row.label, batch) for row in rows for batch in ("2", "1")
    ]
    assert float(timings[0]["images_per_s"]) == 2000 / float(timings[0]["median_ms"])
    stored = json.loads((deep / "detailed_results.json").read_text())[0]["figures"]["timings"][0]
    assert stored["images_per_s"] == rows[0].figures.timings[0].images_per_s
    for row in rows:
        with Image.open(deep / "samples" / f"{row.label}.png") as picture:
            assert picture.size == (6 * 9 - 1, 8)
    with Image.open(deep / "visualizations" / "side_by_side.png") as picture:
        assert picture.size == (6 * 9 - 1, 3 * 9 - 1)
    with Image.open(deep / "comparison_dashboard.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert (deep / "visualizations" / "layers.png").exists()


def test_the_workflow_says_how_each_step_ended(deep, chain):
    workflow = json.loads((deep / "workflow_results.json").read_text())
    assert workflow["checkpoint"] == "learned"  # no folder of this machine
    assert workflow["hash"] == load(chain["learned"]).hash
    assert workflow["depth"] == "compare"
    assert workflow["timestamp"].startswith("20")
    steps = steps_of(deep)
    for label in ("dense", "first-masks", "learned"):
        for name in ("reload check", "loss", "samples", "fd", "kid", "precision and recall"):
            assert steps[label, name]["status"] == "done"
    for label in ("first-masks", "learned"):
        assert steps[label, "paired"]["status"] == "done"
    for name in ("latency", "latency, batch 1", "masks comparison", "dashboard", "sheets"):
        assert steps["", name]["status"] == "done"


def test_the_summary_has_asked_and_got_and_the_conditions(deep, chain):
    text = (deep / "evaluation_summary.md").read_text()
    (wanted,) = asked(load(chain["learned"]).record)
    stats = json.loads((chain["narrow"] / "pruning_stats.json").read_text())
    assert (wanted.what, wanted.asked) == ("params", 0.3)
    assert wanted.got == stats["achieved"]["params"]
    assert f"params 0.3 → {wanted.got:.4g}" in text
    for words in (
        "10 held-out problems",
        "Samples: 6 by ddim-1 from seed 0",
        "median of 2 calls after 3 warm-up calls",
        "to the bit",
        "of 7 pixels",
        "bootstrap over the samples",
        "Peak memory: one call with a batch of 2",
    ):
        assert words in text
    assert f"| learned | 2 | float32 | {torch.get_num_threads()} | no | dense (" in text
    assert text.count("± ") > 6


# -------------------------------------------------------------------------------- failures


def test_a_failed_step_is_recorded_and_the_rest_goes_on(chain, tmp_path, features, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("bad\nluck")

    monkeypatch.setattr("prunedm.evaluation.fid.frechet_distance", broken)
    monkeypatch.setattr("prunedm.evaluation.size.count_macs", broken)
    monkeypatch.setattr("prunedm.stages.evaluating.together.timings", broken)
    out, listener = tmp_path / "out", Listener()
    options = EvaluateOptions(samples=6, features=features, **MEASURE)
    evaluate(tiny_folder(), out, options, progress=listener)
    row = read_evaluation(out)
    assert row.failed.keys() == {"macs", "fd", "latency", "latency, batch 1"}
    assert row.failed["fd"].startswith("ValueError: bad luck (test_evaluate.py:")
    assert row.figures.fd is row.figures.latency_ms is None
    assert row.figures.kid is not None
    assert row.figures.loss > 0
    steps = steps_of(out)
    assert steps["tiny", "fd"]["status"] == "failed"
    assert steps["tiny", "kid"]["status"] == "done"
    summary = (out / "evaluation_summary.md").read_text()
    last = summary.strip().splitlines()[-1]
    assert last.startswith("Failed: tiny: macs (ValueError: bad luck")
    assert "tiny: fd (" in last
    assert last.endswith(". The same command with --overwrite measures again.")
    monkeypatch.undo()
    assert evaluate(tiny_folder(), out, options)[1] is False
    assert evaluate(tiny_folder(), out, options, overwrite=True)[1] is True
    assert read_evaluation(out).failed == {}
    assert evaluate(tiny_folder(), out, options, overwrite=True)[1] is False  # nothing to mend
    assert "| failed |" in summary
    assert any(line.startswith("failed: tiny: fd (ValueError") for line in listener.said)
    json.loads((out / "workflow_results.json").read_text())


def test_a_loss_that_fails_leaves_a_readable_result(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise UserError("no such thing")

    monkeypatch.setattr("prunedm.evaluation.loss.denoising_loss", broken)
    compare({"a": tiny_folder(), "b": tiny_folder()}, tmp_path / "out", SHALLOW)
    for row in read_comparison(tmp_path / "out"):
        assert row.figures.loss is row.figures.loss_se is None
        assert row.failed == {"loss": "no such thing"}
        assert row.figures.loss_change is None
    for name in ("comparison_report.md", "report.html"):
        assert "failed" in (tmp_path / "out" / name).read_text()


def strict(text: str) -> object:
    """JSON as the standard has it, where Python would take NaN too."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_never_reach_json(tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        broken.denoiser.conv_out.bias.fill_(1e30)  # finite, and its square is not
    save(broken, tmp_path / "broken")
    options = SHALLOW.model_copy(update={"problems": 2})
    models = {"a": tiny_folder(), "b": tiny_folder(), "broken": tmp_path / "broken"}
    compare(models, tmp_path / "out", options)
    found = [strict(path.read_text()) for path in (tmp_path / "out").rglob("*.json")]
    assert len(found) >= 3
    _, same, bad = read_comparison(tmp_path / "out")
    assert (same.figures.loss_change, same.figures.loss_change_se) == (0, None)  # of one pair
    assert same.figures.loss > 0
    assert same.figures.loss_se is None
    failed = {
        name for name, step in steps_of(tmp_path / "out").items() if step["status"] == "failed"
    }
    assert failed == {("broken", "loss")}
    assert bad.figures.loss is None
    assert "the held-out loss is inf" in bad.failed["loss"]
    assert (
        "| b | +0.00000 | same to the bit | – |"
        in (tmp_path / "out" / "evaluation_summary.md").read_text()
    )


def test_one_model_that_cannot_be_timed_leaves_the_others_their_turns(chain, tmp_path, monkeypatch):
    real, called = timings, []

    def picky(asked, way, *, repeats, device):
        called.append((len(asked), way.batch, repeats))
        if way.batch == 1 and any(hasattr(network, "too_large") for network, _ in asked):
            raise torch.cuda.OutOfMemoryError("no room")
        return real(asked, way, repeats=repeats, device=device)

    models = {"a": chain["dense"], "b": chain["narrow"], "c": tiny_folder()}
    loading = load

    def marked(path, **named):
        model = loading(path, **named)
        if path == models["b"]:
            model.denoiser.too_large = True
        return model

    monkeypatch.setattr("prunedm.stages.evaluating.together.timings", picky)
    monkeypatch.setattr("prunedm.stages.inputs.load", marked)
    compare(models, tmp_path / "out", SAMPLED)
    rows = {row.label: row for row in read_comparison(tmp_path / "out")}
    assert {label: [t.batch for t in row.figures.timings] for label, row in rows.items()} == {
        "a": [2, 1], "b": [2], "c": [2, 1]
    }  # fmt: skip
    assert rows["b"].failed["latency, batch 1"].startswith("OutOfMemoryError: no room")
    assert not rows["a"].failed | rows["c"].failed
    assert called == [(3, 2, 2), (3, 1, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1), (2, 1, 2)]
    steps = steps_of(tmp_path / "out")
    assert steps["b", "latency, batch 1"]["status"] == "failed"
    assert steps["", "latency, batch 1"]["status"] == "done"


@pytest.mark.parametrize("stop", [Killed, KeyboardInterrupt])
def test_an_interruption_is_no_failure(stop):
    def interrupted():
        raise stop

    steps = Steps("a")
    with pytest.raises(stop):
        steps.take("step", interrupted)
    assert steps.failed == {}


def test_the_steps_keep_what_work_gives():
    steps = Steps("a")
    assert steps.take("one", lambda: 1) == 1
    assert steps.take("two", lambda: 1 / 0) is None
    steps.skip("three", "not asked for")
    assert [(s.step, s.status) for s in steps.taken] == [
        ("one", "done"), ("two", "failed"), ("three", "skipped")
    ]  # fmt: skip
    assert list(steps.failed) == ["two"]
    assert steps.failures[0].startswith("a: two (ZeroDivisionError: division by zero")


def test_a_sheet_that_fails_is_recorded(tmp_path, monkeypatch):
    def broken(*arguments):
        raise UserError("no colours for it")

    monkeypatch.setattr("prunedm.stages.evaluating.files.grid", broken)
    evaluate(tiny_folder(), tmp_path / "out", SAMPLED)
    assert steps_of(tmp_path / "out")["", "sheets"]["error"] == "no colours for it"
    assert read_samples(tmp_path / "out").shape == (6, 8, 8, 1)


def test_pairs_that_fail_name_their_model(tmp_path, monkeypatch):
    def broken(*arguments):
        raise UserError("no pairs")

    monkeypatch.setattr("prunedm.evaluation.paired.SSIM", replace(SSIM, each=broken))
    compare({"a": tiny_folder(), "b": tiny_folder()}, tmp_path / "out", SAMPLED)
    first, second = read_comparison(tmp_path / "out")
    assert (first.failed, second.failed) == ({}, {"paired": "no pairs"})
    assert steps_of(tmp_path / "out")["b", "paired"]["status"] == "failed"


def test_one_image_has_no_standard_error(chain, tmp_path):
    options = SAMPLED.model_copy(update={"samples": 1})
    compare({"a": chain["dense"], "b": chain["narrow"]}, tmp_path / "out", options)
    figures = read_comparison(tmp_path / "out")[1].figures
    assert figures.ssim is not None
    assert figures.psnr_se is figures.ssim_se is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": "digits-cnn"}, r"digits-cnn takes images of shape \(1, 16, 16\)"),
        ({"skip_fid": True, "sampling_steps": 2000}, "2000 sampling steps"),
    ],
)
def test_what_cannot_be_measured_fails_before_any_work(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        evaluate(tiny_folder(), tmp_path / "out", EvaluateOptions(**(MEASURE | wrong)))
    assert not list(tmp_path.iterdir())


def test_models_of_other_images_are_refused(tmp_path):
    models = {"a": tiny_folder(), "b": tiny_folder(sample_size=16)}
    with pytest.raises(
        UserError, match=r"b and a have other image shapes \(\(1, 16, 16\), \(1, 8, 8\)\)"
    ):
        compare(models, tmp_path / "out", SHALLOW)


def test_features_of_another_content_are_measured_again(tmp_path):
    class Half(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 1])
            return means.mean(1).flatten(1) / 2

    path, out = tmp_path / "net.pt", tmp_path / "out"
    torch.jit.script(Means()).save(str(path))
    options = EvaluateOptions(samples=6, features=str(path), **MEASURE)
    whole = evaluate(tiny_folder(), out, options)[0].figures["fd"]
    assert evaluate(tiny_folder(), out, options)[1] is False
    torch.jit.script(Half()).save(str(path))
    with pytest.raises(UserError, match=r"another features file \(its content has changed\)"):
        evaluate(tiny_folder(), out, options)
    record, made = evaluate(tiny_folder(), out, options, overwrite=True)
    assert made
    assert record.figures["fd"] == pytest.approx(whole / 4)


def test_the_records_say_what_was_left_open(chain, tmp_path, features):
    options = EvaluateOptions(skip_fid=True, **MEASURE)
    one, _ = evaluate(tiny_folder(), tmp_path / "one", options)
    several, _ = compare({"tiny": tiny_folder()}, tmp_path / "several", options)
    assert one.options["samples"] == several.options["samples"] == 64
    found, *_ = with_features(
        EvaluateOptions(), load_images("digits", split="test", size=16, channels=1)
    )
    assert (found.features, found.samples) == ("digits-cnn", 300)


def test_the_loss_does_not_depend_on_the_batch(tmp_path, monkeypatch):
    found = []
    for number, update in enumerate(({"batch_size": 10}, {"batch_size": 3}, {"batch_size": 7})):
        if number == 2:
            monkeypatch.setattr("prunedm.evaluation.loss.MOST_VALUES", 8 * 8 * 2 + 5)
        evaluate(tiny_folder(), tmp_path / str(number), SHALLOW.model_copy(update=update))
        found.append(np.load(tmp_path / str(number) / "metrics" / "loss-tiny.npy"))
    model = load(tiny_folder())
    expected = denoising_loss(model.denoiser, held_out_problems(model, SHALLOW, 10)).per_problem_N
    for losses in found:
        assert losses == pytest.approx(expected.numpy(), rel=1e-5)
    stream = streamed_batches(problems(), 5, 100)
    assert isinstance(stream, Stream)  # which keeps no batch
    assert [batch.numbers for batch in stream] == [(0, 1), (2, 3), (4,)]


def test_figures_stand_beside_the_dense_ones(chain, tmp_path):
    evaluate(chain["learned"], tmp_path / "out", SHALLOW)
    stored = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    dense, own = (row.figures for row in read_comparison(tmp_path / "out"))
    model = load(chain["learned"])
    zeros = sum(int((p == 0).sum()) for p in model.denoiser.parameters())
    assert stored["figures"]["sparsity"] == pytest.approx(zeros / own.params)
    assert stored["figures"]["compression"] == dense.bytes_packed / own.bytes_packed > 1
    assert dense.compression is None
    assert stored["dense"]["loss"] == dense.loss
    for key in ("loss", "params", "nonzero", "macs", "bytes_disk", "bytes_packed", "latency_ms"):
        value, base = getattr(own, key), getattr(dense, key)
        assert stored["changes"][key]["absolute"] == pytest.approx(value - base)
        assert stored["changes"][key]["relative"] == pytest.approx(value / base - 1)
    assert "fd" not in stored["changes"]


def test_models_of_another_kind_are_warned_about(tmp_path):
    save(tiny_model(), tmp_path / "noise")
    other = tiny_model()
    other.scheduler = DDPMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
    )
    save(other, tmp_path / "velocity")
    compare({n: tmp_path / n for n in ("noise", "velocity")}, tmp_path / "out", SAMPLED)
    noise, velocity = read_comparison(tmp_path / "out")
    c = noise.conditions
    assert (c.prediction, c.schedule) == ("epsilon", "linear 0.0001 to 0.02, 1000 steps")
    assert (c.spacing, c.threads, c.weights) == ("trailing", torch.get_num_threads(), "")
    assert velocity.figures.loss_change is None
    assert "loss" not in velocity.changes
    summary = (tmp_path / "out" / "evaluation_summary.md").read_text()
    assert "velocity: prediction is v_prediction, not epsilon as for noise" in summary
    assert "velocity: schedule is squaredcos_cap_v2, 1000 steps, not linear" in summary


def test_weights_are_called_averaged_where_training_averaged_them():
    train = Record(stage="train", options={"ema_decay": 0.9999})
    masks = Record(stage="learn", options={"ema_decay": 0.5, "train_weights": False})
    both = Record(stage="learn", options={"ema_decay": 0.0, "train_weights": True})
    prune = Record(stage="prune", options={})
    assert weights_in_words(None) == weights_in_words(prune) == ""
    for history, last, words in (
        ([], train, "EMA 0.9999"),
        ([train], prune, "EMA 0.9999"),
        ([train, prune], masks, "EMA 0.9999"),
        ([train, masks], both, "not averaged"),
    ):
        assert weights_in_words(last.model_copy(update={"history": history})) == words


def test_schedules_of_other_betas_have_other_words():
    words = {
        process_of(DDPMScheduler(**options)).schedule_in_words()
        for options in (
            {},
            {"beta_end": 0.01},
            {"num_train_timesteps": 500},
            {"beta_schedule": "scaled_linear"},
            {"rescale_betas_zero_snr": True},
            {"trained_betas": [0.1] * 1000},
            {"trained_betas": [0.2] * 1000},
        )
    }
    assert len(words) == 7


def test_features_of_a_file_are_not_those_of_its_namesake(tmp_path):
    class Twice(Means):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 1])
            return 2 * means.mean(1).flatten(1)

    drawn, images = np.zeros((4, 8, 8, 1), np.uint8), noise_images()
    real = []
    for name, module in (("one", Means()), ("two", Twice())):
        (tmp_path / name).mkdir()
        torch.jit.script(module).save(str(tmp_path / name / "net.pt"))
        network = load_features(tmp_path / name / "net.pt")
        real.append(features_of(drawn, images, network, torch.device("cpu"), most=5)[1])
    assert torch.equal(2 * real[0], real[1])


def test_references_are_the_first_images_and_no_more_than_asked_for():
    drawn, images = np.zeros((4, 8, 8, 1), np.uint8), noise_images()
    network = FeatureNetwork("means", 2, Means())
    few, all_of_them = (
        features_of(drawn, images, network, torch.device("cpu"), most=most)[1]
        for most in (3, 10_000)
    )
    assert len(all_of_them) == len(images) > 3
    assert torch.equal(few, all_of_them[:3])


# ---------------------------------------------------------------------------- missing things


def test_without_the_dense_model_nothing_is_measured_against_another(chain, tmp_path):
    out, aside = tmp_path / "out", chain["dense"].with_name("aside")
    chain["dense"].rename(aside)
    try:
        evaluate(chain["learned"], out, SAMPLED.model_copy(update={"depth": "compare"}))
    finally:
        aside.rename(chain["dense"])
    rows = read_comparison(out)
    assert [row.label for row in rows] == ["first-masks", "learned"]
    for row in rows:
        assert row.figures.psnr_db is row.figures.ssim is row.figures.loss_change is None
    assert not (out / "metrics" / "paired.json").exists()
    assert json.loads((out / "metrics" / "masks_comparison.json").read_text())["ssim"] is not None
    assert "Against the dense model" not in (out / "evaluation_summary.md").read_text()


def test_without_its_dense_parent_a_model_stands_alone_and_says_so(tmp_path):
    dense, masked, out = tmp_path / "dense", tmp_path / "masked", tmp_path / "out"
    save(tiny_model(), dense)
    prune(dense, masked, PruneOptions(mechanism="nm", score="magnitude", pictures=0))
    dense.rename(tmp_path / "moved")
    listener = Listener()
    evaluate(masked, out, SHALLOW, progress=listener)
    (row,) = read_comparison(out)
    assert (row.label, row.figures.nm_valid) == ("masked", 1.0)
    step = steps_of(out)["", "dense model"]
    assert step["status"] == "failed"
    assert str(dense) in step["error"]
    assert any(str(dense) in line for line in listener.said)
    assert str(dense) in (out / "evaluation_summary.md").read_text().splitlines()[-1]


def test_a_model_without_a_record_has_no_dense_row(tmp_path):
    evaluate(tiny_folder(), tmp_path / "out", SHALLOW)
    (row,) = read_comparison(tmp_path / "out")
    assert row.label == "tiny"
    step = steps_of(tmp_path / "out")["", "dense model"]
    assert (step["status"], "no record" in step["error"]) == ("skipped", True)


@pytest.mark.parametrize("label", ["a/b", "..", ""])
def test_labels_are_names_of_files(tmp_path, label):
    with pytest.raises(UserError, match="is not a file name"):
        compare({label: tiny_folder()}, tmp_path / "out", SHALLOW)


def test_a_label_that_the_dense_row_has_is_not_taken_twice(chain, tmp_path):
    options = PruneOptions(score="magnitude", pictures=0, problems=0)
    prune(chain["dense"], tmp_path / "dense", options)
    evaluate(tmp_path / "dense", tmp_path / "out", SHALLOW)
    assert [row.label for row in read_comparison(tmp_path / "out")] == ["dense-2", "dense"]


# ------------------------------------------------------------------------------- first masks


def test_the_first_masks_of_a_score_are_made_again(chain):
    learned = load(chain["learned"])
    first = under_first_masks(learned, device="cpu", progress=Silent())
    assert first.masks.violations(first.denoiser) == {}
    narrow = load(chain["narrow"]).denoiser
    for name, mask in first.masks:
        weight = narrow.get_parameter(f"{name}.weight")
        assert torch.equal(first.denoiser.get_parameter(f"{name}.weight"), weight * mask)
        groups = weight.abs() if weight.ndim == 2 else weight.abs().permute(0, 2, 3, 1)
        kept = groups.reshape(-1, 4).topk(2, dim=1).values.sum()
        assert (weight.abs() * mask).sum().item() == pytest.approx(kept.item(), rel=1e-5)
    assert learned.record.figures["loss_first_masks"] > 0


@pytest.mark.parametrize("given", ["model", "file"])
def test_the_first_masks_that_were_given_are_found(chain, tmp_path, given):
    masked, out, path = tmp_path / "masked", tmp_path / "out", tmp_path / "m.safetensors"
    by = PruneOptions(mechanism="nm", score="random", pattern="1:4", pictures=0)
    prune(chain["narrow"], masked, by)
    masks = load(masked).masks
    options = {"steps": 2, "lr": 50.0, "keep": "last"} | QUICK
    if given == "file":
        save_masks(masks, path)
        learn(chain["narrow"], out, LearnOptions(masks=str(path), **options))
    else:
        learn(masked, out, LearnOptions(**options))
    first = under_first_masks(load(out), device="cpu", progress=Silent())
    assert first.masks.patterns == masks.patterns
    assert all(torch.equal(mask, masks.by_layer[name]) for name, mask in first.masks)
    before = load(masked).denoiser
    for name, value in first.denoiser.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])
    if given == "file":
        save_masks(load(out).masks, path)
        with pytest.raises(UserError, match="has changed since"):
            under_first_masks(load(out), device="cpu", progress=Silent())


# ------------------------------------------------------------------------------ reload check


@pytest.mark.parametrize("name", ["dense", "narrow", "learned"])
def test_every_kind_of_folder_reloads_to_the_bit(chain, name):
    assert check_reload(load(chain[name]))


def test_a_model_that_is_not_the_folders_is_found_out(tmp_path):
    save(tiny_model(), tmp_path / "model")
    model = load(tmp_path / "model")
    with torch.no_grad():
        model.denoiser.conv_out.bias += 1e-3
    with pytest.raises(UserError, match="gives another output"):
        check_reload(model)


def test_a_reload_that_cannot_be_checked_is_not_one_that_differs(tmp_path, monkeypatch):
    def broken(*arguments):
        raise MemoryError("too large")

    monkeypatch.setattr("prunedm.stages.evaluating.reload._load_again", broken)
    evaluate(tiny_folder(), tmp_path / "out", SHALLOW)
    row = read_evaluation(tmp_path / "out")
    assert row.reloads is None
    assert row.failed["reload check"].startswith("MemoryError")


def test_plain_models_are_loaded_without_our_code(monkeypatch):
    model = load(tiny_folder())
    monkeypatch.setattr("prunedm.stages.evaluating.reload.load", None)
    assert check_reload(model)


# ---------------------------------------------------------------------------------- pictures


def test_pareto_is_what_no_other_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (2.0, 6.0), (2.0, 3.0)]
    beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
    assert pareto(points) == [0, 1, 3]
    assert [k for k, b in enumerate(beaten) if not b] == [0, 1, 3, 5]  # 5 is 1 once more


def test_an_evaluation_survives_its_json():
    row = Evaluation.model_validate(
        {
            "label": "a", "model": "m", "hash": "h",
            "figures": {
                "loss": float("nan"), "loss_se": 0.0, "params": 1, "nonzero": 1, "macs": 0,
                "bytes_disk": 1, "bytes_packed": 1,
            },
            "conditions": {
                "dataset": "d", "problems": 1, "samples": 0, "sampler": "s", "seed": 0,
                "features": "FD", "reference": 0, "device": "c", "dtype": "x", "latency_batch": 1,
            },
        }
    )  # fmt: skip
    again = Evaluation.model_validate_json(json.dumps(row.model_dump(mode="json")))
    assert row.figures.loss is again.figures.loss is None


def test_a_report_that_failed_is_not_pointed_at(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise UserError("no ink")

    evaluate(tiny_folder(), tmp_path / "good", SHALLOW)
    monkeypatch.setattr("prunedm.stages.evaluating.files.write_report", broken)
    evaluate(tiny_folder(), tmp_path / "bad", SHALLOW)
    comparison_tables(tmp_path / "good")
    assert "report: " in capsys.readouterr().out
    comparison_tables(tmp_path / "bad")
    said = capsys.readouterr()
    assert "Failed: report (no ink)" in " ".join(said.out.split())
    assert "report: " not in said.out
