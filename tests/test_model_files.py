"""Configurations and schedules that are wrong: one line that names the file, at once, and no attempt."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from diffusers import DDPMScheduler, UNet2DModel
from helpers import TINY, problems, tiny_folder, tiny_model

from prunedm.errors import UserError
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load, save
from prunedm.model_files.configs import SCHEDULER_RANGES, check_config, check_unet_config
from prunedm.model_files.schedule import read_scheduler
from prunedm.sampling import make_sampler, sample_batches
from prunedm.task.process import process_of, scheduler_class

SECONDS = 5.0  # of processor time, for one refusal; what hangs takes far more
DEEP: Any = [[[[1]]]]
WRONG: list[Any] = [
    None,
    True,
    0,
    -1,
    3,
    10**6,
    10**9,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "silu",
    "x" * 5000,
    [],
    [8, 8],
    [16, -32],
    [16, True],
    ["DownBlock2D", "NoBlock"],
    [10**9, 10**9],
    [16] * 1000,
    {"a": 1},
    DEEP,
]
NOTES = {"_class_name", "_use_default_values"}  # of diffusers
UNET_KEYS = sorted({*UNet2DModel(**TINY).config, "widths"} - NOTES)
SCHEDULER_KEYS = sorted({*DDPMScheduler().config} - NOTES)


def folder_with(place: Path, file: str, key: str, value: object) -> Path:
    """The tiny model with one other value, its weights linked."""
    source = tiny_folder()
    for path in (p for p in source.rglob("*") if p.is_file()):
        copy = place / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if str(path.relative_to(source)) == file:
            copy.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        else:
            copy.symlink_to(path)
    return place


def works_or_is_refused(folder: Path, file: str) -> None:
    """It loads and does its work, or one line says what is wrong, at once."""
    started = time.process_time()
    try:
        model = load(folder)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 500, message
        assert str((folder / file).parent) in message
        return
    finally:
        assert time.process_time() - started < SECONDS
    try:
        loss = denoising_loss(model.denoiser, [problems(scheduler=model.scheduler).batch([0, 1])])
        assert loss.mean >= 0
        for sampler in ("ddim", "ddpm"):
            list(
                sample_batches(
                    model.denoiser,
                    make_sampler(model.scheduler, sampler),
                    count=1,
                    steps=1,
                    batch_size=1,
                    codec=model.codec,
                    condition=model.condition,
                )
            )
    except UserError:  # of the combination: noise that goes beyond numbers, a sampler that cannot
        return


@pytest.mark.parametrize("key", UNET_KEYS)
def test_every_value_of_a_denoisers_config_works_or_is_refused(key, tmp_path):
    for number, value in enumerate(WRONG):
        folder = folder_with(tmp_path / str(number), "unet/config.json", key, value)
        works_or_is_refused(folder, "unet/config.json")


@pytest.mark.parametrize("key", SCHEDULER_KEYS)
def test_every_value_of_a_schedulers_config_works_or_is_refused(key, tmp_path):
    file = "scheduler/scheduler_config.json"
    for number, value in enumerate(WRONG):
        works_or_is_refused(folder_with(tmp_path / str(number), file, key, value), file)


@pytest.mark.parametrize("key", ["_class_name", "unet", "scheduler", "_diffusers_version"])
def test_every_value_of_an_index_works_or_is_refused(key, tmp_path):
    for number, value in enumerate(WRONG[::4]):
        folder = folder_with(tmp_path / str(number), "model_index.json", key, value)
        works_or_is_refused(folder, "model_index.json")


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load(folder)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layers_per_block", 10**6, "it goes from 1 to 16"),
        ("norm_num_groups", 0, "it goes from 1"),
        ("norm_num_groups", 3, "describes no UNet2DModel"),
        ("block_out_channels", [16, 10**9], "it goes from 1"),
        ("block_out_channels", [16, "32"], "is not tuple[int, ...]"),
        ("block_out_channels", [16], "same number"),
        ("act_fn", "wobble", "describes no UNet2DModel"),
        ("down_block_types", ["DownBlock2D", "DownBlock3D"], "describes no UNet2DModel"),
        ("sample_size", None, 'add the side of its training images: "sample_size": 32'),
        ("sample_size", "8", "is not int"),
        ("sample_size", 9, "cannot run on 9x9 images"),
        ("downsample_padding", 7, "network that cannot run"),
        ("out_channels", 3, "1 channels come in and 3 go out"),
        ("center_input_sample", "no", "is not bool"),
        ("dropout", float("nan"), "is not finite"),
        ("block_out_channels", [32, 32], "2 unexpected tensors, first down_blocks.1"),
        ("block_out_channels", [32, 64], "and by the config (32, 1, 3, 3)"),
        ("widths", {"conv_in": {"in": 1, "out": -3}}, "widths"),
        ("widths", {"conv_in": {"in": 1, "out": 10**9}}, "widths"),
        ("widths", [1], "widths is not a table"),
        ("dropped", ["conv_in"], "dropped"),
        ("dropped", 3, "dropped is not a list"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(tmp_path, key, value, reason):
    folder = folder_with(tmp_path / "m", "unet/config.json", key, value)
    if key in ("widths", "dropped"):
        folder = folder_with(tmp_path / "n", "unet/config.json", "_class_name", "PrunedUNet2DModel")
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    refused(folder, reason, str(folder / "unet"))


def test_a_missing_sample_size_is_named(tmp_path):
    folder = folder_with(tmp_path / "m", "unet/config.json", "x", 1)
    config = folder / "unet" / "config.json"
    values = json.loads(config.read_text())
    del values["sample_size"]
    config.write_text(json.dumps(values))
    refused(folder, str(config), "sample_size")


def test_a_square_pair_is_a_side(tmp_path):
    folder = folder_with(tmp_path / "m", "unet/config.json", "sample_size", [8, 8])
    assert load(folder).sample_shape == (1, 8, 8)


def test_a_config_of_many_gigabytes_is_refused_before_any_is_allocated(tmp_path):
    sizes = [8192, 16384]
    folder = folder_with(tmp_path / "m", "unet/config.json", "block_out_channels", sizes)
    before = psutil.Process().memory_info().rss
    refused(folder, "and by the config (8192, 1, 3, 3)")
    assert psutil.Process().memory_info().rss - before < 1 << 28


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beta_start": float("nan")}, "not finite"),
        ({"beta_start": -0.01}, "out of range"),
        ({"beta_end": 3.0}, "out of range"),
        ({"beta_start": 0.0, "beta_end": 0.0}, "not a noise schedule"),
        ({"trained_betas": []}, "0 betas for num_train_timesteps = 1000"),
        ({"trained_betas": [0.1, 0.2]}, "2 betas for num_train_timesteps = 1000"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "not finite"),
        ({"trained_betas": [0.1, -0.2], "num_train_timesteps": 2}, "out of range"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "out of range"),
        ({"num_train_timesteps": 0}, "out of range"),
        ({"num_train_timesteps": 10**9}, "out of range"),
        ({"beta_schedule": "steep"}, "is not"),
        ({"variance_type": "wide"}, "is not"),
        ({"prediction_type": "flow"}, "is not"),
        ({"_class_name": "SchedulerMixin"}, "does not name a diffusers scheduler"),
        ({"_class_name": ["os"]}, "does not name a diffusers scheduler"),
        (
            {"_class_name": "EDMEulerScheduler"},
            "variance-preserving noise (DDPM) and flow matching",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1.0}, "out of range"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_named(tmp_path, change, reason):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDPMScheduler"} | change))
    with pytest.raises(UserError) as error:
        read_scheduler(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def _schedulers() -> list[str]:
    from diffusers import schedulers

    return [name for name in dir(schedulers) if scheduler_class(name)]


def test_the_defaults_of_every_scheduler_of_diffusers_pass():
    """What is refused is refused for its noise, and no value of diffusers' own."""
    checked = 0
    for name in _schedulers():
        try:
            scheduler = scheduler_class(name)()
        except (TypeError, ImportError):  # some have no defaults
            continue
        config = json.loads(scheduler.to_json_string())
        check_config(config, type(scheduler), name, SCHEDULER_RANGES)
        checked += 1
    assert checked > 25


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_schedules_that_are_used_pass(schedule, rescale):
    process_of(DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=rescale)).check()


def test_learned_timesteps_are_as_many_as_the_schedulers(tmp_path):
    """Else the model loads, and a loss ends in an IndexError."""
    network = tiny_model(time_embedding_type="learned", num_train_timesteps=100)
    for steps in (100, 1000):
        network.scheduler = DDPMScheduler(num_train_timesteps=steps)
        save(network, tmp_path / str(steps))
    load(tmp_path / "100")
    with pytest.raises(
        UserError, match="learned embeddings of 100 timesteps, and the scheduler 1000"
    ):
        load(tmp_path / "1000")
    unet = dict(network.denoiser.config) | {"num_train_timesteps": None}
    with pytest.raises(UserError, match="'learned' needs num_train_timesteps"):
        check_unet_config(unet, "unet")


def test_words_of_another_class_pass(tmp_path):
    """A config that came by way of `from_config` has what the class it was of first said."""
    path = tmp_path / "scheduler_config.json"
    words = {"variance_type": "fixed_small", "solver_type": "midpoint"}
    path.write_text(json.dumps({"_class_name": "DPMSolverMultistepScheduler"} | words))
    assert read_scheduler(path).config.variance_type == "fixed_small"


def test_what_an_ema_notes_in_its_config_is_left_out(tmp_path, capsys):
    folder = folder_with(tmp_path / "m", "unet/config.json", "decay", 0.99)
    model = load(folder)
    save(Model(model.denoiser, model.scheduler), tmp_path / "again")
    assert "decay" not in json.loads((tmp_path / "again" / "unet" / "config.json").read_text())
    assert model.denoiser.config.norm_num_groups == tiny_model().denoiser.config.norm_num_groups
    assert "will be ignored" not in "".join(capsys.readouterr())
