"""Exported files as denoisers: called like a diffusers model, run by another runtime.

Shapes: N images, C channels, H W pixels.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from prunedm.architecture import architecture_of
from prunedm.deployment.description import read_description
from prunedm.errors import UserError
from prunedm.folder import EXPORT_FILE, Model, hash_folder, load
from prunedm.model_files.configs import read_network_config
from prunedm.model_files.schedule import find_scheduler
from prunedm.record import read_record
from prunedm.tables import FORMATS


class ExportedDenoiser(nn.Module):
    """What samplers see: `(sample, timestep[, class_labels]) -> (output,)`, float32, on the CPU."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = FrozenDict(config)
        self.class_embedding = nn.Identity() if config.get("num_class_embeds") else None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Raises `UserError` for images of a shape that the file was not made for."""
        assert not return_dict
        due = architecture_of(self).shape(self)
        if tuple(sample.shape[1:]) != due:
            raise UserError(
                f"the exported model takes images of shape {due}, not {tuple(sample.shape[1:])}; "
                "export the model for those"
            )
        times_N = torch.as_tensor(timestep).float().cpu().expand(len(sample))
        inputs = {
            "sample": sample.detach().float().cpu().contiguous().numpy(),
            "timestep": times_N.contiguous().numpy(),
        }
        if self.class_embedding is not None:
            if class_labels is None:
                raise UserError("the exported model wants class labels; none were given")
            inputs["class_labels"] = class_labels.cpu().contiguous().numpy()
        return (torch.from_numpy(self.run(inputs)).to(sample.device),)

    @abstractmethod
    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The output for arrays by the file's input names."""

    @property
    @abstractmethod
    def arithmetic(self) -> str:
        """The runtime, and the type that it computes in on this machine."""


def open_model(source: str | Path, *, scheduler: str | Path | None = None) -> Model:
    """As `folder.load`, and exported folders too.

    Raises `UserError` for formats that prunedm cannot run, and where their packages are missing.
    """
    folder = Path(source).expanduser()
    if not (folder / EXPORT_FILE).is_file():
        return load(source, scheduler=scheduler)
    description = read_description(folder)
    if description.format == "packed":
        return load(source, scheduler=scheduler)
    found = find_scheduler(folder, scheduler)
    kind = FORMATS.get(description.format)
    if kind is None or kind.open is None:
        raise UserError(
            f"{folder} is a {description.format} export, which prunedm does not run; "
            "export --format onnx or openvino to sample from a file"
        )
    kind.require(description.format)
    path, config = folder / description.file, read_network_config(folder)
    denoiser: ExportedDenoiser = kind.open(path, config, precision=description.precision)
    return Model(
        denoiser=denoiser.eval(),
        scheduler=found.scheduler,
        scheduler_file=found.file if scheduler else None,
        scheduler_assumed=found.assumed,
        notes=(found.note,) if found.note else (),
        record=read_record(folder),
        name=str(source),
        hash=hash_folder(folder),
    )
