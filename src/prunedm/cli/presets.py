"""The command about presets of learn: presets."""

from typing import Annotated

from cyclopts import Parameter

from prunedm.cli.frame import app
from prunedm.options import EstimatorName


@app.command
def presets(
    name: Annotated[
        str | None, Parameter(help="print this one as YAML for `learn --config`")
    ] = None,
    *,
    estimator: Annotated[
        EstimatorName, Parameter(help="whose rates and steps the YAML has")
    ] = "relaxed",
) -> None:
    """List the presets of learn with their sizes, costs and expected times; or show one of them."""
    from rich.console import Console

    from prunedm.preset_table import print_table, yaml_text

    if name is None:
        print_table(Console())
    else:
        Console().print(yaml_text(name, estimator), markup=False, highlight=False, soft_wrap=True)
