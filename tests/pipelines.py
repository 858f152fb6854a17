"""Tiny random pipelines, whole: autoencoder, text encoder, tokenizer, network and scheduler."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)
from families import network
from helpers import TINY
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 16  # of the text states


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, of the letters alone."""
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def text_encoder(words: int) -> CLIPTextModel:
    """Two layers."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    return CLIPTextModel(config).eval()


def autoencoder() -> AutoencoderKL:
    """Images of 16 to latents of 8, four channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


def vq_autoencoder() -> VQModel:
    """Images of 16 to latents of 8, three channels."""
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).eval()


@cache
def stable_diffusion() -> Path:
    """The folder of a StableDiffusionPipeline; tests only read it."""
    folder = Path(mkdtemp(prefix="prunedm-tests-"))
    words = tokenizer(folder / "words")
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=network("UNet2DConditionModel"),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


@cache
def latent_diffusion() -> Path:
    """The folder of an unconditional LDMPipeline, with a VQModel."""
    vq = vq_autoencoder()
    unet = UNet2DModel(**TINY | {"in_channels": 3, "out_channels": 3})
    folder = Path(mkdtemp(prefix="prunedm-tests-")) / "ldm"
    LDMPipeline(vqvae=vq, unet=unet.eval(), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder
