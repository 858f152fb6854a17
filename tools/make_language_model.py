"""A small Llama that has read Python: `python tools/make_language_model.py OUT`, two CPU hours.

Its text is the standard library's sources, which every Python brings (PSF licence): no network is
needed. OUT gets text/ (train.txt, and test.txt of every 20th file), random/ (where training begins)
and dense/ (the trained model with its tokenizer). An interrupted run continues.
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prunedm
from prunedm.console import Terminal
from prunedm.options import FinetuneOptions

END = "<|endoftext|>"
SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
VOCABULARY = 4096
LENGTH = 256


def write_text(folder: Path) -> None:
    """The standard library's sources, one after the other; every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts)]
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in files]
    folder.mkdir(parents=True)
    for name, chosen in (("train", lambda k: k % 20 != 19), ("test", lambda k: k % 20 == 19)):
        parts = [text.strip() for k, text in enumerate(texts) if chosen(k) and text.strip()]
        (folder / f"{name}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def write_random(folder: Path, text: Path) -> None:
    """A byte-level BPE of the training text, and a Llama of 5.5M random weights."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text / "train.txt")], VOCABULARY, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 256 tokens")
    parser.add_argument("--mixed-precision", default="no", help="bf16 where the processor has it")
    given = parser.parse_args()
    text = given.out / "text"
    if not text.exists():
        write_text(text)
    if not (given.out / "random").exists():
        write_random(given.out / "random", text)
    options = FinetuneOptions(
        dataset=str(text),
        teacher="none",
        steps=given.steps,
        batch_size=given.batch_size,
        mixed_precision=given.mixed_precision,
        lr=2e-3,
        warmup=100,
        weight_decay=0.05,
        beta2=0.98,
        ema_decay=0.99,
        validation_problems=64,
        validate_every=200,
        checkpoint_every=100,
    )
    record, _ = prunedm.finetune(
        given.out / "random", given.out / "dense", options, progress=Terminal()
    )
    print(f"held-out loss {record.figures['loss']:.4f} nats a token", file=sys.stderr)


if __name__ == "__main__":
    main()
