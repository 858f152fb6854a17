"""2:4 on a language model: without training, beside published code; and learned on frozen weights.

    python benchmarks/language_models.py python
    python benchmarks/language_models.py python --published REPOSITORIES --minutes 30

`--folder` is what tools/make_language_model.py makes: dense/ and text/; the tool runs where it is not
there. *Without training*: each way on the same calibration text, which the seed picks; perplexity on
all held-out windows without overlap. `--published` names a folder that holds the repositories wanda and
sparsegpt, whose own code then runs on the same model and text. *Frozen weights*: from Wanda's masks,
for the same CPU seconds of the process. Rows are kept in `runs/language-models-NAME/`, so the same
command continues an interrupted run. At the end: `benchmarks/results/language-models-NAME.json`, and
the section of that name in `docs/results.md`.
"""

import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import (
    ROOT,
    Row,
    TimedBench,
    mean,
    named,
    parser_of,
    publish,
    record,
    section,
    spread,
    table,
)
from language_models_published import PUBLISHED, prune_as_published
from torch import nn

from prunedm.console import Terminal
from prunedm.folder import load
from prunedm.options import LearnOptions, PruneOptions
from prunedm.options.presets import PAPERS
from prunedm.stages import learn, prune

WANDA, PLAIN = "Wanda", "SparseGPT's rule"
OBS: Row = {"mechanism": "obs-nm"}
ONE_SHOT: dict[str, Row] = {
    "magnitude": {"mechanism": "nm", "score": "magnitude"},
    WANDA: {"mechanism": "nm", "score": "wanda"},
    PLAIN: OBS | {"obs_correction": 0.0, "obs_swaps": 0, "obs_refit": 0},
    "OBS, refitted": OBS | {"obs_correction": 0.0, "obs_swaps": 0},
    "OBS, refitted, with swaps": OBS | {"obs_correction": 0.0},
    "guided OBS": OBS | {"obs_guidance": 0.5},  # no blocks in turn, and no correction
    "corrected OBS, refitted": OBS | {"obs_swaps": 0},
    "OBS (default)": OBS,
}
OURS = {"wanda": WANDA, "sparsegpt": PLAIN}  # by the repository that has the same method
LEARNERS: dict[str, Row] = {
    "relaxed (default)": {},
    "MaskPro's rule": PAPERS["maskpro-llm"] | {"validate_every": 0, "checkpoint_every": 0},
}
CYCLE = 16  # steps, after which the rule of MaskPro knows the losses of the first masks


class LanguageBench(TimedBench):
    """Losses are of hard masks in float32, over all held-out windows."""

    kind = "language-models"

    def measured(self, network: nn.Module) -> Row:
        loss = self.loss(network)
        return loss | {"perplexity": math.exp(loss["loss"])}

    def options(self, seed: int, settings: Row) -> PruneOptions:
        count = {"calibration_problems": self.arguments.calibration, "calibration_batch": 16}
        return PruneOptions(**self.data | count | {"seed": seed, "problems": 0} | settings)

    def pruned(self, name: str, seed: int) -> Path:
        """The folder that this way makes of the seed's calibration text."""
        out = self.out(f"{name} seed {seed}")
        prune(self.arguments.model, out, self.options(seed, ONE_SHOT[name]), progress=Terminal())
        return out


def one_shot(bench: LanguageBench, seed: int) -> Iterator[Row]:
    """Every way of ours, then the published code, on the seed's calibration text."""
    for name in named(ONE_SHOT, bench.arguments.ways):

        def measure(name: str = name) -> Row:
            began = time.process_time()
            found = load(bench.pruned(name, seed))
            seconds = time.process_time() - began
            facts = {"way": name, "seed": seed, "cpu_s": seconds}
            return facts | bench.measured(found.denoiser)

        yield bench.kept(f"{name} seed {seed}", measure)
    for repository in PUBLISHED if bench.arguments.published else ():

        def compare(repository: str = repository) -> Row:
            model, options = load(bench.arguments.model), bench.options(seed, {})
            folder = Path(bench.arguments.published) / repository
            masks = prune_as_published(model, options, folder)
            ours = load(bench.pruned(OURS[repository], seed)).masks
            assert ours is not None
            assert masks.keys() == ours.by_layer.keys()
            equal = sum(int((mask == masks[name]).sum()) for name, mask in ours)
            facts = {"way": f"{OURS[repository]}, published code", "seed": seed}
            same = {"masks_equal": equal / ours.total}
            return facts | same | bench.measured(model.denoiser)

        yield bench.kept(f"{repository} published seed {seed}", compare)


def frozen(bench: LanguageBench, seed: int) -> Iterator[Row]:
    """The share of Wanda's gap in log perplexity that each rule closes in the same CPU time."""
    dense = bench.kept("dense", lambda: bench.measured(bench.dense.denoiser))
    first = bench.pruned(WANDA, seed)
    start = bench.kept(f"{WANDA} seed {seed}", dict)
    for name in named(LEARNERS, bench.arguments.learners):
        settings = bench.loop | LEARNERS[name] | {"masks": str(first), "keep": "last", "seed": seed}

        def run(steps: int, out: Path, settings: Row = settings) -> float:
            began = time.process_time()
            options = LearnOptions(**settings | {"steps": steps})
            learn(bench.arguments.model, out, options, progress=Terminal())
            return time.process_time() - began

        def measure(name: str = name, run: Any = run) -> Row:
            step = bench.step_seconds(name, run, short=CYCLE)
            spent = bench.kept(f"step of {name}", dict)["start_s"]
            out = bench.out(f"{name} {bench.arguments.minutes:g} min seed {seed}")
            seconds = run(max(1, int((60 * bench.arguments.minutes - spent) / step)), out)
            learned = load(out)
            assert learned.record is not None
            found = bench.measured(learned.denoiser)
            share = (start["loss"] - found["loss"]) / (start["loss"] - dense["loss"])
            facts = {"rule": name, "seed": seed, "share": share, "cpu_s": seconds}
            own = ("steps", "batch_size")
            facts |= {key: learned.record.options[key] for key in own}
            facts["groups_changed"] = learned.record.figures["groups_changed"]
            return facts | found

        yield bench.kept(f"{name} {bench.arguments.minutes:g} min seed {seed}", measure)


def markdown(result: Row, arguments: Namespace) -> str:
    """The section of `docs/results.md`: without training, then learned."""
    windows = f"{result['windows']:,} held-out windows of {result['length']} tokens"
    parts = [_one_shot(result), *([_frozen(result)] if result["frozen"] else [])]
    about = (
        f"Perplexity on {windows} without overlap, dense {result['dense']['perplexity']:.3f}; "
        f"calibration on {arguments.calibration} windows, mean ± standard deviation over "
        f"{arguments.seeds} seeds; {result['device']}."
    )
    return section(result, about, *parts)


def _one_shot(result: Row) -> str:
    dense = result["dense"]["perplexity"]
    ways: dict[str, list[Row]] = {}
    for row in result["one_shot"]:
        more = {"over": row["perplexity"] - dense}
        ways.setdefault(row["way"], []).append(row | more)
    bases = [ways.get(f"{name}, published code", ways[name]) for name in (PLAIN, WANDA)]
    lines = [
        {
            "2:4 without training": way,
            "perplexity": f"{mean(own, 'perplexity'):.3f}{spread(own, 'perplexity', 3)}",
            "over dense": f"{mean(own, 'over'):.3f}",
            "to SparseGPT": _ratio(own, bases[0]),
            "to Wanda": _ratio(own, bases[1]),
            "masks equal": f"{mean(own, 'masks_equal'):.2%}" if "masks_equal" in own[0] else "",
            "CPU": f"{mean(own, 'cpu_s'):.0f} s" if "cpu_s" in own[0] else "",
        }
        for way, own in ways.items()
    ]
    return table(lines)


def _ratio(own: Sequence[Row], base: Sequence[Row]) -> str:
    """Of what is lost over dense, seed by seed."""
    ratios = [{"ratio": a["over"] / b["over"]} for a, b in zip(own, base, strict=True)]
    return f"{mean(ratios, 'ratio'):.2f}x{spread(ratios, 'ratio', 2)}"


def _frozen(result: Row) -> str:
    rules: dict[str, list[Row]] = {}
    for row in result["frozen"]:
        rules.setdefault(row["rule"], []).append(row)
    lines = [
        {
            "learned": rule,
            "seeds": str(len(own)),
            "gap closed": f"**{mean(own, 'share'):.1%}**{_points(own)}",
            "perplexity": f"{mean(own, 'perplexity'):.3f}{spread(own, 'perplexity', 3)}",
            "steps": f"{mean(own, 'steps'):,.0f} of {own[0]['batch_size']} windows",
            "CPU": f"{mean(own, 'cpu_s') / 60:.1f} min",
            "groups changed": f"{mean(own, 'groups_changed'):.1%}",
        }
        for rule, own in rules.items()
    ]
    return (
        "Frozen weights, from Wanda's masks; the gap is Wanda's to dense in log perplexity:\n\n"
        f"{table(lines)}"
    )


def _points(own: Sequence[Row]) -> str:
    return spread([{"share": 100 * row["share"]} for row in own], "share", 1)


PARSER = parser_of(
    __doc__,
    {
        "folder": ("runs/python-lm", "dense/ and text/, or where the tool makes them"),
        "published": ("", "a folder that holds the repositories wanda and sparsegpt"),
        "calibration": (128, "windows of text"),
        "seeds": 3,
        "ways": (";".join(ONE_SHOT), "without training, by beginnings of their names"),
        "learners": (";".join(LEARNERS), "on frozen weights, by beginnings of their names"),
        "learned_seeds": (3, "of the learners; 0 leaves them out"),
        "minutes": (30.0, "of CPU time of each learner"),
        "batch_size": (16, "windows of a learner's step; MaskPro's rule has its own"),
        "mixed_precision": ("bf16", "of the learners' steps"),
    },
)


def main() -> None:
    arguments = PARSER.parse_args()
    folder = Path(arguments.folder)
    if not (folder / "dense").exists():
        tool = str(ROOT / "tools" / "make_language_model.py")
        subprocess.run([sys.executable, tool, str(folder)], check=True)
    arguments.model, arguments.dataset = str(folder / "dense"), str(folder / "text")
    bench = LanguageBench(arguments)
    found = {
        "dense": bench.kept("dense", lambda: bench.measured(bench.dense.denoiser)),
        "windows": sum(map(len, bench.held_out)),
        "length": bench.held_out[0].inputs["input_ids"].shape[1],
        "one_shot": [row for seed in range(arguments.seeds) for row in one_shot(bench, seed)],
        "frozen": [row for seed in range(arguments.learned_seeds) for row in frozen(bench, seed)],
    }
    result = record(bench.name, found)
    publish(result, markdown(result, arguments))


if __name__ == "__main__":
    main()
