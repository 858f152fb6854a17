"""Mask learning: estimators on frozen weights, what a step costs, the contest after fine-tuning.

    python benchmarks/mask_learning.py digits
    python benchmarks/mask_learning.py cifar10-small --model ../shared/models/cifar10-ddpm-small \\
        --dataset ../shared/data/cifar10 --flip --features ../shared/models/cifar10_features.pt \\
        --batch-size 32 --seconds 1000 --estimators relaxed --frozen 2:4 \\
        --contest-seconds 150 --lr 5e-4 --calibration 128 --samples 320 --sampling-steps 20 \\
        --contestants "magnitude;Wanda;OBS;guided"

*Frozen*: the share of the loss gap that learning closes, (L(m_0) - L(m)) / (L(m_0) - L(dense)),
from Wanda's masks m_0, in the same wall time for every estimator. *Contest*: masks, then fine-tuning
under them, all in the same total wall time. Losses are of hard masks in float32 on 2,000 held-out
problems. Rows are kept in `runs/mask-learning-NAME/`, so the same command goes on where it was
interrupted. At the end: `benchmarks/results/mask-learning-NAME.json`, and the section of that name in
`docs/results.md`.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mask_learning_costs import costs
from mask_learning_report import markdown
from pruning_report import command_line, into_docs

from prunedm.console import Terminal
from prunedm.evaluation.features import extract, image_batches, load_features
from prunedm.evaluation.fid import frechet_distance, statistics
from prunedm.evaluation.loss import denoising_loss
from prunedm.folder import Model, load
from prunedm.options import FinetuneOptions, LearnOptions, PruneOptions
from prunedm.record import environment, write_json
from prunedm.sampling import make_sampler, sample_batches
from prunedm.stages import finetune, learn, prune
from prunedm.stages.inputs import held_out_problems, images_for

ROOT = Path(__file__).parent.parent
PROBLEMS = 2000
REFERENCES = 10_000
# MaskPro's setting; its lead of logits C, which is its exploration, is tried at three values
CLASSIC: dict[str, Any] = {
    "estimator": "policy-gradient-classic",
    "distribution": "plackett-luce",
    "batch_size": 32,
    "dataset_size": 512,
    "distill": 0.0,
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "relaxed (default)": {},
    "straight-through": {"estimator": "straight-through"},
    "policy gradient": {"estimator": "policy-gradient"},
    **{f"classic, C = {c}": CLASSIC | {"logits": float(c)} for c in (10, 5, 3)},
    "dense output, classic, C = 5": CLASSIC | {"logits": 5.0, "distill": 1.0},
}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "magnitude": {"mechanism": "nm", "score": "magnitude"},
    "Wanda": {"mechanism": "nm", "score": "wanda"},
    "OBS": {"mechanism": "obs-nm", "obs_swaps": 0, "obs_guidance": 0.0},
    "OBS with swaps": {"mechanism": "obs-nm", "obs_guidance": 0.0},
    "guided OBS with swaps (default)": {"mechanism": "obs-nm"},
}
LEARNERS: dict[str, dict[str, Any]] = {  # a third of the time; from dense weights, one seed
    "relaxed on frozen weights": {},
    "straight-through on frozen weights": {"estimator": "straight-through"},
    "SR-STE": {
        "estimator": "sr-ste",
        "train_weights": True,
        "weight_lr": 1e-3,
        "warmup": 20,
        "clip": 1.0,
        "distill": 0.9,
        "keep": "last",
    },
}


@dataclass
class Bench:
    """One model and dataset, and what was measured so far."""

    arguments: argparse.Namespace

    @cached_property
    def folder(self) -> Path:
        return Path("runs") / f"mask-learning-{self.arguments.name}"

    @cached_property
    def data(self) -> dict[str, Any]:
        return {"dataset": self.arguments.dataset, "flip": self.arguments.flip, "device": "cpu"}

    @cached_property
    def loop(self) -> dict[str, Any]:
        """What every training run here has in common: no validation, no checkpoints on the clock."""
        return self.data | {
            "batch_size": self.arguments.batch_size,
            "mixed_precision": self.arguments.mixed_precision,
            "validate_every": 0,
            "validation_problems": 100,
            "checkpoint_every": 0,
        }

    @cached_property
    def dense(self) -> Model:
        return load(self.arguments.model)

    @cached_property
    def held_out(self) -> Any:
        return held_out_problems(self.dense, PruneOptions(**self.data), PROBLEMS)

    @cached_property
    def features(self) -> Any:
        return load_features(self.arguments.features)

    @cached_property
    def reference(self) -> Any:
        images = images_for(self.dense, PruneOptions(**self.data), "test")
        batches = image_batches([images[i] for i in range(min(len(images), REFERENCES))])
        return statistics(extract(self.features, batches), features=self.features.name)

    def kept(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row from disk, or made and kept."""
        path = self.folder / "rows" / f"{re.sub(r'[^a-z0-9]+', '-', key.lower())}.json"
        if not path.exists():
            row = {"key": key} | make()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(row, path)
            print({name: value for name, value in row.items() if name != "options"}, flush=True)
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def loss(self, model: Model) -> dict[str, float]:
        loss = denoising_loss(model.denoiser, self.held_out)
        return {"loss": loss.mean, "loss_se": loss.standard_error}

    def fd(self, model: Model, seed: int) -> float:
        batches = sample_batches(
            model.denoiser,
            make_sampler(model.scheduler, "ddim"),
            count=self.arguments.samples,
            steps=self.arguments.sampling_steps,
            codec=model.codec,
            condition=model.condition,
            batch_size=100,
            seed=seed,
        )
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=self.arguments.mixed_precision == "bf16"
        ):
            drawn = torch.cat(list(batches))
        own = statistics(extract(self.features, image_batches(drawn)), features=self.features.name)
        return frechet_distance(own, self.reference)

    def step_seconds(self, key: str, run: Callable[[int, Path], float], short: int = 4) -> float:
        """Seconds of one step: what 24 more of them add to a run's wall time."""

        def measure() -> dict[str, Any]:
            run(1, self.scratch)  # warm
            first, second = run(short, self.scratch), run(short + 24, self.scratch)
            return {
                "step_s": (second - first) / 24,
                "start_s": first - short * (second - first) / 24,
            }

        row = self.kept(f"step of {key}", measure)
        return float(row["step_s"])

    @property
    def scratch(self) -> Path:
        """A folder that is not there."""
        place = self.folder / "scratch"
        shutil.rmtree(place, ignore_errors=True)
        return place

    def out(self, key: str) -> Path:
        return self.folder / re.sub(r"[^a-z0-9]+", "-", key.lower())


def _named(table: dict[str, Any], wanted: list[str]) -> list[str]:
    """Keys by their names, or by the beginnings of their names."""
    found = {key for name in wanted for key in table if key == name}
    found |= {key for name in wanted if name not in table for key in table if key.startswith(name)}
    return [key for key in table if key in found]


def frozen(bench: Bench, pattern: str) -> Iterator[dict[str, Any]]:
    """The share of the gap that each estimator closes from Wanda's masks in the same wall time."""
    first = bench.out(f"wanda {pattern}")
    options = PruneOptions(mechanism="nm", score="wanda", pattern=pattern, pictures=0, **bench.data)
    prune(bench.arguments.model, first, options)
    dense = bench.kept("dense", lambda: bench.loss(bench.dense))
    start = bench.kept(f"wanda {pattern}", lambda: bench.loss(load(first)))
    for full in _named(ESTIMATORS, bench.arguments.estimators.split(";")):
        settings = bench.loop | ESTIMATORS[full] | {"masks": str(first), "keep": "last"}

        def run(steps: int, out: Path, settings: Any = settings, **more: int) -> float:
            options = LearnOptions(**settings | {"steps": steps} | more)
            record, _ = learn(bench.arguments.model, out, options, progress=Terminal())
            return record.wall_time_s

        def measure(full: str = full, run: Any = run, settings: Any = settings) -> dict[str, Any]:
            size = settings["batch_size"]
            # a small cycle shows what a step costs once the dense outputs are known
            known = {"dataset_size": 4 * size} if "dataset_size" not in settings else {}
            new = bench.step_seconds(f"{full}, new problems", run)
            later = bench.step_seconds(f"{full}, known problems", lambda s, o: run(s, o, **known))
            epoch = LearnOptions(**settings).dataset_size // size
            seconds = bench.arguments.seconds - 5  # for the start
            steps = int(min(epoch, seconds / new) + max(0.0, seconds - epoch * new) / later)
            out = bench.out(f"{full} {pattern}")
            taken = run(steps, out)
            found = bench.loss(load(out))
            share = (start["loss"] - found["loss"]) / (start["loss"] - dense["loss"])
            changed = load(out).record.figures["groups_changed"]  # type: ignore[union-attr]
            return {
                "pattern": pattern,
                "estimator": full,
                "share": share,
                "steps": steps,
                "seconds": taken,
                "groups_changed": changed,
            } | found

        yield bench.kept(f"frozen {full} {pattern}", measure)


def contest(bench: Bench, pattern: str, seed: int) -> Iterator[dict[str, Any]]:
    """Masks and fine-tuning in the same total wall time; learners take a third of it."""
    total = bench.arguments.contest_seconds
    tune = bench.loop | {
        "lr": bench.arguments.lr,
        "seed": seed,
        "teacher": str(bench.arguments.model),
    }
    ones = {
        "pattern": pattern,
        "pictures": 0,
        "seed": seed,
        "calibration_problems": bench.arguments.calibration,
    } | bench.data

    def run(steps: int, out: Path) -> float:
        masked = bench.out("scratch masks")
        prune(
            bench.arguments.model, masked, PruneOptions(mechanism="nm", score="magnitude", **ones)
        )
        options = FinetuneOptions(**tune | {"steps": steps, "seed": 0})
        return finetune(masked, out, options, progress=Terminal())[0].wall_time_s

    def tuned(name: str, masked: Path, spent: float) -> dict[str, Any]:
        """Fine-tune for what is left of the time, and measure."""
        step = bench.step_seconds("finetune", run)
        steps = int((total - spent) / step)
        out = bench.out(f"{name} {pattern} seed {seed} tuned")
        finetune(masked, out, FinetuneOptions(**tune | {"steps": steps}), progress=Terminal())
        model = load(out)
        start = bench.loss(load(masked))["loss"]
        facts = {"contestant": name, "pattern": pattern, "seed": seed, "mask_seconds": spent}
        row = facts | {"steps": steps, "loss_start": start, "fd": bench.fd(model, seed)}
        shutil.rmtree(out)
        return row | bench.loss(model)

    chosen = bench.arguments.contestants.split(";")
    for name in _named(CONTESTANTS, chosen):
        settings = CONTESTANTS[name]

        def measure(name: str = name, settings: Any = settings) -> dict[str, Any]:
            masked = bench.out(f"{name} {pattern} seed {seed}")
            record, _ = prune(
                bench.arguments.model, masked, PruneOptions(**ones | settings), progress=Terminal()
            )
            return tuned(name, masked, record.wall_time_s)

        yield bench.kept(f"contest {name} {pattern} seed {seed}", measure)
    for name in _named(LEARNERS, chosen) if seed == 0 else ():
        settings = LEARNERS[name]

        def measured(name: str = name, settings: Any = settings) -> dict[str, Any]:
            plain = bench.loop | settings | {"seed": seed, "pattern": pattern}

            def learned(steps: int, out: Path) -> float:
                options = LearnOptions(**plain | {"steps": steps})
                return learn(bench.arguments.model, out, options)[0].wall_time_s

            step = bench.step_seconds(f"{name} in the contest", learned)
            steps = int(total / 3 / step)
            out = bench.out(f"{name} {pattern}")
            learned(steps, out)
            return tuned(name, out, steps * step)

        yield bench.kept(f"contest {name} {pattern} seed {seed}", measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--features", default="digits-cnn")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--mixed-precision", default="bf16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="of fine-tuning in the contest")
    parser.add_argument("--seconds", type=float, default=290, help="of each estimator")
    parser.add_argument("--contest-seconds", type=float, default=60, help="of each contestant")
    parser.add_argument("--calibration", type=int, default=512, help="problems of scores and OBS")
    parser.add_argument("--seeds", type=int, default=3, help="of the contest")
    parser.add_argument(
        "--estimators", default=";".join(ESTIMATORS), help="at 2:4, by beginnings of their names"
    )
    parser.add_argument(
        "--contestants",
        default=";".join([*CONTESTANTS, *LEARNERS]),
        help="by beginnings of their names",
    )
    parser.add_argument(
        "--frozen", default="2:4;1:4", help="patterns on frozen weights, after 2:4 the default only"
    )
    arguments = parser.parse_args()
    bench = Bench(arguments)
    rows: dict[str, list[Any]] = {"frozen": []}
    for pattern in arguments.frozen.split(";"):
        rows["frozen"] += frozen(bench, pattern)
        arguments.estimators = "relaxed"
    rows["contest"] = [
        row
        for seed in range(arguments.seeds)
        for pattern in ("2:4", "1:4")
        for row in contest(bench, pattern, seed)
    ]
    result = {
        "name": f"mask-learning-{arguments.name}",
        "command": command_line(),
        **environment("cpu"),
        "threads": torch.get_num_threads(),
        "seconds": arguments.seconds,
        "contest_seconds": arguments.contest_seconds,
        "dense": bench.kept(
            "dense with FD", lambda: bench.loss(bench.dense) | {"fd": bench.fd(bench.dense, 0)}
        ),
        "first": {p: bench.kept(f"wanda {p}", dict) for p in arguments.frozen.split(";")},
        **rows,
        "costs": bench.kept("costs", lambda: costs(bench.dense, bench.loop)),
    }
    write_json(result, ROOT / "benchmarks" / "results" / f"{result['name']}.json")
    into_docs(
        result["name"],
        markdown(
            result,
            samples=f"{arguments.samples} ddim-{arguments.sampling_steps} samples",
            features=bench.features.name,
        ),
    )


if __name__ == "__main__":
    main()
