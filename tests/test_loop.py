"""The training loop: exact resume, and every part of a step against values worked out apart."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Killed, noise_images, problems, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from prunedm.errors import UserError
from prunedm.options import LoopOptions
from prunedm.progress import Silent
from prunedm.recovery.objective import data_objective
from prunedm.stages.inputs import device_for
from prunedm.task import predict
from prunedm.training import processes
from prunedm.training.checkpoint import (
    History,
    TrainingState,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
)
from prunedm.training.ema import Ema
from prunedm.training.loop import fit, learning_rate_share, make_accelerator

EVERYTHING = {
    "steps": 7,
    "batch_size": 2,
    "accumulation": 2,
    "lr": 1e-2,
    "warmup": 3,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "ema_decay": 0.6,
    "checkpoint_every": 2,
    "validate_every": 3,
    "device": "cpu",
}


class Line(nn.Module):
    """One weight, so that a step can be worked out by hand."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def train(module: nn.Module, folder: Path, objective=None, **changes) -> History:
    """`fit` as stages call it, on noise images."""
    given = ("after_step", "validate", "observe", "optimizer", "best")
    named = {name: changes.pop(name) for name in given if name in changes}
    accelerator = changes.pop("accelerator", None)
    options = LoopOptions(**({"device": "cpu"} | changes))
    return fit(
        module,
        objective or data_objective,
        problems=problems(noise_images(9), shuffle=True, flip=True),
        options=options,
        accelerator=accelerator or make_accelerator(options),
        checkpoint=folder / "checkpoint.safetensors",
        progress=Silent(),
        label="",
        **named,
    )


def held_out_loss(module: nn.Module) -> float:
    batch = problems(noise_images(9)).batch(range(4))
    with torch.no_grad():
        return float(batch.losses(predict(module, batch)).mean())


def slope(module: nn.Module, _, step: int) -> torch.Tensor:
    """A loss whose gradient is 1 at every step."""
    return module(torch.ones(1)).sum()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    model = tiny_model(dropout=0.5).denoiser
    history = train(model, tmp_path_factory.mktemp("whole"), validate=held_out_loss, **EVERYTHING)
    return model, history


@pytest.mark.parametrize("killed_at", range(7))
def test_a_run_killed_at_any_step_ends_with_the_same_bits(killed_at, unbroken, tmp_path):
    model, history = unbroken

    def kill(step: int) -> None:
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(
            tiny_model(dropout=0.5).denoiser,
            tmp_path,
            validate=held_out_loss,
            after_step=kill,
            **EVERYTHING,
        )
    assert (tmp_path / "checkpoint.safetensors").exists() == (killed_at >= 2)
    steps = []
    resumed = tiny_model(dropout=0.5).denoiser
    again = train(resumed, tmp_path, validate=held_out_loss, after_step=steps.append, **EVERYTHING)
    assert steps == list(range(killed_at // 2 * 2, 7))
    assert again.losses == history.losses
    assert again.held_out == history.held_out
    for (name, wanted), (_, got) in zip(
        model.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(wanted, got), name


def test_a_run_that_continues_with_other_threads_says_so(tmp_path, monkeypatch):
    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    monkeypatch.setattr(f"{__name__}.Silent", Listener)
    with pytest.raises(Killed):
        train(tiny_model().denoiser, tmp_path, after_step=kill, **EVERYTHING)
    assert said == []
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(tiny_model().denoiser, tmp_path, **EVERYTHING)
    (line,) = said
    assert f"began with {threads} threads and continues with {threads + 1}" in line
    assert f"OMP_NUM_THREADS={threads} " in line


def test_dropout_is_at_work_in_the_runs_that_are_compared(unbroken, tmp_path):
    _, history = unbroken
    without = train(tiny_model().denoiser, tmp_path, validate=held_out_loss, **EVERYTHING)
    assert without.losses != history.losses


def test_a_checkpoint_brings_every_part_of_the_state_back(tmp_path):
    def state(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        module = nn.Linear(3, 2)
        module.register_buffer("average", torch.zeros(()))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return TrainingState(module, optimizer, Ema(module, 0.9), History())

    saved = state(0)
    for _ in range(3):
        saved.module(torch.ones(1, 3)).square().sum().backward()
        saved.optimizer.step()
        saved.ema.update(saved.module)
    saved.done, saved.history.losses, saved.history.held_out = 3, [0.1, 0.2, 1 / 3], [(2, 0.7)]
    saved.history.observed = {"entropy": [(0, 1.5), (2, 1 / 3)]}
    saved.module.average.fill_(0.3)  # a buffer
    save_checkpoint(tmp_path / "c.safetensors", saved)
    loaded = state(1)
    load_checkpoint(tmp_path / "c.safetensors", loaded)
    assert (loaded.done, loaded.ema.updates) == (3, 3)
    assert loaded.history == saved.history
    for name, value in saved.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)
    for name, value in saved.module.named_parameters():
        assert torch.equal(loaded.ema.shadow[name], saved.ema.shadow[name])
        assert not torch.equal(loaded.ema.shadow[name], value)
    for index, moments in saved.optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(loaded.optimizer.state_dict()["state"][index][key], value)
    assert not list(tmp_path.glob("*.writing"))


def test_a_checkpoint_brings_the_gradient_scaler_of_fp16_back(tmp_path):
    def state() -> TrainingState:
        module = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return TrainingState(module, optimizer, None, History(), scaler=scaler)

    def steps(of: TrainingState, gradients: list[float]) -> None:
        for size in gradients:
            of.scaler.scale(of.module(torch.full((1, 3), size)).sum()).backward()
            of.scaler.step(of.optimizer)
            of.scaler.update()
            of.optimizer.zero_grad()

    saved, loaded = state(), state()
    steps(saved, [1.0, math.inf, 1.0, 1.0, 1.0])  # halved, doubled, and one step towards the next
    saved.run = "a1b2"
    save_checkpoint(tmp_path / "c.safetensors", saved)
    load_checkpoint(tmp_path / "c.safetensors", loaded)
    assert loaded.run == "a1b2"
    assert saved.scaler.state_dict()["_growth_tracker"] == 1
    assert loaded.scaler.state_dict() == saved.scaler.state_dict()
    for one in (saved, loaded):
        steps(one, [1.0, 1.0])
    assert loaded.scaler.get_scale() == saved.scaler.get_scale() == 2.0**11
    for a, b in zip(loaded.module.parameters(), saved.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loop_keeps_the_scaler_of_fp16(tmp_path):
    """CPUs have no fp16 training; a scaler is put where accelerate would have it."""
    options = {"steps": 5, "checkpoint_every": 2}

    def run(scale: float, after_step=lambda _: None) -> float:
        accelerator = make_accelerator(LoopOptions(device="cpu"))
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        train(Line(), tmp_path, slope, after_step=after_step, accelerator=accelerator, **options)
        return accelerator.scaler.get_scale()

    def kill(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(2.0**8, kill)
    assert run(2.0**3) == 2.0**8  # of the run that it goes on with


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _other_file(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_truncate, _other_file, _pipe, lambda p: p.write_text("no")])
def test_a_damaged_checkpoint_is_a_clear_error(damage, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train(Line(), tmp_path, slope, steps=3, checkpoint_every=2)
    damage(path)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged.*delete it"):
        train(Line(), tmp_path, slope, steps=3, checkpoint_every=2)


def test_a_checkpoint_without_observations_still_resumes(tmp_path):
    """As version 0.1.0 wrote them."""
    path, options = tmp_path / "checkpoint.safetensors", {"steps": 3, "checkpoint_every": 2}
    whole = train(Line(), tmp_path / "whole", slope, **options)
    train(Line(), tmp_path, slope, **options)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    del facts["observed"]
    save_file(load_file(path), path, metadata={"facts": json.dumps(facts)})
    assert train(Line(), tmp_path, slope, **options) == whole


def test_a_checkpoint_of_another_module_is_a_clear_error(tmp_path):
    train(Line(), tmp_path, slope, steps=3, checkpoint_every=2)
    with pytest.raises(UserError, match="of another model"):
        train(tiny_model().denoiser, tmp_path, steps=3, checkpoint_every=2)


def test_a_checkpoint_of_another_number_of_processes_is_a_clear_error(tmp_path):
    """Its steps were of other problems, and so is what is left."""
    path = tmp_path / "c.safetensors"
    line = Line()
    state = TrainingState(line, torch.optim.SGD(line.parameters()), None, History(), processes=2)
    save_checkpoint(path, state)
    load_checkpoint(path, state)
    state.processes = 1
    with pytest.raises(UserError, match="in 2 processes, this one has 1; launch 2 again"):
        load_checkpoint(path, state)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4)),
        ({"RANK": "5", "WORLD_SIZE": "8", "PMI_RANK": "1", "PMI_SIZE": "2"}, (5, 8)),
    ],
)
def test_processes_know_their_number_from_torchrun_and_from_mpi(names, found, monkeypatch):
    for name in (*processes._RANKS, *processes._COUNTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.count()) == found
    assert processes.as_figures() == ({"processes": found[1]} if found[1] > 1 else {})


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in (*processes._COUNTS, *processes._LOCAL_RANKS):
        monkeypatch.delenv(name, raising=False)
    assert device_for("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_for("auto") == torch.device("cuda", 3)
    assert device_for("cpu") == torch.device("cpu")


def _nan_from(step: int):
    def objective(module: nn.Module, batch, at: int) -> torch.Tensor:
        return slope(module, batch, at) * (math.nan if at >= step else 1.0)

    return objective


@pytest.mark.parametrize("last_good", [4, 5, 6])
def test_nan_stops_at_its_step_and_the_last_good_state_stays(last_good, tmp_path):
    options = {"steps": 40, "lr": 0.1, "warmup": 0, "schedule": "constant", "checkpoint_every": 2}
    with pytest.raises(
        UserError, match=rf"loss is nan at step {last_good}: lower --lr.*checkpoint"
    ):
        train(Line(), tmp_path, _nan_from(last_good), **options)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    done = last_good // 2 * 2
    assert kept["module.weight"].item() == pytest.approx(1 - 0.1 * done)  # Adam: lr a step
    history = train(Line(), tmp_path, slope, **(options | {"steps": done + 1}))
    assert len(history.losses) == done + 1
    assert all(map(math.isfinite, history.losses))


def test_nan_at_the_first_step_is_not_the_learning_rates_fault(tmp_path):
    with pytest.raises(UserError, match="nan at the first step: give another model") as error:
        train(Line(), tmp_path, _nan_from(0), steps=5)
    assert "--lr" not in str(error.value)


def test_nan_without_a_checkpoint_promises_none(tmp_path):
    with pytest.raises(UserError, match=r"nan at step 1: lower --lr or raise --warmup$"):
        train(Line(), tmp_path, _nan_from(1), steps=5)


def test_weights_that_went_bad_under_a_finite_loss_do_not_replace_the_good_state(tmp_path):
    def objective(module: nn.Module, _, step: int) -> torch.Tensor:
        # d sqrt(x) / dx at 0 is infinite, and infinity times 0 no number; the loss itself is 0
        return slope(module, _, step) * 0 + (
            torch.sqrt(module.weight * 0).sum() if step == 3 else 0
        )

    with pytest.raises(UserError, match="nan at step 4"):
        train(Line(), tmp_path, objective, steps=30, checkpoint_every=2, clip=0)
    assert load_file(tmp_path / "checkpoint.safetensors")["module.weight"].isfinite().all()


def test_held_out_nan_is_an_error_too(tmp_path):
    with pytest.raises(UserError, match="held-out loss is nan at step 2"):
        train(Line(), tmp_path, slope, steps=3, validate=lambda _: math.nan)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    options = LoopOptions(steps=8, lr=2.0, warmup=4, schedule=schedule)
    assert [learning_rate_share(options, k) for k in range(8)] == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_its_peak():
    assert learning_rate_share(LoopOptions(steps=1, warmup=0), 0) == 1
    assert learning_rate_share(LoopOptions(steps=5, warmup=20), 4) == pytest.approx(1 / 4)


def test_the_schedule_reaches_the_optimizer(tmp_path):
    seen, line = [], Line()
    options = {"steps": 6, "lr": 0.1, "warmup": 2, "clip": 0, "ema_decay": 0}
    train(line, tmp_path, slope, after_step=lambda _: seen.append(line.weight.item()), **options)
    moved = -np.diff([1.0, *seen])  # under a constant gradient, Adam moves by the learning rate
    wanted = [0.1 * learning_rate_share(LoopOptions(**options), k) for k in range(6)]
    assert moved == pytest.approx(wanted, rel=1e-4)


def test_ema_follows_its_recursion_with_warmup(tmp_path):
    live, line = [], Line()
    options = {"steps": 30, "lr": 0.1, "warmup": 0, "ema_decay": 0.7}
    train(line, tmp_path, slope, after_step=lambda _: live.append(line.weight.item()), **options)
    shadow = 1.0
    for k, weight in enumerate(live):
        decay = min(0.7, (1 + k) / (10 + k))  # 0.1 first: the start is soon forgotten
        shadow = decay * shadow + (1 - decay) * weight
    assert line.weight.item() == pytest.approx(shadow, abs=1e-6)
    assert line.weight.item() != pytest.approx(live[-1], abs=1e-3)


def test_without_ema_the_last_weights_stay(tmp_path):
    live, line = [], Line()
    after_step = lambda _: live.append(line.weight.item())  # noqa: E731
    train(line, tmp_path, slope, after_step=after_step, steps=3, ema_decay=0)
    assert line.weight.item() == live[-1]


def test_two_half_batches_are_one_batch(tmp_path):
    models = []
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        model = tiny_model().denoiser
        history = train(
            model,
            tmp_path / name,
            steps=3,
            batch_size=size,
            accumulation=accumulation,
            weight_decay=0.1,
        )
        models.append((model, history))
    (one, losses), (two, again) = models
    assert again.losses == pytest.approx(losses.losses, rel=1e-5)
    start, a, b = (
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (tiny_model().denoiser, one, two)
    )
    assert (a - b).norm() < 1e-2 * (
        a - start
    ).norm()  # Adam blows rounding up where gradients are 0


def test_clip_bounds_the_gradient_norm(tmp_path):
    def seen_norms(clip: float) -> list[float]:
        norms, line = [], Line()
        step = torch.optim.AdamW.step

        def spy(self, *arguments, **named):
            norms.append(float(line.weight.grad.norm()))
            return step(self, *arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            steep = lambda module, batch, at: 5 * slope(module, batch, at)  # noqa: E731
            train(line, tmp_path / str(clip), steep, steps=2, clip=clip)
        return norms

    assert seen_norms(0) == [5, 5]
    assert seen_norms(0.5) == pytest.approx([0.5, 0.5], rel=1e-4)
    assert seen_norms(7) == [5, 5]


def test_validation_sees_the_average_and_leaves_no_trace(tmp_path):
    plain, seen, live = Line(), [], []
    train(plain, tmp_path / "plain", slope, steps=6, warmup=0)
    line = Line()

    def validate(module: nn.Module) -> float:
        seen.append(module.weight.item())
        module.eval()  # what a validation may do to the mode
        return 1.0

    def after_step(_: int) -> None:
        live.append(line.weight.item())
        assert line.training

    history = train(
        line, tmp_path / "line", slope, steps=6, warmup=0, validate=validate,
        validate_every=2, after_step=after_step,
    )  # fmt: skip
    assert line.weight.item() == plain.weight.item()
    assert [step for step, _ in history.held_out] == [2, 4, 6]
    assert seen[-1] == line.weight.item()  # the EMA weights, which the module holds at the end
    assert not set(seen) & set(live)
    assert not line.training


def test_the_last_step_is_always_validated(tmp_path):
    history = train(Line(), tmp_path, slope, steps=5, validate_every=0, validate=lambda _: 0.5)
    assert history.held_out == [(5, 0.5)]


def test_autocast_ends_with_the_training(tmp_path):
    inside = []

    def objective(module: nn.Module, batch, step: int) -> torch.Tensor:
        inside.append(nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype)
        return batch.losses(predict(module, batch)).mean()

    model = tiny_model().denoiser
    train(model, tmp_path, objective, steps=1, batch_size=2, mixed_precision="bf16")
    assert inside == [torch.bfloat16]
    fresh = tiny_model().denoiser
    fresh.load_state_dict(model.state_dict())
    assert held_out_loss(model) == held_out_loss(fresh)  # in float32, to the bit


def test_stages_of_one_process_may_differ_in_precision():
    for precision in ("no", "bf16", "no"):
        options = LoopOptions(mixed_precision=precision, device="cpu", accumulation=3)
        accelerator = make_accelerator(options)
        assert accelerator.mixed_precision == precision
        assert accelerator.gradient_accumulation_steps == 3


def test_only_what_requires_gradients_is_trained(tmp_path):
    model = tiny_model().denoiser
    model.requires_grad_(False)
    model.conv_out.requires_grad_(True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, tmp_path, steps=2, batch_size=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"conv_out.weight", "conv_out.bias"}


def test_curves_keep_means_and_a_bounded_length():
    curve = History([float(k) for k in range(10)], [(10, 0.5)]).as_figures(points=4)["curve"]
    assert curve == {"stride": 3, "losses": [1, 4, 7, 9], "held_out": [(10, 0.5)]}


# ------------------------------------------------- own optimizers, the best state, observations


def test_a_given_optimizer_keeps_its_learning_rates_and_follows_the_schedule(tmp_path):
    both = nn.ModuleList([Line(), Line()])
    groups = [{"params": both[0].parameters(), "lr": 2.0}, {"params": both[1].parameters()}]
    seen = []

    def objective(module: nn.Module, _, step: int) -> torch.Tensor:
        return sum(line(torch.ones(1)).sum() for line in module)

    options = {"steps": 4, "lr": 99.0, "warmup": 2, "clip": 0, "ema_decay": 0}
    train(
        both, tmp_path, objective, optimizer=torch.optim.SGD(groups, lr=0.5),
        after_step=lambda _: seen.append([line.weight.item() for line in both]), **options,
    )  # fmt: skip
    moved = -np.diff([[1.0, 1.0], *seen], axis=0)
    share = [learning_rate_share(LoopOptions(**options), k) for k in range(4)]
    assert moved == pytest.approx(np.outer(share, [2.0, 0.5]), abs=1e-5)


def valley(line: Line, lowest_at: int):
    """A validation that is lowest after so many steps."""
    seen = []

    def validate(_: nn.Module) -> float:
        seen.append(line.weight.item())
        return abs(len(seen) - 1 - lowest_at) + 1.0

    return validate, seen


@pytest.mark.parametrize("lowest_at", [0, 2, 5])
@pytest.mark.parametrize("ema_decay", [0, 0.7])
def test_the_best_state_is_of_the_lowest_held_out_loss_start_included(
    lowest_at, ema_decay, tmp_path
):
    line, best = Line(), tmp_path / "best.safetensors"
    validate, seen = valley(line, lowest_at)
    history = train(
        line, tmp_path, slope, steps=5, lr=0.1, warmup=0, validate=validate, validate_every=1,
        best=best, ema_decay=ema_decay,
    )  # fmt: skip
    assert [step for step, _ in history.held_out] == [0, 1, 2, 3, 4, 5]
    load_parameters(best, line)
    assert line.weight.item() == seen[lowest_at]
    assert len(set(seen)) == 6


def test_ties_keep_the_first():
    losses = [3.0, 2.0, 2.0, 1.0]
    at_best = [History([], [(k, v) for k, v in enumerate(losses[: n + 1])]) for n in range(4)]
    assert [history.at_best for history in at_best] == [True, True, False, True]


@pytest.mark.parametrize("killed_at", range(1, 5))
def test_the_best_state_survives_a_kill(killed_at, tmp_path):
    """Also where the best was written after the last checkpoint."""
    options = {"steps": 5, "lr": 0.1, "warmup": 0, "checkpoint_every": 2, "validate_every": 1}
    found = []
    for folder, kill in (("whole", None), ("broken", killed_at)):
        place = tmp_path / folder
        named = {"best": place / "best.safetensors", **options}
        line = Line()

        def validate(module: nn.Module) -> float:
            return abs(module.weight.item() - 0.7) + 1

        def after_step(step: int, kill=kill) -> None:
            if step == kill:
                raise Killed

        if kill is not None:
            with pytest.raises(Killed):
                train(Line(), place, slope, validate=validate, after_step=after_step, **named)
        history = train(line, place, slope, validate=validate, **named)
        load_parameters(place / "best.safetensors", line)
        found.append((line.weight.item(), history))
    assert found[0] == found[1]


def test_observations_are_kept_beside_every_held_out_loss(tmp_path):
    line = Line()
    history = train(
        line, tmp_path, slope, steps=4, lr=0.1, warmup=0, ema_decay=0, validate_every=2,
        validate=lambda _: 1.0, observe=lambda module: {"weight": module.weight.item()},
    )  # fmt: skip
    (at_2, middle), (at_4, last) = history.observed["weight"]
    assert (at_2, at_4) == (2, 4)
    assert last == line.weight.item() < middle
    assert history.as_figures()["curve"]["observed"] == history.observed
    assert "observed" not in History([1.0]).as_figures()["curve"]


def test_a_start_that_is_no_number_is_told_as_such(tmp_path):
    with pytest.raises(UserError, match="held-out loss is nan before the first step"):
        train(Line(), tmp_path, slope, steps=1, validate=lambda _: math.nan, best=tmp_path / "b")
