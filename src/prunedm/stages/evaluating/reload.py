"""The reload check: a model folder, loaded again, gives the same output to the bit."""

from pathlib import Path
from typing import Any

import torch

from prunedm.architecture import answer, like_weights
from prunedm.errors import UserError
from prunedm.folder import PACKED_FILE, Model, load, model_folder
from prunedm.model_files.weights import weight_files

DIFFERS = "gives another output"


@torch.no_grad()
def check_reload(model: Model) -> bool:
    """True; raises `UserError` where the outputs on two fixed inputs differ.

    Networks that are not narrowed are loaded by diffusers alone, without any code of prunedm.
    """
    folder, _ = model_folder(model.name)
    place = folder / model.component if (folder / model.component).is_dir() else folder
    again = _load_again(place, model)
    before, now = (
        answer(denoiser, like_weights(denoiser, model.example(2))).float()  # one early, one late
        for denoiser in (model.denoiser, again)
    )
    if not torch.allclose(before, now, rtol=0, atol=0, equal_nan=True):
        gap = float((before - now).abs().max())
        raise UserError(f"{model.name} loaded again {DIFFERS} (by up to {gap:.3g}); save it again")
    return True


def _load_again(place: Path, model: Model) -> torch.nn.Module:
    if (place / PACKED_FILE).exists():
        packed: torch.nn.Module = load(place).denoiser
        return packed
    _, variant = weight_files(place)
    cls: Any = type(model.denoiser)
    name = "dtype" if model.architecture.text else "torch_dtype"  # of transformers, of diffusers
    kind = {name: next(model.denoiser.parameters()).dtype}  # as in memory, not as in the file
    denoiser: torch.nn.Module
    denoiser, loading = cls.from_pretrained(
        place, local_files_only=True, variant=variant or None, output_loading_info=True, **kind
    )
    if loading["missing_keys"]:  # diffusers does not know wrapped weights by name
        denoiser = load(place).denoiser
    for parameter in denoiser.parameters():
        # aligned in memory like the model's, not as in the file
        parameter.data = parameter.data.clone()
    return denoiser.eval()
