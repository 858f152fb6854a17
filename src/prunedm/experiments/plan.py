"""A sweep's file: one recipe, and settings varied in a grid or searched by Optuna."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from prunedm.configuration import nested, read_options, validation_message
from prunedm.errors import UserError
from prunedm.options import Options
from prunedm.recipe import Recipe
from prunedm.recipe_draft import Draft
from prunedm.system.places import expanded

Settings = dict[str, Any]  # "prune.score" -> "taylor"
Direction = Literal["minimize", "maximize"]
MOST_RUNS = 10_000  # of a grid
Points = list[Any] | dict[str, Settings]  # values of one field, or named settings of several


class Range(Options):
    """Numbers to draw from: integers where both ends (and the step) are integers."""

    low: int | float
    high: int | float
    step: int | float | None = Field(
        None, gt=0, description="step between numbers; none: any number"
    )
    log: bool = Field(False, description="draw uniformly in the logarithm")

    @model_validator(mode="before")
    @classmethod
    def _has_ends(cls, given: Any) -> Any:
        if not isinstance(given, dict | Range) or (
            isinstance(given, dict) and not {"low", "high"} <= given.keys()
        ):
            raise ValueError("give a list of values, or low and high")
        return given

    @model_validator(mode="after")
    def _possible(self) -> "Range":
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low > 0 and no step")
        return self


def _kind(space: Any) -> str:
    return "values" if isinstance(space, list) else "range"


Space = Annotated[
    Annotated[list[Any], Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]


class Search(Options):
    """A search by Optuna, which proposes settings from the figures of earlier trials."""

    trials: int = Field(20, ge=1, description="total runs of all machines")
    space: dict[str, Space] = Field(
        ..., min_length=1, description="field -> values, or {low, high, step, log}"
    )
    sampler: Literal["tpe", "random", "nsga2", "gp"] = Field("tpe", description="Optuna sampler")
    pruner: Literal["none", "median", "halving"] = Field(
        "none", description="ends trials whose held-out loss lags behind; only with one objective"
    )
    pruner_patience: int = Field(
        4, ge=1, description="complete trials before the first is ended (median)"
    )
    seed: int = Field(0, ge=0, description="seed of the proposals")
    storage: str = Field(
        "", description="a database URL that several machines share; none: study.db in OUT"
    )
    study: str = Field("", description="the study's name in the storage; none: OUT's name")


class Sweep(Options):
    """`prunedm sweep`: a recipe, and either a grid or a search."""

    recipe: dict[str, Any] | str = Field(
        default_factory=dict, description="a recipe's options, or a recipe file next to this one"
    )
    grid: dict[str, Points] = Field(
        default_factory=dict,
        description="field -> values; or name -> {label: {field: value, ...}, ...}; all combinations",
    )
    search: Search | None = Field(None, description="instead of a grid")
    objectives: dict[str, Direction] = Field(
        {"loss": "minimize", "bytes_packed": "minimize"},
        min_length=1,
        description="figures of the evaluation, STAGE.figure of a record, or seconds",
    )

    @model_validator(mode="after")
    def _possible(self) -> "Sweep":
        if bool(self.grid) == (self.search is not None):
            raise ValueError("a sweep has either a grid or a search; give one of them")
        if any(not points for points in self.grid.values()):
            raise ValueError("a grid needs at least one value for each field")
        if "model" in self.fields():
            raise ValueError("a sweep has one dense model; make one sweep for each")
        if self.search and self.search.pruner != "none" and len(self.objectives) > 1:
            raise ValueError("a pruner needs one objective; give one, or pruner: none")
        return self

    @property
    def base(self) -> dict[str, Any]:
        """The recipe's options. Raises `UserError` for a file that cannot be read."""
        return read_options(expanded(self.recipe)) if isinstance(self.recipe, str) else self.recipe

    def values(self) -> Iterator[tuple[str, Any]]:
        """(field, value) of everything varied, in the file's order; of a range, the range."""
        for name, space in (self.search.space if self.search else {}).items():
            yield from ((name, value) for value in (space if isinstance(space, list) else [space]))
        for name, points in self.grid.items():
            if isinstance(points, dict):
                yield from (pair for settings in points.values() for pair in settings.items())
            else:
                yield from ((name, value) for value in points)

    def fields(self) -> list[str]:
        """Every varied option, in the file's order."""
        return list(dict.fromkeys(field for field, _ in self.values()))


@dataclass(frozen=True)
class Case:
    """One combination: its settings, its label, and the whole recipe."""

    settings: Settings
    label: str
    recipe: Recipe


def read_sweep(path: Path) -> Sweep:
    """Raises `UserError` naming the first error in the file."""
    table = read_options(path)
    if isinstance(table.get("recipe"), str):
        table["recipe"] = read_options(path.parent / expanded(table["recipe"]))
    try:
        return Sweep.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{path}: {validation_message(error, Sweep)}") from error


def draft_of(sweep: Sweep, settings: Settings) -> Draft:
    """The sweep's recipe with `settings` over it."""
    draft = Draft.of(sweep.base)
    for field, value in settings.items():
        draft.set(nested({field: value}))
    return draft


def case_of(sweep: Sweep, settings: Settings, label: str = "") -> Case:
    """One combination. Raises `UserError` where the recipe rejects a setting."""
    label = label or label_of(settings)
    try:
        return Case(settings, label, draft_of(sweep, settings).recipe())
    except UserError as error:
        raise UserError(f"{label}: {error}" if label else str(error)) from error


def check_fields(sweep: Sweep) -> None:
    """Raise `UserError` for a varied field that no stage of the recipe has."""
    varied, draft = "stages" in sweep.fields(), draft_of(sweep, {})
    ran = ", ".join(entry.name for entry in draft.entries if entry.runs)
    for field in sweep.fields():
        owner = draft.owner(field)
        if sweep.search and owner and not (owner.runs or varied):
            raise UserError(
                f"{field!r} changes nothing: {owner.name} is not among the stages ({ran})"
            )


def grid_cases(sweep: Sweep) -> list[Case]:
    """Every combination of the grid, the last field changing fastest."""
    axes = [_axis(name, points) for name, points in sweep.grid.items()]
    runs = math.prod(map(len, axes))
    if runs > MOST_RUNS:
        raise UserError(f"grid: {runs:,} runs; {MOST_RUNS:,} are allowed, `space:` searches more")
    cases = []
    for point in itertools.product(*axes):
        settings = {field: value for _, values in point for field, value in values.items()}
        cases.append(case_of(sweep, settings, " ".join(words for words, _ in point)))
    return cases


def _axis(name: str, points: Points) -> list[tuple[str, Settings]]:
    """(label, settings) of each point of one dimension."""
    if isinstance(points, Mapping):
        return [(str(label), dict(settings)) for label, settings in points.items()]
    return [(label_of({name: value}), {name: value}) for value in points]


def label_of(settings: Mapping[str, Any]) -> str:
    """A label like "score=taylor finetune.lr=0.001"; names are shortened where that is unique."""
    lasts = Counter(name.rpartition(".")[2] for name in settings)
    return " ".join(
        f"{last if lasts[last := name.rpartition('.')[2]] == 1 else name}={_words(value)}"
        for name, value in settings.items()
    )


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(str, value))
    return str(value)
