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

from tests.faults import inputs, kills, sample, server, things


def main() -> int:
    """Exit code 1 where there is a fault."""
    options = _options()
    home = options.home or Path(tempfile.mkdtemp(prefix="prunedm-faults-"))
    made = (home / "base" / "made").exists()
    began = time.monotonic()
    try:
        if options.sample:
            options.kills, options.inputs = sample.KILLS, sample.INPUTS
        server.prepare(
            home, () if options.sample or (made and not options.kills) else server.EXPORTS
        )
        if not made:
            things.make(home / "base", but=("onnx",) if options.sample else ())
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
    wanted = options.kills
    if not isinstance(wanted, dict):
        count = None if wanted == "all" else int(wanted)
        wanted = {name: count for name in kills.VERBS if options.only in name}
    place, base = home / "kills", home / "base"
    refer = partial(kills.refer, base=base, place=place)
    tasks = list(wanted.items())
    references = list(server.in_parallel(lambda task: refer(*task), tasks, options.jobs))
    for reference in references:
        if reference.error:
            print(f"{reference.verb}: cannot be tried: {reference.error}", flush=True)
    moments = [(r, moment) for r in references for moment in r.moments]
    attempts = []
    attempt = partial(kills.attempt, base=base, place=place)
    for found in server.in_parallel(lambda task: attempt(*task), moments, options.jobs):
        attempts.append(found)
        if not found.good:
            twice = f"; made twice: {', '.join(found.twice[:3])}" if found.twice else ""
            print(f"{found.verb}: {found.change}: {found.error}{twice}", flush=True)
    untried = [{"verb": r.verb, "error": r.error} for r in references if r.error]
    return {
        "counts": kills.counts(attempts),
        "changes": {r.verb: len(r.changes) for r in references},
        "faults": untried + kills.as_rows(attempts),
    }


def _damage(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    base = home / "base"
    table = [case for case in inputs.cases(base) if options.only in case.name]
    if isinstance(options.inputs, tuple):
        table = [case for case in table if case.name in options.inputs]
    elif options.inputs != "all":
        table = kills.spread(table, int(options.inputs), ends=0)
    judge = partial(inputs.judge, base=base, place=home / "inputs")
    found = []
    for one in server.in_parallel(judge, table, options.jobs):
        found.append(one)
        if one.outcome != "clean":
            print(f"{one.outcome}: {one.name}: {one.line[:200]}", flush=True)
    return {
        "counts": inputs.counts(found),
        "kinds": _by_kind(found),
        "slowest": [
            f"{f.seconds} s {f.name}" for f in sorted(found, key=lambda f: -f.seconds)[:10]
        ],
        "faults": inputs.as_rows(found),
    }


def _by_kind(found: list[inputs.Found]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for one in found:
        kinds[one.kind][one.outcome] += 1
    return kinds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", default="", help="kills of each verb, or all")
    parser.add_argument("--inputs", default="", help="all, or a number, evenly spaced")
    parser.add_argument("--sample", action="store_true", help="what every test run tries")
    parser.add_argument("--only", default="", help="verbs and inputs with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--home", type=Path, help="keep the sound files here, and use them again")
    parser.add_argument("--out", type=Path, help="write counts and faults to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
