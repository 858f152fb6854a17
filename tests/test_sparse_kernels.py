"""Sparse GEMM forms are the dense layers; the faster form is kept, and nothing else changes."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import output, tiny_model
from torch import nn

from prunedm.architecture import example
from prunedm.errors import UserError
from prunedm.evaluation import speed
from prunedm.masks import Pattern
from prunedm.networks.layer_kinds import from_matrix, to_matrix
from prunedm.networks.layers import prunable_layers, to_groups
from prunedm.progress import Silent
from prunedm.removal.nm import nm_mask, nm_masks
from prunedm.sampling import FastDenoiser
from prunedm.sparse_kernels import gemm, layers, selection
from prunedm.sparse_kernels.gemm import CUDA_KERNELS, PACKED, Kernel, PackedGemm, find_kernels, pack
from prunedm.sparse_kernels.layers import forms, to_sparse, why_not_sparse
from prunedm.sparse_kernels.selection import Choice, time_in_turns, use_sparse_kernels

HALF, DOUBLE = torch.float16, torch.float64
TWO_FOUR = Pattern(2, 4)
SHAPE = (1, 8, 8)


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made_2_4(layer: nn.Module, dtype: torch.dtype = DOUBLE) -> nn.Module:
    """The layer, without gradients, with two of each four weights at zero."""
    layer = layer.to(dtype).requires_grad_(False)
    layer.weight.mul_(nm_mask(layer.weight.abs(), TWO_FOUR))
    return layer


@pytest.fixture
def denoiser() -> nn.Module:
    """Tiny, with all layers 2:4 that can be."""
    made = tiny_model().denoiser
    layers = prunable_layers(made)
    scores = {name: layer.weight.detach() for name, layer in layers.items()}
    nm_masks(layers, scores, TWO_FOUR).apply_(made)
    return made


def timer(*sparse_ms: float) -> Callable[[Sequence[Callable]], list[float]]:
    """Dense layers take 2 ms, a layer's sparse forms what is told; each is called once."""

    def times(calls):
        assert all(torch.isfinite(call()).all() for call in calls)
        return [2.0, *(sparse_ms * 2)[: len(calls) - 1]]

    return times


# ------------------------------------------------------------------------- packed format


def test_packing_keeps_two_values_of_each_group_and_their_places():
    weight_OK = torch.tensor([[0.0, 5, 0, -2, 7, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]])
    values_GN, index_GN = pack(weight_OK)
    assert values_GN.tolist() == [[5, -2], [7, 0], [1, 2], [0, 0]]
    assert index_GN.tolist() == [[1, 3], [0, 1], [0, 1], [0, 1]]


def test_packed_weights_unpack_to_the_same():
    weight_OK = made_2_4(nn.Linear(32, 8)).weight.clone()
    weight_OK[2, :8] = 0
    weight_OK[3, 4] = torch.nan
    values_GN, index_GN = pack(weight_OK)
    unpacked_GM = torch.zeros(len(values_GN), 4, dtype=DOUBLE).scatter(1, index_GN, values_GN)
    assert torch.equal(from_matrix(unpacked_GM, weight_OK.shape).isnan(), weight_OK.isnan())
    assert torch.equal(
        from_matrix(unpacked_GM, weight_OK.shape).nan_to_num(), weight_OK.nan_to_num()
    )


def test_the_reference_gemm_is_the_dense_product():
    layer = made_2_4(nn.Linear(24, 12))
    x_BK = torch.randn(5, 24, dtype=DOUBLE)
    gemm = PackedGemm(layer.weight)
    assert gemm.values_OS.shape == (12, 12)
    torch.testing.assert_close(gemm(x_BK), x_BK @ layer.weight.T)
    torch.testing.assert_close(gemm(x_BK, layer.bias), layer(x_BK))


def test_groups_of_input_channels_stay_neighbours():
    weight = made_2_4(nn.Conv2d(8, 5, 3)).weight
    weight_OK = to_matrix(weight)
    assert weight_OK[4, (2 * 3 + 1) * 8 + 6] == weight[4, 6, 2, 1]
    assert torch.equal(to_groups(weight_OK, 4), to_groups(weight, 4))


# ------------------------------------------------------------------------ layers as GEMMs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 3, 16)])
def test_sparse_linear_is_the_linear_layer(shape, bias):
    layer = made_2_4(nn.Linear(16, 6, bias=bias))
    x = torch.randn(shape, dtype=DOUBLE)
    torch.testing.assert_close(to_sparse(layer, PACKED, "gemm")(x), layer(x))


@pytest.mark.parametrize("form", ["im2col", "shifted"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("kernel", [1, 3, (3, 1)])
def test_sparse_convolution_is_the_convolution(kernel, stride, padding, bias, form):
    layer = made_2_4(nn.Conv2d(8, 6, kernel, stride, padding, bias=bias))
    sparse = layers.SparseConv2d(layer, PACKED, form)
    for size in ((5, 7), (8, 8)):
        x_NCHW = torch.randn(3, 8, *size, dtype=DOUBLE)
        found, wanted = sparse(x_NCHW), layer(x_NCHW)
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous(memory_format=torch.channels_last)
        last = x_NCHW.contiguous(memory_format=torch.channels_last)
        assert torch.equal(sparse(last), found)


def test_unfolded_pixels_come_in_parts_that_fit(monkeypatch):
    layer = made_2_4(nn.Conv2d(8, 6, 3, padding=1))
    sparse = to_sparse(layer, PACKED, "im2col")
    x_NCHW = torch.randn(5, 8, 6, 6, dtype=DOUBLE)
    rows = []
    sparse.gemms[0].register_forward_hook(lambda gemm, inputs, y: rows.append(len(y)))
    whole = sparse(x_NCHW)
    monkeypatch.setattr(layers, "_PATCH_BYTES", 2 * 36 * 72 * 8 + 1)
    torch.testing.assert_close(sparse(x_NCHW), whole)
    assert rows == [5 * 36, 2 * 36, 2 * 36, 36]


def test_a_tap_at_stride_1_is_a_shift_of_whole_rows():
    sparse = to_sparse(made_2_4(nn.Conv2d(8, 6, 3, padding=1)), PACKED, "shifted")
    met = []
    for one in sparse.gemms:
        one.register_forward_pre_hook(lambda gemm, inputs: met.append(inputs[0]))
    sparse(torch.randn(3, 8, 5, 5, dtype=DOUBLE))
    assert [x.storage_offset() // 8 for x in met] == [7 * i + j for i in range(3) for j in range(3)]
    assert len({x.untyped_storage().data_ptr() for x in met}) == 1  # nothing is unfolded
    assert {len(x) for x in met} == {152}  # 3 * 7 * 7 pixels, up to a multiple of 8


def test_inputs_are_cast_to_the_weights_type():
    layer = made_2_4(nn.Conv2d(8, 6, 3), torch.bfloat16)
    x_NCHW = torch.randn(1, 8, 5, 5)
    for form in forms(layer):
        found = to_sparse(layer, PACKED, form)(x_NCHW)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, layer(x_NCHW.bfloat16()), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("form", ["im2col", "shifted"])
def test_forms_compile_as_one_graph(form):
    sparse = nn.Sequential(
        to_sparse(made_2_4(nn.Conv2d(8, 8, 3, 1, 1)), PACKED, form),
        to_sparse(made_2_4(nn.Conv2d(8, 8, 3, 2, 1)), PACKED, form),
        to_sparse(made_2_4(nn.Conv2d(8, 4, 1)), PACKED, "gemm"),
        nn.Flatten(2),
        to_sparse(made_2_4(nn.Linear(16, 6)), PACKED, "gemm"),
    )
    x_NCHW = torch.randn(2, 8, 8, 8, dtype=DOUBLE)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x_NCHW), sparse(x_NCHW))


# ------------------------------------------------------------------------- PyTorch's class


class OnCpu(torch.sparse.SparseSemiStructuredTensorCUTLASS):
    """PyTorch's class and all that it passes through, but its product is dense."""

    @classmethod
    def from_dense(cls, original_tensor, alg_id=0):
        more = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
        return cls(original_tensor.shape, packed=original_tensor, meta=torch.zeros(1), **more)

    def _mm(self, B, *, bias=None, should_transpose_dense=False, **_):
        assert (
            should_transpose_dense
        )  # the sparse matrix is the first operand of the hardware's GEMM
        y_OB = self.packed @ B.t() + (0 if bias is None else bias[:, None])
        return y_OB.t()


@pytest.mark.parametrize("bias", [True, False])
def test_pytorchs_sparse_weights_live_in_modules(monkeypatch, bias):
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS", OnCpu)
    layer = made_2_4(nn.Conv2d(8, 6, 3, padding=1, bias=bias))
    x_NCHW = torch.randn(2, 8, 5, 5, dtype=DOUBLE)
    wanted = layer(x_NCHW)
    for form in forms(layer):
        sparse = to_sparse(layer, CUDA_KERNELS[1], form)
        assert isinstance(sparse.gemms[0].weight, OnCpu)
        assert isinstance(sparse.gemms[0].weight, nn.Parameter)
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True, dynamic=False)
        with torch.no_grad():
            for module in (sparse, copy.deepcopy(sparse), compiled):
                torch.testing.assert_close(module(x_NCHW), wanted)
        with torch.inference_mode():
            torch.testing.assert_close(sparse.to("cpu")(x_NCHW), wanted)
        assert sparse.half().gemms[0].weight.dtype == DOUBLE
        assert copy.deepcopy(sparse).gemms[0].weight is sparse.gemms[0].weight


# -------------------------------------------------------------------------------- reasons


def dense_layer() -> nn.Module:
    layer = made_2_4(nn.Linear(64, 32))
    layer.weight[5, :4] = 1
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: made_2_4(nn.Linear(64, 32)), None),
        (lambda: made_2_4(nn.Conv2d(64, 32, 3, 2, 1)), None),
        (lambda: made_2_4(nn.Linear(16, 16)), None),  # cuSPARSELt takes it, CUTLASS does not
        (dense_layer, "not 2:4: 1 of 512 groups keep more than 2 of 4"),
        (lambda: nn.Linear(6, 16), "6 input channels are not a multiple of 4"),
        (lambda: nn.Conv2d(16, 16, 3, groups=2), "grouped convolution"),
        (lambda: made_2_4(nn.Conv2d(16, 16, 3, dilation=2)), "dilated convolution"),
        (
            lambda: made_2_4(nn.Conv2d(16, 16, 3, padding="same")),
            "padding 'same' with zeros",
        ),
        (
            lambda: made_2_4(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")),
            "padding (1, 1) with reflect",
        ),
        (
            lambda: made_2_4(nn.Linear(64, 24)),
            "cuSPARSELt: 24 outputs are not a multiple of 16; "
            "CUTLASS: 24 outputs are not a multiple of 32",
        ),
        (
            lambda: made_2_4(nn.Linear(40, 16)),
            "cuSPARSELt: 40 weights per output are not a multiple of 16; "
            "CUTLASS: 16 outputs are not a multiple of 32",
        ),
        (nn.ReLU, "a ReLU is neither a linear layer nor a Conv2d"),
    ],
)
def test_why_a_layer_stays_dense(layer, reason):
    assert why_not_sparse(layer(), HALF) == reason


def test_float32_has_no_sparse_gemm():
    layer = made_2_4(nn.Linear(64, 32))
    assert why_not_sparse(layer, torch.float32) == (
        "cuSPARSELt: no GEMM of float32; CUTLASS: no GEMM of float32"
    )
    assert why_not_sparse(layer, torch.float32, [PACKED]) is None


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiples_are_those_of_pytorch(kernel, dtype):
    packed = getattr(torch.sparse, f"SparseSemiStructuredTensor{kernel.name.upper()}")
    due = packed._DTYPE_SHAPE_CONSTRAINTS[dtype]
    assert (kernel.rows, kernel.columns) == (due.sparse_min_rows, due.sparse_min_cols)


# ------------------------------------------------------------------------------ selection


def chosen_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    kinds = (layers.SparseLinear, layers.SparseConv2d)
    return {name: m for name, m in denoiser.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize(("ms", "form"), [((1.5, 1.0), "shifted"), ((1.0, 1.5), "im2col")])
def test_faster_forms_take_the_layers_places_and_the_answer_stays(denoiser, ms, form):
    wanted = output(denoiser)
    eligible = prunable_layers(denoiser)
    selection = use_sparse_kernels(
        denoiser, example(denoiser, 3), dtype=torch.float32, kernels=[PACKED], timer=timer(*ms)
    )
    torch.testing.assert_close(output(denoiser), wanted, atol=1e-5, rtol=1e-5)
    assert selection.relative_error == pytest.approx(0, abs=1e-5)
    assert chosen_layers(denoiser).keys() == eligible.keys()
    assert {choice.name for choice in selection.chosen} == eligible.keys()
    found = {choice.name: choice for choice in selection.choices}
    conv = found["mid_block.resnets.0.conv1"]
    gemm = {"outputs": 32, "columns": 9 * 32, "pixels": 3 * 4 * 4}
    assert conv == Choice(
        conv.name, "3x3 convolution", **gemm, dense_ms=2, form=f"{form}, reference", sparse_ms=1,
        chosen=True,
    )  # fmt: skip
    assert conv.speedup == 2
    down = found["down_blocks.0.downsamplers.0.conv"]
    assert (down.kind, down.pixels) == ("3x3 convolution, stride 2", 3 * 4 * 4)
    query = found["mid_block.attentions.0.to_q"]
    assert (query.kind, query.columns, query.pixels) == ("linear", 32, 3 * 4 * 4)
    assert found["conv_in"].reason == "1 input channels are not a multiple of 4"


def test_dense_stays_where_it_is_faster(denoiser):
    before = dict(denoiser.named_modules())
    selection = use_sparse_kernels(
        denoiser, example(denoiser, 2), dtype=torch.float32, kernels=[PACKED], timer=timer(2.0, 3.0)
    )
    assert dict(denoiser.named_modules()) == before
    assert selection.relative_error is None
    assert selection.chosen == []
    reasons = {c.reason for c in selection.choices if c.name in prunable_layers(denoiser)}
    assert reasons == {"dense is faster"}


def test_layers_are_chosen_one_by_one(denoiser):
    conv = "mid_block.resnets.0.conv1"
    denoiser.get_submodule(conv).weight.data[0, :4, 0, 0] = 1.0

    def only_linear(calls):
        return [2.0, 1.0] if len(calls) == 2 else [1.0, 2.0, 3.0]

    selection = use_sparse_kernels(
        denoiser, example(denoiser, 1), dtype=torch.float32, kernels=[PACKED], timer=only_linear
    )
    layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    assert layers.keys() == {"time_embedding.linear_1", "time_embedding.linear_2"}
    kinds = {choice.kind for choice in selection.chosen}
    assert kinds == {"linear", "1x1 convolution"}
    (reason,) = [choice.reason for choice in selection.choices if choice.name == conv]
    assert reason == "not 2:4: 1 of 2,304 groups keep more than 2 of 4"


@pytest.mark.parametrize("factor", [1.5, torch.nan])
def test_a_wrong_kernel_is_an_error_and_undone(denoiser, factor):
    class Wrong(PackedGemm):
        def forward(self, x_BK, bias_O=None):
            return super().forward(x_BK, bias_O) * factor

    before, wanted = dict(denoiser.named_modules()), output(denoiser)
    with pytest.raises(UserError, match=r"error of .*, above 0.02; the dense layers are back"):
        use_sparse_kernels(
            denoiser.train(),
            example(denoiser),
            dtype=torch.float32,
            kernels=[Kernel("wrong", Wrong)],
            timer=lambda calls: [2.0, 1.0, 1.0][: len(calls)],
        )
    assert denoiser.training
    assert dict(denoiser.named_modules()) == before
    assert torch.equal(output(denoiser.eval()), wanted)


def test_only_the_layers_have_to_be_in_half_precision(denoiser):
    fast = FastDenoiser(denoiser, calls=1, dtype=torch.bfloat16).inner
    selection = use_sparse_kernels(
        fast, example(fast, 2), dtype=torch.bfloat16, kernels=[PACKED], timer=timer(1.0)
    )
    due = {name for name in prunable_layers(denoiser) if not name.endswith("time_emb_proj")}
    assert {choice.name for choice in selection.chosen} == due
    assert 0 < selection.relative_error < 0.02


def test_a_form_that_does_not_run_is_left_out(denoiser):
    class Refused(PackedGemm):
        def forward(self, x_BK, bias_O=None):
            raise RuntimeError("CUDA error: operation not supported")

    kernels = [Kernel("refused", Refused)]
    selection = use_sparse_kernels(
        denoiser, example(denoiser, 1), dtype=torch.float32, kernels=kernels, timer=timer()
    )
    reasons = {c.reason for c in selection.choices if c.name in prunable_layers(denoiser)}
    assert reasons == {"no sparse form runs"}


def test_weights_of_another_type_stay(denoiser):
    selection = use_sparse_kernels(
        denoiser, example(denoiser, 1), dtype=DOUBLE, kernels=[PACKED], timer=timer(1.0)
    )
    reasons = {c.reason for c in selection.choices if c.name in prunable_layers(denoiser)}
    assert reasons == {"its weights are float32, not float64"}


def test_without_such_a_gpu_nothing_changes_and_it_says_why(denoiser):
    before, heard = copy.deepcopy(denoiser.state_dict()), Heard()
    modules = dict(denoiser.named_modules())

    def never(calls):
        raise AssertionError("timed")

    selection = use_sparse_kernels(denoiser, example(denoiser, 4), timer=never, progress=heard)
    assert heard.said == ["no layer is replaced: the denoiser is on cpu, not on an NVIDIA GPU"]
    assert dict(denoiser.named_modules()) == modules
    assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())
    eligible = {c.name for c in selection.choices if c.reason == "would be eligible"}
    assert eligible == prunable_layers(denoiser).keys()
    assert all(c.dense_ms is None and not c.chosen for c in selection.choices)


def test_gpus_without_sparse_gemms_are_told_apart(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    why = "Tesla T4 has no sparse tensor cores; they came with compute capability 8.0"
    assert find_kernels(device, HALF) == ([], why)
    why = "there is no sparse GEMM of float32; use float16 or bfloat16"
    assert find_kernels(device, torch.float32) == ([], why)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))

    def failing(kernel, device, dtype):
        if kernel.name == "CUTLASS":
            raise RuntimeError("only compute capability 8.x\nand a long story")

    monkeypatch.setattr(gemm, "_try_kernel", failing)
    assert find_kernels(device, HALF) == ([CUDA_KERNELS[0]], "")
    monkeypatch.setattr(gemm, "CUDA_KERNELS", CUDA_KERNELS[1:])
    why = "no sparse GEMM runs on Tesla T4 (CUTLASS: only compute capability 8.x)"
    assert find_kernels(device, HALF) == ([], why)


def test_the_trial_of_a_kernel_looks_at_the_product():
    cpu = torch.device("cpu")
    gemm._try_kernel(PACKED, cpu, torch.float32)

    class Wrong(PackedGemm):
        def forward(self, x_BK, bias_O=None):
            return super().forward(x_BK, bias_O) + 1

    with pytest.raises(RuntimeError, match="wrong product"):
        gemm._try_kernel(Kernel("wrong", Wrong), cpu, torch.float32)


def test_calls_are_timed_in_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            order.append(name)
            clock[0] += seconds

        return work

    found = time_in_turns([call("slow", 0.003), call("quick", 0.001)])
    assert found == pytest.approx([3, 1])
    assert order[:30] == ["slow"] * 10 + ["quick"] * 10 + ["slow"] * 10


# ------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
def test_on_a_gpu_every_form_is_the_layer():
    device = torch.device("cuda")
    kernels, why = find_kernels(device, HALF)
    if why:
        pytest.skip(why)
    layers = [nn.Linear(128, 64), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1)]
    layers += [nn.Conv2d(64, 64, 3, 2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    for layer in layers:
        made_2_4(layer, HALF).to(device)
        shape = (5, 128) if isinstance(layer, nn.Linear) else (3, 64, 9, 7)
        x = torch.randn(shape, device=device, dtype=HALF)
        wanted = layer(x).float()
        for kernel in kernels:
            for form in forms(layer):
                sparse = to_sparse(layer, kernel, form)
                torch._dynamo.reset()
                compiled = torch.compile(sparse, fullgraph=True, dynamic=False)
                for module in (sparse, copy.deepcopy(sparse), sparse.to(device), compiled):
                    with torch.no_grad():
                        found = module(x).float()
                    assert (found - wanted).norm() <= 5e-3 * wanted.norm(), (kernel.name, form)
                with torch.inference_mode():
                    found = sparse.to(device)(x).float()
                assert (found - wanted).norm() <= 5e-3 * wanted.norm(), (kernel.name, form)


@pytest.mark.gpu
@pytest.mark.parametrize("timing", [time_in_turns, selection.time_graphs])
def test_on_a_gpu_a_denoiser_is_timed_and_its_answer_stays(timing):
    device = torch.device("cuda")
    if find_kernels(device, HALF)[1]:
        pytest.skip(find_kernels(device, HALF)[1])
    denoiser = tiny_model(block_out_channels=(64, 128), norm_num_groups=8).denoiser
    layers = prunable_layers(denoiser)
    nm_masks(layers, {n: m.weight.detach() for n, m in layers.items()}, TWO_FOUR).apply_(denoiser)
    denoiser.to(device, HALF)
    wanted = copy.deepcopy(denoiser)

    def sparse_wins(calls):
        times = timing(calls)
        return [max(times) + 1, *times[1:]]

    selection = use_sparse_kernels(denoiser, example(denoiser, 8), timer=sparse_wins)
    assert {choice.name for choice in selection.chosen} == layers.keys()
    assert selection.relative_error < 0.01
    x_NCHW = torch.randn(8, *SHAPE, device=device, dtype=HALF)
    with torch.no_grad():
        compiled = torch.compile(denoiser)(x_NCHW, 300).sample.float()
        dense = wanted(x_NCHW, 300).sample.float()
    assert (compiled - dense).norm() <= 0.02 * dense.norm()
