"""FluxTransformer2DModel: FLUX.1 (Black Forest Labs 2024), patches of 2 x 2 latents as tokens.

The engine's samples are latents (N, C, H, W); `told` packs them into tokens, `heard` unpacks the answer.
"""

from typing import Any

import torch

from prunedm.architecture import Architecture, Inputs, Shape
from prunedm.architectures.sd3 import states_and_pooled

SIDE = 128  # of latents, at the training resolution of 1024
TOKENS = 512  # of T5
GUIDANCE = 3.5  # of the guidance-distilled model


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """Packed tokens, their positions, and times from 0 to 1."""
    sample_NCHW = inputs["sample"]
    count, _, height, width = sample_NCHW.shape
    device = sample_NCHW.device
    text = inputs["encoder_hidden_states"]
    arguments = {
        "hidden_states": packed(sample_NCHW),
        "timestep": inputs["timestep"] / 1000,
        "encoder_hidden_states": text,
        "pooled_projections": inputs["pooled_projections"],
        "img_ids": places(height // 2, width // 2, device),
        "txt_ids": torch.zeros(text.shape[1], 3, device=device),
    }
    if network.config.guidance_embeds:
        arguments["guidance"] = torch.full((count,), GUIDANCE, device=device)
    return arguments


def heard(network: Any, output: Any, inputs: Inputs) -> torch.Tensor:
    """The velocity, unpacked."""
    return unpacked(output[0], inputs["sample"].shape[2:])


def packed(sample_NCHW: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) => (N, H/2 * W/2, 4 C): channel, then row and column inside a patch."""
    n, c, h, w = sample_NCHW.shape
    patches = sample_NCHW.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, h // 2 * (w // 2), c * 4)


def unpacked(tokens_NLD: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """The inverse of `packed` for samples of this height and width."""
    n, _, d = tokens_NLD.shape
    h, w = size
    patches = tokens_NLD.reshape(n, h // 2, w // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, d // 4, h, w)


def places(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows * columns, 3): 0, the row, and the column of each token."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)[None]
    return grid.reshape(-1, 3)


def shape(network: Any) -> Shape:
    """(C, H, W): a quarter of `in_channels`, at the training size."""
    return network.config.in_channels // 4, SIDE, SIDE


def prompts(pipeline: Any, text: str) -> Inputs:
    """Encodings of a text by T5 and CLIP."""
    states, pooled, _ = pipeline.encode_prompt(text, text, device="cpu")
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


EMBEDDINGS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
RECORD = Architecture(
    component="transformer",
    pipeline="FluxPipeline",
    scheduler="FlowMatchEulerDiscreteScheduler",
    told=told,
    heard=heard,
    shape=shape,
    more=states_and_pooled(TOKENS),
    prompts=prompts,
    protect=EMBEDDINGS,
    ends=("x_embedder", "proj_out"),
    blocks=(r"(single_)?transformer_blocks\.\d+",),
    precise=EMBEDDINGS,
    tiny={
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
)
