"""Commands that compare sets of images: fid, stats."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import Config, Flat, app, to_output
from prunedm.configuration import merged
from prunedm.options import FidOptions, StatsOptions

Side = Annotated[
    str,
    Parameter(help="images or statistics: a folder, an .npz of either, or a dataset as --dataset"),
]


@app.command
def fid(
    generated: Side,
    real: Side,
    *,
    options: Annotated[FidOptions, Flat] = FidOptions(),
    json: Annotated[
        Path | None, Parameter(help="write all figures to this file too", converter=to_output)
    ] = None,
    config: Config = None,
    overwrite: Annotated[bool, Parameter(help="replace the --json file", negative=())] = False,
) -> None:
    """Measure the distance of two sets of images: FID, KID, precision and recall."""
    from prunedm.console import Terminal
    from prunedm.record import write_json
    from prunedm.stages.distance import check_file, make_place
    from prunedm.stages.distance import fid as stage
    from prunedm.stages.distance_lines import lines

    if json is not None:
        json = check_file(json, ".json", overwrite=overwrite)
        make_place(json)
    terminal = Terminal()
    figures = stage(
        generated,
        real,
        merged(type(options), config, options.model_dump(exclude_unset=True)),
        progress=terminal,
    )
    for line in lines(figures):
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
    overwrite: Annotated[bool, Parameter(help="replace OUT if it is there", negative=())] = False,
) -> None:
    """Write mean and covariance of a set's features, for fid to compare with."""
    from prunedm.console import Terminal
    from prunedm.stages.distance import stats as stage

    terminal = Terminal()
    options = merged(type(options), config, options.model_dump(exclude_unset=True))
    figures = stage(source, out, options, progress=terminal, overwrite=overwrite)
    done = "" if figures["made"] else "  (done already)"
    terminal.say(f"{out}: {figures['features']}, {figures['images']:,} images of {source}{done}")
    for note in figures["notes"]:
        terminal.say(note)
