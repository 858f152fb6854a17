"""The data that a network denoises: pixels, or the latents of an autoencoder.

Images are uint8 NCHW; clean data are float32, of about unit scale. edm2's `training/encoders.py` has
the same two cases.
"""

from typing import Any, Protocol

import torch

from prunedm.data.images import to_model_range, to_uint8
from prunedm.tensor_cache import TensorCache, content_key

Shape = tuple[int, int, int]  # (C, H, W)


class Codec(Protocol):
    """Converts between images and clean data."""

    shape: Shape  # of one clean item
    image_shape: Shape

    def encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """uint8 images => clean data, on the CPU."""

    def decode(self, clean_NCHW: torch.Tensor) -> torch.Tensor:
        """Clean data => uint8 images, on its device."""


class Pixels:
    """Pixels from -1 to 1."""

    def __init__(self, shape: Shape) -> None:
        self.shape = self.image_shape = shape

    def encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """0..255 => -1..1."""
        return to_model_range(images_NCHW)

    def decode(self, clean_NCHW: torch.Tensor) -> torch.Tensor:
        """-1..1 => 0..255."""
        return to_uint8(clean_NCHW)


class Latents:
    """Latents of a frozen autoencoder of diffusers (AutoencoderKL, AutoencoderTiny, VQModel).

    Each image is encoded to the mean of its distribution, where there is one, and cached by content;
    one at a time, so that a latent does not depend on the rest of the batch.
    shape: of one latent. key: identifies the autoencoder.
    """

    def __init__(self, autoencoder: Any, shape: Shape, *, key: str) -> None:
        self.autoencoder, self.shape = autoencoder.eval().requires_grad_(False), shape
        config = autoencoder.config
        halvings = len(config.get("block_out_channels") or [0]) - 1
        factor = 2**halvings
        self.image_shape = (config.get("in_channels", 3), shape[1] * factor, shape[2] * factor)
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.mean, self.std = (_by_channel(config.get(f"latents_{k}")) for k in ("mean", "std"))
        self.cache = TensorCache("latents", key)

    def encode(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """(z - shift) * scale, or by channels, (z - mean) / std * scale."""
        return torch.stack([self._encoded(image) for image in images_NCHW])

    @torch.no_grad()
    def decode(self, clean_NCHW: torch.Tensor) -> torch.Tensor:
        """Decode one by one, since an autoencoder needs much memory."""
        z_NCHW = clean_NCHW / self.scale
        z_NCHW = z_NCHW * self.std + self.mean if self.std is not None else z_NCHW + self.shift
        weight = next(self.autoencoder.parameters())
        images = [to_uint8(self.autoencoder.decode(z[None].to(weight)).sample) for z in z_NCHW]
        return torch.cat(images)

    @torch.no_grad()
    def _encoded(self, image_CHW: torch.Tensor) -> torch.Tensor:
        def compute() -> dict[str, torch.Tensor]:
            weight = next(self.autoencoder.parameters())
            found = self.autoencoder.encode(to_model_range(image_CHW[None]).to(weight))
            z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
            return {"latent": z[0].float().cpu()}

        z_CHW = self.cache.get(content_key(image_CHW), compute)["latent"]
        if self.std is not None:
            return (z_CHW - self.mean[0]) / self.std[0] * self.scale
        return (z_CHW - self.shift) * self.scale


def _by_channel(values: list[float] | None) -> Any:
    return None if values is None else torch.tensor(values).reshape(1, -1, 1, 1)
