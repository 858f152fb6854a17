"""What quality is measured with: the feature network with its features, and zero-shot tasks.

Shapes: N images, D features.
"""

import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from prunedm.data.images import ImageSet
from prunedm.data.texts import TextSet
from prunedm.errors import UserError
from prunedm.evaluation.features import FeatureNetwork, extract, image_batches, load_features
from prunedm.evaluation.tasks import Tasks
from prunedm.folder import Model
from prunedm.options import EvaluateOptions
from prunedm.record import Source
from prunedm.stages.inputs import file_source

LEAST_SAMPLES = 300  # by default; more where the features need it
UNSCORED_SAMPLES = 64  # by default, where no distance is measured


def with_features(
    options: EvaluateOptions, reference: ImageSet | TextSet
) -> tuple[EvaluateOptions, FeatureNetwork | None, dict[str, Source]]:
    """Options with `samples` and `features` resolved, the feature network, and its files by role.

    The network is None where no distance is measured. Raises `UserError` for what would otherwise fail
    only after hours: features that do not take the images, and too few images for the features.
    """
    if options.depth == "quick" or options.samples == 0 or isinstance(reference, TextSet):
        return options.model_copy(update={"samples": 0}), None, {}
    if options.skip_fid:
        samples = UNSCORED_SAMPLES if options.samples is None else options.samples
        return options.model_copy(update={"samples": samples}), None, {}
    name = options.features
    if name == "auto":
        embedded = reference.name == "digits" and (reference.channels, reference.size) == (1, 16)
        name = "digits-cnn" if embedded else "inception"
    files = feature_files(name, options.inception_weights)
    hashes = tuple(file.hash for file in files.values())
    network = _features(name, options.inception_weights, options.trust_features, hashes)
    # `extract` moves the network, which an earlier evaluation may have left on a GPU
    dim = extract(network, [reference[0][None]]).shape[1]
    options = options.model_copy(update={"features": name})
    if options.samples is None:
        options = options.model_copy(update={"samples": max(LEAST_SAMPLES, dim + dim // 4)})
    real = min(options.references, len(reference))
    for what, count in (("samples", options.samples), ("held-out images", real)):
        if count is not None and count <= dim:
            raise UserError(
                f"{count} {what} are too few for {network.name}, which has {dim} features; "
                "give more, or --skip-fid to go without"
            )
    return options, network, files


def features_of(
    images_NHWC: np.ndarray,
    reference: ImageSet,
    network: FeatureNetwork,
    device: torch.device,
    *,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) of the samples, and of the first `most` held-out images."""
    drawn_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    own_ND = extract(network, image_batches(drawn_NCHW), device=device)
    return own_ND, _reference_features(reference, network, device, most)


def feature_files(features: str, inception_weights: str) -> dict[str, Source]:
    """The files that a feature network is read from, by role."""
    names = {"features file": features, "Inception weights file": inception_weights}
    named = {"digits-cnn", "inception", ""}
    paths = {role: Path(name).expanduser() for role, name in names.items() if name not in named}
    return {role: file_source(path) for role, path in paths.items() if path.is_file()}


@lru_cache(maxsize=4)
def _features(name: str, weights: str, trust: bool, hashes: tuple[str, ...]) -> FeatureNetwork:
    """Cached by the `hashes` of its files too, so that a changed file is read again."""
    return load_features(name, weights=weights or None, trust=trust)


_references: dict[tuple[str, torch.nn.Module, int], torch.Tensor] = {}


def _reference_features(
    images: ImageSet, network: FeatureNetwork, device: torch.device, most: int
) -> torch.Tensor:
    """Features (N, D) of the held-out images; the same for every model of a comparison."""
    count = min(len(images), most)
    key = (images.fingerprint(), network.module, count)  # two files may share a name
    if key not in _references:
        first: Subset[torch.Tensor] = Subset(images, range(count))  # type: ignore[arg-type]
        _references.clear()  # one set at a time: they can be large
        _references[key] = extract(network, image_batches(first), device=device)
    return _references[key]


def tasks_for(model: Model, options: EvaluateOptions) -> Tasks | None:
    """The options' zero-shot tasks. Raises `UserError` for models of images, and as `Tasks`."""
    if not options.tasks:
        return None
    if not model.architecture.text:
        raise UserError(f"--tasks are for language models, and {model.name} makes images")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells how it was called
    return Tasks(options.tasks, options.zero_shot.folder)
