"""The section of `docs/results.md` that `mask_learning.py` writes."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def markdown(result: Row, *, samples: str, features: str) -> str:
    """Frozen weights, costs, contest."""
    return "\n\n".join(
        [
            f"```\n{result['command']}\n```",
            f"{result['device']}. Data: `benchmarks/results/{result['name']}.json`.",
            _frozen(result),
            _costs(result["costs"]),
            _contest(result, samples, features),
        ]
    )


def _frozen(result: Row) -> str:
    firsts = ", ".join(f"{p} {row['loss']:.4f}" for p, row in result["first"].items())
    lines = [
        f"| {r['estimator']} | {r['pattern']} | **{r['share']:.1%}** | {r['loss']:.4f} ± "
        f"{r['loss_se']:.4f} | {r['steps']:,} | {r['seconds']:.0f} s | {r['groups_changed']:.1%} |"
        for r in result["frozen"]
    ]
    return (
        f"Frozen weights, {result['seconds']:.0f} s for every estimator, from Wanda's masks "
        f"({firsts}; dense {result['dense']['loss']:.4f}):\n\n"
        "| estimator | pattern | gap closed | loss | steps | wall time | groups changed |\n"
        "|---|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def _costs(costs: Row) -> str:
    return (
        f"A mask-learning step of the default takes {costs['step_ratio_known_problems']:.2f}x a plain "
        f"training step of the same model and batch ({costs['step_ratio_new_problems']:.2f}x where "
        "the dense output is not yet known), and holds "
        f"{costs['bytes_a_weight']:.1f} bytes a weight (logit, gradient, Adam) and "
        f"{costs['mask_bytes_a_weight']:.0f} for the mask. A mask of the policy gradient takes "
        f"{costs['policy_gradient_ratio']:.2f}x a forward pass. Sampling 2:4 masks for 36M weights "
        f"takes {costs['sampling_ratio conditional-bernoulli']:.1f}x (conditional Bernoulli) and "
        f"{costs['sampling_ratio plackett-luce']:.1f}x (Plackett-Luce) the time of `torch.rand`."
    )


def _contest(result: Row, samples: str, features: str) -> str:
    rows = result["contest"]
    lines = []
    for pattern in dict.fromkeys(r["pattern"] for r in rows):
        for name in dict.fromkeys(r["contestant"] for r in rows):
            own = [r for r in rows if (r["contestant"], r["pattern"]) == (name, pattern)]
            if own:
                lines.append(_contestant(name, pattern, own))
    dense = result["dense"]
    return (
        f"The contest: masks and fine-tuning in {result['contest_seconds']:.0f} s together, mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}:\n\n"
        "| masks | pattern | seeds | masks take | steps | loss before | loss after | FD |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|\n" + "\n".join(lines)
    )


def _contestant(name: str, pattern: str, own: Sequence[Row]) -> str:
    def mean(key: str) -> float:
        return statistics.mean(r[key] for r in own)

    def spread(key: str, digits: int) -> str:
        values = [r[key] for r in own]
        return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""

    return (
        f"| {name} | {pattern} | {len(own)} | {mean('mask_seconds'):.0f} s | {mean('steps'):.0f} | "
        f"{mean('loss_start'):.4f} | **{mean('loss'):.5f}**{spread('loss', 5)} | "
        f"{mean('fd'):.1f}{spread('fd', 1)} |"
    )
