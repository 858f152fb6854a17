"""measure: one model on its own, for `evaluate`, `compare` and sweeps."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from prunedm.data.images import ImageSet
from prunedm.data.texts import TextSet
from prunedm.evaluation.features import FeatureNetwork
from prunedm.evaluation.loss import streamed_batches
from prunedm.evaluation.metric import Subject
from prunedm.evaluation.results import (
    EMA,
    LAST,
    Asked,
    Conditions,
    Evaluation,
    Figures,
    StepResult,
    figure_names,
)
from prunedm.evaluation.size import layer_sparsity
from prunedm.evaluation.speed import dtype_in_words
from prunedm.evaluation.tasks import Tasks
from prunedm.folder import Model, size_on_disk
from prunedm.hub import find
from prunedm.options import EvaluateOptions, SampleOptions
from prunedm.progress import Progress
from prunedm.reading import check_regular, read_as, validated
from prunedm.record import Record, Source, bare_paths, device_name, write_json
from prunedm.sampling import make_sampler
from prunedm.stages.evaluating.quality import UNSCORED_SAMPLES, features_of
from prunedm.stages.evaluating.reload import DIFFERS, check_reload
from prunedm.stages.evaluating.steps import Steps
from prunedm.stages.frame import RESUME, Plan, run_stage
from prunedm.stages.inputs import (
    DataSet,
    data_source,
    device_for,
    held_out_count,
    model_sources,
    problems_on,
)
from prunedm.stages.verbs.sample import sample_resumably
from prunedm.system.places import bare
from prunedm.tables import METRICS
from prunedm.task import Stream

RESULTS = "evaluation_results.json"
STEPS = "steps.json"
SAMPLES = "samples.npz"
_Steps = TypeAdapter(list[StepResult])


@dataclass(frozen=True)
class Yardstick:
    """What all models of a comparison share: options, held-out images, feature network."""

    options: EvaluateOptions
    reference: DataSet
    network: FeatureNetwork | None  # None where no distance is measured
    progress: Progress
    files: dict[str, Source] = field(default_factory=dict)  # of the feature network, by role
    tasks: Tasks | None = None  # for language models

    @property
    def inputs(self) -> dict[str, Source]:
        """The inputs of a measurement beside the model."""
        return {"dataset": data_source(self.reference), **self.files}

    def lighter(self) -> "Yardstick":
        """For models between the first and the last: `middle_samples` images, and no FD."""
        fewer = self.options.middle_samples
        if fewer is None or not self.options.samples:
            return self
        samples = min(fewer, self.options.samples)
        return replace(
            self, options=self.options.model_copy(update={"samples": samples}), network=None
        )


def measure(
    model: Model, out: Path, label: str, yard: Yardstick, *, overwrite: bool = False
) -> None:
    """Write `evaluation_results.json`, `steps.json`, `losses.npy`, and samples where there are any.

    Latencies are left to `time_in_turns`. A step that fails is recorded, and the others are taken.
    """

    def make(folder: Path) -> dict[str, Any]:
        steps = Steps(label)
        result = _Measuring(model, label, yard, folder, steps).all()
        write_json(result.model_dump(mode="json"), folder / RESULTS)
        write_json([step.model_dump(mode="json") for step in steps.taken], folder / STEPS)
        return {}

    plan = Plan(
        options=yard.options,
        inputs={**model_sources(model), **yard.inputs},
        parent=model.record,
        make=make,
        complete=lambda folder: not read_evaluation(folder).failed,
    )
    run_stage("measure", plan, out, overwrite=overwrite)


def read_evaluation(folder: Path) -> Evaluation:
    """The row that `measure` or `evaluate` wrote."""
    return read_as(Evaluation, folder / RESULTS, f"delete {folder} and measure again")


def read_steps(folder: Path) -> list[StepResult]:
    """How each step of `measure` ended."""
    return validated(_Steps, folder / STEPS, f"delete {folder} and measure again")


def read_images(path: Path) -> np.ndarray | None:
    """The samples in an .npz, uint8 NHWC, or None where there is no such file."""
    if not path.exists():
        return None
    with np.load(check_regular(path), allow_pickle=False) as file:
        images: np.ndarray = file["images"]
    return images


def batches_of(options: EvaluateOptions) -> list[int]:
    """The batch sizes that are timed; the first is the table's."""
    first = options.latency_batch
    if options.depth == "quick":
        return [first]
    return [first, *sorted(set(options.latency_batches) - {first})]


class _Measuring:
    """The steps of one model, the cheapest first."""

    def __init__(
        self, model: Model, label: str, yard: Yardstick, folder: Path, steps: Steps
    ) -> None:
        self.model, self.label, self.yard, self.steps = model, label, yard, steps
        self.options = yard.options
        self.figures: dict[str, Any] = dict.fromkeys(figure_names())
        self.subject = Subject(
            denoiser=model.denoiser,
            masks=model.masks,
            example=model.example,
            bytes_disk=lambda: size_on_disk(find(model.name)),
            problems=self._problems,
            device=device_for(self.options.device),
            largest_batch=max(batches_of(self.options)),
            seed=self.options.seed,
            folder=folder,
            progress=yard.progress,
            text=isinstance(yard.reference, TextSet),
            stride=self.options.stride,
        )

    def all(self) -> Evaluation:
        """Every step of the depth; the reload check first, before weights move to a device."""
        model, steps, denoiser = self.model, self.steps, self.model.denoiser
        reloads = self._reloads()
        denoiser.to(self.subject.device)
        self._take("weights")
        layers = steps.take("sparsity", lambda: layer_sparsity(denoiser, model.masks))
        self._take("problems")
        if self.yard.tasks:
            self.figures |= steps.take("tasks", partial(self._tasks, self.yard.tasks)) or {}
        if self.options.depth != "quick":
            self._take("calls")
            self._samples()
        return Evaluation(
            label=self.label,
            model=bare(model.name),
            hash=model.hash,
            figures=Figures.model_validate(self.figures),
            conditions=self._conditions(),
            record=bare_paths(model.record),
            layers=layers or [],
            asked=asked(model.record),
            reloads=reloads,
            failed=steps.failed,
            samples_file=SAMPLES if self.subject.images_NHWC is not None else "",
            curve=model.record.figures.get("curve", {}) if model.record else {},
        )

    def _reloads(self) -> bool | None:
        """None where it could not be checked."""
        if self.steps.take("reload check", lambda: check_reload(self.model)):
            return True
        return False if DIFFERS in self.steps.failed["reload check"] else None

    def _take(self, needs: str) -> None:
        """Every measurement with these needs; several metrics may share one."""
        kind = "texts" if self.subject.text else "images"
        wanted = (metric.measured for metric in METRICS.values() if metric.of in ("", kind))
        for measurement in dict.fromkeys(wanted):
            work = measurement.figures
            if measurement.needs == needs and work is not None:
                found = self.steps.take(measurement.step, partial(work, self.subject))
                self.figures |= found or {}

    def _problems(self) -> Stream:
        problems = problems_on(self.yard.reference, self.model, self.options.seed)
        count = held_out_count(self.yard.reference, self.options.problems)
        return streamed_batches(problems, count, self.options.batch_size)

    def _tasks(self, tasks: Tasks) -> dict[str, float]:
        """Questions are put as many at a time as problems are."""
        tokenizer, stream = self.model.tokenizer, self._problems()
        assert tokenizer is not None  # of language models
        return tasks.figures(
            self.model.denoiser,
            tokenizer.loaded,
            examples=self.options.zero_shot.examples,
            batch_size=stream.size,
        )

    def _samples(self) -> None:
        """Draw samples, and measure on them and on their features."""
        if not self.options.samples:
            self.steps.skip("samples", "samples = 0")
            return
        images_NHWC = self.steps.take("samples", self._draw)
        if images_NHWC is not None:
            self.subject = replace(self.subject, images_NHWC=images_NHWC)
            self._take("samples")
        network, reference = self.yard.network, self.yard.reference
        if network is None:
            self.steps.skip("fd", "skip_fid" if self.options.skip_fid else "between first and last")
        elif images_NHWC is not None and isinstance(reference, ImageSet):
            features_ND = self.steps.take(
                "features",
                lambda: features_of(
                    images_NHWC,
                    reference,
                    network,
                    self.subject.device,
                    most=self.options.references,
                ),
            )
            if features_ND is not None:
                self.subject = replace(self.subject, features_ND=features_ND, features=network.name)
                self._take("features")

    def _draw(self) -> np.ndarray:
        wanted = SampleOptions(
            count=self.options.samples or UNSCORED_SAMPLES,
            sampler=self.options.sampler,
            sampling_steps=self.options.sampling_steps,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            device=self.options.device,
        )
        folder = self.subject.folder
        images = sample_resumably(self.model, wanted, folder / RESUME, self.yard.progress)
        np.savez(folder / SAMPLES, images=images)
        return images

    def _conditions(self) -> Conditions:
        options, network, reference = self.options, self.yard.network, self.yard.reference
        if isinstance(reference, TextSet):
            own: dict[str, Any] = {"length": reference.length, "stride": options.stride}
            own |= {"task_examples": options.zero_shot.examples}
            own |= {"sampler": "", "prediction": "the next token"}
        else:
            sampler = make_sampler(self.model.scheduler, options.sampler)
            own = {
                "sampler": f"{options.sampler}-{options.sampling_steps}",
                "spacing": sampler.config.get("timestep_spacing", ""),
                "prediction": self.model.process.prediction,
                "schedule": self.model.process.schedule_in_words(),
            }
        return Conditions(
            **own,
            dataset=bare(reference.name),
            problems=held_out_count(reference, options.problems),
            samples=options.samples or 0,
            seed=options.seed,
            features=network.name if network else "FD",
            reference=min(len(reference), options.references) if network else 0,
            device=device_name(options.device),
            dtype=dtype_in_words(self.model.denoiser),
            threads=torch.get_num_threads(),
            weights=weights_in_words(self.model.record),
            latency_batch=options.latency_batch,
            latency_repeats=options.latency_repeats,
        )


def asked(record: Record | None) -> list[Asked]:
    """The target of each pruning in the lineage, and what it reached."""
    found = []
    for stage in record.lineage() if record else []:
        got = stage.figures.get("achieved", {})
        for what, wanted in stage.figures.get("requested", {}).items():
            reached = got.get(what, wanted)  # a pattern is reached, or the stage fails
            reason = stage.figures.get("reason", "")
            found.append(Asked(what=what, asked=wanted, got=reached, reason=reason))
    return found


def weights_in_words(record: Record | None) -> str:
    """Whether the weights are an average over training, by the last stage that trained them."""
    for stage in reversed(record.lineage() if record else []):
        decay = stage.options.get("ema_decay")
        # of logits only, where learn has left the weights alone
        own = stage.stage != "learn" or stage.options.get("train_weights")
        if decay is not None and own:
            return f"{EMA}{decay:g}" if decay else LAST
    return ""
