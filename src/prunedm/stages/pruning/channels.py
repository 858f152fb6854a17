"""Channels: coupled ones of the whole network, or heads and hidden units inside residual blocks."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch

from prunedm.errors import UserError
from prunedm.networks.narrowed import as_narrowed, loads_plainly
from prunedm.options import parse_target
from prunedm.randomness import seed_for
from prunedm.removal.channels.groups import ChannelGroup, channel_groups
from prunedm.removal.channels.inner import inner_groups
from prunedm.removal.channels.plan import ChannelPlan, plan_channels, remove_channels
from prunedm.removal.channels.target import OutOfReach
from prunedm.stages.pruning.job import Details, PruneJob, requested, widths

SHORT = 0.9  # below this share of the target, finer steps are tried
TIED = "its channels are tied to protected layers, or form one block that cannot be split"


def remove_by_channels(job: PruneJob) -> Details:
    """Remove channels; the model's class becomes its narrowed one where its config cannot say so."""
    options, denoiser = job.options, job.model.denoiser
    if not job.model.architecture.channels:
        raise UserError(
            f"channels of a {type(denoiser).__name__} are not cut yet: which of them go together is "
            "not known; give --mechanism nm, weights, obs-nm or obs-weights, or see "
            "docs/guides/add-a-family.md"
        )
    kind, ratio = parse_target(options.target)
    before = {name: widths(layer) for name, layer in job.layers.items()}
    plan, groups, round_to = _channel_plan(job, kind, ratio)
    remove_channels(denoiser, plan)
    job.model.denoiser = as_narrowed(denoiser)
    if options.channels.reinitialise:
        job.model.denoiser = _fresh(job.model.denoiser, options.seed)
    changes = {name: [old, widths(job.layers[name])] for name, old in before.items()}
    free = {coupling.layer for group in groups for coupling in group.couplings}
    achieved = float(plan.figures[f"{kind}_removed"])
    inside = job.model.architecture.channels == "inside"
    what = (
        "heads go whole, hidden units" if inside else "channels go in whole norm groups or heads,"
    )
    why = f"{what} in multiples of {round_to}; a smaller --round-to makes finer steps"
    return requested(kind, ratio, achieved, why) | {
        "round_to": round_to,
        "norms_regrouped": len(plan.regrouped),
        "layers": changes,
        "dense": {name: TIED for name in before if name not in free},
    }


def _groups(job: PruneJob, round_to: int) -> list[ChannelGroup]:
    """What may be removed together; of the blocks' insides, what `--targets` names."""
    options, known = job.options.channels, job.model.architecture
    protect = [n for n in known.protect if not (options.narrow_ends and n in known.ends)]
    find = inner_groups if known.channels == "inside" else channel_groups
    groups = find(job.model.denoiser, job.model.example(), protect=protect, round_to=round_to)
    if not groups and find is inner_groups:
        raise UserError(
            f"nothing inside the blocks of a {type(job.model.denoiser).__name__} can be cut by itself; "
            "give --mechanism depth, nm, weights, obs-nm or obs-weights"
        )
    if not job.options.targets:
        return groups
    named = [g for g in groups if all(c.layer in job.layers for c in g.couplings)]
    if groups and not named:
        whole = ", ".join(sorted({c.layer for c in groups[0].couplings}))
        raise UserError(
            f"--targets: no channels are shared by these layers alone; {whole} are cut together"
        )
    return named


def _channel_plan(
    job: PruneJob, kind: str, ratio: float
) -> tuple[ChannelPlan, list[ChannelGroup], int]:
    """The plan at the coarsest rounding that reaches the target, its groups, and that rounding.

    Raises `OutOfReach` where no rounding does.
    """
    options, denoiser, scores = job.options, job.model.denoiser, None
    plain = options.channels.loadable_by == "transformers"
    for round_to in job.roundings:
        groups = _groups(job, round_to)
        scores = scores or job.scores()
        try:
            plan = plan_channels(
                denoiser,
                groups,
                scores=scores,
                ratio=ratio,
                target_kind=kind,  # type: ignore[arg-type]
                positions=job.positions,
                macs=job.macs if job.model.architecture.channels == "inside" else None,
                reduction=options.channels.reduction,
                max_ratio=options.channels.max_layer_ratio,
                fits=partial(_loads_plainly, denoiser) if plain else None,
            )
        except OutOfReach:
            if round_to == job.roundings[-1]:
                raise
            continue
        # the target channels= never raises
        if plan.figures[f"{kind}_removed"] >= SHORT * ratio or round_to == job.roundings[-1]:
            break
    if round_to != job.roundings[0]:
        job.progress.say(
            f"{kind}={ratio:g} is out of reach with widths in multiples of {job.roundings[0]}: "
            f"they are multiples of {round_to}"
        )
    return plan, groups, round_to


def _loads_plainly(network: Any, plan: ChannelPlan) -> bool:
    """Whether the network's own config can say the widths of a plan."""
    memo = {id(p): torch.empty_like(p, device="meta") for p in network.parameters()}
    twin = deepcopy(network, memo)
    remove_channels(twin, plan)
    return loads_plainly(twin)


def _fresh(denoiser: Any, seed: int) -> Any:
    """The same architecture with newly initialised weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "reinitialise"))
        kind = type(denoiser)
        build = getattr(kind, "from_config", kind)  # diffusers, transformers
        fresh = build(denoiser.config)
    return fresh.eval()
