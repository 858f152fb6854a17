"""Exported modules as feature networks: the same numbers as the module, and no code from the file."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.evaluation.exported import is_exported, load_exported
from prunedm.evaluation.features import extract, load_features


class Net(nn.Module):
    """What feature extractors do: convolve, resize, split, merge, change in place, read constants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # a constant, no buffer
        self.register_buffer("shift", torch.arange(5.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.convolution(x.float() / 127.5 - 1)).relu_()
        h = nn.functional.interpolate(h, size=(4, 4), mode="bilinear", antialias=True)
        h = h.reshape(x.shape[0], 8, -1).mean(-1)
        a, b = h.chunk(2, 1)
        h = self.linear(torch.cat([b, a], 1)) * self.scale + self.shift
        best, _ = h.max(dim=1, keepdim=True)
        return torch.cat([h, best, torch.ones(x.shape[0] * 2, 1)[: x.shape[0]]], 1)


def images(count: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def exported(
    module: nn.Module, folder: Path, example: torch.Tensor | None = None, *, fixed: bool = False
) -> Path:
    shapes = None if fixed else ({0: torch.export.Dim("n")},)
    program = torch.export.export(
        module, (images(2) if example is None else example,), dynamic_shapes=shapes
    )
    torch.export.save(program, folder / "net.pt2")
    return folder / "net.pt2"


def edited(path: Path, change: Callable[[str, Any], Any], name: str = "edited.pt2") -> Path:
    """A copy in which `change` got every JSON record, and gave another, or None to keep it."""
    out = path.with_name(name)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.namelist():
            raw = old.read(record)
            if record.endswith(".json"):
                content = json.loads(raw)
                change(record, content)
                raw = json.dumps(content).encode()
            new.writestr(record, raw)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return exported(Net().eval(), folder)


def test_gives_what_the_module_gives_for_any_batch(path: Path) -> None:
    network = load_features(path)
    assert (network.name, network.dim) == ("FD (net)", None)
    module = Net().eval()
    for count in (1, 2, 5):
        with torch.no_grad():
            expected = module(images(count))
        torch.testing.assert_close(network(images(count)), expected, rtol=1e-6, atol=1e-6)
    assert extract(network, images(5).split(2)).shape == (5, 7)


def test_agrees_with_torchs_own_loader(path: Path) -> None:
    theirs = torch.export.load(path).module()
    with torch.no_grad():
        torch.testing.assert_close(load_exported(path)(images(3)), theirs(images(3)))


def test_values_are_dropped_after_their_last_use(path: Path) -> None:
    module = load_exported(path)
    dropped = [name for spent in module.spent for name in spent]
    assert len(dropped) == len(set(dropped))
    assert module.output not in dropped
    assert module.input in dropped


def test_is_told_from_torchscript(path: Path, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Identity()), str(tmp_path / "script.pt"))
    (tmp_path / "text.pt").write_text("text")
    assert is_exported(path)
    assert not is_exported(tmp_path / "script.pt")
    assert not is_exported(tmp_path / "text.pt")


def test_images_of_another_shape_are_refused(path: Path) -> None:
    for other in (images(2, size=16), images(2, channels=1)):
        with pytest.raises(UserError, match=r"exported for images of shape \(3, 8, 8\)"):
            load_features(path)(other)


def test_modules_that_would_give_wrong_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch of fixed size"):
        load_exported(exported(Net().eval(), tmp_path, fixed=True))
    with pytest.raises(UserError, match="training mode"):
        load_exported(exported(Net().train(), tmp_path))
    with pytest.raises(UserError, match="takes no uint8 images"):
        load_exported(exported(Net().eval(), tmp_path, images(2).float()))

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.float().flatten(1), x.float().mean((2, 3))

    with pytest.raises(UserError, match="gives 2 outputs"):
        load_exported(exported(Two(), tmp_path))


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__.__init__",
        "torch.ops.higher_order.cond",
        "torch.ops.aten.relu",
        "_operator.attrgetter",
        "builtins.eval",
    ],
)
def test_only_tensor_operators_are_run(path: Path, target: str) -> None:
    def change(record: str, content: Any) -> None:
        if record.endswith("model.json"):
            content["graph_module"]["graph"]["nodes"][-1]["target"] = target

    with pytest.raises(UserError, match="only ATen operators"):
        load_features(edited(path, change))


def test_pickles_in_the_file_are_not_opened(path: Path) -> None:
    def change(record: str, content: Any) -> None:
        if record.endswith("weights_config.json"):
            next(iter(content["config"].values()))["use_pickle"] = True

    with pytest.raises(UserError, match="pickled"):
        load_features(edited(path, change))


def test_expressions_in_the_file_are_not_evaluated(path: Path, tmp_path: Path) -> None:
    """torch's loader gives these to sympify and exec."""
    mark = tmp_path / "mark"
    attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def change(record: str, content: Any) -> None:
        if record.endswith("model.json"):
            graph = content["graph_module"]["graph"]
            graph["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = attack
            content["guards_code"] = [attack]

    load_features(edited(path, change))(images(2))
    assert not mark.exists()


def test_damaged_files_and_other_versions_are_refused(path: Path, tmp_path: Path) -> None:
    def older(record: str, content: Any) -> None:
        if record.endswith("model.json"):
            content["schema_version"]["major"] = 7

    with pytest.raises(UserError, match="export schema 7"):
        load_features(edited(path, older))

    def holed(record: str, content: Any) -> None:
        if record.endswith("model.json"):
            del content["graph_module"]["graph"]["nodes"][-1]["inputs"]

    with pytest.raises(UserError, match=r"edited\.pt2.*damaged"):
        load_features(edited(path, holed))
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(UserError, match=r"old\.pt2.*torch 2\.8 or later"):
        load_features(tmp_path / "old.pt2")


def test_a_graph_that_fails_says_so(path: Path) -> None:
    def change(record: str, content: Any) -> None:
        if record.endswith("model.json"):
            nodes = content["graph_module"]["graph"]["nodes"]
            relu = next(n for n in nodes if "relu" in n["target"])
            relu["inputs"][0]["arg"] = {"as_int": 3}

    with pytest.raises(UserError, match="cannot take images"):
        load_features(edited(path, change))(images(2))
