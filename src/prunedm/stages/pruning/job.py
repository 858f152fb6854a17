"""The job that a pruning mechanism is given, and its target: asked for, reached, and why."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from prunedm.errors import UserError
from prunedm.evaluation.size import count_macs, count_parameters
from prunedm.folder import Model
from prunedm.masks import Pattern
from prunedm.networks.layer_kinds import width_of
from prunedm.networks.layers import layer_positions, prunable_layers
from prunedm.options import PruneOptions, parse_target
from prunedm.progress import Progress
from prunedm.removal.allocation import Choice
from prunedm.removal.weights import share_of_weights
from prunedm.stages.inputs import DataSet, score_weights
from prunedm.tables import SCORES

Details = dict[str, Any]


@dataclass(frozen=True)
class PruneJob:
    """The input of a mechanism."""

    model: Model
    options: PruneOptions
    data: DataSet | None  # None where the network cannot be run, and need not be
    progress: Progress

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        return prunable_layers(self.model.denoiser, self.options.targets)

    @cached_property
    def roundings(self) -> list[int]:
        """Multiples to round widths to, best first: the one asked for, or all candidates.

        Kernels work in blocks of 16 channels; narrow models need finer steps, odd widths the finest.
        """
        if self.options.channels.round_to:
            return [self.options.channels.round_to]
        widest = max(widths(layer)[1] for layer in self.layers.values())
        return [step for step in (16, 8, 4, 2, 1) if step <= (16 if widest > 64 else 8)]

    @cached_property
    def macs(self) -> int:
        """MACs of the whole model, for one image."""
        return count_macs(self.model.denoiser, self.model.example())

    @cached_property
    def positions(self) -> dict[str, int]:
        return layer_positions(self.model.denoiser.cpu(), self.model.example())

    def scores(self) -> dict[str, torch.Tensor]:
        """Scores of the current model, which ends on the CPU."""
        scores = score_weights(
            self.model, self.layers, self.options, self.data, progress=self.progress
        )
        self.model.denoiser.cpu()
        return scores


def left_out(network: nn.Module) -> dict[str, str]:
    """Weights that no mechanism takes, and why: experts that transformers keeps in one tensor."""
    return {
        name: "experts in one tensor of three dimensions are not pruned"
        for name, parameter in network.named_parameters()
        if parameter.ndim == 3 and ".experts." in name
    }


def share_to_remove(job: PruneJob, kind: str, ratio: float) -> float:
    """The share of the layers' weights, or of their MACs, that meets the target."""
    total, positions = count_parameters(job.model.denoiser), None
    if kind == "macs":
        total, positions = job.macs, job.positions
    weights = {name: layer.get_parameter("weight").numel() for name, layer in job.layers.items()}
    return share_of_weights(kind, ratio, weights=weights, total=total, positions=positions)


def removed_share(job: PruneJob, kind: str) -> float:
    """The share that the masks remove, in the kind of the target."""
    masks = job.model.masks
    assert masks is not None
    gone = {name: int((~mask).sum()) for name, mask in masks}
    if kind == "macs":
        return sum(count * job.positions[name] for name, count in gone.items()) / job.macs
    if kind == "params":
        return sum(gone.values()) / count_parameters(job.model.denoiser)
    return sum(gone.values()) / sum(m.get_parameter("weight").numel() for m in job.layers.values())


def requested(kind: str, ratio: float, achieved: float, why: str) -> Details:
    """The share asked for and the share reached, with the reason where they differ by over 1 %."""
    details: Details = {"requested": {kind: ratio}, "achieved": {kind: achieved}}
    if abs(achieved - ratio) > 0.01 * ratio:
        details["reason"] = f"{kind}={achieved:.4f} is the nearest: {why}"
    return details


def widths(layer: nn.Module) -> list[int]:
    """Input and output channels."""
    return [width_of(layer, "in"), width_of(layer, "out")]


def check_options(options: PruneOptions, model: Model) -> None:
    """Raise `UserError` for options that the mechanism or the model does not support."""
    kind, ratio = parse_target(options.target)
    if model.unasked and asks(options):
        raise UserError(
            f"{model.unasked}. Masks that need no run work: --mechanism nm or weights, --score "
            "magnitude or random"
        )
    if model.scheduler is not None:
        model.process.time_range(options.time_range)
    if kind == "blocks" and options.mechanism != "depth":
        raise UserError(f"--target blocks= is for --mechanism depth; others take params={ratio:g}")
    if options.channels.loadable_by == "transformers":
        if not model.architecture.text:
            raise UserError("--loadable-by transformers is for language models")
        if options.mechanism != "channels":
            raise UserError(
                "--loadable-by is for --mechanism channels; what the others make loads anyway"
            )
    if options.mechanism in ("channels", "depth"):
        _check_structure(options, model, kind, ratio)
        return
    nm, by_layer = options.mechanism.endswith("nm"), options.allocation == "sensitivity"
    if kind == "channels":
        raise UserError(f"--target channels= is for channels; weights take weights={ratio:g}")
    if nm and not by_layer and "target" in options.model_fields_set:
        raise UserError(
            "--target: N:M removes what its pattern says; --allocation sensitivity meets a target"
        )
    scored = options.permute or by_layer
    if options.mechanism.startswith("obs") and "score" in options.model_fields_set and not scored:
        raise UserError(
            f"--score {options.score}: {options.mechanism} goes by its own Hessian; leave the score "
            f"out, or --mechanism {'nm' if nm else 'weights'}"
        )
    for text in options.sensitivity.candidates:
        if isinstance(choice_of(text), Pattern) != nm:
            takes = "patterns like 2:4" if nm else "ratios like 0.5"
            raise UserError(f"candidate {text!r}: {options.mechanism} takes {takes}")


def _check_structure(options: PruneOptions, model: Model, kind: str, ratio: float) -> None:
    depth, known = options.mechanism == "depth", model.architecture.channels
    if options.targets and (depth or known != "inside"):
        why = "depth takes whole blocks" if depth else "channels are coupled across the network"
        raise UserError(f"--targets narrows weights and nm; {why}")
    if kind == "weights" or (depth and kind == "channels"):
        what = "single weights" if kind == "weights" else "channels"
        raise UserError(
            f"--target {kind}= is for {what}; --mechanism {options.mechanism} takes params={ratio:g}"
        )
    if depth and "score" in options.model_fields_set:
        raise UserError(
            f"--score {options.score}: depth goes by the blocks' influence; leave it out"
        )


def asks(options: PruneOptions) -> bool:
    """Whether the network is run, on problems or on examples."""
    kind, _ = parse_target(options.target)
    return (
        options.mechanism not in ("nm", "weights")
        or SCORES[options.score].needs_problems
        or options.permute
        or options.allocation == "sensitivity"
        or (options.mechanism == "weights" and kind == "macs")
    )


def choice_of(text: str) -> Choice:
    """'2:4' => a pattern, '0.5' => a share removed."""
    if ":" in text:
        pattern = Pattern.parse(text)
        if pattern.m > 16:
            raise UserError(f"candidate {text}: groups have at most 16 channels; try 2:4")
        return pattern
    try:
        ratio = float(text)
    except ValueError:
        raise UserError(
            f"candidate {text!r} is neither an N:M pattern nor a ratio; try 2:4 or 0.5"
        ) from None
    if not 0 < ratio < 1:
        raise UserError(f"candidate {text} is not between 0 and 1; dense is always among them")
    return ratio
