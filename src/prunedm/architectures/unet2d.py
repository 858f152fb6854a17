"""UNet2DModel: DDPM (Ho et al. 2020) and its kin, on pixels or on latents."""

from prunedm.architecture import Architecture

RECORD = Architecture(
    protect=("conv_in", "conv_out", "time_embedding", "class_embedding"),
    ends=("conv_in", "conv_out"),
    blocks=(r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"),
    precise=("conv_in", "conv_out", "time_embedding", "class_embedding", r".*time_emb_proj"),
)
