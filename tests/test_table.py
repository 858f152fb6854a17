"""The table of results: the numbers are the evaluations', the changes are right."""

import csv
import io
import json
from typing import Any

import pytest
from rich.console import Console

from prunedm.console import rich_table
from prunedm.evaluation.metric import amount, wide
from prunedm.evaluation.results import Conditions, Evaluation, Figures, Timing
from prunedm.evaluation.table import (
    cell,
    change_in_words,
    changes,
    csv_text,
    headers,
    markdown_table,
    measured,
    rows,
    warnings,
)
from prunedm.tables import METRICS

CONDITIONS = Conditions(
    dataset="digits",
    problems=2000,
    samples=500,
    sampler="ddim-50",
    seed=0,
    features="FD (digits-cnn)",
    reference=360,
    device="AMD EPYC 7B13, 2 threads",
    dtype="float32",
    latency_batch=16,
)


def evaluation(label: str = "dense", **changes: Any) -> Evaluation:
    """A dense model like the embedded one; `changes` go to its figures or its conditions."""
    figures = {
        "loss": 0.0312,
        "loss_se": 0.0008,
        "fd": 4.41,
        "params": 1_084_321,
        "nonzero": 1_084_321,
        "macs": 31_400_000,
        "bytes_disk": 2_190_000,
        "bytes_packed": 2_168_642,
        "latency_ms": 12.34,
        "latency_spread_ms": 0.21,
    }
    conditions = {k: changes.pop(k) for k in list(changes) if k in Conditions.model_fields}
    failed = changes.pop("failed", {})
    return Evaluation(
        label=label,
        model=f"runs/{label}",
        hash="ab12" * 16,
        figures=Figures.model_validate(figures | changes),
        conditions=CONDITIONS.model_copy(update=conditions),
        failed=failed,
    )


def pruned(label: str = "1-prune", **changes: Any) -> Evaluation:
    figures = {
        "params": 759_025,
        "loss": 0.0471,
        "pattern": "2:4",
        "nm_valid": 1.0,
        "nm_layers": 61,
    }
    return evaluation(label, **(figures | changes))


def column(key: str) -> Any:
    return METRICS[key]


def shown(key: str, e: Evaluation, dense: Evaluation | None = None) -> str:
    return str(cell(column(key), e, dense or evaluation()))


def test_rows_show_the_figures_and_their_changes() -> None:
    models = [evaluation(), pruned()]
    dense, other = (dict(zip(headers(models), row, strict=True)) for row in rows(models))
    assert {name: text for name, text in dense.items() if text != "–"} == {
        "model": "dense",
        "loss": "0.0312 ± 0.0008",
        "FD (digits-cnn)": "4.41",
        "parameters": "1.08M",
        "non-zero": "1.08M",
        "MACs": "31.4M",
        "disk": "2.19 MB",
        "packed (fp16)": "2.17 MB",
        "latency ms": "12.34 ± 0.21",
    }
    assert other["loss"] == "0.0471 ± 0.0008 (+51 %)"
    assert other["parameters"] == "0.76M (−30 %)"
    assert other["non-zero"] == "1.08M (±0 %)"
    assert other["N:M"] == "100 % of 2:4 in 61 layers"


def test_every_measure_of_quality_shows_its_standard_error() -> None:
    model = pruned(
        fd=5.0, fd_se=0.25, kid=1.5, kid_se=0.125, precision=0.75, precision_se=0.02, recall=0.5,
        recall_se=0.03, psnr_db=20.0, psnr_se=0.5, ssim=0.875, ssim_se=0.01,
    )  # fmt: skip
    assert shown("fd", model) == "5.00 ± 0.25 (+13 %)"
    assert shown("kid", model) == "1.50 ± 0.12"
    assert shown("precision", model) == "0.750 ± 0.020"
    assert shown("recall", model) == "0.500 ± 0.030"
    assert shown("psnr_db", model) == "20.0 dB ± 0.5"
    assert shown("ssim", model) == "0.875 ± 0.010"
    assert cell(column("fd"), model, evaluation(fd=4.9, fd_se=0.1)).tone == ""  # within the errors
    higher = evaluation(precision=0.5, precision_se=0.01)
    assert cell(column("precision"), model, higher).tone == "better"


def test_identical_images_have_no_decibels_but_a_word() -> None:
    same = pruned(ssim=1.0, identical=1.0)
    assert (shown("psnr_db", same), shown("psnr_db", pruned(identical=0.25))) == ("identical", "–")
    assert "psnr_db" in {c.key for c in measured([evaluation(), same])}
    assert "| identical |" in markdown_table([evaluation(), same])


def test_table_names_its_metrics() -> None:
    assert [metric.key for metric in METRICS.values()] == list(METRICS)
    assert [m.key for m in METRICS.values() if m.better and "lower" not in m.better] == [
        "precision", "recall", "psnr_db", "ssim",
    ]  # fmt: skip


def test_changes_to_dense_are_of_figures_that_compare() -> None:
    found = changes(pruned(fd=5.0, samples=7, nm_valid=1.0), evaluation(failed={"macs": "no"}))
    assert found.keys() == {"loss", "params", "nonzero", "bytes_disk", "bytes_packed", "latency_ms"}
    assert found["params"].absolute == 759_025 - 1_084_321
    assert found["params"].relative == pytest.approx(759_025 / 1_084_321 - 1)
    assert changes(pruned(kid=0.5), evaluation(kid=-0.1))["kid"].relative is None


def test_kernel_distances_of_any_size_are_short() -> None:
    assert (wide(1.234), wide(-0.5), wide(1019855.4)) == ("1.23", "-0.50", "1.02e+06")


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        ("samples", ["fd", "kid", "precision", "recall", "psnr_db", "ssim"]),
        ("fd", ["fd"]),
        ("loss", ["loss"]),
        ("latency", ["latency_ms"]),
        ("memory", ["peak_memory_mb"]),
        ("macs", ["macs"]),
        (
            "size",
            [
                "params",
                "nonzero",
                "sparsity",
                "bytes_disk",
                "bytes_packed",
                "compression",
                "nm_valid",
            ],
        ),
    ],
)
def test_what_failed_reads_failed(step: str, keys: list[str]) -> None:
    model = pruned(failed={step: "no reason"})
    assert [c.key for c in METRICS.values() if shown(c.key, model) == "failed"] == keys
    assert {c.key for c in measured([evaluation(), model])} >= set(keys)


def test_markdown_leaves_out_what_no_model_has() -> None:
    text = markdown_table([evaluation(fd=None), pruned(fd=None)])
    assert "FD" not in text
    assert "KID" not in text
    assert "loss" in text


def test_every_row_has_every_column() -> None:
    table = rows([evaluation(), pruned(fd=None, latency_ms=None)])
    assert {len(row) for row in table} == {len(headers([evaluation()]))} == {len(METRICS) + 1}
    assert shown("fd", pruned(fd=None)) == shown("latency_ms", pruned(latency_ms=None)) == "–"


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [
        (70, 100, "−30 %"),
        (102.14, 100, "+2.1 %"),
        (100, 100, "±0 %"),
        (100.01, 100, "±0 %"),
        (1200, 100, "×12"),
        (0, 100, "−100 %"),
        (1, 0, ""),
        (float("nan"), 100, ""),
        (90.04, 100, "−10 %"),
    ],
)
def test_change_in_words(value: float, base: float, text: str) -> None:
    assert change_in_words(value, base) == text


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [
        (780_000, 1_080_000, "0.78M"),
        (860_000_000, 860_000_000, "860M"),
        (4_000, 10_000_000, "4.00k"),
        (0, 1_000_000, "0.00M"),
        (523, 523, "523"),
        (31_400_000, 31_400_000, "31.4M"),
        (99_999, 99_999, "100.0k"),
    ],
)
def test_amount_takes_the_unit_of_the_dense_model(value: float, base: float, text: str) -> None:
    assert amount(value, base) == text


def test_validity_never_rounds_up_to_whole() -> None:
    assert shown("nm_valid", pruned(nm_valid=0.99996)).startswith("99.9 % of 2:4")
    assert shown("nm_valid", pruned(nm_layers=1)) == "100 % of 2:4 in 1 layer"


def test_tones_follow_direction_and_spread() -> None:
    dense = evaluation()
    assert cell(column("params"), pruned(), dense).tone == "better"
    assert cell(column("loss"), pruned(), dense).tone == "worse"
    assert cell(column("loss"), pruned(loss=0.0320), dense).tone == ""  # within the standard errors
    assert cell(column("params"), pruned(params=1_084_321), dense).tone == ""


def test_fd_header_names_the_features() -> None:
    assert headers([evaluation()])[4] == "FD (digits-cnn)"
    assert headers([evaluation(features="FID")])[4] == "FID"
    mixed = [evaluation(), pruned(features="FID")]
    assert headers(mixed)[4] == "FD"
    assert rows(mixed)[1][4] == "4.41 FID"  # and no change: the two do not compare


@pytest.mark.parametrize(
    ("condition", "key"),
    [
        ("problems", "loss"),
        ("samples", "fd"),
        ("device", "latency_ms"),
        ("seed", "loss"),
        ("prediction", "loss"),
        ("schedule", "loss"),
        ("spacing", "fd"),
    ],
)
def test_no_change_between_figures_of_other_conditions(condition: str, key: str) -> None:
    words = ("device", "prediction", "schedule", "spacing")
    value: Any = "other" if condition in words else 7
    other = pruned(fd=5.0, latency_ms=6.0, **{condition: value})
    assert "(" not in shown(key, other)
    assert "(" in shown("params", other)
    (line,) = warnings([evaluation(), other])
    assert condition in line
    assert str(value) in line
    assert "1-prune" in line


def test_a_condition_of_no_figure_warns_of_nothing() -> None:
    assert warnings([evaluation(fd=None), pruned(samples=7)]) == []
    (line,) = warnings([evaluation(), pruned(samples=7)])
    assert "samples is 7" in line


def test_same_conditions_give_no_warnings() -> None:
    assert warnings([evaluation(), pruned()]) == []
    assert warnings([]) == []


def test_csv_holds_every_raw_number() -> None:
    timing = Timing(batch=2, dtype="float32", threads=1, median_ms=1.5, spread_ms=0.1)
    dense = {"conv_in": "1 channel, no group of 4"}
    models = [evaluation(), pruned(fd=None, nm_dense=dense, timings=[timing])]
    read = list(csv.DictReader(io.StringIO(csv_text(models))))
    assert [row["label"] for row in read] == ["dense", "1-prune"]
    for row, e in zip(read, models, strict=True):
        for name, value in e.figures.model_dump().items():
            if name in ("nm_dense", "timings"):
                assert json.loads(row[name]) == value
            elif value is None:
                assert row[name] == ""
            else:
                assert type(value)(row[name]) == value
        assert {k: str(v) for k, v in e.conditions.model_dump().items()}.items() <= row.items()


def test_markdown_escapes_labels() -> None:
    lines = markdown_table([evaluation(), pruned("a|b <i>")]).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| a\\|b &lt;i&gt; | 0.0471")
    assert "0.76M (−30 %)" in lines[3]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_terminal_shows_six_models_whole(width: int) -> None:
    labels = ["1-prune", "2-recover", "3-mask", "4-learn", "5-finetune"]
    models = [evaluation(), *(pruned(label, psnr_db=24.56) for label in labels)]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(rich_table(models, width=width))
    text = console.export_text()
    assert "…" not in text
    for word in ["dense", *labels, "0.0471", "−30 %", "24.6 dB", "12.34", "(digits-cnn)"]:
        assert word in text
    assert max(map(len, text.splitlines())) <= width


def test_labels_are_not_terminal_markup() -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(rich_table([evaluation("[red]x[/red]")], width=160))
    assert "[red]x[/red]" in console.export_text()
