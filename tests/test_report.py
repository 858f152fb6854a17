"""report.html: whole, escaped, self-contained; sheets and curves hold what they should."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_table import evaluation

from prunedm.errors import UserError
from prunedm.evaluation import report
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.report import page, write_report
from prunedm.evaluation.report.checks import check_lines
from prunedm.evaluation.report.conditions import conditions_in_words
from prunedm.evaluation.report.layers import layer_bars, reason_in_words
from prunedm.evaluation.report.plots import curve_of, loss_curves, panels, round_ticks
from prunedm.evaluation.report.samples import sheets
from prunedm.evaluation.report.stages import duration, failures, lineage_of, timeline
from prunedm.evaluation.report.timings import timing_blocks
from prunedm.evaluation.report.words import WORDS, attribute, text
from prunedm.evaluation.results import Asked, Conditions, Evaluation, LayerFigures, Timing
from prunedm.evaluation.summary import summary_text
from prunedm.evaluation.table import pareto, quality
from prunedm.experiments import page as sweep_page
from prunedm.networks.layers import why_not_nm
from prunedm.record import Record, Source
from prunedm.stages.table import STAGES as STAGES_OF_VERBS
from prunedm.tables import METRICS

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
    """The text people see in one language, the addresses asked for, and whether the tags match."""

    def __init__(self, source: str, language: str = "en") -> None:
        super().__init__()
        self.hidden = {"en": "zh-CN", "zh": "en"}[language]
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tag, whether its text is seen
        self.handlers: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in {"src", "href", "srcset", "action"}]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]
        if tag not in {"meta", "link", "img", "br"}:
            seen = not self.open or self.open[-1][1]
            other = tag == "span" and dict(attrs).get("lang") == self.hidden
            self.open.append((tag, seen and not other and tag not in {"style", "script"}))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1][1]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


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
    assert not {"iframe", "object", "form"} & set(read.tags)
    assert not read.handlers
    assert read.addresses
    assert all(address.startswith(("data:", "#")) for address in read.addresses)
    assert all(address.startswith("data:") for address in re.findall(r"url\(([^)]*)", source))
    assert "@import" not in source


def test_page_warns_where_conditions_differ(tmp_path: Path) -> None:
    models = [evaluation(), evaluation("other", problems=7)]
    text = Page(written(models, {}, tmp_path)).text
    assert "other: problems is 7, not 2000" in text
    assert "the same noise." not in text.split("Figures")[0]
    assert "other：任务数 为 7" in Page(written(models, {}, tmp_path), "zh").text
    assert "7 held-out problems" in text
    assert "2000 held-out problems" in text


def test_headline_is_the_last_model_against_dense() -> None:
    models = pipeline()
    tiles = {Page(tile["name"]).text: tile for tile in page(models, {}, title="t")["key_figures"]}
    assert list(tiles) == ["parameters", "packed (fp16)", "MACs", "FD (digits-cnn)"]
    assert tiles["parameters"]["big"] == "−30 %"
    assert tiles["parameters"]["story"] == "1.08M → 0.76M"
    assert tiles["FD (digits-cnn)"]["big"] == "+28 %"
    assert tiles["FD (digits-cnn)"]["tone"] == "worse"


EVIL = "<b>x</b><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def evil_models() -> list[Evaluation]:
    """Data that would be markup wherever they are shown."""
    made = record(EVIL, [], **{EVIL: EVIL, "note": EVIL}).model_copy(
        update={"device": EVIL, "inputs": {EVIL: Source(path=EVIL, hash=EVIL)}}
    )
    timing = Timing(batch=1, dtype=EVIL, threads=1, kernel=EVIL, median_ms=1, spread_ms=0)
    layer = LayerFigures(
        name=EVIL, shape=(4, 4), weights=16, nonzero=8, pattern=EVIL, valid=0.5, why_dense=EVIL
    )
    model = evaluation(EVIL, dataset=EVIL, pattern=EVIL, nm_valid=1.0, loss=0.05, timings=[timing])
    update = {
        "record": made,
        "curve": {"losses": [0.1] * 9},
        "layers": [layer],
        "failed": {EVIL: EVIL},
        "hash": EVIL,
    }
    unlayered = evaluation(EVIL + "2", nm_dense={EVIL: EVIL})
    return [evaluation(), model.model_copy(update=update), unlayered]


def test_data_are_never_markup(tmp_path: Path) -> None:
    samples = {label: np.zeros((4, 8, 8, 1), np.uint8) for label in ("dense", EVIL)}
    path = write_report(evil_models(), samples, tmp_path / "r.html", title=EVIL)
    source = path.read_text(encoding="utf-8")
    read = Page(source)
    assert "<b>x" not in source
    assert not read.open
    assert read.tags.count("script") == 1
    assert not read.handlers
    assert read.tags.count("img") == 2
    assert read.text.count("<script>alert(1)") >= 20
    assert source.split("<style>")[1].split("</script>")[0].count("alert") == 0


def test_policy_knows_the_only_script(tmp_path: Path) -> None:
    source = written(pipeline(), {}, tmp_path)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_word_has_both_languages() -> None:
    english, chinese = WORDS["en"], WORDS["zh"]
    named = ("metric.", "condition.", "stage.", "reason.")  # in English by the code
    extra = chinese.keys() - english.keys()
    assert english.keys() <= chinese.keys()
    assert not [key for key in extra if not key.startswith(named)]
    for key, words in english.items():
        assert words.strip(), key
        assert chinese[key].strip(), key
        slots = (sorted(re.findall(r"{(\w+)}", text)) for text in (words, chinese[key]))
        assert next(slots) == next(slots), key
    assert not [key for key, words in english.items() if re.search(r"[\u4e00-\u9fff]", words)]
    assert {f"metric.{key}{end}" for key in METRICS for end in ("", ".meaning")} <= extra
    for key, words in {k: m.conditions for k, m in METRICS.items() if m.conditions}.items():
        slots = (
            set(re.findall(r"{(\w+)}", text))
            for text in (words, chinese[f"metric.{key}.conditions"])
        )
        assert next(slots) == next(slots), key
    assert {f"condition.{name}" for name in Conditions.model_fields} <= extra
    assert {f"stage.{name}" for name in (*STAGES_OF_VERBS, "compare")} <= extra


def test_templates_use_words_that_exist() -> None:
    folders = [Path(module.__file__).parent for module in (report, sweep_page)]
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*")
             if path.suffix in {".py", ".j2"}]  # fmt: skip
    calls = r'(?:text|attribute)\((?:"[\w-]+", )?"([\w.]+)"'
    used = {key for source in texts for key in re.findall(calls, source)}
    assert len(used) > 60
    assert used - WORDS["en"].keys() <= {"aria-label", "alt"}


def test_words_hold_values_in_both_languages_escaped() -> None:
    pair = text("alone", label="<i>")
    assert Page(pair).text == "<i>, on its own: nothing to compare it with."
    assert Page(pair, "zh").text.startswith("只有 <i> 一个模型")
    named = attribute("alt", "samples.alt", count=3, label='"x')
    assert named.startswith('alt="3 samples of &#34;x" data-en-alt="')
    assert 'data-zh-alt="&#34;x 的 3 张样本"' in named


def test_chinese_page_has_no_english_sentence(tmp_path: Path) -> None:
    models = pipeline()
    read = Page(written(models, digits(models), tmp_path), "zh").text
    for words in (
        "指标",
        "留出集上的平均损失",
        "剪枝 prune",
        "处理流程",
        "5-finetune，以 dense 为基准",
    ):
        assert words in read
    # what is left in English is data: labels, reasons, names of options and devices
    for sentence in WORDS["en"].values():
        if len(sentence.split()) > 3 and "{" not in sentence:
            assert sentence not in read


def test_colours_can_be_read() -> None:
    style = (Path(report.__file__).parent / "templates/style.css").read_text(encoding="utf-8")
    for block in re.findall(r":root \{([^}]*--paper[^}]*)\}", style):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for name in ("ink", "soft", "accent", "better", "worse"):
            for ground in ("paper", "wash"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def layers(count: int = 3, **last: Any) -> list[LayerFigures]:
    """Masked layers, each twice as large as the one before."""
    made = [
        LayerFigures(
            name=f"block.{k}",
            shape=(4, 4 << k),
            weights=16 << k,
            nonzero=8 << k,
            pattern="2:4",
            valid=1,
        )
        for k in range(count)
    ]
    return [*made[:-1], made[-1].model_copy(update=last)]


def test_bars_are_lengths_and_shares() -> None:
    reason = "3 input channels are not a multiple of 4"
    changed = layers(3, pattern="", why_dense=reason, nonzero=64)
    models = [
        evaluation(),
        evaluation("a").model_copy(update={"layers": layers()}),
        evaluation("b").model_copy(update={"layers": layers()}),
        evaluation("c").model_copy(update={"layers": changed}),
    ]
    same, other = layer_bars(models)
    assert [g.labels for g in (same, other)] == [["a", "b"], ["c"]]
    assert [bar.width for bar in same.bars] == [25, 50, 100]
    assert [bar.filled for bar in same.bars] == [50, 50, 50]
    assert other.bars[2].share == "100 %"
    (note,) = other.bars[2].notes
    assert Page(note).text == f"left dense: {reason}"
    assert Page(note, "zh").text == "保持稠密：输入通道数 3 不是 4 的倍数"
    assert "3 layers, 2 with a mask" in Page(other.summary).text
    assert layer_bars([evaluation()]) == []


@pytest.mark.parametrize(("count", "collapsed"), [(30, False), (31, True)])
def test_many_layers_are_collapsed(count: int, collapsed: bool, tmp_path: Path) -> None:
    model = evaluation().model_copy(update={"layers": layers(count)})
    source = written([model], {}, tmp_path)
    (tag,) = re.findall(r'<details class="layers"([^>]*)>', source)
    assert ("open" not in tag) == collapsed


def test_reasons_of_layers_are_known() -> None:
    reasons = [
        why_not_nm(torch.nn.Linear(6, 4), 4),
        why_not_nm(torch.nn.Conv2d(8, 8, 3, groups=2), 4),
        "left dense",
    ]
    for reason in reasons:
        assert reason
        pair = reason_in_words(reason)
        assert Page(pair).text == reason
        assert Page(pair, "zh").text != reason
    assert reason_in_words("<odd>") == "&lt;odd&gt;"


def timing(batch: int, median: float, **changes: Any) -> Timing:
    fields = {"dtype": "float32", "threads": 2, "median_ms": median, "spread_ms": 0.1}
    return Timing(batch=batch, **(fields | changes))


def test_timings_compare_like_with_like() -> None:
    models = [
        evaluation(timings=[timing(1, 10), timing(16, 50)]),
        evaluation("a", timings=[timing(1, 5), timing(16, 50.1), timing(16, 20, compiled=True)]),
    ]
    one, sixteen, compiled = timing_blocks(models)
    assert [(row.change, row.tone) for row in one] == [("", ""), ("−50 %", "better")]
    assert [(row.change, row.tone) for row in sixteen] == [("", ""), ("+0.2 %", "")]
    assert [(row.label, row.change) for row in compiled] == [("a", "")]
    assert timing_blocks([evaluation()]) == []


def test_a_page_says_that_other_processes_disturbed_the_times(tmp_path: Path) -> None:
    quiet = [evaluation(latency_ms=50, timings=[timing(16, 50, others=0.04)])]
    disturbed = [evaluation(latency_ms=50, timings=[timing(1, 5), timing(16, 50, others=0.4)])]
    for rows, wanted in ((quiet, False), (disturbed, True)):
        pages = conditions_in_words(rows)[0][1]
        assert any("used 40% of the processor" in str(page) for page in pages) == wanted
        assert ("used 40% of the processor" in summary_text("t", rows, [], [])) == wanted


def test_front_is_what_no_other_beats() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        places = [divmod(int(p), 8) for p in generator.permutation(64)[:12]]
        front = [places[k] for k in pareto(places)]
        assert set(front) == {
            p for p in places if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in places)
        }
        assert front == sorted(front)


def test_panels_take_fd_only_where_all_have_it() -> None:
    models = pipeline()
    assert quality(models).key == "fd"
    assert len(panels(models, text("front"))) == 3
    models[1].figures.fd = None
    assert quality(models).key == "loss"
    models = [
        evaluation(latency_ms=None),
        evaluation("b", latency_ms=None, loss=float("nan"), fd=None),
    ]
    assert panels(models, text("front")) == []
    models = [evaluation(latency_ms=None), evaluation("b", loss=0.03, device="other")]
    drawn = panels(models, text("front"))
    assert [Page(name).text for name, _ in drawn] == ["packed size", "MACs of an image"]


def test_panels_stay_in_their_box() -> None:
    labels = ["dense", "x" * 80, "模型" * 20, "a", "b"]
    models = [evaluation(label, fd=5.0 + k, latency_ms=10.0) for k, label in enumerate(labels)]
    for _, svg in panels(models, text("front")):
        found = re.findall(r'class="label" x="([\d.-]+)" y="([\d.-]+)">([^<]*)<', svg)
        assert len(found) == len(labels)
        for x, y, words in found:
            assert 0 <= float(x) <= 340
            assert 0 <= float(y) <= 250
            assert len(words) <= 22


def test_timeline_is_to_scale() -> None:
    stages = timeline(pipeline())
    assert stages[0].start == 0
    for one, two in pairwise(stages):
        assert one.start + one.share == pytest.approx(two.start)
    assert sum(stage.share for stage in stages) == pytest.approx(100)
    assert Page(stages[1].name, "zh").text == "剪枝 prune"


def test_failed_steps_are_shown_once(tmp_path: Path) -> None:
    models = [e.model_copy(update={"failed": {"kid": "too few samples"}}) for e in pipeline()[:2]]
    (failure,) = failures(models)
    assert failure.labels == ["dense", "1-prune"]
    read = Page(written(models, {}, tmp_path)).text
    assert "kid failed missing for dense, 1-prune too few samples" in read


def test_long_values_are_not_shown(tmp_path: Path) -> None:
    made = record("prune", [], curve={"losses": list(range(500))})
    model = evaluation().model_copy(update={"record": made})
    read = Page(written([model], {}, tmp_path)).text
    assert "(long; in full in record.json)" in read
    assert "499" not in read


@pytest.mark.parametrize(
    ("size", "count", "shown"), [(8, 50, 36), (8, 5, 5), (64, 50, 36), (256, 50, 16), (1024, 50, 4)]
)
def test_large_samples_are_fewer(size: int, count: int, shown: int) -> None:
    (sheet,) = sheets([evaluation()], {"dense": np.zeros((count, size, size, 1), np.uint8)})
    assert (sheet.shown, sheet.all) == (shown, count)


def test_only_like_sheets_are_paired() -> None:
    shapes = {"dense": (9, 8, 8, 1), "a": (9, 8, 8, 3), "b": (4, 8, 8, 1), "c": (9, 16, 16, 1)}
    models = [evaluation(label) for label in shapes]
    found = sheets(models, {label: np.zeros(shape, np.uint8) for label, shape in shapes.items()})
    assert [sheet.paired for sheet in found] == [True, True, False, False]


def test_one_model_without_anything_optional(tmp_path: Path) -> None:
    model = evaluation(fd=None, latency_ms=None, latency_spread_ms=None)
    read = Page(written([model], {}, tmp_path))
    assert not read.open
    assert "svg" not in read.tags
    assert "img" not in read.tags
    assert "No record: dense" in read.text
    assert "nothing to compare it with" in read.text
    assert "Not measured: FD (digits-cnn), KD ×1000, precision, recall, PSNR to dense" in read.text
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
    assert Page(duration(seconds)).text == text


def test_asked_beside_got_paired_loss_and_reload(tmp_path: Path) -> None:
    models = pipeline()[:4]
    params = Asked(what="params", asked=0.3, got=0.2956, reason="steps of 16")
    pattern = Asked(what="pattern", asked="2:4", got="2:4")
    for e, asked, reloads, change in zip(
        models,
        ([], [params], [params], [params, pattern]),
        (True, True, None, False),
        (None, 0.0431, -0.00012, 0.0002),
        strict=True,
    ):
        e.asked, e.reloads = asked, reloads
        e.figures.loss_change, e.figures.loss_change_se = change, 0.0001
    dense, pruned, recovered, masked = check_lines(models)
    assert (dense.change, dense.tone, dense.asked) == ("", "", [])
    assert (pruned.change, pruned.tone) == ("+0.04310 ± 0.00010", "worse")
    assert recovered.tone == ""  # 1.2 standard errors
    assert [c.asked for c in (pruned, recovered, masked)] == [[params], [], [pattern]]
    source = written(models, {}, tmp_path)
    english, chinese = (Page(source, language).text for language in ("en", "zh"))
    assert "params 0.3 → 0.2956" in english
    assert "steps of 16" in english
    assert "pattern 2:4 → 2:4" in english
    assert (english.count("same to the bit"), english.count("DIFFERS")) == (2, 1)
    assert (chinese.count("逐比特一致"), chinese.count("不一致")) == (2, 1)


def test_a_change_without_a_standard_error_stands_alone() -> None:
    models = pipeline()[:2]
    models[1].figures.loss_change = 0.5
    assert (check_lines(models)[1].change, check_lines(models)[1].tone) == ("+0.50000", "")


def test_identical_images_are_called_so_in_both_languages(tmp_path: Path) -> None:
    models = [evaluation(), evaluation("same", ssim=1.0, identical=1.0)]
    source = written(models, {}, tmp_path)
    for language, word in (("en", "identical"), ("zh", "相同")):
        read = Page(source, language).text
        assert f" {word} " in read.split("Figures" if language == "en" else "指标")[1]
        assert "PSNR:" in read if language == "en" else "PSNR：" in read
    missing = Page(source).text.split("Not measured:")[1]
    assert "PSNR" not in missing


def test_page_without_the_dense_loss(tmp_path: Path) -> None:
    models = pipeline()
    dense = evaluation(loss=None, loss_se=None, failed={"loss": "no number"})
    dense.record, dense.curve = (
        models[0].record,
        {"losses": [0.5, None, 0.1], "held_out": [[3, None]]},
    )
    read = Page(written([dense, *models[1:]], {}, tmp_path))
    assert not read.open
    assert "None" not in read.text
    assert "nan" not in read.text.split("Conditions")[0]
    assert "loss failed" in read.text


def test_conditions_of_weights_noise_and_threads_in_both_languages(tmp_path: Path) -> None:
    own = {
        "threads": 3, "device": "H200", "spacing": "trailing", "prediction": "v_prediction",
        "schedule": "linear, 9 steps",
    }  # fmt: skip
    models = [
        evaluation(weights="EMA 0.995", **own),
        evaluation("a", weights="EMA 0.995", **own),
        evaluation("b", weights="not averaged", **own),
        evaluation("c", **own),
    ]
    source = written(models, {}, tmp_path)
    english, chinese = (Page(source, language).text for language in ("en", "zh"))
    assert "Weights of dense, a: an average over training (EMA), decay 0.995." in english
    assert "Weights of b: those of the last training step, not averaged." in english
    assert "predicts: v_prediction. Noise schedule: linear, 9 steps." in english
    assert "Timesteps of ddim-50: trailing spacing." in english
    assert "Threads: 3." in english
    assert "dense, a 的权重：训练过程的指数滑动平均（EMA），衰减系数 0.995。" in chinese
    assert "预测目标：v_prediction；噪声调度：linear, 9 steps。" in chinese
    assert english.count("held-out problems of") == 1  # one set of conditions for all


def test_disk_is_of_the_weight_files_in_both_languages() -> None:
    meaning = METRICS["bytes_disk"].meaning
    assert "weight files" in meaning
    chinese = WORDS["zh"]["metric.bytes_disk"], WORDS["zh"]["metric.bytes_disk.meaning"]
    assert chinese == ("磁盘占用", "去噪网络权重文件的大小")


def test_no_checks_no_section() -> None:
    models = pipeline()
    assert check_lines(models) == []
    assert page(models, {}, title="x")["checks"] == []
