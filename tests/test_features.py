"""Feature networks: the embedded digits CNN, TorchScript files, and Inception without a network."""

import hashlib
import json
import os
import sys
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from prunedm.data.images import load_images
from prunedm.errors import UserError
from prunedm.evaluation import features
from prunedm.evaluation.features import extract, image_batches, load_digits_cnn, load_features
from prunedm.evaluation.fid import frechet_distance, statistics

ASSETS = Path(features.__file__).parents[1] / "assets"


class Moments(nn.Module):
    """Mean and maximum of each image: (N, 2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.double().mean((1, 2, 3)), x.double().amax((1, 2, 3))], 1)


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean()


class Maps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Merging(nn.Module):
    """One vector for the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1).mean(0, keepdim=True)


class Dropping(nn.Module):
    """Doubles features in training mode: a file saved in that mode must still be evaluated right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.float().flatten(1)
        return flat * 2 if self.training else flat


class Shouting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(1) != 3:
            raise ValueError("three channels, please")
        return x.float().flatten(1)


def scripted(module: nn.Module, folder: Path, name: str = "tiny.pt") -> Path:
    torch.jit.save(torch.jit.script(module), str(folder / name))
    return folder / name


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def held_out_digits() -> torch.Tensor:
    images = load_images("digits", split="test", size=16, channels=1)
    return torch.cat(list(image_batches(images)))


def test_the_shipped_cnn_knows_digits_it_never_saw(held_out_digits: torch.Tensor) -> None:
    images = load_images("digits", split="test", size=16, channels=1)
    labels = torch.tensor([images.label(k) for k in range(len(images))])
    accuracy = float(
        (load_digits_cnn().logits(held_out_digits).argmax(1) == labels).double().mean()
    )
    assert accuracy > 0.98
    record = json.loads((ASSETS / "digits_cnn.json").read_text())
    assert record["figures"]["images"] == len(labels)
    assert record["figures"]["accuracy"] == pytest.approx(accuracy, abs=1.01 / len(labels))
    assert (ASSETS / features.DIGITS_CNN_FILE).stat().st_size < 600_000


def test_digits_cnn_is_named_for_what_it_is_and_deterministic(
    held_out_digits: torch.Tensor,
) -> None:
    first, second = load_features("digits-cnn"), load_features("digits-cnn")
    assert (first.name, first.dim) == ("FD (digits-cnn)", 64)
    x_ND, y_ND = (extract(net, held_out_digits.split(100)) for net in (first, second))
    assert x_ND.shape == (299, 64)
    assert x_ND.dtype == torch.float32
    assert torch.equal(x_ND, y_ND)
    assert not x_ND.requires_grad


def test_features_do_not_depend_on_the_batches(held_out_digits: torch.Tensor) -> None:
    network = load_features("digits-cnn")
    whole_ND = extract(network, [held_out_digits])
    for size in (1, 7, 100):
        parts_ND = extract(network, held_out_digits[:50].split(size))
        torch.testing.assert_close(parts_ND, whole_ND[:50], rtol=1e-4, atol=1e-4)


def test_distance_in_the_shipped_features_grows_with_noise(held_out_digits: torch.Tensor) -> None:
    network = load_features("digits-cnn")
    clean = statistics(extract(network, [held_out_digits]))
    noise = torch.randn(held_out_digits.shape, generator=torch.Generator().manual_seed(0))

    def distance(strength: float) -> float:
        noisy = (held_out_digits + strength * noise).round().clamp(0, 255).to(torch.uint8)
        return frechet_distance(clean, statistics(extract(network, [noisy])))

    assert 0 <= distance(0) < 1e-9 < distance(5) < distance(10) < distance(20) < distance(40)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 32, 32)])
def test_digits_cnn_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"digits-cnn takes images of shape \(1, 16, 16\)"):
        load_features("digits-cnn")(random_images(*shape))


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 16, 16), random_images(1, 16, 16)])
def test_only_batches_of_uint8_images_are_taken(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="takes uint8 NCHW images"):
        load_features("digits-cnn")(images)


def test_a_stream_is_read_once_and_told_of() -> None:
    told: list[tuple[str, int]] = []

    class Listener:
        def task(self, label, total, done=0):
            told.append((label, total))
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, units=1, note=""):
            told.append(("advance", units))

    stream = (random_images(2, 1, 16, 16, seed=k) for k in range(3))
    found_ND = extract(load_features("digits-cnn"), stream, progress=Listener(), total=3)
    assert len(found_ND) == 6
    assert told == [("features", 3)] + 3 * [("advance", 1)]
    with pytest.raises(UserError, match="no images"):
        extract(load_features("digits-cnn"), [])


def test_image_batches_keep_the_order_and_the_rest() -> None:
    images = random_images(7, 1, 4, 4)
    batches = list(image_batches(images, size=3))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), images)


def test_torchscript_file(tmp_path: Path) -> None:
    network = load_features(scripted(Moments(), tmp_path))
    assert (network.name, network.dim) == ("FD (tiny)", None)
    images = random_images(5, 3, 8, 8)
    expected = torch.stack([images.double().mean((1, 2, 3)), images.double().amax((1, 2, 3))], 1)
    assert torch.equal(extract(network, images.split(2)), expected.float())


def test_torchscript_file_is_run_in_evaluation_mode(tmp_path: Path) -> None:
    images = random_images(2, 1, 2, 2)
    network = load_features(str(scripted(Dropping().train(), tmp_path)))
    assert torch.equal(network(images), images.float().flatten(1))


@pytest.mark.parametrize("module", [Flat(), Maps(), Pair(), Merging()])
def test_torchscript_file_of_the_wrong_output_shape(tmp_path: Path, module: nn.Module) -> None:
    network = load_features(scripted(module, tmp_path))
    with pytest.raises(UserError, match=r"FD \(tiny\) must give \(4, D\) features"):
        network(random_images(4, 3, 8, 8))


def test_torchscript_file_that_cannot_take_the_images(tmp_path: Path) -> None:
    network = load_features(scripted(Shouting(), tmp_path))
    with pytest.raises(
        UserError, match=r"cannot take images of shape \(1, 8, 8\).*please"
    ) as caught:
        network(random_images(4, 1, 8, 8))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_torchscript_files(tmp_path: Path) -> None:
    good = scripted(Moments(), tmp_path).read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.pt").write_text("not a model")
    (tmp_path / "empty.pt").touch()
    torch.save({"a": torch.zeros(2)}, tmp_path / "state_dict.pt")
    for name in ("cut.pt", "text.pt", "empty.pt", "state_dict.pt"):
        with pytest.raises(UserError, match=rf"{name}.*damaged") as caught:
            load_features(tmp_path / name)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none.pt", tmp_path, "inceptoin"):
        with pytest.raises(UserError, match="neither digits-cnn, inception nor a file of"):
            load_features(missing)


@pytest.mark.parametrize("error", [URLError("Name or service not known"), IncompleteRead(b"")])
def test_inception_without_a_network_names_the_ways_out(
    monkeypatch, capsys, error: Exception
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    def no_network(*_, **__):
        sys.stderr.write("Downloading: it from there\n")
        raise error

    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="no network") as caught:
        load_features("inception")
    assert "--features digits-cnn|FILE" in str(caught.value)
    assert "--inception-weights FILE" in str(caught.value)
    assert capsys.readouterr().err == ""
    assert "\n" not in str(caught.value)


def test_inception_weights_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    torch.save(Moments(), tmp_path / "pickle.pth")  # would run code when unpickled
    for name in ("none.pth", "text.pth", "pickle.pth"):
        with pytest.raises(UserError, match=f"cannot read Inception weights.*{name}"):
            load_features("inception", weights=tmp_path / name)
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*of another network") as caught:
        load_features("inception", weights=tmp_path / "other.pth")
    assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match="needs --features inception"):
        load_features("digits-cnn", weights=tmp_path / "other.pth")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_inception_weights_that_could_hang_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cannot read Inception weights.*not a regular file"):
        load_features("inception", weights=path)


def test_inception_from_a_file(tmp_path: Path, monkeypatch) -> None:
    """Random weights in a file: plumbing, grey images, and the name "FID" for the true ones only."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    state: dict[str, torch.Tensor] = {}
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        downloaded = load_features("inception")
    assert (downloaded.name, downloaded.dim) == ("FID", 2048)
    path = tmp_path / "mine.pth"
    torch.save(downloaded.module.extractor.state_dict(), path)
    network = load_features("inception", weights=path)
    assert network.name == "FD (inception, mine)"
    grey = random_images(1, 1, 16, 16)
    found_ND = network(grey)
    assert found_ND.shape == (1, 2048)
    assert torch.equal(found_ND, downloaded.module.extractor(grey.repeat(1, 3, 1, 1))[0])
    with pytest.raises(UserError, match="1 or 3 channels; got 4"):
        network(random_images(1, 4, 16, 16))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    assert load_features("inception", weights=path).name == "FID"
