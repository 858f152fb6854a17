"""AuraFlowTransformer2DModel: AuraFlow (Fal 2024), an MMDiT that flow matching trains."""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs, told_as_hidden_states


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """A noisy sample is `hidden_states`; the timestep goes from 0 to 1."""
    names = told_as_hidden_states(network, inputs)
    return names | {"timestep": names["timestep"] / 1000}


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """T5's states (N, 256, D)."""
    width = network.config.joint_attention_dim
    return {"encoder_hidden_states": torch.randn(count, 256, width, generator=generator)}


def prompts(pipeline: Any, text: str) -> Inputs:
    """What T5 makes of a text."""
    states, *_ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, device="cpu")
    return {"encoder_hidden_states": states}


EMBEDDINGS = ("pos_embed", "context_embedder", "time_step_proj", "norm_out", "proj_out")
RECORD = Architecture(
    component="transformer",
    told=told,
    more=more,
    prompts=prompts,
    protect=EMBEDDINGS,
    ends=("pos_embed", "proj_out"),
    blocks=(r"joint_transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
    precise=EMBEDDINGS,
    pipeline="AuraFlowPipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    tiny={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    },
)
