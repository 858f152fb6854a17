"""What an evaluation found out about one model, and under which conditions: one row of the table."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from prunedm.record import Record


class LayerSparsity(BaseModel):
    """What is left of one prunable layer."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    pattern: str = ""  # "2:4" where the layer has an N:M mask
    valid: float | None = None  # share of its groups that are N:M
    why_dense: str = ""  # of a layer without a mask in a model that has masks


class Timing(BaseModel):
    """One way to call the denoiser, and how long it takes."""

    batch: int
    dtype: str  # "float32", "bf16 autocast"
    threads: int
    compiled: bool = False
    kernel: str = "dense"  # what really ran: "dense", "semi-structured", ...
    median_ms: float
    spread_ms: float  # half the distance between the quartiles

    @property
    def images_per_s(self) -> float:
        return 1000 * self.batch / self.median_ms


class Figures(BaseModel):
    """Measured figures. None where a figure was not asked for or does not apply."""

    loss: float
    loss_se: float
    fd: float | None = None  # Fréchet distance of samples to held-out images
    fd_se: float | None = None  # standard error of `fd` over the samples, by bootstrap
    kid: float | None = None  # kernel distance in the same features, times 1000
    kid_se: float | None = None
    precision: float | None = None  # share of samples within the manifold of held-out images
    precision_se: float | None = None
    recall: float | None = None  # share of held-out images within the manifold of samples
    recall_se: float | None = None
    ssim: float | None = None  # to the dense model's images from the same noise, median
    ssim_se: float | None = None
    psnr_db: float | None = None  # to the dense model's images from the same noise, median
    psnr_se: float | None = None
    loss_change: float | None = None  # to the dense model's loss, problem by problem
    loss_change_se: float | None = None
    params: int
    nonzero: int
    macs: int  # of one image through the denoiser once, attention included
    bytes_disk: int
    bytes_packed: int  # half precision; layers with N:M masks as kept values + one bit a weight
    latency_ms: float | None = None  # one denoiser call, median
    latency_spread_ms: float | None = None  # half the distance between the quartiles
    timings: list[Timing] = Field(default_factory=list)  # the first is `latency_ms`
    peak_memory_mb: float | None = None  # of one denoiser call at the largest timed batch
    pattern: str = ""  # "2:4" where the model has N:M masks
    nm_valid: float | None = None  # share of groups that are N:M, over the masked layers
    nm_layers: int = 0  # layers with a mask
    nm_dense: dict[str, str] = Field(default_factory=dict)  # prunable layers left dense, and why


class Conditions(BaseModel):
    """Without these, the figures mean nothing."""

    dataset: str
    problems: int  # held-out denoising problems behind `loss`
    samples: int
    sampler: str  # "ddim-50"
    seed: int
    features: str  # "FD (digits-cnn)", "FID" only for the Inception network
    reference: int  # held-out images behind `fd`
    device: str
    dtype: str
    latency_batch: int
    latency_repeats: int = 0  # timed calls behind a median, after the warm-up


class Asked(BaseModel):
    """One pruning of the lineage: what was asked for, and what came out."""

    what: str  # "params", "pattern", ...
    asked: float | str
    got: float | str
    reason: str = ""  # where the two differ


class Step(BaseModel):
    """One step of an evaluation and how it ended; `error` also says why a step was skipped."""

    step: str
    model: str = ""  # the label; "" for a step of all models
    status: Literal["done", "failed", "skipped"]
    seconds: float = 0.0
    error: str = ""


class Evaluation(BaseModel):
    """One model's row: its label ("dense", "1-prune", ...), figures, conditions and records."""

    label: str
    model: str
    hash: str
    figures: Figures
    conditions: Conditions
    record: Record | None = None
    layers: list[LayerSparsity] = Field(default_factory=list)
    asked: list[Asked] = Field(default_factory=list)
    reloads: bool | None = None  # loaded again, it gives the same output to the bit
    failed: dict[str, str] = Field(default_factory=dict)  # step -> its error; the rest went on
    samples_file: str = (
        ""  # uint8 NHWC .npz beside the results, from the same noise for every model
    )
    curve: dict[str, Any] = Field(
        default_factory=dict
    )  # {"losses": [...], "held_out": [[step, loss]]}
