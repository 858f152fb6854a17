"""What the terminal shows: bars with remaining time, tables, one-line messages."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from prunedm.deployment.description import read_description
from prunedm.errors import masked
from prunedm.evaluation.metric import Metric
from prunedm.evaluation.results import Evaluation
from prunedm.evaluation.table import NONE, Cell, headers, lines, measured, warnings
from prunedm.masks import Masks
from prunedm.progress import Bar, SilentBar
from prunedm.reading import read_json, read_text
from prunedm.recipe import Planned
from prunedm.record import read_record
from prunedm.stages.evaluating.files import REPORT, SUMMARY
from prunedm.stages.masks import Extraction
from prunedm.stages.verbs.compare import read_comparison
from prunedm.training import processes

console = Console(quiet=processes.rank() > 0)
SLOWEST = 7 * 86_400.0  # seconds that a step may take and still count for the remaining time
LONGEST_LINE = 4096
SHOWN_LAYERS = 12  # in the table of an analysis; its JSON has all
_TONES = {"better": "green", "worse": "yellow", "": "dim"}


class Terminal:
    """Progress bars by rich; on a pipe or in CI, one line at the end of each task."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _Left(compact=True, elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[note]}"),
        )
        # in a file nobody knows the width: a line is never broken
        wide = Console(width=LONGEST_LINE, quiet=console.quiet)
        place = console if console.is_terminal else wide
        # a run of a sweep may take hours: the speed is that of the last 1000 steps, however slow
        with Bars(*columns, console=place, speed_estimate_period=SLOWEST) as bars:
            yield _Bar(bars, label, total, done)

    def say(self, text: str) -> None:
        # soft_wrap: paths stay whole
        console.print(masked(text), highlight=False, markup=False, soft_wrap=True)


class _Left(TimeRemainingColumn):
    """The remaining time, or at the end the elapsed time."""

    def render(self, task: RichTask) -> Text:
        return super().render(task).append(" took" if task.finished else " left")


class _Bar(SilentBar):  # without figures: the notes say enough
    def __init__(self, bars: Bars, label: str, total: int, done: int) -> None:
        self.bars = bars
        self.id = bars.add_task(label, total=total, completed=done, note="")

    def advance(self, units: int = 1, note: str = "") -> None:
        fields: dict[str, Any] = {"note": " ".join(masked(note).split())} if note else {}
        self.bars.update(self.id, advance=units, **fields)


def comparison_tables(folder: Path) -> None:
    """The table of a report, its warnings, failed steps, and the place of the page."""
    evaluations = read_comparison(folder)
    console.print(rich_table(evaluations, width=console.width))
    for warning in warnings(evaluations):
        console.print(warning, style="yellow", markup=False)
    Terminal().say(read_text(folder / SUMMARY).splitlines()[-1])
    if (folder / REPORT).exists():  # its step may have failed
        Terminal().say(f"report: {(folder / REPORT).resolve()}")


def plan_table(stages: Sequence[Planned]) -> None:
    """Every stage of a recipe, its folder, and what is still to be done."""
    table = _table()
    for heading in ("stage", "folder", "state"):
        table.add_column(heading, overflow="fold")
    for stage in stages:
        state = Text(stage.todo or "done", style="" if stage.todo else "green")
        table.add_row(Text(stage.name), Text(str(stage.folder)), state)
    console.print(table)


def pruning_table(folder: Path) -> None:
    """Each layer's widths before and after pruning, or its share of zeros."""
    stats = read_json(folder / "pruning_stats.json")
    pattern = stats.get("requested", {}).get("pattern", "")
    title = f"pruning {pattern}".rstrip()
    table = Table("layer", "before => after", title=title, title_justify="left")
    patterns = stats.get("patterns", {})
    for name, influence in stats.get("influence", {}).items():
        gone = ", removed" if name in stats["removed"] else ""
        table.add_row(name, f"influence {influence:.4f}{gone}")
    for name, value in stats.get("layers", {}).items():
        table.add_row(name, f"{_change(value)}  {patterns.get(name, '')}".rstrip())
    for name, reason in stats.get("dense", {}).items():
        table.add_row(name, f"dense: {reason}")
    before, after = stats["before"], stats["after"]
    for key in ("params", "nonzero", "macs"):
        if key not in before:  # MACs are not counted where the network cannot be run
            continue
        share = 1 - after[key] / before[key]
        change = (
            f"{before[key]:,} => {after[key]:,}  (-{share:.1%})" if share else f"{before[key]:,}"
        )
        table.add_row(f"[bold]{key}", change)
    if "loss" in after:
        error = "" if after["loss_se"] is None else f" ± {after['loss_se']:.4f}"
        losses = " => ".join(map(_loss, (before["loss"], after["loss"])))
        table.add_row(f"[bold]loss, {after['problems']} problems", losses + error)
    for kind, wanted in stats.get("requested", {}).items():
        if kind in stats.get("achieved", {}):
            table.add_row(f"[bold]{kind} asked", f"{wanted:.1%}, got {stats['achieved'][kind]:.2%}")
    console.print(table)
    if "reason" in stats:
        console.print(stats["reason"], style="yellow", markup=False)


def analysis_table(folder: Path) -> None:
    """The layers with the largest outlier channels, and the resulting advice on a score."""
    found = read_json(folder / "activations.json")
    table = _table("layer", "largest", "outliers", "mean", "drift")
    peak = {name: max(layer["largest"]) for name, layer in found["layers"].items()}
    for name in sorted(peak, key=lambda n: -peak[n])[:SHOWN_LAYERS]:
        layer = found["layers"][name]
        outliers = sum(layer["outliers"]) / len(layer["outliers"])
        table.add_row(
            name, f"{peak[name]:.1f}x", f"{outliers:.1%}", f"{layer['mean_share']:.0%}",
            f"{layer['drift']:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "[dim]largest channel over the median one; outlier channels; the mean's share of "
        "E\\[x^2]; change of the channels' profile from clean to noisy[/]"
    )
    console.print(found["verdict"], markup=False, highlight=False)
    console.print(f"heat map: {(folder / 'activations.png').resolve()}", soft_wrap=True)


def masks_table(masks: Masks) -> None:
    """The share each layer keeps, and whether its pattern holds in all groups of input channels."""
    table = _table("layer", "shape", "kept", "pattern", "valid")
    for name, mask in masks:
        share = masks.valid_groups(name)
        table.add_row(
            name, "x".join(map(str, mask.shape)), _percent(int(mask.sum()), mask.numel()),
            str(masks.patterns.get(name, "unstructured")),
            NONE if share is None else "yes" if share == 1 else f"no: {share:.2%}",
        )  # fmt: skip
    console.print(table)
    Terminal().say(masks_line(masks))


def masks_line(masks: Masks) -> str:
    """Layers, weights, the share kept, and the number of layers that are N:M in every group."""
    layers = len(masks.by_layer)
    holding = sum(masks.valid_groups(name) == 1 for name, _ in masks)
    text = f" ({masks.pattern_text})" if masks.patterns else ""
    return (
        f"{layers} layer{'s' * (layers != 1)}, {masks.total:,} weights, "
        f"{_percent(masks.kept, masks.total)} kept; exactly N of every M input channels in "
        f"{holding} of {layers}{text}"
    )


def extraction_lines(out: Path, masks: Masks, found: Extraction, made: bool) -> None:
    """The origin and content of a masks file."""
    for line in found.lines():
        Terminal().say(line)
    Terminal().say(f"{out}: {masks_line(masks)}{'' if made else '  (done already)'}")


def loss_line(folder: Path) -> None:
    """A loss with its standard error, problems and masks."""
    record = read_record(folder)
    assert record is not None
    found = record.figures
    error = "" if found["loss_se"] is None else f" ± {found['loss_se']:.6f} (standard error)"
    masked = f"; {found['kept']:.1%} kept in {found['masked_layers']} masked layers"
    Terminal().say(
        f"mean {found['loss']:.6f}{error}, {found['problems']} problems in "
        f"{found['batches']} batches{masked * bool(found['masked_layers'])}"
    )


def export_lines(folder: Path) -> None:
    """The files written, their error relative to the model, and the next command."""
    record, about = read_record(folder), read_description(folder)
    assert record is not None
    figures, terminal = record.figures, Terminal()
    terminal.say(
        f"{', '.join(about.files)}: {figures['bytes'] / 1e6:.2f} MB, "
        f"{100 * figures['share_of_fp16']:.1f} % of the weights in float16"
    )
    terminal.say(
        f"run next to the model: relative error {about.relative_error:.1e} (tolerance "
        f"{about.tolerance:g}), largest {about.largest_error:.1e}"
        + (f"; {about.pattern} found again in the file" if about.pattern else "")
    )
    if "fd" in figures:
        terminal.say(
            f"{figures['features']} {figures['fd_before']:.1f} => {figures['fd']:.1f} ± "
            f"{figures['fd_se']:.1f}, PSNR {figures['psnr']:.1f} dB, {figures['samples']} images"
        )
    if "command" in figures:
        terminal.say(f"engine: {figures.get('engine', 'built')}; the command: {figures['command']}")
    elif "runtime" in figures or about.format == "packed":
        terminal.say(f"next: prunedm sample {folder} samples/")


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else NONE


def _change(value: list[list[int]] | float) -> str:
    if isinstance(value, float):
        return f"{value:.1%} zeros"
    before, after = ("x".join(map(str, widths)) for widths in value)
    return before if before == after else f"{before} => {after}"


def rich_table(evaluations: Sequence[Evaluation], *, width: int | None = None) -> Group:
    """Models as rows or, where `width` is too small, as columns.

    Columns that do not fit continue in further tables, each starting with the dense model.
    """
    width, columns = width or Console().width, measured(evaluations)
    upright = _upright(evaluations, columns)
    if _measure(upright) <= width:
        return Group(upright)
    others = evaluations[1:]
    for count in range(1, len(others) + 1):
        size = math.ceil(len(others) / count)
        pages = [others[k : k + size] for k in range(0, len(others), size)]
        tables = [_transposed([evaluations[0], *page], columns) for page in pages]
        if all(_measure(table) <= width for table in tables):
            return Group(*tables)
    return Group(*(_transposed([e], columns) for e in evaluations))


def _measure(table: Table) -> int:
    return Console(width=10_000).measure(table).maximum


def _table(*headings: str) -> Table:
    """A table without vertical lines; the first column is text, the others are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left", no_wrap=not k)
    return table


def _upright(evaluations: Sequence[Evaluation], columns: Sequence[Metric]) -> Table:
    table = _table()
    for k, name in enumerate(headers(evaluations, columns)):
        table.add_column(name, justify="right" if k else "left")
    for e, line in lines(evaluations, columns):
        table.add_row(Text(e.label, style="bold"), *map(_text, line))
    return table


def _transposed(evaluations: Sequence[Evaluation], columns: Sequence[Metric]) -> Table:
    table, names = _table(), headers(evaluations, columns)[1:]
    table.add_column("", min_width=max(len(word) for name in names for word in name.split()))
    for e in evaluations:
        table.add_column(Text(e.label), justify="right")
    cells_of = [line for _, line in lines(evaluations, columns)]
    for k, name in enumerate(names):
        # the spread has its own line: six models must fit into 100 characters
        cells = (_text(line[k], apart="\n") for line in cells_of)
        table.add_row(Text(name, style="bold"), *cells)
    return table


def _text(shown: Cell, apart: str = " ") -> Text:
    figure = shown.figure.replace(" ± ", f"{apart}± ").replace(" in ", "\nin ")
    text = Text(figure, style="dim" if figure == NONE else "")
    return text.append(f"\n{shown.change}", style=_TONES[shown.tone]) if shown.change else text


# verb -> what the command line shows of its folder, besides one line
SHOWN: dict[str, Callable[[Path], None]] = {
    "prune": pruning_table,
    "export": export_lines,
    "evaluate": comparison_tables,
    "compare": comparison_tables,
    "loss": loss_line,
    "analyze": analysis_table,
}
