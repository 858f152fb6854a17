"""Model folders: what was saved comes back to the bit, what is damaged is refused, nothing is run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from helpers import output, tiny_model
from narrowing import FAMILIES, slim
from narrowing import output as answer_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunedm import PrunedUNet2DModel
from prunedm.errors import UserError
from prunedm.folder import (
    PACKED_FILE,
    Model,
    hash_folder,
    load,
    save,
    save_config,
    size_on_disk,
)
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.networks.narrowed import as_narrowed
from prunedm.packed import save_packed
from prunedm.record import Record
from prunedm.removal.channels.groups import channel_groups
from prunedm.removal.channels.plan import plan_channels, remove_channels
from prunedm.removal.nm import nm_masks
from prunedm.stages.evaluating.reload import check_reload

WEIGHTS = "diffusion_pytorch_model.safetensors"


def magnitudes(denoiser) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach().abs() for n, m in prunable_layers(denoiser).items()}


def masked(model: Model) -> Model:
    layers = prunable_layers(model.denoiser)
    model.masks = nm_masks(layers, magnitudes(model.denoiser), Pattern(2, 4))
    model.masks.apply_(model.denoiser)
    return model


def narrowed(model: Model) -> Model:
    groups = channel_groups(model.denoiser, model.example())
    scores = magnitudes(model.denoiser)
    plan = plan_channels(model.denoiser, groups, scores=scores, ratio=0.3, target_kind="channels")
    remove_channels(model.denoiser, plan)
    model.denoiser = as_narrowed(model.denoiser)
    return model


KINDS = {
    "dense": tiny_model,
    "masked": lambda: masked(tiny_model()),
    "narrowed": lambda: narrowed(tiny_model()),
    "narrowed and masked": lambda: masked(narrowed(tiny_model())),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved dense model."""
    save(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


def refused(source: object, *parts: str) -> None:
    """Loading is refused in one line that holds all `parts`."""
    with pytest.raises(UserError) as error:
        load(source)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def settings(scheduler) -> dict:
    return {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}


@pytest.mark.parametrize("kind", KINDS)
def test_models_come_back_to_the_bit(tmp_path, kind):
    model = KINDS[kind]()
    model.record = Record(stage="prune", options={"ratio": 0.3}, seed=1, figures={"loss": 0.1})
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert type(loaded.denoiser) is type(model.denoiser)
    assert isinstance(loaded.denoiser, PrunedUNet2DModel) == kind.startswith("narrowed")
    saved = model.denoiser.state_dict()
    assert loaded.denoiser.state_dict().keys() == saved.keys()
    assert all(torch.equal(saved[n], w) for n, w in loaded.denoiser.state_dict().items())
    assert torch.equal(output(loaded.denoiser), output(model.denoiser))
    assert settings(loaded.scheduler) == settings(model.scheduler)
    assert (loaded.record, loaded.pipeline) == (model.record, "DDPMPipeline")
    assert (loaded.masks is None) == ("masked" not in kind)
    if loaded.masks is not None and model.masks is not None:
        assert loaded.masks.pattern == Pattern(2, 4)
        assert loaded.masks.by_layer.keys() == model.masks.by_layer.keys()
        assert all(torch.equal(mask, model.masks.by_layer[n]) for n, mask in loaded.masks)
    assert not loaded.denoiser.training


def test_what_is_loaded_saves_to_the_same_bytes(tmp_path):
    save(KINDS["narrowed and masked"](), tmp_path / "one")
    first = load(tmp_path / "one")
    save(first, tmp_path / "two")
    assert load(tmp_path / "two").hash == first.hash != ""
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )
        assert str(tmp_path).encode() not in path.read_bytes()


# one interpreter for all three: importing PyTorch and diffusers takes most of the time
FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
place = sys.argv[1]
def check(kind):
    unet = DiffusionPipeline.from_pretrained(f"{place}/{kind}").unet.eval()
    noisy, expected = torch.load(f"{place}/{kind}/expected.pt")
    with torch.no_grad():
        assert torch.equal(unet(noisy, torch.tensor([3, 700])).sample, expected), kind
    return type(unet).__name__
assert check("masked") == "UNet2DModel"
assert "prunedm" not in sys.modules
import prunedm
assert check("narrowed") == "PrunedUNet2DModel"
from narrowing import FAMILIES, output
answers = []
for component, family in (("unet", "unet2d"), ("transformer", "dit")):
    network = getattr(DiffusionPipeline.from_pretrained(f"{place}/{family}"), component)
    answers.append((type(network).__name__, output(network, FAMILIES[family])))
torch.save(answers, f"{place}/answers.pt")
print("equal")
"""


def test_diffusers_reads_sparse_folders_alone_and_narrowed_ones_and_pipelines_with_prunedm(
    tmp_path,
):
    for kind in ("masked", "narrowed"):
        model, folder = KINDS[kind](), tmp_path / kind
        save(model, folder)
        noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.save((noisy, output(model.denoiser)), folder / "expected.pt")
    unet, dit = (slim(FAMILIES[name]) for name in ("unet2d", "dit"))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unet2d")
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1)
    DiTPipeline(dit, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    assert index["transformer"] == ["prunedm", "PrunedDiTTransformer2DModel"]
    here = DiffusionPipeline.from_pretrained(tmp_path / "dit").transformer
    assert torch.equal(answer_of(here, FAMILIES["dit"]), answer_of(dit, FAMILIES["dit"]))
    command = [sys.executable, "-c", FRESH, tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "equal", done.stderr
    answers = torch.load(tmp_path / "answers.pt")
    assert [name for name, _ in answers] == ["PrunedUNet2DModel", "PrunedDiTTransformer2DModel"]
    for (_, answer), network, family in zip(answers, (unet, dit), ("unet2d", "dit"), strict=True):
        assert torch.equal(answer, answer_of(network, FAMILIES[family]))


def to_bin(component: Path) -> None:
    torch.save(load_file(component / WEIGHTS), component / "diffusion_pytorch_model.bin")
    (component / WEIGHTS).unlink()


def test_pickled_weights_load(folder):
    model = tiny_model()
    shutil.rmtree(folder / "unet")
    model.denoiser.save_pretrained(folder / "unet", safe_serialization=False)
    assert (folder / "unet" / "diffusion_pytorch_model.bin").exists()
    assert not (folder / "unet" / WEIGHTS).exists()
    assert torch.equal(output(load(folder).denoiser), output(model.denoiser))
    assert size_on_disk(folder) > 4 * sum(p.numel() for p in model.denoiser.parameters())


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("form", ["safetensors", "bin", "old attention names"])
def test_the_hubs_old_layout_without_subfolders_loads(folder, form):
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    if form == "old attention names":
        weights = load_file(folder / WEIGHTS)
        for new, old in OLD_NAMES.items():
            weights = {name.replace(f".{new}.", f".{old}."): w for name, w in weights.items()}
        assert any(".proj_attn." in name for name in weights)
        save_file(weights, folder / WEIGHTS)
    elif form == "bin":
        to_bin(folder)
    scheduler = json.loads((folder / "scheduler_config.json").read_text())
    scheduler["num_train_timesteps"] = 500
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    loaded = load(folder)
    assert torch.equal(output(loaded.denoiser), output(tiny_model().denoiser))
    assert loaded.scheduler.config.num_train_timesteps == 500
    assert size_on_disk(folder) > 0


def test_a_bare_denoiser_folder_loads_with_the_papers_scheduler_and_says_so(folder, tmp_path):
    shutil.copytree(folder / "unet", tmp_path / "a" / "b" / "bare")
    loaded = load(tmp_path / "a" / "b" / "bare")
    assert torch.equal(output(loaded.denoiser), output(tiny_model().denoiser))
    assert settings(loaded.scheduler) == settings(tiny_model().scheduler)
    assert loaded.record is None
    assert loaded.scheduler_assumed
    (note,) = loaded.notes
    assert "linear 0.0001 to 0.02, 1000 steps, epsilon" in note
    assert "--scheduler" in note
    assert load(folder).notes == ()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of diffusers' train_unconditional that ends in v-prediction, with one checkpoint."""
    place, model = tmp_path_factory.mktemp("training") / "run", tiny_model()
    model.scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=400
    )
    save(model, place)
    model.denoiser.save_pretrained(place / "checkpoint-500" / "unet")
    averaged = EMAModel(
        model.denoiser.parameters(), model_cls=UNet2DModel, model_config=model.denoiser.config
    )
    averaged.shadow_params[0].add_(1)
    averaged.save_pretrained(place / "checkpoint-500" / "unet_ema")
    (place / "checkpoint-500" / "optimizer.bin").write_bytes(b"other")
    return place


@pytest.mark.parametrize("part", ["", "unet", "checkpoint-500", "checkpoint-500/unet"])
@pytest.mark.parametrize("linked", [False, True])
def test_parts_of_a_training_run_have_its_noise_schedule(run, part, linked, tmp_path, monkeypatch):
    source = run / part
    if linked:
        (tmp_path / "run").symlink_to(run)
        monkeypatch.chdir(tmp_path / "run")
        source = Path(part or ".")
    loaded = load(source)
    config = loaded.scheduler.config
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 400)
    assert not loaded.scheduler_assumed
    said = "squaredcos_cap_v2, 400 steps, v_prediction" in " ".join(loaded.notes)
    assert said == (part != "")


def test_the_averaged_weights_of_a_checkpoint_are_loaded_and_named(run):
    loaded = load(run / "checkpoint-500")
    weights = load_file(run / "checkpoint-500" / "unet_ema" / WEIGHTS)
    assert torch.equal(loaded.denoiser.conv_in.weight, weights["conv_in.weight"])
    assert not torch.equal(loaded.denoiser.conv_in.weight, tiny_model().denoiser.conv_in.weight)
    assert "unet_ema" in loaded.notes[0]
    assert str(run / "checkpoint-500" / "unet") in loaded.notes[0]
    assert size_on_disk(run / "checkpoint-500") == size_on_disk(run / "checkpoint-500" / "unet_ema")
    assert loaded.hash == load(run / "checkpoint-500" / "unet_ema").hash


def test_a_checkpoint_with_another_schedule_is_another_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    before = load(tmp_path / "copy" / "checkpoint-500").hash
    file = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("400", "300"))
    assert load(tmp_path / "copy" / "checkpoint-500").hash != before


@pytest.mark.parametrize("named", ["", "scheduler", "scheduler/scheduler_config.json"])
def test_a_schedule_can_be_given(run, folder, named):
    loaded = load(folder, scheduler=run / named)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler_file == run / "scheduler" / "scheduler_config.json"
    assert loaded.hash == load(folder).hash
    assert "v_prediction" in loaded.notes[-1]
    with pytest.raises(UserError, match=r"--scheduler .*no scheduler_config.json there"):
        load(folder, scheduler=folder / "unet")


def test_a_run_that_has_saved_no_model_yet_names_its_checkpoint(run, tmp_path):
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(run / "checkpoint-500", tmp_path / "young" / name)
    refused(tmp_path / "young", "has saved no model yet", "checkpoint-1000")


@pytest.mark.parametrize("named", ["model.pt", "imgs.zip", "x.safetensors", "notes"])
def test_a_file_is_named_for_what_it_is(tmp_path, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(named).touch()
    refused(named, named, "not a model folder", "give the folder")


def test_a_file_of_a_model_names_its_folder(folder):
    refused(folder / "unet" / WEIGHTS, f"give {folder}")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "\udcff/x"])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(UserError) as error:
        load(name)
    assert len(str(error.value)) < 400


def test_near_names_are_suggested(folder):
    refused("digit", "did you mean 'digits'?")
    refused(folder.parent / "modle" / "..", "no model at")
    refused(folder.parent / "modle", f"did you mean '{folder}'?")


VARIANTS = ["fp16", "non_ema"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [False, True])
def test_variants_of_weights_load(folder, variant, shards):
    denoiser = tiny_model().denoiser.half()
    shutil.rmtree(folder / "unet")
    size = "20KB" if shards else "1GB"
    denoiser.save_pretrained(folder / "unet", variant=variant, max_shard_size=size)
    files = [path for path in (folder / "unet").iterdir() if path.suffix == ".safetensors"]
    assert all(variant in path.name for path in files)
    assert (len(files) > 1) == shards
    loaded = load(folder)
    assert loaded.dtype == torch.float16
    assert torch.equal(output(loaded.denoiser), output(denoiser.float()))
    assert variant in loaded.notes[0]
    assert size_on_disk(folder) == sum(path.stat().st_size for path in files)
    assert check_reload(loaded)


def test_the_plain_weights_come_before_a_variant(folder):
    tiny_model().denoiser.half().save_pretrained(folder / "unet", variant="fp16")
    loaded = load(folder)
    assert loaded.dtype == torch.float32
    assert loaded.notes == ()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "inner"])
def test_weights_of_wrapped_networks_load(folder, prefix, form):
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    if prefix == "inner":  # one block was compiled
        weights = {
            name.replace("mid_block.", "mid_block._orig_mod."): w for name, w in weights.items()
        }
    else:
        weights = {prefix + name: weight for name, weight in weights.items()}
    save_file(weights, path)
    if form == "bin":
        to_bin(folder / "unet")
    loaded = load(folder)
    assert torch.equal(output(loaded.denoiser), output(tiny_model().denoiser))
    assert check_reload(loaded)


def test_a_weight_that_is_there_twice_is_refused(folder):
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    save_file(weights | {"module.conv_in.bias": weights["conv_in.bias"].clone()}, path)
    refused(folder, "conv_in.bias twice")


@pytest.mark.parametrize("form", ["safetensors", "bin", "float64", "packed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, value, form):
    name, path = "mid_block.resnets.0.conv1.weight", folder / "unet" / WEIGHTS
    weights = load_file(path)
    if form == "float64":  # finite there, and no float32
        weights[name] = weights[name].double()
        value = 1e300
    weights[name][3, 2, 1, 0] = value
    save_file(weights, path)
    if form == "bin":
        to_bin(folder / "unet")
    if form == "packed":
        model = tiny_model()
        model.denoiser.load_state_dict(weights)
        place = tmp_path / "packed"
        save_config(model, place)
        save_packed(model.denoiser, None, place / PACKED_FILE, precision="fp32")
        folder = place
    refused(folder, name, "NaN or infinite")


@pytest.mark.parametrize("kind", ["int", "not a tensor", "a list"])
def test_states_of_something_else_are_refused(folder, kind):
    to_bin(folder / "unet")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["conv_in.weight"] = torch.ones(16, 1, 3, 3).long() if kind == "int" else "text"
    torch.save([weights] if kind == "a list" else weights, path)
    refused(folder, str(folder / "unet"))


def test_a_tensor_that_claims_more_than_it_holds_is_refused_before_it_is_made(folder):
    to_bin(folder / "unet")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["conv_in.weight"] = torch.zeros(1).expand(1 << 40)  # 4 TiB of one number
    torch.save(weights, path)
    refused(folder, "bin claims more numbers than it holds")


def test_a_bin_file_of_one_number_that_fits_the_config_is_refused(folder):
    """Of 37 kB were made 3.4 GB, each shape right."""
    to_bin(folder / "unet")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({n: torch.zeros(1).expand(t.shape) for n, t in weights.items()}, path)
    refused(folder, "bin claims more numbers than it holds")


def test_a_packed_bin_file_is_refused_unread(folder, monkeypatch):
    to_bin(folder / "unet")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    refused(folder, "bin is packed, which torch.save never does")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


@pytest.mark.parametrize("make", [_pipe, _device, _dangling, Path.mkdir])
@pytest.mark.parametrize("name", ["optimizer.bin", "unet/other.safetensors"])
def test_what_is_no_file_is_not_a_part_of_a_model(folder, make, name):
    """And does not hang it."""
    before = load(folder).hash
    make(folder / name)
    assert load(folder).hash == before


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{}", b""]
)
@pytest.mark.parametrize("file", ["unet/" + WEIGHTS, "masks.safetensors", "packed.safetensors"])
def test_headers_with_absurd_sizes_are_refused(tmp_path, file, header):
    save(masked(tiny_model()), tmp_path / "m")
    if file == "packed.safetensors":
        shutil.copy(tmp_path / "m" / "unet" / "config.json", tmp_path / "m")
    (tmp_path / "m" / file).write_bytes(header)
    refused(tmp_path / "m", str((tmp_path / "m" / file).parent))


def test_a_pipe_in_the_place_of_weights_is_refused(folder):
    (folder / "unet" / WEIGHTS).unlink()
    os.mkfifo(folder / "unet" / WEIGHTS)
    refused(folder, "is not a file")


def test_the_shape_and_condition_are_those_of_the_config():
    model = tiny_model(sample_size=(8, 16), in_channels=3)
    assert model.sample_shape == (3, 8, 16)
    assert not model.conditional
    assert tiny_model(num_class_embeds=4).conditional


def test_missing_weights_are_named(folder):
    (folder / "unet" / WEIGHTS).unlink()
    refused(folder, str(folder / "unet"), WEIGHTS, "missing")


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "cannot load weights", str(folder / "unet"))


@pytest.mark.parametrize("change", ["missing", "unexpected", "reshaped"])
def test_weights_of_another_model_are_refused(folder, change):
    path, name = folder / "unet" / WEIGHTS, "down_blocks.0.resnets.0.conv1.weight"
    weights = load_file(path)
    weight = weights.pop(name)
    if change != "missing":
        weights[name] = weight[:4].clone() if change == "reshaped" else weight
    if change == "unexpected":
        weights["nose.weight"] = torch.zeros(2)
    save_file(weights, path)
    named = "nose.weight" if change == "unexpected" else name
    refused(folder, str(folder / "unet"), named)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    refused(tmp_path, str(tmp_path), "not a model folder", "model_index.json")
    refused(tmp_path / "gone", str(tmp_path / "gone"), "give a folder, a hub id")
    refused("nothing", "'nothing'")


@pytest.mark.parametrize("name", ["UNet4DModel", "os.system", "ModelMixin", "DDPMPipeline", ""])
def test_classes_that_are_not_networks_are_named(folder, name):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    refused(folder, name, "neither diffusers nor transformers has" if name else "names no class")


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", [b"{", b"[]", b"", b"\xff\xfe"])
def test_damaged_descriptions_are_named(folder, file, text):
    (folder / file).write_bytes(text)
    refused(folder, str(folder / file))


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"stage": 3}', b"\xff"])
def test_a_damaged_record_is_named(folder, text):
    (folder / "record.json").write_bytes(text)
    refused(folder, str(folder / "record.json"), "damaged")


@pytest.mark.parametrize(
    "change", [{"_class_name": "os"}, {"beta_schedule": "steep"}, {"num_train_timesteps": "x"}]
)
def test_a_wrong_scheduler_is_named(folder, change):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, str(path))


def test_a_missing_companion_is_named(folder):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    refused(folder, "'vqvae'", "download the whole pipeline")
    path.write_text(json.dumps(index | {"safety_checker": [None, None]}))
    assert load(folder).denoiser is not None


def test_a_damaged_masks_file_is_named(tmp_path):
    save(masked(tiny_model()), tmp_path / "m")
    path = tmp_path / "m" / "masks.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path / "m", str(path), "damaged")


def test_masks_that_do_not_hold_are_neither_saved_nor_loaded(tmp_path):
    model = masked(tiny_model())
    save(model, tmp_path / "good")
    (name, mask) = next(iter(model.masks))
    index = tuple((~mask).nonzero()[0])
    with torch.no_grad():
        model.denoiser.get_submodule(name).weight[index] = 1e-8
    with pytest.raises(UserError, match=rf"do not hold in 1 layers, first {name} with 1 w"):
        save(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    weights = load_file(tmp_path / "good" / "unet" / WEIGHTS)
    weights[f"{name}.weight"][index] = 1e-8
    save_file(weights, tmp_path / "good" / "unet" / WEIGHTS)
    refused(tmp_path / "good", str(tmp_path / "good"), "do not hold", name)


def test_masks_of_another_model_are_refused(tmp_path):
    save(masked(tiny_model()), tmp_path / "one")
    save(tiny_model(block_out_channels=(16, 16)), tmp_path / "two")
    shutil.copy(tmp_path / "one" / "masks.safetensors", tmp_path / "two")
    refused(tmp_path / "two", "masks are of another model")


class Malice:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(folder, tmp_path, form):
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Malice(trap)))
    assert trap.exists()  # the trap works where it is run
    trap.unlink()
    to_bin(folder / "unet")
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True) | {"conv_in.weight": Malice(trap)}
    if form == "torch":
        torch.save(weights, path)
    else:
        path.write_bytes(pickle.dumps(weights, protocol=2))
    refused(folder, "cannot load weights", str(folder / "unet"))
    assert not trap.exists()


def test_code_that_a_folder_names_is_not_imported(folder, tmp_path, monkeypatch):
    trap, module = tmp_path / "trap", "from pathlib import Path\nPath(r'{}').touch()\n"
    for place in (tmp_path, folder, folder / "unet"):
        (place / "malice.py").write_text(module.format(trap))
    monkeypatch.syspath_prepend(tmp_path)
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {
        "_class_name": ["malice", "Pipeline"],
        "unet": ["malice", "Model"],
        "scheduler": ["malice", "Scheduler"],
    }
    path.write_text(json.dumps(index))
    config = folder / "unet" / "config.json"
    auto = {"auto_map": {"AutoModel": "malice.Model"}, "_module": "malice"}
    config.write_text(json.dumps(json.loads(config.read_text()) | auto))
    loaded = load(folder)
    assert type(loaded.denoiser).__module__.startswith("diffusers.")
    assert not trap.exists()
    assert "malice" not in sys.modules


@pytest.mark.parametrize("message", ["no route to host\nsecond line", ""])
def test_a_hub_id_without_network_is_named_in_one_line(monkeypatch, message):
    def unreachable(*_, **__):
        raise ConnectionError(message)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    refused("someone/nothing", "'someone/nothing'", message.split("\n")[0] or "ConnectionError")


BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_snapshot_falls_back_to_bin_weights(folder, monkeypatch, offline):
    asked = []

    def snapshot(hub_id, allow_patterns, local_files_only=False):
        assert local_files_only == offline
        asked.append((hub_id, tuple(allow_patterns)))
        return str(folder)

    def info(*_, **__):
        if offline:
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load("someone/model")
    assert asked == [("someone/model", (*BESIDE, "*.safetensors"))]
    to_bin(folder / "unet")
    assert load("someone/model").name == "someone/model"
    assert asked[2:] == [("someone/model", (*BESIDE, "*.bin"))]


def test_the_hash_is_of_the_content_and_not_of_the_place(folder, tmp_path):
    before = hash_folder(folder)
    shutil.copytree(folder, tmp_path / "copy" / "deep")
    assert hash_folder(tmp_path / "copy" / "deep") == before == load(folder).hash
    (folder / "record.json").write_text(Record(stage="prune").model_dump_json())
    (folder / "vis").mkdir()
    (folder / "vis" / "figures.json").write_text("{}")
    assert hash_folder(folder) == before
    seen = {before}
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["conv_in.bias"][0] += 1e-6
    save_file(weights, folder / "unet" / WEIGHTS)
    seen.add(hash_folder(folder))
    (folder / "masks.safetensors").write_bytes(b"1")
    seen.add(hash_folder(folder))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("1000", "999"))
    seen.add(hash_folder(folder))
    assert len(seen) == 4


def test_a_model_keeps_the_type_it_was_stored_in(tmp_path):
    model = tiny_model()
    model.dtype = torch.float16
    model.round_to_dtype()
    before = {n: p.clone() for n, p in model.denoiser.named_parameters()}
    save(model, tmp_path / "half")
    again = load(tmp_path / "half")
    save(again, tmp_path / "copy")
    for folder in ("half", "copy"):
        with safe_open(
            tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors", framework="pt"
        ) as file:
            assert {file.get_slice(n).get_dtype() for n in file.keys()} == {"F16"}  # noqa: SIM118
    assert again.dtype == torch.float16
    for name, parameter in again.denoiser.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
