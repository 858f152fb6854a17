"""Every score with every mechanism, before any fine-tuning; and what pruning costs in time.

    python benchmarks/pruning.py digits
    python benchmarks/pruning.py cifar10-small --model ../shared/models/cifar10-ddpm-small \\
        --dataset ../shared/data/cifar10 --features ../shared/models/cifar10_features.pt \\
        --samples 320 --sampling-steps 10 --compile --without-reductions \\
        --sensitivity-problems 32

A row is a pruned model: its loss on 2,000 held-out problems with the standard error, and FD. Rows are
kept in `runs/pruning-NAME/`, so the same command goes on where it was interrupted. At the end:
`benchmarks/results/pruning-NAME.json`, and the section pruning-NAME of `docs/results.md`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pruning_report import command_line, into_docs, markdown

from prunedm.console import Terminal
from prunedm.evaluation.features import extract, image_batches, load_features
from prunedm.evaluation.fid import frechet_distance, statistics
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.size import count_macs
from prunedm.evaluation.speed import latencies
from prunedm.folder import Model, load
from prunedm.options import PruneOptions
from prunedm.record import environment, write_json
from prunedm.sampling import make_sampler, sample_batches
from prunedm.scores import SCORES
from prunedm.stages.inputs import held_out_problems, images_for
from prunedm.stages.pruning.job import Job
from prunedm.tables import MECHANISMS

ROOT = Path(__file__).parent.parent
PROBLEMS = 2000
REFERENCES = 10_000
SETTINGS: dict[str, dict[str, Any]] = {
    "channels 30 %": {"mechanism": "channels", "target": "params=0.3"},
    "channels 50 %": {"mechanism": "channels", "target": "params=0.5"},
    "weights 30 %": {"mechanism": "weights", "target": "weights=0.3"},
    "weights 50 %": {"mechanism": "weights", "target": "weights=0.5"},
    "weights 70 %": {"mechanism": "weights", "target": "weights=0.7"},
    "2:4": {"mechanism": "nm", "pattern": "2:4"},
    "1:4": {"mechanism": "nm", "pattern": "1:4"},
    "4:8": {"mechanism": "nm", "pattern": "4:8"},
}
REDUCTIONS = "Channels 30 %: reduction and rounding"
MORE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "Wanda and its kin at 2:4": [
        ("wanda, one bin", {"score": "wanda", "time_bins": 1}),
        ("wanda, mean of 10 bins", {"score": "wanda"}),
        ("wanda, max", {"score": "wanda", "over_time": "max"}),
        ("wanda, median", {"score": "wanda", "over_time": "median"}),
        ("wanda, weighted mean", {"score": "wanda", "over_time": "weighted_mean"}),
        ("wanda, max over problems", {"score": "wanda", "over_problems": "max"}),
        ("wanda, median over problems", {"score": "wanda", "over_problems": "median"}),
        ("wanda, early", {"score": "wanda", "time_range": "early"}),
        ("wanda, middle", {"score": "wanda", "time_range": "middle"}),
        ("wanda, late", {"score": "wanda", "time_range": "late"}),
        ("fluctuation", {"score": "fluctuation"}),
        ("fluctuation, late", {"score": "fluctuation", "time_range": "late"}),
    ],
    "Permutation and allocation": [
        ("2:4, magnitude", {"score": "magnitude"}),
        ("2:4, magnitude, permuted", {"score": "magnitude", "permute": True}),
        (
            "dense, 2:4, 1:4 by sensitivity, half of the weights",
            {"score": "magnitude", "allocation": "sensitivity", "target": "weights=0.5"},
        ),
        (
            "dense, 2:4, 1:4 by sensitivity, half of the MACs",
            {"score": "magnitude", "allocation": "sensitivity", "target": "macs=0.5"},
        ),
        ("2:4, obs", {"mechanism": "obs-nm"}),
        ("2:4, obs, permuted", {"mechanism": "obs-nm", "score": "magnitude", "permute": True}),
    ],
    REDUCTIONS: [
        (
            f"{score}, {reduction}, round to {round_to}",
            {
                "mechanism": "channels",
                "score": score,
                "reduction": reduction,
                "round_to": round_to,
            },
        )
        for score, reduction, round_to in [
            ("taylor", "max", 4),
            ("taylor", "max", 8),
            ("taylor", "max", 16),
            ("taylor", "mean", 8),
            ("taylor", "sum", 8),
            ("taylor", "first", 8),
            ("wanda", "max", 8),
            ("wanda", "mean", 8),
        ]
    ],
}


# single weights rank alike by both; only channels tell them apart
ALIKE = {"magnitude-l2": "magnitude", "taylor-multivariable": "taylor"}


@dataclass
class Bench:
    """One model and dataset, and the rows measured so far."""

    name: str
    arguments: argparse.Namespace

    @property
    def folder(self) -> Path:
        return Path("runs") / f"pruning-{self.name}"

    @cached_property
    def more(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        without = REDUCTIONS if self.arguments.without_reductions else ""
        return {title: entries for title, entries in MORE.items() if title != without}

    @cached_property
    def dense(self) -> Model:
        return load(self.arguments.model)

    @cached_property
    def base(self) -> PruneOptions:
        return PruneOptions(dataset=self.arguments.dataset, device="cpu")

    @cached_property
    def images(self) -> Any:
        return images_for(self.dense, self.base, "train")

    @cached_property
    def held_out(self) -> Any:
        return held_out_problems(self.dense, self.base, PROBLEMS)

    @cached_property
    def features(self) -> Any:
        return load_features(self.arguments.features)

    @cached_property
    def reference(self) -> Any:
        images = images_for(self.dense, self.base, "test")
        batches = image_batches([images[i] for i in range(min(len(images), REFERENCES))])
        return statistics(extract(self.features, batches), features=self.features.name)

    @cached_property
    def compiled(self) -> Any:
        """One compiled copy that serves all models of the dense architecture."""
        copy = deepcopy(self.dense.denoiser)
        return torch.compile(copy, dynamic=False) if self.arguments.compile else copy

    def row(self, key: str, job: Job | None = None) -> dict[str, Any]:
        """A row from disk, or pruned, measured and kept; rows of equal options are measured once."""
        path = self.folder / "rows" / f"{re.sub(r'[^a-z0-9]+', '-', key.lower())}.json"
        if path.exists():
            return _read(path)
        options = job.options.model_dump(mode="json", exclude_defaults=True) if job else {}
        for other in map(_read, path.parent.glob("*.json")):
            if other.get("options") == options:
                write_json(other | {"key": key}, path)
                return _read(path)
        started = time.perf_counter()
        model, details = prune(job) if job else (self.dense, {})
        pruned = time.perf_counter() - started
        result = {"key": key, "seconds_pruning": round(pruned, 1), "options": options}
        result |= self.measure(model) | details
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, path)
        loss, distance = result["loss"], result["fd"]
        print(f"{key:55s} loss {loss:.4f}  FD {distance:.1f}  ({pruned:.0f} s)", flush=True)
        return result

    def measure(self, model: Model) -> dict[str, float]:
        denoiser = self._fast(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.compile):
            loss = denoising_loss(denoiser, self.held_out)
            batches = sample_batches(
                denoiser,
                make_sampler(model.scheduler, "ddim"),
                count=self.arguments.samples,
                steps=self.arguments.sampling_steps,
                shape=model.sample_shape,
                batch_size=80,
            )
            drawn = torch.cat(list(batches))
        own = statistics(extract(self.features, image_batches(drawn)), features=self.features.name)
        distance = frechet_distance(own, self.reference)
        return {"loss": loss.mean, "loss_se": loss.standard_error, "fd": distance}

    def _fast(self, model: Model) -> Any:
        if (
            not self.arguments.compile
            or model.denoiser.num_parameters() < self.dense.denoiser.num_parameters()
        ):
            return model.denoiser
        self.compiled.load_state_dict(
            {f"_orig_mod.{k}": v for k, v in model.denoiser.state_dict().items()}
        )
        return self.compiled

    def job(self, **options: Any) -> Job:
        wanted = PruneOptions(**(self.base.model_dump(exclude_unset=True) | options))
        return Job(deepcopy(self.dense), wanted, self.images, Terminal())


class ScoredJob(Job):
    """A job whose scores are made once for all settings."""

    cache: dict[str, dict[str, torch.Tensor]] = {}  # noqa: RUF012 (one for the whole script)

    def scores(self) -> dict[str, torch.Tensor]:
        name = self.options.score
        if name not in self.cache:
            self.cache.clear()
            self.cache[name] = super().scores()
        return self.cache[name]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def prune(job: Job) -> tuple[Model, dict[str, Any]]:
    details = MECHANISMS[job.options.mechanism](job)
    if job.model.masks is not None:
        job.model.masks.check_pattern()
        job.model.masks.apply_(job.model.denoiser)
    macs = count_macs(job.model.denoiser, job.model.example())
    shown = ("requested", "achieved", "reason", "norms_regrouped")
    return job.model, {"macs": macs} | {k: details[k] for k in shown if k in details}


def rows_of(bench: Bench) -> Iterator[dict[str, Any]]:
    yield bench.row("dense")
    for score in [*SCORES, "obs"]:
        for setting, options in SETTINGS.items():
            channels = options["mechanism"] == "channels"
            if (score == "obs" and channels) or (score in ALIKE and not channels):
                continue
            wanted = options | (
                {"mechanism": f"obs-{options['mechanism']}"} if score == "obs" else {"score": score}
            )
            job = bench.job(**wanted)
            scored = ScoredJob(job.model, job.options, job.images, job.progress)
            yield bench.row(f"{score} / {setting}", scored)
    for title, entries in bench.more.items():
        for label, options in entries:
            wanted = {"mechanism": "nm"} | options
            if "allocation" in options:
                wanted["sensitivity_problems"] = bench.arguments.sensitivity_problems
            yield bench.row(f"{title} / {label}", bench.job(**wanted))


def kernel_ratio() -> dict[str, float]:
    """Time of a 2:4 mask for 36M weights over that of one torch.abs and copy, in one run."""
    from prunedm.masks import Pattern
    from prunedm.removal.nm import nm_mask

    weight = torch.randn(4000, 1000, 3, 3, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(weight)
    calls = {
        "abs and copy": lambda: target.copy_(weight.abs()),
        "2:4": lambda: nm_mask(weight, Pattern(2, 4)),
        "4:8": lambda: nm_mask(weight, Pattern(4, 8)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    medians = {name: sorted(values)[3] for name, values in times.items()}
    return medians | {
        f"{name} ratio": medians[name] / medians["abs and copy"] for name in ("2:4", "4:8")
    }


def latency_rows(bench: Bench) -> list[dict[str, Any]]:
    """Latency at batch 16 against MACs, for channel-pruned models, timed in turns with dense."""
    settings = [(r, t) for r in (8, 16) for t in ("macs=0.3", "macs=0.5")]
    jobs = [
        bench.job(mechanism="channels", score="magnitude", target=t, round_to=r)
        for r, t in settings
    ]
    models = [prune(job)[0].denoiser for job in jobs]
    inputs = bench.dense.example(16)
    timed = latencies([(m, inputs) for m in (bench.dense.denoiser, *models)], repeats=20)
    dense_macs = count_macs(bench.dense.denoiser, bench.dense.example())
    rows = []
    for (round_to, target), denoiser, timing in zip(settings, models, timed[1:], strict=True):
        macs = 1 - count_macs(denoiser, bench.dense.example()) / dense_macs
        fall = 1 - timing.median_ms / timed[0].median_ms
        rows.append(
            {
                "target": target,
                "round_to": round_to,
                "macs_removed": macs,
                "latency_ms": timing.median_ms,
                "spread_ms": timing.spread_ms,
                "dense_ms": timed[0].median_ms,
                "latency_removed": fall,
                "ratio": fall / macs,
            }
        )
    return rows


def calibration_memory(bench: Bench) -> dict[str, float]:
    """Peak MB of `prunedm prune --score wanda` on few and on many problems, each in a new process."""
    code = (
        "import atexit, resource, sys; from prunedm.cli import main; atexit.register(lambda: print("
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)); main(sys.argv[1:])"
    )
    peaks = {}
    for count in (256, 2048):
        with TemporaryDirectory() as folder:
            command = [
                sys.executable, "-c", code, "prune", str(bench.arguments.model), f"{folder}/out",
                "--dataset", str(bench.arguments.dataset), "--mechanism", "nm", "--score", "wanda",
                "--calibration-problems", str(count), "--pictures", "0", "--device", "cpu",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[str(count)] = int(done.stderr.strip().splitlines()[-1]) / 1024
    return peaks


def side_measurement(bench: Bench, name: str, make: Callable[[], Any]) -> Any:
    """Something beside the rows, kept on disk like them."""
    path = bench.folder / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(make(), path)
        print(f"{name}: done", flush=True)
    return _read(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--features", default="digits-cnn")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--sensitivity-problems", type=int, default=128)
    parser.add_argument(
        "--compile", action="store_true", help="compiled and in bf16: loss and samples"
    )
    parser.add_argument(
        "--without-reductions", action="store_true", help="no table of reductions and rounding"
    )
    bench = Bench(parser.parse_args().name, parser.parse_args())
    command = command_line()
    rows = list(rows_of(bench))
    result = {
        "name": f"pruning-{bench.name}",
        "command": command,
        **environment("cpu"),
        "seed": 0,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "latency": side_measurement(bench, "latency", lambda: latency_rows(bench)),
        "kernel": side_measurement(bench, "kernel", kernel_ratio),
        "calibration_memory_mb": side_measurement(
            bench, "memory", lambda: calibration_memory(bench)
        ),
    }
    write_json(result, ROOT / "benchmarks" / "results" / f"{result['name']}.json")
    arguments = bench.arguments
    body = markdown(
        result,
        conditions=(
            f"the denoising loss on {PROBLEMS} held-out problems ± its standard error, then "
            f"{bench.features.name} of {arguments.samples} ddim-{arguments.sampling_steps} samples"
            f"{', both in bf16 autocast' if arguments.compile else ''}"
        ),
        scores=[*SCORES, "obs"],
        alike=ALIKE,
        settings=list(SETTINGS),
        more={title: [label for label, _ in entries] for title, entries in bench.more.items()},
    )
    into_docs(result["name"], body)


if __name__ == "__main__":
    main()
