"""Options of the stages that compare sets of images: fid, stats."""

from typing import Annotated, Literal

from pydantic import Field

from prunedm.options.base import (
    TRUST,
    FileName,
    Options,
)
from prunedm.options.marks import How


class StatsOptions(Options):
    """`prunedm stats`: mean and covariance of features, in pytorch-fid's file layout."""

    features: FileName = Field(
        "inception",
        description="inception, digits-cnn, or a file of TorchScript (uint8 NCHW to N x D)",
    )
    trust_features: Annotated[bool, How()] = Field(False, description=TRUST)
    inception_weights: FileName = Field("", description="local file with the Inception weights")
    num_samples: int | None = Field(None, ge=2, description="the first so many images; none: all")
    res: int | None = Field(
        None, ge=1, description="crop to the middle square and resize to this side (Lanczos)"
    )
    split: Literal["train", "test"] | None = Field(
        None, description="only these; none: all of a folder, what a named dataset holds out"
    )
    skip_bad: bool = Field(False, description="go on without files that cannot be read; count them")
    force: bool = Field(False, description="go on with fewer images than features: a biased number")
    batch_size: int = Field(64, ge=1, description="images at a time")
    device: Annotated[Literal["auto", "cpu"], How()] = Field(
        "auto", description="auto takes a GPU if there is one"
    )


class FidOptions(StatsOptions):
    """`prunedm fid`: the Fréchet distance and others between two sets of images."""

    kid: bool = Field(True, description="the kernel distance too (needs images on both sides)")
    prc: bool = Field(True, description="precision and recall too (needs images on both sides)")
    neighbours: int = Field(3, ge=1, description="that decide an image's ball (precision, recall)")
    kid_subset: int = Field(1000, ge=2, description="images a side in one kernel distance")
    kid_subsets: int = Field(100, ge=2, description="kernel distances averaged")
    draws: int = Field(20, ge=2, description="bootstrap draws behind the standard error of FD")
    seed: int = Field(0, ge=0, description="decides every random draw")
