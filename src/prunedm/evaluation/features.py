"""Feature networks: from uint8 images to one vector per image, for distances between image sets.

Shapes: N images, C channels, H W pixels, D features.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from io import StringIO
from operator import length_hint
from pathlib import Path
from typing import Any, TextIO
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from prunedm.data.images import to_model_range
from prunedm.errors import UserError
from prunedm.evaluation.torchscript import load_torchscript
from prunedm.model_files.weights import read_bin
from prunedm.progress import Progress, Silent

DIGITS_CNN_FILE = "digits_cnn.safetensors"
# The TensorFlow Inception of Heusel et al. 2017 as ported to PyTorch (pytorch-fid and
# torch-fidelity publish the same bytes); a distance under any other weights is not "FID".
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_DAMAGED = (RuntimeError, ValueError, EOFError, KeyError, BadZipFile)


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network, named after the Fréchet distance in it: "FID", "FD (digits-cnn)", ...

    `dim` is D, or None where only the first output shows it (a file).
    """

    name: str
    dim: int | None
    module: nn.Module

    def __call__(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """uint8 NCHW => float32 ND on the module's device.

        Raises `UserError` for images that the network does not take, and for an output that is not ND.
        """
        shape = tuple(images_NCHW.shape)
        if images_NCHW.dtype != torch.uint8 or len(shape) != 4:
            raise UserError(f"{self.name} takes uint8 NCHW images; got {images_NCHW.dtype} {shape}")
        try:
            with torch.no_grad():
                output = self.module(images_NCHW)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:
            raise UserError(
                f"{self.name} cannot take images of shape {shape[1:]} ({_reason(error)}); "
                "choose other --features"
            ) from error
        right = isinstance(output, torch.Tensor) and output.ndim == 2 and len(output) == shape[0]
        if not right or self.dim not in (None, output.shape[1]):
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(
                f"{self.name} must give ({shape[0]}, {self.dim or 'D'}) features for images of shape "
                f"{shape}; got {got}; choose other --features"
            )
        features_ND: torch.Tensor = output.float()
        return features_ND


class DigitsCNN(nn.Module):
    """The embedded classifier of 16x16 handwritten digits; made by `tools/train_digits_cnn.py`."""

    dim = 64
    image_shape = (1, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(1, 32), *_convolution(32, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), *_convolution(64, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, self.dim), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(self.dim, 10)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.features(images_NCHW)

    def features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Penultimate layer, (N, 64), of images in 0..255. Raises `UserError` on other shapes."""
        if images_NCHW.shape[1:] != self.image_shape:
            raise UserError(
                f"digits-cnn takes images of shape {self.image_shape}; "
                f"got {tuple(images_NCHW.shape[1:])}; use --features inception or a TorchScript FILE"
            )
        features_ND: torch.Tensor = self.trunk(to_model_range(images_NCHW))
        return features_ND

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Class scores before the softmax, (N, 10), of images in 0..255."""
        scores: torch.Tensor = self.head(self.features(images_NCHW))
        return scores


class _Inception(nn.Module):
    """torch-fidelity's Inception, pool3 features; grey images are repeated to three channels."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        channels = images_NCHW.shape[1]
        if channels not in (1, 3):
            raise UserError(f"inception takes images of 1 or 3 channels; got {channels}")
        features_ND: torch.Tensor = self.extractor(images_NCHW.expand(-1, 3, -1, -1))[0]
        return features_ND


def load_features(
    name_or_path: str | Path, *, weights: str | Path | None = None, trust: bool = False
) -> FeatureNetwork:
    """The feature network "digits-cnn", "inception", or of a file, on the CPU.

    A file is TorchScript, or safetensors with weights of a digits-cnn. `trust` allows TorchScript that
    may do more than compute. `weights` is a local copy of Inception's, which torch-fidelity otherwise
    downloads or has in its cache.
    Raises `UserError` where a file is missing or damaged, or the download fails.
    """
    name = str(name_or_path)
    if weights is not None and name != "inception":
        raise UserError(f"--inception-weights needs --features inception, not {name!r}; drop one")
    if name == "digits-cnn":
        return FeatureNetwork("FD (digits-cnn)", DigitsCNN.dim, load_digits_cnn())
    if name == "inception":
        return _load_inception(None if weights is None else Path(weights).expanduser())
    return _load_file(Path(name).expanduser(), trust=trust)


def load_digits_cnn() -> DigitsCNN:
    """The embedded classifier, frozen, in float32 on the CPU."""
    return _digits_cnn((resources.files("prunedm") / "assets" / DIGITS_CNN_FILE).read_bytes())


def _digits_cnn(safetensors: bytes) -> DigitsCNN:
    model = DigitsCNN()
    model.load_state_dict(load_safetensors(safetensors))  # copies float16 into float32
    return model.eval().requires_grad_(False)


def extract(
    network: FeatureNetwork,
    batches: Iterable[torch.Tensor],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    total: int | None = None,
) -> torch.Tensor:
    """Features of a stream of uint8 NCHW batches: float32 ND on the CPU.

    Holds one batch of images at a time. `total` is the number of batches, for the progress bar.
    Moves the network to `device`. Raises `UserError` on an empty stream.
    """
    network.module.to(device)
    parts_ND = []
    count = length_hint(batches) if total is None else total
    with (progress or Silent()).task("features", count) as bar:
        for images_NCHW in batches:
            parts_ND.append(network(images_NCHW.to(device)).cpu())
            bar.advance()
    if not parts_ND:
        raise UserError(f"no images to compute {network.name} on; give at least two")
    return torch.cat(parts_ND)


def image_batches(
    images: Sequence[torch.Tensor] | Any, *, size: int = 100
) -> Iterator[torch.Tensor]:
    """An `ImageSet`, NCHW tensor or list of CHW images as uint8 NCHW batches of at most `size`."""
    for start in range(0, len(images), size):
        yield torch.stack([images[k] for k in range(start, min(start + size, len(images)))])


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.GELU()


def _load_inception(weights: Path | None) -> FeatureNetwork:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    if weights is not None:
        _check_weights(weights)
    try:
        with redirect_stderr(_Later(sys.stderr)):
            extractor = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048"],
                feature_extractor_weights_path=weights and str(weights),
            )
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download the Inception weights: no network? ({_reason(error)}); use --features "
            "digits-cnn|FILE, or --inception-weights FILE with a copy of "
            f"{inception.URL_INCEPTION_V3}"
        ) from error
    except _DAMAGED as error:
        raise UserError(
            f"Inception weights {str(weights or 'in the torch hub cache')!r} are damaged or of another "
            f"network ({_reason(error)}); delete the file and fetch {inception.URL_INCEPTION_V3}"
        ) from error
    return FeatureNetwork(_inception_name(weights), 2048, _Inception(extractor).eval())


class _Later(StringIO):
    """Holds the first text back until another follows, so that a failed download leaves no message."""

    def __init__(self, place: TextIO) -> None:
        super().__init__()
        self._place, self._kept, self._waits = place, "", True

    def write(self, text: str) -> int:
        if self._waits:
            self._kept, self._waits = text, False
            return len(text)
        self._kept, kept = "", self._kept
        return self._place.write(kept + text)

    def flush(self) -> None:
        self._place.flush()

    def isatty(self) -> bool:
        return self._place.isatty()


def _check_weights(weights: Path) -> None:
    """Refuse files that hold more than tensors: torch-fidelity unpickles whatever it is given."""
    try:
        read_bin(weights)
    except Exception as error:  # unpickling errors have their own type
        raise UserError(
            f"cannot read Inception weights {str(weights)!r} ({_reason(error)}); give the .pth file "
            "that torch-fidelity or pytorch-fid publishes"
        ) from error


def _inception_name(weights: Path | None) -> str:
    if weights is None or hashlib.sha256(weights.read_bytes()).hexdigest() == INCEPTION_SHA256:
        return "FID"
    return f"FD (inception, {weights.stem})"


def _load_file(path: Path, *, trust: bool) -> FeatureNetwork:
    if not path.is_file():
        raise UserError(
            f"unknown features {str(path)!r}: neither digits-cnn, inception nor a file of TorchScript"
        )
    is_digits_cnn = path.suffix == ".safetensors"
    try:
        module: nn.Module = (
            _digits_cnn(path.read_bytes()) if is_digits_cnn else load_torchscript(path, trust=trust)
        )
    except UserError:
        raise
    except (OSError, SafetensorError, *_DAMAGED) as error:
        why = (
            "does not hold the weights of a digits-cnn ({}); give a TorchScript file for another network"
            if is_digits_cnn
            else "is damaged or not a TorchScript file ({}); save it again with torch.jit.save"
        )
        raise UserError(f"{str(path)!r} {why.format(_reason(error))}") from error
    return FeatureNetwork(f"FD ({path.stem})", None, module.eval())


def _reason(error: Exception) -> str:
    """The last line of an error: TorchScript puts the trace first and the reason last."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
