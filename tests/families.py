"""A tiny random network of each family in `ARCHITECTURES`, and a task for each."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from helpers import TINY, noise_images
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prunedm.architecture import Inputs, architecture_of
from prunedm.codec import Pixels
from prunedm.denoising import Denoising
from prunedm.folder import Model
from prunedm.next_token import NextToken
from prunedm.process import process_of
from prunedm.task import Task

SIDE = 8
TOKENS = torch.randint(97, (24, 16), generator=torch.Generator().manual_seed(0))


def _unet_condition() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet2DModel": lambda: UNet2DModel(**TINY),
    "UNet2DConditionModel": _unet_condition,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "LlamaForCausalLM": _llama,
}
FLOWS = ("SD3Transformer2DModel", "FluxTransformer2DModel")


def network(name: str) -> Any:
    """The family's tiny network, of the same weights at every call, none of them zero."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    for parameter in made.parameters():  # diffusers begins some layers at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return made.eval()


def model(name: str) -> Model:
    """The network in a model."""
    made = network(name)
    text = architecture_of(made).text
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if name in FLOWS else DDPMScheduler()
    record = architecture_of(made)
    return Model(
        made,
        None if text else scheduler,
        name=name,
        component=record.component,
        pipeline=record.pipeline,
    )


class Told:
    """A condition that tells whatever the network wants besides noise and time: fixed random rows."""

    captions = False

    def __init__(self, made: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        record = architecture_of(made)
        self.rows = dict(record.more(made, 4, generator))
        if classes := record.classes(made):
            self.rows["class_labels"] = torch.arange(4) % classes

    def of(self, images, indices, numbers, *, seed: int) -> Inputs:
        """By the image's number."""
        return self.drawn(indices)

    def drawn(self, indices) -> Inputs:
        """By the sample's number."""
        return {name: rows[[i % 4 for i in indices]] for name, rows in self.rows.items()}

    def check(self, images) -> None:
        """Nothing is wanted of a dataset."""


def task(made: Model, **options: Any) -> Task:
    """Denoising of random images, or the next of random tokens."""
    if made.architecture.text:
        return NextToken(TOKENS, seed=0, purpose="test", **options)
    channels = made.sample_shape[0]
    shape = (channels, SIDE, SIDE)
    return Denoising(
        noise_images(12, size=SIDE, channels=channels),
        process_of(made.scheduler),
        codec=Pixels(shape),
        condition=Told(made.denoiser),
        seed=0,
        purpose="test",
        **options,
    )
