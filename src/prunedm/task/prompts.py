"""Prompts encoded by the text encoders of the network's own pipeline, each text once.

The encoders are loaded for the first text that is not in the cache.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunedm.architecture import Inputs
from prunedm.errors import UserError, first_line
from prunedm.model_files.configs import library_class
from prunedm.tensor_cache import TensorCache, text_key

Encode = Callable[[Any, str], Inputs]  # (pipeline, text) => one row each


class PromptEncoder:
    """Texts => a network's inputs, N rows.

    folder: of the pipeline. leave_out: components that encoding a text does not need. key: identifies
    the encoders.
    """

    def __init__(
        self, folder: Path, pipeline: str, encode: Encode, leave_out: Sequence[str], *, key: str
    ) -> None:
        self.folder, self.pipeline, self.encode = folder, pipeline, encode
        self.leave_out = leave_out
        self.cache = TensorCache("prompts", key)
        self._pipeline: Any = None
        self._known: dict[str, Inputs] = {}  # in this process

    def __call__(self, texts: Sequence[str]) -> Inputs:
        """Raises `UserError` where the encoders are damaged or missing."""
        rows = [self._row(text) for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, text: str) -> Inputs:
        if text not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[text] = self.cache.get(text_key(text), lambda: self._encoded(text))
        return self._known[text]

    @torch.no_grad()
    def _encoded(self, text: str) -> dict[str, torch.Tensor]:
        self._pipeline = self._pipeline or self._load()
        return {name: row.float() for name, row in self.encode(self._pipeline, text).items()}

    def _load(self) -> Any:
        cls = library_class(self.pipeline, "diffusers", "DiffusionPipeline")
        if cls is None:
            raise UserError(f"{self.folder}: {self.pipeline} is not a pipeline of diffusers")
        nothing = dict.fromkeys(self.leave_out)
        try:
            return cls.from_pretrained(self.folder, use_safetensors=True, **nothing)
        except Exception as error:  # diffusers and transformers raise many types
            raise UserError(
                f"cannot load the text encoders in {self.folder}: {first_line(error)[:160]}"
            ) from error


_MOST_KNOWN = 1024
