"""Depth: whole blocks, the ones that change least of what they are given."""

from prunedm.errors import UserError
from prunedm.evaluation.size import count_parameters, macs_inside
from prunedm.networks.chain import chained_blocks
from prunedm.networks.depth import block_influence, remove_blocks
from prunedm.options import parse_target
from prunedm.stages.inputs import calibration_problems, device_for
from prunedm.stages.pruning.job import Details, PruneJob, requested

NEAR = 0.005  # above what all blocks but one hold


def remove_depth(job: PruneJob) -> Details:
    """Remove the blocks of lowest influence until about the target's share is gone."""
    options, network = job.options, job.model.denoiser
    blocks = chained_blocks(network)
    if len(blocks) < 2:
        raise UserError(
            f"depth of a {type(network).__name__} is not cut yet: its blocks are not a plain chain; "
            "give --mechanism channels, nm, weights, obs-nm or obs-weights"
        )
    assert job.data is not None  # refused by `check_options`
    problems = calibration_problems(job.model, options, job.data)
    size = problems.fitting(options.calibration_batch)
    network.to(device_for(options.device))
    influence = block_influence(network, problems.stream(options.calibration_problems, size=size))
    network.cpu()
    kind, ratio = parse_target(options.target)
    costs = _costs(job, kind)
    order = sorted(influence, key=lambda name: influence[name])[: len(blocks) - 1]
    shares = [sum(costs[name] for name in order[:k]) for k in range(1, len(blocks))]
    if not shares[0] / 2 <= ratio <= shares[-1] + NEAR:
        raise UserError(
            f"{kind}={ratio:g} cannot be reached: one block is {shares[0]:.2g}, and {shares[-1]:.2g} is "
            "all but one"
        )
    count = 1 + min(range(len(shares)), key=lambda k: abs(shares[k] - ratio))
    job.model.denoiser = remove_blocks(network, order[:count])
    why = "blocks go whole"
    return requested(kind, ratio, shares[count - 1], why) | {
        "removed": sorted(order[:count], key=list(blocks).index),
        "influence": influence,
    }


def _costs(job: PruneJob, kind: str) -> dict[str, float]:
    """The share of the target's kind that each block holds."""
    blocks = chained_blocks(job.model.denoiser)
    if kind == "blocks":
        return dict.fromkeys(blocks, 1 / len(blocks))
    if kind == "params":
        total = count_parameters(job.model.denoiser)
        return {name: count_parameters(block) / total for name, block in blocks.items()}
    macs = macs_inside(job.model.denoiser, job.model.example(), blocks)
    return {name: count / job.macs for name, count in macs.items()}
