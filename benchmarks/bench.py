"""Shared by the benchmarks: options, rows kept on disk, losses and distances, records, tables."""

import json
import re
import shlex
import shutil
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from prunedm.evaluation import fid
from prunedm.evaluation.features import FeatureNetwork, extract, image_batches, load_features
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.speed import Call, in_turns
from prunedm.folder import Model, load
from prunedm.learning.learner import Learner
from prunedm.learning.logits import MaskLogits
from prunedm.learning.trainer import make_learner, make_optimizer
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.options import LearnOptions, PruneOptions
from prunedm.progress import Silent
from prunedm.record import environment, write_json
from prunedm.removal.nm import nm_masks
from prunedm.sampling import make_sampler, sample_batches
from prunedm.scores import score_layers
from prunedm.stages.inputs import device_for, held_out_problems, images_for
from prunedm.system.neighbours import Neighbours, disturbance
from prunedm.task import Batch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results.md"
PROBLEMS = 2000  # held-out problems per loss
REFERENCES = 10_000  # most held-out images per distance
NEIGHBOURS = Neighbours()  # since the benchmark's start

Row = dict[str, Any]

# --------------------------------------------------------------------------------- options


def parser_of(doc: str, options: dict[str, Any]) -> ArgumentParser:
    """NAME and `--options` with the types of their defaults, given alone or with a help text."""
    parser = ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("name")
    for option, given in options.items():
        default, help = given if isinstance(given, tuple) else (given, None)
        flag = "--" + option.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=help)
        elif isinstance(default, list):
            parser.add_argument(flag, nargs="+", type=type(default[0]), default=default, help=help)
        else:
            parser.add_argument(flag, type=type(default), default=default, help=help)
    return parser


def command_line() -> str:
    """The command that made a section, to paste into a shell."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def named(table: Iterable[str], wanted: str) -> list[str]:
    """Keys by full names or prefixes, separated by semicolons in `wanted`."""
    keys, found = list(table), set()
    for name in wanted.split(";"):
        found |= {name} if name in keys else {key for key in keys if key.startswith(name)}
    return [key for key in keys if key in found]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ----------------------------------------------------------------------------- measurement


@dataclass
class Bench:
    """One model and dataset, with the rows measured so far in `runs/KIND-NAME/rows/`."""

    kind: ClassVar[str]
    batch: ClassVar[int] = 100  # images drawn at a time
    arguments: Namespace

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.arguments.name}"

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    @property
    def half(self) -> bool:
        """Whether networks draw in bf16 autocast."""
        return False

    @cached_property
    def data(self) -> Row:
        flip = getattr(self.arguments, "flip", False)
        return {"dataset": self.arguments.dataset, "flip": flip, "device": "cpu"}

    @cached_property
    def dense(self) -> Model:
        return load(self.arguments.model)

    @cached_property
    def held_out(self) -> list[Batch]:
        return held_out_problems(self.dense, PruneOptions(**self.data), PROBLEMS)

    @cached_property
    def features(self) -> FeatureNetwork:
        return load_features(self.arguments.features)

    @cached_property
    def reference(self) -> fid.Statistics:
        images = images_for(self.dense, PruneOptions(**self.data), "test")
        some = [images[i] for i in range(min(len(images), REFERENCES))]
        return self.moments(some)

    def moments(self, images: Any) -> fid.Statistics:
        """Statistics of the features of a sequence of images, or uint8 NCHW."""
        return fid.statistics(
            extract(self.features, image_batches(images)), features=self.features.name
        )

    def kept(self, key: str, make: Callable[[], Row]) -> Row:
        """A row from disk, or made and saved there."""
        path = self.folder / "rows" / f"{slug(key)}.json"
        if not path.exists():
            row = {"key": key} | make()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(row, path)
            print({name: value for name, value in row.items() if name != "options"}, flush=True)
        return read(path)

    def loss(self, denoiser: nn.Module) -> Row:
        loss = denoising_loss(denoiser, self.held_out)
        return {"loss": loss.mean, "loss_se": loss.standard_error}

    def fd(self, model: Model, denoiser: nn.Module | None = None, *, seed: int = 0) -> float:
        """FD of `--samples` images of the model, drawn with `denoiser` if given."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            drawn = draw(
                model,
                denoiser or model.denoiser,
                count=self.arguments.samples,
                steps=self.arguments.sampling_steps,
                seed=seed,
                batch_size=self.batch,
            )
        return fid.frechet_distance(self.moments(drawn), self.reference)

    def out(self, key: str) -> Path:
        return self.folder / slug(key)


TIMED: dict[str, Any] = {  # settings of every such contest, for `parser_of`
    "model": "digits",
    "dataset": "digits",
    "flip": False,
    "features": "digits-cnn",
    "samples": 500,
    "sampling_steps": 25,
    "mixed_precision": "bf16",
    "batch_size": 64,
}


class TimedBench(Bench):
    """For contests in equal wall time: the time of a step is measured first."""

    @property
    def half(self) -> bool:
        return bool(self.arguments.mixed_precision == "bf16")

    @cached_property
    def loop(self) -> Row:
        """Options of every training run: no validation and no checkpoints on the clock."""
        return self.data | {
            "batch_size": self.arguments.batch_size,
            "mixed_precision": self.arguments.mixed_precision,
            "validate_every": 0,
            "validation_problems": 100,
            "checkpoint_every": 0,
        }

    def step_seconds(self, key: str, run: Callable[[int, Path], float], short: int = 4) -> float:
        """Seconds of one step, from the wall time that 24 more steps add to a run."""

        def measure() -> Row:
            run(1, self.scratch)  # warm
            first, second = run(short, self.scratch), run(short + 24, self.scratch)
            step = (second - first) / 24
            return {"step_s": step, "start_s": first - short * step}

        return float(self.kept(f"step of {key}", measure)["step_s"])

    @property
    def scratch(self) -> Path:
        """A folder that does not exist."""
        place = self.folder / "scratch"
        shutil.rmtree(place, ignore_errors=True)
        return place


def learner_of(model: Model, options: LearnOptions) -> tuple[Learner, torch.optim.Optimizer]:
    """The learner and optimizer of `prunedm learn`, from magnitude masks."""
    options, device = options.filled(), device_for(options.device)
    layers = prunable_layers(model.denoiser)
    scores = score_layers(model.denoiser, layers, "magnitude", progress=Silent())
    first = nm_masks(layers, scores, Pattern.parse(options.pattern))
    logits = MaskLogits(first, scores, lead=options.logits or 0.0)
    learner = make_learner(model.denoiser, logits, options, teacher=None, device=device)
    return learner, make_optimizer(learner, options)


def draw(
    model: Model,
    denoiser: nn.Module,
    *,
    count: int,
    steps: int,
    seed: int = 0,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The images of `prunedm sample` by DDIM, without its files: uint8 NCHW."""
    batches = sample_batches(
        denoiser,
        make_sampler(model.scheduler, "ddim"),
        count=count,
        steps=steps,
        codec=model.codec,
        condition=model.condition,
        seed=seed,
        batch_size=batch_size,
        device=device,
    )
    return torch.cat(list(batches))


def turns(
    calls: Mapping[str, Call], repeats: int, *, warmup: int = 0, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call in each turn, by name."""
    seconds = in_turns(list(calls.values()), repeats=repeats, warmup=warmup, device=device)
    return dict(zip(calls, seconds, strict=True))


def median_ratio(base: Sequence[float], own: Sequence[float]) -> float:
    """The median of the turns' ratios, so that a slow moment of the machine affects both sides."""
    return statistics.median(b / o for b, o in zip(base, own, strict=True))


# ------------------------------------------------------------------------ records and docs


def read(path: Path) -> Row:
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def record(name: str, found: Row, *, device: str = "cpu") -> Row:
    """A benchmark's record: its results, command and environment."""
    threads = {"threads": torch.get_num_threads()}
    return {"name": name, "command": command_line(), **environment(device), **threads, **found}


def publish(result: Row, body: str) -> None:
    """Write a record and its section of the docs, which says if the machine was busy."""
    write_json(result, RESULTS / f"{result['name']}.json")
    disturbed = disturbance(NEIGHBOURS.share)
    into_docs(result["name"], body + f"\n\n*Disturbed: {disturbed}.*" * bool(disturbed))


def into_docs(name: str, body: str) -> None:
    """Replace the section between the two markers of this name."""
    text = DOCS.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(text), f"docs/results.md has no section {name}"
    DOCS.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text), encoding="utf-8")


def section(result: Row, about: str, *parts: str) -> str:
    """The command, what the figures are about, where the data are, then `parts`."""
    data = f"Data: `benchmarks/results/{result['name']}.json`."
    return "\n\n".join([f"```\n{result['command']}\n```", f"{about} {data}", *parts])


def table(rows: Sequence[Mapping[str, str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table of cells by heading; columns are right-aligned except those at `left`."""
    line = "".join("---|" if k in left else "---:|" for k in range(len(rows[0])))
    top = f"| {' | '.join(rows[0])} |".replace("|  |", "| |")
    return "\n".join([top, f"|{line}", *(f"| {' | '.join(row.values())} |" for row in rows)])


def samples_in_words(arguments: Namespace) -> tuple[str, str]:
    """The names of the features, as in `load_features`, and of the samples behind a distance."""
    name = "FID" if arguments.features == "inception" else f"FD ({Path(arguments.features).stem})"
    return name, f"{arguments.samples} ddim-{arguments.sampling_steps} samples"


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def spread(rows: Sequence[Row], key: str, digits: int) -> str:
    """The standard deviation over rows as text after a mean; "" for one row."""
    values = [row[key] for row in rows]
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
