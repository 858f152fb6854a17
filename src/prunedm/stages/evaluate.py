"""evaluate: one model's loss, FD, size, speed and sparsity, each with its conditions."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.data import ImageSet
from prunedm.errors import UserError
from prunedm.evaluation.features import FeatureNetwork, extract, image_batches, load_features
from prunedm.evaluation.fid import Statistics, frechet_distance, statistics
from prunedm.evaluation.loss import denoising_loss
from prunedm.evaluation.pictures import grid
from prunedm.evaluation.results import Conditions, Evaluation, Figures
from prunedm.evaluation.size import (
    count_macs,
    count_nonzero,
    count_parameters,
    nm_validity,
    packed_bytes,
)
from prunedm.evaluation.speed import latency
from prunedm.folder import Model, find, load, size_on_disk
from prunedm.options import EvaluateOptions, SampleOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record, device_name, write_json
from prunedm.sampling import make_sampler
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import (
    data_source,
    device_for,
    held_out_problems,
    images_for,
    source_of,
)
from prunedm.stages.sample import sample_resumably

RESULTS = "evaluation_results.json"
SAMPLES = "samples.npz"
LEAST_SAMPLES = 300  # where the number is not given; more where the features need it
MOST_REFERENCES = 10_000  # held-out images behind FD


def evaluate(
    source: str | Path,
    out: str | Path,
    options: EvaluateOptions = EvaluateOptions(),
    *,
    label: str = "",
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Measure `source` and write `evaluation_results.json`, `samples.npz` and `samples.png`."""
    model = load(source)
    reference = images_for(model, options, "test")
    options, network = with_features(options, reference)  # fails before any work
    make_sampler(model.scheduler, options.sampler)

    def make(folder: Path) -> dict[str, Any]:
        result = _evaluate(
            model,
            reference=reference,
            network=network,
            options=options,
            folder=folder,
            progress=progress or Silent(),
        )
        result.label = label or Path(str(source)).name
        write_json(result.model_dump(mode="json"), folder / RESULTS)
        return result.figures.model_dump(mode="json")

    return run_stage(
        "evaluate",
        out,
        options=options,
        inputs={"model": source_of(model), "dataset": data_source(reference)},
        parent=model.record,
        make=make,
        overwrite=overwrite,
    )


def read_evaluation(folder: Path) -> Evaluation:
    """What `evaluate` wrote."""
    return Evaluation.model_validate_json((folder / RESULTS).read_text(encoding="utf-8"))


def read_samples(folder: Path) -> np.ndarray | None:
    """The samples of an evaluation, uint8 NHWC, or None where none were drawn."""
    path = folder / SAMPLES
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        images: np.ndarray = file["images"]
    return images


def with_features(
    options: EvaluateOptions, reference: ImageSet
) -> tuple[EvaluateOptions, FeatureNetwork | None]:
    """The network that FD is measured in (None where FD is skipped), and the number of samples set.

    Raises `UserError` for what would fail only after hours: too few images for its features.
    """
    if options.samples == 0:
        return options, None
    name = options.features
    if name == "auto":
        name = "digits-cnn" if reference.name == "digits" and reference.size == 16 else "inception"
    network = _features(name, options.inception_weights)
    dim = network.dim or network(reference[0][None]).shape[1]
    if options.samples is None:
        options = options.model_copy(update={"samples": max(LEAST_SAMPLES, dim + dim // 4)})
    for what, count in (("samples", options.samples), ("held-out images", len(reference))):
        if count is not None and count <= dim:
            raise UserError(
                f"{count} {what} are too few for {network.name}, which has {dim} features; "
                "give more, or --samples 0 to go without"
            )
    return options, network


def _evaluate(
    model: Model,
    *,
    reference: ImageSet,
    network: FeatureNetwork | None,
    options: EvaluateOptions,
    folder: Path,
    progress: Progress,
) -> Evaluation:
    device = device_for(options.device)
    model.denoiser.to(device)
    problems = held_out_problems(model, options, options.problems)
    loss = denoising_loss(model.denoiser, problems, device=device, progress=progress)
    distance = None
    if network is not None:
        images = _draw(model, options, folder, progress)
        drawn = torch.from_numpy(images).permute(0, 3, 1, 2)
        features = extract(network, image_batches(drawn), device=device)
        own = statistics(features, features=network.name)
        distance = frechet_distance(own, _reference(reference, network, str(device)))
    timing = latency(
        model.denoiser,
        model.sample_shape,
        batch=options.latency_batch,
        repeats=options.latency_repeats,
        device=device,
    )
    validity = nm_validity(model.denoiser, model.masks)
    figures = Figures(
        loss=loss.mean,
        loss_se=loss.standard_error,
        fd=distance,
        params=count_parameters(model.denoiser),
        nonzero=count_nonzero(model.denoiser),
        macs=count_macs(model.denoiser, model.sample_shape),
        bytes_disk=size_on_disk(find(model.name)),
        bytes_packed=packed_bytes(model.denoiser, model.masks),
        latency_ms=timing.median_ms,
        latency_spread_ms=timing.spread_ms,
        pattern=validity.pattern,
        nm_valid=validity.valid,
        nm_layers=validity.layers,
        nm_dense=validity.dense,
    )
    return Evaluation(
        label="",
        model=model.name,
        hash=model.hash,
        figures=figures,
        conditions=_conditions(model, reference, network, options),
        record=model.record,
        samples_file=SAMPLES if network is not None else "",
        curve=_curve(model.record),
    )


def _draw(model: Model, options: EvaluateOptions, folder: Path, progress: Progress) -> np.ndarray:
    wanted = SampleOptions(
        count=options.samples or LEAST_SAMPLES,
        sampler=options.sampler,
        sampling_steps=options.sampling_steps,
        batch_size=options.batch_size,
        seed=options.seed,
        device=options.device,
    )
    images = sample_resumably(model, wanted, folder / RESUME, progress)
    np.savez(folder / SAMPLES, images=images)
    grid(images[:64], 8).save(folder / "samples.png")
    return images


def _conditions(
    model: Model,
    reference: ImageSet,
    network: FeatureNetwork | None,
    options: EvaluateOptions,
) -> Conditions:
    return Conditions(
        dataset=reference.name,
        problems=options.problems,
        samples=options.samples or 0,
        sampler=f"{options.sampler}-{options.sampling_steps}",
        seed=options.seed,
        features=network.name if network else "FD",
        reference=min(len(reference), MOST_REFERENCES) if network else 0,
        device=device_name(options.device),
        dtype=str(next(model.denoiser.parameters()).dtype).removeprefix("torch."),
        latency_batch=options.latency_batch,
    )


def _curve(record: Record | None) -> dict[str, Any]:
    curve: dict[str, Any] = record.figures.get("curve", {}) if record else {}
    return curve


@lru_cache(maxsize=4)
def _features(name: str, weights: str) -> FeatureNetwork:
    return load_features(name, weights=weights or None)


_reference_cache: dict[tuple[str, str], Statistics] = {}


def _reference(images: ImageSet, network: FeatureNetwork, device: str) -> Statistics:
    """Statistics of the held-out images; the same for every model of a comparison."""
    key = (images.fingerprint(), network.name)
    if key not in _reference_cache:
        count = min(len(images), MOST_REFERENCES)
        batches = image_batches([images[i] for i in range(count)])
        _reference_cache[key] = statistics(
            extract(network, batches, device=device), features=network.name
        )
    return _reference_cache[key]
