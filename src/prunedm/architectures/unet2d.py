"""UNet2DModel: DDPM (Ho et al. 2020) and its kin, on pixels or on latents."""

from prunedm.architecture import Architecture, told_as_named

RECORD = Architecture(
    told=told_as_named,
    protect=("conv_in", "conv_out", "time_embedding", "class_embedding"),
    ends=("conv_in", "conv_out"),
    blocks=(r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"),
    precise=("conv_in", "conv_out", "time_embedding", "class_embedding", r".*time_emb_proj"),
    channels="all",
    tiny={
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    },
)
