"""A recipe: the list of stages from a dense model to a compressed one, and the options of each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, create_model, model_validator

from prunedm import stages
from prunedm.errors import UserError, nearest
from prunedm.options import DataOptions, EvaluateOptions, ModelName, Options
from prunedm.progress import Progress, Silent
from prunedm.stages.frame import Models
from prunedm.stages.table import STAGES, VERBS, Stage
from prunedm.system.places import expanded, target

REPORT = "report"  # the folder of the final comparison


def verb_of(entry: Any) -> str:
    """The verb of one entry of the list. Raises `ValueError` where it does not have exactly one."""
    verbs = [key for key in entry if key != "name"] if isinstance(entry, dict) else []
    if len(verbs) != 1:
        raise ValueError(f"{entry!r} is not one verb with options, such as `- prune: {{}}`")
    if verbs[0] not in STAGES:
        raise ValueError(f"no verb {verbs[0]!r}{nearest(str(verbs[0]), list(STAGES))}")
    return str(verbs[0])


class _Entry(Options):
    """One verb of `STAGES` with its options, and optionally a name."""

    name: str = Field(
        "",
        pattern=r"^([A-Za-z][A-Za-z0-9_-]*)?$",
        description="name of the stage and its folder: letters, digits, - and _; none: the verb",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_verb(cls, given: Any) -> Any:
        verb = verb_of(given)
        return {**given, verb: {} if given[verb] is None else given[verb]}

    @property
    def verb(self) -> str:
        return next(verb for verb in STAGES if verb in self.model_fields_set)

    @property
    def options(self) -> Options:
        """Its options over the verb's own defaults."""
        options: Options = getattr(self, self.verb)
        return options


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
    """`prunedm run`: by default prune channels, recover, set N:M masks, and fine-tune.

    The default does not learn masks on frozen weights: where weights are trained afterwards,
    second-order masks reach a lower loss in the same time (docs/results.md).

    Dataset, columns, flip, convert_channels, seed and device are set once for all stages, unless a
    stage sets its own.
    """

    model: ModelName = Field("digits", description="a model folder, a hub id, or digits")
    stages: tuple[RecipeStage, ...] = Field(  # type: ignore[valid-type]
        tuple(map(RecipeStage.model_validate, DEFAULT)),
        min_length=1,
        description="in this order: a verb and its options, any verb, any number of times. After a verb "
        "that makes no model (sample, export, evaluate, ...) the next stage starts from the last model",
    )
    evaluate: EvaluateOptions = Field(
        EvaluateOptions(sampling_steps=25, middle_samples=100),
        description="options of the report, and defaults of a stage `evaluate`",
    )

    def stage_options(self, name: str) -> Options:
        """The options of the stage with this label, such as `finetune.2`."""
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
        """The verb's defaults < the recipe's shared values < the stage's own."""
        options = entry.options
        if entry.verb == "evaluate":
            return self.evaluation().model_copy(update=_given(options))
        return options.model_copy(update=self._shared(options) | _given(options))


def _given(options: Options) -> dict[str, Any]:
    return {key: getattr(options, key) for key in options.model_fields_set}


@dataclass(frozen=True)
class Step:
    """One stage of a recipe. label: its name, with a number where several share it."""

    label: str
    folder: str
    stage: Stage
    options: Options

    def make(self, source: Models, out: Path, *, progress: Progress, **named: Any) -> str:
        """Make `out`, again where options or inputs have changed; returns a line about it."""
        record, made = self.stage.again(source, out, self.options, progress=progress, **named)
        return describe(record.figures, record.wall_time_s, made)


def steps_of(recipe: Recipe) -> list[Step]:
    """The stages with all their options. Raises `UserError` for an impossible order."""
    entries: Sequence[_Entry] = recipe.stages
    names = [entry.name or entry.verb for entry in entries]
    steps = [
        Step(label, f"{number}-{name}", STAGES[entry.verb], recipe._options_of(entry))
        for number, (label, name, entry) in enumerate(
            zip(numbered(names), names, entries, strict=True), start=1
        )
    ]
    _check_order(steps)
    return steps


def numbered(names: Sequence[str]) -> list[str]:
    """The names; repeated ones get a number, as in finetune.2."""
    count, seen = Counter(names), Counter[str]()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if count[name] == 1 else f"{name}.{seen[name]}")
    return labels


def _check_order(steps: Sequence[Step]) -> None:
    """Raise `UserError` for an order that would fail only after hours."""
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


def _places(recipe: Recipe, out: Path) -> Iterator[tuple[Step, Models, Path]]:
    """Each step with its input and folder; the last is the report, on all models.

    Raises `UserError` for what would fail at the end of a long run.
    """
    steps = steps_of(recipe)
    models: dict[str, str | Path] = {}
    if steps[0].stage.reads == "model":
        stages.check_inputs(recipe.model, recipe.evaluation())
        models["dense"] = recipe.model
    current: str | Path = recipe.model
    for step in steps:
        folder = out / step.folder
        yield step, current, folder
        if step.stage.makes == "model":
            current = models[step.folder] = folder
    report = Step(REPORT, REPORT, VERBS["compare"], recipe.evaluation())
    yield report, models, out / REPORT


def run(
    recipe: Recipe, out: str | Path, *, progress: Progress | None = None, overwrite: bool = False
) -> Path:
    """Run every stage that is not done yet; returns the folder of the final comparison.

    A stage is done when its folder's record has the same options and the same inputs, by content
    hash. One that differs is made again, and so are those that follow from it.
    """
    progress, out = progress or Silent(), expanded(out)
    title = f"prunedm run: {Path(recipe.model).name}"
    for step, source, folder in _places(recipe, out):
        line = step.make(source, folder, progress=progress, overwrite=overwrite, title=title)
        progress.say(f"{folder.name}: {line}")
    return out / REPORT


@dataclass(frozen=True)
class Planned:
    """A step of a run: its folder, and what `run` would do there, "" where it is done."""

    name: str
    folder: Path
    todo: str


def plan(recipe: Recipe, out: str | Path) -> list[Planned]:
    """What `run` would do, in order. Makes nothing; raises `UserError` where `run` would.

    A stage whose input is still to be made cannot be looked at.
    """
    target(out)  # refuses an impossible folder
    planned, behind = list[Planned](), ""  # behind: the model that must be made first
    for step, source, folder in _places(recipe, expanded(out)):
        todo = f"after {behind}" if behind else step.stage.status(source, folder, step.options)
        planned.append(Planned(step.label, folder, todo))
        if todo and step.stage.makes == "model":
            behind = behind or folder.name
    return planned


def describe(figures: dict[str, Any], seconds: float, made: bool) -> str:
    """A stage's result in one line."""
    before = figures.get("loss_before", figures.get("loss_first_masks"))
    loss = figures.get("loss")  # None: not finite, or not measured
    after = "" if loss is None else f"{loss:.4f}"
    change = f"loss {before:.4f} => {after or 'none'}" if before is not None else ""
    if not change and after:
        change = f"loss {after}"
    when = f"{seconds:.0f} s" if made else "done already"
    return f"{change}  ({when})" if change else when
