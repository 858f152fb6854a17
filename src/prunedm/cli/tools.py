"""Commands that are not stages: fid, stats, masks, presets, monitor."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from prunedm.cli.frame import Config, Flat, Model, app, to_output
from prunedm.configuration import merged
from prunedm.errors import UserError
from prunedm.options import EstimatorName, FidOptions, StatsOptions

if TYPE_CHECKING:
    from rich.console import Console

    from prunedm.system.running import Entry

Side = Annotated[
    str,
    Parameter(help="images or statistics: a folder, an .npz of either, or a dataset as --dataset"),
]
ReplaceOut = Annotated[bool, Parameter(help="replace OUT if it exists", negative=())]


@app.command
def fid(
    generated: Side,
    real: Side,
    *,
    options: Annotated[FidOptions, Flat] = FidOptions(),
    json: Annotated[
        Path | None, Parameter(help="also write all figures to this file", converter=to_output)
    ] = None,
    config: Config = None,
    overwrite: Annotated[bool, Parameter(help="replace the --json file", negative=())] = False,
) -> None:
    """Measure the distance between two sets of images: FID, KID, precision and recall."""
    from prunedm.console import Terminal
    from prunedm.record import write_json
    from prunedm.stages import distance

    if json is not None:
        json = distance.check_file(json, ".json", overwrite=overwrite)
        distance.make_place(json)
    terminal = Terminal()
    options = merged(FidOptions, config, options.given())
    figures = distance.fid(generated, real, options, progress=terminal)
    for line in distance.lines(figures):
        terminal.say(line)
    if json is not None:
        write_json(figures, json)


@app.command
def stats(
    source: Annotated[str, Parameter(help="images: a folder, an .npz, or a dataset")],
    out: Annotated[
        Path, Parameter(help="the new file, NAME.npz, as pytorch-fid's", converter=to_output)
    ],
    *,
    options: Annotated[StatsOptions, Flat] = StatsOptions(),
    config: Config = None,
    overwrite: ReplaceOut = False,
) -> None:
    """Write mean and covariance of a set's features, for fid to compare with."""
    from prunedm.console import Terminal
    from prunedm.stages import distance

    terminal = Terminal()
    options = merged(StatsOptions, config, options.given())
    figures = distance.stats(source, out, options, progress=terminal, overwrite=overwrite)
    done = "" if figures["made"] else "  (done already)"
    terminal.say(f"{out}: {figures['features']}, {figures['images']:,} images of {source}{done}")
    for note in figures["notes"]:
        terminal.say(note)


masks = App(name="masks", help="Masks of any model: extract them to a file, or show them.")
app.command(masks)


@masks.command
def extract(
    model: Model,
    out: Annotated[Path, Parameter(help="the new file, NAME.safetensors", converter=to_output)],
    *,
    pattern: Annotated[str | None, Parameter(help="keep exactly N of every M, as 2:4")] = None,
    targets: Annotated[
        tuple[str, ...],
        Parameter(
            help="only layers with this prefix or matching this expression; repeatable", negative=()
        ),
    ] = (),
    overwrite: ReplaceOut = False,
) -> None:
    """Write a model's masks, or those of its zeros, to one file."""
    from prunedm.console import extraction_lines
    from prunedm.stages.masks import extract_to

    found = extract_to(model, out, targets=targets, pattern=pattern, overwrite=overwrite)
    extraction_lines(out, *found)


@masks.command
def show(
    source: Annotated[str, Parameter(help="a masks file, a model folder, a hub id, or digits")],
) -> None:
    """Print the masks of every layer, and whether their N:M patterns hold."""
    from prunedm.console import masks_table
    from prunedm.stages.masks import read_masks

    found = read_masks(source)
    masks_table(found)
    found.check_pattern()


@app.command
def presets(
    name: Annotated[
        str | None, Parameter(help="print this one as YAML for `learn --config`")
    ] = None,
    *,
    estimator: Annotated[
        EstimatorName, Parameter(help="estimator whose rates and steps the YAML has")
    ] = "relaxed",
) -> None:
    """List the presets of learn with their sizes, costs and expected times; or print one."""
    from rich.console import Console

    from prunedm.preset_table import print_table, yaml_text

    if name is None:
        print_table(Console())
    else:
        _say(Console(), yaml_text(name, estimator))


@app.command
def monitor(
    *,
    every: Annotated[float, Parameter(help="seconds between looks")] = 1.0,
    once: Annotated[bool, Parameter(help="print the picture once", negative=())] = False,
    json: Annotated[bool, Parameter(help="print it once as JSON", negative=())] = False,
    stop: Annotated[
        str | None, Parameter(help="end only this run, cleanly: its folder, name or pid")
    ] = None,
    log: Annotated[
        str | None, Parameter(help="print the last lines of this run: its folder, name or pid")
    ] = None,
) -> None:
    """Show running jobs: progress, remaining time, figures, CPUs, memory, GPUs; stop one of them."""
    from rich.console import Console

    from prunedm.monitor.live import show_live, show_once
    from prunedm.monitor.machine import Meter
    from prunedm.monitor.runs import find_run, said
    from prunedm.system.running import entries

    if not 0 < every < math.inf:
        raise UserError(f"every = {every:g}: give a positive number of seconds, such as 1")
    console = Console()
    if stop is not None:
        _stop(find_run(stop, entries()), console)
    elif log is not None:
        for line in said(find_run(log, entries())):
            _say(console, line)
    elif json:
        _print_json()
    elif once or not console.is_terminal:
        show_once(console, Meter())
    else:
        show_live(console, Meter(), every)


def _stop(entry: "Entry", console: "Console") -> None:
    from prunedm.monitor.runs import STOP_WITHIN, how_to_go_on, stop_and_wait

    _say(console, f"stopping {entry.out} (pid {entry.pid})")
    if not stop_and_wait(entry):
        raise UserError(
            f"{entry.name} was told to stop and still runs after {STOP_WITHIN:.0f} s: look again, "
            f"or end it with kill -9 {entry.pid}; what it saved stays"
        )
    _say(console, f"stopped; the same command continues: {how_to_go_on(entry)}")


def _say(console: "Console", text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _print_json() -> None:
    import json

    from prunedm.monitor.machine import Meter, first_look
    from prunedm.record import finite

    print(json.dumps(finite(first_look(Meter()).model_dump(mode="json")), indent=1))
