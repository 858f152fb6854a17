"""The speed of compressed models where they are deployed, against the dense one in the same runtimes.

    python benchmarks/deployment.py cifar10-small --dense ../shared/models/cifar10-ddpm-small \\
        --channels runs/channels --hybrid runs/hybrid --dataset ../shared/data/cifar10 \\
        --features ../shared/models/cifar10_features.pt

Exports each model once for ONNX Runtime and OpenVINO (under --work), and measures in one run: a
denoiser call at each batch size in every runtime, all in turns; the loss of the exported files; images
per second from noise to uint8, with diffusers' DDIMPipeline, with the dense model in its fastest
runtime and with the compressed ones; and their FD. A ratio is the median of the turns' ratios, so that
a slow moment of the machine affects both sides. On an NVIDIA GPU, `benchmarks/gpu.py` runs too. At the
end: `benchmarks/results/deployment-NAME.json`, and the section of that name in
`docs/results.md`.
"""

import os
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import (
    ROOT,
    Row,
    draw,
    median_ratio,
    parser_of,
    publish,
    record,
    section,
    table,
    turns,
)
from sampling import pipeline
from torch import nn

from prunedm.architecture import answer
from prunedm.deployment.runtimes import open_model
from prunedm.evaluation.features import extract, image_batches, load_features
from prunedm.evaluation.fid import bootstrap_error, frechet_distance
from prunedm.evaluation.fid import statistics as moments
from prunedm.evaluation.loss import denoising_loss, fixed_batches
from prunedm.evaluation.size import count_macs, count_parameters
from prunedm.evaluation.speed import Call
from prunedm.folder import Model, load
from prunedm.options import DataOptions, ExportOptions
from prunedm.record import read_record
from prunedm.sampling import FastDenoiser
from prunedm.stages import export
from prunedm.stages.inputs import images_for, problems_on

SEED = 0
EAGER, COMPILED = "PyTorch eager, fp32", "PyTorch compiled"
RUNTIMES = {
    "ONNX Runtime, fp32": ("onnx", "fp32"),
    "ONNX Runtime, int8": ("onnx", "int8"),
    "OpenVINO, fp32": ("openvino", "fp32"),
    "OpenVINO, bf16": ("openvino", "bf16"),
    "OpenVINO, int8": ("openvino", "int8"),
}
DEFAULT = "OpenVINO, bf16"  # `prunedm export --format openvino`
LOSS_PROBLEMS = 1000
WARMUP = 2  # turns, which also compile


@dataclass(frozen=True)
class Deployed:
    """A model in a runtime."""

    model: str
    runtime: str
    denoiser: nn.Module
    folder: Path | None = None  # of the export

    @property
    def key(self) -> str:
        return f"{self.model} / {self.runtime}"


def deployed(models: Mapping[str, Model], arguments: Namespace) -> list[Deployed]:
    """Every model in every runtime."""
    found = []
    for name, model in models.items():
        compiled = FastDenoiser(model.denoiser, calls=0, say=print, compiling="on")
        found += [Deployed(name, EAGER, model.denoiser), Deployed(name, COMPILED, compiled)]
        for runtime, (format, precision) in RUNTIMES.items():
            folder = Path(arguments.work) / f"{name}-{format}-{precision}"
            options = ExportOptions(
                format=format,
                precision=precision,
                dataset=arguments.dataset,
                seed=SEED,
                samples=0,
            )
            export(model.name, folder, options)
            found.append(Deployed(name, runtime, open_model(folder).denoiser, folder))
    return found


def call_of(denoiser: nn.Module, shape: tuple[int, int, int], batch: int) -> Call:
    x_NCHW = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(SEED))
    inputs = {"sample": x_NCHW, "timestep": torch.full((batch,), 500)}

    def call() -> object:
        with torch.inference_mode():
            return answer(denoiser, inputs)

    return call


def latencies(rows: list[Deployed], shape: Any, arguments: Namespace) -> Row:
    """Milliseconds per call and the ratio to the dense model in eager float32, by batch size."""
    table: Row = {row.key: {} for row in rows}
    for batch in arguments.batches:
        calls = {row.key: call_of(row.denoiser, shape, batch) for row in rows}
        seconds = turns(calls, arguments.repeats, warmup=WARMUP)
        base = seconds[f"dense / {EAGER}"]
        for key, taken in seconds.items():
            table[key][str(batch)] = {
                "ms": 1000 * statistics.median(taken),
                "ratio": median_ratio(base, taken),
                "seconds": taken,
            }
        print(f"batch {batch} timed", flush=True)
    return table


def images_per_second(
    models: Mapping[str, Model], rows: list[Deployed], arguments: Namespace
) -> Row:
    """From noise to images: diffusers' pipeline against each of `rows`."""
    dense, batch, steps = models["dense"], arguments.batches[-1], arguments.steps
    baseline = pipeline(dense, batch, torch.device("cpu"))
    draws: dict[str, Call] = {"diffusers DDIMPipeline": lambda: baseline(batch, steps)}
    for row in rows:
        draws[row.key] = partial(
            draw, dense, row.denoiser, count=batch, steps=steps, seed=SEED, batch_size=batch
        )
    seconds = turns(draws, arguments.turns, warmup=WARMUP)
    base = seconds["diffusers DDIMPipeline"]
    return {
        key: {
            "images_s": batch / statistics.median(taken),
            "ratio": median_ratio(base, taken),
            "seconds": taken,
        }
        for key, taken in seconds.items()
    }


def qualities(models: Mapping[str, Model], rows: list[Deployed], arguments: Namespace) -> Row:
    """Loss of every row but the compiled ones; FD of the baselines and of the deployed files."""
    data = DataOptions(dataset=arguments.dataset, seed=SEED)
    reference = images_for(models["dense"], data, "test")
    problems = fixed_batches(problems_on(reference, models["dense"], SEED), LOSS_PROBLEMS)
    network = load_features(arguments.features)
    real = moments(extract(network, image_batches(reference)), features=network.name)
    found: Row = {}
    for row in rows:
        if row.runtime == COMPILED:
            continue
        loss = denoising_loss(row.denoiser, problems)
        found[row.key] = {"loss": loss.mean, "loss_se": loss.standard_error}
        if row.key in (f"dense / {EAGER}", f"channels / {EAGER}") or row.runtime in (
            DEFAULT,
            "OpenVINO, int8",
        ):
            images = draw(
                models[row.model],
                row.denoiser,
                count=arguments.samples,
                steps=arguments.steps,
                seed=SEED,
                batch_size=64,
            )
            own_ND = extract(network, image_batches(images))
            own = moments(own_ND, features=network.name)
            found[row.key] |= {
                "fd": frechet_distance(own, real),
                "fd_se": bootstrap_error(own_ND, real, seed=SEED),
            }
        print(row.key, found[row.key], flush=True)
    return {"features": network.name, "rows": found}


def sizes(models: Mapping[str, Model], arguments: Namespace) -> Row:
    """Parameters, MACs, and the packed file's bytes against the dense model in float16."""
    found = {}
    dense = 2 * count_parameters(models["dense"].denoiser)
    for name, model in models.items():
        folder = Path(arguments.work) / f"{name}-packed"
        export(model.name, folder, ExportOptions(format="packed", seed=SEED))
        record = read_record(folder)
        assert record is not None
        packed = record.figures["bytes"]
        found[name] = {
            "parameters": count_parameters(model.denoiser),
            "macs": count_macs(model.denoiser, model.example()),
            "packed_bytes": packed,
            "packed_share": packed / dense,
            "pattern": model.masks.pattern_text if model.masks else "",
        }
    return found


def measure(arguments: Namespace) -> Row:
    folders = {
        "dense": arguments.dense,
        "channels": arguments.channels,
        "hybrid": arguments.hybrid,
    }
    models = {name: load(folder) for name, folder in folders.items() if folder}
    rows = deployed(models, arguments)
    shape = models["dense"].sample_shape
    latency = latencies(rows, shape, arguments)
    largest = str(arguments.batches[-1])
    fastest = min(
        (row for row in rows if row.model == "dense"),
        key=lambda row: latency[row.key][largest]["ms"],
    )
    compared = [fastest]
    compared += [r for r in rows if r.model != "dense" and r.runtime in (DEFAULT, "OpenVINO, int8")]
    sampling = images_per_second(models, compared, arguments)
    best = sampling[fastest.key]["seconds"]
    for found in sampling.values():
        found["ratio_to_dense_best"] = median_ratio(best, found["seconds"])
    return {
        "sizes": sizes(models, arguments),
        "latency": latency,
        "dense_best": fastest.key,
        "sampling": sampling,
        "quality": qualities(models, rows, arguments),
    }


def markdown(result: Row) -> str:
    """The section of `docs/results.md`."""
    batches = list(next(iter(result["latency"].values())))
    sizes_rows = [
        {
            "model": name,
            "parameters": f"{s['parameters'] / 1e6:.2f}M",
            "MACs": f"{s['macs'] / 1e6:.0f}M",
            "masks": s["pattern"] or "–",
            "packed": f"{s['packed_bytes'] / 1e6:.2f} MB",
            "of dense float16": f"{100 * s['packed_share']:.1f} %",
        }
        for name, s in result["sizes"].items()
    ]
    rows = []
    for key, by_batch in result["latency"].items():
        model, _, runtime = key.partition(" / ")
        own = result["quality"]["rows"].get(key, {})
        times = {
            f"batch {b}, ms": f"{by_batch[b]['ms']:.1f} ({by_batch[b]['ratio']:.1f}x)"
            for b in batches
        }
        quality = {
            "loss": f"{own['loss']:.4f}" if "loss" in own else "–",
            "FD": f"{own['fd']:.1f} ± {own['fd_se']:.1f}" if "fd" in own else "–",
        }
        rows.append({"model": model, "runtime": runtime} | times | quality)
    sampled = [
        {
            "": key.replace(" / ", ", "),
            "images/s": f"{s['images_s']:.2f}",
            "to diffusers": f"{s['ratio']:.1f}x",
            "to the dense model at its best": f"{s['ratio_to_dense_best']:.2f}x",
        }
        for key, s in result["sampling"].items()
    ]
    return section(
        result,
        f"{result['device']}. Medians of {result['repeats']} calls in turns; in brackets the "
        "ratio to the dense model in eager float32. Loss on "
        f"{LOSS_PROBLEMS} held-out problems; {result['quality']['features']} of "
        f"{result['samples']} DDIM-{result['steps']} images against the held-out ones.",
        table(sizes_rows, left=(0, 3)),
        table(rows, left=(0, 1)),
        f"From noise to images, batch {batches[-1]}, DDIM-{result['steps']}, medians of "
        f"{result['turns']} turns:",
        table(sampled),
    )


def main() -> None:
    parser = parser_of(
        __doc__,
        {
            "dense": "digits",
            "hybrid": ("", "the same with N:M masks, recovered"),
            "dataset": "digits",
            "features": "digits-cnn",
            "work": ("runs/deployment", "folder of the exports"),
            "batches": [1, 4, 16],
            "repeats": (15, "calls in turns"),
            "turns": (5, "of sampling"),
            "steps": 50,
            "samples": (1024, "behind FD"),
        },
    )
    parser.add_argument("--channels", required=True, help="a channel-pruned, recovered folder")
    arguments = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch._dynamo.config.recompile_limit = 64  # every model and batch size stays compiled
    told = {key: vars(arguments)[key] for key in ("repeats", "turns", "steps", "samples")}
    result = record(f"deployment-{arguments.name}", told | measure(arguments))
    publish(result, markdown(result))
    if torch.cuda.is_available():
        models = [arguments.dense, arguments.channels, *filter(None, [arguments.hybrid])]
        batches = ["--batch", *map(str, arguments.batches)]
        chosen = [part for model in models for part in ("--model", model)]
        script = str(ROOT / "benchmarks" / "gpu.py")
        subprocess.run([sys.executable, script, *batches, *chosen], check=True)


if __name__ == "__main__":
    main()
