"""TorchScript of others: what only computes is run, and nothing else without the user's word."""

from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import pytest
import torch
from helpers import noise_images
from safetensors.torch import save_file
from torch import nn

from prunedm.errors import UserError
from prunedm.evaluation import torchscript
from prunedm.evaluation.features import load_digits_cnn, load_features
from prunedm.options import EvaluateOptions, FidOptions
from prunedm.stages.distance import _network
from prunedm.stages.evaluating.quality import with_features

IMAGES = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8)


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1)


class Network(nn.Module):
    """Submodules with numbers for names, modes as texts, checks with messages, control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.GELU("tanh"), nn.MaxPool2d(2))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4:
            raise ValueError(f"{x.dim()} dimensions")
        x = nn.functional.interpolate(x.float() / 255, size=(12, 12), mode="bilinear")
        x = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return torch.einsum("nchw->nc", self.layers(x))


def written(place: Path, forward: str, **more: str) -> Path:
    """A file of `Flat` with other lines in its `forward`, and more lines after it."""
    path = place / "evil.pt"
    torch.jit.script(Flat()).save(str(place / "flat.pt"))
    with ZipFile(place / "flat.pt") as archive, ZipFile(path, "w", ZIP_STORED) as new:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".py"):
                head, body = content.decode().split("    return", 1)
                content = (
                    head + f"    {forward}\n    return" + body + more.get("after", "")
                ).encode()
            new.writestr(name, content)
    return path


class Saving(nn.Module):
    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.target)
        return x.float().flatten(1)


class Loading(nn.Module):
    """Runs while it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.target, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(state[0], state[0])


LINES = {
    "a function": 'torch.save(x, "{target}")',
    "a method": 'x.save("{target}")',
    "a name of two texts": 'getattr(torch, "sa" "ve")(x, "{target}")',
    "a name by escapes": 'getattr(torch, "sa\\166e")(x, "{target}")',
    "another name": 'keep = torch.save\n    keep(x, "{target}")',
    "a namespace": "y = ops.cuda.synchronize(0)",
    "Python": "y = ops.prim.PythonOp(x)",
    "its own name": 'o = ops\n    o.aten.save(x, "{target}")',
    "a comment between": 'torch. # where?\n    save(x, "{target}")',
    "a class of C++": "y = __torch__.torch.classes.quantized.LinearPackedParamsBase(x)",
    "a remote call": 'y = rpc_sync("worker", x)',
    "other letters": 'y = "\u017fave"',
}


def evil(kind: str, place: Path) -> tuple[Path, Path]:
    """A file that writes (or tries to write) another one, and that one."""
    path, target = place / "evil.pt", place / "target"
    if kind in LINES:
        return written(place, LINES[kind].format(target=target)), target
    module = (Loading if kind == "while loading" else Saving)(str(target))
    torch.jit.script(module).save(str(path))
    target.unlink(missing_ok=True)
    return path, target


@pytest.mark.parametrize("kind", ["when called", "while loading", *LINES])
def test_a_file_that_could_do_more_runs_only_when_trusted(kind, tmp_path):
    path, target = evil(kind, tmp_path)
    with pytest.raises(UserError, match="--trust-features") as caught:
        load_features(path)
    assert not target.exists()
    text = str(caught.value).replace(str(tmp_path), "")
    assert len(text) < 300
    assert "\n" not in text


REAL = ("when called", "while loading", "a function", "a name of two texts", "a name by escapes")


@pytest.mark.parametrize("kind", REAL)
def test_the_risk_is_real(kind, tmp_path):
    path, target = evil(kind, tmp_path)
    network = load_features(path, trust=True)
    assert network(IMAGES).shape == (2, 192)
    assert target.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", ["whole", "renamed", "damaged"])
def test_files_of_torch_export_are_refused_with_the_way_to_convert(kind, trust, tmp_path):
    path = tmp_path / "net.pt2"
    program = torch.export.export(Flat(), (IMAGES,))
    torch.export.save(program, path)
    if kind == "renamed":
        path = path.rename(tmp_path / "net.zip")
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path.name}' is a file of torch.export") as caught:
        load_features(path, trust=trust)
    assert "torch.jit.save(torch.jit.trace(network.eval(), images_uint8)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluate_and_fid_want_the_word_too(tmp_path):
    path, target = evil("while loading", tmp_path)
    images, few = noise_images(400, channels=3), {"features": str(path), "samples": 400}
    for call in (
        lambda **trust: with_features(EvaluateOptions(**few, **trust), images),
        lambda **trust: _network(FidOptions(features=str(path), **trust)),
    ):
        with pytest.raises(UserError, match="--trust-features"):
            call()
        assert not target.exists()
        call(trust_features=True)
        target.unlink()


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, IMAGES)])
@pytest.mark.parametrize("module", [Flat(), Network().eval()])
def test_a_network_runs_as_it_is(make, module, tmp_path):
    make(module).save(str(tmp_path / "net.pt"))
    found = load_features(tmp_path / "net.pt")
    assert torch.equal(found(IMAGES), torch.jit.load(str(tmp_path / "net.pt"))(IMAGES))


def test_what_is_loaded_is_what_was_read(tmp_path):
    """An archive whose directory Python and PyTorch find in different places, or that has two."""
    path, target = evil("while loading", tmp_path)
    content = path.read_bytes()
    torch.jit.script(Flat()).save(str(tmp_path / "plain.pt"))
    path.write_bytes(content + (tmp_path / "plain.pt").read_bytes())  # Python reads the second
    assert load_features(path)(IMAGES).shape == (2, 192)
    assert not target.exists()
    with ZipFile(tmp_path / "plain.pt", "a") as archive:
        archive.writestr("plain/DATA.pkl", "")
    with pytest.raises(UserError, match=r"twice.*--trust-features"):
        load_features(tmp_path / "plain.pt")


def test_operators_that_take_texts_have_been_looked_at():
    """Those of this PyTorch that may be called, but for modes and texts, name no file."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")]
    files = {
        s.name.removeprefix("aten::")
        for s in schemas
        if any("filename" in a.name for a in s.arguments)
    }
    assert files >= {"save", "from_file"}
    assert not files & torchscript._TEXTS
    assert all(torchscript._may_open(name) for name in ("save", "from_file", "rpc_sync"))


def test_weights_of_the_embedded_architecture_are_data(tmp_path):
    save_file(load_digits_cnn().state_dict(), tmp_path / "mine.safetensors")
    network = load_features(tmp_path / "mine.safetensors")
    grey = IMAGES[:, :1].repeat(1, 1, 2, 2)
    assert network.name == "FD (mine)"
    assert torch.equal(network(grey), load_features("digits-cnn")(grey))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("other", "text"):
        with pytest.raises(UserError, match=f"{name}.safetensors.*does not hold the weights"):
            load_features(tmp_path / f"{name}.safetensors")
