"""A language model's folder: transformers reads it, and what it read is checked.

transformers keeps some weights in memory otherwise than in files (fused experts, names of old versions),
so its own reader maps them; nothing in the folder is executed, and only safetensors or plain tensors are
read.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from prunedm.errors import UserError, first_line
from prunedm.model_files.configs import class_name, network_class
from prunedm.model_files.weights import LARGE, Stored, Types, check_finite, weight_files


def load_language_model(config: Mapping[str, Any], folder: Path) -> tuple[Any, Types, str]:
    """As `weights.load_network`. Raises `UserError` where files and config disagree, or are damaged."""
    cls = network_class(class_name(config))
    files, variant = weight_files(folder)
    try:
        with ExitStack() as open_files:
            stored = Stored(files, open_files)
        large = stored.total >= LARGE
        network, found = cls.from_pretrained(
            folder,
            config=cls.config_class.from_dict(dict(config)),
            dtype=stored.dtype if large else torch.float32,
            variant=variant or None,
            use_safetensors=files[0].suffix == ".safetensors",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise whatever they like
        raise UserError(
            f"cannot load weights in {folder}: {first_line(error)[:160]}; download it again?"
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        if names := found[f"{kind}_keys"]:
            first = str(min(map(str, names)))[:100]
            raise UserError(
                f"weights in {folder} are not those of its config.json: {len(names)} {kind} tensors, "
                f"first {first}"
            )
    for name, tensor in network.state_dict(keep_vars=True).items():
        check_finite(tensor, name, folder)
        tensor.data = tensor.data.clone()  # of its own: nothing depends on the file from here on
    return network.eval(), Types(stored.dtype), variant
