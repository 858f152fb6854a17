"""Small language models of random weights, with a tokenizer of bytes, and texts to read."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = ["prune", "the", "model", "and", "keep", "what", "it", "makes", "weights", "of", "two"]


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, 256 of them, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


LLAMA: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "bos_token_id": 256,
}


def network(cls: str = "LlamaForCausalLM", **config: Any) -> Any:
    """A network of transformers, of the same weights at every call."""
    torch.manual_seed(0)
    made = getattr(transformers, cls)
    return made(made.config_class(**LLAMA | config)).eval()


@cache
def language_model(cls: str = "LlamaForCausalLM", **config: Any) -> Path:
    """A model folder with its tokenizer; tests only read it."""
    folder = Path(mkdtemp(prefix="prunedm-tests-")) / "lm"
    network(cls, **config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def text(count: int, seed: int = 0) -> str:
    """`count` words."""
    picks = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[k] for k in picks)


@cache
def text_file() -> Path:
    path = Path(mkdtemp(prefix="prunedm-tests-")) / "text.txt"
    path.write_text(text(2000), encoding="utf-8")
    return path
