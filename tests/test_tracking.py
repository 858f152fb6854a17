"""Trackers: what they are told, by stand-ins and in the real stores of every service."""

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import Killed, tiny_model
from PIL import Image

from prunedm.errors import UserError
from prunedm.folder import load, save
from prunedm.options import FinetuneOptions, LearnOptions, LoopOptions, PruneOptions, TrainOptions
from prunedm.progress import Silent
from prunedm.stages import finetune, learn, prune, shown, train
from prunedm.tables import TRACKERS
from prunedm.training import loop, services
from prunedm.training.trackers import wandb
from prunedm.training.tracking import Shown, Tracking, distribution

QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu", "warmup": 1}
SERVICES = tuple(name for name in TRACKERS if name != "none")
WIDTH = 8 * 66 + 2  # of a row of 8 images, enlarged to 64 pixels


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tracking")
    save(tiny_model(), place / "dense")
    return place / "dense"


@pytest.fixture(scope="module")
def sparse(dense) -> Path:
    prune(dense, dense.parent / "2-4", PruneOptions(mechanism="nm", score="magnitude", pictures=0))
    return dense.parent / "2-4"


@pytest.fixture(autouse=True)
def _nothing_at_home(monkeypatch, tmp_path_factory):
    """No account of whoever runs the tests, and no files of theirs."""
    home = tmp_path_factory.mktemp("home")
    for name in [n for n in os.environ if n.startswith(("WANDB_", "SWANLAB_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(shown, "STEPS", 2)
    if "trackio" not in sys.modules:  # which reads its place once
        monkeypatch.setenv("TRACKIO_DIR", str(home / "trackio"))


def interrupted(stage, options, *, at: int, progress=None) -> None:
    """`stage(options)` killed in step `at`, then run again to its end."""
    step = loop._step

    def killed(*arguments, **named):
        if named["step"] == at:
            raise Killed
        return step(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", killed)
        with pytest.raises(Killed):
            stage(options, progress=progress)
    stage(options, progress=progress)


# -------------------------------------------------------------------------------- by stand-ins


class Fake:
    """A tracker as accelerate has them."""

    made: ClassVar[list["Fake"]] = []
    failing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, project: str, **settings) -> None:
        self.project, self.settings, self.logs, self.calls = project, settings, [], []
        self.images = []

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing or (name == "start" and self.settings.get("mode") in self.failing):
            raise ConnectionError("no route to host\nand more")

    def start(self) -> None:
        self._do("start")
        if "online" in self.failing and "mode" not in self.settings:
            raise ConnectionError("no route to host")
        Fake.made.append(self)

    def store_init_configuration(self, values: dict) -> None:
        self.config = values
        self._do("begin")

    def log(self, values: dict, step: int) -> None:
        self.logs.append((step, values))
        self._do("log")

    def log_images(self, values: dict, step: int) -> None:
        self.images.append((step, values))
        self._do("images")

    def finish(self) -> None:
        self._do("finish")


@pytest.fixture
def fake(monkeypatch):
    from accelerate import tracking as accelerates

    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "failing", ())
    monkeypatch.setattr(services, "find_spec", lambda _: True)
    monkeypatch.setattr(wandb, "_limits", dict)
    monkeypatch.setattr(accelerates, "LOGGER_TYPE_TO_CLASS", dict.fromkeys(SERVICES, Fake))
    return Fake


def test_a_tracker_sees_losses_rate_sparsity_compliance_and_images(sparse, fake, tmp_path):
    options = FinetuneOptions(
        steps=12, validate_every=6, tracker="wandb", tracker_project="mine", **QUICK
    )
    record, _ = finetune(sparse, tmp_path / "out", options)
    (run,) = fake.made
    assert (run.project, run.settings["name"], run.settings["resume"]) == ("mine", "out", "allow")
    assert run.config["lr"] == options.lr
    assert [(step, sorted(values)) for step, values in run.logs] == [
        (6, ["compliance", "held_out_loss", "sparsity"]),
        (10, ["loss", "lr"]),
        (12, ["loss", "lr"]),
        (12, ["compliance", "held_out_loss", "sparsity"]),
    ]
    curve = record.figures["curve"]
    assert run.logs[1][1]["loss"] == pytest.approx(sum(curve["losses"][:10]) / 10)
    assert run.logs[1][1]["lr"] == pytest.approx(options.lr * loop.learning_rate_share(options, 9))
    assert run.logs[3][1]["held_out_loss"] == curve["held_out"][-1][1]
    assert run.logs[3][1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert run.logs[3][1]["compliance"] == 1
    assert [(step, values["samples"][0].shape) for step, values in run.images] == [
        (6, (68, WIDTH, 3)),
        (12, (68, WIDTH, 3)),
    ]
    assert run.calls[-1] == "finish"


def test_groups_that_are_not_2_4_lower_the_compliance(sparse):
    from prunedm.stages.verbs.finetune import observed

    model = load(sparse)
    name, _ = next(iter(model.masks))
    groups = model.masks.total / 4
    with torch.no_grad():
        model.denoiser.get_parameter(f"{name}.weight")[0, :4].fill_(1)
    changed = model.denoiser.get_parameter(f"{name}.weight")[0, :4].numel() / 4
    found = observed(model.denoiser, model.masks)
    assert found["compliance"] == pytest.approx(1 - changed / groups)
    assert found["sparsity"] == pytest.approx(0.5 - 2 * changed / (4 * groups))


@pytest.mark.parametrize("trains", [False, True])
def test_learning_shows_entropy_logits_and_both_learning_rates(trains, dense, fake, tmp_path):
    options = LearnOptions(
        steps=4, validate_every=2, dataset_size=8, train_weights=trains, tracker="swanlab",
        track_images=2, **QUICK,
    )  # fmt: skip
    record, _ = learn(dense, tmp_path / "out", options)
    (run,) = fake.made
    seen = {name for _, values in run.logs for name in values}
    quantiles = {f"logits_q{percent}" for percent in ("05", "25", "50", "75", "95")}
    figures = {"sparsity", "compliance", "entropy", "groups_changed", "held_out_loss", "loss", "lr"}
    assert seen - {"logits"} == quantiles | figures | ({"lr_weights"} if trains else set())
    last = {name: values[name] for _, values in run.logs for name in values}
    assert last["sparsity"] == 0.5
    assert last["compliance"] == 1
    assert 0 < last["entropy"] < np.log(6)
    logits = load_logits(tmp_path / "out")
    if record.figures["loss"] == record.figures["curve"]["held_out"][-1][1]:  # the last is kept
        assert last["logits_q50"] == pytest.approx(np.quantile(logits, 0.5), abs=1e-3)
    assert [step for step, _ in run.images] == [0, 2, 4]


def load_logits(folder: Path) -> np.ndarray:
    from safetensors.torch import load_file

    by_layer = load_file(folder / "learned" / "logits.safetensors")
    return np.concatenate([values.flatten().numpy() for values in by_layer.values()])


def test_train_is_tracked_too(fake, tmp_path):
    unet = dict(tiny_model().denoiser.config)
    unet = {k: unet[k] for k in ("sample_size", "in_channels", "out_channels", "norm_num_groups")}
    narrow = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",)}
    options = TrainOptions(
        unet=unet | narrow | {"up_block_types": ("UpBlock2D",), "layers_per_block": 1},
        steps=2, tracker="tensorboard", track_images=3, **QUICK,
    )  # fmt: skip
    train(tmp_path / "out", options)
    (run,) = fake.made
    assert run.settings["logging_dir"] == tmp_path / "out.partial" / "tensorboard"
    assert [step for step, _ in run.logs] == [2, 2]
    ((step, images),) = run.images
    assert (step, images["samples"].shape) == (2, (1, 3, 68, 3 * 66 + 2))


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_resumed_run_goes_on_in_the_trackers_run(name, dense, fake, tmp_path):
    options = FinetuneOptions(
        steps=4, checkpoint_every=2, tracker=name, track_images=0, teacher="none", **QUICK
    )
    interrupted(lambda o, progress: finetune(dense, tmp_path / "out", o), options, at=3)
    before, after = fake.made
    assert before.settings == after.settings
    assert before.settings["resume"] == "allow"
    assert "begin" in before.calls
    assert "begin" not in after.calls
    assert before.calls[-1] == "finish"
    finetune(dense, tmp_path / "other" / "out", options)
    assert fake.made[-1].settings != before.settings


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (("wandb", "online"), "wandb: offline (no route to host)"),
        (("swanlab", "start"), "swanlab: no route to host; training continues untracked"),
        (("trackio", "start"), "trackio: no route to host; training continues untracked"),
        (("wandb", "log"), "wandb failed (no route to host): no longer tracked"),
        (("wandb", "images"), "wandb failed (no route to host): no longer tracked"),
        (("wandb", "begin"), "wandb failed (no route to host): no longer tracked"),
        (("wandb", "finish"), "wandb failed (no route to host): no longer tracked"),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_training_goes_on(case, said, dense, fake, tmp_path):
    name, failing = case
    fake.failing = (failing,)
    listener = Listener()
    options = FinetuneOptions(steps=2, tracker=name, track_images=1, teacher="none", **QUICK)
    finetune(dense, tmp_path / "out", options, progress=listener)
    assert listener.said == [said]
    assert load(tmp_path / "out").record.stage == "finetune"
    if failing == "online":
        (run,) = fake.made
        assert run.settings["mode"] == "offline"
        assert [step for step, _ in run.logs] == [2, 2]


@pytest.mark.parametrize("name", SERVICES)
def test_a_tracker_that_is_not_installed_is_named(name, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(services, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"tracker = '{name}' is not installed: pip install {name}"):
        finetune(dense, tmp_path / "out", FinetuneOptions(steps=1, tracker=name, **QUICK))
    assert not list(tmp_path.iterdir())


def test_the_dashboard_and_accelerate_are_named_where_they_are_missing(fake, monkeypatch):
    local = LoopOptions(tracker="swanlab", tracker_mode="local")
    monkeypatch.setattr(services, "find_spec", lambda name: name == "swanlab" or None)
    with pytest.raises(UserError, match=r"pip install 'swanlab\[dashboard\]'"):
        TRACKERS["swanlab"].check_usable(local)
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {})
    with pytest.raises(UserError, match="'swanlab' needs a newer accelerate"):
        TRACKERS["swanlab"].check_usable(LoopOptions(tracker="swanlab"))


@pytest.mark.parametrize(
    ("name", "mode", "wanted"),
    [
        ("wandb", "auto", None), ("wandb", "offline", "offline"), ("wandb", "local", "offline"),
        ("swanlab", "auto", None), ("swanlab", "offline", "offline"), ("swanlab", "local", "local"),
        ("trackio", "offline", None), ("tensorboard", "local", None),
    ],
)  # fmt: skip
def test_the_mode_is_the_services_own(name, mode, wanted, tmp_path):
    options = LoopOptions(tracker=name, tracker_mode=mode)
    settings = TRACKERS[name].settings(options, folder=tmp_path, run="abc", done=0)
    assert settings.get("mode") == wanted


def test_nothing_is_made_without_a_tracker(dense, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("drawn")

    monkeypatch.setattr(shown, "draw_images", never)
    monkeypatch.setattr("prunedm.learning.trainer.distribution", never)
    listener = Listener()
    learn(
        dense, tmp_path / "out", LearnOptions(steps=1, dataset_size=4, **QUICK), progress=listener
    )
    assert listener.said == []


def test_images_that_cannot_be_drawn_end_pictures_but_not_curves(dense, fake, tmp_path):
    options = FinetuneOptions(steps=4, validate_every=2, tracker="wandb", teacher="none", **QUICK)
    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "STEPS", 0)
        finetune(dense, tmp_path / "out", options, progress=listener)
    (line,) = listener.said
    assert line.startswith("wandb: no more pictures (")
    (run,) = fake.made
    assert [step for step, _ in run.logs] == [2, 4, 4]
    assert run.images == []


def test_options_of_trackers_do_not_change_what_a_result_is():
    one = FinetuneOptions(tracker="wandb", tracker_mode="offline", track_images=3)
    assert one.identity() == FinetuneOptions().identity()


@pytest.mark.parametrize("count", [1, 19, 1000])
def test_quantiles_and_histogram_of_a_distribution(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    found = distribution("x", values)
    for percent in (5, 25, 50, 75, 95):
        wanted = np.quantile(values.numpy(), percent / 100, method="inverted_cdf")
        assert found.figures[f"x_q{percent:02d}"] == pytest.approx(wanted)
    histogram = found.histograms["x"]
    counts, _ = np.histogram(values.numpy(), histogram.edges)
    assert histogram.counts.sum() == count
    assert np.abs(histogram.counts - counts).sum() <= 2  # float32 edges
    assert histogram.edges[0] <= values.min() <= values.max() <= histogram.edges[-1]


def test_the_picture_shows_every_pixel_enlarged():
    images = torch.arange(9 * 4, dtype=torch.uint8).reshape(9, 1, 2, 2)
    found = shown.picture(images)
    assert found.shape == (2 * 66 + 2, WIDTH, 3)
    assert (found[2:34, 2:34] == 0).all()  # the first pixel of the first image, 32 times as large
    assert (found[34:66, 34:66] == 3).all()
    assert (found[68 + 32 : 68 + 64, 2:34] == 34).all()  # the ninth begins a new row
    assert (found[:2] == 255).all()


def test_a_silent_tracking_makes_nothing():
    made = []
    Tracking(services.Service(), None, Silent()).show(lambda: made.append(1) or Shown(), 3)
    assert made == []


# -------------------------------------------------------------------------------- TensorBoard


def events(folder: Path):
    """All that TensorBoard finds in the run's event files."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    return found.Reload()


@pytest.fixture(scope="module")
def continued(sparse, tmp_path_factory) -> Path:
    """Fine-tuned with TensorBoard, killed at step 9 and resumed from step 4."""
    pytest.importorskip("tensorboard")
    out = tmp_path_factory.mktemp("continued") / "out"
    options = FinetuneOptions(
        steps=12, validate_every=2, checkpoint_every=4, tracker="tensorboard", track_images=2,
        dropout=0.1, **QUICK,
    )  # fmt: skip
    interrupted(lambda o, progress: finetune(sparse, out, o), options, at=7)
    return out


def test_event_files_of_a_resumed_run_hold_every_step_once(continued):
    curve = load(continued).record.figures["curve"]
    found = events(continued / "tensorboard" / "prunedm")
    assert len(list((continued / "tensorboard" / "prunedm").glob("events.*"))) == 2
    held_out = [(event.step, event.value) for event in found.Scalars("held_out_loss")]
    assert held_out == [(step, pytest.approx(loss)) for step, loss in curve["held_out"]]
    assert [event.step for event in found.Scalars("loss")] == [4, 8, 12]
    assert found.Scalars("loss")[0].value == pytest.approx(sum(curve["losses"][:4]) / 4)
    assert {event.value for event in found.Scalars("compliance")} == {1.0}
    images = found.Images("samples")
    assert [(event.step, event.width, event.height) for event in images] == [
        (step, 2 * 66 + 2, 68) for step in range(2, 13, 2)
    ]
    assert len({event.encoded_image_string for event in images}) == 6


def test_a_run_that_begins_again_hides_what_it_wrote_before(dense, tmp_path):
    """The first masks are kept at once, long before the first checkpoint."""
    pytest.importorskip("tensorboard")
    options = LearnOptions(
        steps=4, validate_every=2, checkpoint_every=0, dataset_size=8, tracker="tensorboard",
        track_images=0, **QUICK,
    )  # fmt: skip
    interrupted(lambda o, progress: learn(dense, tmp_path / "out", o), options, at=3)
    found = events(tmp_path / "out" / "tensorboard" / "prunedm")
    assert len(list((tmp_path / "out" / "tensorboard" / "prunedm").glob("events.*"))) == 2
    for name in ("held_out_loss", "entropy", "logits_q05"):
        assert [event.step for event in found.Scalars(name)] == [0, 2, 4]


def test_tracking_does_not_change_a_bit(continued, sparse, tmp_path):
    options = FinetuneOptions(steps=12, validate_every=2, dropout=0.1, **QUICK)
    finetune(sparse, tmp_path / "out", options)
    tracked, plain = load(continued), load(tmp_path / "out")
    assert tracked.hash == plain.hash
    assert tracked.record.figures == plain.record.figures
    assert tracked.record.identity == plain.record.identity


@pytest.mark.parametrize("estimator", ["relaxed", "policy-gradient"])
def test_tracking_does_not_change_a_learned_mask(estimator, dense, tmp_path):
    pytest.importorskip("tensorboard")
    options = {"steps": 4, "validate_every": 2, "dataset_size": 8, "estimator": estimator} | QUICK
    options["samples"] = 4
    for name in ("none", "tensorboard"):
        learn(dense, tmp_path / name, LearnOptions(tracker=name, track_images=2, **options))
    tracked, plain = load(tmp_path / "tensorboard"), load(tmp_path / "none")
    assert tracked.hash == plain.hash
    assert tracked.record.figures == plain.record.figures
    found = events(tmp_path / "tensorboard" / "tensorboard" / "prunedm")
    histograms = [event.histogram_value for event in found.Histograms("logits")]
    total = sum(mask.numel() for _, mask in tracked.masks)
    assert [h.num for h in histograms] == [total] * 3
    assert [sum(h.bucket) for h in histograms] == [total] * 3
    assert histograms[0].max < found.Histograms("logits")[-1].histogram_value.max


# -------------------------------------------------------------------------------- Trackio


def test_trackio_keeps_one_run_with_its_images(sparse, tmp_path, capsys):
    pytest.importorskip("trackio")
    from trackio.utils import TRACKIO_DIR

    options = FinetuneOptions(
        steps=4, validate_every=2, checkpoint_every=2, tracker="trackio", track_images=2,
        tracker_project=f"p{tmp_path.parent.name}", **QUICK,
    )  # fmt: skip
    listener = Listener()
    interrupted(
        lambda o, progress: finetune(sparse, tmp_path / "out", o, progress=progress),
        options, at=3, progress=listener,
    )  # fmt: skip
    assert listener.said == []
    with sqlite3.connect(next(TRACKIO_DIR.glob(f"{options.tracker_project}*.db"))) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert rows[0][0].startswith("out-")
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    curve = load(tmp_path / "out").record.figures["curve"]
    held_out = [(step, v["held_out_loss"]) for step, v in logged if "held_out_loss" in v]
    assert held_out == [(step, pytest.approx(loss)) for step, loss in curve["held_out"]]
    images = [values["samples"] for _, values in logged if "samples" in values]
    assert len(images) == 2
    picture = next(TRACKIO_DIR.rglob(Path(images[0]["file_path"]).name))
    assert Image.open(picture).size == (2 * 66 + 2, 68)


# -------------------------------------------------------------------------------- SwanLab


def swanlab_records(run: Path) -> list:
    """All records of one local SwanLab run."""
    stores = pytest.importorskip("swanlab.sdk.internal.core_python.store")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    reader = stores.DataStoreReader()
    (file,) = run.glob("*.swanlab")
    reader.open(file)
    found = []
    for data in reader:
        found.append(Record())
        found[-1].ParseFromString(data)
    reader.close()
    return found


def test_swanlab_without_an_account_asks_nobody_and_keeps_one_run(sparse, tmp_path, monkeypatch):
    """Even at a terminal, which stdin is here."""
    pytest.importorskip("swanlab")
    leader, terminal = os.openpty()
    listener, asked_for = Listener(), []
    monkeypatch.setattr("builtins.input", lambda text="": asked_for.append(text) or "3")
    options = FinetuneOptions(
        steps=4, validate_every=2, checkpoint_every=2, tracker="swanlab", track_images=2, **QUICK
    )
    with open(terminal, encoding="utf-8") as asked:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", asked)
        interrupted(
            lambda o, progress: finetune(sparse, tmp_path / "out", o, progress=progress),
            options, at=3, progress=listener,
        )  # fmt: skip
        assert sys.stdin is asked
    assert asked_for == []
    os.close(leader)
    assert len(listener.said) == 2
    assert all(line.startswith("swanlab: offline (") for line in listener.said)
    runs = sorted((tmp_path / "out" / "swanlab").glob("run-*"))
    records = [swanlab_records(run) for run in runs]
    assert len(runs) == 2
    assert len({found[0].start.id for found in records}) == 1
    assert {found[0].start.name for found in records} == {"out"}
    scalars = [r.scalar for found in records for r in found if r.HasField("scalar")]
    held_out = [(s.step, s.value.number) for s in scalars if s.key == "held_out_loss"]
    curve = load(tmp_path / "out").record.figures["curve"]
    assert held_out == [(step, pytest.approx(loss)) for step, loss in curve["held_out"]]
    pictures = sorted((tmp_path / "out" / "swanlab").rglob("media/image/*.png"))
    assert [Image.open(picture).size for picture in pictures] == [(2 * 66 + 2, 68)] * 2


def test_swanlab_draws_the_logits_as_bars(dense, tmp_path):
    pytest.importorskip("swanlab")
    options = LearnOptions(
        steps=1, dataset_size=4, tracker="swanlab", tracker_mode="offline", track_images=0, **QUICK
    )
    listener = Listener()
    learn(dense, tmp_path / "out", options, progress=listener)
    assert listener.said == []
    charts = list((tmp_path / "out" / "swanlab").rglob("media/echarts/*.json"))
    assert len(charts) == 2
    (series,) = json.loads(charts[0].read_text(encoding="utf-8"))["series"]
    assert sum(series["data"]) == load_logits(tmp_path / "out").size


# -------------------------------------------------------------------------------- wandb


@pytest.mark.slow
def test_wandb_without_an_account_works_offline(sparse, tmp_path):
    pytest.importorskip("wandb")
    options = FinetuneOptions(steps=2, tracker="wandb", track_images=2, teacher="none", **QUICK)
    listener = Listener()
    finetune(sparse, tmp_path / "out", options, progress=listener)
    (line,) = listener.said
    assert line.startswith("wandb: offline (")
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (file,) = run.glob("run-*.wandb")
    assert b"held_out_loss" in file.read_bytes()
    (picture,) = run.rglob("samples_*.png")
    assert Image.open(picture).size == (2 * 66 + 2, 68)


def test_wandb_waits_no_longer_than_it_is_told(monkeypatch):
    pytest.importorskip("wandb")
    assert wandb._limits()["init_timeout"] == 30
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    assert "init_timeout" not in wandb._limits()
