"""fid and stats: kinds of sides, conditions, agreement with torch-fidelity, bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from prunedm.cli import main
from prunedm.errors import UserError
from prunedm.evaluation.features import load_features
from prunedm.options import FidOptions, StatsOptions
from prunedm.stages import distance
from prunedm.stages.distance import fid, lines, stats
from prunedm.stages.workplace import Workplace

DIM = 12


class Patches(nn.Module):
    """Means of twelve patches: correlated, of one scale, and exact in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("network") / "patches.pt"
    torch.jit.save(torch.jit.script(Patches()), str(path))
    return str(path)


def pixels(seed: int, count: int = 60, low: int = 0) -> np.ndarray:
    """Images whose patches vary together."""
    rng = np.random.default_rng(seed)
    light = rng.integers(0, 60, (count, 1, 1, 1))
    return (light + rng.integers(low, 190, (count, 8, 8, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    """A folder of 60 generated images, and an .npz of 80 real ones."""
    place = tmp_path_factory.mktemp("sets")
    (place / "generated").mkdir()
    for number, image in enumerate(pixels(0, low=20)):
        Image.fromarray(image).save(place / "generated" / f"{number:03d}.png")
    np.savez(place / "real.npz", images=pixels(1, 80))
    return str(place / "generated"), str(place / "real.npz")


def features_of(pixels_NHWC: np.ndarray) -> torch.Tensor:
    return Patches()(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2))


def options(network: str, **others) -> FidOptions:
    return FidOptions(**({"features": network, "device": "cpu", "draws": 4} | others))


def test_distance_is_that_of_the_matrix_root_of_scipy(sets, network: str) -> None:
    figures = fid(*sets, options(network))
    x, y = (features_of(p).double().numpy() for p in (pixels(0, low=20), pixels(1, 80)))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert figures["fd"] == pytest.approx(expected, rel=1e-5)
    assert (figures["features"], figures["dim"]) == ("FD (patches)", DIM)
    assert (figures["a"]["images"], figures["b"]["images"]) == (60, 80)
    assert 0 < figures["fd_se"] < figures["fd"]
    assert 0 < figures["kid_se"] < figures["kid"]
    assert not figures["biased"]


def test_agrees_with_torch_fidelitys_own_run(sets, network: str, monkeypatch) -> None:
    """`calculate_metrics` from end to end, with our features registered in the place of Inception."""
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.patches = Patches()

        @staticmethod
        def get_provided_features_list():
            return ("patches",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "patches"

        def forward(self, x):
            return (self.patches(x).double(),)

    class Real(torch.utils.data.Dataset):
        def __len__(self):
            return 80

        def __getitem__(self, k):
            return torch.from_numpy(pixels(1, 80)[k]).permute(2, 0, 1)

    if "prunedm-patches" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("prunedm-patches", Registered)
    theirs = calculate_metrics(
        input1=sets[0],
        input2=Real(),
        feature_extractor="prunedm-patches",
        fid=True, kid=True, prc=True, kid_subset_size=60, kid_subsets=40,
        cuda=False, save_cpu_ram=True, cache=False, verbose=False,
    )  # fmt: skip
    # theirs takes features as they are
    monkeypatch.setattr(distance, "kernel_unit", lambda *_: 1.0)
    ours = fid(*sets, options(network, kid_subset=60))
    assert ours["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    kid, spread = (theirs[f"kernel_inception_distance_{k}"] for k in ("mean", "std"))
    assert abs(ours["kid"] - kid) < 4 * spread * math.sqrt(1 / 40 + 1 / 100)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])


def test_statistics_stand_for_their_images(sets, network: str, tmp_path: Path) -> None:
    shape = StatsOptions(features=network, device="cpu")
    written = stats(sets[1], tmp_path / "new" / "real.npz", shape)
    assert (written["images"], written["dim"]) == (80, DIM)
    with np.load(tmp_path / "new" / "real.npz") as file:  # as pytorch-fid reads it
        assert file["mu"].shape == (DIM,)
        assert file["sigma"].shape == (DIM, DIM)
    stored = str(tmp_path / "new" / "real.npz")
    whole, half = fid(*sets, options(network)), fid(sets[0], stored, options(network))
    assert half["fd"] == whole["fd"]
    assert 0 < half["fd_se"] < whole["fd_se"]  # of one side's images
    assert half["kid"] is None
    assert half["recall"] is None
    assert "no KID, precision and recall" in half["notes"][0]
    stats(sets[0], tmp_path / "a.npz", shape)
    none = fid(str(tmp_path / "a.npz"), stored, FidOptions(features="no such network"))
    assert none["fd"] == whole["fd"]  # no network is loaded where there are no images
    assert none["fd_se"] is None
    assert none["features"] == "FD (patches)"


def test_a_file_of_pytorch_fid_goes_with_a_warning(sets, network: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    figures = fid(sets[0], str(tmp_path / "theirs.npz"), options(network))
    assert figures["b"]["images"] is None
    assert any("does not say" in note for note in figures["notes"])
    assert "an unknown number of images" in lines(figures)[0]


def test_digits_by_name_and_the_order_of_sides() -> None:
    wanted = FidOptions(
        features="digits-cnn", num_samples=120, device="cpu", draws=2, kid_subsets=2
    )
    first = fid("digits", "digits", wanted)
    assert first["fd"] == pytest.approx(0, abs=1e-9)
    assert (first["precision"], first["recall"]) == (1.0, 1.0)
    assert first["features"] == "FD (digits-cnn)"


def test_figures_are_json_and_lines(sets, network: str) -> None:
    figures = fid(*sets, options(network, seed=3))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["options"]["seed"] == 3
    assert figures["device"]
    said = lines(figures)
    assert said[0].startswith(f"FD (patches) {figures['fd']:.5g} ± ")
    assert "60 images of" in said[0]
    assert said[1].startswith("KD ")  # KID only in Inception's features
    assert "100 subsets of 60 images" in said[1]
    assert said[2].startswith(f"precision {figures['precision']:.4f} ± ")
    assert figures == fid(*sets, options(network, seed=3)) | {"created": figures["created"]}


def test_parts_can_be_left_out(sets, network: str) -> None:
    figures = fid(*sets, options(network, kid=False, prc=False))
    assert figures["kid"] is None
    assert figures["precision"] is None
    assert len(lines(figures)) == 1


def test_too_few_images_are_refused_or_called_biased(sets, network: str, tmp_path: Path) -> None:
    few = {"num_samples": DIM}
    with pytest.raises(UserError, match=f"{DIM} images are too few for {DIM} features.*--force"):
        fid(*sets, options(network, **few))
    with pytest.raises(UserError, match="too few"):
        stats(sets[0], tmp_path / "few.npz", StatsOptions(features=network, **few))
    assert not list(tmp_path.iterdir())
    forced = fid(*sets, options(network, force=True, **few))
    assert forced["biased"]
    assert any(note.startswith("biased: 12 images of") for note in lines(forced))
    wrote = stats(sets[0], tmp_path / "few.npz", StatsOptions(features=network, force=True, **few))
    assert wrote["biased"]
    with pytest.raises(UserError, match="too few"):
        fid(sets[0], str(tmp_path / "few.npz"), options(network))
    assert fid(*sets, options(network, num_samples=DIM + 1))["fd"] > 0


def test_very_few_images_leave_figures_out(sets, network: str) -> None:
    tiny = fid(*sets, options(network, force=True, num_samples=3))
    assert tiny["kid"] is None
    assert tiny["precision"] is None
    assert len(lines(tiny)) == 1 + 2  # the distance, and that it is biased, for both sides


def test_statistics_of_other_features_are_refused_before_any_work(
    sets, network: str, tmp_path: Path, monkeypatch
) -> None:
    stats(sets[1], tmp_path / "real.npz", StatsOptions(features=network, device="cpu"))
    other = tmp_path / "other.pt"
    torch.jit.save(torch.jit.script(Patches()), str(other))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(DIM + 1), sigma=np.eye(DIM + 1))
    monkeypatch.setattr("prunedm.stages.distance.extract", None)
    with pytest.raises(UserError, match=r"FD \(patches\) and FD \(other\)"):
        fid(sets[0], str(tmp_path / "real.npz"), options(str(other)))
    with pytest.raises(UserError, match="13 and 12 features"):
        fid(sets[0], str(tmp_path / "wide.npz"), options(network))


def test_images_that_cannot_be_read_are_counted(sets, network: str, tmp_path: Path) -> None:
    for number, image in enumerate(pixels(0, 20)):
        Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "007.png").write_text("no image")
    with pytest.raises(UserError, match=r"007\.png"):
        fid(str(tmp_path), sets[1], options(network))
    figures = fid(str(tmp_path), sets[1], options(network, skip_bad=True))
    assert figures["a"]["images"] == 19
    assert figures["a"]["skipped"] == [str(tmp_path / "007.png")]
    assert any("left out of" in note and "1 that" in note for note in lines(figures))


def test_the_same_statistics_again_are_done_already(
    sets, network: str, tmp_path: Path, monkeypatch
) -> None:
    out, wanted = tmp_path / "real.npz", StatsOptions(features=network, device="cpu")
    first, before = stats(sets[1], out, wanted), out.stat()
    assert first["made"]
    with pytest.raises(UserError, match=r"statistics of other images or options.*--overwrite"):
        stats(sets[1], out, wanted.model_copy(update={"num_samples": 70}))
    monkeypatch.setattr("prunedm.stages.distance.extract", None)  # no feature is computed again
    for overwrite in (False, True):
        again = stats(sets[1], out, wanted, overwrite=overwrite)
        assert again == first | {"made": False}
    now, then = ((s.st_ino, s.st_size, s.st_mtime_ns) for s in (out.stat(), before))
    assert now == then  # the time of access moves by reading


def test_statistics_are_made_by_one_command_and_touch_no_file_of_yours(
    sets, network: str, tmp_path: Path
) -> None:
    out, wanted = tmp_path / "x.npz", StatsOptions(features=network)
    (tmp_path / "x.npz.partial").write_text("precious")
    with Workplace.of(out).held(), pytest.raises(UserError, match=r"x\.npz is being made by anot"):
        stats(sets[0], out, wanted)
    stats(sets[0], out, wanted)
    assert (tmp_path / "x.npz.partial").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"x.npz", "x.npz.partial"}


def test_a_file_is_replaced_only_on_request_and_as_a_whole(
    sets, network: str, tmp_path: Path, monkeypatch
) -> None:
    out, wanted = tmp_path / "real.npz", StatsOptions(features=network, device="cpu")
    stats(sets[1], out, wanted)
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        stats(sets[0], out, wanted)

    def full(file, **_) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="no space"):
            stats(sets[0], out, wanted, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]
    assert out.read_bytes() == before
    stats(sets[0], out, wanted, overwrite=True)
    assert out.read_bytes() != before
    with pytest.raises(UserError, match="holds statistics already"):
        stats(str(out), tmp_path / "again.npz", wanted)
    with pytest.raises(UserError, match=r"ends in \.npz"):
        stats(sets[0], tmp_path / "stats", wanted)


def test_a_place_that_cannot_be_written_is_found_before_any_work(
    sets, network: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("prunedm.stages.distance.extract", None)
    shape = StatsOptions(features=network, device="cpu")
    with pytest.raises(UserError, match="is a file, and not a folder"):
        stats(sets[1], tmp_path / "file" / "real.npz", shape)


def test_the_command_makes_the_folder_of_its_json(sets, network: str, tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "figures.json"
    with pytest.raises(SystemExit, match="0"):
        main(["fid", *sets, "--features", network, "--no-kid", "--no-prc", "--json", str(wanted)])
    assert json.loads(wanted.read_text())["fd"] > 0


def test_inception_is_the_default() -> None:
    assert FidOptions().features == StatsOptions().features == "inception"
    assert load_features("digits-cnn").name != "FID"
