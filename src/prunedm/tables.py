"""Every method by name, with the place of its object: one lazy table per kind.

To add one: a file with the object, and a line here. An option's choices are the names of a table, in
the command line, recipes and schemas; an object is imported when it is first used.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

T_co = TypeVar("T_co", covariant=True)


class Table(Mapping[str, T_co]):
    """name -> the object at "module:attribute", imported on first access."""

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> T_co:
        module, _, attribute = self.places[name].partition(":")
        found: T_co = getattr(import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.places  # a Mapping would import it

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


SCORES: Table[Any] = Table(
    {
        "random": "prunedm.scores.random:RANDOM",
        "magnitude": "prunedm.scores.magnitude:MAGNITUDE",
        "magnitude-l2": "prunedm.scores.magnitude:MAGNITUDE_L2",
        "taylor": "prunedm.scores.taylor:TAYLOR",
        "taylor-multivariable": "prunedm.scores.taylor:TAYLOR_MULTIVARIABLE",
        "diff-pruning": "prunedm.scores.taylor:DIFF_PRUNING",
        "wanda": "prunedm.scores.wanda:WANDA",
        "fluctuation": "prunedm.scores.wanda:FLUCTUATION",
    }
)
MECHANISMS: Table[Any] = Table(
    {
        "channels": "prunedm.stages.pruning.channels:remove_by_channels",
        "depth": "prunedm.stages.pruning.depth:remove_depth",
        "weights": "prunedm.stages.pruning.mechanisms:remove_weights",
        "nm": "prunedm.stages.pruning.mechanisms:remove_nm",
        "obs-weights": "prunedm.stages.pruning.mechanisms:remove_weights",
        "obs-nm": "prunedm.stages.pruning.mechanisms:remove_nm",
    }
)
ESTIMATORS: Table[Any] = Table(
    {
        "relaxed": "prunedm.learning.relaxation:RELAXED",
        "straight-through": "prunedm.learning.straight_through:STRAIGHT_THROUGH",
        "policy-gradient": "prunedm.learning.policy_gradient:POLICY_GRADIENT",
        "policy-gradient-classic": "prunedm.learning.policy_gradient:CLASSIC",
        "sr-ste": "prunedm.learning.sr_ste:SR_STE",
    }
)
FORMATS: Table[Any] = Table(
    {
        "packed": "prunedm.stages.exporting.packed:PACKED",
        "onnx": "prunedm.stages.exporting.onnx:ONNX",
        "openvino": "prunedm.stages.exporting.openvino:OPENVINO",
        "torch": "prunedm.stages.exporting.torch_program:TORCH",
        "tensorrt": "prunedm.stages.exporting.tensorrt:TENSORRT",
    }
)
METRICS: Table[Any] = Table(
    {  # in the order of the columns
        "loss": "prunedm.evaluation.loss:LOSS",
        "perplexity": "prunedm.evaluation.perplexity:PERPLEXITY",
        "perplexity_strided": "prunedm.evaluation.perplexity:STRIDED",
        "fd": "prunedm.evaluation.fid:FD",
        "kid": "prunedm.evaluation.kid:KID",
        "precision": "prunedm.evaluation.manifold:PRECISION",
        "recall": "prunedm.evaluation.manifold:RECALL",
        "psnr_db": "prunedm.evaluation.paired:PSNR",
        "ssim": "prunedm.evaluation.paired:SSIM",
        "params": "prunedm.evaluation.size:PARAMS",
        "nonzero": "prunedm.evaluation.size:NONZERO",
        "sparsity": "prunedm.evaluation.size:SPARSITY",
        "macs": "prunedm.evaluation.size:MACS",
        "bytes_disk": "prunedm.evaluation.size:DISK",
        "bytes_packed": "prunedm.evaluation.size:PACKED",
        "compression": "prunedm.evaluation.size:COMPRESSION",
        "latency_ms": "prunedm.evaluation.speed:LATENCY",
        "peak_memory_mb": "prunedm.evaluation.profiling:PEAK_MEMORY",
        "nm_valid": "prunedm.evaluation.size:NM_VALID",
    }
)
TRACKERS: Table[Any] = Table(
    {
        "none": "prunedm.training.services:NONE",
        "tensorboard": "prunedm.training.trackers.tensorboard:TENSORBOARD",
        "wandb": "prunedm.training.trackers.wandb:WANDB",
        "trackio": "prunedm.training.trackers.trackio:TRACKIO",
        "swanlab": "prunedm.training.trackers.swanlab:SWANLAB",
    }
)
