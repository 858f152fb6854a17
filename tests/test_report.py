"""report.html: whole, escaped, self-contained; sheets and curves hold what they should."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_table import evaluation

from prunedm.errors import UserError
from prunedm.evaluation.pictures import curve_of, grid, loss_curves, round_ticks
from prunedm.evaluation.report import duration, lineage_of, page, write_report
from prunedm.evaluation.results import Evaluation
from prunedm.record import Record, Source

CHROMIUM = Path("/usr/bin/chromium")
# label, stage, parameters, non-zero, MACs, loss, FD, PSNR, steps of training
STAGES: tuple[tuple[Any, ...], ...] = (
    ("1-prune", "prune", 759_025, 759_025, 20_900_000, 0.0683, 31.42, 14.2, 0),
    ("2-recover", "finetune", 759_025, 759_025, 20_900_000, 0.0334, 5.31, 19.8, 2000),
    ("3-mask", "prune", 759_025, 391_402, 20_900_000, 0.0561, 22.75, 15.6, 0),
    ("4-learn", "learn", 759_025, 391_402, 20_900_000, 0.0428, 11.06, 17.1, 600),
    ("5-finetune", "finetune", 759_025, 391_402, 20_900_000, 0.0338, 5.64, 19.1, 2000),
)
LEFT_DENSE = {
    "conv_in": "1 input channel: no group of 4",
    "time_embedding.linear_1": "not a layer of the blocks",
    "conv_out": "1 output channel, kept dense",
}


def record(stage: str, history: list[Record], **options: Any) -> Record:
    return Record(
        stage=stage,
        options={"dataset": "digits", "device_map": None, "seed": 0} | options,
        inputs={"model": Source(path=f"runs/{len(history)}", hash="9f" * 32)},
        seed=0,
        created=f"2025-01-0{len(history) + 1}T12:00:00+0000",
        wall_time_s=83.4 * len(history) + 0.7,
        device="AMD EPYC 7B13, 2 threads",
        versions={"prunedm": "0.1.0", "torch": "2.6.0", "python": "3.11.2"},
        figures={"loss": 0.0312, "curve": [[k, 0.1] for k in range(40)]},
        history=history,
    )


def training(steps: int, start: float, end: float) -> dict[str, Any]:
    if not steps:
        return {}
    k = np.arange(steps)
    mean = end + (start - end) * np.exp(-k / steps * 6)
    noise = np.random.default_rng(0).normal(1, 0.15, steps)
    held_out = [[int(s), float(mean[s - 1])] for s in range(steps // 8, steps + 1, steps // 8)]
    return {"losses": (mean * noise).tolist(), "held_out": held_out}


def pipeline() -> list[Evaluation]:
    """What `prunedm run` ends with: the dense model and five stages."""
    records = [record("train", [], steps=6500, lr=1e-3)]
    dense = evaluation().model_copy(update={"record": records[0]})
    models, before = [dense], 0.0683
    for label, stage, params, nonzero, macs, loss, fd, psnr, steps in STAGES:
        records.append(record(stage, list(records), steps=steps, ratio=0.3))
        masked = nonzero < params
        model = evaluation(
            label,
            params=params,
            nonzero=nonzero,
            macs=macs,
            loss=loss,
            fd=fd,
            psnr_db=psnr,
            bytes_disk=2 * params + 31_000,
            bytes_packed=2 * nonzero + (params // 8 if masked else 0),
            latency_ms=9.12,
            pattern="2:4" if masked else "",
            nm_valid=1.0 if masked else None,
            nm_layers=61 if masked else 0,
            nm_dense=LEFT_DENSE if masked else {},
        )
        update = {"record": records[-1], "curve": training(steps, before, loss)}
        models.append(model.model_copy(update=update))
        before = loss
    return models


def digits(models: list[Evaluation], count: int = 50, channels: int = 1) -> dict[str, np.ndarray]:
    """Digits with noise by the model's loss, in place of samples."""
    from sklearn.datasets import load_digits

    images = np.kron(load_digits().images[:count], np.ones((2, 2)))[..., None] * 15
    images = np.repeat(images, channels, axis=3)
    noise = np.random.default_rng(0).normal(0, 1500, images.shape)
    return {
        e.label: np.clip(images + (e.figures.loss - models[0].figures.loss) * noise, 0, 255).astype(
            np.uint8
        )
        for e in models
    }


class Page(HTMLParser):
    """The text people see, the addresses the page asks for, and whether its tags match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in {"src", "href", "srcset", "action"}]
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(models: list[Evaluation], samples: dict[str, np.ndarray], folder: Path) -> str:
    path = write_report(models, samples, folder / "report.html", title="Digits, 2:4")
    return path.read_text(encoding="utf-8")


def test_page_shows_every_model_figure_and_condition(tmp_path: Path) -> None:
    models = pipeline()
    read = Page(written(models, digits(models), tmp_path))
    assert not read.open  # every tag is closed, in order
    for e in models:
        assert e.label in read.text
        assert f"{e.figures.loss:.4f} ± {e.figures.loss_se:.4f}" in read.text
        assert f"{e.figures.fd:.2f}" in read.text
    for value in models[0].conditions.model_dump().values():
        assert str(value) in read.text
    for words in (
        "−30 %",
        "100 % of 2:4 in 61 layers",
        "the same noise",
        "FD is biased at small n",
        "conv_in",
    ):
        assert words in read.text
    for layer, reason in LEFT_DENSE.items():
        assert layer in read.text
        assert reason in read.text


def test_page_asks_for_nothing_outside(tmp_path: Path) -> None:
    models = pipeline()
    source = written(models, digits(models, channels=3), tmp_path)
    read = Page(source)
    assert "http://" not in source
    assert "https://" not in source
    assert not {"script", "iframe", "object", "form"} & set(read.tags)
    assert read.addresses
    assert all(address.startswith(("data:", "#")) for address in read.addresses)
    assert all(address.startswith("data:") for address in re.findall(r"url\(([^)]*)", source))
    assert "@import" not in source


def test_page_warns_where_conditions_differ(tmp_path: Path) -> None:
    models = [evaluation(), evaluation("other", problems=7)]
    text = Page(written(models, {}, tmp_path)).text
    assert "other: problems is 7, not 2000" in text
    assert "the same noise." not in text.split("Figures")[0]
    assert "7 held-out denoising problems" in text
    assert "2000 held-out denoising problems" in text


def test_headline_is_the_last_model_against_dense() -> None:
    models = pipeline()
    tiles = {tile["name"]: tile for tile in page(models, {}, title="t")["key_figures"]}
    assert list(tiles) == ["parameters", "packed (fp16)", "MACs", "FD (digits-cnn)"]
    assert tiles["parameters"]["big"] == "−30 %"
    assert tiles["parameters"]["story"] == "1.08M → 0.76M"
    assert tiles["FD (digits-cnn)"]["big"] == "+28 %"
    assert tiles["FD (digits-cnn)"]["tone"] == "worse"


def test_text_is_escaped(tmp_path: Path) -> None:
    evil = "<b>x</b><script>alert(1)</script>"
    made = record("prune", [], note=evil)
    model = evaluation(evil, dataset=evil, nm_dense={evil: evil}, loss=0.05)
    model = model.model_copy(update={"record": made, "curve": {"losses": [0.1] * 9}})
    samples = {evil: np.zeros((4, 8, 8, 1), np.uint8)}
    path = write_report([evaluation(), model], samples, tmp_path / "r.html", title=evil)
    source = path.read_text(encoding="utf-8")
    assert "<b>x" not in source
    assert "<script" not in source
    assert Page(source).text.count("<script>alert(1)") >= 6


def test_one_model_without_anything_optional(tmp_path: Path) -> None:
    model = evaluation(fd=None, latency_ms=None, latency_spread_ms=None)
    read = Page(written([model], {}, tmp_path))
    assert not read.open
    assert "svg" not in read.tags
    assert "img" not in read.tags
    assert "No record: dense" in read.text
    assert "nothing to compare it with" in read.text
    assert "Not measured: FD, PSNR, latency." in read.text
    assert "None" not in read.text


def test_samples_of_unknown_models_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other"):
        written([evaluation()], {"other": np.zeros((1, 8, 8, 1), np.uint8)}, tmp_path)
    with pytest.raises(UserError, match="at least one"):
        written([], {}, tmp_path)


def test_lineage_names_each_stage_once() -> None:
    models = pipeline()
    found = lineage_of(models)
    assert [r.stage for r, _ in found] == ["train", *(s[1] for s in STAGES)]
    assert [labels for _, labels in found] == [[e.label] for e in models]
    # the ancestors of a model that were not evaluated themselves are there too
    assert [labels for _, labels in lineage_of(models[-1:])] == [[]] * 5 + [["5-finetune"]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gap", [0, 2])
def test_grid_tiles_are_the_images(channels: int, gap: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, channels), dtype=np.uint8)
    picture = grid(images, 3, gap=gap)
    assert picture.size == (3 * 4 + 2 * gap, 3 * 5 + 2 * gap)
    assert picture.mode == {1: "LA", 3: "RGBA"}[channels]
    sheet = np.asarray(picture)
    for k, image in enumerate(images):
        y, x = k // 3 * (5 + gap), k % 3 * (4 + gap)
        tile = sheet[y : y + 5, x : x + 4]
        np.testing.assert_array_equal(tile[..., :-1], image)
        assert (tile[..., -1] == 255).all()
    assert (sheet[..., -1] == 255).sum() == 7 * 5 * 4  # all else is transparent


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4, 2), np.uint8), np.zeros((2, 4, 4), np.uint8)],
)
def test_grid_refuses_what_is_no_image(images: np.ndarray) -> None:
    with pytest.raises(UserError, match="grid takes uint8"):
        grid(images, 2)


def test_curve_is_the_mean_of_neighbours() -> None:
    curve = curve_of("a", list(range(1000)), [[500, 2.0]])
    assert curve.window == 10
    assert len(curve.training) == 100
    assert curve.training[0] == (5.5, 4.5)  # losses 0..9 belong to steps 1..10
    assert curve.held_out == [(500.0, 2.0)]
    assert curve_of("a", [3.0]).training == [(1.0, 3.0)]


def heights(svg: str, kind: str) -> list[float]:
    (line,) = re.findall(rf'class="{kind}" points="([^"]*)"', svg)
    return [float(point.split(",")[1]) for point in line.split()]


def test_panels_share_one_axis_with_the_dense_line() -> None:
    curves = [curve_of("a", [], [[1, 0.08], [2, 0.04]]), curve_of("b", [], [[1, 0.04], [2, 0.03]])]
    one, two = loss_curves(curves, dense=0.04)
    assert heights(one, "dense") == heights(two, "dense")
    assert heights(one, "held-out")[1] == heights(two, "held-out")[0] == heights(one, "dense")[0]
    assert heights(one, "held-out")[0] < heights(one, "held-out")[1]  # a higher loss stands higher


@pytest.mark.parametrize(
    "losses", [[], [float("nan")], [0.5], [-1.0, 2.0], [1e-6, 1e6], [0.0, 0.0]]
)
def test_odd_curves_draw_or_stay_away(losses: list[float]) -> None:
    (svg,) = loss_curves([curve_of("a", losses)], dense=None)
    assert bool(svg) == any(np.isfinite(losses))
    assert "nan" not in svg
    assert "inf" not in svg


def test_ticks_are_round() -> None:
    assert round_ticks(0, 2000) == [0, 500, 1000, 1500, 2000]
    assert round_ticks(0.031, 0.069) == [0.04, 0.05, 0.06]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.734, "0.734 s"), (59.9, "59.9 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium")
def test_browser_has_no_complaints(tmp_path: Path) -> None:
    models = pipeline()
    written(models, digits(models), tmp_path)
    profile = tmp_path / "profile"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --dump-dom "
    flags += "--enable-logging=stderr --v=0 --window-size=1400,3000"
    address = (tmp_path / "report.html").as_uri()
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert "5-finetune" in ran.stdout
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
