"""Exported files: the model's function for any batch, its zeros still there, and no path of here."""

import shutil
import sys
import zipfile
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import made_once, tiny_folder
from torch import nn

from prunedm.deployment.description import FILE, file_hash, read_description
from prunedm.deployment.runtimes import open_model
from prunedm.deployment.zeros import check_zeros
from prunedm.errors import UserError
from prunedm.folder import load, save
from prunedm.masks import Masks, Pattern
from prunedm.networks.layers import to_groups
from prunedm.options import EvaluateOptions, ExportOptions, PruneOptions
from prunedm.progress import Silent
from prunedm.record import Record, read_record
from prunedm.removal.nm import nm_mask
from prunedm.stages import export, prune
from prunedm.stages.evaluating.measure import measure, read_evaluation, read_steps
from prunedm.stages.exporting import onnx as onnx_format
from prunedm.stages.exporting import tensorrt, torch_program
from prunedm.stages.exporting.onnx import onnx_arrays
from prunedm.stages.exporting.openvino import OpenVinoDenoiser, openvino_arrays, to_openvino
from prunedm.stages.verbs.compare import yardstick

CLASSES = 10
MODEL = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "attention_head_dim": 8,
    "num_class_embeds": CLASSES,
}
LAYERS = 35  # with masks, of `masked()`
TWO_OF_FOUR = Pattern(2, 4)
INT8 = {
    "precision": "int8",
    "tolerance": 0.5,  # the weights are random
    "problems": 16,
    "calibration_problems": 16,
    "sampling_steps": 2,
}


@cache
def masked() -> Path:
    """A model folder of random weights, 2:4 in every layer that takes it; tests only read it."""

    def make(folder: Path) -> None:
        options = PruneOptions(mechanism="nm", score="magnitude", pictures=0, device="cpu")
        prune(tiny_folder(**MODEL), folder, options)

    return made_once("masked", make)


@cache
def exported(format: str, precision: str = "fp32", **options) -> Path:
    """`masked` in a format; tests only read it."""
    chosen = {"format": format, "precision": precision, "device": "cpu"} | options
    name = f"{format}-{precision}-{len(options)}"
    return made_once(name, lambda folder: export(masked(), folder, ExportOptions(**chosen)))


def written_before(monkeypatch, change=None) -> None:
    """ONNX files from here on are the one that was written already, changed: it takes seconds."""
    source = exported("onnx") / "model.onnx"

    def copy(graph, inputs, path, *, opset):
        shutil.copy(source, path)
        if change is not None:
            change(path)

    monkeypatch.setattr(onnx_format, "write_onnx", copy)


def inputs(count: int) -> list[torch.Tensor]:
    noise = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))
    return [noise, torch.linspace(0, 999, count), torch.arange(count) % CLASSES]


@torch.no_grad()
def error(folder: Path, count: int) -> float:
    """Relative, of the exported model's output."""
    given = inputs(count)
    due = load(masked()).denoiser(*given, return_dict=False)[0]
    output = open_model(folder).denoiser(*given)[0]
    assert output.dtype == torch.float32
    assert output.shape == due.shape
    return float((output - due).norm() / due.norm())


def record(folder: Path) -> Record:
    found = read_record(folder)
    assert found is not None
    return found


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


COMMON = {"config.json", "export.json", "record.json", "scheduler/scheduler_config.json"}


# ------------------------------------------------------------------------------ the zeros


def masks_for(**weights: np.ndarray) -> Masks:
    """2:4 masks by magnitude, applied to the weights in place."""
    found = {}
    for name, w in weights.items():
        found[name] = nm_mask(torch.from_numpy(np.abs(w)), TWO_OF_FOUR)
        np.copyto(w, 0, where=~found[name].numpy())
    return Masks.uniform(found, TWO_OF_FOUR)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 3), (5, 8, 1, 1)])
def test_zeros_are_found_by_name_and_under_any_name(shape):
    w = weight(*shape)
    masks = masks_for(layer=w)
    others = [("a", weight(*shape, seed=1)), ("b", weight(*shape[1:])), ("c", np.float32(3))]
    for name in ("layer.weight", "unet.layer.weight", "val_17"):
        assert check_zeros([*others, (name, w)], masks, "file") == 1


def test_zeros_are_found_in_a_transposed_linear_weight_and_in_int8():
    w = weight(12, 8)
    masks = masks_for(layer=w)
    assert check_zeros([("val_3", w.T)], masks, "file") == 1
    scaled = np.round(w * 40).astype(np.int8)
    assert check_zeros([("layer.weight_quantized", scaled)], masks, "file") == 1
    with pytest.raises(UserError, match="has lost the zeros of layer"):
        check_zeros([("layer.weight_quantized", scaled + np.int8(1))], masks, "file")


def test_a_square_weight_may_be_transposed():
    w = weight(8, 8)
    masks = masks_for(layer=w)
    assert check_zeros([("x", w.T)], masks, "file") == 1


def test_two_layers_of_one_shape_each_want_an_array():
    first, second = weight(8, 8), weight(8, 8, seed=1)
    masks = masks_for(first=first, second=second)
    assert check_zeros([("y", second), ("x", first)], masks, "file") == 2
    with pytest.raises(UserError, match="has lost the zeros of second"):
        check_zeros([("x", first), ("y", weight(8, 8, seed=2))], masks, "file")
    with pytest.raises(UserError, match="has lost the zeros of second"):
        check_zeros([("x", first)], masks, "file")


def test_equal_masks_of_two_layers_take_one_array_each():
    first = weight(8, 8)
    masks = masks_for(first=first)
    both = Masks.uniform({"first": masks.by_layer["first"], "second": masks.by_layer["first"]},
                         TWO_OF_FOUR)  # fmt: skip
    assert check_zeros([("x", first), ("y", 2 * first)], both, "file") == 2
    with pytest.raises(UserError, match="zeros of second"):
        check_zeros([("x", first)], both, "file")


@pytest.mark.parametrize("where", [0, -1])
def test_one_destroyed_zero_is_told_with_its_layer(where):
    w = weight(12, 8, 3, 3)
    masks = masks_for(layer=w)
    spoilt = w.copy()
    spoilt[tuple(np.argwhere(~masks.by_layer["layer"].numpy())[where])] = 1e-6
    message = r"model.onnx has lost the zeros of layer: no weight of shape \(12, 8, 3, 3\)"
    with pytest.raises(UserError, match=message):
        check_zeros([("layer.weight", spoilt)], masks, "model.onnx")


def test_a_group_with_three_kept_is_not_two_of_four():
    w = weight(4, 8)
    mask = masks_for(layer=w).by_layer["layer"].clone()
    mask[0, :4] = torch.tensor([True, True, True, False])
    w[0, :4] = [1, 2, 3, 0]
    with pytest.raises(UserError, match="file: the weight of layer is not 2:4 in the file"):
        check_zeros([("layer.weight", w)], Masks.uniform({"layer": mask}, TWO_OF_FOUR), "file")
    assert check_zeros([("layer.weight", w)], Masks({"layer": mask}), "file") == 1


# --------------------------------------------------------------------------------- packed


def test_packed_loads_to_the_same_weights_and_masks():
    folder = exported("packed")
    assert names(folder) == COMMON | {"packed.safetensors"}
    due, found = load(masked()), load(folder)
    state = found.denoiser.state_dict()
    assert state.keys() == due.denoiser.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in due.denoiser.state_dict().items())
    assert found.masks is not None
    assert found.masks.patterns == due.masks.patterns
    assert all(torch.equal(found.masks.by_layer[name], mask) for name, mask in due.masks)
    assert found.scheduler.config == due.scheduler.config
    about = read_description(folder)
    assert (about.format, about.precision, about.pattern) == ("packed", "fp32", "2:4")
    assert (about.relative_error, about.largest_error) == (0, 0)
    assert record(folder).figures["bytes"] == (folder / "packed.safetensors").stat().st_size
    assert record(folder).history[-1].stage == "prune"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_packed_in_half_precision_rounds_once(precision, dtype):
    due, found = load(masked()), load(exported("packed", precision))
    assert found.dtype == dtype
    for name, tensor in due.denoiser.state_dict().items():
        own = found.denoiser.state_dict()[name]
        assert own.dtype == tensor.dtype  # arithmetic is float32 as everywhere
        assert torch.equal(own, tensor.to(dtype).float())


def test_packed_in_int8_needs_no_images():
    folder = exported("packed", "int8")
    assert 0 < record(folder).figures["relative_error"] < 0.2
    assert set(record(folder).inputs) == {"model"}


def test_a_packed_folder_has_a_hash_of_its_own():
    hashes = {load(exported("packed", p)).hash for p in ("fp32", "fp16", "bf16")}
    assert len(hashes | {load(masked()).hash}) == 4


def test_a_packed_folder_can_be_measured(tmp_path):
    options = EvaluateOptions(depth="quick", problems=8, device="cpu")
    found = {}
    for folder in (exported("packed"), masked()):
        model = load(folder)
        measure(model, tmp_path / folder.name, folder.name, yardstick(model, options, Silent()))
        assert not [s for s in read_steps(tmp_path / folder.name) if s.status == "failed"]
        found[folder] = read_evaluation(tmp_path / folder.name).figures
    packed, due = found.values()
    assert packed.bytes_disk == (exported("packed") / "packed.safetensors").stat().st_size
    assert packed.loss == due.loss
    assert (packed.sparsity, packed.params, packed.macs) == (due.sparsity, due.params, due.macs)


# ----------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_is_the_model_for_any_batch(count):
    assert error(exported("onnx"), count) < 1e-5


def test_onnx_folder_and_its_description():
    import onnx

    folder = exported("onnx")
    assert names(folder) == COMMON | {"model.onnx"}
    about, model = read_description(folder), onnx.load(str(folder / "model.onnx"))
    assert about.opset == next(o.version for o in model.opset_import if o.domain == "") == 18
    batch = about.shapes["sample"][0]
    assert isinstance(batch, str)
    assert about.shapes == {
        "sample": [batch, 1, 16, 16],
        "timestep": [batch],
        "class_labels": [batch],
        "output": [batch, 1, 16, 16],
    }
    assert about.files == {"model.onnx": file_hash(folder / "model.onnx")}
    assert about.source.hash == load(masked()).hash
    assert about.relative_error == record(folder).figures["relative_error"] <= about.tolerance
    assert record(folder).figures["runtime"].startswith("ONNX Runtime CPU")


def test_onnx_holds_the_zeros():
    masks = load(masked()).masks
    arrays = dict(onnx_arrays(exported("onnx") / "model.onnx"))
    assert check_zeros(arrays.items(), masks, "model.onnx") == len(masks.by_layer)
    own = {layer: arrays[f"unet.{layer}.weight"] for layer, mask in masks if mask.ndim == 4}
    assert own  # convolutions keep their names
    for layer, array in own.items():
        kept = torch.from_numpy(array != 0)
        assert torch.equal(kept, masks.by_layer[layer]), layer


def spoil(path: Path) -> None:
    """One masked weight of the middle block is no longer zero."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if "mid_block.resnets.0.conv1" in t.name)
    array = numpy_helper.to_array(tensor).copy()
    array[tuple(np.argwhere(array == 0)[0])] = 1e-7  # no output would show it
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, str(path))


def test_an_exporter_that_loses_a_zero_is_found_out(monkeypatch, tmp_path):
    written_before(monkeypatch, spoil)
    with pytest.raises(UserError, match=r"zeros of mid_block.resnets.0.conv1: no weight of shape"):
        export(masked(), tmp_path / "out", ExportOptions(format="onnx", device="cpu"))
    assert list(tmp_path.iterdir()) == []


def scale(path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("conv_out.weight"))
    array = numpy_helper.to_array(tensor) * 1.01
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    onnx.save(model, str(path))


def test_a_file_that_computes_something_else_is_found_out(monkeypatch, tmp_path):
    written_before(monkeypatch, scale)
    with pytest.raises(
        UserError, match=r"relative error of 0\.0\d+, above the tolerance of 0\.0001"
    ):
        export(masked(), tmp_path / "out", ExportOptions(format="onnx", device="cpu"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_in_fp16_and_another_opset():
    import onnx

    folder = exported("onnx", "fp16", opset=20)
    assert error(folder, 5) < 0.01
    model = onnx.load(str(folder / "model.onnx"))
    assert next(o.version for o in model.opset_import if o.domain == "") == 20
    assert read_description(folder).opset == 20
    half = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert sum(np.prod(t.dims) for t in half) > 10_000
    assert check_zeros(onnx_arrays(folder / "model.onnx"), load(masked()).masks, "f") == LAYERS


@pytest.fixture(scope="module")
def onnx_int8():
    with pytest.MonkeyPatch.context() as patch:
        written_before(patch)
        return exported("onnx", **INT8)


def quality(figures: dict) -> None:
    assert figures["loss"] - figures["loss_before"] == pytest.approx(figures["loss_change"])
    assert abs(figures["loss_change"]) < 0.2 * figures["loss_before"]
    assert figures["loss_change_se"] > 0
    assert figures["loss_se"] > 0


def test_onnx_int8_says_what_it_costs(onnx_int8):
    figures = record(onnx_int8).figures
    quality(figures)
    assert figures["features"] == "FD (digits-cnn)"
    assert figures["fd"] > 0
    assert figures["fd_before"] > 0
    assert figures["fd"] != figures["fd_before"]
    assert figures["fd_se"] > 0
    assert figures["psnr"] > 10
    assert figures["samples"] >= 300
    assert set(record(onnx_int8).inputs) >= {"model", "dataset"}


def test_onnx_int8_is_small_two_of_four_and_near(onnx_int8):
    assert names(onnx_int8) == COMMON | {"model.onnx"}
    assert 1e-4 < error(onnx_int8, 5) < 0.3
    masks = load(masked()).masks
    arrays = dict(onnx_arrays(onnx_int8 / "model.onnx"))
    small = {name: array for name, array in arrays.items() if array.dtype == np.int8}
    assert check_zeros(small.items(), masks, "file") == len(masks.by_layer)
    for layer, mask in masks:
        if mask.ndim == 4:
            array = small[f"unet.{layer}.weight_quantized"]
            assert int(to_groups(torch.from_numpy(array != 0), 4).sum(1).max()) <= 2
    ends = [name for name, array in arrays.items() if array.ndim >= 2 and array.dtype == np.int8
            and any(end in name for end in ("conv_in", "conv_out"))]  # fmt: skip
    assert ends == []
    for end in ("conv_in", "conv_out"):
        assert arrays[f"unet.{end}.weight"].dtype == np.float32


def test_int8_without_distances(monkeypatch, tmp_path):
    written_before(monkeypatch)
    options = ExportOptions(format="onnx", samples=0, device="cpu", **INT8)
    made, _ = export(masked(), tmp_path / "out", options)
    quality(made.figures)
    assert not {"fd", "psnr", "samples", "features"} & made.figures.keys()


# ------------------------------------------------------------------------------- OpenVINO


@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_openvino_is_the_model_for_any_batch(precision, most, count):
    assert error(exported("openvino", precision), count) < most


@pytest.mark.parametrize("threads", [2, 3])
@torch.no_grad()
def test_openvino_shares_a_batch_among_streams(threads):
    """13 images are no multiple of anything; every image is answered in its own place."""
    folder = exported("openvino")
    model = load(masked())
    denoiser = OpenVinoDenoiser(
        folder / "model.xml", model.denoiser.config, precision="fp32", threads=threads
    )
    for count in (13, 5, 16, 13, 9, 1):
        given = inputs(count)
        due = model.denoiser(*given, return_dict=False)[0]
        torch.testing.assert_close(denoiser(*given)[0], due, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_answers_of_two_calls_are_two_arrays():
    denoiser = open_model(exported("openvino")).denoiser
    first = denoiser(*inputs(5))[0]
    kept = first.clone()
    denoiser(-inputs(5)[0], *inputs(5)[1:])
    assert torch.equal(first, kept)


class Twice(nn.Module):
    """More channels out than in, as models that learn a variance have."""

    def forward(self, sample, timestep):
        return torch.cat([sample, sample * timestep.reshape(-1, 1, 1, 1)], 1)


def test_openvino_gives_all_channels():
    x, t = torch.randn(9, 1, 8, 8), torch.arange(9.0)
    model = to_openvino(Twice(), {"sample": x[:2], "timestep": t[:2]})
    config = {"in_channels": 1, "sample_size": 8, "out_channels": 2}
    denoiser = OpenVinoDenoiser(model, config, precision="fp32", threads=2)
    torch.testing.assert_close(denoiser(x, t)[0], Twice()(x, t))


def test_openvino_folder():
    folder = exported("openvino", "bf16")
    assert names(folder) == COMMON | {"model.xml", "model.bin"}
    about = read_description(folder)
    assert list(about.files) == ["model.xml", "model.bin"]
    assert about.file == "model.xml"
    assert record(folder).figures["runtime"].startswith("OpenVINO ")
    arrays = openvino_arrays(exported("openvino") / "model.xml")
    assert check_zeros(arrays, load(masked()).masks, "model.xml") == LAYERS
    # float16 on disk
    sizes = [(exported("openvino", p) / "model.bin").stat().st_size for p in ("bf16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.slow
def test_openvino_int8():
    folder = exported("openvino", samples=0, **INT8)
    quality(record(folder).figures)
    assert 1e-4 < error(folder, 5) < 0.3
    arrays = [(n, a) for n, a in openvino_arrays(folder / "model.xml") if a.dtype == np.int8]
    masks = load(masked()).masks
    assert len(arrays) >= len(list(masks))
    assert check_zeros(arrays, masks, "model.xml") == len(masks.by_layer)
    ends = {(8, 1, 3, 3), (1, 8, 3, 3)}  # conv_in, conv_out
    assert not ends & {array.shape for _, array in arrays}


# -------------------------------------------------------------------------- torch, TensorRT


@pytest.mark.slow  # a second export; `check_zeros` has tests of its own
def test_a_program_that_lost_a_zero_is_found_out(monkeypatch, tmp_path):
    def spoilt(graph, inputs, path):
        shutil.copy(exported("torch") / "model.pt2", path)

    arrays = [
        (n, a.copy()) for n, a in torch_program.program_arrays(exported("torch") / "model.pt2")
    ]
    assert check_zeros(arrays, load(masked()).masks, "model.pt2") == LAYERS
    array = dict(arrays)["unet.mid_block.resnets.0.conv1.weight"]
    array[tuple(np.argwhere(array == 0)[0])] = 1e-7
    monkeypatch.setattr(torch_program, "write_program", spoilt)
    monkeypatch.setattr(torch_program, "program_arrays", lambda path: arrays)
    with pytest.raises(
        UserError, match=r"model.pt2 has lost the zeros of mid_block.resnets.0.conv1"
    ):
        export(masked(), tmp_path / "out", ExportOptions(format="torch", device="cpu"))
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_torch_program_runs_without_prunedm():
    folder = exported("torch")
    assert names(folder) == COMMON | {"model.pt2"}
    program = torch.export.load(folder / "model.pt2").module()
    denoiser = load(masked()).denoiser
    for count in (2, 5):
        given = inputs(count)
        due = denoiser(*given, return_dict=False)[0]
        torch.testing.assert_close(program(*given), due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_no_file_tells_of_this_machine(format):
    here = {
        str(Path(torch.__file__).parent.parent),
        str(Path(__file__).parent.parent),
        str(masked().parent),
    }
    for path in exported(format).iterdir():
        if not path.is_file() or path.name in ("record.json", FILE):  # they say where the model was
            continue
        contents = [path.read_bytes()]
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for text in here:
            assert not any(text.encode() in content for content in contents), (path.name, text)


def test_tensorrt_without_tensorrt_is_onnx_and_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    written_before(monkeypatch)
    options = ExportOptions(format="tensorrt", batch_size=8, device="cpu")
    made, _ = export(masked(), tmp_path / "out", options)
    assert names(tmp_path / "out") == COMMON | {"model.onnx", "build_engine.sh"}
    command = made.figures["command"]
    assert command == (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --sparsity=enable --fp16 "
        "--minShapes=sample:1x1x16x16,timestep:1,class_labels:1 "
        "--optShapes=sample:8x1x16x16,timestep:8,class_labels:8 "
        "--maxShapes=sample:8x1x16x16,timestep:8,class_labels:8"
    )
    assert (tmp_path / "out" / "build_engine.sh").read_text() == f"#!/bin/sh\n{command}\n"
    assert "not installed" in made.figures["engine"]
    about = read_description(tmp_path / "out")
    assert (about.format, about.precision, about.pattern) == ("tensorrt", "fp16", "2:4")
    with pytest.raises(UserError, match="is a tensorrt export, which prunedm does not run"):
        open_model(tmp_path / "out")


class FakeTensorRT:
    """As much of TensorRT's Python package as is called, keeping what it was told."""

    def __init__(self, *, reads: bool = True, builds: bool = True) -> None:
        self.flags: list[str] = []
        self.shapes: dict[str, tuple] = {}
        self.parsed = b""
        self.profiles: list[object] = []
        profile = SimpleNamespace(set_shape=self._set_shape)
        config = SimpleNamespace(
            set_flag=self.flags.append, add_optimization_profile=self.profiles.append
        )
        self.profile, self.config, self.reads = profile, config, reads
        builder = SimpleNamespace(
            create_network=lambda flags: "network",
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, own: memoryview(b"plan") if builds else None,
        )
        logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
        self.module = ModuleType("tensorrt")
        self.module.__spec__ = ModuleSpec("tensorrt", None)
        self.module.__dict__.update(
            Logger=logger,
            Builder=lambda logger: builder,
            OnnxParser=lambda network, logger: SimpleNamespace(
                parse=self._parse,
                get_error=lambda index: SimpleNamespace(desc=lambda: "no importer for Sonderling"),
            ),
            BuilderFlag=SimpleNamespace(SPARSE_WEIGHTS="sparse", FP16="half"),
        )

    def _set_shape(self, name: str, *shapes: tuple) -> None:
        self.shapes[name] = shapes

    def _parse(self, content: bytes) -> bool:
        self.parsed = content
        return self.reads


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp16", ["sparse", "half"]), ("fp32", ["sparse"])]
)
def test_tensorrt_builds_a_sparse_engine(monkeypatch, tmp_path, precision, flags):
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    written_before(monkeypatch)
    options = ExportOptions(format="tensorrt", precision=precision, batch_size=4, device="cpu")
    made, _ = export(masked(), tmp_path / "out", options)
    assert fake.flags == flags
    assert fake.profiles == [fake.profile]
    assert fake.shapes == {
        "sample": ((1, 1, 16, 16), (4, 1, 16, 16), (4, 1, 16, 16)),
        "timestep": ((1,), (4,), (4,)),
        "class_labels": ((1,), (4,), (4,)),
    }
    assert fake.parsed == (tmp_path / "out" / "model.onnx").read_bytes()
    assert (tmp_path / "out" / "model.engine").read_bytes() == b"plan"
    assert list(read_description(tmp_path / "out").files) == ["model.onnx", "model.engine"]
    assert "engine" not in made.figures


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"reads": False}, "no importer for Sonderling"),
        ({"builds": False}, "cannot build an engine"),
    ],
)
def test_tensorrt_that_fails_is_one_line(monkeypatch, tmp_path, fails, message):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(**fails).module)
    written_before(monkeypatch)
    options = ExportOptions(format="tensorrt", device="cpu")
    with pytest.raises(UserError, match=message) as caught:
        export(masked(), tmp_path / "out", options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["1:4", "unstructured"])
def test_tensorrt_wants_two_of_four(tmp_path, kind):
    model = load(tiny_folder())
    name, layer = next(
        (n, m) for n, m in model.denoiser.named_modules()
        if isinstance(m, nn.Conv2d) and n.startswith("mid_block")
    )  # fmt: skip
    mask = nm_mask(layer.weight.detach().abs(), Pattern(1, 4))
    model.masks = Masks({name: mask}, {name: Pattern(1, 4)} if kind == "1:4" else {})
    model.masks.apply_(model.denoiser)
    save(model, tmp_path / "model")
    with pytest.raises(UserError, match=f"tensorrt: the masks of {name} are {kind}, .* 2:4 only"):
        export(tmp_path / "model", tmp_path / "out", ExportOptions(format="tensorrt"))
    assert not (tmp_path / "out").exists()
