"""UNet2DConditionModel: Stable Diffusion 1 and 2 (Rombach et al. 2022), SDXL (Podell et al. 2023)."""

from dataclasses import replace
from typing import Any

import torch

from prunedm.architecture import Inputs
from prunedm.architectures import unet2d

TOKENS = 77  # of CLIP's text encoder
_ADDED = ("text_embeds", "time_ids")  # SDXL's, in a dictionary of their own


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """The shared names, with SDXL's additions in `added_cond_kwargs`."""
    added = {name: inputs[name] for name in _ADDED if name in inputs}
    others = {name: tensor for name, tensor in inputs.items() if name not in _ADDED}
    return others | ({"added_cond_kwargs": added} if added else {})


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """Text states (N, 77, D); for SDXL also a pooled one and six numbers of sizes and crops."""
    config = network.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    states = {"encoder_hidden_states": torch.randn(count, TOKENS, width, generator=generator)}
    if config.addition_embed_type != "text_time":
        return states
    times = 6 * config.addition_time_embed_dim
    pooled = config.projection_class_embeddings_input_dim - times
    return states | {
        "text_embeds": torch.randn(count, pooled, generator=generator),
        "time_ids": torch.full((count, 6), 512.0),
    }


def prompts(pipeline: Any, text: str) -> Inputs:
    """Encodings of a text by the pipeline: states, and for SDXL a pooled one and sizes."""
    made = pipeline.encode_prompt(text, device="cpu", num_images_per_prompt=1,
                                  do_classifier_free_guidance=False)  # fmt: skip
    if len(made) == 2:  # Stable Diffusion: states of the prompt, of the negative one
        return {"encoder_hidden_states": made[0]}
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    return {"encoder_hidden_states": made[0], "text_embeds": made[2], "time_ids": sizes}


RECORD = replace(
    unet2d.RECORD,
    told=told,
    more=more,
    prompts=prompts,
    pipeline="StableDiffusionPipeline",
    protect=(*unet2d.RECORD.protect, "add_embedding", "encoder_hid_proj"),
    precise=(*unet2d.RECORD.precise, "add_embedding"),
    channels="",
    tiny={
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
)
