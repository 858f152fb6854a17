"""Small sound members of every kind of file that prunedm reads, made once by the toolkit itself."""

import os
import shlex
import shutil
import signal
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from tests.faults.server import in_child, prunedm

TUNE = (
    "--dataset {images} --steps 4 --warmup 1 --batch-size 2 --validation-problems 4 "
    "--validate-every 2 --checkpoint-every 1"
)
SCORE = (
    "--dataset {images} --calibration-problems 4 --calibration-batch 2 --time-bins 2 --pictures 0"
)
QUICK = "--dataset {images} --problems 2"
FINETUNE = f"finetune {{masked}} out {TUNE}"
FEATURES = "--features digits-cnn --force --draws 2 --kid-subset 2 --kid-subsets 2"
RECIPE = """\
model: {model}
dataset: {images}
stages: [mask, finetune]
mask: {{mechanism: nm, score: magnitude, pictures: 0, calibration_problems: 4}}
finetune: {{steps: 2, warmup: 1, batch_size: 2, validation_problems: 4, checkpoint_every: 1}}
evaluate: {{depth: quick, problems: 4, latency_repeats: 1}}
"""
UNET = """\
unet:
  sample_size: 16
  in_channels: 1
  out_channels: 1
  block_out_channels: [16, 32]
  norm_num_groups: 4
  layers_per_block: 1
  attention_head_dim: 8
  down_block_types: [DownBlock2D, DownBlock2D]
  up_block_types: [UpBlock2D, UpBlock2D]
"""
SWEEP = """\
recipe: recipe.yaml
grid: {{mask.pattern: [2:4, 1:4]}}
objectives: {{loss: minimize}}
"""
TEXTS = {
    "recipe.yaml": RECIPE,
    "sweep.yaml": SWEEP,
    "unet.yaml": UNET,
    "options.yaml": "problems: 2\ndataset: {images}\n",
}
MADE = {  # by commands, in this order; each is also something that later ones read
    "masked": f"prune {{model}} masked --mechanism nm --score magnitude {SCORE}",
    "packed": f"export {{masked}} packed {QUICK}",
    "onnx": f"export {{masked}} onnx --format onnx {QUICK}",
    "masks.safetensors": "masks extract {masked} masks.safetensors",
    "stats.npz": "stats {images} stats.npz --features digits-cnn --force",
    "set.npz": "sample {model} drawn --count 4 --sampling-steps 1 --format npz",
}


def words(command: str, base: Path) -> list[str]:
    """The words of a command; `{name}` stands for a thing's place."""
    places = {path.stem: str(path) for path in base.iterdir()}
    return [word.format_map(places) for word in shlex.split(command)]


def make(base: Path, but: Collection[str] = ()) -> None:
    """Everything, into `base`, but what takes long and is not wanted."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    _child(_by_hand, base)
    for name, command in MADE.items():
        if name in but:
            continue
        _child(lambda command=command: prunedm(words(command, base)), base)
        if name == "set.npz":
            (base / "drawn" / "samples.npz").rename(base / name)
    places = {"model": base / "model", "images": base / "images"}
    for name, text in TEXTS.items():
        (base / name).write_text(text.format_map(places), encoding="utf-8")
    unfinished = base / "unfinished"
    ended = in_child(lambda: _stop_at_step(3, words(FINETUNE, base)), unfinished)
    assert ended.code == -signal.SIGKILL, ended
    assert (unfinished / "out.partial" / "identity.json").is_file()
    (base / "made").touch()


def _child(work: Callable[[], None], base: Path) -> None:
    ended = in_child(work, base, seconds=120)
    assert ended.code == 0, ended


def _by_hand() -> None:
    """The model, one with classes, images and a table of them, a feature network; in this folder."""
    import datasets
    import torch
    from PIL import Image

    from prunedm.folder import save
    from tests.helpers import tiny_model

    save(tiny_model(sample_size=16), Path("model"))
    save(tiny_model(sample_size=16, num_class_embeds=2), Path("classes"))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    for folder in ("images", "labelled/a", "labelled/b"):
        Path(folder).mkdir(parents=True)
        for k, picture in enumerate(pictures):
            picture.save(Path(folder) / f"{k:02d}.png")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    rows = {"image": pictures, "label": [0, 1] * 6}
    Path("table").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet("table/train.parquet")
    torch.jit.trace(torch.nn.Flatten(), torch.zeros(2, 1, 16, 16)).save("features.pt")


def _stop_at_step(count: int, command: list[str]) -> None:
    """Run a command that is killed when it renames its `count`-th checkpoint or so."""
    left = [count]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and ".writing" in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    import sys

    sys.addaudithook(watch)
    prunedm(command)
