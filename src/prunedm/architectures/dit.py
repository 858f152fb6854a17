"""DiTTransformer2DModel: DiT (Peebles & Xie 2023), classes of ImageNet and one for none."""

from typing import Any

from prunedm.architecture import Architecture, Inputs


def told(network: Any, inputs: Inputs) -> dict[str, Any]:
    """A noisy sample is `hidden_states` here."""
    renamed = {("hidden_states" if name == "sample" else name): x for name, x in inputs.items()}
    return renamed | {"timestep": renamed["timestep"].long()}  # it indexes nothing, and is embedded


def classes(network: Any) -> int:
    """Of `num_embeds_ada_norm`, without the one for none."""
    count: int = network.config.num_embeds_ada_norm
    return count


RECORD = Architecture(
    component="transformer",
    pipeline="DiTPipeline",
    told=told,
    classes=classes,
    protect=("pos_embed", "proj_out_1", "proj_out_2", r"transformer_blocks\.\d+\.norm1\.emb"),
    ends=("pos_embed", "proj_out_2"),
    blocks=(r"transformer_blocks\.\d+",),
    precise=("pos_embed", "proj_out_1", "proj_out_2", r".*\.norm1\.emb"),
)
