"""DiTTransformer2DModel: DiT (Peebles & Xie 2023), with ImageNet's classes and a null class."""

from prunedm.architecture import Architecture, told_as_hidden_states

RECORD = Architecture(
    component="transformer",
    pipeline="DiTPipeline",
    told=told_as_hidden_states,
    classes=lambda network: network.config.num_embeds_ada_norm,  # without the null class
    protect=("pos_embed", "proj_out_1", "proj_out_2", r"transformer_blocks\.\d+\.norm1\.emb"),
    ends=("pos_embed", "proj_out_2"),
    blocks=(r"transformer_blocks\.\d+",),
    precise=("pos_embed", "proj_out_1", "proj_out_2", r".*\.norm1\.emb"),
    tiny={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 8,
    },
)
