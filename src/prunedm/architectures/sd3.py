"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs

TOKENS = 77 + 256  # of the two CLIP encoders, and of T5


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """A noisy sample is `hidden_states` here."""
    return {("hidden_states" if name == "sample" else name): x for name, x in inputs.items()}


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """Text states (N, L, D), and a pooled one."""
    config = network.config
    width, pooled = config.joint_attention_dim, config.pooled_projection_dim
    return {
        "encoder_hidden_states": torch.randn(count, TOKENS, width, generator=generator),
        "pooled_projections": torch.randn(count, pooled, generator=generator),
    }


def prompts(pipeline: Any, text: str) -> Inputs:
    """What the three encoders make of a text."""
    states, _, pooled, _ = pipeline.encode_prompt(
        text, text, text, device="cpu", do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


EMBEDDINGS = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")
RECORD = Architecture(
    component="transformer",
    pipeline="StableDiffusion3Pipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    told=told,
    classes=lambda network: 0,
    more=more,
    prompts=prompts,
    protect=EMBEDDINGS,
    ends=("pos_embed", "proj_out"),
    blocks=(r"transformer_blocks\.\d+",),
    precise=EMBEDDINGS,
)
