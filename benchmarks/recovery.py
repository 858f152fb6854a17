"""Recovery: the best mixture of data loss, output, features and sensitivity, and goals.

    python benchmarks/recovery.py digits
    python benchmarks/recovery.py cifar10-small --model ../shared/models/cifar10-ddpm-small \\
        --dataset ../shared/data/cifar10 --flip --features ../shared/models/cifar10_features.pt \\
        --batch-size 32 --seconds 600 --seeds 1 --goal-seconds 0 --samples 320 --sampling-steps 20

*Contest*: one start per kind of pruning (2:4, channels, 2:4 on channels), then fine-tuning by every
mixture for the same wall time: a step is timed first, next to one of the data loss alone, and each
mixture gets the steps that fit. Problems and seeds are the same. The remaining gap is the loss minus
the dense model's on 2,000 held-out problems; a mixture is judged by the ratio, seed by seed, of its gap
to that of the data loss alone at its best (three learning rates, and without dropout, with all seeds).
*Control*: the dense model trained on by the data loss for that time. *Goals*: 2:4 alone, and 2:4 on
30 % fewer parameters, by `--goal-mixture`, from pruning to the end in `--goal-seconds`. Rows are kept
in `runs/recovery-NAME/`, so the same command continues an interrupted run. At the end:
`benchmarks/results/recovery-NAME.json`, and the section of that name in `docs/results.md`.
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from bench import (
    TIMED,
    Row,
    TimedBench,
    mean,
    parser_of,
    publish,
    record,
    samples_in_words,
    section,
    spread,
    table,
)

from prunedm.console import Terminal
from prunedm.evaluation.loss import LossEstimate, denoising_loss
from prunedm.folder import Model, load
from prunedm.options import FinetuneOptions, PruneOptions
from prunedm.stages import finetune, prune

DATA = "data loss alone"
MIXTURES: dict[str, Row] = {
    DATA: {"distill": 0.0},
    f"{DATA}, a third of the lr": {"distill": 0.0, "lr_factor": 1 / 3},
    f"{DATA}, three times the lr": {"distill": 0.0, "lr_factor": 3.0},
    f"{DATA}, no dropout": {"distill": 0.0, "dropout": 0.0},
    "output, 0.5": {"distill": 0.5},
    "output, 0.9 (default)": {"distill": 0.9},
    "output, 0.9, three times the lr": {"distill": 0.9, "lr_factor": 3.0},
    "output, 0.9, no dropout": {"distill": 0.9, "dropout": 0.0},
    "output, 1": {"distill": 1.0},
    "output, 1, three times the lr": {"distill": 1.0, "lr_factor": 3.0},
    "output and features, 0.003": {"distill": 0.9, "match_features": 0.003},
    "output and features, 0.03": {"distill": 0.9, "match_features": 0.03},
    # dropout would drown responses to small changes
    "output and sensitivity, 0.003": {"distill": 0.9, "match_sensitivity": 0.003, "dropout": 0.0},
    "output and sensitivity, 0.03": {"distill": 0.9, "match_sensitivity": 0.03, "dropout": 0.0},
    "everything, 0.01": {
        "distill": 0.9, "match_features": 0.01, "match_sensitivity": 0.01, "dropout": 0.0,
    },
}  # fmt: skip
KINDS = ("2:4", "channels", "hybrid")
CHANNELS: Row = {"mechanism": "channels", "target": "params=0.3"}
MASKS: Row = {"mechanism": "obs-nm", "pattern": "2:4"}


class RecoveryBench(TimedBench):
    """The model, its dense losses, and the pruned folders that every mixture starts from."""

    kind = "recovery"

    @cached_property
    def dense_loss(self) -> LossEstimate:
        return denoising_loss(self.dense.denoiser, self.held_out)

    def gap(self, model: Model) -> Row:
        """The loss minus the dense model's, problem by problem, and its standard error."""
        own = denoising_loss(model.denoiser, self.held_out)
        pairs = LossEstimate.of(own.per_problem_N - self.dense_loss.per_problem_N)
        return {"loss": own.mean, "gap": pairs.mean, "gap_se": pairs.standard_error}

    def pruned(self, source: str | Path, key: str, settings: Row) -> Path:
        out = self.out(key)
        options = PruneOptions(**self.data | {"pictures": 0} | settings)
        prune(source, out, options, progress=Terminal())
        return out

    def tuned(self, source: str | Path, out: Path, steps: int, settings: Row) -> float:
        """Fine-tune; returns the total seconds."""
        lr = self.arguments.lr * settings.get("lr_factor", 1.0)
        given = {"lr": lr, "teacher": str(self.arguments.model), "steps": steps}
        mixture = {key: value for key, value in settings.items() if key != "lr_factor"}
        options = FinetuneOptions(**self.loop | given | mixture)
        return finetune(source, out, options, progress=Terminal())[0].wall_time_s

    def steps_in(self, seconds: float, source: str | Path, kind: str, mixture: str) -> Row:
        """Steps of this mixture that fit into `seconds`.

        A step of the data loss is timed once per kind, and another mixture's step relative to it, so
        that a slow moment of the machine affects both.
        """

        def run(settings: Row, steps: int) -> float:
            return self.tuned(source, self.scratch, steps, settings)

        def beside() -> Row:
            short, long = 4, 28
            both = (MIXTURES[DATA], MIXTURES[mixture])
            starts = [run(own, short) for own in both]
            data, own = (run(s, long) - start for s, start in zip(both, starts, strict=True))
            return {"ratio": own / data}

        data = self.step_seconds(
            f"{kind} data",
            lambda steps, out: self.tuned(source, out, steps, MIXTURES[DATA]),
        )
        matched = _matched(MIXTURES[mixture])
        ratio = self.kept(f"ratio {kind} {matched}", beside)["ratio"] if matched else 1.0
        return {"steps": max(1, int(seconds / (data * ratio))), "step_s": data * ratio}


def _matched(settings: Row) -> str:
    """The terms of a step besides the data loss; their cost does not depend on their weights."""
    names = ("distill", "match_features", "match_sensitivity")
    return " ".join(name for name in names if settings.get(name))


def start(bench: RecoveryBench, kind: str) -> Path:
    """The common start of all mixtures; the hybrid's channels are recovered by the default first."""
    if kind == "2:4":
        return bench.pruned(bench.arguments.model, "start 2:4", MASKS)
    narrow = bench.pruned(bench.arguments.model, "start channels", CHANNELS)
    if kind == "channels":
        return narrow
    between, mixture = bench.out("start recovered"), "output, 0.9 (default)"
    fits = bench.steps_in(bench.arguments.seconds / 2, narrow, "channels", mixture)
    bench.tuned(narrow, between, fits["steps"], MIXTURES[mixture])
    return bench.pruned(between, "start hybrid", MASKS)


def contest(bench: RecoveryBench, kind: str, seed: int) -> Iterator[Row]:
    """Every mixture in the same wall time, from the same start on the same problems."""
    source = start(bench, kind)
    wanted = bench.arguments.repeated if seed else bench.arguments.mixtures
    for mixture, settings in MIXTURES.items():
        if mixture not in wanted.split(";"):
            continue

        def measure(mixture: str = mixture, settings: Row = settings) -> Row:
            fits = bench.steps_in(bench.arguments.seconds, source, kind, mixture)
            out = bench.out(f"{kind} {mixture} seed {seed}")
            seconds = bench.tuned(source, out, fits["steps"], settings | {"seed": seed})
            model = load(out)
            facts = {"kind": kind, "mixture": mixture, "seed": seed, "seconds": seconds} | fits
            row = facts | bench.gap(model) | {"start": bench.gap(load(source))["loss"]}
            row["fd"] = bench.fd(model, seed=seed)
            shutil.rmtree(out)
            return row

        yield bench.kept(f"{kind} {mixture} seed {seed}", measure)


def control(bench: RecoveryBench) -> Row:
    """The dense model, trained further by the data loss, to show the gain of training alone."""

    def measure() -> Row:
        source, out = bench.arguments.model, bench.out("control")
        fits = bench.steps_in(bench.arguments.seconds, source, "dense", DATA)
        bench.tuned(source, out, fits["steps"], MIXTURES[DATA])
        return fits | bench.gap(load(out))

    return bench.kept("control", measure)


def goal(bench: RecoveryBench, kind: str) -> Row:
    """From the dense model to the end in `--goal-seconds`, pruning included.

    The hybrid recovers for a third of the time before its masks are found.
    """

    def measure() -> Row:
        left, mixture = bench.arguments.goal_seconds, bench.arguments.goal_mixture
        source, spent = str(bench.arguments.model), 0.0
        if kind == "hybrid":
            narrow = bench.pruned(source, "goal channels", CHANNELS)
            spent += load(narrow).record.wall_time_s  # type: ignore[union-attr]
            fits = bench.steps_in(left / 3, narrow, "goal channels", mixture)
            source = str(bench.out("goal recovered"))
            spent += bench.tuned(narrow, Path(source), fits["steps"], MIXTURES[mixture])
        masked = bench.pruned(source, f"goal masks {kind}", MASKS)
        spent += load(masked).record.wall_time_s  # type: ignore[union-attr]
        fits = bench.steps_in(left - spent, masked, f"goal {kind}", mixture)
        out = bench.out(f"goal {kind}")
        spent += bench.tuned(masked, out, fits["steps"], MIXTURES[mixture])
        model, whole = load(out), bench.dense_loss.mean
        found = bench.gap(model)
        facts = {"kind": kind, "mixture": mixture, "seconds": spent, "steps": fits["steps"]}
        return facts | found | {"over": found["gap"] / whole, "fd": bench.fd(model)}

    return bench.kept(f"goal {kind}", measure)


def markdown(result: Row, arguments: Namespace) -> str:
    """The section of `docs/results.md`: contest, control, goals."""
    parts = [_contest(result, arguments), _control(result)]
    goals = [_goals(result)] if result["goals"] else []
    return section(result, f"{result['device']}.", *parts, *goals)


def _contest(result: Row, arguments: Namespace) -> str:
    rows, dense, lines = result["contest"], result["dense"], []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        names = dict.fromkeys(row["mixture"] for row in own)
        mixtures = {name: [row for row in own if row["mixture"] == name] for name in names}
        # the learning rate that suits the data loss best is its own
        data = [own for name, own in mixtures.items() if name.startswith(DATA)]
        seeds = max(map(len, data))
        alone = min((own for own in data if len(own) == seeds), key=lambda own: mean(own, "gap"))
        lines += [_line(kind, own, alone) for own in mixtures.values()]
    features, samples = samples_in_words(arguments)
    return (
        f"Fine-tuning for {result['seconds']:.0f} s by every mixture, from the same start; mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}. The gap is the loss less the dense model's on the same problems:\n\n"
        f"{table(lines, left=(0, 1))}"
    )


def _line(kind: str, own: Sequence[Row], alone: Sequence[Row]) -> dict[str, str]:
    others = {row["seed"]: row["gap"] for row in alone}
    # where the data loss alone reaches the dense loss, there is no gap to compare with
    comparable = all(value > 0 for value in others.values())
    ratios = [{"ratio": row["gap"] / others[row["seed"]]} for row in own] if comparable else []
    ratio = f"{mean(ratios, 'ratio'):.2f}x{spread(ratios, 'ratio', 2)}" if ratios else "–"
    return {
        "pruning": kind,
        "matched": own[0]["mixture"],
        "seeds": str(len(own)),
        "step": f"{1000 * mean(own, 'step_s'):.0f} ms",
        "steps": f"{mean(own, 'steps'):.0f}",
        "wall time": f"{mean(own, 'seconds'):.0f} s",
        "loss before": f"{mean(own, 'start'):.4f}",
        "loss after": f"{mean(own, 'loss'):.5f}{spread(own, 'loss', 5)}",
        "gap left": f"{mean(own, 'gap'):+.5f}{spread(own, 'gap', 5)}",
        "to the best of data alone": f"**{ratio}**",
        "FD": f"{mean(own, 'fd'):.1f}{spread(own, 'fd', 1)}",
    }


def _control(result: Row) -> str:
    row, dense = result["control"], result["dense"]
    return (
        f"Control: the dense model itself, trained on by the data loss for {result['seconds']:.0f} s, "
        f"ends at {row['loss']:.5f} ({row['gap'] / dense['loss']:+.1%}; gap {row['gap']:+.5f} ± "
        f"{row['gap_se']:.5f})."
    )


def _goals(result: Row) -> str:
    dense = result["dense"]
    lines = [
        {
            "pruning": row["kind"],
            "matched": row["mixture"],
            "wall time": f"{row['seconds'] / 60:.1f} min",
            "last steps": f"{row['steps']:,}",
            "loss": f"{row['loss']:.5f}",
            "to dense": f"**{row['over']:+.1%}**",
            "FD": f"{row['fd']:.1f} ({row['fd'] / dense['fd'] - 1:+.0%})",
        }
        for row in result["goals"]
    ]
    return (
        f"From the dense model to the end within {result['goal_seconds'] / 60:.0f} minutes "
        "(goals: 2:4 within 1 % of the dense loss; 2:4 on 30 % fewer parameters within 5 % of loss "
        f"and FD):\n\n{table(lines, left=(0, 1))}"
    )


PARSER = parser_of(
    __doc__,
    {
        **TIMED,
        "lr": 1e-3,
        "seconds": (120.0, "of each mixture"),
        "seeds": 3,
        "kinds": (";".join(KINDS), "of pruning, in the contest"),
        "mixtures": (";".join(MIXTURES), "those of the first seed"),
        "repeated": (";".join(MIXTURES), "those of further seeds"),
        "goal_seconds": (850.0, "of each goal's run; 0 is none"),
        "goal_mixture": ("output, 0.9 (default)", "one of the mixtures"),
    },
)


def main() -> None:
    arguments = PARSER.parse_args()
    if arguments.goal_mixture not in MIXTURES:
        PARSER.error(f"--goal-mixture: choose from {'; '.join(MIXTURES)}")
    bench = RecoveryBench(arguments)
    found = {
        "seconds": arguments.seconds,
        "goal_seconds": arguments.goal_seconds,
        "dense": bench.kept(
            "dense", lambda: bench.gap(bench.dense) | {"fd": bench.fd(bench.dense)}
        ),
        "control": control(bench),
        "contest": [
            row
            for seed in range(arguments.seeds)
            for kind in arguments.kinds.split(";")
            for row in contest(bench, kind, seed)
        ],
        "goals": [goal(bench, kind) for kind in ("2:4", "hybrid") if arguments.goal_seconds],
    }
    result = record(bench.name, found)
    publish(result, markdown(result, arguments))


if __name__ == "__main__":
    main()
