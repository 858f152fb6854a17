"""Images per second: diffusers' own DDIMPipeline (float32, eager) against ours, in one run.

    python benchmarks/sampling.py digits
    python benchmarks/sampling.py cifar10-small --model ../shared/models/cifar10-ddpm-small

All draw the same images from the same noise and timesteps, on one machine and in turns, so that other
load affects all alike. *Exact* is what `prunedm sample` does; *fast* is `--speed fast`, with and without
compiling. PSNR is against exact, on uint8. Compile time is reported separately from the rates:
`--speed fast` compiles only where the run is long enough. At the end:
`benchmarks/results/sampling-NAME.json`, and the section of that name in `docs/results.md`.
"""

import math
import os
import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from bench import Row, draw, median_ratio, parser_of, publish, record, section, table, turns
from diffusers import DDIMPipeline, DDIMScheduler

from prunedm.folder import Model, load
from prunedm.randomness import generator_for
from prunedm.sampling import FastDenoiser
from prunedm.sampling.fast import SAVED_SHARE, SECONDS_PER_LAYER, count_layers
from prunedm.stages.inputs import device_for

SEED = 0
BASELINE, EXACT = "diffusers DDIMPipeline", "exact"
FAST, EAGER = "fast, compiled", "fast, not compiled"

Draw = Callable[[int, int], torch.Tensor]  # (count, steps) -> uint8 NCHW


def pipeline(model: Model, batch_size: int, device: torch.device) -> Draw:
    """diffusers' loop over a copy of the model, at our timesteps and with our noise."""
    scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="trailing")
    made = DDIMPipeline(load(model.name).denoiser.eval(), scheduler).to(device)
    made.set_progress_bar_config(disable=True)

    def drawn(count: int, steps: int) -> torch.Tensor:
        batches = []
        for start in range(0, count, batch_size):
            generators = [
                generator_for(SEED, "sample", i) for i in range(start, start + batch_size)
            ]
            images_NHWC = made(
                batch_size=batch_size,
                generator=generators,
                num_inference_steps=steps,
                output_type="np",
            ).images
            batches.append(torch.tensor(images_NHWC).permute(0, 3, 1, 2))
        return (torch.cat(batches) * 255).round().to(torch.uint8)

    return drawn


def ours(model: Model, denoiser: torch.nn.Module, batch_size: int, device: torch.device) -> Draw:
    """What the stage does, without its files."""
    return lambda count, steps: draw(
        model, denoiser, count=count, steps=steps, seed=SEED, batch_size=batch_size, device=device
    )


def psnr(images: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None]:
    """Decibels: of all pixels together, the median image's, and the worst image's; None is equal."""
    error_N = (images.double() - reference.double()).square().flatten(1).mean(1)

    def decibels(error: float) -> float | None:
        return 10 * math.log10(255**2 / error) if error else None

    return {
        "pooled": decibels(float(error_N.mean())),
        "median": decibels(float(error_N.median())),
        "worst": decibels(float(error_N.max())),
    }


def measure(arguments: Namespace) -> Row:
    """Rows of all four ways, timed in turns."""
    device = device_for(arguments.device)
    model = load(arguments.model)
    model.denoiser.eval().to(device)
    size = arguments.batch_size
    compiled, eager = (
        FastDenoiser(model.denoiser, calls=0, say=print, compiling=c) for c in ("on", "off")
    )
    ways = {
        BASELINE: pipeline(model, size, device),
        EXACT: ours(model, model.denoiser, size, device),
        EAGER: ours(model, eager, size, device),
        FAST: ours(model, compiled, size, device),
    }
    images: dict[str, torch.Tensor] = {}

    def turn(name: str) -> None:
        images[name] = ways[name](arguments.count, arguments.steps)

    for make in ways.values():
        make(size, 2)  # warm, and compiled
    calls = {name: partial(turn, name) for name in ways}
    seconds = turns(calls, arguments.repeats, device=device)
    rows = [
        {
            "way": name,
            "seconds": taken,
            "images_s": arguments.count / statistics.median(taken),
            "ratio": median_ratio(seconds[BASELINE], taken),
            "psnr": psnr(images[name], images[EXACT]),
        }
        for name, taken in seconds.items()
    ]
    count = math.ceil(arguments.count / size) * arguments.steps
    call_s = statistics.median(seconds[EAGER]) / count
    layers, kind = count_layers(model.denoiser), device.type
    return {
        "rows": rows,
        "dtype": str(compiled.dtype).removeprefix("torch."),
        "is_compiled": compiled.is_compiled,
        "compile_s": compiled.compile_seconds,
        "compile_s_layer": compiled.compile_seconds / layers,
        "saved_share": 1 - statistics.median(seconds[FAST]) / statistics.median(seconds[EAGER]),
        "compiles_from_images": layers * SECONDS_PER_LAYER[kind] / SAVED_SHARE[kind] / call_s
        / arguments.steps * size,
    }  # fmt: skip


def markdown(result: Row) -> str:
    """The section of `docs/results.md`."""
    what = (
        f"{result['count']} images, DDIM, {result['steps']} steps, batch {result['batch_size']}, "
        f"in {result['repeats']} turns; {result['device']}. Medians; the ratio is that of turns. "
        "PSNR against exact: of all pixels, the median image, the worst."
    )
    rows = [
        {
            "": row["way"],
            "images/s": f"{row['images_s']:.2f}",
            "ratio": f"{row['ratio']:.2f}x",
            "PSNR, dB": _shown(row["psnr"]),
        }
        for row in result["rows"]
    ]
    compiling = (
        f"Fast is channels-last with {result['dtype']} convolutions and linear layers. Compiling took "
        f"{result['compile_s']:.0f} s; `--speed fast` does it from about "
        f"{result['compiles_from_images']:.0f} images on, at these steps."
        if result["is_compiled"]
        else "torch.compile did not work there."
    )
    return section(result, what, table(rows), compiling)


def _shown(psnr: dict[str, float | None]) -> str:
    return ", ".join("equal" if v is None else f"{v:.1f}" for v in psnr.values())


def main() -> None:
    parser = parser_of(
        __doc__,
        {
            "model": "digits",
            "steps": 50,
            "batch_size": 32,
            "count": (64, "images a turn; whole batches"),
            "repeats": (3, "turns"),
        },
    )
    parser.add_argument("--device", choices=["auto", "cpu"], default="cpu")
    arguments = parser.parse_args()
    if arguments.count % arguments.batch_size:
        parser.error("--count must be whole batches: diffusers pads none")
    # measure a first compilation, whatever an earlier run has cached
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    told = {key: vars(arguments)[key] for key in ("steps", "batch_size", "count", "repeats")}
    result = record(
        f"sampling-{arguments.name}", told | measure(arguments), device=arguments.device
    )
    publish(result, markdown(result))


if __name__ == "__main__":
    main()
