"""A recipe: the stages from a dense model to a compressed one, and the options of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from prunedm import stages
from prunedm.errors import Changed, UserError
from prunedm.options import (
    DataOptions,
    EvaluateOptions,
    FinetuneOptions,
    LearnOptions,
    ModelName,
    Options,
    PruneOptions,
)
from prunedm.places import expanded, target
from prunedm.progress import Progress, Silent
from prunedm.record import Record
from prunedm.stages.frame import Plan, run_stage, status

STAGES = {  # in the order they run: the name in a recipe, and the verb
    "prune": "prune",
    "recover": "finetune",
    "mask": "prune",
    "learn": "learn",
    "finetune": "finetune",
}
REPORT = "report"  # the folder of the final comparison
_SHARED = (
    "dataset", "label_column", "image_column", "flip", "convert_channels", "seed", "device",
)  # fmt: skip


class Recipe(DataOptions):
    """`prunedm run`: channels go, the rest recovers, then N:M masks, and the weights adapt to them.

    Learning masks on frozen weights is not among the default stages: where weights are trained
    afterwards, second-order masks end lower in the same time (docs/results.md).

    The options of all stages are reached by the stage's name (`learn.steps`); dataset,
    label_column, image_column, flip, convert_channels, seed and device are set once for all, unless
    a stage sets its own.
    """

    model: ModelName = Field("digits", description="a model folder, a hub id, or digits")
    stages: tuple[str, ...] = Field(
        ("prune", "recover", "mask", "finetune"),
        description=f"stages to run, of {', '.join(STAGES)}, in this order",
    )
    prune: PruneOptions = PruneOptions()
    recover: FinetuneOptions = FinetuneOptions(steps=120)
    mask: PruneOptions = PruneOptions(mechanism="obs-nm")
    learn: LearnOptions = LearnOptions()
    finetune: FinetuneOptions = FinetuneOptions(steps=350)
    evaluate: EvaluateOptions = EvaluateOptions(sampling_steps=25, middle_samples=100)

    def stage_options(self, name: str) -> Any:
        """The options of a stage: the recipe's default < its shared values < the stage's own.

        A stage that was given a few options keeps the recipe's default for the others: with
        `recover.lr` set, `recover.steps` is still the recipe's.
        """
        default: Options = type(self).model_fields[name].default
        own: Options = getattr(self, name)
        shared = {key: getattr(self, key) for key in _SHARED if key in type(own).model_fields}
        given = {key: getattr(own, key) for key in own.model_fields_set}
        return default.model_copy(update=shared | given)


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: its name there, the verb it is made by, and its options."""

    name: str
    verb: str  # of `prunedm.stages`
    options: Any

    def make(
        self, source: str | Path, out: Path, *, progress: Progress, overwrite: bool = False
    ) -> tuple[Record, bool]:
        """The stage's result in `out`, made again where options or inputs have changed since."""
        stage = stages.STAGES[self.verb]
        return stage.again(source, out, self.options, progress=progress, overwrite=overwrite)

    def status(self, source: str | Path, out: Path) -> str:
        """Whether `out` is done: "" if it is, else why not, in words."""
        return stages.STAGES[self.verb].status(source, out, self.options)


def steps_of(recipe: Recipe) -> list[Step]:
    """What makes models, in the order of `STAGES`. Raises `UserError` for a name that is none."""
    unknown = set(recipe.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages: no {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}")
    return [
        Step(name, verb, recipe.stage_options(name))
        for name, verb in STAGES.items()
        if name in recipe.stages
    ]


def unused(recipe: Recipe) -> list[str]:
    """One line for every stage that was given options and is not among `stages`."""
    given = [name for name in STAGES if name in recipe.model_fields_set]
    return [
        f"{name}: given options, but not among the stages ({', '.join(recipe.stages)})"
        for name in given
        if name not in recipe.stages
    ]


def run(
    recipe: Recipe, out: str | Path, *, progress: Progress | None = None, overwrite: bool = False
) -> Path:
    """Run every stage that is not done yet; returns the folder of the final comparison.

    A stage is done when its folder's record has the same options and the same inputs, by the hashes
    of what they hold; one that was made otherwise is made again, and so is what follows from it.
    """
    progress, out = progress or Silent(), expanded(out)
    steps = steps_of(recipe)
    stages.check_inputs(recipe.model, recipe.stage_options("evaluate"))
    for line in unused(recipe):
        progress.say(line)
    folders: dict[str, str | Path] = {"dense": recipe.model}
    current: str | Path = recipe.model
    for number, step in enumerate(steps, start=1):
        folder = out / f"{number}-{step.name}"
        record, made = step.make(current, folder, progress=progress, overwrite=overwrite)
        progress.say(f"{folder.name}: {describe(record.figures, record.wall_time_s, made)}")
        folders[folder.name] = current = folder
    report = _comparison(recipe, folders, progress)
    try:
        run_stage("compare", report, out / REPORT, overwrite=overwrite)
    except Changed:  # of other models or options
        run_stage("compare", report, out / REPORT, overwrite=True)
    return out / REPORT


def _comparison(recipe: Recipe, folders: dict[str, str | Path], progress: Progress) -> Plan:
    """The report on all models."""
    from prunedm.stages.verbs.compare import comparison

    title = f"prunedm run: {Path(recipe.model).name}"
    options = recipe.stage_options("evaluate")
    return comparison(folders, options, title=title, progress=progress)


@dataclass(frozen=True)
class Planned:
    """A stage that `run` would come to: its folder, and what it would do there."""

    name: str
    folder: Path
    todo: str  # "" where it is done


def plan(recipe: Recipe, out: str | Path) -> list[Planned]:
    """What `run` would do, in order; nothing is made. Raises `UserError` where it would.

    What follows from a stage that is not done cannot be looked at, for its input is not there yet.
    """
    target(out)  # refuses what no folder can be
    out, steps, planned = expanded(out), steps_of(recipe), list[Planned]()
    stages.check_inputs(recipe.model, recipe.stage_options("evaluate"))
    folders: dict[str, str | Path] = {"dense": recipe.model}
    current: str | Path = recipe.model
    behind = ""  # what must be made first
    for number, step in enumerate(steps, start=1):
        folder = out / f"{number}-{step.name}"
        todo = f"after {behind}" if behind else step.status(current, folder)
        behind = behind or (folder.name if todo else "")
        planned.append(Planned(step.name, folder, todo))
        folders[folder.name] = current = folder
    todo = f"after {behind}" if behind else ""
    if not behind:
        todo = status("compare", _comparison(recipe, folders, Silent()), out / REPORT)
    return [*planned, Planned(REPORT, out / REPORT, todo)]


def describe(figures: dict[str, Any], seconds: float, made: bool) -> str:
    """A stage's result in one line."""
    before = figures.get("loss_before", figures.get("loss_first_masks"))
    loss = figures.get("loss")  # None was not finite, or not measured
    after = "" if loss is None else f"{loss:.4f}"
    change = f"loss {before:.4f} => {after or 'none'}" if before is not None else ""
    if not change and after:
        change = f"loss {after}"
    when = f"{seconds:.0f} s" if made else "done already"
    return f"{change}  ({when})" if change else when
