"""analyze: statistics by hand, the sentence for every outcome, the files that the stage writes."""

import json

import pytest
import torch
from helpers import drawn_figures, tiny_folder
from PIL import Image

from prunedm.calibration import TimeBins
from prunedm.evaluation.activations import (
    Activations,
    LayerActivations,
    ScoreTrial,
    layer_activations,
    verdict,
)
from prunedm.folder import load
from prunedm.networks.layers import prunable_layers
from prunedm.options import AnalyzeOptions
from prunedm.stages import analyze

QUICK = {"calibration_problems": 12, "time_bins": 2, "problems": 10, "device": "cpu"}


def test_statistics_of_a_layer_by_hand():
    squares_BI = torch.tensor([[1.0, 4, 4, 4, 144], [4, 4, 4, 4, 4]]).double()
    found = layer_activations(squares_BI, torch.full((5,), 4.5).double(), outlier=3.0)
    assert found.rms == pytest.approx([(157 / 5) ** 0.5, 2])
    assert found.largest == pytest.approx([6, 1])
    assert found.outliers == pytest.approx([0.2, 0])
    assert found.mean_share == pytest.approx(1 - 4.5 / 17.7)
    norms = torch.tensor([1.0, 2, 2, 2, 12])
    assert found.drift == pytest.approx(1 - float(norms.sum() / norms.norm() / 5**0.5))


def test_taps_of_a_kernel_are_averaged():
    squares = torch.tensor([1.0, 3.0]).double().reshape(1, 1, 1, 2).expand(2, 3, 1, 2)
    found = layer_activations(squares, torch.zeros(3, 1, 2).double(), outlier=3.0)
    assert found.rms == pytest.approx([2**0.5] * 2)
    assert found.mean_share == 1


@pytest.mark.parametrize(
    ("outliers", "wanda", "words"),
    [
        (0.1, 0.05, ["10.0%", "is likely to help; and tried", "wanda loses less than magnitude"]),
        (0.1, 0.08, ["is likely to help; but tried", "wanda loses more than magnitude"]),
        (0.01, 0.08, ["is unlikely to help; and tried", "wanda loses more"]),
        (0.01, 0.0601, ["is unlikely to help; and tried", "wanda and magnitude lose equally"]),
        (0.1, 0.0601, ["is likely to help; but tried", "wanda and magnitude lose equally"]),
        (0.01, 0.05, ["is unlikely to help; but tried", "wanda loses less"]),
    ],
)
def test_the_verdict_says_what_to_expect_and_what_came(outliers, wanda, words):
    layer = LayerActivations(
        rms=[1.0], largest=[4.0], outliers=[outliers], mean_share=0.4, drift=0.0
    )
    found = Activations(bins=[(0, 999)], outlier=3.0, layers={"a": layer})
    losses = {"magnitude": 0.06, "wanda": wanda}
    errors = {"magnitude": 0.0, "wanda": 0.001}
    trial = ScoreTrial(pattern="2:4", dense=0.02, losses=losses, standard_error=errors)
    sentence = verdict(found, trial)
    assert all(word in sentence for word in [*words, "40%", "2:4", f"{wanda:.4f}", "0.0600"])


def test_analyze_writes_statistics_and_a_picture(tmp_path):
    with drawn_figures():
        record, made = analyze(tiny_folder(), tmp_path / "out", AnalyzeOptions(**QUICK))
    assert made
    found = json.loads((tmp_path / "out" / "activations.json").read_text())
    assert set(found["layers"]) == set(prunable_layers(load(tiny_folder()).denoiser))
    assert [tuple(edge) for edge in found["bins"]] == TimeBins(0, 999, 2).edges
    assert set(found["trial"]["losses"]) == {"magnitude", "wanda", "fluctuation"}
    assert found["verdict"] == record.figures["verdict"]
    image = Image.open(tmp_path / "out" / "activations.png")
    assert image.width > 600
    assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert analyze(tiny_folder(), tmp_path / "out", AnalyzeOptions(**QUICK))[1] is False


def test_analyze_narrows_layers_and_timesteps(tmp_path):
    options = AnalyzeOptions(**QUICK, targets=("mid_block",), time_range="late")
    record, _ = analyze(tiny_folder(), tmp_path / "out", options)
    found = json.loads((tmp_path / "out" / "activations.json").read_text())
    assert all(name.startswith("mid_block") for name in found["layers"])
    assert found["bins"] == [[0, 166], [167, 332]]
    assert 0 <= record.figures["outlier_ratio"] <= 1
