"""HunyuanDiT2DModel: Hunyuan-DiT (Li et al. 2024), whose texts a CLIP and a T5 encode."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from prunedm.architecture import Architecture, Inputs, told_as_hidden_states


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """The sample is `hidden_states`; adds rotary positions, an image size and one style."""
    names = told_as_hidden_states(network, inputs)
    sample = names["hidden_states"]
    count, _, *size = sample.shape
    patch = network.config.patch_size
    grid = tuple(side // patch for side in size)
    rotary = get_2d_rotary_pos_embed(
        network.config.attention_head_dim,
        get_resize_crop_region_for_grid(grid, 64 // patch),
        grid,
        device=sample.device,
        output_type="pt",
    )
    meta = torch.tensor(
        [1024, 1024, *(8 * side for side in size), 0, 0], dtype=sample.dtype, device=sample.device
    )
    return names | {
        "timestep": names["timestep"].to(sample.dtype),
        "image_meta_size": meta.repeat(count, 1),
        "style": torch.zeros(count, dtype=torch.long, device=sample.device),
        "image_rotary_emb": rotary,
    }


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """CLIP's and T5's states and their masks."""
    config = network.config

    def states(length: int, width: int) -> torch.Tensor:
        return torch.randn(count, length, width, generator=generator)

    def mask(length: int) -> torch.Tensor:
        return (torch.arange(length) < length // 2).long().repeat(count, 1)

    return {
        "encoder_hidden_states": states(config.text_len, config.cross_attention_dim),
        "text_embedding_mask": mask(config.text_len),
        "encoder_hidden_states_t5": states(config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": mask(config.text_len_t5),
    }


def prompts(pipeline: Any, text: str) -> Inputs:
    """Encodings of a text by CLIP and T5."""
    rows: dict[str, torch.Tensor] = {}
    for index, name in enumerate(("", "_t5")):
        states, _, mask, _ = pipeline.encode_prompt(
            text, device="cpu", do_classifier_free_guidance=False, text_encoder_index=index
        )
        rows |= {"encoder_hidden_states" + name: states, "text_embedding_mask" + name: mask}
    return rows


EMBEDDINGS = ("pos_embed", "time_extra_emb", "text_embedder", "norm_out", "proj_out")
RECORD = Architecture(
    component="transformer",
    told=told,
    more=more,
    prompts=prompts,
    protect=EMBEDDINGS,
    ends=("pos_embed", "proj_out"),
    blocks=(r"blocks\.\d+",),
    precise=EMBEDDINGS,
    pipeline="HunyuanDiTPipeline",
    tiny={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "hidden_size": 16,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
        "text_len": 7,
        "text_len_t5": 8,
    },
)
