"""python -m tests.faults --kills 50 --inputs all: the counts, and every fault that was found."""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import inputs, kills, server, things


def main() -> int:
    """Exit code 1 where there is a fault."""
    options = _options()
    home = options.home or Path(tempfile.mkdtemp(prefix="prunedm-faults-"))
    made = (home / "base" / "made").exists()
    began = time.monotonic()
    try:
        server.prepare(home, server.EXPORTS if options.kills or not made else ())
        if not made:
            things.make(home / "base")
        found = {
            "kills": _kill(options, home) if options.kills else {},
            "inputs": _damage(options, home) if options.inputs else {},
        }
    finally:
        if not options.home:
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
    base = home / "base"
    table = [case for case in inputs.cases(base) if options.only in case.name]
    if options.inputs != "all":
        table = kills.spread(table, int(options.inputs), ends=0)
    judge = partial(_judge, table, base, home / "inputs")
    found = []
    for one in server.in_parallel(judge, range(len(table)), options.jobs):
        found.append(one)
        if one.outcome != "clean":
            print(f"{one.outcome}: {one.name}: {one.line[:200]}", flush=True)
    return {
        "counts": inputs.counts(found),
        "kinds": _by_kind(found),
        "slowest": [f"{f.seconds} s {f.name}" for f in sorted(found, key=lambda f: -f.seconds)[:10]],
        "faults": inputs.as_rows(found),
    }


def _by_kind(found: list[inputs.Found]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for one in found:
        kinds[one.kind][one.outcome] += 1
    return kinds


def _judge(table: list[inputs.Case], base: Path, place: Path, number: int) -> inputs.Found:
    return inputs.judge(table[number], base, place)


def _attempt(base: Path, place: Path, task: tuple[Any, tuple[int, bool]]) -> kills.Attempt:
    return kills.attempt(*task, base=base, place=place)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", default="", help="kills of each verb, or all")
    parser.add_argument("--inputs", default="", help="all, or a number, evenly spaced")
    parser.add_argument("--only", default="", help="verbs and inputs with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--home", type=Path, help="keep the sound files here, and use them again")
    parser.add_argument("--out", type=Path, help="write counts and faults to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
