"""SwanLab: its service, offline files, or a dashboard on this machine."""

from pathlib import Path
from typing import Any

from prunedm.options import LoopOptions
from prunedm.training.services import Histogram, Service, title_of


class SwanLab(Service):
    """Local files lie in the stage's folder."""

    name = "swanlab"
    can_be_offline = True

    def needs(self, options: LoopOptions) -> dict[tuple[str, ...], str]:
        dashboard = {
            ("swanboard",): "tracker_mode = 'local' needs SwanLab's dashboard: "
            "pip install 'swanlab[dashboard]'"
        }
        return super().needs(options) | (dashboard if options.tracker_mode == "local" else {})

    def settings(
        self, options: LoopOptions, *, folder: Path, run: str, done: int
    ) -> dict[str, Any]:
        mode = {} if options.tracker_mode == "auto" else {"mode": options.tracker_mode}
        place = {"experiment_name": title_of(folder), "logdir": str(folder / "swanlab")}
        return {"id": run, "resume": "allow"} | place | mode

    def log_histogram(self, tracker: Any, tag: str, histogram: Histogram, step: int) -> None:
        import swanlab

        if hasattr(swanlab, "echarts"):
            bars = swanlab.echarts.Bar()
            bars.add_xaxis([f"{centre:.3g}" for centre in histogram.centres])
            bars.add_yaxis(tag, histogram.counts.tolist())
            tracker.log({tag: bars}, step=step)


SWANLAB = SwanLab()
