"""The tokenizer of a language model, and what else lies beside its weights: carried along as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prunedm.errors import UserError, first_line
from prunedm.model_files.companions import link

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                "sentencepiece.bpe.model")  # fmt: skip  # one of them is a tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer's files of a model folder; read when texts are."""

    folder: Path

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]

    @cached_property
    def loaded(self) -> Any:
        """transformers' tokenizer. Raises `UserError` where none lies here, or it is damaged."""
        from transformers import AutoTokenizer

        if not any((self.folder / name).is_file() for name in VOCABULARIES):
            raise UserError(
                f"{self.folder} has no tokenizer ({', '.join(VOCABULARIES[:2])} ...), and texts need "
                "one; copy the files of the model's own beside its weights"
            )
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise whatever they like
            raise UserError(
                f"cannot load the tokenizer of {self.folder}: {first_line(error)[:160]}"
            ) from error

    def __call__(self, text: str) -> Sequence[int]:
        """The tokens of a text, with those that the tokenizer puts around one."""
        ids: list[int] = self.loaded(text, verbose=False)["input_ids"]
        return ids

    def carry(self, folder: Path) -> None:
        """Put its files into another folder."""
        for path in self.files:
            link(path, folder / path.name)
