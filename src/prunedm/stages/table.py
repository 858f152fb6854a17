"""The verbs: one record each. Commands, recipes, sweeps, schemas and public names come from them.

To add one: its options (a class in `options/`), its function (verbs/NAME.py, NAME), a line in `STAGES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Generic, Literal, TypeVar

from prunedm.errors import Changed
from prunedm.options import (
    AnalyzeOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    Options,
    PruneOptions,
    SampleOptions,
    TrainOptions,
)
from prunedm.progress import Progress, Silent
from prunedm.record import Record
from prunedm.stages.frame import Plan, Request, run_stage, status

O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True)
class Stage(Generic[O]):
    """A verb: it reads a model folder, does one thing, and writes a new folder with a record.

    help: its sentence on the command line. makes: a model, which the next stage of a recipe goes on
    from, or a leaf. masks: whether the model has masks afterwards, by its options; `bare`: whether
    it takes only a model without them.
    """

    verb: str
    options: type[O]
    help: str
    makes: Literal["model", "leaf"] = "model"
    reads: Literal["model", "nothing"] = "model"
    masks: Callable[[O], bool] = lambda options: False
    bare: bool = False

    def __call__(
        self,
        source: str | Path,
        out: str | Path,
        options: O | None = None,
        *,
        progress: Progress | None = None,
        overwrite: bool = False,
    ) -> tuple[Record, bool]:
        """The record of `out`, and whether it was made now; see `run_stage`."""
        request = self._request(source, out, options, progress, overwrite=overwrite)
        return run_stage(self.verb, self._plan(request), request.out, overwrite=overwrite)

    def again(
        self, source: str | Path, out: Path, options: O, *, progress: Progress, overwrite: bool
    ) -> tuple[Record, bool]:
        """As called, but what options or inputs that have changed since made is replaced."""
        try:
            return self(source, out, options, progress=progress, overwrite=overwrite)
        except Changed as error:
            progress.say(f"{out.name}: made again, for it held {error.difference}")
            return self(source, out, options, progress=progress, overwrite=True)

    def status(self, source: str | Path, out: Path, options: O | None = None) -> str:
        """What a call would do: "" where `out` is done; see `frame.status`. Nothing is made."""
        request = self._request(source, out, options, None)
        return status(self.verb, self._plan(request), request.out)

    def _request(
        self,
        source: str | Path,
        out: str | Path,
        options: O | None,
        progress: Progress | None,
        *,
        overwrite: bool = False,
    ) -> Request[O]:
        options = self.options() if options is None else options
        if not isinstance(options, self.options):
            raise TypeError(f"{self.verb} takes {self.options.__name__}, not {options!r}")
        return Request(source, Path(out), options, progress or Silent(), overwrite)

    def _plan(self, request: Request[O]) -> Plan:
        module = import_module(f"prunedm.stages.verbs.{self.verb}")
        plan: Plan = getattr(module, self.verb)(request)
        return plan


_ALL: tuple[Stage, ...] = (
    Stage(
        "train",
        TrainOptions,
        "Train a dense model from scratch; --preset digits makes the embedded one.",
        reads="nothing",
    ),
    Stage(
        "prune",
        PruneOptions,
        "Remove channels, single weights, or N:M weights, by a score or by OBS.",
        masks=lambda options: options.mechanism != "channels",
        bare=True,
    ),
    Stage(
        "learn",
        LearnOptions,
        "Learn which N of every M weights to keep; the weights stay as they are.",
        masks=lambda options: True,
    ),
    Stage(
        "finetune",
        FinetuneOptions,
        "Train the weights that are left, masks held exactly; distils from the dense model.",
    ),
    Stage(
        "export",
        ExportOptions,
        "Write one file for another runtime: packed, ONNX, OpenVINO, torch.export, TensorRT; int8 "
        "too.",
        makes="leaf",
    ),
    Stage(
        "sample",
        SampleOptions,
        "Draw images; image i depends on the seed and i alone. An interrupted run continues.",
        makes="leaf",
    ),
    Stage(
        "evaluate",
        EvaluateOptions,
        "Measure one model: loss, FD, size, speed, sparsity.",
        makes="leaf",
    ),
    Stage(
        "loss",
        LossOptions,
        "Measure the denoising loss batch by batch, with other masks put on first if wanted.",
        makes="leaf",
    ),
    Stage(
        "analyze",
        AnalyzeOptions,
        "Measure what layers see at each noise level: JSON, heat map, and which score to try.",
        makes="leaf",
    ),
)
STAGES = {stage.verb: stage for stage in _ALL}
