"""sample: images from a model, as PNG files or one array; an interrupted run continues."""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prunedm.deployment.runtimes import ExportedDenoiser, open_model
from prunedm.errors import UserError
from prunedm.evaluation.pictures import grid
from prunedm.folder import Model
from prunedm.options import SampleOptions
from prunedm.progress import Progress
from prunedm.reading import check_regular
from prunedm.sampling import FastDenoiser, draw_images, make_sampler, set_steps
from prunedm.stages.continuations import continue_prompts
from prunedm.stages.frame import RESUME, Plan, Request
from prunedm.stages.inputs import device_for, model_sources
from prunedm.task.condition import Classes, Condition
from prunedm.training import processes

GRID = 64  # images on grid.png


def sample(request: Request[SampleOptions]) -> Plan:
    """Draw `options.count` images from `source` into folder `out`, with a `grid.png`.

    Several processes share the batches; one batch of images is in memory at a time. An exported
    model runs in its own runtime.
    """
    options, progress = request.options, request.progress
    model = open_model(request.source, scheduler=options.scheduler)
    for note in model.notes:
        progress.say(note)
    if model.tokenizer is not None:
        return continue_prompts(model, options, progress)
    if options.prompts:
        raise UserError("--prompts: only language models continue texts so far; leave it out")
    _check_speed(model, options)
    sampler = make_sampler(model.scheduler, options.sampler, options.spacing)
    set_steps(sampler, options.sampling_steps)  # both raise before any work
    condition_of(model, options)

    def make(folder: Path) -> dict[str, Any]:
        used: list[FastDenoiser] = []
        files = _draw(model, options, folder / RESUME, progress, used.append)
        if processes.rank() == 0:
            _assemble(files, folder, options)
        runs = model.denoiser
        where = {"runtime": runs.arithmetic} if isinstance(runs, ExportedDenoiser) else {}
        return {"images": options.count} | where | _how(used)

    return Plan(options=options, inputs=model_sources(model), parent=model.record, make=make)


def sample_resumably(
    model: Model, options: SampleOptions, resume: Path, progress: Progress
) -> np.ndarray:
    """All images, uint8 NHWC; finished batches are kept in `resume` and not drawn again."""
    images = np.concatenate(list(_read_all(_draw(model, options, resume, progress))))
    processes.wait_for_all()  # `resume` is cleared only when all have read it
    return images


def condition_of(model: Model, options: SampleOptions) -> Condition:
    """The images' condition. Raises `UserError` for a class that the model does not have."""
    if options.label is None:
        return model.condition
    if not model.conditional:
        raise UserError(f"label = {options.label}: the model has no classes; leave --label out")
    return Classes(model.architecture.classes(model.denoiser), only=options.label)


def _check_speed(model: Model, options: SampleOptions) -> None:
    if options.speed == "fast" and isinstance(model.denoiser, ExportedDenoiser):
        raise UserError(
            "speed = fast compiles PyTorch models; an exported one is as fast as its runtime makes "
            "it, so leave --speed out"
        )


def _how(used: list[FastDenoiser]) -> dict[str, Any]:
    """What the fast path did on this machine, in the first process."""
    if not used:
        return {}
    return {
        "dtype": str(used[-1].dtype).removeprefix("torch."),
        "compiled": used[-1].is_compiled,
    }


def _draw(
    model: Model,
    options: SampleOptions,
    resume: Path,
    progress: Progress,
    made: Callable[[FastDenoiser], object] = lambda call: None,
) -> list[Path]:
    """The files of all batches, in order; several processes share the drawing."""
    starts = range(0, options.count, options.batch_size)
    files = [resume / f"batch-{k:06d}.npz" for k in range(len(starts))]
    channels, height, width = model.codec.image_shape
    shapes = [(min(options.batch_size, options.count - s), height, width, channels) for s in starts]
    mine = range(processes.rank(), len(starts), processes.count())
    missing = [k for k in mine if not _is_whole(files[k], shapes[k])]
    batches = draw_images(
        model,
        count=options.count,
        steps=options.sampling_steps,
        sampler=options.sampler,
        spacing=options.spacing,
        condition=condition_of(model, options),
        seed=options.seed,
        batch_size=options.batch_size,
        starts=[starts[k] for k in missing],
        device=device_for(options.device),
        speed=options.speed,
        progress=progress,
        made=made,
    )
    for k, batch_NCHW in zip(missing, batches, strict=True):
        aside = resume / f"writing-{processes.rank()}.npz"
        np.savez(aside, images=batch_NCHW.permute(0, 2, 3, 1).numpy())
        aside.replace(files[k])  # may replace a damaged one
    processes.wait_for_all()
    return files


def _is_whole(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether the file holds images of this shape, undamaged; an npz carries checksums."""
    try:
        images = _read(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    return images.dtype == np.uint8 and images.shape == shape


def _read(file: Path) -> np.ndarray:
    with np.load(check_regular(file), allow_pickle=False) as archive:
        images: np.ndarray = archive["images"]
        return images


def _read_all(files: Iterable[Path]) -> Iterator[np.ndarray]:
    """Batches as uint8 NHWC, one at a time."""
    return (_read(file) for file in files)


def _assemble(files: list[Path], folder: Path, options: SampleOptions) -> None:
    """The result from the batches: PNG files or `samples.npz`, and `grid.png`."""
    batches = _shown(_read_all(files), folder / "grid.png")
    if options.format == "npz":
        _write_npz(folder / "samples.npz", batches, options.count)
        return
    index = 0
    for batch_NHWC in batches:
        for image_HWC in batch_NHWC:
            plain = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
            Image.fromarray(plain).save(folder / f"{index:06d}.png")
            index += 1


def _shown(batches: Iterable[np.ndarray], picture: Path) -> Iterator[np.ndarray]:
    """The same batches; their first images go into `picture`."""
    first: list[np.ndarray] = []
    for batch_NHWC in batches:
        first += [image.copy() for image in batch_NHWC[: GRID - len(first)]]
        yield batch_NHWC
    grid(np.stack(first), 8).save(picture)


def _write_npz(path: Path, batches: Iterable[np.ndarray], count: int) -> None:
    """One array `images`, uint8 (count, H, W, C), written batch by batch."""
    written = 0
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        for batch_NHWC in batches:
            if not written:
                header = {
                    "descr": np.lib.format.dtype_to_descr(batch_NHWC.dtype),
                    "fortran_order": False,
                    "shape": (count, *batch_NHWC.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch_NHWC).data)
            written += len(batch_NHWC)
    assert written == count, (written, count)
