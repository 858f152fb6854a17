"""sample: images from a model, as PNG files or one array; an interrupted run continues."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunedm.errors import UserError
from prunedm.evaluation.pictures import grid
from prunedm.folder import Model, load
from prunedm.options import SampleOptions
from prunedm.progress import Progress, Silent
from prunedm.record import Record
from prunedm.sampling import class_labels, make_sampler, sample_batches
from prunedm.stages.frame import RESUME, run_stage
from prunedm.stages.inputs import device_for, source_of

GRID = 64  # images on grid.png


def sample(
    source: str | Path,
    out: str | Path,
    options: SampleOptions = SampleOptions(),
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Record, bool]:
    """Draw `options.count` images from `source` into folder `out`, with a `grid.png`."""
    model = load(source)
    make_sampler(model.scheduler, options.sampler)  # an unknown name fails before any work

    def make(folder: Path) -> dict[str, Any]:
        images = sample_resumably(model, options, folder / RESUME, progress or Silent())
        if options.format == "npz":
            np.savez(folder / "samples.npz", images=images)
        else:
            for index, image in enumerate(images):
                Image.fromarray(_drop_gray(image)).save(folder / f"{index:06d}.png")
        grid(images[:GRID], 8).save(folder / "grid.png")
        return {"images": len(images)}

    return run_stage(
        "sample",
        out,
        options=options,
        inputs={"model": source_of(model)},
        parent=model.record,
        make=make,
        overwrite=overwrite,
    )


def sample_resumably(
    model: Model, options: SampleOptions, resume: Path, progress: Progress
) -> np.ndarray:
    """All images, uint8 NHWC; each finished batch waits in `resume`, and is not drawn again."""
    labels = labels_for(model, options.count, options.label)
    ready = sorted(resume.glob("batch-*.npy"))
    first = len(ready) * options.batch_size
    batches = sample_batches(
        model.denoiser,
        make_sampler(model.scheduler, options.sampler),
        count=options.count,
        steps=options.sampling_steps,
        shape=model.sample_shape,
        seed=options.seed,
        batch_size=options.batch_size,
        first=first,
        labels=labels,
        device=device_for(options.device),
        progress=progress,
    )
    for number, batch_NCHW in enumerate(batches, start=len(ready)):
        aside = resume / "writing.npy"
        np.save(aside, batch_NCHW.permute(0, 2, 3, 1).numpy(), allow_pickle=False)
        aside.rename(resume / f"batch-{number:06d}.npy")
    files = sorted(resume.glob("batch-*.npy"))
    return np.concatenate([np.load(file, allow_pickle=False) for file in files])


def labels_for(model: Model, count: int, label: int | None = None) -> torch.Tensor | None:
    """The class of each of `count` images, or None for a model without classes."""
    classes = getattr(model.denoiser.config, "num_class_embeds", None)
    if not model.conditional or classes is None:
        if label is not None:
            raise UserError(f"label = {label}: the model has no classes; leave --label out")
        return None
    return class_labels(classes, count, label)


def _drop_gray(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
