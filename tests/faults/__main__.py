"""python -m tests.faults --kills 50 --inputs all: the counts, and every fault that was found."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import kills, server, things


def main() -> int:
    """Exit code 1 where there is a fault."""
    options = _options()
    home = Path(tempfile.mkdtemp(prefix="prunedm-faults-"))
    began = time.monotonic()
    try:
        server.prepare(home)
        things.make(home / "base")
        found = {
            "kills": _kill(options, home) if options.kills else {},
            "inputs": _damage(options, home) if options.inputs else {},
        }
    finally:
        shutil.rmtree(home, ignore_errors=True)
    for name, part in found.items():
        if part:
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in part["counts"].items()))
    print(f"{time.monotonic() - began:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(part and part["faults"] for part in found.values()))


def _kill(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    count = None if options.kills == "all" else int(options.kills)
    names = [name for name in kills.VERBS if options.only in name]
    place, base = home / "kills", home / "base"
    refer = partial(kills.refer, base=base, place=place, count=count)
    references = list(server.in_parallel(refer, names, options.jobs))
    for reference in references:
        if reference.error:
            print(f"{reference.verb}: cannot be tried: {reference.error}", flush=True)
    tasks = [(r, moment) for r in references for moment in r.moments]
    attempts = []
    for found in server.in_parallel(partial(_attempt, base, place), tasks, options.jobs):
        attempts.append(found)
        if not found.good:
            twice = f"; made twice: {', '.join(found.twice[:3])}" if found.twice else ""
            print(f"{found.verb}: {found.change}: {found.error}{twice}", flush=True)
    untried = [{"verb": r.verb, "error": r.error} for r in references if r.error]
    moments = {r.verb: len(r.changes) for r in references}
    return {
        "counts": kills.counts(attempts),
        "changes": moments,
        "faults": untried + kills.as_rows(attempts),
    }


def _damage(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    return {}


def _attempt(base: Path, place: Path, task: tuple[Any, tuple[int, bool]]) -> kills.Attempt:
    return kills.attempt(*task, base=base, place=place)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", default="", help="kills of each verb, or all")
    parser.add_argument("--inputs", default="", help="all, or a number, evenly spaced")
    parser.add_argument("--only", default="", help="verbs and inputs with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--out", type=Path, help="write counts and faults to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
