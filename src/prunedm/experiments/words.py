"""The words of a sweep's page in English and Simplified Chinese."""

from typing import Any

from markupsafe import Markup

from prunedm.evaluation.report.words import both

WORDS: dict[str, tuple[str, str]] = {
    "lead": (
        "{model}, {count} runs: {fields}.",
        "{model}，共 {count} 次运行，变化的选项：{fields}。",
    ),
    "tile.done": ("runs done", "已完成"),
    "tile.done.story": ("of {count}; {others}", "共 {count} 次；{others}"),
    "tile.none": ("none failed", "无失败"),
    "tile.best": ("best {name}", "最佳 {name}"),
    "tile.time": ("time of all runs", "全部运行用时"),
    "tile.time.story": (
        "each run by itself would have taken {alone}",
        "若逐次单独运行需 {alone}",
    ),
    "runs": ("Runs", "运行"),
    "runs.note": (
        "★: no other run is as good in all objectives and better in one ({directions}).",
        "★：没有其他运行在所有目标上都不差且至少一项更好（{directions}）。",
    ),
    "run": ("run", "运行"),
    "state": ("state", "状态"),
    "time": ("time", "用时"),
    "folder": ("folder", "目录"),
    "state.waiting": ("waiting", "等待"),
    "state.running": ("running: {stage}", "运行中：{stage}"),
    "state.done": ("done", "完成"),
    "state.failed": ("failed: {stage}", "失败：{stage}"),
    "state.stopped": ("stopped: {stage}", "已停止：{stage}"),
    "state.pruned": ("given up: {stage}", "提前终止：{stage}"),
    "failures": ("Failed runs", "失败的运行"),
    "failures.note": (
        "The end of each log. They are kept, and run again with --retry.",
        "各日志的末尾。失败的运行会保留，可用 --retry 重新运行。",
    ),
}


def word(key: str, **values: Any) -> Markup:
    """The words of `key` in both languages, filled with escaped `values`."""
    english, chinese = WORDS[key]
    return both(Markup(english).format(**values), Markup(chinese).format(**values))
