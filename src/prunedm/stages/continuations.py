"""What `sample` makes of a language model: continuations of prompts, in samples.jsonl."""

import json
from pathlib import Path
from typing import Any

from prunedm.errors import UserError
from prunedm.folder import Model
from prunedm.options import SampleOptions
from prunedm.progress import Progress
from prunedm.reading import read_text
from prunedm.record import Source
from prunedm.sampling.texts import continuations
from prunedm.stages.frame import Plan
from prunedm.stages.inputs import device_for, file_source, model_sources

FILE = "samples.jsonl"  # {"prompt": ..., "text": ...} a line


def continue_prompts(model: Model, options: SampleOptions, progress: Progress) -> Plan:
    """Raises `UserError` where no prompts are given, or one leaves no room behind it."""
    if not options.prompts:
        raise UserError(
            f"{model.name} is a language model; give --prompts, a text file with a prompt a line"
        )
    assert model.tokenizer is not None
    path, tokenizer = Path(options.prompts), model.tokenizer.loaded
    prompts = [line for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one a line")
    most = getattr(model.denoiser.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, start=1):
        length = len(model.tokenizer(prompt))
        if most is not None and length + options.tokens > most:
            raise UserError(
                f"{path}, prompt {number}: {length} tokens and {options.tokens} more are over the "
                f"{most} that {model.name} knows; give fewer --tokens"
            )
    inputs: dict[str, Source] = model_sources(model) | {"prompts": file_source(path)}

    def make(folder: Path) -> dict[str, Any]:
        network = model.denoiser.to(device_for(options.device))
        texts = continuations(
            network, tokenizer, prompts,
            tokens=options.tokens, temperature=options.temperature, seed=options.seed,
        )  # fmt: skip
        task = progress.task("continuations", len(prompts))
        with (folder / FILE).open("w", encoding="utf-8") as file, task as bar:
            for prompt, text in zip(prompts, texts, strict=True):
                line = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
                file.write(line + "\n")
                bar.advance()
        network.cpu()
        return {"texts": len(prompts)}

    return Plan(options=options, inputs=inputs, parent=model.record, make=make)
