"""The picture that trackers show of a model in training: a few of its samples."""

import numpy as np
import torch
from torchvision.utils import make_grid

from prunedm.folder import Model
from prunedm.options import LoopOptions
from prunedm.sampling import draw_images

STEPS = 20  # of DDIM
SIDE = 64  # least side of an image in the picture, in pixels
COLUMNS = 8


def samples(model: Model, options: LoopOptions, device: torch.device) -> dict[str, np.ndarray]:
    """{"samples": picture} of `options.track_images` images of the current denoiser.

    The picture is uint8 HWC, RGB. The noise follows from the seed, so the same images are shown each
    time. {} where no images are wanted, or channels are not colours.
    """
    if model.architecture.text:
        return {}
    channels, count = model.codec.image_shape[0], options.track_images
    if not count or channels not in (1, 3):
        return {}
    (images_NCHW,) = draw_images(
        model,
        count=count,
        steps=min(STEPS, model.process.steps),
        seed=options.seed,
        batch_size=count,
        device=device,
    )
    return {"samples": picture(images_NCHW)}


def picture(images_NCHW: torch.Tensor) -> np.ndarray:
    """uint8 images in rows on white, uint8 HWC, RGB; small ones are enlarged by whole factors."""
    factor = max(1, SIDE // images_NCHW.shape[2])
    large_NCHW = images_NCHW.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet_CHW = make_grid(large_NCHW, nrow=COLUMNS, padding=2, pad_value=255)
    sheet_HWC: np.ndarray = sheet_CHW.permute(1, 2, 0).numpy()
    return sheet_HWC
