"""Seconds per step of `prunedm learn` at each preset's batch size, for `prunedm presets`.

    python benchmarks/presets.py digits
    python benchmarks/presets.py cifar10-small --model ../shared/models/cifar10-ddpm-small \
        --dataset ../shared/data/cifar10 --flip

A step draws the problems, computes the loss and its gradient, and updates the logits. It is timed on
new problems, and again on the same ones, whose dense outputs are then known; a held-out loss is timed
too. The lowest of the repeats counts, because other load only adds time. Writes
`benchmarks/results/presets.json` and the packaged table.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from bench import RESULTS, ROOT, Row, command_line, learner_of, parser_of, read

from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load
from prunedm.options import LearnOptions
from prunedm.options.presets import PRESETS
from prunedm.preset_table import SHOWN, StepSeconds, StepTiming, Timings
from prunedm.record import environment, write_json
from prunedm.stages.inputs import (
    device_for,
    held_out_problems,
    images_for,
    training_problems,
)

KEPT = RESULTS / "presets.json"
PACKAGED = ROOT / "src" / "prunedm" / "assets" / "presets" / "learn-times.json"
HELD_OUT = 128  # problems of the loss that is timed


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def steps(model: Model, options: LearnOptions, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat, on new problems and on the same ones again; the first is warm-up."""
    learner, optimizer = learner_of(model, options)
    options, device = options.filled(), device_for(options.device)
    problems = training_problems(model, options, images_for(model, options, "train"))
    generator = torch.Generator(device).manual_seed(0)

    def step(number: int) -> None:
        size = options.batch_size
        batch = problems.batch(range(number * size, (number + 1) * size)).to(device)
        learner(batch, 0.5, generator).backward()
        optimizer.step()
        optimizer.zero_grad()

    pairs = [
        (seconds(lambda k=k: step(k), device), seconds(lambda k=k: step(k), device))
        for k in range(repeats + 1)
    ]
    new, known = zip(*pairs[1:], strict=True)
    return {"new": list(new), "known": list(known)}


def validation(model: Model, options: LearnOptions, repeats: int) -> list[float]:
    device, batches = device_for(options.device), held_out_problems(model, options, HELD_OUT)
    model.denoiser.to(device)
    loss = partial(denoising_loss, model.denoiser, batches, device=device)
    return [seconds(loss, device) for _ in range(repeats + 1)][1:]


def measure(arguments: Namespace) -> Row:
    """All repeats of every estimator and batch size."""
    given = {key: vars(arguments)[key] for key in ("dataset", "flip", "device")}
    model = load(arguments.model)
    taken: Row = {"steps": {}}
    for estimator in SHOWN:
        taken["steps"][estimator] = {
            size: steps(
                model,
                LearnOptions(estimator=estimator, batch_size=size, **given),
                arguments.repeats,
            )
            for size in sorted({preset.batch_size for preset in PRESETS.values()})
        }
    taken["validation"] = validation(model, LearnOptions(**given), arguments.repeats)
    taken["parameters"] = sum(p.numel() for p in model.denoiser.parameters())
    return taken


def timing(arguments: Namespace, taken: Row) -> StepTiming:
    """The lowest of all repeats."""
    about = environment(arguments.device)
    return StepTiming(
        model=arguments.name,
        parameters=taken["parameters"],
        kind="GPU" if device_for(arguments.device).type == "cuda" else "CPU",
        device=about["device"],
        created=about["created"],
        command=command_line(),
        problems=HELD_OUT,
        validation_s=min(taken["validation"]),
        step_s={
            estimator: {
                size: StepSeconds(new=min(step["new"]), known=min(step["known"]))
                for size, step in by_size.items()
            }
            for estimator, by_size in taken["steps"].items()
        },
    )


def keep(found: StepTiming, taken: Row) -> None:
    """Put `found` into both files, replacing the entry of the same model and kind."""
    old = Timings.model_validate_json(PACKAGED.read_text(encoding="utf-8")).measured
    same = (found.model, found.kind)
    others = [timing for timing in old if (timing.model, timing.kind) != same]
    table = Timings(measured=sorted([*others, found], key=lambda t: (t.kind, t.parameters)))
    write_json(table.model_dump(mode="json"), PACKAGED)
    raw = read(KEPT) if KEPT.exists() else {}
    raw[", ".join(same)] = environment() | found.model_dump(mode="json") | {"seconds": taken}
    write_json(raw, KEPT)


def main() -> None:
    parser = parser_of(
        __doc__, {"model": "digits", "dataset": "digits", "flip": False, "repeats": 4}
    )
    parser.add_argument("--device", choices=["auto", "cpu"], default="cpu")
    arguments = parser.parse_args()
    taken = measure(arguments)
    keep(timing(arguments, taken), taken)


if __name__ == "__main__":
    main()
