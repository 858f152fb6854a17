"""The section of `docs/results.md` that `mask_learning.py` writes."""

from argparse import Namespace
from collections.abc import Sequence

from bench import Row, mean, samples_in_words, section, spread, table


def markdown(result: Row, arguments: Namespace) -> str:
    """Frozen weights, costs, contest."""
    parts = (_frozen(result), _costs(result["costs"]), _contest(result, arguments))
    return section(result, f"{result['device']}.", *parts)


def _frozen(result: Row) -> str:
    firsts = ", ".join(f"{p} {row['loss']:.4f}" for p, row in result["first"].items())
    rows = [
        [
            r["estimator"],
            r["pattern"],
            f"**{r['share']:.1%}**",
            f"{r['loss']:.4f} ± {r['loss_se']:.4f}",
            f"{r['steps']:,}",
            f"{r['seconds']:.0f} s",
            f"{r['groups_changed']:.1%}",
        ]
        for r in result["frozen"]
    ]
    head = ["estimator", "pattern", "gap closed", "loss", "steps", "wall time", "groups changed"]
    return (
        f"Frozen weights, {result['seconds']:.0f} s for every estimator, from Wanda's masks "
        f"({firsts}; dense {result['dense']['loss']:.4f}):\n\n{table(head, rows, left=(0, 1))}"
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


def _contest(result: Row, arguments: Namespace) -> str:
    rows, dense = result["contest"], result["dense"]
    lines = []
    for pattern in dict.fromkeys(r["pattern"] for r in rows):
        for name in dict.fromkeys(r["contestant"] for r in rows):
            own = [r for r in rows if (r["contestant"], r["pattern"]) == (name, pattern)]
            if own:
                lines.append(_contestant(name, pattern, own))
    features, samples = samples_in_words(arguments)
    head = ["masks", "pattern", "seeds", "masks take", "steps", "loss before", "loss after", "FD"]
    return (
        f"The contest: masks and fine-tuning in {result['contest_seconds']:.0f} s together, mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}:\n\n{table(head, lines, left=(0, 1))}"
    )


def _contestant(name: str, pattern: str, own: Sequence[Row]) -> list[str]:
    return [
        name,
        pattern,
        str(len(own)),
        f"{mean(own, 'mask_seconds'):.0f} s",
        f"{mean(own, 'steps'):.0f}",
        f"{mean(own, 'loss_start'):.4f}",
        f"**{mean(own, 'loss'):.5f}**{spread(own, 'loss', 5)}",
        f"{mean(own, 'fd'):.1f}{spread(own, 'fd', 1)}",
    ]
