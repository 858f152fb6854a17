"""evaluate: one model with its relatives on record, at a chosen depth."""

from pathlib import Path
from typing import Any

import numpy as np

from prunedm.folder import Model, load, save
from prunedm.options import EvaluateOptions
from prunedm.record import Source, write_json
from prunedm.stages.evaluating.files import SAMPLES_FOLDER, without_failures
from prunedm.stages.evaluating.first_masks import is_learned, under_first_masks
from prunedm.stages.evaluating.measure import RESULTS, Yardstick, read_evaluation, read_images
from prunedm.stages.evaluating.steps import Steps
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import given_model, model_sources, reload
from prunedm.stages.verbs.compare import Candidate, check_labels, study, yardstick
from prunedm.system.places import bare
from prunedm.training import processes

DENSE, FIRST = "dense", "first-masks"


def evaluate(request: Request[EvaluateOptions]) -> Plan:
    """Measure a model and the dense model of its record.

    Files: `evaluation_results.json` (this model's figures, the dense one's, and the changes), and
    those of `compare`. Where the dense model is gone or no record names one, the steps say so and
    nothing is compared with it. Where a step has failed, `overwrite` measures again.
    """
    source, options, progress = request.source, request.options, request.progress
    model = given_model(source, options, progress)
    label = Path(str(source)).resolve().name
    check_labels({label: source})
    yard = yardstick(model, options, progress)

    def make(folder: Path) -> dict[str, Any]:
        steps = Steps()
        entries = [*_relatives(model, label, yard, folder, steps), Candidate(label, model, yard)]
        rows = study(
            entries,
            folder,
            steps,
            title=f"prunedm evaluate: {label}",
            checkpoint=bare(str(source)),
            dense=any((s.step, s.status) == ("dense model", "done") for s in steps.taken),
        )
        write_json(rows[-1].model_dump(mode="json"), folder / RESULTS)
        return rows[-1].figures.model_dump(mode="json")

    return Plan(
        options=yard.options,
        inputs={**model_sources(model), **yard.inputs},
        parent=model.record,
        make=make,
        complete=without_failures,
    )


def read_samples(folder: Path, label: str = "") -> np.ndarray | None:
    """The samples of one model, uint8 NHWC, or None where none were drawn.

    `label` may be left out for a folder that `evaluate` wrote: the model evaluated.
    """
    label = label or read_evaluation(folder).label
    return read_images(folder / SAMPLES_FOLDER / f"{label}.npz")


def _relatives(
    model: Model, label: str, yard: Yardstick, folder: Path, steps: Steps
) -> list[Candidate]:
    """The dense model; at greater depths also the models between, and a learned model's first masks.

    All are measured on the same problems and noise, so that their figures compare.
    """
    depth, sources = yard.options.depth, _ancestors(model)
    if not sources:
        steps.skip("dense model", "no record says which model this one was made from")
    entries: list[Candidate] = []
    for number, source in enumerate(sources if depth == "comprehensive" else sources[:1]):
        name = "earlier model" if number else "dense model"
        found = steps.take(name, lambda source=source: reload(source, like=model))  # type: ignore[misc]
        if found is not None:
            wanted = Path(source.path).name if number else DENSE
            entries.append(Candidate(_free(wanted, label, entries), found, yard))
    if depth in ("compare", "comprehensive") and is_learned(model):
        first = steps.take("first masks", lambda: _first(model, yard, folder))
        if first is not None:
            shown, name = f"{bare(model.name)}, under the first masks", _free(FIRST, label, entries)
            entries.append(Candidate(name, first, yard, shown, first_masks=True))
    return entries


def _ancestors(model: Model) -> list[Source]:
    """The input models of the lineage's stages, the dense one first."""
    found: dict[str, Source] = {}
    for stage in model.record.lineage() if model.record else []:
        if "model" in stage.inputs and stage.inputs["model"].hash != model.hash:
            found.setdefault(stage.inputs["model"].hash, stage.inputs["model"])
    return list(found.values())


def _first(model: Model, yard: Yardstick, folder: Path) -> Model:
    """The model under its first masks, from a folder like any other model."""
    place = folder / RESUME / FIRST
    try:
        if processes.rank() == 0 and not place.exists():
            made = under_first_masks(model, device=yard.options.device, progress=yard.progress)
            aside = place.with_name("first-masks-aside")
            save(made, aside)
            aside.rename(place)
    finally:
        processes.wait_for_all()
    return load(place)


def _free(wanted: str, label: str, entries: list[Candidate]) -> str:
    """`wanted`, with a number appended if `label` or an entry has that label."""
    taken = {label, *(entry.label for entry in entries)}
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name
