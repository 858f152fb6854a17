"""SR-STE (Zhou et al. 2021): the masks follow the trained weights' magnitudes, step by step."""

import torch

from prunedm.learning.estimator import ByLayer, Estimator, Method, Trial
from prunedm.learning.logits import MaskLogits


class SrSte(Estimator):
    """Removed weights get the dense gradient and decay: g + `decay` * (1 - m) * w.

    Requires trained weights. The logits are not learned: they are |w|.
    """

    def __init__(self, decay: float = 2e-4) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, logits: MaskLogits, trial: Trial) -> torch.Tensor:
        self.after_step(logits, trial.weights)
        masked, decayed = {}, torch.zeros((), device=logits.device)
        for name, mask in logits.mode():
            removed = trial.weights[name] * ~mask
            masked[name] = trial.weights[name] - removed.detach()  # forward w m, backward 1
            decayed = decayed + removed.square().sum()
        # with several processes, every parameter needs a gradient
        nothing = torch.stack([0 * l_GM.sum() for l_GM in logits.groups]).sum()
        return trial.run(masked) + self.decay / 2 * (decayed - decayed.detach()) + nothing

    @torch.no_grad()
    def after_step(self, logits: MaskLogits, weights: ByLayer) -> None:
        sizes = logits.to_groups({name: weight.abs() for name, weight in weights.items()})
        for l_GM, size_GM in zip(logits.groups, sizes, strict=True):
            l_GM.copy_(size_GM)


SR_STE = Method(lambda options: SrSte(options.sr_ste.decay), lr=1.0, logits=1.0)
