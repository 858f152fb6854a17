"""Options of the stages that compare sets of images: fid, stats."""

from typing import Literal

from pydantic import Field

from prunedm.options.base import Device, FeatureOptions, FileName, Seed


class StatsOptions(FeatureOptions):
    """`prunedm stats`: mean and covariance of features, in pytorch-fid's file layout."""

    features: FileName = Field(
        "inception",
        description="inception, digits-cnn, or a TorchScript file (uint8 NCHW to N x D)",
    )
    num_samples: int | None = Field(None, ge=2, description="use only this many images; none: all")
    res: int | None = Field(
        None, ge=1, description="crop to the central square and resize to this side (Lanczos)"
    )
    split: Literal["train", "test"] | None = Field(
        None,
        description="only this split; none: all of a folder, a named dataset's held-out images",
    )
    skip_bad: bool = Field(False, description="skip and count files that cannot be read")
    force: bool = Field(
        False, description="accept fewer images than features: the number is biased"
    )
    batch_size: int = Field(64, ge=1, description="images at a time")
    device: Device = "auto"


class FidOptions(StatsOptions):
    """`prunedm fid`: Fréchet and other distances between two sets of images."""

    kid: bool = Field(True, description="kernel distance too (needs images on both sides)")
    prc: bool = Field(True, description="precision and recall too (needs images on both sides)")
    neighbours: int = Field(3, ge=1, description="k of the k-NN balls (precision, recall)")
    kid_subset: int = Field(1000, ge=2, description="images per side in one kernel distance")
    kid_subsets: int = Field(100, ge=2, description="kernel distances averaged")
    draws: int = Field(20, ge=2, description="bootstrap draws behind the standard error of FD")
    seed: Seed = 0
