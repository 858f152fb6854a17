"""AuraFlowTransformer2DModel: AuraFlow (Fal 2024), an MMDiT trained by flow matching."""

from dataclasses import replace
from typing import Any

import torch

from prunedm.architecture import Inputs, told_as_hidden_states
from prunedm.architectures import sd3


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """A noisy sample is `hidden_states`; the timestep goes from 0 to 1."""
    names = told_as_hidden_states(network, inputs)
    return names | {"timestep": names["timestep"] / 1000}


def more(network: Any, count: int, generator: torch.Generator | None) -> Inputs:
    """T5's states (N, 256, D)."""
    width = network.config.joint_attention_dim
    return {"encoder_hidden_states": torch.randn(count, 256, width, generator=generator)}


def prompts(pipeline: Any, text: str) -> Inputs:
    """Encodings of a text by T5."""
    states, *_ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, device="cpu")
    return {"encoder_hidden_states": states}


EMBEDDINGS = ("pos_embed", "context_embedder", "time_step_proj", "norm_out", "proj_out")
RECORD = replace(
    sd3.RECORD,
    told=told,
    more=more,
    prompts=prompts,
    protect=EMBEDDINGS,
    blocks=(r"joint_transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
    precise=EMBEDDINGS,
    pipeline="AuraFlowPipeline",
    tiny=sd3.SHAPES | {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 64},
)
