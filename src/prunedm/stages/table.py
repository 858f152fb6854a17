"""The verbs: one record each, from which commands, recipes, schemas and public names are made.

To add one: its options (a class in `options/`), its function (verbs/NAME.py, NAME), a record here.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

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
from prunedm.stages.frame import Models, Plan, Request, run_stage, status

O = TypeVar("O", bound=Options)  # noqa: E741

_RETURNS = (
    "Returns the record of `out`, and whether it was made now: a finished result is left alone. "
    "`overwrite` replaces another one. Raises `UserError` for what the user can mend."
)


@dataclass(frozen=True)
class Stage(Generic[O]):
    """A verb: it reads a model folder, does one thing, and writes a new folder with a record.

    help: its sentence on the command line. makes: a model, from which the next stage of a recipe
    continues, or a leaf. reads: one model, several by label, or nothing. masks: whether the model has
    masks afterwards, by the options. bare: whether the verb refuses a model with masks.
    """

    verb: str
    options: type[O]
    help: str
    makes: Literal["model", "leaf"] = "model"
    reads: Literal["model", "models", "nothing"] = "model"
    masks: Callable[[O], bool] = lambda options: False
    bare: bool = False
    about: str = ""  # what its function in Python tells besides

    @cached_property
    def function(self) -> Callable[..., tuple[Record, bool]]:
        """The verb as Python users call it: with its own name, parameters and docstring."""
        options = self.options()

        def of_model(
            source: str | Path,
            out: str | Path,
            options: Any = options,
            *,
            progress: Progress | None = None,
            overwrite: bool = False,
        ) -> tuple[Record, bool]:
            return self(source, out, options, progress=progress, overwrite=overwrite)

        def of_models(
            models: Mapping[str, str | Path],
            out: str | Path,
            options: Any = options,
            *,
            title: str = "",
            progress: Progress | None = None,
            overwrite: bool = False,
        ) -> tuple[Record, bool]:
            return self(models, out, options, progress=progress, overwrite=overwrite, title=title)

        def of_nothing(
            out: str | Path,
            options: Any = options,
            *,
            progress: Progress | None = None,
            overwrite: bool = False,
        ) -> tuple[Record, bool]:
            return self("", out, options, progress=progress, overwrite=overwrite)

        kinds: dict[str, Callable[..., tuple[Record, bool]]] = {
            "model": of_model, "models": of_models, "nothing": of_nothing
        }  # fmt: skip
        made = kinds[self.reads]
        made.__name__ = made.__qualname__ = self.verb
        made.__module__ = "prunedm"
        made.__annotations__["options"] = self.options
        parts = (self.help, self.about, _RETURNS)
        made.__doc__ = "\n\n".join(textwrap.fill(part, 100) for part in parts if part)
        return made

    def __call__(
        self,
        source: Models,
        out: str | Path,
        options: O | None = None,
        *,
        progress: Progress | None = None,
        overwrite: bool = False,
        title: str = "",
    ) -> tuple[Record, bool]:
        """The record of `out`, and whether it was made now; see `run_stage`.

        title: the heading of the report, for verbs that write one.
        """
        options = self.options() if options is None else options
        if not isinstance(options, self.options):
            raise TypeError(f"{self.verb} takes {self.options.__name__}, not {options!r}")
        request = Request(source, Path(out), options, progress or Silent(), overwrite, title)
        return run_stage(self.verb, self._plan(request), out, overwrite=overwrite)

    def again(
        self, source: Models, out: Path, options: O, *, progress: Progress, **named: Any
    ) -> tuple[Record, bool]:
        """As a call, but replaces a result whose options or inputs have changed."""
        try:
            return self(source, out, options, progress=progress, **named)
        except Changed as error:
            progress.say(f"{out.name}: made again, for it held {error.difference}")
            return self(source, out, options, progress=progress, **named | {"overwrite": True})

    def status(self, source: Models, out: Path, options: O) -> str:
        """What a call would do: "" where `out` is done; see `frame.status`. Makes nothing."""
        return status(self.verb, self._plan(Request(source, out, options, Silent())), out)

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
        about="Writes a pipeline folder of the averaged weights.",
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
        "Learn which N of every M weights to keep; the weights themselves stay unchanged.",
        masks=lambda options: True,
    ),
    Stage(
        "finetune",
        FinetuneOptions,
        "Train the remaining weights; masks hold exactly; distils from the dense model.",
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
        "Draw images; image i depends only on the seed and i. An interrupted run continues.",
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
        "Measure the held-out loss batch by batch, optionally under other masks.",
        makes="leaf",
    ),
    Stage(
        "analyze",
        AnalyzeOptions,
        "Measure activations at each noise level: JSON, heat map, and which score to try.",
        makes="leaf",
    ),
    Stage(
        "compare",
        EvaluateOptions,
        "Measure several models on the same problems and noise; table and report.html.",
        makes="leaf",
        about="models: label -> folder, hub id or digits; the first is the dense one. title: the "
        'report\'s heading. Depth "compare" is "full" here, for all models are given. Where a '
        "measurement failed, `overwrite` takes it again.",
        reads="models",
    ),
)
VERBS = {stage.verb: stage for stage in _ALL}
STAGES = {verb: stage for verb, stage in VERBS.items() if stage.reads != "models"}  # of a recipe
