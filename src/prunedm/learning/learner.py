"""One step of mask learning: from problems to a loss whose gradient the logits follow."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from prunedm.architecture import answer
from prunedm.learning.estimator import Estimator, Trial
from prunedm.learning.logits import MaskLogits
from prunedm.learning.memo import Memo
from prunedm.networks.layer_kinds import oriented, weight_of
from prunedm.task import Batch

Wanted = Callable[[Batch], torch.Tensor]  # the wanted output, NCHW


class Learner(nn.Module):
    """The trained module: logits, the estimator's averages, and with `train_weights` the denoiser.

    A frozen denoiser is not registered in it: it is not copied, saved in checkpoints, or set to
    training mode.
    wanted: distillation target. share: its weight in the loss; the data loss gets 1 - share.
    mask_loss_weight: factor of the logits' gradient. first_losses: cache of the first masks' losses.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        logits: MaskLogits,
        estimator: Estimator,
        *,
        wanted: Wanted | None = None,
        share: float = 0.0,
        train_weights: bool = False,
        mask_loss_weight: float = 1.0,
        keep_magnitude: float = 0.0,
        first_losses: Memo | None = None,
    ) -> None:
        super().__init__()
        self.logits, self.estimator = logits, estimator
        self.wanted, self.share, self.keep_magnitude = wanted, share, keep_magnitude
        self.first_losses = first_losses or Memo(0)
        if train_weights:
            self.denoiser = denoiser
        self._network = [denoiser]  # in a list, so that it is not registered
        for parameter in logits.parameters():
            parameter.register_hook(lambda gradient: gradient * mask_loss_weight)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The masked weights, without masks, as [O, I, *taps]."""
        network = self._network[0]
        return {name: weight_of(network.get_submodule(name)) for name in self.logits.shapes}

    def forward(self, batch: Batch, progress: float, generator: torch.Generator) -> torch.Tensor:
        """The estimator's loss on these problems; `progress` and `generator` as in `Trial`.

        The network runs under the caller's autocast, the estimator in full precision.
        """
        network, device = self._network[0], self.logits.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        target = self.wanted(batch) if self.wanted and self.share else None
        dense = self.weights

        def losses(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
            with autocast:
                masked = {
                    f"{name}.weight": oriented(network.get_submodule(name), weight)
                    for name, weight in weights.items()
                }
                output = answer(network, batch.inputs, weights=masked)
            data = batch.losses(output) if self.share < 1 else 0.0
            if target is None:
                return torch.as_tensor(data)
            return (1 - self.share) * data + self.share * batch.distances(output, target)

        def first_loss() -> torch.Tensor:
            first = {n: dense[n] * m.to(device) for n, m in self.logits.first}
            return self.first_losses(batch, lambda _: losses(first)).mean()

        trial = Trial(
            run=lambda weights: losses(weights).mean(),
            first_loss=first_loss,
            weights=dense,
            progress=progress,
            generator=generator,
            keep_magnitude=self.keep_magnitude * (1 - progress),
        )
        with torch.autocast(device, enabled=False):  # logits need full precision
            loss: torch.Tensor = self.estimator(self.logits, trial)
        return loss
