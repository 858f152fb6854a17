"""A recipe: the stages from a dense model to a compressed one, and the options of each."""

from pathlib import Path
from typing import Any

from pydantic import Field

from prunedm.errors import UserError
from prunedm.options import (
    DataOptions,
    EvaluateOptions,
    FinetuneOptions,
    LearnOptions,
    Options,
    PruneOptions,
)
from prunedm.progress import Progress, Silent

STAGES = ("prune", "recover", "mask", "learn", "finetune")
_SHARED = ("dataset", "flip", "convert_channels", "seed", "device")


class Recipe(DataOptions):
    """`prunedm run`: channels go, the rest recovers, then N:M masks, and the weights adapt to them.

    Learning masks on frozen weights is not among the default stages: where weights are trained
    afterwards, second-order masks end lower in the same time (docs/results.md).

    The options of all stages are reached by the stage's name (`learn.steps`); dataset, flip,
    convert_channels, seed and device are set once for all, unless a stage sets its own.
    """

    model: str = Field("digits", description="a model folder, a hub id, or digits")
    stages: tuple[str, ...] = Field(
        ("prune", "recover", "mask", "finetune"),
        description=f"stages to run, of {', '.join(STAGES)}, in this order",
    )
    prune: PruneOptions = PruneOptions()
    recover: FinetuneOptions = FinetuneOptions(steps=120)
    mask: PruneOptions = PruneOptions(mechanism="obs-nm")
    learn: LearnOptions = LearnOptions()
    finetune: FinetuneOptions = FinetuneOptions(steps=350)
    evaluate: EvaluateOptions = EvaluateOptions(sampling_steps=25)

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


def run(
    recipe: Recipe, out: str | Path, *, progress: Progress | None = None, overwrite: bool = False
) -> Path:
    """Run every stage that is not done yet; returns the folder of the final comparison."""
    from prunedm import stages

    progress, out = progress or Silent(), Path(out)
    unknown = set(recipe.stages) - set(STAGES)
    if unknown:
        raise UserError(f"stages: no {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}")
    stages.check_inputs(recipe.model, recipe.stage_options("evaluate"))
    verbs = {
        "prune": stages.prune,
        "recover": stages.finetune,
        "mask": stages.prune,
        "learn": stages.learn,
        "finetune": stages.finetune,
    }
    folders: dict[str, str | Path] = {"dense": recipe.model}
    current: str | Path = recipe.model
    for number, name in enumerate((s for s in STAGES if s in recipe.stages), start=1):
        folder = out / f"{number}-{name}"
        options = recipe.stage_options(name)
        record, made = verbs[name](  # type: ignore[operator]
            current, folder, options, progress=progress, overwrite=overwrite
        )
        progress.say(f"{folder.name}: {describe(record.figures, record.wall_time_s, made)}")
        folders[folder.name] = current = folder
    stages.compare(
        folders,
        out / "report",
        recipe.stage_options("evaluate"),
        title=f"prunedm run: {Path(recipe.model).name}",
        progress=progress,
        overwrite=overwrite,
    )
    return out / "report"


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
