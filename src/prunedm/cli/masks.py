"""Commands about masks files: masks extract, masks show."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prunedm.cli.frame import Model, app, to_output

masks = App(name="masks", help="Masks of any model: take them out into a file, or look at them.")
app.command(masks)


@masks.command
def extract(
    model: Model,
    out: Annotated[Path, Parameter(help="the new file, NAME.safetensors", converter=to_output)],
    *,
    pattern: Annotated[str | None, Parameter(help="keep just N of every M, as 2:4")] = None,
    targets: Annotated[
        tuple[str, ...],
        Parameter(help="only this prefix or expression of layers; repeat it", negative=()),
    ] = (),
    overwrite: Annotated[bool, Parameter(help="replace OUT if it is there", negative=())] = False,
) -> None:
    """Write a model's masks, or those of its zeros, to one file."""
    from prunedm.console import extraction_lines
    from prunedm.stages.masks import extract_to

    masks, found, made = extract_to(
        model, out, targets=targets, pattern=pattern, overwrite=overwrite
    )
    extraction_lines(out, masks, found, made=made)


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
