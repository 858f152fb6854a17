"""What the engine must know about a class of networks: a record, and one line in a table.

A network is called with *inputs*: keyword tensors of N rows under names that all families share. A
record translates them for its class, and finds the answer in its output. Nothing else in the package
knows a class's name. Shared names: `sample` (N, C, H, W), `timestep` (N,), `class_labels` (N,),
`encoder_hidden_states` (N, L, D), `input_ids` (N, L); a family may have further ones.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from prunedm.errors import UserError
from prunedm.randomness import generator_for

Inputs = Mapping[str, torch.Tensor]
Shape = tuple[int, int, int]  # (C, H, W)
More = Callable[[Any, int, torch.Generator | None], Inputs]  # (network, count, generator)

ARCHITECTURES = {
    "UNet2DModel": "prunedm.architectures.unet2d",
    "UNet2DConditionModel": "prunedm.architectures.unet2d_condition",
    "DiTTransformer2DModel": "prunedm.architectures.dit",
    "SD3Transformer2DModel": "prunedm.architectures.sd3",
    "FluxTransformer2DModel": "prunedm.architectures.flux",
    "AuraFlowTransformer2DModel": "prunedm.architectures.auraflow",
    "HunyuanDiT2DModel": "prunedm.architectures.hunyuan",
}
# libraries of classes that are alike, by the endings of their names
ENDINGS = {
    "ForCausalLM": "prunedm.architectures.causal_lm",
    "LMHeadModel": "prunedm.architectures.causal_lm",
}


def told_as_named(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The class uses the shared names."""
    return dict(inputs)


def told_as_hidden_states(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The noisy sample is called `hidden_states`, as in most transformers of diffusers."""
    return {("hidden_states" if name == "sample" else name): x for name, x in inputs.items()}


def told_by_signature(network: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """One of the two above by `forward`'s parameters, for a class without a record.

    Raises `UserError` where `forward` has other parameters.
    """
    parameters = inspect.signature(getattr(network, "forward", network)).parameters
    named = "sample" in parameters or "sample" not in inputs
    told = (told_as_named if named else told_as_hidden_states)(network, inputs)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in told if name not in parameters and not open_ended]
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in told
    ]
    if unknown or missing:
        raise UserError(
            f"how to call a {type(network).__name__} is not known (it wants "
            f"{', '.join(missing) or 'no ' + ', '.join(unknown)}): masks by --score magnitude or random "
            "work without calls; losses, other scores, OBS and learning need a family file, see "
            "docs/guides/add-a-family.md"
        )
    return told


def first_of(network: nn.Module, output: Any, inputs: Inputs) -> torch.Tensor:
    """The answer is the first element of a tuple."""
    answer: torch.Tensor = output[0]
    return answer


def square_sample(network: Any) -> Shape:
    """`in_channels` and `sample_size`, one side or two."""
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def labels_of_embedding(network: Any) -> int | None:
    """`num_class_embeds` where there is a `class_embedding`, else 0."""
    if getattr(network, "class_embedding", None) is None:
        return 0
    count: int | None = network.config.num_class_embeds
    return count


def no_more(network: nn.Module, count: int, generator: torch.Generator | None) -> Inputs:
    """No inputs besides noise, time and class."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """What the engine must know about one class of networks.

    component: its folder in a pipeline; "" where the model folder is the network's.
    told: the keyword arguments of `forward` for inputs under the shared names.
    heard: the answer in its output, laid out like the noisy sample; a learned variance may follow.
    shape: (C, H, W) of one noisy sample.
    classes: the number of class labels; 0 for an unconditional one, None where labels are unbounded.
    more: random further inputs for `count` samples, for tracing, timing and counting.
    prompts: the encodings of a text by a pipeline's encoders, one row each; None without prompts.
    protect: patterns of modules that are not pruned: the network's interface and embeddings.
    ends: those of them that read or make the sample; `--narrow-ends` may cut their inner side.
    blocks: patterns of modules whose outputs features compare, in execution order.
    chained: whether each block is given what the one before it made, and nothing else of the network
        that depends on it: calibration can then go block by block.
    precise: patterns of modules that keep float32 where the rest runs in half precision.
    pipeline: the diffusers pipeline under which a bare network of this class is saved.
    scheduler: the diffusers scheduler whose defaults are assumed where none is found.
    text: whether it is a language model rather than a denoiser.
    channels: what `--mechanism channels` takes: "all" coupled channels, those "inside" residual
        blocks, or none.
    tiny: a configuration of a few thousand weights for the tests.
    """

    component: str = "unet"
    told: Callable[[nn.Module, Inputs], dict[str, Any]] = told_by_signature
    heard: Callable[[nn.Module, Any, Inputs], torch.Tensor] = first_of
    shape: Callable[[Any], Shape] = square_sample
    classes: Callable[[Any], int | None] = labels_of_embedding
    more: More = no_more
    prompts: Callable[[Any, str], Inputs] | None = None
    protect: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
    pipeline: str = "DDPMPipeline"
    scheduler: str = "DDPMScheduler"
    chained: bool = False
    text: bool = False
    channels: Literal["", "all", "inside"] = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)


@cache
def architecture_named(name: str) -> Architecture | None:
    """The record of a class or of its narrowed version, or None where the table has none."""
    alike = (module for ending, module in ENDINGS.items() if name.endswith(ending))
    module = ARCHITECTURES.get(name.removeprefix("Pruned")) or next(alike, None)
    record: Architecture | None = importlib.import_module(module).RECORD if module else None
    return record


def architecture_of(network: nn.Module) -> Architecture:
    """The record of a network inside any wrappers; a default for a class without a record.

    The default fits modules called by the shared names, as our own wrappers are.
    """
    return architecture_named(type(unwrapped(network)).__name__) or _DEFAULT


_DEFAULT = Architecture(
    protect=(
        "conv_in", "conv_out", "time_embedding", "class_embedding",  # of UNets
        "pos_embed", "patch_embed", "x_embedder", "context_embedder", "time_text_embed",
        "proj_in", "proj_out", "norm_out", "time_embed", "caption_projection",
        "condition_embedder", "embed_tokens", "lm_head",
    ),
)  # fmt: skip


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DistributedDataParallel's wrappers."""
    while inner := getattr(network, "_orig_mod", None) or (
        network.module
        if isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel)
        else None
    ):
        network = inner
    return network


def answer(
    network: nn.Module, inputs: Inputs, *, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The network's answer to `inputs`: the only call of a network in the package.

    `weights`: tensors that replace the parameters of these names.
    """
    record, inner = architecture_of(network), unwrapped(network)
    told = record.told(inner, inputs) | {"return_dict": False}
    output = functional_call(network, dict(weights), (), told) if weights else network(**told)
    return record.heard(inner, output, inputs)


def example(network: nn.Module, count: int = 1, *, last: float = 999, seed: int = 0) -> Inputs:
    """Inputs for tracing, timing, counting and export: noise at timesteps from 0 to `last`.

    Classes come in turn; other inputs are random.
    """
    return _random_inputs(network, count, last, generator_for(seed, "export", 0))


def example_shapes(network: nn.Module, count: int) -> Inputs:
    """`example` on the meta device, which has shapes without data."""
    with torch.device("meta"):
        return _random_inputs(network, count, 999, None)


def _random_inputs(
    network: nn.Module, count: int, last: float, generator: torch.Generator | None
) -> Inputs:
    record = architecture_of(network)
    if record.text:
        return record.more(network, count, generator)
    inputs = {
        "sample": torch.randn((count, *record.shape(network)), generator=generator),
        # torch's context forgets linspace once transformers has replaced it for a while
        "timestep": torch.linspace(0, last, count, device=torch.empty(0).device),
    }
    if getattr(network.config, "time_embedding_type", "") == "learned":  # a table's rows
        inputs["timestep"] = inputs["timestep"].long()
    classes = record.classes(network)
    if classes != 0:
        inputs["class_labels"] = torch.arange(count) % (classes or 1)
    return inputs | dict(record.more(network, count, generator))


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are."""
    return next(network.parameters()).device


def like_weights(network: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """`inputs` on the network's device; floating ones except times in the weights' type."""
    weight = next(network.parameters())
    return {
        name: tensor.to(
            weight.device,
            # half types would round timesteps
            weight.dtype if tensor.is_floating_point() and name != "timestep" else tensor.dtype,
        )
        for name, tensor in inputs.items()
    }
