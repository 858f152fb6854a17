"""A snapshot as text: meters of the machine, two lines per run, and recently finished runs."""

import math
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prunedm.monitor.machine import Gpu, Machine, RunningStage, Snapshot
from prunedm.system.running import Finished
from prunedm.system.watching import HELD_OUT

HELP = "q quits, runs continue · --stop RUN ends one · --log RUN shows its log"
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 16  # held-out losses shown
_SILENT_FOR = 15.0  # seconds without an update that are worth mentioning
_HOT = 85.0  # degrees Celsius at which most GPUs start to throttle
_FULL = 90.0  # percent of memory
_WIDE = 100


def screen(snapshot: Snapshot, *, width: int, height: int | None = None) -> Group:
    """The whole view; where `height` lines are too few, finished runs are left out first."""
    machine = _machine(snapshot.machine, width)
    fixed = 7 + max(1, len(snapshot.machine.gpus))  # title, meters, help, lines between
    room = height - fixed if height else 10**6
    runs, ended = snapshot.runs, snapshot.finished
    if 2 * len(runs) + len(ended) + 2 > room:
        ended = ended[: max(0, room - 2 * len(runs) - 2)]
    parts: list[RenderableType] = [_title(snapshot, width), Text(), machine, Text()]
    parts.append(_runs(runs, width, room) if runs else Text("nothing is running", style="dim"))
    if ended:
        parts += [Text(), _finished(ended)]
    if height:
        parts += [Text(), Text(HELP, style="dim", no_wrap=True, overflow="ellipsis")]
    return Group(*parts)


def _title(snapshot: Snapshot, width: int) -> Table:
    table = Table.grid(expand=True)
    table.add_column()
    table.add_column(justify="right")
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.now))
    table.add_row(
        f"[bold]PruneDM[/] on {snapshot.machine.host}",
        f"{len(snapshot.runs)} running  [dim]{clock}[/]",
    )
    table.width = width
    return table


def _machine(machine: Machine, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=6)
    table.add_column(width=width // 4)
    table.add_column(width=5, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis")
    load = "" if machine.load is None else f", load {machine.load:.1f}"
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}{load}"
    table.add_row("CPU", *_meter(machine.cpu), cores)
    share = 100 * machine.memory_used / machine.memory_total
    memory = f"{_gigabytes(machine.memory_used)} of {_gigabytes(machine.memory_total)}"
    table.add_row("memory", *_meter(share, _FULL), memory)
    for gpu in machine.gpus:
        table.add_row(f"GPU {gpu.index}", *_meter(gpu.utilisation), _gpu(gpu))
    if machine.gpus:
        return table
    none = Text(f"GPU    {machine.no_gpus or 'none'}", style="dim", no_wrap=True)
    return Group(table, none)


def _meter(percent: float | None, alarm: float = 1000.0) -> tuple[RenderableType, str]:
    if percent is None:
        return Text("unknown", style="dim"), ""
    style = "red" if percent >= alarm else "cyan"
    bar = ProgressBar(total=100, completed=percent, complete_style=style, finished_style=style)
    return bar, f"{percent:.0f} %"


def _gpu(gpu: Gpu) -> Text:
    """Memory, temperature, power, name."""
    text = Text()
    if gpu.memory_used is not None and gpu.memory_total:
        full = 100 * gpu.memory_used / gpu.memory_total >= _FULL
        memory = f"{_gigabytes(gpu.memory_used)} of {_gigabytes(gpu.memory_total)}  "
        text.append(memory, style="red" if full else "")
    if gpu.temperature is not None:
        hot = gpu.temperature >= _HOT
        text.append(f"{gpu.temperature:.0f} °C  ", style="red" if hot else "")
    if gpu.power is not None:
        text.append(f"{gpu.power:.0f} W  ")
    return text.append(gpu.name, style="dim")


def _runs(runs: Sequence[RunningStage], width: int, room: int) -> RenderableType:
    """Two lines per run, or one where there are too many; those that do not fit are counted."""
    details = 2 * len(runs) <= room
    shown = runs if details or len(runs) <= room else runs[: max(1, room - 1)]
    parts: list[RenderableType] = []
    table = _run_table(width)
    for run in shown:
        table.add_row(*_run_cells(run))
        if details:
            parts += [table, _details(run)]
            table = _run_table(width)
    if not details:
        parts.append(table)
    if len(shown) < len(runs):
        parts.append(Text(f"and {len(runs) - len(shown)} more", style="dim"))
    return Group(*parts)


def _run_table(width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    name, label = (24, 16) if width >= _WIDE else (16, 13)
    table.add_column(width=name, no_wrap=True, overflow="ellipsis", style="bold")
    table.add_column(width=label, no_wrap=True, overflow="ellipsis")
    table.add_column(width=max(8, width - name - label - 36))
    table.add_column(width=14, justify="right", no_wrap=True)
    table.add_column(width=4, justify="right", no_wrap=True)
    table.add_column(width=12, justify="right", no_wrap=True)
    return table


def _run_cells(run: RunningStage) -> list[RenderableType]:
    entry = run.entry
    if not entry.total:
        return [entry.name, Text(entry.stage or "starting", style="dim"), "", "", "", ""]
    left = "" if run.remaining is None else f"{duration(run.remaining)} left"
    return [
        entry.name,
        entry.label,
        ProgressBar(total=entry.total, completed=entry.done),
        f"{entry.done:,}/{entry.total:,}",
        f"{entry.done / entry.total:.0%}",
        left if entry.done < entry.total else "",
    ]


def _details(run: RunningStage) -> Text:
    entry, parts = run.entry, list[str | Text]()
    if run.silent > _SILENT_FOR:
        parts.append(Text(f"no update for {duration(run.silent)}", style="yellow"))
    parts += [entry.about] * bool(entry.about)
    if not entry.here:
        parts.append(f"on {entry.host}")
    first, others = _figures(run)
    parts += first or [entry.note] * bool(entry.note)
    if entry.rate and entry.done < entry.total:
        parts.append(speed(entry.rate))
    if run.use is not None:
        parts.append(f"CPU {run.use.cpu:.0f} %, {_gigabytes(run.use.memory)}")
    parts += [f"for {duration(run.elapsed)}", f"pid {entry.pid}", *others]
    line = Text("  ", no_wrap=True, overflow="ellipsis")
    separator = Text(" · ", style="dim")
    return line.append_text(separator.join(Text(p) if isinstance(p, str) else p for p in parts))


def _figures(run: RunningStage) -> tuple[list[str], list[str]]:
    """The last figures: held-out loss with its history, and loss; then the others."""
    figures = {name: f"{value:.4g}" for name, (_, value) in run.entry.figures.items()}
    first = []
    if HELD_OUT in figures:
        course = sparks([loss for _, loss in run.entry.held_out])
        first.append(f"held out {figures.pop(HELD_OUT)} {course}".rstrip())
    if "loss" in figures:
        first.append(f"loss {figures.pop('loss')}")
    return first, [f"{name.replace('_', ' ')} {value}" for name, value in figures.items()]


def sparks(values: Sequence[float]) -> str:
    """The last values as small bars, scaled from lowest to highest; "" for fewer than two."""
    values = [v for v in values[-_SPARKS:] if math.isfinite(v)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0
    return "".join(_BARS[round((v - low) * scale)] for v in values)


def _finished(ended: Sequence[Finished]) -> Table:
    table, lines = Table.grid(padding=(0, 2)), list[list[str | Text]]()
    for one in ended:
        how = one.error or ("" if one.loss is None else f"loss {one.loss:.4f}")
        style = "" if not one.error else "yellow" if one.error == "stopped" else "red"
        clock = time.strftime("%H:%M", time.localtime(one.when))
        name = Text(one.out.name, style="bold")
        lines.append([clock, name, one.stage, duration(one.seconds), Text(how, style=style)])
    *own, _ = zip(*lines, strict=True) if lines else [()] * 5
    for column in own:  # a long message gives way to these
        table.add_column(no_wrap=True, min_width=max(map(len, column), default=0))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row(Text("finished", style="dim"))
    for line in lines:
        table.add_row(*line)
    return table


def duration(seconds: float) -> str:
    """45 s, 6:51, 1:02:03, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 1:
        return f"{minutes}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def speed(rate: float) -> str:
    """Units per second, or time per unit."""
    if rate >= 1:
        return f"{rate:.1f}/s"
    return f"{1 / rate:.1f} s each" if rate > 1 / 60 else f"{duration(1 / rate)} each"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
