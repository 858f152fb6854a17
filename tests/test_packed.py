"""Packed weights: against the masked weights to the bit, and against the reader of the docs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Conv1D, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from prunedm import PrunedUNet2DModel
from prunedm.errors import UserError
from prunedm.evaluation.size import packed_bytes
from prunedm.masks import Masks, Pattern, save_masks
from prunedm.networks.layer_kinds import find_kind, oriented, weight_of
from prunedm.networks.layers import prunable_layers
from prunedm.packed import load_packed, packed_matmul, save_packed
from prunedm.removal.nm import nm_mask, nm_masks
from prunedm.removal.weights import weight_masks

DOCS = Path(__file__).parent.parent / "docs" / "packed.md"
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = [*TYPES, "int8"]
PATTERNS = ["2:4", "1:4", "4:8", "3:4"]
# to 8 channels between the convolutions of one block
NARROW = {
    "down_blocks.0.resnets.0.conv1": {"in": 16, "out": 8},
    "down_blocks.0.resnets.0.time_emb_proj": {"in": 64, "out": 8},
    "down_blocks.0.resnets.0.norm2": {"channels": 8, "groups": 4},
    "down_blocks.0.resnets.0.conv2": {"in": 8, "out": 16},
}


def unet() -> nn.Module:
    """Conv2d with kernels 1 and 3 and Linear, one block narrowed by channel pruning."""
    torch.manual_seed(0)
    return PrunedUNet2DModel(**tiny_model().denoiser.config, widths=NARROW).eval()


class Several(nn.Module):
    """Layers that a UNet has not: grouped and of other ranks, GPT-2's, with tied weights; buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(12, 9, 3, groups=3)
        self.uneven = nn.Conv2d(8, 3, (2, 5))
        self.first, self.second = nn.Linear(5, 7), nn.Linear(5, 7)
        self.second.weight = self.first.weight
        self.line, self.volume = nn.Conv1d(8, 5, 3), nn.Conv3d(4, 3, (1, 2, 3))
        self.turned = Conv1D(7, 12)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)


def unstructured(denoiser: nn.Module) -> Masks:
    layers = prunable_layers(denoiser)
    generator = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(weight_of(m).shape, generator=generator) for n, m in layers.items()}
    return weight_masks(scores, 0.37, scope="global")


def masked(kind: str) -> tuple[nn.Module, Masks | None]:
    """A denoiser with masks of a kind, a kept zero of either sign, and a removed -0.0."""
    denoiser = Several() if kind == "grouped" else unet()
    if kind == "none":
        return denoiser, None
    if kind in ("unstructured", "grouped"):
        masks = unstructured(denoiser)
    else:
        layers = prunable_layers(denoiser)
        scores = {n: m.weight.detach().abs() for n, m in layers.items()}
        masks = nm_masks(layers, scores, Pattern.parse(kind))
    masks.apply_(denoiser)
    with torch.no_grad():
        for name, mask in masks:
            weight = weight_of(denoiser.get_submodule(name))
            kept, removed = mask.nonzero(), (~mask).nonzero()
            weight[tuple(kept[0])], weight[tuple(kept[1])] = -0.0, 0.0
            weight[tuple(removed[0])] = -0.0
    return denoiser, masks


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, and zeros of equal sign."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def quantised(weight: torch.Tensor) -> torch.Tensor:
    """What int8 storage leaves of a weight, row by row in NumPy."""
    rows = []
    for row in weight.numpy().astype(np.float32):
        scale = np.abs(row).max() / np.float32(127) or np.float32(1)
        rows.append(np.clip(np.rint(row / scale), -127, 127).astype(np.int8) * scale)
    return torch.from_numpy(np.stack(rows))


def expected(denoiser: nn.Module, masks: Masks | None, precision: str) -> dict[str, torch.Tensor]:
    """The state as it must load, from the definition."""
    by_layer = dict(masks or ())
    modules = dict(denoiser.named_modules(remove_duplicate=False))
    state = {}
    for name, stored in denoiser.state_dict().items():
        layer = name.removesuffix(".weight")
        is_weight = find_kind(modules.get(layer)) is not None
        tensor = value = oriented(modules[layer], stored) if is_weight else stored
        if is_weight and precision == "int8":
            value = quantised(tensor)
        elif tensor.is_floating_point():
            value = tensor.to(TYPES.get(precision, torch.float16))
        if layer in by_layer:
            value = torch.where(by_layer[layer], value, torch.zeros((), dtype=value.dtype))
        state[name] = oriented(modules[layer], value) if is_weight else value
    return state


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [*PATTERNS, "unstructured", "grouped", "none"])
def test_what_loads_is_the_masked_weight_to_the_bit(kind, precision, path):
    denoiser, masks = masked(kind)
    save_packed(denoiser, masks, path, precision=precision)
    state, loaded = load_packed(path)
    wanted = expected(denoiser, masks, precision)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(state[name], value), name
        assert state[name].is_contiguous()
    if masks is None:
        assert loaded is None
        return
    assert loaded.patterns == masks.patterns
    assert bool(loaded.patterns) == (kind in PATTERNS)
    assert loaded.by_layer.keys() == masks.by_layer.keys()
    assert all(torch.equal(loaded.by_layer[name], mask) for name, mask in masks)
    denoiser.load_state_dict(state)
    assert loaded.violations(denoiser) == {}


def reader():
    """`read_packed` of the docs: NumPy only, and short."""
    (text,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(text.splitlines()) <= 32
    assert not re.search("torch|prunedm[. ]", text)
    names: dict = {}
    exec(compile(text, "packed.md", "exec"), names)
    return names["read_packed"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["2:4", "grouped", "none"])
def test_the_reader_of_the_docs_reads_the_same(kind, precision, path):
    save_packed(*masked(kind), path, precision=precision)
    state, _ = load_packed(path)
    read = reader()(path)
    assert read.keys() == state.keys()
    for name, value in state.items():
        wide = value.float() if value.dtype == torch.bfloat16 else value
        assert same_bits(torch.from_numpy(np.array(read[name])), wide), name


def data_bytes(path: Path) -> int:
    """Of the file without its header."""
    file = path.read_bytes()
    return len(file) - 8 - int.from_bytes(file[:8], "little")


@pytest.mark.parametrize(
    ("precision", "text", "share"),
    [("fp16", "2:4", 0.5625), ("int8", "2:4", 0.625), ("fp32", "1:4", 0.28125)],
)
def test_one_layer_takes_the_bytes_of_the_formula(precision, text, share, path):
    layer = nn.Sequential(nn.Conv2d(64, 32, 3, bias=False))
    masks = Masks.uniform({"0": nm_mask(layer[0].weight, Pattern.parse(text))}, Pattern.parse(text))
    masks.apply_(layer)
    save_packed(layer, masks, path, precision=precision)
    bytes_each = {"fp16": 2, "int8": 1, "fp32": 4}[precision]
    scales = 4 * 32 if precision == "int8" else 0
    assert data_bytes(path) == share * bytes_each * layer[0].weight.numel() + scales
    assert path.stat().st_size - data_bytes(path) < 1000


@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
def test_the_report_counts_the_bytes_of_the_file(kind, path):
    denoiser, masks = masked(kind)
    save_packed(denoiser, masks, path, precision="fp16")
    assert data_bytes(path) == packed_bytes(denoiser, masks)


def test_values_and_bits_stand_in_group_order(path):
    layer = nn.Sequential(nn.Conv2d(4, 2, (1, 2), bias=False))
    mask = torch.zeros(2, 4, 1, 2, dtype=torch.bool)
    for channels, output, tap in (((0, 3), 0, 0), ((1, 2), 0, 1), ((0, 1), 1, 0), ((2, 3), 1, 1)):
        mask[output, list(channels), 0, tap] = True
    with torch.no_grad():
        layer[0].weight.copy_(torch.arange(1.0, 17).reshape(2, 4, 1, 2) * mask)
    save_packed(layer, Masks.uniform({"0": mask}, Pattern(2, 4)), path)
    stored = load_file(path)
    assert stored["0.weight.bits"].tolist() == [0b1001_0110, 0b1100_0011]
    assert stored["0.weight.values"].tolist() == [1, 7, 4, 6, 9, 11, 14, 16]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "prunedm-packed",
        "version": "1",
        "precision": "fp16",
        "shapes": '{"0.weight": [2, 4, 1, 2]}',
        "patterns": '{"0": "2:4"}',
    }


def test_equal_input_gives_equal_bytes_and_nothing_stays_beside_the_file(tmp_path):
    paths = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for path in paths:
        save_packed(*masked("2:4"), path)
    assert len({path.read_bytes() for path in paths}) == 1
    save_packed(*masked("2:4"), paths[0], precision="bf16")  # over the old one
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_int8_is_within_half_a_scale_and_takes_rows_of_any_size(path):
    layer = nn.Sequential(nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        weight_OI = layer[0].weight
        weight_OI[1], weight_OI[2], weight_OI[3] = 0, 1e-44, 1e30 * weight_OI[3]
    save_packed(layer, None, path, precision="int8")
    stored = load_file(path)
    scale_O = stored["0.weight.scale"]
    assert stored["0.weight"].dtype == torch.int8
    assert scale_O[1] == 1
    error_OI = (load_packed(path)[0]["0.weight"] - weight_OI).double().abs()
    assert bool((error_OI <= 0.5001 * scale_O[:, None].double()).all())


# ----------------------------------------------------------------------------- what is refused


def refused(action, *words: str) -> None:
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_masks_that_do_not_hold_or_fit_are_not_written(path):
    denoiser, masks = masked("2:4")
    name, mask = next(iter(masks))
    with torch.no_grad():
        denoiser.get_submodule(name).weight[~mask] = 1e-9
    refused(lambda: save_packed(denoiser, masks, path), "do not hold", name, "apply")
    masks.apply_(denoiser)
    false_claim = Masks(masks.by_layer, masks.patterns | {name: Pattern(1, 4)})
    refused(lambda: save_packed(denoiser, false_claim, path), f"{name} are not 1:4")
    other = Masks({"gone": mask})
    refused(lambda: save_packed(denoiser, other, path), "another model")
    norm = Masks({"conv_norm_out": torch.ones(16, dtype=torch.bool)})
    refused(lambda: save_packed(denoiser, norm, path), "conv_norm_out", "not a Linear, Conv1d")
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("precision", "value", "way_out"),
    [("fp16", 1e5, "bf16 or fp32"), ("bf16", 3.4e38, "fp32"), ("int8", float("inf"), "int8")],
)
def test_values_too_large_for_a_type_are_refused(precision, value, way_out, path):
    layer = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        layer[0].weight[2, 1] = value
    refused(lambda: save_packed(layer, None, path, precision=precision), "0", way_out)
    assert not path.exists()
    save_packed(layer, None, path, precision="fp32")
    assert load_packed(path)[0]["0.weight"][2, 1] == value


def test_a_bias_too_large_for_fp16_is_refused_with_int8_too(path):
    layer = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(layer[0].bias, 7e4)
    refused(lambda: save_packed(layer, None, path, precision="int8"), "0.bias", "7e+04", "bf16")


def rewritten(path: Path, change, **facts: str | None) -> Path:
    """The file with `change(tensors)` done and metadata replaced; None takes a key out."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | facts
    tensors = load_file(path)
    change(tensors)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(tensors, path, metadata=metadata)
    return path


NAME = "mid_block.attentions.0.to_q.weight"


def flip(tensors: dict) -> None:
    """Three kept beside one kept: the count of the byte stays."""
    assert int(tensors[NAME + ".bits"][0]).bit_count() == 4
    tensors[NAME + ".bits"][0] = 0b1110_0001


def drop(part: str):
    return lambda tensors: tensors.pop(NAME + part)


def put(part: str, value):
    return lambda tensors: tensors.update({NAME + part: value(tensors[NAME + part])})


def nothing(_tensors: dict) -> None:
    pass


DAMAGE = {
    "flipped bits": (flip, {}, "to_q are not 2:4"),
    "a value short": (put(".values", lambda v: v[1:].clone()), {}, "512 bits set"),
    "values in two axes": (put(".values", lambda v: v.reshape(2, -1)), {}, "512 bits set"),
    "values of another type": (put(".values", lambda v: v.float()), {}, "float32, not as fp16"),
    "bits short": (put(".bits", lambda b: b[1:].clone()), {}, "127 bytes of bits for 1024"),
    "no values": (drop(".values"), {}, f"{NAME}.values is missing"),
    "no bits": (drop(".bits"), {}, f"{NAME}.bits is missing"),
    "twice": (lambda t: t.update({NAME: torch.ones(1)}), {}, "twice"),
    "no shapes": (nothing, {"shapes": None}, "shapes is missing"),
    "shapes no JSON": (nothing, {"shapes": "{"}, "damaged"),
    "shapes a list": (nothing, {"shapes": "[]"}, "shapes is not a JSON object"),
    "a shape forgotten": (nothing, {"shapes": "{}"}, "is of no packed weight"),
    "negative shape": (nothing, {"shapes": json.dumps({NAME: [-32, -32]})}, "has shape"),
    "huge shape": (nothing, {"shapes": json.dumps({NAME: [1 << 40, 1 << 40]})}, "bytes of bits"),
    "a pattern of nothing": (nothing, {"patterns": '{"gone": "2:4"}'}, "gone, not packed"),
    "a false pattern": (nothing, {"patterns": json.dumps({NAME[:-7]: "1:4"})}, "not 1:4"),
    "no pattern at all": (nothing, {"patterns": json.dumps({NAME[:-7]: "two"})}, "N:M"),
    "a number as pattern": (nothing, {"patterns": json.dumps({NAME[:-7]: 2})}, "N:M"),
    "unknown precision": (nothing, {"precision": "fp8"}, "'fp8'"),
    "other version": (nothing, {"version": "3"}, "version 3; this prunedm reads 1 and 2; update"),
    "transposed nothing": (nothing, {"transposed": '["gone"]'}, "gone is missing"),
    "transposed no names": (nothing, {"transposed": "[2]"}, "transposed is not a list of names"),
    "transposed a bias": (nothing, {"transposed": '["conv_in.bias"]'}, "is not a matrix"),
    "other format": (nothing, {"format": "gguf"}, "not a packed file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_one_line(damage, path):
    change, facts, message = DAMAGE[damage]
    save_packed(*masked("2:4"), path)
    refused(lambda: load_packed(rewritten(path, change, **facts)), str(path), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(".scale"), f"{NAME}.scale is missing"),
        (put(".scale", lambda s: s[1:].clone()), "scale that does not fit"),
        (put(".scale", lambda s: s.double()), "scale that does not fit"),
        (put(".scale", lambda s: s * float("nan")), "scale that does not fit"),
        (lambda t: t.pop("conv_in.weight"), "conv_in.weight is missing"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change, message, path):
    save_packed(*masked("2:4"), path, precision="int8")
    refused(lambda: load_packed(rewritten(path, change)), str(path), message)


def test_bits_behind_the_last_weight_are_refused(path):
    layer = nn.Sequential(nn.Linear(3, 3))
    masks = Masks({"0": torch.ones(3, 3, dtype=torch.bool)})
    save_packed(layer, masks, path)
    assert torch.equal(load_packed(path)[1].by_layer["0"], masks.by_layer["0"])

    def set_last(tensors):
        tensors["0.weight.bits"][1] |= 1

    refused(lambda: load_packed(rewritten(path, set_last)), "behind the last of 9")


def test_files_that_are_not_ours_are_refused(path):
    denoiser, masks = masked("2:4")
    save_packed(denoiser, masks, path)
    whole = path.read_bytes()
    for length in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(lambda: load_packed(path), str(path), "not a packed file or is damaged")
    save_masks(masks, path)
    refused(lambda: load_packed(path), str(path), "not a packed file")
    save_file({"a": torch.ones(2)}, path)  # no metadata
    refused(lambda: load_packed(path), str(path), "not a packed file")
    for nowhere in (path.parent, path.with_name("gone")):
        refused(lambda where=nowhere: load_packed(where), str(nowhere), "not a packed file")


# ------------------------------------------------------------------------------ the product


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:4", "5:16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_product_from_the_packed_weight_is_that_of_the_dense_one(text, precision, path):
    pattern = Pattern.parse(text)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 7, bias=False))
    masks = Masks.uniform({"0": nm_mask(layer[0].weight.detach().abs(), pattern)}, pattern)
    masks.apply_(layer)
    save_packed(layer, masks, path, precision=precision)
    stored = load_file(path)
    x_BI = torch.randn(5, 48, dtype=torch.float64)
    scale_O = stored.get("0.weight.scale")
    parts = stored["0.weight.values"], stored["0.weight.bits"]
    y_BO = packed_matmul(*parts, x_BI, pattern, scale_O)
    weight_OI = load_packed(path)[0]["0.weight"].double()
    tolerance = 1e-6 if scale_O is not None else 1e-13  # q times scale is rounded to float32
    torch.testing.assert_close(y_BO, x_BI @ weight_OI.T, rtol=tolerance, atol=tolerance)
    assert packed_matmul(*parts, x_BI.float(), pattern, scale_O).dtype == torch.float32
