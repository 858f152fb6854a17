"""Mask learning: estimators on frozen weights, the cost of a step, the contest after fine-tuning.

    python benchmarks/mask_learning.py digits
    python benchmarks/mask_learning.py cifar10-small --model ../shared/models/cifar10-ddpm-small \\
        --dataset ../shared/data/cifar10 --flip --features ../shared/models/cifar10_features.pt \\
        --batch-size 32 --seconds 1000 --estimators relaxed --frozen 2:4 \\
        --contest-seconds 150 --lr 5e-4 --calibration 128 --samples 320 --sampling-steps 20 \\
        --contestants "magnitude;Wanda;OBS;guided"

*Frozen*: the share of the loss gap that learning closes, (L(m_0) - L(m)) / (L(m_0) - L(dense)),
from Wanda's masks m_0, in the same wall time for every estimator. *Contest*: masks, then fine-tuning
under them, all in the same total wall time. Losses are of hard masks in float32 on 2,000 held-out
problems. Rows are kept in `runs/mask-learning-NAME/`, so the same command continues an interrupted
run. At the end: `benchmarks/results/mask-learning-NAME.json`, and the section of that name in
`docs/results.md`.
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import (
    TIMED,
    Row,
    TimedBench,
    mean,
    named,
    parser_of,
    publish,
    record,
    samples_in_words,
    section,
    spread,
    table,
)
from mask_learning_costs import costs

from prunedm.console import Terminal
from prunedm.folder import load
from prunedm.options import FinetuneOptions, LearnOptions, PruneOptions
from prunedm.stages import finetune, learn, prune

# MaskPro's setting, with three values of its initial logits C, which set its exploration
CLASSIC: Row = {
    "estimator": "policy-gradient-classic",
    "distribution": "plackett-luce",
    "batch_size": 32,
    "dataset_size": 512,
    "distill": 0.0,
}
ESTIMATORS: dict[str, Row] = {
    "relaxed (default)": {},
    "straight-through": {"estimator": "straight-through"},
    "policy gradient": {"estimator": "policy-gradient"},
    **{f"classic, C = {c}": CLASSIC | {"logits": float(c)} for c in (10, 5, 3)},
    "dense output, classic, C = 5": CLASSIC | {"logits": 5.0, "distill": 1.0},
}
CONTESTANTS: dict[str, Row] = {
    "magnitude": {"mechanism": "nm", "score": "magnitude"},
    "Wanda": {"mechanism": "nm", "score": "wanda"},
    "OBS": {"mechanism": "obs-nm", "obs_swaps": 0, "obs_guidance": 0.0},
    "OBS with swaps": {"mechanism": "obs-nm", "obs_guidance": 0.0},
    "guided OBS with swaps (default)": {"mechanism": "obs-nm"},
}
LEARNERS: dict[str, Row] = {  # a third of the time; from dense weights, one seed
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


class MaskBench(TimedBench):
    """Losses are of hard masks in float32."""

    kind = "mask-learning"


def frozen(bench: MaskBench, pattern: str) -> Iterator[Row]:
    """The share of the gap that each estimator closes from Wanda's masks in the same wall time."""
    first = bench.out(f"wanda {pattern}")
    options = PruneOptions(mechanism="nm", score="wanda", pattern=pattern, pictures=0, **bench.data)
    prune(bench.arguments.model, first, options)
    dense = bench.kept("dense", lambda: bench.loss(bench.dense.denoiser))
    start = bench.kept(f"wanda {pattern}", lambda: bench.loss(load(first).denoiser))
    for full in named(ESTIMATORS, bench.arguments.estimators):
        settings = bench.loop | ESTIMATORS[full] | {"masks": str(first), "keep": "last"}

        def run(steps: int, out: Path, settings: Any = settings, **more: int) -> float:
            options = LearnOptions(**settings | {"steps": steps} | more)
            record, _ = learn(bench.arguments.model, out, options, progress=Terminal())
            return record.wall_time_s

        def measure(full: str = full, run: Any = run, settings: Any = settings) -> Row:
            size = settings["batch_size"]
            # a small cycle shows the cost of a step once the dense outputs are known
            known = {"dataset_size": 4 * size} if "dataset_size" not in settings else {}
            new = bench.step_seconds(f"{full}, new problems", run)
            later = bench.step_seconds(f"{full}, known problems", lambda s, o: run(s, o, **known))
            epoch = LearnOptions(**settings).dataset_size // size
            seconds = bench.arguments.seconds - 5  # for the start
            steps = int(min(epoch, seconds / new) + max(0.0, seconds - epoch * new) / later)
            out = bench.out(f"{full} {pattern}")
            taken = run(steps, out)
            found = bench.loss(load(out).denoiser)
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


def contest(bench: MaskBench, pattern: str, seed: int) -> Iterator[Row]:
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

    def tuned(name: str, masked: Path, spent: float) -> Row:
        """Fine-tune for the remaining time, and measure."""
        step = bench.step_seconds("finetune", run)
        steps = int((total - spent) / step)
        out = bench.out(f"{name} {pattern} seed {seed} tuned")
        finetune(masked, out, FinetuneOptions(**tune | {"steps": steps}), progress=Terminal())
        model = load(out)
        start = bench.loss(load(masked).denoiser)["loss"]
        facts = {"contestant": name, "pattern": pattern, "seed": seed, "mask_seconds": spent}
        row = facts | {"steps": steps, "loss_start": start, "fd": bench.fd(model, seed=seed)}
        shutil.rmtree(out)
        return row | bench.loss(model.denoiser)

    chosen = bench.arguments.contestants
    for name in named(CONTESTANTS, chosen):
        settings = CONTESTANTS[name]

        def measure(name: str = name, settings: Any = settings) -> Row:
            masked = bench.out(f"{name} {pattern} seed {seed}")
            record, _ = prune(
                bench.arguments.model, masked, PruneOptions(**ones | settings), progress=Terminal()
            )
            return tuned(name, masked, record.wall_time_s)

        yield bench.kept(f"contest {name} {pattern} seed {seed}", measure)
    for name in named(LEARNERS, chosen) if seed == 0 else ():
        settings = LEARNERS[name]

        def measured(name: str = name, settings: Any = settings) -> Row:
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


def markdown(result: Row, arguments: Namespace) -> str:
    """The section of `docs/results.md`: frozen weights, costs, contest."""
    parts = (_frozen(result), _costs(result["costs"]), _contest(result, arguments))
    return section(result, f"{result['device']}.", *parts)


def _frozen(result: Row) -> str:
    firsts = ", ".join(f"{p} {row['loss']:.4f}" for p, row in result["first"].items())
    rows = [
        {
            "estimator": r["estimator"],
            "pattern": r["pattern"],
            "gap closed": f"**{r['share']:.1%}**",
            "loss": f"{r['loss']:.4f} ± {r['loss_se']:.4f}",
            "steps": f"{r['steps']:,}",
            "wall time": f"{r['seconds']:.0f} s",
            "groups changed": f"{r['groups_changed']:.1%}",
        }
        for r in result["frozen"]
    ]
    return (
        f"Frozen weights, {result['seconds']:.0f} s for every estimator, from Wanda's masks "
        f"({firsts}; dense {result['dense']['loss']:.4f}):\n\n{table(rows, left=(0, 1))}"
    )


def _costs(costs: Row) -> str:
    return (
        f"A mask-learning step of the default takes {costs['step_ratio_known_problems']:.2f}x a plain "
        f"training step of the same model and batch ({costs['step_ratio_new_problems']:.2f}x where "
        "the dense output is not yet known), and holds "
        f"{costs['bytes_a_weight']:.1f} bytes a weight (logit, gradient, Adam) and "
        f"{costs['mask_bytes_a_weight']:.0f} for the mask. A mask of the policy gradient takes "
        f"{costs['policy_gradient_ratio']:.2f}x a forward pass. Sampling 2:4 masks for 36M weights "
        f"takes {costs['sampling_ratio conditional-bernoulli']:.1f}x (conditional Bernoulli) and "
        f"{costs['sampling_ratio plackett-luce']:.1f}x (Plackett-Luce) the time of `torch.rand`."
    )


def _contest(result: Row, arguments: Namespace) -> str:
    rows, dense = result["contest"], result["dense"]
    lines = []
    for pattern in dict.fromkeys(r["pattern"] for r in rows):
        for name in dict.fromkeys(r["contestant"] for r in rows):
            own = [r for r in rows if (r["contestant"], r["pattern"]) == (name, pattern)]
            if own:
                lines.append(_contestant(name, pattern, own))
    features, samples = samples_in_words(arguments)
    return (
        f"The contest: masks and fine-tuning in {result['contest_seconds']:.0f} s together, mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}:\n\n{table(lines, left=(0, 1))}"
    )


def _contestant(name: str, pattern: str, own: Sequence[Row]) -> dict[str, str]:
    return {
        "masks": name,
        "pattern": pattern,
        "seeds": str(len(own)),
        "masks take": f"{mean(own, 'mask_seconds'):.0f} s",
        "steps": f"{mean(own, 'steps'):.0f}",
        "loss before": f"{mean(own, 'loss_start'):.4f}",
        "loss after": f"**{mean(own, 'loss'):.5f}**{spread(own, 'loss', 5)}",
        "FD": f"{mean(own, 'fd'):.1f}{spread(own, 'fd', 1)}",
    }


PARSER = parser_of(
    __doc__,
    {
        **TIMED,
        "lr": (1e-3, "of fine-tuning in the contest"),
        "seconds": (290.0, "of each estimator"),
        "contest_seconds": (60.0, "of each contestant"),
        "calibration": (512, "problems of scores and OBS"),
        "seeds": (3, "of the contest"),
        "estimators": (";".join(ESTIMATORS), "at 2:4, by beginnings of their names"),
        "contestants": (";".join([*CONTESTANTS, *LEARNERS]), "by beginnings of their names"),
        "frozen": ("2:4;1:4", "patterns on frozen weights, after 2:4 the default only"),
    },
)


def main() -> None:
    arguments = PARSER.parse_args()
    bench, patterns = MaskBench(arguments), arguments.frozen.split(";")
    rows: dict[str, list[Row]] = {"frozen": []}
    for pattern in patterns:
        rows["frozen"] += frozen(bench, pattern)
        arguments.estimators = "relaxed"
    rows["contest"] = [
        row
        for seed in range(arguments.seeds)
        for pattern in ("2:4", "1:4")
        for row in contest(bench, pattern, seed)
    ]
    dense = bench.kept(
        "dense with FD", lambda: bench.loss(bench.dense.denoiser) | {"fd": bench.fd(bench.dense)}
    )
    found = {
        "seconds": arguments.seconds,
        "contest_seconds": arguments.contest_seconds,
        "dense": dense,
        "first": {pattern: bench.kept(f"wanda {pattern}", dict) for pattern in patterns},
        **rows,
        "costs": bench.kept("costs", lambda: costs(bench.dense, bench.loop)),
    }
    result = record(bench.name, found)
    publish(result, markdown(result, arguments))


if __name__ == "__main__":
    main()
