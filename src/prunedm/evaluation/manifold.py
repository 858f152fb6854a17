"""Precision and recall of a generator (Kynkäänniemi et al. 2019, arXiv:1904.06991).

A set's manifold is the union of balls around its images, each with the distance to the image's k-th
neighbour in the set as its radius. Shapes: N images, D features, K images of one chunk.
"""

import math
from collections.abc import Iterator

import torch

from prunedm.errors import UserError
from prunedm.evaluation.metric import Measurement, Metric, Subject, fixed


def precision_recall(
    real_ND: torch.Tensor,
    generated_ND: torch.Tensor,
    *,
    neighbours: int = 3,
    chunk: int = 512,
) -> tuple[float, float]:
    """Share of generated images in the real manifold, and of real images in the generated one.

    Holds `chunk` x N distances at a time, in float64, on the features' device. Raises `UserError` for
    features of different dimensions, and for sets with too few images for `neighbours`.
    """
    if real_ND.ndim != 2 or real_ND.shape[1:] != generated_ND.shape[1:]:
        raise UserError(
            f"features are {tuple(real_ND.shape)} and {tuple(generated_ND.shape)}; "
            "compute both with one network"
        )
    fewest = min(len(real_ND), len(generated_ND))
    if fewest <= neighbours:
        raise UserError(
            f"{fewest} images are too few for {neighbours} neighbours each; give more images"
        )
    # a common shift keeps the distances and reduces rounding errors
    center_D = real_ND.double().mean(0)
    real_ND, generated_ND = real_ND.double() - center_D, generated_ND.double() - center_D
    return (
        _share_inside(generated_ND, real_ND, neighbours, chunk),
        _share_inside(real_ND, generated_ND, neighbours, chunk),
    )


def share_error(share: float, count: int) -> float:
    """Binomial standard error of a share of `count` images, for a fixed manifold."""
    return math.sqrt(share * (1 - share) / count)


def _share_inside(points_ND: torch.Tensor, set_ND: torch.Tensor, k: int, chunk: int) -> float:
    radii_N = torch.cat(
        [  # the nearest, at distance zero, is the image itself
            squares_KN.kthvalue(k + 1, dim=1).values
            for squares_KN in _squares(set_ND, set_ND, chunk)
        ]
    )
    inside = sum(
        int((squares_KN <= radii_N).any(dim=1).sum())
        for squares_KN in _squares(points_ND, set_ND, chunk)
    )
    return inside / len(points_ND)


def _squares(a_ND: torch.Tensor, b_ND: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Squared distances (K, N), chunk by chunk of `a_ND`, clamped at zero."""
    norms_N = b_ND.square().sum(1)
    for rows_KD in a_ND.split(chunk):
        squares_KN = torch.addmm(norms_N, rows_KD, b_ND.T, alpha=-2)
        squares_KN += rows_KD.square().sum(1, keepdim=True)
        yield squares_KN.clamp_(min=0)


def _figures(of: Subject) -> dict[str, float]:
    own_ND, real_ND = of.compared_ND
    precision, recall = precision_recall(real_ND, own_ND)
    return {
        "precision": precision,
        "precision_se": share_error(precision, len(own_ND)),
        "recall": recall,
        "recall_se": share_error(recall, len(real_ND)),
    }


_BOTH = Measurement("precision and recall", "features", _figures)
PRECISION = Metric(
    "precision",
    "precision",
    "share of the samples within the manifold of held-out images",
    fixed(3),
    _BOTH,
    better="higher",
    spread="precision_se",
    of="images",
)
RECALL = Metric(
    "recall",
    "recall",
    "share of the held-out images within the manifold of samples",
    fixed(3),
    _BOTH,
    better="higher",
    spread="recall_se",
    of="images",
)
