"""The evaluator of old MaskPro scripts: a model and its baseline, one measurement per call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunedm.errors import UserError
from prunedm.evaluation.profiling import peak_memory
from prunedm.evaluation.size import (
    count_nonzero,
    count_parameters,
    layer_sparsity,
    nm_validity,
    packed_bytes,
)
from prunedm.evaluation.speed import Way, one_call, timings
from prunedm.folder import Model, load, size_on_disk
from prunedm.hub import find
from prunedm.progress import Progress, Silent
from prunedm.sampling import images_of
from prunedm.stages.inputs import dense_source, device_for, reload


class MaskProEvaluator:
    """Call `load_models` first, then the others in any order; results are plain dicts and arrays.

    `prunedm evaluate` measures more and writes reports.
    """

    def __init__(
        self,
        model_checkpoint: str | Path,
        baseline_model: str | Path | None = None,
        *,
        device: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        """Folders, hub ids, or digits. The default baseline is the record's dense model, if any."""
        self.model_checkpoint, self.baseline_model = model_checkpoint, baseline_model
        self.device = device_for(device)
        self._progress = progress or Silent()
        self._model: Model | None = None
        self._baseline: Model | None = None
        self.missing = ""  # why there is no baseline

    @property
    def model(self) -> Model:
        """Raises `UserError` before `load_models`."""
        if self._model is None:
            raise UserError("call load_models() first")
        return self._model

    @property
    def baseline(self) -> Model | None:
        """None where none was given and the record's is unknown or gone; `missing` says why."""
        return self._baseline if self.model is not None else None

    def load_models(self) -> None:
        """Raises `UserError` where a given path is not a model, or the shapes differ.

        Where the record's dense model is gone or has changed, there is no baseline: see `missing`.
        """
        model = load(self.model_checkpoint)
        baseline, self.missing = self._find_baseline(model)
        if self.missing:
            self._progress.say(f"no baseline: {self.missing}")
        if baseline is not None and baseline.sample_shape != model.sample_shape:
            raise UserError(
                f"the model makes images of {model.sample_shape}, the baseline of "
                f"{baseline.sample_shape}; give the model that it was made from"
            )
        self._model, self._baseline = model, baseline

    def analyze_sparsity(self) -> dict[str, Any]:
        """Shares of zeros overall and by layer, N:M compliance, and sizes compared to the baseline.

        `sparsity` is 1 - non-zeros / parameters of the model itself; `compression` compares packed
        sizes: baseline over model.
        """
        model = self.model
        validity = nm_validity(model.denoiser, model.masks)
        sizes = _sizes(model)
        found: dict[str, Any] = sizes | {
            "sparsity": 1 - sizes["nonzero"] / sizes["params"],
            "pattern": validity["pattern"],
            "nm_compliance": validity["nm_valid"],
            "layers": {
                layer.name: layer.model_dump(exclude={"name"})
                | {"sparsity": 1 - layer.nonzero / layer.weights}
                for layer in layer_sparsity(model.denoiser, model.masks)
            },
        }
        if self.baseline is not None:
            dense = _sizes(self.baseline)
            found |= {
                "baseline": dense,
                "params_removed": 1 - sizes["params"] / dense["params"],
                "compression": dense["bytes_packed"] / sizes["bytes_packed"],
            }
        return found

    def generate_samples(
        self,
        n: int = 64,
        *,
        baseline: bool = False,
        sampler: str = "ddim",
        sampling_steps: int = 50,
        batch_size: int = 64,
        seed: int = 0,
    ) -> np.ndarray:
        """`n` images of the model or of the `baseline`, uint8 NHWC; both from the same noise.

        The same images as `prunedm sample` draws with these options.
        """
        model = self._one(baseline)
        if n < 1:
            raise UserError(f"n = {n} images; give at least one")
        return images_of(
            model,
            n,
            sampling_steps,
            sampler=sampler,
            seed=seed,
            batch_size=batch_size,
            device=self.device,
            progress=self._progress,
        )

    def benchmark_inference_speed(
        self,
        batch_sizes: Sequence[int] = (1, 4, 16),
        *,
        repeats: int = 20,
        bf16: bool = False,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Latency of one denoiser call by batch size, alternating with the baseline.

        `speedup` (baseline over model) is also by batch size; `peak_memory_mb` is for the largest.
        """
        if not batch_sizes or min(batch_sizes) < 1 or repeats < 1:
            raise UserError(
                f"batch_sizes {tuple(batch_sizes)}, repeats {repeats}; give one or more"
            )
        named = {"model": self.model} | ({"baseline": self.baseline} if self.baseline else {})
        found: dict[str, Any] = {name: {"timings": {}} for name in named}
        for batch in batch_sizes:
            timed = timings(
                [(model.denoiser, model.example(batch)) for model in named.values()],
                Way(batch, bf16=bf16, compiled=compiled),
                repeats=repeats,
                device=self.device,
            )
            for name, timing in zip(named, timed, strict=True):
                found[name]["timings"][batch] = timing.model_dump()
        for name, model in named.items():
            found[name]["peak_memory_mb"] = self._peak(model, max(batch_sizes))
        if self.baseline is not None:
            ours, theirs = (found[name]["timings"] for name in ("model", "baseline"))
            found["speedup"] = {
                batch: theirs[batch]["median_ms"] / ours[batch]["median_ms"] for batch in ours
            }
        return found

    def _find_baseline(self, model: Model) -> tuple[Model | None, str]:
        """The baseline, or None and why."""
        if self.baseline_model is not None:
            return load(self.baseline_model), ""
        source = dense_source(model.record)
        if source is None:
            return None, "no record says which model this one was made from"
        try:
            return reload(source), ""
        except UserError as error:
            return None, str(error)

    def _one(self, baseline: bool) -> Model:
        if not baseline:
            return self.model
        if self.baseline is None:
            raise UserError(f"there is no baseline ({self.missing}); give baseline_model")
        return self.baseline

    def _peak(self, model: Model, batch: int) -> float:
        with torch.inference_mode():
            call = one_call(model.denoiser, model.example(batch))
            return peak_memory(model.denoiser, call, self.device) / 1e6


def _sizes(model: Model) -> dict[str, int]:
    return {
        "params": count_parameters(model.denoiser),
        "nonzero": count_nonzero(model.denoiser),
        "bytes_disk": size_on_disk(find(model.name)),
        "bytes_packed": packed_bytes(model.denoiser, model.masks),
    }
