"""Every score with every mechanism, before any fine-tuning, and the time that pruning takes.

    python benchmarks/pruning.py digits
    python benchmarks/pruning.py cifar10-small --model ../shared/models/cifar10-ddpm-small \\
        --dataset ../shared/data/cifar10 --features ../shared/models/cifar10_features.pt \\
        --samples 320 --sampling-steps 10 --compile --without-reductions \\
        --sensitivity-problems 32

A row is a pruned model: its loss on 2,000 held-out problems with the standard error, and FD. Rows are
kept in `runs/pruning-NAME/`, so the same command continues an interrupted run. At the end:
`benchmarks/results/pruning-NAME.json`, and the section pruning-NAME of `docs/results.md`.
"""

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench import (
    PROBLEMS,
    Bench,
    Row,
    parser_of,
    publish,
    read,
    record,
    samples_in_words,
    section,
    table,
    turns,
)

from prunedm.console import Terminal
from prunedm.evaluation.size import count_macs
from prunedm.evaluation.speed import Way, timings
from prunedm.folder import Model
from prunedm.options import PruneOptions
from prunedm.scores import SCORES
from prunedm.stages.inputs import images_for
from prunedm.stages.pruning.job import PruneJob
from prunedm.tables import MECHANISMS

SETTINGS: dict[str, Row] = {
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
MORE: dict[str, list[tuple[str, Row]]] = {
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


# both rank single weights alike; they differ on channels only
ALIKE = {"magnitude-l2": "magnitude", "taylor-multivariable": "taylor"}


class PruningBench(Bench):
    """Rows of equal options are measured once."""

    kind = "pruning"
    batch = 80

    @property
    def half(self) -> bool:
        return bool(self.arguments.compile)

    @cached_property
    def images(self) -> Any:
        return images_for(self.dense, PruneOptions(**self.data), "train")

    @cached_property
    def compiled(self) -> Any:
        """One compiled copy that serves all models of the dense architecture."""
        return torch.compile(deepcopy(self.dense.denoiser), dynamic=False)

    def row(self, key: str, job: PruneJob | None = None) -> Row:
        """A row from disk, or pruned, measured and saved."""
        options = job.options.model_dump(mode="json", exclude_defaults=True) if job else {}

        def make() -> Row:
            for other in map(read, (self.folder / "rows").glob("*.json")):
                if other.get("options") == options:
                    return {k: v for k, v in other.items() if k != "key"}
            started = time.perf_counter()
            model, details = prune(job) if job else (self.dense, {})
            seconds = round(time.perf_counter() - started, 1)
            found = {"seconds_pruning": seconds, "options": options}
            return found | self.measure(model) | details

        return self.kept(key, make)

    def measure(self, model: Model) -> Row:
        denoiser = self._fast(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.loss(denoiser)
        return loss | {"fd": self.fd(model, denoiser)}

    def _fast(self, model: Model) -> Any:
        narrower = model.denoiser.num_parameters() < self.dense.denoiser.num_parameters()
        if not self.arguments.compile or narrower:
            return model.denoiser
        self.compiled.load_state_dict(
            {f"_orig_mod.{k}": v for k, v in model.denoiser.state_dict().items()}
        )
        return self.compiled

    def job(self, **options: Any) -> PruneJob:
        wanted = PruneOptions(**self.data | options)
        return PruneJob(deepcopy(self.dense), wanted, self.images, Terminal())


class ScoredJob(PruneJob):
    """A job whose scores are made once for all settings."""

    cache: dict[str, dict[str, torch.Tensor]] = {}  # noqa: RUF012 (one for the whole script)

    def scores(self) -> dict[str, torch.Tensor]:
        name = self.options.score
        if name not in self.cache:
            self.cache.clear()
            self.cache[name] = super().scores()
        return self.cache[name]


def prune(job: PruneJob) -> tuple[Model, Row]:
    details = MECHANISMS[job.options.mechanism](job)
    if job.model.masks is not None:
        job.model.masks.check_pattern()
        job.model.masks.apply_(job.model.denoiser)
    macs = count_macs(job.model.denoiser, job.model.example())
    shown = ("requested", "achieved", "reason", "norms_regrouped")
    return job.model, {"macs": macs} | {k: details[k] for k in shown if k in details}


def rows_of(bench: PruningBench) -> Iterator[Row]:
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
    for title, entries in more_of(bench.arguments).items():
        for label, options in entries:
            wanted = {"mechanism": "nm"} | options
            if "allocation" in options:
                wanted["sensitivity_problems"] = bench.arguments.sensitivity_problems
            yield bench.row(f"{title} / {label}", bench.job(**wanted))


def kernel_ratio() -> dict[str, float]:
    """Time of a 2:4 mask for 36M weights, alone and relative to one torch.abs and copy."""
    from prunedm.masks import Pattern
    from prunedm.removal.nm import nm_mask

    weight = torch.randn(4000, 1000, 3, 3, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(weight)
    calls = {
        "abs and copy": lambda: target.copy_(weight.abs()),
        "2:4": lambda: nm_mask(weight, Pattern(2, 4)),
        "4:8": lambda: nm_mask(weight, Pattern(4, 8)),
    }
    medians = {name: statistics.median(taken) for name, taken in turns(calls, 7).items()}
    return medians | {
        f"{name} ratio": medians[name] / medians["abs and copy"] for name in ("2:4", "4:8")
    }


def latency_rows(bench: PruningBench) -> list[Row]:
    """Latency at batch 16 against MACs, for channel-pruned models, timed in turns with dense."""
    settings = [(r, t) for r in (8, 16) for t in ("macs=0.3", "macs=0.5")]
    jobs = [
        bench.job(mechanism="channels", score="magnitude", target=t, round_to=r)
        for r, t in settings
    ]
    models = [prune(job)[0].denoiser for job in jobs]
    inputs = bench.dense.example(16)
    timed = timings([(m, inputs) for m in (bench.dense.denoiser, *models)], Way(16), repeats=20)
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


def calibration_memory(bench: PruningBench) -> dict[str, float]:
    """Peak MB of `prunedm prune --score wanda` with few and many problems, each in a new process."""
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


def more_of(arguments: Namespace) -> dict[str, list[tuple[str, Row]]]:
    """Further tables: titles, and labels and options of their rows."""
    without = REDUCTIONS if arguments.without_reductions else ""
    return {title: entries for title, entries in MORE.items() if title != without}


def markdown(result: Row, arguments: Namespace) -> str:
    """The section of `docs/results.md`: all tables."""
    rows = {row["key"]: row for row in result["rows"]}
    features, samples = samples_in_words(arguments)
    body = [
        {"score": score}
        | {
            s: _cell(rows.get(f"{score} / {s}"), f"as {ALIKE[score]}" if score in ALIKE else "–")
            for s in SETTINGS
        }
        for score in [*SCORES, "obs"]
    ]
    dense = rows["dense"]
    gap = {s: rows[f"{s} / 2:4"]["loss"] - dense["loss"] for s in ("obs", "wanda", "magnitude")}
    more = []
    for title, entries in more_of(arguments).items():
        own = [(label, rows[f"{title} / {label}"]) for label, _ in entries]
        lines = [
            {"": label, "loss, FD": _cell(row), "MACs": f"{row['macs'] / 1e6:.0f}M"}
            for label, row in own
        ]
        more.append(f"{title}:\n\n{table(lines)}")
    kernel, memory = result["kernel"], result["calibration_memory_mb"]
    return section(
        result,
        f"Dense: {_cell(dense)}. A cell is the denoising loss on {PROBLEMS} held-out problems ± its "
        f"standard error, then {features} of {samples}"
        f"{', both in bf16 autocast' * arguments.compile}, before any fine-tuning; "
        f"{result['device']}.",
        table(body),
        f"At 2:4 OBS loses {gap['obs'] / gap['wanda']:.2f}x of what Wanda loses over dense "
        f"({gap['obs']:.4f} against {gap['wanda']:.4f}; magnitude {gap['magnitude']:.4f}).",
        *more,
        _latency_table(result["latency"]),
        f"A 2:4 mask for 36M weights takes {kernel['2:4 ratio']:.1f}x the time of one `torch.abs` and "
        f"copy over them (4:8: {kernel['4:8 ratio']:.1f}x). Peak memory of calibration: "
        + ", ".join(f"{mb:.0f} MB with {count} problems" for count, mb in memory.items())
        + ".",
    )


def _cell(row: Row | None, missing: str = "–") -> str:
    if row is None:
        return missing
    return f"{row['loss']:.4f} ± {row['loss_se']:.4f}, {row['fd']:.0f}"


def _latency_table(rows: Sequence[Row]) -> str:
    body = [
        {
            "channels": f"{r['target']}, round to {r['round_to']}",
            "MACs": f"−{r['macs_removed']:.1%}",
            "latency, batch 16": f"{r['dense_ms']:.1f} => {r['latency_ms']:.1f} ± "
            f"{r['spread_ms']:.1f} ms",
            "change": f"−{r['latency_removed']:.1%}",
            "latency / MACs": f"{r['ratio']:.2f}",
        }
        for r in rows
    ]
    return "Real speed, eager float32, timed in turns with dense:\n\n" + table(body)


PARSER = parser_of(
    __doc__,
    {
        "model": "digits",
        "dataset": "digits",
        "features": "digits-cnn",
        "samples": 300,
        "sampling_steps": 25,
        "sensitivity_problems": 128,
        "compile": (False, "compiled and in bf16: loss and samples"),
        "without_reductions": (False, "no table of reductions and rounding"),
    },
)


def main() -> None:
    bench = PruningBench(PARSER.parse_args())
    found = {"seed": 0, "rows": list(rows_of(bench))}
    side: dict[str, Callable[[], Any]] = {
        "latency": lambda: latency_rows(bench),
        "kernel": kernel_ratio,
        "calibration_memory_mb": lambda: calibration_memory(bench),
    }
    for key, make in side.items():
        found[key] = bench.kept(key, lambda make=make: {"found": make()})["found"]  # type: ignore[misc]
    result = record(bench.name, found)
    publish(result, markdown(result, bench.arguments))


if __name__ == "__main__":
    main()
