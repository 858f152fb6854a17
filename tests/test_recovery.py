"""Recovery: every term against its definition, and fine-tuning's options in the stage."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import noise_images, problems, tiny_folder, tiny_model
from torch import nn
from torch.autograd import gradcheck

from prunedm.architecture import answer
from prunedm.errors import UserError
from prunedm.folder import load, save
from prunedm.options import FinetuneOptions, LoopOptions, PruneOptions
from prunedm.progress import Silent
from prunedm.randomness import generator_for
from prunedm.record import read_record
from prunedm.recovery.features import (
    alignment,
    block_losses,
    block_names,
    block_outputs,
    feature_losses,
)
from prunedm.recovery.objective import Mixture, data_objective, recovery_objective
from prunedm.recovery.sensitivity import (
    directions,
    perturbed_rows,
    responses,
    sensitivity_losses,
    with_perturbed,
)
from prunedm.stages import finetune, prune
from prunedm.task import predict
from prunedm.training import compiling
from prunedm.training.ema import Ema

QUICK = {"batch_size": 4, "validation_problems": 8, "device": "cpu", "warmup": 1}
EVERYTHING = Mixture(output=0.6, features=0.7, sensitivity=0.3, every=2, size=0.1)


class Listener(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def networks() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher that disagree, as float64."""
    student = tiny_model().denoiser
    teacher = tiny_model().denoiser
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return student, teacher.requires_grad_(False)


# -------------------------------------------------------------------------------- features


def test_blocks_of_equal_width_are_compared_number_by_number():
    student, teacher = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1)
    for n, got in enumerate(block_losses(student, teacher)):
        apart = float((student[n] - teacher[n]).square().sum())
        assert float(got) == pytest.approx(apart / float(teacher[n].square().sum()), rel=1e-9)
    assert not block_losses(student, student).any()


def test_alignment_is_the_cosine_of_the_similarities_of_positions():
    student, teacher = random(2, 3, 7), random(2, 5, 7, seed=1)
    for n, got in enumerate(alignment(student, teacher)):
        grams = []
        for maps in (student[n], teacher[n]):
            centred = maps - maps.mean(1, keepdim=True)
            grams.append((centred.T @ centred).flatten())
        assert float(got) == pytest.approx(float(torch.cosine_similarity(*grams, dim=0)), rel=1e-9)


def test_alignment_sees_neither_order_nor_scale_nor_rotation_of_channels():
    maps = random(2, 6, 9)
    rotation, _ = torch.linalg.qr(random(6, 6, seed=2))
    for other in (3 * maps[:, torch.randperm(6)], torch.einsum("dc,ncp->ndp", rotation, maps)):
        assert alignment(maps, other).tolist() == pytest.approx([1, 1], rel=1e-9)


def test_channels_that_were_constant_can_go_without_a_loss():
    teacher = random(2, 6, 3, 3)
    teacher[:, 4:] = 0.5
    assert block_losses(teacher[:, :4], teacher).abs().max() < 1e-12
    assert (block_losses(teacher[:, :2], teacher) > 0.01).all()


def test_channels_in_another_order_are_no_loss_where_that_is_known():
    teacher = random(2, 6, 3, 3)
    student = teacher[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    assert block_losses(student, teacher, reordered=True).abs().max() < 1e-12
    assert (block_losses(student, teacher) > 0.1).all()


def test_a_block_of_one_position_has_no_gradient_but_no_nan():
    student = random(2, 3, 1, 1).requires_grad_()
    block_losses(student, random(2, 5, 1, 1, seed=1)).sum().backward()
    assert not student.grad.any()


@pytest.mark.parametrize("widths", [(3, 3), (3, 5)])
def test_gradients_of_feature_losses(widths):
    teacher = {"a": random(2, widths[1], 2, 3, seed=1)}

    def total(student: torch.Tensor) -> torch.Tensor:
        return feature_losses({"a": student}, teacher)

    assert gradcheck(total, random(2, widths[0], 2, 3).requires_grad_())


def test_listening_to_blocks_hears_what_the_network_goes_on_with():
    denoiser, batch = tiny_model().denoiser, problems().batch(range(3))
    with torch.no_grad(), block_outputs(denoiser) as blocks:
        output = predict(denoiser, batch)
        found = blocks.take(3)
        last = found["up_blocks.1"]
        ended = denoiser.conv_out(denoiser.conv_act(denoiser.conv_norm_out(last)))
        embedding = denoiser.time_embedding(denoiser.time_proj(batch.inputs["timestep"]))
        assert blocks.take(3) == {}
        middle = denoiser.mid_block(found["down_blocks.1"], embedding)
    assert list(found) == block_names(denoiser)
    assert torch.allclose(ended, output, atol=1e-6)
    assert torch.allclose(middle, found["mid_block"], atol=1e-6)
    blocks.take(3)
    predict(denoiser, batch)
    assert blocks.take(3) == {}


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"blocks of a Linear are not known.*--match-features 0"):
        block_names(nn.Linear(2, 2))


# ----------------------------------------------------------------------------- sensitivity


class Small(nn.Module):
    """A smooth network of images of 2 channels, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(2, 4, 3, padding=1, dtype=torch.float64)
        self.second = nn.Conv2d(4, 2, 3, padding=1, dtype=torch.float64)

    def forward(self, sample: torch.Tensor, **_) -> tuple[torch.Tensor]:
        return (self.second(torch.tanh(self.first(sample))),)


def small_batch(count: int = 4):
    batch = problems(noise_images(channels=2), seed=3).batch(range(count))
    return replace(batch, inputs={**batch.inputs, "sample": batch.inputs["sample"].double()})


def answered(network: nn.Module, batch, rows: list[int], size: float) -> torch.Tensor:
    joined = with_perturbed(batch, rows, seed=0, size=size)
    return responses(predict(network, joined), rows, size=size)


def test_responses_tend_to_jacobian_vector_products():
    network, batch, rows = Small(0), small_batch(), [0, 1, 3]
    v_MCHW = directions(batch, rows, 0)
    _, wanted = torch.func.jvp(
        lambda x: network(x)[0], (batch.inputs["sample"][rows],), (v_MCHW.double(),)
    )
    errors = [
        float((answered(network, batch, rows, size) - wanted).norm().detach() / wanted.norm())
        for size in (1e-1, 1e-2, 1e-5)
    ]
    assert errors[2] < 1e-5 < errors[0] < 0.2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # first order, as one-sided ones are


def test_sensitivity_is_relative_and_zero_where_the_networks_agree():
    student, teacher, batch = Small(0), Small(1), small_batch()
    own, wanted = (answered(network, batch, [0, 2], 1e-2) for network in (student, teacher))
    for got, s, t in zip(sensitivity_losses(own, wanted), own, wanted, strict=True):
        assert got.item() == pytest.approx(float((s - t).square().sum() / t.square().sum()))
    assert not sensitivity_losses(own, own.clone()).any()
    assert torch.equal(sensitivity_losses(2 * own, 2 * wanted), sensitivity_losses(own, wanted))


def test_the_gradient_of_sensitivity():
    student, teacher, batch = Small(0), Small(1), small_batch(2)
    wanted = answered(teacher, batch, [0, 1], 0.1).detach()

    def total(weight: torch.Tensor) -> torch.Tensor:
        joined = with_perturbed(batch, [0, 1], seed=0, size=0.1)
        output = torch.func.functional_call(
            student, {"second.weight": weight}, joined.inputs["sample"]
        )
        return sensitivity_losses(responses(output[0], [0, 1], size=0.1), wanted).sum()

    assert gradcheck(total, student.second.weight.detach().clone().requires_grad_())


def test_perturbed_problems_are_chosen_and_moved_by_their_numbers():
    stream = problems(noise_images())
    whole, tail = stream.batch(range(12)), stream.batch(range(8, 12))
    assert perturbed_rows(whole, 2) == [0, 1, 4, 5, 8, 9]
    assert perturbed_rows(tail, 2) == [0, 1]
    assert perturbed_rows(whole, 1) == list(range(12))
    joined = with_perturbed(whole, [8, 9], seed=4, size=0.5)
    again = with_perturbed(tail, [0, 1], seed=4, size=0.5)
    assert torch.equal(joined.inputs["sample"][12:], again.inputs["sample"][4:])
    assert joined.numbers == (*range(12), 8, 9)
    assert torch.equal(joined.inputs["timestep"][12:], whole.inputs["timestep"][8:10])
    moved = (joined.inputs["sample"][12] - whole.inputs["sample"][8]) / 0.5
    wanted = torch.randn(1, 8, 8, generator=generator_for(4, "direction", 8))
    assert torch.allclose(moved, wanted, atol=1e-5)
    assert with_perturbed(whole, [], seed=4, size=0.5) is whole


# --------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_distillation_mixes_data_and_teacher(share):
    student, teacher = tiny_model().denoiser, tiny_model(act_fn="relu").denoiser
    batch = problems().batch(range(3))
    with recovery_objective(student, teacher, Mixture(output=share)) as objective:
        got = objective(student, batch, 0)
    with torch.no_grad():
        output, wanted = (predict(m, batch).double() for m in (student, teacher))
    data = (output - batch.target.double()).square().mean()
    copy = (output - wanted).square().mean()
    assert got.item() == pytest.approx(float((1 - share) * data + share * copy), rel=1e-5)
    got.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad.any() for p in student.parameters())


def separately(student: nn.Module, teacher: nn.Module, batch) -> torch.Tensor:
    """`EVERYTHING`, term by term, each from passes of its own."""
    m, rows = EVERYTHING, [0, 1, 4, 5]
    answers, blocks, moved = [], [], []
    for network in (student, teacher):
        found: dict[str, torch.Tensor] = {}
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name, found=found: found.__setitem__(
                    name, out[0] if isinstance(out, tuple) else out
                )
            )
            for name in (
                "down_blocks.0",
                "down_blocks.1",
                "mid_block",
                "up_blocks.0",
                "up_blocks.1",
            )
        ]
        answers.append(predict(network, batch))
        blocks.append(found)
        for handle in handles:
            handle.remove()
        v = torch.stack(
            [torch.randn(1, 8, 8, generator=generator_for(m.seed, "direction", n)) for n in rows]
        )
        changed = batch.inputs["sample"][rows] + m.size * v
        out = network(changed, batch.inputs["timestep"][rows], return_dict=False)[0]
        moved.append((out - answers[-1][rows]) / m.size)
    (own, copy), (s, t) = answers, moved
    data, copied = (own - batch.target).square().mean(), (own - copy).square().mean()
    errors = [
        ((blocks[0][k] - w).square().sum((1, 2, 3)) / w.square().sum((1, 2, 3))).mean()
        for k, w in blocks[1].items()
    ]
    response = ((s - t).square().sum((1, 2, 3)) / t.square().sum((1, 2, 3))).sum() * m.every / 6
    mixed = (1 - m.output) * data + m.output * copied
    return mixed + m.features * torch.stack(errors).mean() + m.sensitivity * response


def test_one_pass_over_everything_is_the_sum_of_its_terms():
    student, teacher = networks()
    batch = problems().batch(range(6))
    with recovery_objective(student, teacher, EVERYTHING) as objective:
        got = objective(student, batch, 0)
    wanted = separately(student, teacher, batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    parameters = list(student.parameters())
    for one, other in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert not any(m._forward_hooks for n in (student, teacher) for m in n.modules())


def test_halves_of_a_batch_average_to_the_whole():
    """What makes several processes agree with one."""
    student, teacher = networks()
    stream = problems()
    with recovery_objective(student, teacher, EVERYTHING) as objective, torch.no_grad():
        whole, one, two = (
            float(objective(student, stream.batch(part), 0))
            for part in (range(8), range(4), range(4, 8))
        )
        odd = [float(objective(student, stream.batch(range(k, k + 2)), 0)) for k in (0, 2, 4, 6)]
    assert whole == pytest.approx((one + two) / 2, rel=1e-5)
    assert whole == pytest.approx(sum(odd) / 4, rel=1e-5)  # though only every other perturbs any


def test_teacher_terms_vanish_where_the_student_is_the_teacher():
    student = tiny_model().denoiser
    mixture = Mixture(output=1.0, features=1.0, sensitivity=1.0, every=1)
    with recovery_objective(student, tiny_model().denoiser, mixture) as objective:
        loss = objective(student, problems().batch(range(4)), 0)
    assert loss.item() == 0


def test_blocks_of_a_narrowed_student_are_matched_too(narrow):
    student, teacher = load(narrow).denoiser, load(narrow.parent / "dense").denoiser
    batch = problems().batch(range(2))
    losses = {}
    for weight in (0.0, 1.0):
        mixture = Mixture(features=weight, sensitivity=1e-12, every=1)
        with recovery_objective(student, teacher, mixture) as objective:
            losses[weight] = objective(student, batch, 0)
    assert 0 < losses[1.0].item() - losses[0.0].item() < 1
    (gradient,) = torch.autograd.grad(losses[1.0] - losses[0.0], [student.conv_in.weight])
    assert gradient.any()


# ----------------------------------------------------------------------------- in the stage


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def narrow(place) -> Path:
    save(tiny_model(), place / "dense")
    prune(place / "dense", place / "narrow", PruneOptions(score="magnitude", pictures=0))
    return place / "narrow"


@pytest.fixture(scope="module")
def hybrid(narrow) -> Path:
    """2:4 on top of fewer channels."""
    out = narrow.parent / "hybrid"
    prune(narrow, out, PruneOptions(mechanism="nm", score="magnitude", pictures=0))
    return out


@pytest.fixture(scope="module")
def sparse(narrow) -> Path:
    out = narrow.parent / "sparse"
    options = PruneOptions(mechanism="weights", target="weights=0.5", score="magnitude", pictures=0)
    prune(narrow.parent / "dense", out, options)
    return out


@pytest.mark.parametrize("kind", ["dense", "narrow", "sparse", "hybrid"])
def test_every_kind_of_folder_is_fine_tuned_by_everything(kind, request, narrow, tmp_path):
    source = narrow.parent / "dense" if kind == "dense" else request.getfixturevalue(kind)
    options = FinetuneOptions(
        steps=2, teacher=str(narrow.parent / "dense"), match_features=0.5, match_sensitivity=0.5,
        sensitivity_every=1, lr=1e-2, ema_decay=0.9, validate_every=1, **QUICK,
    )  # fmt: skip
    record, _ = finetune(source, tmp_path / "out", options)
    model, before = load(tmp_path / "out"), load(source)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(model.denoiser.parameters(), before.denoiser.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    assert (model.masks is None) == (kind in ("dense", "narrow"))
    if model.masks is not None:
        assert model.masks.violations(model.denoiser) == {}
        shares = [share for _, share in record.figures["curve"]["observed"]["sparsity"]]
        assert shares == pytest.approx([0.5] * 2, abs=0.01)


def test_masks_hold_in_weights_and_average_after_every_step(hybrid, tmp_path, monkeypatch):
    masks, seen, update = load(hybrid).masks, [], Ema.update

    def spy(self: Ema, module: nn.Module) -> None:
        update(self, module)
        assert masks.violations(module) == {}
        off = [bool(self.shadow[f"{n}.weight"][~mask].any()) for n, mask in masks]
        seen.append(any(off))

    monkeypatch.setattr(Ema, "update", spy)
    options = FinetuneOptions(steps=3, lr=1e-2, weight_decay=0.1, **QUICK)
    finetune(hybrid, tmp_path / "out", options)
    assert seen == [False] * 3


def test_a_weight_off_its_mask_is_not_saved(hybrid, tmp_path):
    model = load(hybrid)
    name, mask = next(iter(model.masks))
    with torch.no_grad():
        model.denoiser.get_parameter(f"{name}.weight")[~mask] = 1e-9
    with pytest.raises(UserError, match=f"masks do not hold in 1 layers, first {name}"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fine_tuning_that_left_its_masks_leaves_nothing(hybrid, tmp_path, monkeypatch):
    from prunedm.masks import Masks

    monkeypatch.setattr(Masks, "hold", lambda *_: lambda: None)
    with pytest.raises(UserError, match="masks do not hold"):
        finetune(hybrid, tmp_path / "out", FinetuneOptions(steps=1, lr=1e-2, **QUICK))
    assert not list(tmp_path.iterdir())


def test_dropout_acts_on_the_student_while_it_trains_and_no_longer(narrow, tmp_path, monkeypatch):
    seen, losses = set(), []

    def spied(student: nn.Module, batch, step: int, **named) -> torch.Tensor:
        blocks = [m for m in student.modules() if type(m).__name__ == "ResnetBlock2D"]
        seen.update((m.dropout.p, m.dropout.training) for m in blocks)
        return plain(student, batch, step, **named)

    from prunedm.recovery import objective

    plain = objective._mixed
    monkeypatch.setattr(objective, "_mixed", spied)
    for p in (None, 0.0, 0.4):
        out = tmp_path / str(p)
        record, _ = finetune(narrow, out, FinetuneOptions(steps=2, dropout=p, **QUICK))
        losses.append(record.figures["curve"]["losses"])
        assert load(out).denoiser.config.dropout == 0.0
    assert seen == {(0.0, True), (0.4, True)}
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_sensitivity": 1.0, "dropout": 0.1}, "dropout would drown responses"),
        ({"match_features": 1.0, "teacher": "none"}, "matched to a teacher"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**options)


def test_a_model_with_dropout_of_its_own_is_refused_where_it_would_drown_sensitivity(tmp_path):
    options = FinetuneOptions(match_sensitivity=1.0, **QUICK)
    with pytest.raises(UserError, match=r"has dropout 0\.3, .*--dropout 0"):
        finetune(tiny_folder(dropout=0.3), tmp_path / "out", options)


def test_a_model_whose_channels_were_reordered_is_known_by_its_lineage(narrow, tmp_path):
    import sys

    stage = sys.modules["prunedm.stages.verbs.finetune"]
    dense, out = narrow.parent / "dense", tmp_path / "permuted"
    options = PruneOptions(mechanism="nm", score="magnitude", permute=True, pictures=0)
    prune(dense, out, options)
    assert stage._reorderings(load(dense)) == stage._reorderings(load(narrow)) == []
    assert stage._reorderings(load(out)) == [load(dense).hash]


@pytest.mark.parametrize(
    ("unet", "scheduler", "more", "message"),
    [
        ({"sample_size": 16}, {}, {}, r"other image shapes \(\(1, 16, 16\), \(1, 8, 8\)\)"),
        ({"num_class_embeds": 3}, {}, {}, r"other numbers of classes \(3, 0\)"),
        (
            {},
            {"prediction_type": "v_prediction"},
            {},
            "another prediction type",
        ),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, {}, "another noise schedule"),
        (
            {
                "block_out_channels": (16,),
                "down_block_types": ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",),
            },
            {},
            {"match_features": 1.0},
            "the teacher has other blocks",
        ),
    ],
)
def test_a_teacher_that_is_none_is_refused(unet, scheduler, more, message, tmp_path):
    teacher = tiny_model(**unet)
    teacher.scheduler = DDPMScheduler(**scheduler)
    save(teacher, tmp_path / "teacher")
    options = FinetuneOptions(steps=1, teacher=str(tmp_path / "teacher"), **more, **QUICK)
    with pytest.raises(UserError, match=message):
        finetune(tiny_folder(), tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


# ------------------------------------------------------------------------- a teacher that went


@pytest.mark.parametrize("named", [False, True])
def test_a_finished_stage_needs_its_teacher_no_more(named, tmp_path):
    dense, out = tmp_path / "dense", tmp_path / "out"
    save(tiny_model(), dense)
    prune(dense, tmp_path / "narrow", PruneOptions(score="magnitude", pictures=0))
    options = FinetuneOptions(steps=1, **QUICK, **({"teacher": str(dense)} if named else {}))
    again = partial(finetune, tmp_path / "narrow", out)
    first, _ = again(options)
    dense.rename(tmp_path / "gone")
    listener = Listener()
    record, made = again(options, progress=listener)
    assert (record.inputs, made) == (first.inputs, False)
    assert "teacher" in record.inputs
    assert listener.said == []
    with pytest.raises(UserError, match="another steps"):
        again(options.model_copy(update={"steps": 2}))
    if named:
        with pytest.raises(UserError, match="no model at"):
            again(options.model_copy(update={"steps": 2}), overwrite=True)
        return
    record, made = again(options.model_copy(update={"steps": 2}), overwrite=True)
    assert made
    assert "teacher" not in record.inputs


# --------------------------------------------------------------------------- a cycle, a memo


def test_a_cycle_of_problems_asks_the_teacher_once(narrow, tmp_path, monkeypatch):
    from prunedm.stages import finetune as _  # noqa: F401

    asked, results = [], []
    import sys

    stage = sys.modules["prunedm.stages.verbs.finetune"]

    def counted(network: nn.Module, inputs) -> torch.Tensor:
        asked.append(len(inputs["sample"]))
        return answer(network, inputs)

    monkeypatch.setattr(stage, "answer", counted)
    for memory in (1.0, 0.0):
        out = tmp_path / str(memory)
        options = FinetuneOptions(steps=6, dataset_size=7, memo_memory=memory, **QUICK)
        finetune(narrow, out, options)
        results.append((load(out).hash, list(asked)))
        asked.clear()
    (one, known), (two, always) = results
    assert one == two
    assert known == [4, 4]  # whole steps, of which there are two
    assert always == known * 3


# -------------------------------------------------------------------------------- compiling


def test_without_a_compiler_the_reason_is_told_and_nothing_else_changes(
    narrow, tmp_path, monkeypatch
):
    def no_compiler(*_, **__):
        raise RuntimeError("no working C++ compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", no_compiler)
    listener = Listener()
    options = FinetuneOptions(steps=2, compile=True, **QUICK)
    finetune(narrow, tmp_path / "compiled", options, progress=listener)
    finetune(narrow, tmp_path / "eager", FinetuneOptions(steps=2, **QUICK))
    (line,) = listener.said
    assert line == (
        "compile: not possible here (no working C++ compiler); training continues uncompiled"
    )
    assert load(tmp_path / "compiled").hash == load(tmp_path / "eager").hash


def test_compiled_steps_do_the_same(hybrid, tmp_path, monkeypatch):
    """Traced, with the eager backend; machine code takes a minute."""
    calls, losses, compile_ = [], [], torch.compile

    def traced(module, **_):
        calls.append(module)
        return compile_(module, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    more = {"match_features": 0.5, "match_sensitivity": 0.5, "sensitivity_every": 1}
    for compiles in (True, False):
        options = FinetuneOptions(steps=2, compile=compiles, **more, **QUICK)
        record, _ = finetune(hybrid, tmp_path / str(compiles), options)
        losses.append(record.figures["curve"]["losses"])
        load(tmp_path / str(compiles)).masks.check_pattern()
    assert calls[0] is compiling._probe
    assert isinstance(calls[1], nn.Module)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_compiled_machine_code_does_the_same(hybrid, tmp_path):
    losses = []
    for compiles in (True, False):
        listener = Listener()
        options = FinetuneOptions(steps=3, compile=compiles, **QUICK)
        record, _ = finetune(hybrid, tmp_path / str(compiles), options, progress=listener)
        losses.append(record.figures["curve"]["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_data_objective_is_the_denoising_loss():
    denoiser, batch = tiny_model().denoiser, problems().batch(range(3))
    wanted = (predict(denoiser, batch) - batch.target).square().mean()
    assert data_objective(denoiser, batch).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert LoopOptions().tracker == "none"
    assert read_record(tiny_folder()) is None
