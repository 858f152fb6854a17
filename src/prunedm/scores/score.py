"""What a score is: a small pure function of a layer's weight and one statistic of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Statistic = Literal[
    "nothing", "noise", "gradient", "low-noise gradient", "input norm", "input variance"
]


@dataclass(frozen=True)
class Score:
    """`function(weight, statistic)`, and which statistic of the layer it takes."""

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    statistic: Statistic = "nothing"

    @property
    def needs_problems(self) -> bool:
        return self.statistic not in ("nothing", "noise")
