"""The section of `docs/results.md` that `recovery.py` writes."""

from argparse import Namespace
from collections.abc import Sequence

from bench import Row, mean, samples_in_words, section, spread, table

DATA = "data loss alone"


def markdown(result: Row, arguments: Namespace) -> str:
    """Contest, control, goals."""
    parts = [_contest(result, arguments), _control(result)]
    goals = [_goals(result)] if result["goals"] else []
    return section(result, f"{result['device']}.", *parts, *goals)


def _contest(result: Row, arguments: Namespace) -> str:
    rows, dense, lines = result["contest"], result["dense"], []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        names = dict.fromkeys(row["mixture"] for row in own)
        mixtures = {name: [row for row in own if row["mixture"] == name] for name in names}
        # the learning rate that suits the data loss best is its own
        data = [own for name, own in mixtures.items() if name.startswith(DATA)]
        seeds = max(map(len, data))
        alone = min((own for own in data if len(own) == seeds), key=lambda own: mean(own, "gap"))
        lines += [_line(kind, own, alone) for own in mixtures.values()]
    features, samples = samples_in_words(arguments)
    head = ["pruning", "matched", "seeds", "step", "steps", "wall time", "loss before"]
    head += ["loss after", "gap left", "to the best of data alone", "FD"]
    return (
        f"Fine-tuning for {result['seconds']:.0f} s by every mixture, from the same start; mean ± "
        f"standard deviation over seeds; {features} of {samples}; dense {dense['loss']:.5f}, FD "
        f"{dense['fd']:.1f}. The gap is the loss less the dense model's on the same problems:\n\n"
        f"{table(head, lines, left=(0, 1))}"
    )


def _line(kind: str, own: Sequence[Row], alone: Sequence[Row]) -> list[str]:
    others = {row["seed"]: row["gap"] for row in alone}
    # where the data loss alone reaches the dense loss, there is no gap to compare with
    comparable = all(value > 0 for value in others.values())
    ratios = [{"ratio": row["gap"] / others[row["seed"]]} for row in own] if comparable else []
    ratio = f"{mean(ratios, 'ratio'):.2f}x{spread(ratios, 'ratio', 2)}" if ratios else "–"
    return [
        kind,
        own[0]["mixture"],
        str(len(own)),
        f"{1000 * mean(own, 'step_s'):.0f} ms",
        f"{mean(own, 'steps'):.0f}",
        f"{mean(own, 'seconds'):.0f} s",
        f"{mean(own, 'start'):.4f}",
        f"{mean(own, 'loss'):.5f}{spread(own, 'loss', 5)}",
        f"{mean(own, 'gap'):+.5f}{spread(own, 'gap', 5)}",
        f"**{ratio}**",
        f"{mean(own, 'fd'):.1f}{spread(own, 'fd', 1)}",
    ]


def _control(result: Row) -> str:
    row, dense = result["control"], result["dense"]
    return (
        f"Control: the dense model itself, trained on by the data loss for {result['seconds']:.0f} s, "
        f"ends at {row['loss']:.5f} ({row['gap'] / dense['loss']:+.1%}; gap {row['gap']:+.5f} ± "
        f"{row['gap_se']:.5f})."
    )


def _goals(result: Row) -> str:
    dense = result["dense"]
    lines = [
        [
            row["kind"],
            row["mixture"],
            f"{row['seconds'] / 60:.1f} min",
            f"{row['steps']:,}",
            f"{row['loss']:.5f}",
            f"**{row['over']:+.1%}**",
            f"{row['fd']:.1f} ({row['fd'] / dense['fd'] - 1:+.0%})",
        ]
        for row in result["goals"]
    ]
    head = ["pruning", "matched", "wall time", "last steps", "loss", "to dense", "FD"]
    return (
        f"From the dense model to the end within {result['goal_seconds'] / 60:.0f} minutes "
        "(goals: 2:4 within 1 % of the dense loss; 2:4 on 30 % fewer parameters within 5 % of loss "
        f"and FD):\n\n{table(head, lines, left=(0, 1))}"
    )
