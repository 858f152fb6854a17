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

from prunedm.architecture import answer, example
from prunedm.errors import UserError, first_line, shortened
from prunedm.model_files.configs import class_name, network_class
from prunedm.model_files.weights import LARGE, Stored, Types, check_finite, weight_files
from prunedm.networks.narrowed import Narrowed

TOKENS = 8  # that a narrowed network is tried with


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
            ignore_mismatched_sizes=True,  # they are refused below, in one line
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
            # of a tensor in another size: its name, its shape in the file and in the model
            first = shortened(
                min(" ".join(map(str, n)) if kind == "mismatched" else n for n in names)
            )
            raise UserError(
                f"weights in {folder} are not those of its config.json: {len(names)} {kind} tensors, "
                f"first {first}"
            )
    if isinstance(network, Narrowed):
        _check_runs(network, folder)
    for name, tensor in network.state_dict(keep_vars=True).items():
        check_finite(tensor, name, folder)
        tensor.data = tensor.data.clone()  # of its own: nothing depends on the file from here on
    return network.eval(), Types(stored.dtype), variant


@torch.no_grad()
def _check_runs(network: Any, folder: Path) -> None:
    """Raise `UserError` where the widths and counts of a narrowed network do not fit each other."""
    try:
        answer(network.eval(), {n: x[:, :TOKENS] for n, x in example(network).items()})
    except Exception as error:  # torch and transformers raise many types
        raise UserError(
            f"{folder}: the widths in its config.json do not fit each other: "
            f"{first_line(error)[:160]}"
        ) from error
