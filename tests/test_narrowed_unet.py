"""The narrowed UNet: its config says its widths, and it comes back from disk to the bit."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from prunedm import PrunedUNet2DModel
from prunedm.networks.narrowed import as_narrowed, widths_of
from prunedm.networks.widths import resize

OPTIONS = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "num_class_embeds": 5,
}
RESNET, ATTENTION = "mid_block.resnets.0", "mid_block.attentions.0"
WIDTHS = {
    f"{RESNET}.conv1": {"in": 32, "out": 24},
    f"{RESNET}.time_emb_proj": {"in": 64, "out": 24},
    f"{RESNET}.norm2": {"channels": 24, "groups": 3},
    f"{RESNET}.conv2": {"in": 24, "out": 32},
    ATTENTION: {"heads": 2},
    f"{ATTENTION}.to_q": {"in": 32, "out": 16},
    f"{ATTENTION}.to_k": {"in": 32, "out": 16},
    f"{ATTENTION}.to_v": {"in": 32, "out": 16},
    f"{ATTENTION}.to_out.0": {"in": 16, "out": 32},
    # The way up from the attention block to the upsampler: an asserted width.
    "up_blocks.0.resnets.1.conv2": {"in": 32, "out": 24},
    "up_blocks.0.resnets.1.conv_shortcut": {"in": 48, "out": 24},
    "up_blocks.0.attentions.1.group_norm": {"channels": 24, "groups": 3},
    "up_blocks.0.attentions.1.to_q": {"in": 24, "out": 32},
    "up_blocks.0.attentions.1.to_k": {"in": 24, "out": 32},
    "up_blocks.0.attentions.1.to_v": {"in": 24, "out": 32},
    "up_blocks.0.attentions.1.to_out.0": {"in": 32, "out": 24},
    "up_blocks.0.upsamplers.0.conv": {"in": 24, "out": 32},
}


def narrow(**options) -> PrunedUNet2DModel:
    torch.manual_seed(0)
    return PrunedUNet2DModel(**(OPTIONS | options), widths=WIDTHS).eval()


def output(model: nn.Module, size: int = 8) -> torch.Tensor:
    sample_NCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(sample_NCHW, torch.tensor(7), class_labels=torch.tensor([1, 4])).sample


def test_widths_are_those_of_the_layers_and_of_the_config():
    model = narrow()
    assert model.config.widths == WIDTHS == widths_of(model)
    assert (
        "dropped" not in model.config
    )  # folders are what they were before blocks could be dropped
    assert model.mid_block.attentions[0].inner_dim == 16
    assert model.up_blocks[0].upsamplers[0].channels == 24
    assert widths_of(UNet2DModel(**OPTIONS)) == {}


def test_it_runs_at_two_resolutions():
    model = narrow()
    assert output(model).isfinite().all()
    assert output(model, size=16).shape == (2, 3, 16, 16)


def test_no_widths_is_the_dense_model():
    torch.manual_seed(0)
    dense = UNet2DModel(**OPTIONS).eval()
    torch.manual_seed(0)
    assert torch.equal(output(PrunedUNet2DModel(**OPTIONS).eval()), output(dense))


def test_as_narrowed_shares_tensors_and_settings():
    dense = UNet2DModel(**OPTIONS).eval()
    dense.mid_block.attentions[0].set_processor(AttnProcessor())
    dense.mid_block.requires_grad_(False).train()
    resize(dense, WIDTHS)
    model = as_narrowed(dense)
    assert isinstance(model, PrunedUNet2DModel)
    assert model.config.widths == WIDTHS
    pairs = zip(model.parameters(), dense.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert isinstance(model.mid_block.attentions[0].processor, AttnProcessor)
    assert model.mid_block.training
    assert not model.training
    assert not model.mid_block.resnets[0].conv1.weight.requires_grad
    assert torch.equal(output(model.eval()), output(dense.eval()))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load_are_exact(tmp_path, low_cpu_mem_usage):
    model = narrow()
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    loaded, info = PrunedUNet2DModel.from_pretrained(tmp_path, **options, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.widths == WIDTHS
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"mid_block.resnets.7.conv1": {"in": 32, "out": 24}}, r"mid_block\.resnets\.7\.conv1"),
        ({f"{RESNET}.conv1": {"in": 32, "out": 0}}, r"resnets\.0\.conv1.* 1 or more"),
        ({f"{RESNET}.conv1": {"in": 32, "out": 8.0}}, r"resnets\.0\.conv1.* 1 or more"),
        ({f"{RESNET}.norm1": {"channels": 32, "groups": 5}}, r"resnets\.0\.norm1.*do not divide"),
        ({f"{RESNET}.norm1": {"in": 32, "out": 32}}, r"resnets\.0\.norm1.*GroupNorm"),
        ({f"{RESNET}.conv1": {"in": 32, "out": 24}}, r"resnets\.0\.norm2.*32 wide.*needs 24"),
        ({RESNET: {"in": 32, "out": 24}}, r"resnets\.0.*ResnetBlock2D"),
        ({ATTENTION: {"heads": 3}}, r"attentions\.0.*3 heads do not divide 32"),
        ({f"{ATTENTION}.to_k": {"in": 32, "out": 16}}, r"attentions\.0\.to_k.*16 wide.*needs 32"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, message):
    with pytest.raises(ValueError, match=message):
        PrunedUNet2DModel(**OPTIONS, widths=widths)


def test_weights_of_other_widths_are_refused(tmp_path):
    narrow().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["widths"] |= {
        f"{RESNET}.conv1": {"in": 32, "out": 32},
        f"{RESNET}.time_emb_proj": {"in": 64, "out": 32},
        f"{RESNET}.norm2": {"channels": 32, "groups": 4},
        f"{RESNET}.conv2": {"in": 32, "out": 32},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"mid_block\.resnets\.0"):
        PrunedUNet2DModel.from_pretrained(tmp_path)
