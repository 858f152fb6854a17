"""A recipe: the list of stages from a dense model to a compressed one, and the options of each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, create_model, model_validator

from prunedm import stages
from prunedm.errors import Changed, UserError, nearest
from prunedm.options import DataOptions, EvaluateOptions, ModelName, Options
from prunedm.progress import Progress, Silent
from prunedm.stages import STAGES
from prunedm.stages.frame import Plan, run_stage, status
from prunedm.stages.table import Stage
from prunedm.system.places import expanded, target

REPORT = "report"  # the folder of the final comparison


class _Entry(Options):
    """One verb of `STAGES` with its options, and a name where the verb's own would not do."""

    name: str = Field(
        "",
        pattern=r"^([A-Za-z][A-Za-z0-9_-]*)?$",
        description="of the stage and its folder: letters, digits, - and _; none: the verb",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_verb(cls, given: Any) -> Any:
        verbs = [key for key in given if key != "name"] if isinstance(given, dict) else []
        if len(verbs) != 1:
            raise ValueError("give one verb an entry of the list, such as `- prune: {}`")
        if verbs[0] not in STAGES:
            raise ValueError(f"no verb {verbs[0]!r}{nearest(verbs[0], list(STAGES))}")
        options = given[verbs[0]]
        return {**given, verbs[0]: {} if options is None else options}

    @property
    def verb(self) -> str:
        return next(verb for verb in STAGES if verb in self.model_fields_set)

    @property
    def options(self) -> Options:
        """What was given; the rest at the verb's own defaults."""
        given: Options = getattr(self, self.verb)
        return given


_VERBS: Any = {
    stage.verb: (stage.options | None, Field(None, description=stage.help))
    for stage in STAGES.values()
}
RecipeStage: type[_Entry] = create_model("RecipeStage", __base__=_Entry, **_VERBS)
DEFAULT: tuple[dict[str, Any], ...] = (
    {"prune": {}},
    {"finetune": {"steps": 120}, "name": "recover"},
    {"prune": {"mechanism": "obs-nm"}, "name": "mask"},
    {"finetune": {"steps": 350}},
)


class Recipe(DataOptions):
    """`prunedm run`: channels go, the rest recovers, then N:M masks, and the weights adapt to them.

    Learning masks on frozen weights is not among the default stages: where weights are trained
    afterwards, second-order masks end lower in the same time (docs/results.md).

    What images are and where they come from (dataset, columns, flip, convert_channels), seed and device
    are set once for all, unless a stage sets its own.
    """

    model: ModelName = Field("digits", description="a model folder, a hub id, or digits")
    stages: tuple[RecipeStage, ...] = Field(  # type: ignore[valid-type]
        tuple(map(RecipeStage.model_validate, DEFAULT)),
        min_length=1,
        description="in this order: a verb and its options, any verb, any number of times. What makes "
        "no model (sample, export, evaluate, ...) is a leaf: the next stage goes on from the last model",
    )
    evaluate: EvaluateOptions = Field(
        EvaluateOptions(sampling_steps=25, middle_samples=100),
        description="how the report measures, and what a stage `evaluate` starts from",
    )

    def stage_options(self, name: str) -> Options:
        """The options of the stage of this name (`finetune.2`: the second such)."""
        return next(step.options for step in steps_of(self) if step.label == name)

    def evaluation(self) -> EvaluateOptions:
        """The options of the report."""
        default: EvaluateOptions = type(self).model_fields["evaluate"].default
        return default.model_copy(update=self._shared(default) | _given(self.evaluate))

    def _shared(self, options: Options) -> dict[str, Any]:
        return {
            key: getattr(self, key)
            for key in DataOptions.model_fields
            if key in type(options).model_fields
        }

    def _options_of(self, entry: _Entry) -> Options:
        """The verb's default < the recipe's shared values < the stage's own."""
        if entry.verb == "evaluate":
            return self.evaluation().model_copy(update=_given(entry.options))
        options = entry.options
        return options.model_copy(update=self._shared(options) | _given(options))


def _given(options: Options) -> dict[str, Any]:
    return {key: getattr(options, key) for key in options.model_fields_set}


@dataclass(frozen=True)
class Step:
    """One stage of a recipe. label: its name, with a number where several have that name."""

    label: str
    folder: str
    stage: Stage
    options: Options

    def make(
        self, source: str | Path, out: Path, *, progress: Progress, overwrite: bool = False
    ) -> str:
        """The result in `out`, made again where options or inputs have changed; a line about it."""
        record, made = self.stage.again(
            source, out, self.options, progress=progress, overwrite=overwrite
        )
        return describe(record.figures, record.wall_time_s, made)


def steps_of(recipe: Recipe) -> list[Step]:
    """The stages with all their options. Raises `UserError` for an order that cannot be."""
    entries: Sequence[_Entry] = recipe.stages
    labels = numbered([entry.name or entry.verb for entry in entries])
    steps = [
        Step(
            label,
            f"{number}-{entry.name or entry.verb}",
            STAGES[entry.verb],
            recipe._options_of(entry),
        )
        for number, (label, entry) in enumerate(zip(labels, entries, strict=True), start=1)
    ]
    _check_order(steps)
    return steps


def numbered(names: Sequence[str]) -> list[str]:
    """The names, each that is not alone with its number among those of the name: finetune.2."""
    count, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if count[name] == 1 else f"{name}.{seen[name]}")
    return labels


def _check_order(steps: Sequence[Step]) -> None:
    """Raise `UserError` for what would fail after hours."""
    masked = ""
    for number, step in enumerate(steps):
        if step.stage.reads == "nothing" and number:
            raise UserError(f"{step.folder}: {step.stage.verb} starts from nothing; put it first")
        if step.stage.bare and masked:
            raise UserError(
                f"{step.folder}: the model has masks from {masked} by then, and "
                f"{step.stage.verb} takes one without; put it before {masked}, or leave it out"
            )
        if step.stage.masks(step.options):
            masked = step.folder


def _places(
    recipe: Recipe, steps: Sequence[Step], out: Path
) -> Iterator[tuple[Step, str | Path, Path]]:
    """Each stage, the model that it goes on from, and its folder."""
    current: str | Path = recipe.model
    for step in steps:
        yield step, current, out / step.folder
        if step.stage.makes == "model":
            current = out / step.folder


def _report(recipe: Recipe, steps: Sequence[Step], out: Path, progress: Progress) -> Plan:
    """The comparison of all models, the dense one first."""
    from prunedm.stages.verbs.compare import comparison

    models: dict[str, str | Path] = {"dense": recipe.model}
    if steps[0].stage.reads == "nothing":
        models = {}
    models |= {step.folder: out / step.folder for step in steps if step.stage.makes == "model"}
    title = f"prunedm run: {Path(recipe.model).name}"
    return comparison(models, recipe.evaluation(), title=title, progress=progress)


def _begin(recipe: Recipe) -> list[Step]:
    """Raises `UserError` for what would fail at the end of a long run."""
    steps = steps_of(recipe)
    if steps[0].stage.reads == "model":
        stages.check_inputs(recipe.model, recipe.evaluation())
    return steps


def run(
    recipe: Recipe, out: str | Path, *, progress: Progress | None = None, overwrite: bool = False
) -> Path:
    """Run every stage that is not done yet; returns the folder of the final comparison.

    A stage is done when its folder's record has the same options and the same inputs, by the hashes
    of what they hold; one that was made otherwise is made again, and so is what follows from it.
    """
    progress, out = progress or Silent(), expanded(out)
    steps = _begin(recipe)
    for step, source, folder in _places(recipe, steps, out):
        line = step.make(source, folder, progress=progress, overwrite=overwrite)
        progress.say(f"{folder.name}: {line}")
    report = _report(recipe, steps, out, progress)
    try:
        run_stage("compare", report, out / REPORT, overwrite=overwrite)
    except Changed:  # of other models or options
        run_stage("compare", report, out / REPORT, overwrite=True)
    return out / REPORT


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
    out, steps, planned = expanded(out), _begin(recipe), list[Planned]()
    behind = ""  # the model that must be made first
    for step, source, folder in _places(recipe, steps, out):
        todo = f"after {behind}" if behind else step.stage.status(source, folder, step.options)
        planned.append(Planned(step.label, folder, todo))
        if todo and step.stage.makes == "model":
            behind = behind or folder.name
    todo = f"after {behind}" if behind else ""
    if not behind:
        todo = status("compare", _report(recipe, steps, out, Silent()), out / REPORT)
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
