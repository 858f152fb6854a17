"""The export stage: sampling from what it wrote, its refusals, and the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Killed, noise_images, tiny_folder, tiny_model
from test_export_files import exported, masked, names, written_before
from test_sampling import pngs, watched
from torch import nn

from prunedm.cli import main
from prunedm.deployment.description import FILE, Description, read_description, write_description
from prunedm.deployment.runtimes import ExportedDenoiser, open_model
from prunedm.errors import UserError
from prunedm.folder import Model, load, save
from prunedm.options import (
    EvaluateOptions,
    ExportOptions,
    PruneOptions,
    SampleOptions,
)
from prunedm.progress import Silent
from prunedm.record import Source, read_record
from prunedm.stages import evaluate, export, prune, sample
from prunedm.stages.exporting import job as job_module
from prunedm.stages.exporting.job import ExportJob
from prunedm.stages.exporting.onnx import OnnxDenoiser
from prunedm.stages.exporting.openvino import OpenVinoDenoiser
from prunedm.stages.pruning.job import PruneJob
from prunedm.tables import FORMATS, MECHANISMS

QUICK = SampleOptions(count=7, batch_size=3, sampling_steps=3, device="cpu")
PACKED = ExportOptions(format="packed", precision="fp32", device="cpu")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2).clip(1e-9)))


# -------------------------------------------------------------------- sampling from a file


@pytest.fixture(scope="module")
def due(tmp_path_factory) -> np.ndarray:
    """Images of the model itself."""
    out = tmp_path_factory.mktemp("sample") / "out"
    sample(masked(), out, QUICK)
    return pngs(out)


@pytest.mark.parametrize(("format", "runtime"), [("onnx", "ONNX Runtime CPU fp32"),
                                                 ("openvino", "OpenVINO f32")])  # fmt: skip
def test_images_from_a_file_are_those_of_the_model(format, runtime, due, tmp_path):
    record, _ = sample(exported(format), tmp_path / "out", QUICK)
    assert psnr(pngs(tmp_path / "out"), due) > 40
    assert len(np.unique(due)) > 20  # no grey images that anything would equal
    assert record.figures == {"images": 7, "runtime": runtime}
    assert record.inputs["model"].path == str(exported(format))
    assert [r.stage for r in record.history] == ["prune", "export"]


def test_every_image_gets_its_class(due, tmp_path):
    one = QUICK.model_copy(update={"label": 1})
    sample(exported("onnx"), tmp_path / "file", one)
    sample(masked(), tmp_path / "model", one)
    images = pngs(tmp_path / "file")
    assert psnr(images, pngs(tmp_path / "model")) > 40
    assert psnr(images[1], due[1]) > 40
    assert psnr(images[2], due[2]) < 40  # class 2 there
    with pytest.raises(UserError, match="label 10 is not below"):
        sample(exported("onnx"), tmp_path / "none", one.model_copy(update={"label": 10}))


def test_packed_samples_as_the_model_to_the_bit(due, tmp_path):
    record, _ = sample(exported("packed"), tmp_path / "out", QUICK)
    assert np.array_equal(pngs(tmp_path / "out"), due)
    assert record.figures == {"images": 7}


def test_an_interrupted_run_continues(monkeypatch, tmp_path):
    sample(exported("onnx"), tmp_path / "whole", QUICK)
    drawn = watched(monkeypatch, fail_at=1)
    with pytest.raises(Killed):
        sample(exported("onnx"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    sample(exported("onnx"), tmp_path / "out", QUICK)
    first, second, third = range(0, 3), range(3, 6), range(6, 9)
    assert drawn == [first, second, second, third]
    assert np.array_equal(pngs(tmp_path / "out"), pngs(tmp_path / "whole"))


def test_speed_fast_is_of_pytorch_alone(tmp_path):
    fast = QUICK.model_copy(update={"speed": "fast"})
    with pytest.raises(UserError, match=r"speed = fast compiles PyTorch models; .* leave --speed"):
        sample(exported("onnx"), tmp_path / "out", fast)
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_not_run_by_prunedm(tmp_path):
    with pytest.raises(UserError, match=r"is a torch export, .* --format onnx or openvino"):
        sample(fake_export(tmp_path, format="torch"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- the denoiser of a file


class Recording(ExportedDenoiser):
    """Answers with zeros, and keeps what a runtime would be given."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.given = inputs
        return np.zeros_like(inputs["sample"])

    @property
    def arithmetic(self) -> str:
        return "none"


def recording(**config) -> Recording:
    return Recording({"in_channels": 1, "sample_size": 8, "out_channels": 1} | config)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 8), (1, 1, 8, 9)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"takes images of shape \(1, 8, 8\), not \(") as caught:
        recording()(torch.zeros(shape), 3)
    assert str(shape[1:]) in str(caught.value)


def test_runtimes_get_float32_and_a_timestep_an_image():
    denoiser = recording(num_class_embeds=4)
    x = torch.zeros(3, 8, 8, 1, dtype=torch.float64).permute(0, 3, 1, 2)
    output = denoiser(x, torch.tensor(7), torch.tensor([0, 3, 1]))
    assert len(output) == 1
    assert {name: a.dtype for name, a in denoiser.given.items()} == {
        "sample": np.float32,
        "timestep": np.float32,
        "class_labels": np.int64,
    }
    assert denoiser.given["timestep"].tolist() == [7, 7, 7]
    denoiser(x, torch.tensor([1, 2, 999]), torch.tensor([0, 3, 1]))
    assert denoiser.given["timestep"].tolist() == [1, 2, 999]
    with pytest.raises(UserError, match="wants class labels"):
        denoiser(x, 7)


@pytest.mark.parametrize(("runtime", "name"), [(OnnxDenoiser, "ONNX Runtime"),
                                               (OpenVinoDenoiser, "OpenVINO")])  # fmt: skip
def test_a_file_that_is_no_model_is_refused(runtime, name, tmp_path):
    path = tmp_path / ("model.onnx" if runtime is OnnxDenoiser else "model.xml")
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match=f"{name} cannot open") as caught:
        runtime(path, {}, precision="fp32")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------ a damaged folder


def fake_export(place: Path, **changes) -> Path:
    """A folder with a description, and a file of nothing."""
    folder = place / "fake"
    shutil.copytree(exported("packed"), folder)
    (folder / "packed.safetensors").unlink()
    (folder / "model.bin").write_bytes(b"content")
    about = read_description(exported("packed")).model_dump()
    about |= {"format": "onnx", "files": {"model.bin": "ed7002b439e9ac84"}} | changes
    write_description(Description.model_validate(about), folder)
    return folder


def change_file(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"c0ntent")


def change_json(**values):
    def change(folder: Path) -> None:
        content = json.loads((folder / FILE).read_text())
        content = {k: v for k, v in (content | values).items() if v is not None}
        (folder / FILE).write_text(json.dumps(content))

    return change


DAMAGES = {
    "another version": (change_json(version=2), "version 2, this prunedm reads 1"),
    "no version": (change_json(version=None), "version None"),
    "no file": (lambda f: (f / "model.bin").unlink(), "has no model.bin"),
    "another file": (change_file, "model.bin is damaged or not the file that was exported"),
    "no JSON": (lambda f: (f / FILE).write_text("{"), "export.json is missing or damaged"),
    "a list": (lambda f: (f / FILE).write_text("[1]"), "export.json is missing or damaged"),
    "no text": (lambda f: (f / FILE).write_bytes(b"\xff\xfe"), "export.json is missing or damaged"),
    "unknown key": (change_json(extra=1), "export.json is damaged (extra: "),
    "no shapes": (change_json(shapes=None), "export.json is damaged (shapes: "),
    "wrong type": (change_json(tolerance="much"), "export.json is damaged (tolerance: "),
    "a path": (change_json(files={"../model.bin": "0"}), "has no ../model.bin"),
    "no files": (change_json(files={}), "export.json is damaged (files: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(damage, tmp_path):
    folder = fake_export(tmp_path)
    assert read_description(folder).file == "model.bin"
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError) as caught:
        open_model(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "export" in str(caught.value)  # the way out


def test_a_description_comes_back(tmp_path):
    about = Description(
        format="onnx",
        precision="fp16",
        files={"a.onnx": "0" * 16},
        shapes={"sample": ["batch", 1, 8, 8]},
        source=Source(path="digits", hash="1"),
        opset=18,
        relative_error=0.25,
        largest_error=2,
        tolerance=0.5,
    )
    (tmp_path / "a.onnx").write_bytes(b"")
    write_description(about, tmp_path)
    with pytest.raises(UserError, match="damaged"):  # the hash is made up
        read_description(tmp_path)
    own = about.model_copy(update={"files": {"a.onnx": "e3b0c44298fc1c14"}})  # SHA-256 of nothing
    write_description(own, tmp_path)
    assert read_description(tmp_path) == own


def test_stages_that_need_weights_refuse_an_exported_file(tmp_path):
    folder = fake_export(tmp_path)
    message = "is an exported file, which only `sample` takes; give the model folder"
    with pytest.raises(UserError, match=message):
        load(folder)
    with pytest.raises(UserError, match=message):
        evaluate(folder, tmp_path / "out", EvaluateOptions(device="cpu"))
    with pytest.raises(UserError, match=message):
        prune(folder, tmp_path / "out", PruneOptions(device="cpu"))
    with pytest.raises(UserError, match=message):
        export(folder, tmp_path / "out", PACKED)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- the stage


def test_done_already_and_overwrite(tmp_path):
    out = tmp_path / "out"
    first, made = export(masked(), out, PACKED)
    assert made
    again, made = export(masked(), out, PACKED)
    assert not made
    assert again == first == read_record(out)
    half = PACKED.model_copy(update={"precision": "fp16"})
    with pytest.raises(UserError, match=r"another precision \('fp32', now 'fp16'\).*--overwrite"):
        export(masked(), out, half)
    _, made = export(masked(), out, half, overwrite=True)
    assert made
    assert load(out).dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_left_out_is_filled_in():
    for name, kind in FORMATS.items():
        filled = ExportOptions(format=name).filled()
        assert filled.precision == kind.precisions[0]
        assert filled.tolerance is not None
    assert ExportOptions(tolerance=0.5, precision="int8").filled().tolerance == 0.5
    with pytest.raises(ValueError, match="torch takes no int8; there are fp32, fp16, bf16"):
        ExportOptions(format="torch", precision="int8")


@pytest.mark.parametrize(
    ("options", "missing", "extra"),
    [
        ({"format": "onnx"}, "onnxscript", "onnx"),
        ({"format": "tensorrt"}, "onnxruntime", "onnx"),
        ({"format": "openvino"}, "openvino", "openvino"),
        ({"format": "openvino", "precision": "int8"}, "nncf", "openvino"),
    ],
)
def test_a_missing_package_is_told_before_any_work(monkeypatch, tmp_path, options, missing, extra):
    monkeypatch.setattr(job_module, "find_spec", lambda name: None if name == missing else name)
    due = rf"{options['format']} needs {missing}; run: pip install 'prunedm\[{extra}\]'"
    with pytest.raises(UserError, match=due):  # the model is not even looked for
        export("/no/such/model", tmp_path / "out", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_when_sampling_too(monkeypatch, tmp_path):
    folder = fake_export(tmp_path)
    monkeypatch.setattr(job_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx needs .*; run: pip install 'prunedm\[onnx\]'"):
        sample(folder, tmp_path / "out", QUICK)


def test_a_tolerance_that_is_not_met_leaves_nothing(tmp_path):
    options = ExportOptions(format="packed", precision="fp16", tolerance=1e-9, device="cpu")
    message = r"packed.safetensors differs .* above the tolerance of 1e-09; .*--tolerance"
    with pytest.raises(UserError, match=message):
        export(masked(), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def job(folder: Path) -> ExportJob:
    return ExportJob(load(tiny_folder()), ExportOptions().filled(), folder, Silent(), None)


def test_an_output_that_is_no_number_is_over_every_tolerance(tmp_path):
    own = job(tmp_path)
    with torch.no_grad():
        due = own.model.denoiser(*own.inputs().values(), return_dict=False)[0]
    assert own.check(due, "file") == (0, 0)
    due[3, 0, 2, 2] = torch.nan
    with pytest.raises(UserError, match="file differs from the model by a relative error of nan"):
        own.check(due, "file")


def test_the_check_sees_every_timestep_range_and_class(tmp_path):
    inputs = job(tmp_path).inputs()
    assert inputs.keys() == {"sample", "timestep"}
    assert inputs["timestep"].min() == 0
    assert inputs["timestep"].max() == 999
    model = tiny_model(num_class_embeds=3)
    labels = ExportJob(model, ExportOptions(), tmp_path, Silent(), None).inputs()["class_labels"]
    assert set(labels.tolist()) == {0, 1, 2}


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    model = tiny_model(class_embed_type="timestep")
    assert model.conditional
    with pytest.raises(UserError, match=r"takes class labels as numbers; .*'timestep'"):
        ExportJob(model, ExportOptions(), tmp_path, Silent(), None).inputs()


class Bessel(nn.Module):
    """An operator that neither ONNX nor OpenVINO has."""

    def forward(self, sample, timestep, class_labels=None):
        return torch.special.bessel_j0(sample)


class Branching(nn.Module):
    """What it does depends on values, which a graph cannot."""

    def forward(self, sample, timestep, class_labels=None):
        return sample * 2 if sample.sum() > 0 else sample


@pytest.mark.parametrize(
    ("format", "module", "message"),
    [
        ("onnx", Bessel, "this model cannot be converted to ONNX: "),
        ("onnx", Branching, "this model cannot be converted to ONNX: "),
        ("openvino", Bessel, "this model cannot be converted to OpenVINO: "),
        ("torch", Branching, "torch.export cannot trace this model: "),
    ],
)
def test_what_a_format_cannot_say_is_one_line(monkeypatch, tmp_path, format, module, message):
    monkeypatch.setattr(ExportJob, "graph", lambda self: module())
    options = ExportOptions(format=format, precision="fp32", device="cpu")
    with pytest.raises(UserError) as caught:
        export(tiny_folder(), tmp_path / "out", options)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) > len(message) + 5
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_branch_that_tracing_took_for_fixed_is_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr(ExportJob, "graph", lambda self: Branching())
    with pytest.raises(UserError, match="differs from the model by a relative error"):
        export(tiny_folder(), tmp_path / "out", ExportOptions(format="openvino", device="cpu"))
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- the command line


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_says_what_was_written_how_far_it_is_and_what_is_next(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("export", masked(), out, "--precision", "fp32", "--device", "cpu") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    size = (out / "packed.safetensors").stat().st_size
    assert f"packed.safetensors: {size / 1e6:.2f} MB" in said
    assert "relative error 0.0e+00 (tolerance 0.0001), largest 0.0e+00" in said
    assert "2:4 found again in the file" in said
    assert f"next: prunedm sample {out} samples/".replace(" ", "") in said.replace(" ", "")
    assert names(out) >= {"packed.safetensors", "export.json"}


def test_the_command_for_an_engine_is_shown(monkeypatch, tmp_path, capsys):
    from prunedm.stages.exporting import tensorrt

    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    written_before(monkeypatch)
    assert call("export", masked(), tmp_path / "out", "--format", "tensorrt") == 0
    said = "".join("".join(capsys.readouterr()).split())
    assert "trtexec--onnx=model.onnx" in said
    assert "TensorRTisnotinstalledhere" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "torch", "--precision", "int8"], "torch takes no int8"),
        (["--format", "coreml"], "coreml"),
        (["--opset", "9"], "opset"),
        (["--tolerance", "0"], "tolerance"),
    ],
)
def test_bad_words_are_one_line(words, expected, tmp_path, capsys):
    assert call("export", tiny_folder(), tmp_path / "out", *words) == 2
    assert expected in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- narrow ends


def channels_pruned(**options) -> Model:
    job = PruneJob(
        tiny_model(),
        PruneOptions(
            mechanism="channels",
            score="magnitude",
            target="params=0.5",
            round_to=4,
            device="cpu",
            **options,
        ),
        noise_images(),
        Silent(),
    )
    MECHANISMS["channels"](job)
    return job.model


def test_the_ends_become_narrow_only_where_asked(tmp_path):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 700])
    kept, narrow = channels_pruned(), channels_pruned(narrow_ends=True)
    for model, small in ((kept, False), (narrow, True)):
        first, last = model.denoiser.conv_in, model.denoiser.conv_out
        assert (first.in_channels, last.out_channels) == (1, 1)
        # which of the two it is depends on the scores
        assert (first.out_channels < 16 or last.in_channels < 16) == small
        with torch.no_grad():
            before = model.denoiser(x, t).sample
            assert before.shape == x.shape
            save(model, tmp_path / str(small))
            assert torch.equal(load(tmp_path / str(small)).denoiser(x, t).sample, before)
