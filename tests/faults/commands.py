"""The commands that inputs are tried with: the cheapest verb that reads a file, and its options."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prunedm.options import (
    AnalyzeOptions,
    EvaluateOptions,
    ExportOptions,
    FidOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    Options,
    PruneOptions,
    SampleOptions,
    StatsOptions,
    TrainOptions,
)
from prunedm.recipe import Recipe
from tests.faults.things import FEATURES, QUICK, SCORE, TUNE

DRAW = "--count 1 --sampling-steps 1"
FID = f"fid {{}} {{{{set}}}} {FEATURES}"


@dataclass(frozen=True)
class Reader:
    """A file among the sound things, the verb that reads its copy, and kinds of damages."""

    name: str
    file: str
    command: str
    damages: str
    copies: tuple[str, ...] = ()


READERS = [
    Reader("config.json", "model/unet/config.json", f"loss model out {QUICK}", "any json config"),
    Reader("config.json of classes", "classes/unet/config.json",
           f"loss classes out {QUICK.replace('images', 'table')}", "any"),
    Reader("scheduler_config.json", "model/scheduler/scheduler_config.json",
           f"loss model out {QUICK}", "any json config"),
    Reader("scheduler_config.json, sampled", "model/scheduler/scheduler_config.json",
           f"sample model out {DRAW}", "keys"),
    Reader("model_index.json", "model/model_index.json", f"loss model out {QUICK}", "any json config"),
    Reader("weights", "model/unet/diffusion_pytorch_model.safetensors", f"loss model out {QUICK}",
           "any torn safetensors tensors bin"),
    Reader("masks of a model", "masked/masks.safetensors", f"loss masked out {QUICK}",
           "any tensors"),
    Reader("a masks file", "masks.safetensors", "masks show masks.safetensors",
           "any torn safetensors tensors metadata"),
    Reader("masks put on", "masks.safetensors",
           f"loss {{model}} out {QUICK} --masks masks.safetensors", "any torn safetensors"),
    Reader("packed.safetensors", "packed/packed.safetensors", f"loss packed out {QUICK}",
           "any torn safetensors tensors metadata"),
    Reader("config.json, packed", "packed/config.json", f"loss packed out {QUICK}", "any json"),
    Reader("export.json", "onnx/export.json", f"sample onnx out {DRAW}", "any json keys"),
    Reader("export.json, packed", "packed/export.json", f"loss packed out {QUICK}", "any json"),
    Reader("config.json, exported", "onnx/config.json", f"sample onnx out {DRAW}", "any json keys"),
    Reader("model.onnx", "onnx/model.onnx", f"sample onnx out {DRAW}", "any torn"),
    Reader("record.json of the input", "masked/record.json", f"loss masked out {QUICK}",
           "any json keys"),
    Reader("record.json of the output", "masked/record.json",
           f"prune {{model}} masked --mechanism nm --score magnitude {SCORE}", "any json keys"),
    *(
        Reader(f"{name} of an unfinished run", f"unfinished/out.partial/{file}",
               f"finetune {{masked}} unfinished/out {TUNE}", kinds)
        for name, file, kinds in (
            ("identity.json", "identity.json", "any json keys"),
            ("clock.json", "clock.json", "any json keys"),
            ("checkpoint", "resume/checkpoint.safetensors", "any torn safetensors tensors metadata"),
        )
    ),
    Reader("image, trained on", "images/03.png", "loss {model} out --dataset images --problems 12 "
           "--split train", "any torn image"),
    Reader("image, measured", "images/03.png", FID.format("images"), "any torn image"),
    Reader("class folder", "labelled/a/03.png", "loss {classes} out --dataset labelled --problems 2",
           "any image"),
    Reader("set.npz", "set.npz", FID.format("set.npz"), "any torn npz"),
    Reader("stats.npz", "stats.npz", f"fid stats.npz {{stats}} {FEATURES}", "any torn npz"),
    Reader("parquet", "table/train.parquet", "loss {model} out --dataset table --problems 2",
           "any torn parquet"),
    Reader("feature file", "features.pt", "fid {images} {set} --features features.pt --force",
           "any torn"),
    Reader("recipe", "recipe.yaml", "run recipe.yaml out --dry-run", "any yaml"),
    Reader("recipe, its values", "recipe.yaml", "run recipe.yaml out --dry-run", "recipe"),
    Reader("sweep", "sweep.yaml", "sweep sweep.yaml out --dry-run", "any yaml sweep",
           copies=("recipe.yaml",)),
    Reader("recipe of a sweep", "recipe.yaml", "sweep sweep.yaml out --dry-run", "any yaml",
           copies=("sweep.yaml",)),
    Reader("options.yaml", "options.yaml", "loss {model} out --config options.yaml", "any yaml"),
    Reader("train.yaml", "unet.yaml", f"train out {TUNE} --config unet.yaml", "any yaml unet"),
]  # fmt: skip

# verb -> its options, and a quick command that wrong values are given to
BASES: dict[str, tuple[type[Options], str]] = {
    "loss": (LossOptions, f"loss {{model}} out {QUICK}"),
    "sample": (SampleOptions, f"sample {{model}} out {DRAW}"),
    "prune": (PruneOptions, f"prune {{model}} out --mechanism nm --score magnitude {SCORE}"),
    "finetune": (FinetuneOptions, f"finetune {{masked}} out {TUNE}"),
    "train": (TrainOptions, f"train out {TUNE} --config {{unet}}"),
    "learn": (LearnOptions, f"learn {{model}} out {TUNE} --dataset-size 8"),
    "analyze": (AnalyzeOptions, f"analyze {{model}} out {SCORE.removesuffix(' --pictures 0')}"),
    "evaluate": (EvaluateOptions, f"evaluate {{model}} out {QUICK} --depth quick"),
    "export": (ExportOptions, f"export {{masked}} out {QUICK}"),
    "stats": (StatsOptions, "stats {images} out.npz --features digits-cnn --force"),
    "fid": (FidOptions, f"fid {{images}} {{set}} {FEATURES}"),
    "run": (Recipe, "run {recipe} out --dry-run"),
}


def _nothing(work: Path) -> None:
    pass


def _link(work: Path) -> None:
    (work / "real").mkdir()
    (work / "link").symlink_to("real")


def _dangling(work: Path) -> None:
    (work / "dangling").symlink_to("nowhere")


def _file(work: Path) -> None:
    (work / "file").write_text("precious\n", encoding="utf-8")


def _folder(work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("precious\n", encoding="utf-8")


def _pipe(work: Path) -> None:
    os.mkfifo(work / "pipe")


WRITERS = ("loss", "finetune", "export", "stats")  # verbs that output paths are tried with
# output path -> what is there before, and whether it must be refused
OUTS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "": (_nothing, True),
    "/": (_nothing, True),
    ".": (_folder, True),
    "..": (_nothing, True),
    "~": (_nothing, True),
    "~nobody-here/x": (_nothing, False),
    "nul\0nul": (_nothing, True),
    "x" * 300: (_nothing, True),
    "d/" * 3000 + "x": (_nothing, True),
    "surrogate\udcff": (_nothing, False),
    "lines\nof\ntext": (_nothing, False),
    "link": (_link, False),
    "dangling": (_dangling, False),
    "file": (_file, True),
    "file/x": (_file, True),
    "mine": (_folder, True),
    "pipe": (_pipe, True),
    "/dev/null": (_nothing, True),
    "/proc/x": (_nothing, True),
    "/proc/x/y": (_nothing, True),
}

# what is typed wrong -> what the answer shall say; the folder has an imgs.zip, train.npz, model.pt,
# notes.txt, an empty folder, a pipe and a link to /dev/zero
TYPED = {
    "los {model} out": "los",
    "loss": "",
    "loss {model}": "",
    "loss {model} out again": "again",
    "loss {model} out --problem 2": "problem",
    "loss {model} out --problems": "problems",
    "masks extrakt {model} m.safetensors": "extrakt",
    "masks extract {model} m.safetensors": "no masks",
    "masks extract {masked} m.safetensors --pattern 3:2": "3:2",
    "masks extract {masked} m.safetensors --targets nothing": "nothing",
    "masks extract {masked} m.safetensors --targets (": "",
    "masks extract {masked} m.pt": "safetensors",
    "masks show nowhere": "nowhere",
    "masks show notes.txt": "notes.txt",
    "sweep {sweep}": "",
    "sweep {sweep} out --workers -1": "-1",
    "sweep {sweep} out --threads -1": "-1",
    "sweep {sweep} out --workers 100000": "100000",
    "sweep {sweep} out --only nothing --dry-run": "",
    "sweep show out": "",
    "run {recipe} {sweep} out": "",
    "run {sweep} out": "",
    "run {recipe} out --set finetune.stepps=4": "stepps",
    "run {recipe} out --set nonsense": "nonsense",
    "run {recipe} out --set a=[": "",
    "train out --preset digts": "digts",
    "learn {model} out --preset bst": "bst",
    "compare {model} {model} --out out": "same|twice",
    "compare --out out": "",
    "fid {images} nowhere": "nowhere",
    "fid empty {images}": "empty",
    "fid notes.txt {images}": "notes.txt",
    "fid pipe {images}": "pipe",
    "fid zero {images}": "zero",
    "fid imgs.zip {images}": "imgs.zip",
    "fid {images} {stats} --features inception --inception-weights notes.txt": "notes.txt",
    f"fid {{images}} {{set}} {FEATURES} --json out.txt": "out.txt",
    "stats {images} out.txt --features digits-cnn": "out.txt",
    "stats {stats} out.npz --features digits-cnn": "statistics",
    "loss digts out": "digts",
    "loss owner/nothing out": "owner/nothing",
    "loss model.pt out": "model.pt",
    "loss imgs.zip out": "imgs.zip",
    "loss empty out": "empty",
    "loss pipe out": "pipe",
    "loss zero out": "zero",
    "loss {images} out": "images",
    "loss {onnx} out": "",
    "loss {model} out --dataset cifar11": "cifar11",
    "loss {model} out --dataset owner/nothing": "owner/nothing",
    "loss {model} out --dataset train.npz": "train.npz",
    "loss {model} out --dataset imgs.zip": "imgs.zip",
    "loss {model} out --dataset empty": "empty",
    "loss {model} out --dataset pipe": "pipe",
    "loss {model} out --dataset zero": "zero",
    "loss {classes} out --dataset {images}": "label",
    "loss {model} out --config nowhere.yaml": "nowhere",
    "loss {model} out --config zero": "zero",
    "loss {model} out --config pipe": "pipe",
    "loss {model} out --masks pipe": "pipe",
    "loss {model} out --masks notes.txt": "notes.txt",
    "finetune {model} out --teacher notes.txt": "notes.txt",
    "sample {model} out --label 3 --sampling-steps 1 --count 1": "label",
    "sample {classes} out --label 30 --sampling-steps 1 --count 1": "30",
    "sample {model} out --sampler nothing": "nothing",
    "sample pipe out": "pipe",
    "export {model} out --format onnx --precision bf16": "bf16",
    "schema nothing": "",
    "monitor --stop nothing": "",
}
