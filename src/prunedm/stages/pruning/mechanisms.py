"""The mechanisms of `prune` that set masks: each changes the model in place and returns details.

To add one: such a function, and a line in `tables.MECHANISMS`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from prunedm.errors import UserError
from prunedm.evaluation.loss import fixed_batches
from prunedm.masks import Masks, Pattern
from prunedm.networks.chain import (
    BlockNetwork,
    KeptInputs,
    blocks_in_turn,
    chained_blocks,
    with_dense,
)
from prunedm.networks.layers import why_not_nm
from prunedm.options import parse_target
from prunedm.removal.allocation import (
    Choice,
    allocate,
    dense_targets,
    fitting,
    sensitivities,
    weight_costs,
)
from prunedm.removal.corrections import Dense
from prunedm.removal.nm import eligible_layers, nm_mask
from prunedm.removal.obs import obs_prune
from prunedm.removal.permutation import find_permutation, permute_, permuted
from prunedm.removal.weights import keep_highest, weight_masks
from prunedm.scores import score_layers
from prunedm.stages.inputs import calibration_for, calibration_problems, device_for
from prunedm.stages.pruning.job import (
    Details,
    PruneJob,
    choice_of,
    removed_share,
    requested,
    share_to_remove,
)
from prunedm.tables import SCORES
from prunedm.task import Task

Value = TypeVar("Value")
GUIDANCE = 0.5  # of OBS where options name none, and blocks are not pruned in turn
RATIOS = ("0.3", "0.5", "0.7", "0.9")  # candidates of unstructured allocation
PATTERNS = ("2:4", "1:4")  # and of N:M
STEPS = "layers take only the candidates; more --candidates make finer steps"


def remove_weights(job: PruneJob) -> Details:
    """Unstructured masks from scores, or by OBS; uniform, global or allocated ratios."""
    options = job.options
    kind, ratio = parse_target(options.target)
    share = share_to_remove(job, kind, ratio)
    obs, by_layer = options.mechanism == "obs-weights", options.allocation == "sensitivity"
    scores = {} if obs and not by_layer else job.scores()
    choices = (
        _allocated(job, scores, options.sensitivity.candidates or RATIOS)
        if by_layer
        else dict.fromkeys(job.layers, share)
    )
    if obs:
        masks = Masks(_obs(job, choices))
    elif by_layer:
        masks = Masks(_masks(scores, choices))
    else:
        positions = job.positions if kind == "macs" else None
        masks = weight_masks(scores, share, scope=options.scope, positions=positions)
    job.model.masks = masks
    details = requested(kind, ratio, removed_share(job, kind), STEPS) | _zeros(job)
    return details | {"dense": _left_dense(job, choices)} if by_layer else details


def remove_nm(job: PruneJob) -> Details:
    """N:M masks from scores, or by OBS; one pattern, or one allocated to each layer."""
    options = job.options
    obs, by_layer = options.mechanism == "obs-nm", options.allocation == "sensitivity"
    in_turn = not (by_layer or options.permute or obs) and _is_of_inputs(job)
    scores = {} if in_turn or (obs and not by_layer and not options.permute) else job.scores()
    details: Details = {"dense": {}}
    if by_layer:
        choices = _allocated(job, scores, options.sensitivity.candidates or PATTERNS)
        details["dense"] = _left_dense(job, choices)
    else:
        pattern = Pattern.parse(options.pattern)
        eligible, details["dense"] = eligible_layers(job.layers, pattern)
        choices = dict.fromkeys(eligible, pattern)
    patterns = {name: choice for name, choice in choices.items() if isinstance(choice, Pattern)}
    if options.permute:
        denoiser = job.model.denoiser
        permutation = find_permutation(denoiser, job.model.example(), scores, patterns)
        permute_(denoiser, permutation)
        # by coupled set: the share of scores that the patterns keep, before and after
        scores, details["permutation"] = permuted(scores, permutation), permutation.kept
    if in_turn:
        masks = _masks_in_turn(job, patterns)
        rest = {name: pattern for name, pattern in patterns.items() if name not in masks}
        assert not rest, f"{next(iter(rest))} is in no block"
    else:
        masks = _obs(job, patterns) if obs else _masks(scores, patterns)
    job.model.masks = Masks({name: masks[name] for name in patterns}, patterns)
    if by_layer:
        kind, ratio = parse_target(options.target)
        details |= requested(kind, ratio, removed_share(job, kind), STEPS)
        details["patterns"] = {name: str(pattern) for name, pattern in patterns.items()}
    else:
        details["requested"] = {"pattern": options.pattern}
    return details | _zeros(job)


def _is_of_inputs(job: PruneJob) -> bool:
    """Whether the score looks at inputs, and all layers are in blocks that are calibrated in turn."""
    blocks = tuple(f"{name}." for name in chained_blocks(job.model.denoiser))
    score = SCORES[job.options.score]
    return score.statistic.startswith("input") and all(n.startswith(blocks) for n in job.layers)


def _allocated(
    job: PruneJob, scores: dict[str, torch.Tensor], texts: tuple[str, ...]
) -> dict[str, Choice]:
    """Each layer's choice, from measured losses, within the target's budget."""
    options = job.options
    kind, ratio = parse_target(options.target)
    candidates = fitting(job.layers, [None, *map(choice_of, texts)])
    positions = job.positions if kind == "macs" else None
    costs = weight_costs(job.layers, candidates, positions)
    removable = sum(max(cost.values()) for cost in costs.values())
    here = share_to_remove(job, kind, ratio) * sum(
        layer.get_parameter("weight").numel() * (positions[name] if positions else 1)
        for name, layer in job.layers.items()
    )
    least = sum(min(cost.values()) for cost in costs.values())
    if least > removable - here:
        most = math.floor(1000 * ratio * (removable - least) / here) / 1000
        raise UserError(
            f"{kind}={ratio:g} cannot be reached: {most:g} is the largest with the candidates "
            f"{', '.join(texts)}; add sparser ones"
        )
    assert job.data is not None  # refused by `check_options`
    problems = calibration_problems(job.model, options, job.data)
    denoiser = job.model.denoiser.to(device_for(options.device))
    batches = fixed_batches(problems, options.sensitivity.problems)
    losses = sensitivities(
        denoiser,
        job.layers,
        lambda name, choice: _mask(scores[name], choice),
        candidates,
        batches=dense_targets(denoiser, batches),
        progress=job.progress,
    )
    job.model.denoiser.cpu()
    return allocate(losses, costs, removable - here)


def _mask(score: torch.Tensor, choice: Choice) -> torch.Tensor:
    assert choice is not None
    if isinstance(choice, Pattern):
        return nm_mask(score.abs(), choice)
    return keep_highest(score, choice)


def _masks(scores: dict[str, torch.Tensor], choices: Any) -> dict[str, torch.Tensor]:
    return {n: _mask(scores[n], choice) for n, choice in choices.items() if choice is not None}


def _obs(job: PruneJob, choices: Any) -> dict[str, torch.Tensor]:
    """Masks by OBS, which also updates the remaining weights.

    Without guidance, blocks that are chained are pruned in turn; what is in no block, with the whole.
    """
    options = job.options
    chosen = {name: choice for name, choice in choices.items() if choice is not None}
    assert job.data is not None  # refused by `check_options`
    guidance = options.obs.guidance
    if guidance is None:
        guidance = 0.0 if job.model.architecture.chained else GUIDANCE

    def prune(
        network: Any, some: dict[str, Any], problems: Task, dense: Dense | None = None
    ) -> dict[str, torch.Tensor]:
        return obs_prune(
            network,
            some,
            batches=problems.stream(
                options.calibration_problems, size=problems.fitting(options.calibration_batch)
            ),
            time_weights=options.obs.time_weights,
            damping=options.obs.damping,
            swaps=options.obs.swaps,
            refits=options.obs.refit,
            guidance=guidance,
            dense=dense,
            correction=options.obs.correction,
            memory=int(options.obs.memory * 2**30),
            progress=job.progress,
        )

    masks: dict[str, torch.Tensor] = {}
    if not guidance:
        for block in _blocks(job, dense=options.obs.correction > 0):
            own = block.inside(chosen)
            masks |= block.named(prune(block.network, own, block.problems, block.dense))
    if rest := {name: choice for name, choice in chosen.items() if name not in masks}:
        network = job.model.denoiser.to(device_for(options.device))
        problems = calibration_problems(job.model, options, job.data)
        masks |= prune(network, rest, problems)
    job.model.denoiser.cpu()
    return {name: masks[name] for name in chosen}


@dataclass(frozen=True)
class _Block:
    """A block of the network, as a network with problems of its own. name: in the whole."""

    name: str
    network: BlockNetwork
    problems: KeptInputs
    dense: Dense | None = None  # as it was before, on what such blocks make

    def inside(self, by_layer: Mapping[str, Value]) -> dict[str, Value]:
        """Those of its own layers, by their names in the block's network."""
        start = f"{self.name}."
        own = {n.removeprefix(start): v for n, v in by_layer.items() if n.startswith(start)}
        return {f"block.{name}": value for name, value in own.items()}

    def named(self, by_layer: Mapping[str, Value]) -> dict[str, Value]:
        """The inverse of `inside`."""
        return {f"{self.name}.{n.removeprefix('block.')}": v for n, v in by_layer.items()}


def _blocks(job: PruneJob, *, dense: bool = False) -> Iterator[_Block]:
    """The chained blocks in turn, each on what those before it make as they are by then."""
    options, network = job.options, job.model.denoiser
    if job.data is None or not chained_blocks(network):
        return
    problems = calibration_problems(job.model, options, job.data)
    count, size = options.calibration_problems, options.calibration_batch
    network.to(device_for(options.device))
    turns = blocks_in_turn(network, problems, count, size=size)
    if dense:
        for name, block, inputs, (before, own) in with_dense(turns):
            yield _Block(name, block, inputs, Dense(before, own.stream(count, size=own.size)))
    else:
        yield from (_Block(*turn) for turn in turns)
    network.cpu()


def _masks_in_turn(job: PruneJob, patterns: dict[str, Pattern]) -> dict[str, torch.Tensor]:
    """Masks by a score of inputs, each block's on what the masked blocks before it make (Wanda)."""
    masks: dict[str, torch.Tensor] = {}
    assert job.data is not None  # refused by `check_options`
    calibration = calibration_for(job.model, job.options, job.data)
    for block in _blocks(job):
        scores = score_layers(
            block.network,
            block.inside({name: job.layers[name] for name in patterns}),
            job.options.score,
            calibration=replace(calibration, problems=block.problems),
            progress=job.progress,
        )
        own = block.named(scores)
        found = Masks(_masks(own, {name: patterns[name] for name in own}))
        found.apply_(job.model.denoiser)
        masks |= found.by_layer
    return masks


def _left_dense(job: PruneJob, choices: Mapping[str, Choice]) -> dict[str, str]:
    """Layers without a pattern or ratio, and whether they could have one."""
    nm = job.options.mechanism.endswith("nm")
    candidates = job.options.sensitivity.candidates or PATTERNS
    sizes = [Pattern.parse(text).m for text in candidates] if nm else []
    reasons = {}
    for name in (name for name, choice in choices.items() if choice is None):
        why = [why_not_nm(job.layers[name], m) for m in sizes]
        reasons[name] = why[0] if why and why[0] and all(why) else "left dense by allocation"
    return reasons


def _zeros(job: PruneJob) -> Details:
    assert job.model.masks is not None
    return {"layers": {name: 1 - float(mask.float().mean()) for name, mask in job.model.masks}}
