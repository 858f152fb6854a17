"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs, More, told_as_hidden_states

TOKENS = 77 + 256  # of the two CLIP encoders, and of T5


def states_and_pooled(tokens: int) -> More:
    """Text states (N, tokens, D), and a pooled one (N, D)."""

    def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
        config = network.config
        shapes = {
            "encoder_hidden_states": (count, tokens, config.joint_attention_dim),
            "pooled_projections": (count, config.pooled_projection_dim),
        }
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    return more


def prompts(pipeline: Any, text: str) -> Inputs:
    """Encodings of a text by the three encoders."""
    states, _, pooled, _ = pipeline.encode_prompt(
        text, text, text, device="cpu", do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


SHAPES: dict[str, Any] = {  # of a tiny MMDiT
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
}
EMBEDDINGS = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
RECORD = Architecture(
    component="transformer",
    pipeline="StableDiffusion3Pipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    told=told_as_hidden_states,
    more=states_and_pooled(TOKENS),
    prompts=prompts,
    protect=EMBEDDINGS,
    ends=("pos_embed", "proj_out"),
    blocks=(r"transformer_blocks\.\d+",),
    precise=EMBEDDINGS,
    tiny=SHAPES
    | {
        "num_layers": 2,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
)
