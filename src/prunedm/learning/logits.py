"""The learned parameters: one logit per weight, in the N:M groups of all layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prunedm.learning.distribution import DISTRIBUTIONS, Distribution
from prunedm.masks import Masks, Pattern
from prunedm.networks.layer_kinds import from_matrix
from prunedm.networks.layers import to_groups


class MaskLogits(nn.Module):
    """Logits of all layers, one (G, M) parameter per pattern.

    Their initial mode is `first`: its kept weights lead by `lead`, and the scores, as shares of
    their group, break ties.
    """

    def __init__(
        self, first: Masks, scores: Mapping[str, torch.Tensor], *, lead: float = 1.0
    ) -> None:
        super().__init__()
        assert first.patterns.keys() == first.by_layer.keys(), "every mask must be N:M"
        self.first = first
        self.shapes = {name: mask.shape for name, mask in first}
        self.names: dict[Pattern, list[str]] = {}
        for name in self.shapes:
            self.names.setdefault(first.patterns[name], []).append(name)
        self.groups = nn.ParameterList(
            torch.cat([_lead(first.by_layer[n], scores[n], pattern.m, lead) for n in names])
            for pattern, names in self.names.items()
        )

    @property
    def patterns(self) -> list[Pattern]:
        """The pattern of each parameter in `groups`."""
        return list(self.names)

    @property
    def device(self) -> torch.device:
        return self.groups[0].device

    def distributions(self, family: str) -> list[Distribution]:
        """One per parameter in `groups`."""
        pairs = zip(self.groups, self.patterns, strict=True)
        return [DISTRIBUTIONS[family](logits, pattern.n) for logits, pattern in pairs]

    def by_layer(
        self, groups: Sequence[torch.Tensor], wanted: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Convert one (G, M) tensor per pattern to tensors in the weights' shapes.

        For all layers, or those in `wanted`.
        """
        chosen = set(self.shapes if wanted is None else wanted)
        found = {}
        for values_GM, (pattern, names) in zip(groups, self.names.items(), strict=True):
            sizes = [self.shapes[name].numel() // pattern.m for name in names]
            for name, part in zip(names, values_GM.split(sizes), strict=True):
                if name in chosen:
                    found[name] = from_matrix(part, self.shapes[name])
        return {name: found[name] for name in self.shapes if name in chosen}

    def layers_of(self, groups: Sequence[torch.Tensor]) -> list[str]:
        """The layers with any of these groups, given by index, one tensor per pattern."""
        found = []
        for index_B, (pattern, names) in zip(groups, self.names.items(), strict=True):
            sizes = torch.tensor([self.shapes[name].numel() // pattern.m for name in names])
            layer_B = torch.bucketize(index_B.cpu(), sizes.cumsum(0), right=True)
            found += [names[k] for k in layer_B.unique().tolist()]
        return found

    def to_groups(self, by_layer: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `by_layer`."""
        return [
            torch.cat([to_groups(by_layer[name], pattern.m) for name in names])
            for pattern, names in self.names.items()
        ]

    @torch.no_grad()
    def mode(self) -> Masks:
        """The most probable masks: the N largest logits of each group."""
        modes = [distribution.mode() for distribution in self.distributions(_ANY)]
        return Masks(self.by_layer(modes), self.first.patterns)

    @torch.no_grad()
    def observe(self, family: str) -> dict[str, float]:
        """Mean entropy of a group in nats; shares of groups that changed, and that keep exactly N."""
        entropies = [d.entropy() for d in self.distributions(family)]
        mode = self.mode()
        return {
            "entropy": float(torch.cat(entropies).mean()),
            "groups_changed": groups_changed(self.first, mode),
            "compliance": mode.compliance,
        }


_ANY = "conditional-bernoulli"  # all families have the same mode


def groups_changed(before: Masks, after: Masks) -> float:
    """Share of N:M groups that keep other weights."""
    changed = []
    for name, mask in before:
        m = before.patterns[name].m
        other = after.by_layer[name].to(mask.device)
        changed.append((to_groups(mask, m) != to_groups(other, m)).any(1))
    return float(torch.cat(changed).float().mean())


def _lead(mask: torch.Tensor, score: torch.Tensor, m: int, lead: float) -> torch.Tensor:
    """First logits. Scores stay below `lead`, or they would overrule a mask by another score."""
    score_GM = to_groups(score.to(mask.device).float().abs(), m)
    share_GM = score_GM / score_GM.sum(1, keepdim=True).clamp_min(1e-12)
    return (lead * to_groups(mask, m).float() + min(1.0, 0.99 * lead) * share_GM).contiguous()
