"""Every way to run a model on an NVIDIA GPU, timed in turns in one call.

    python benchmarks/gpu.py --layers only
    python benchmarks/gpu.py --model dense/ --model channels/ --model hybrid/ --layers

Ways: eager float32, TF32, float16 eager, channels-last, compiled, max-autotune, semi-structured (see
`docs/gpu.md`), ONNX Runtime, TensorRT with dense and with sparse weights. Ratios are medians over turns
to eager float32 of the first model at the same batch size, so that other load affects all alike. A way
whose runtime is not installed, or that fails, gets a row that says so. Where no model has 2:4 layers, a
copy of the first with magnitude masks is added; its speed is that of any 2:4 model.
`--layers`: also, or only, single layers of Stable Diffusion's sizes. `--without`: ways to leave out
(max-autotune takes minutes a model). At the end: tables, and `benchmarks/results/gpu-CARD-MODEL.json`.
"""

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench import RESULTS, Row, command_line, median_ratio, slug, table
from torch import nn

from prunedm.architecture import answer
from prunedm.deployment.inference_graph import HalfInside, InferenceDenoiser
from prunedm.errors import first_line
from prunedm.evaluation.speed import in_turns
from prunedm.folder import load
from prunedm.masks import Pattern
from prunedm.networks.layers import prunable_layers
from prunedm.randomness import generator_for
from prunedm.record import environment, write_json
from prunedm.removal.nm import nm_mask
from prunedm.sparse_kernels.gemm import find_kernels
from prunedm.sparse_kernels.layers import why_not_sparse
from prunedm.sparse_kernels.selection import (
    Choice,
    Timer,
    time_forms,
    time_graphs,
    time_in_turns,
    use_sparse_kernels,
)
from prunedm.stages.exporting.onnx import write_onnx
from prunedm.stages.exporting.tensorrt import build_engine

OPSET = 18
HALF = torch.float16
BASELINE = "eager float32"
# channels and side of Stable Diffusion's UNet at 512x512, level by level
LEVELS = ((320, 64), (640, 32), (1280, 16))

Call = Callable[[], torch.Tensor]


class NoFigure(Exception):
    """Why a way cannot be measured here: the row's note."""


@dataclass
class Subject:
    """A model at one batch size, in float32 and NCHW, with the inputs of all its calls."""

    name: str
    denoiser: nn.Module
    shape: tuple[int, int, int]
    batch: int
    device: torch.device
    folder: Path  # for files of other runtimes

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        sample = torch.randn((self.batch, *self.shape), generator=generator_for(0, "gpu"))
        found = {"sample": sample, "timestep": torch.full((self.batch,), 500.0)}
        if getattr(self.denoiser, "class_embedding", None) is not None:
            found["class_labels"] = torch.zeros(self.batch, dtype=torch.long)
        return {name: value.to(self.device) for name, value in found.items()}

    def half(self, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
        return copy.deepcopy(self.denoiser).to(HALF).to(memory_format=memory_format)

    def call(self, module: nn.Module, memory_format: torch.memory_format | None = None) -> Call:
        """A call of a denoiser in its own type; inputs are converted beforehand."""
        dtype = HALF if memory_format else torch.float32
        sample = self.inputs["sample"].to(
            dtype, memory_format=memory_format or torch.contiguous_format
        )
        inputs = self.inputs | {"sample": sample}
        return lambda: answer(module, inputs)

    @cached_property
    def onnx(self) -> Path:
        """float16 inside, float32 at both ends, any batch."""
        path = self.folder / f"{slug(self.name)}.onnx"
        if not path.exists():
            graph = HalfInside(InferenceDenoiser(self.denoiser), HALF).to(self.device)
            inputs = {
                name: torch.cat([value, value])[:2] for name, value in self.inputs.items()
            }  # a batch of one would be taken for a constant
            write_onnx(graph, inputs, path, opset=OPSET)
        return path


@dataclass
class Made:
    """A way, ready to be called."""

    call: Call
    note: str = ""
    choices: list[Choice] = field(default_factory=list)
    relative_error: float | None = None
    keep: tuple[Any, ...] = ()  # objects whose addresses other runtimes hold


# --------------------------------------------------------------------------------- ways


def float32(subject: Subject) -> Made:
    return Made(subject.call(subject.denoiser))


def tf32(subject: Subject) -> Made:
    plain = subject.call(subject.denoiser)

    def call() -> torch.Tensor:
        set_tf32(True)
        try:
            return plain()
        finally:
            set_tf32(False)

    return Made(call)


def half(subject: Subject) -> Made:
    return Made(subject.call(subject.half(), torch.contiguous_format))


def channels_last(subject: Subject, mode: str | None = None) -> Made:
    """float16; compiled in a mode of `torch.compile`, or eager."""
    module = subject.half(torch.channels_last)
    if mode:
        return compiling(subject, module, mode)
    return Made(subject.call(module, torch.channels_last))


def sparsely(subject: Subject, timer: Timer, mode: str | None = None) -> Made:
    """With the layers that `timer` selects at this batch size, compiled or not."""
    module = subject.half(torch.channels_last)
    if not any(why_not_sparse(layer, HALF) is None for layer in prunable_layers(module).values()):
        raise NoFigure("no 2:4 layer that a sparse GEMM takes")
    why = find_kernels(subject.device, HALF)[1]
    if why:
        raise NoFigure(why)
    selection = use_sparse_kernels(module, subject.inputs, dtype=HALF, timer=timer)
    eager = Made(subject.call(module, torch.channels_last))
    made = compiling(subject, module, mode) if mode else eager
    timed = [choice for choice in selection.choices if choice.dense_ms is not None]
    count = f"{len(selection.chosen)} of {len(timed)} 2:4 layers sparse"
    made.note = "; ".join(filter(None, [count, made.note]))
    made.choices, made.relative_error = timed, selection.relative_error
    return made


def compiling(subject: Subject, module: nn.Module, mode: str) -> Made:
    """Compiled at once and as a whole; an error where a part would run eager."""
    fast = torch.compile(module, mode=mode, dynamic=False, fullgraph=True)
    plain = subject.call(fast, torch.channels_last)

    def call() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return plain()

    started = time.perf_counter()
    call()
    return Made(call, f"compiled in {time.perf_counter() - started:.0f} s")


def onnx_runtime(subject: Subject) -> Made:
    ort = installed("onnxruntime")
    wanted = "CUDAExecutionProvider"
    if wanted not in ort.get_available_providers():
        raise NoFigure(
            "not installed: onnxruntime is there, its CUDA build (onnxruntime-gpu) is not"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(subject.onnx), options, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise NoFigure("onnxruntime could not load its CUDA provider")
    return bound(session, subject, "cuda")


def bound(session: Any, subject: Subject, device: str) -> Made:
    """A session bound to PyTorch's memory."""
    import numpy as np

    kinds = {torch.float32: np.float32, torch.int64: np.int64}
    inputs = {name: value.contiguous() for name, value in subject.inputs.items()}
    output = torch.empty(output_shape(subject), device=subject.device)
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_input(
            name, device, 0, kinds[value.dtype], tuple(value.shape), value.data_ptr()
        )
    binding.bind_output("output", device, 0, np.float32, tuple(output.shape), output.data_ptr())

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return output

    return Made(call, keep=(inputs,))


def tensorrt(subject: Subject, *, with_sparse_weights: bool) -> Made:
    """An engine for this batch size, which tries sparse tactics if asked to."""
    trt = installed("tensorrt")
    shapes = {name: tuple(value.shape) for name, value in subject.inputs.items()}
    built = build_engine(subject.onnx, [shapes] * 3, half=True, sparse=with_sparse_weights)
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(built)
    context = engine.create_execution_context()
    inputs = {name: value.contiguous() for name, value in subject.inputs.items()}
    output = torch.empty(output_shape(subject), device=subject.device)
    for name, value in inputs.items():
        context.set_input_shape(name, tuple(value.shape))
        context.set_tensor_address(name, value.data_ptr())
    context.set_tensor_address("output", output.data_ptr())
    stream = torch.cuda.Stream()

    def call() -> torch.Tensor:
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return output

    return Made(call, keep=(engine, inputs))


WAYS: dict[str, Callable[[Subject], Made]] = {
    BASELINE: float32,
    "eager float32, TF32": tf32,
    "float16": half,
    "float16, channels-last": channels_last,
    "float16, compiled": partial(channels_last, mode="default"),
    "float16, CUDA graphs": partial(channels_last, mode="reduce-overhead"),
    "float16, max-autotune": partial(channels_last, mode="max-autotune"),
    "semi-structured": partial(sparsely, timer=time_in_turns),
    "semi-structured, compiled": partial(sparsely, timer=time_graphs, mode="default"),
    "semi-structured, CUDA graphs": partial(sparsely, timer=time_graphs, mode="reduce-overhead"),
    "semi-structured, max-autotune": partial(sparsely, timer=time_graphs, mode="max-autotune"),
    "ONNX Runtime CUDA, float16": onnx_runtime,
    "TensorRT float16, dense weights": partial(tensorrt, with_sparse_weights=False),
    "TensorRT float16, sparse weights": partial(tensorrt, with_sparse_weights=True),
}


def installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NoFigure(f"not installed: {name}") from error


def output_shape(subject: Subject) -> tuple[int, ...]:
    channels = subject.denoiser.config.out_channels  # type: ignore[union-attr]
    return (subject.batch, channels, *subject.shape[1:])


def set_tf32(on: bool) -> None:
    torch.backends.cudnn.allow_tf32 = on
    torch.backends.cuda.matmul.allow_tf32 = on


# --------------------------------------------------------------------------- measurement


def measure(
    subjects: Sequence[Subject],
    repeats: int,
    say: Callable[[str], None],
    without: Sequence[str] = (),
) -> list[Row]:
    """All ways of all models at one batch size, in turns, except names that contain one of `without`."""
    made: list[Made] = []
    rows: list[Row] = []
    unmeasured: list[Row] = []
    for subject in subjects:
        reference = subject.call(subject.denoiser)()
        for way, make in WAYS.items():
            if any(text in way for text in without):
                continue
            row: Row = {"model": subject.name, "batch": subject.batch, "way": way}
            say(f"batch {subject.batch}: {subject.name}, {way}")
            try:
                ready = make(subject)
                output = ready.call().float()
                error = float((output - reference).norm() / reference.norm())
                assert math.isfinite(error), "its output is not finite"
            except NoFigure as reason:
                unmeasured.append(row | {"note": str(reason)})
            except Exception as failure:  # from any runtime; the other ways continue
                unmeasured.append(row | {"note": f"failed: {first_line(failure)[:200]}"})
            else:
                choices = [asdict(c) | {"speedup": c.speedup} for c in ready.choices]
                more = {"sparse_kernels_error": ready.relative_error, "choices": choices}
                rows.append(row | {"note": ready.note, "error": error} | (more if choices else {}))
                made.append(ready)
    device = subjects[0].device
    seconds = in_turns([ready.call for ready in made], repeats=repeats, device=device)
    times = [[1000 * second for second in taken] for taken in seconds]
    baseline = next((t for r, t in zip(rows, times, strict=True) if is_baseline(r, subjects)), None)
    for row, taken in zip(rows, times, strict=True):
        row["ms"] = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4)
        row["spread_ms"] = (high - low) / 2
        if baseline is not None:
            row["ratio"] = median_ratio(baseline, taken)
    return sorted(rows + unmeasured, key=lambda r: order(r, subjects))


def is_baseline(row: Row, subjects: Sequence[Subject]) -> bool:
    return row["model"] == subjects[0].name and row["way"] == BASELINE


def order(row: Row, subjects: Sequence[Subject]) -> tuple[int, int]:
    names = [subject.name for subject in subjects]
    return names.index(row["model"]), list(WAYS).index(row["way"])


def large_layers(levels: Sequence[tuple[int, int]]) -> Iterator[tuple[str, nn.Module, Any]]:
    """The kinds of layers of a large latent UNet: name, layer, and input shape for one image."""
    for width, side in levels:
        image, tokens = (width, side, side), side * side
        yield "3x3 convolution", nn.Conv2d(width, width, 3, padding=1), image
        yield "3x3 convolution, stride 2", nn.Conv2d(width, width, 3, 2, 1), image
        yield "1x1 convolution", nn.Conv2d(width, width, 1), image
        yield "attention projection", nn.Linear(width, width), (tokens, width)
        yield "feed-forward in", nn.Linear(width, 8 * width), (tokens, width)
        yield "feed-forward out", nn.Linear(4 * width, width), (tokens, 4 * width)


def measure_layers(
    levels: Sequence[tuple[int, int]],
    batches: Sequence[int],
    device: torch.device,
    say: Callable[[str], None],
) -> list[Row]:
    """Dense (channels-last float16) and every sparse form of single layers, eager and as graphs."""
    kernels, why = find_kernels(device, HALF)
    if why:
        say(why)
        return []
    rows = []
    for kind, layer, shape in large_layers(levels):
        prune(layer)
        layer.to(device, HALF)
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
        for batch in batches:
            say(f"batch {batch}: {kind}, {shape}")
            x = torch.randn((batch, *shape), generator=generator_for(0, "gpu")).to(device, HALF)
            if x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            wanted = layer(x)
            weight: torch.Tensor = layer.weight  # type: ignore[assignment]
            row: Row = {"layer": kind, "batch": batch, "pixels": wanted.numel() // len(weight)}
            row |= {"outputs": len(weight), "columns": weight[0].numel()}
            for name, timer in (("eager", time_in_turns), ("graphs", time_graphs)):
                dense_ms, forms = time_forms(layer, x, HALF, kernels, timer)
                row[name] = {"dense_ms": dense_ms} | {f: ms for f, (ms, _) in forms.items()}
            row["error"] = {
                form: float((module(x) - wanted).float().norm() / wanted.float().norm())
                for form, (_, module) in forms.items()
            }
            rows.append(row)
    return rows


@torch.no_grad()
def prune(module: nn.Module) -> None:
    """Prune to 2:4 by magnitude wherever the shape allows."""
    layers = prunable_layers(module) if not hasattr(module, "weight") else {"": module}
    for layer in layers.values():
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if weight.shape[1] % 4 == 0:
            weight.mul_(nm_mask(weight.abs(), Pattern(2, 4)))


def load_all(names: Sequence[str]) -> dict[str, tuple[nn.Module, tuple[int, int, int]]]:
    """Denoisers and image shapes by name, with a 2:4 copy of the first where no model has 2:4 layers."""
    found: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {}
    for name in names:
        model = load(name)
        found[Path(name).name or name] = (model.denoiser.eval(), model.sample_shape)
    layers = [layer for d, _ in found.values() for layer in prunable_layers(d).values()]
    if not any(why_not_sparse(layer, HALF) is None for layer in layers):
        first, (denoiser, shape) = next(iter(found.items()))
        pruned = copy.deepcopy(denoiser)
        prune(pruned)
        found[f"{first} 2:4"] = (pruned, shape)
    return found


# -------------------------------------------------------------------------------- tables


def markdown(result: Row) -> str:
    """Ways by batch, then the layers that were timed."""
    batches = result["batches"]
    rows: dict[tuple[str, str], dict[int, Row]] = {}
    for row in result["rows"]:
        rows.setdefault((row["model"], row["way"]), {})[row["batch"]] = row
    parts = [
        f"```\n{result['command']}\n```",
        f"{result['device']}, PyTorch {result['versions']['torch']}; milliseconds of one call.",
    ]
    if rows:
        timed = [
            {"model": model, "way": way}
            | {f"batch {b}": cell(by.get(b)) for b in batches}
            | {"error": worst(by), "note": notes(by)}
            for (model, way), by in rows.items()
        ]
        parts += [
            f"How many times as fast as {BASELINE} of {result['rows'][0]['model']}; medians of "
            f"{result['repeats']} turns. Error: of the output against the same model's float32, "
            "relative.",
            table(timed, left=range(len(timed[0]))),
        ]
    chosen = [
        {
            "model": row["model"],
            "way": row["way"],
            "batch": str(row["batch"]),
            "layer": c["name"],
            "kind": c["kind"],
            "GEMM B x O x K": f"{c['pixels']} x {c['outputs']} x {c['columns']}",
            "dense ms": f"{c['dense_ms']:.4f}",
            "best sparse form": c["form"] or c["reason"],
            "ms": "–" if c["sparse_ms"] is None else f"{c['sparse_ms']:.4f}",
            "ratio": times_as_fast(c["speedup"]),
            "chosen": "yes" if c["chosen"] else "no",
        }
        for row in result["rows"]
        for c in row.get("choices", [])
    ]
    if chosen:
        parts.append(table(chosen, left=range(len(chosen[0]))))
    if result["layers"]:
        forms = list(dict.fromkeys(f for row in result["layers"] for f in row["error"]))
        body = [
            {
                "layer": row["layer"],
                "batch": str(row["batch"]),
                "GEMM B x O x K": f"{row['pixels']} x {row['outputs']} x {row['columns']}",
                "timed": how,
                "dense ms": f"{row[how]['dense_ms']:.4f}",
            }
            | {
                f: times_as_fast(row[how]["dense_ms"] / row[how][f]) if f in row[how] else "–"
                for f in forms
            }
            for row in result["layers"]
            for how in ("eager", "graphs")
        ]
        parts.append(table(body, left=range(len(body[0]))))
    return "\n\n".join(parts)


def cell(row: Row | None) -> str:
    if row is None or "ms" not in row:
        return "–"
    ratio = f", {times_as_fast(row['ratio'])}" if "ratio" in row else ""
    return f"{row['ms']:.2f} ± {row['spread_ms']:.2f}{ratio}"


def worst(by_batch: dict[int, Row]) -> str:
    errors = [row["error"] for row in by_batch.values() if "error" in row]
    return f"{max(errors):.1g}" if errors else "–"


def notes(by_batch: dict[int, Row]) -> str:
    return "; ".join(dict.fromkeys(row["note"] for row in by_batch.values() if row["note"]))


def times_as_fast(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", help="folder or digits; the first is the baseline"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=30, help="turns")
    parser.add_argument(
        "--layers", nargs="?", const="also", choices=["also", "only"], help="single large layers"
    )
    parser.add_argument("--without", nargs="+", default=[], help="texts of ways to leave out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip:
        sys.exit("no NVIDIA GPU here: this benchmark measures nothing without one")
    from torch import _dynamo

    # every model, way and batch size recompiles the same code; past the limit it would run eager
    limit = "recompile_limit" if hasattr(_dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(_dynamo.config, limit, 256)
    set_tf32(False)
    device = torch.device("cuda")
    models = {} if arguments.layers == "only" else load_all(arguments.model or ["digits"])
    result: Row = {
        "name": f"gpu-{slug(torch.cuda.get_device_name(device))}-{slug(next(iter(models), 'layers'))}",
        "command": command_line(),
        **environment(),
        "cuda": torch.version.cuda,
        "batches": arguments.batch,
        "repeats": arguments.repeats,
        "rows": [],
        "layers": [],
    }
    path = RESULTS / f"{result['name']}.json"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for batch in arguments.batch if models else []:
            subjects = [
                Subject(name, denoiser.to(device), shape, batch, device, Path(folder))
                for name, (denoiser, shape) in models.items()
            ]
            result["rows"] += measure(subjects, arguments.repeats, print, arguments.without)
            write_json(result, path)  # in case the next batch runs out of memory
            _dynamo.reset()
            torch.cuda.empty_cache()
        if arguments.layers:
            result["layers"] = measure_layers(LEVELS, arguments.batch, device, print)
    write_json(result, path)
    print(markdown(result))


if __name__ == "__main__":
    main()
