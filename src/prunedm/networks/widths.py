"""The widths of a network's layers, and the attributes that must follow when they get narrower.

A size is a number of a module that narrowing may change, under its name in a config:
Linear, Conv1d/2d/3d, Embedding: `in`, `out` (grouped convolutions: `groups`); norms: `channels`
(GroupNorm: `groups`); a module of layers: attributes that cannot be derived from them, as `heads`.
"""

from collections.abc import Callable, Mapping

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from torch import nn

from prunedm.errors import UserError
from prunedm.networks.layer_kinds import find_kind, groups_of, width_of

Widths = dict[str, dict[str, int]]  # module name => its sizes

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# counts that cannot be derived from a layer's width
_HEADS = ("heads", "num_heads", "num_attention_heads")
_KV_HEADS = ("kv_heads", "num_kv_heads", "num_key_value_heads")
# attribute of a module => sides of layers inside it with the same value; the first that exists counts
_FOLLOWS = {
    "inner_dim": ("to_q.out", "proj_in.out"),
    "inner_kv_dim": ("to_k.out",),
    "kv_inner_dim": ("to_k.out",),
    "query_dim": ("to_q.in",),
    "cross_attention_dim": ("to_k.in",),
    "added_kv_proj_dim": ("add_k_proj.in",),
    "out_dim": ("to_out.0.out",),
    "out_context_dim": ("to_add_out.out",),
    "channels": ("conv.in", "Conv2d_0.in"),
    "in_channels": ("conv1.in",),
    "out_channels": ("conv2.out", "conv.out", "Conv2d_0.out"),
}
_PER_HEAD = ("head_dim", "dim_head", "attention_head_dim")
# sides of layers inside a module that must be equally wide
_AGREE = (
    ("to_q.out", "add_q_proj.out", "to_out.0.in", "to_add_out.in"),
    ("to_k.out", "to_v.out", "add_k_proj.out", "add_v_proj.out"),
    ("conv1.in", "norm1.channels", "conv_shortcut.in"),
    ("conv1.out", "norm2.channels", "conv2.in"),
    ("conv2.out", "conv_shortcut.out"),
)


def sizes(module: nn.Module) -> dict[str, int]:
    """The sizes of a layer; for a module of layers, those that its layers do not determine."""
    if find_kind(module) is not None:
        grouped = {"groups": groups_of(module)} if groups_of(module) > 1 else {}
        return {"in": width_of(module, "in"), "out": width_of(module, "out"), **grouped}
    if isinstance(module, nn.Embedding):
        return {"in": module.num_embeddings, "out": module.embedding_dim}
    if isinstance(module, nn.GroupNorm):
        return {"channels": module.num_channels, "groups": module.num_groups}
    if _is_norm(module):
        return {"channels": next(module.parameters()).numel()}
    return {name: n for name, n in attributes(module).items() if name in _HEADS + _KV_HEADS}


def attributes(module: nn.Module) -> dict[str, int]:
    """The integer attributes of a module itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_")
    }


def differences(
    network: nn.Module, twin: nn.Module, of: Callable[[nn.Module], Mapping[str, object]]
) -> dict[str, tuple[object, object]]:
    """What differs from a twin, and how: shapes of tensors, then values of modules by `of`."""
    shapes, wanted = (
        {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        for net in (network, twin)
    )
    found: dict[str, tuple[object, object]] = {
        name: (shapes.get(name), wanted.get(name))
        for name in shapes.keys() | wanted.keys()
        if shapes.get(name) != wanted.get(name)
    }
    twins = dict(twin.named_modules())
    for name, module in network.named_modules():
        other = of(twins[name]) if name in twins else {}
        for attribute, value in sorted(of(module).items()):
            if other.get(attribute) != value:
                found[f"{name}.{attribute}"] = value, other.get(attribute)
    return found


def resize(network: nn.Module, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Give the named modules smaller sizes and freshly initialised parameters, in place.

    Modules are changed rather than replaced: diffusers registers some convolutions under two names.
    Raises `UserError`, before anything is allocated, where a size does not fit its module.
    """
    if not isinstance(widths, Mapping) or not all(isinstance(s, Mapping) for s in widths.values()):
        raise UserError("widths is not a table of module, size and number")
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, asked in widths.items():
        if name not in modules:
            raise UserError(f"widths: the architecture has no module named {name!r}")
        _check_sizes(name, modules[name], asked)
    for name, asked in widths.items():
        _set_sizes(modules[name], asked)
    sync_attributes(network)


def narrow_layer(
    layer: nn.Module, keep_in: torch.Tensor | None, keep_out: torch.Tensor | None
) -> None:
    """Keep these positions of a layer's two sides, in place; None keeps a side whole.

    For norms and depthwise convolutions `keep_out` applies to both sides.
    """
    depthwise = isinstance(layer, _CONVOLUTIONS) and layer.groups > 1
    sides = (keep_out, None if depthwise else keep_in)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        value = parameter.detach()
        for dim, keep in enumerate(sides[::-1] if _inputs_first(layer, value) else sides):
            if keep is not None and dim < value.ndim:
                value = value.index_select(dim, keep.to(value.device))
        replace_parameter(layer, name, value)
    old = sizes(layer)
    inputs = old.get("in", 0) if keep_in is None else len(keep_in)
    outputs = old.get("out", old.get("channels", 0)) if keep_out is None else len(keep_out)
    if depthwise:
        assert isinstance(layer, _CONVOLUTIONS)
        inputs, layer.groups = outputs, layer.groups * outputs // old["out"]
    set_layer_widths(layer, inputs, outputs)


def sync_attributes(network: nn.Module) -> None:
    """Update the attributes (read by diffusers) that repeat the widths of layers inside a module.

    Raises `UserError` where the layers of one module do not fit together.
    """
    for name, module in network.named_modules():
        _check_attention(name, module)
        for sides in _AGREE:
            _check_agreement(name, module, sides)
        _check_residual(name, module)
        held = attributes(module)
        for attribute in held.keys() & _FOLLOWS.keys():
            width = next(filter(None, (_side(module, s) for s in _FOLLOWS[attribute])), None)
            setattr(module, attribute, width or held[attribute])
        _sync_heads(module)
        _sync_parallel(name, module)
        for resampler in (getattr(module, "upsample", None), getattr(module, "downsample", None)):
            if isinstance(resampler, nn.Module) and hasattr(module, "conv1"):
                # it may have no convolution to derive them from
                resampler.channels = resampler.out_channels = module.in_channels


def replace_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace parameter `name` by `value`, trainable if the old one was."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))


def set_layer_widths(layer: nn.Module, width_in: int, width_out: int) -> None:
    """Set the width attributes of a layer; its parameters do not change."""
    if kind := find_kind(layer):
        setattr(layer, kind.inputs, width_in)
        setattr(layer, kind.outputs, width_out)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = width_in, width_out
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = width_out
    elif _is_norm(layer):
        for name in {"normalized_shape", "dim"} & vars(layer).keys():
            setattr(layer, name, type(getattr(layer, name))((width_out,)))
    else:
        raise TypeError(f"a {type(layer).__name__} has no width")


def _is_layer(module: nn.Module) -> bool:
    """Whether it has widths of its own, and is not a module of layers."""
    known = isinstance(module, nn.Embedding | nn.GroupNorm)
    return known or find_kind(module) is not None or _is_norm(module)


def _inputs_first(layer: nn.Module, value: torch.Tensor) -> bool:
    """Whether a parameter is [I, O]."""
    kind = find_kind(layer)
    return isinstance(layer, nn.Embedding) or (value.ndim > 1 and bool(kind and kind.transposed))


def _is_norm(module: nn.Module) -> bool:
    """Whether its parameters are vectors of one length, as in LayerNorm and the various RMSNorms."""
    shapes = {tuple(parameter.shape) for parameter in module.parameters(recurse=False)}
    return len(shapes) == 1 and len(*shapes) == 1 and not list(module.children())


def _check_sizes(name: str, module: nn.Module, asked: Mapping[str, int]) -> None:
    dense = sizes(module)
    expected = set(dense)
    if isinstance(module, _CONVOLUTIONS):
        expected = {"in", "out"} | (expected | {"groups"} & set(asked))
    elif not _is_layer(module):
        dense = attributes(module)
        expected = set(asked) & set(dense)
    if not asked or set(asked) != expected:
        known = ", ".join(sorted(dense)) or "nothing"
        raise UserError(
            f"widths: {name!r} ({type(module).__name__}) is described by {known}, "
            f"not by {', '.join(map(str, asked)) or 'nothing'}"
        )
    for size, value in asked.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"widths: {name!r} needs whole numbers of 1 or more, got {dict(asked)}")
        if size != "groups" and value > dense[size]:
            raise UserError(
                f"widths: {name!r} is made {value} wide ({size}), but is {dense[size]} wide before"
            )
    for size in ("channels", "in", "out") if "groups" in asked else ():
        if asked.get(size, 0) % asked["groups"]:
            raise UserError(
                f"widths: {name!r}: {asked['groups']} groups do not divide {asked[size]} channels"
            )


def _set_sizes(module: nn.Module, asked: Mapping[str, int]) -> None:
    for name in {"groups", "num_groups"} & vars(module).keys() if "groups" in asked else ():
        setattr(module, name, asked["groups"])
    parameters = dict(module.named_parameters(recurse=False))
    if not _is_layer(module):
        for name, value in asked.items():
            setattr(module, name, value)
        return
    outputs = asked.get("out", asked.get("channels", 0))
    set_layer_widths(module, asked.get("in", 0), outputs)
    for name, old in parameters.items():
        shape = [outputs, *old.shape[1:]]
        if _inputs_first(module, old):
            shape = [asked["in"], outputs]
        elif old.ndim > 1:
            shape[1] = asked["in"] // asked.get("groups", 1)
        replace_parameter(module, name, old.new_empty(shape))
    _initialise(module)


def _initialise(module: nn.Module) -> None:
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    for name, parameter in module.named_parameters(recurse=False):  # RMSNorms
        nn.init.constant_(parameter, float(name != "bias"))


def _side(module: nn.Module, side: str) -> int | None:
    """The size that e.g. "to_out.0.in" names, where the module has such a layer."""
    path, _, size = side.rpartition(".")
    layer: object = module
    for part in path.split("."):
        inside = layer._modules if isinstance(layer, nn.Module) else {}
        layer = inside.get(part)
    return sizes(layer).get(size) if isinstance(layer, nn.Module) else None


def _check_agreement(name: str, module: nn.Module, sides: tuple[str, ...]) -> None:
    needed, *others = (_side(module, side) for side in sides)
    if needed is not None:
        for side, width in zip(sides[1:], others, strict=True):
            _agree(name, side, needed if width is None else width, needed)


def _check_residual(name: str, module: nn.Module) -> None:
    """Raise `UserError` unless residual, time and feed-forward widths of a block agree."""
    conv_in, conv_out = _side(module, "conv1.in"), _side(module, "conv2.out")
    if conv_in and conv_out and getattr(module, "conv_shortcut", 0) is None:
        _agree(name, "conv2.out", conv_out, conv_in)
    time, mid = _side(module, "time_emb_proj.out"), _side(module, "conv1.out")
    if time and mid:
        factor = 2 if getattr(module, "time_embedding_norm", "") == "scale_shift" else 1
        _agree(name, "time_emb_proj.out", time, factor * mid)
    read, hidden = _side(module, "net.2.in"), _side(module, "net.0.proj.out")
    if read and hidden:
        activation = module.get_submodule("net.0")
        factor = 2 if isinstance(activation, GEGLU | SwiGLU) else 1
        _agree(name, "net.0.proj.out", hidden, factor * read)


def _check_attention(name: str, module: nn.Module) -> None:
    inner, keys, stream = (_side(module, side) for side in ("to_q.out", "to_k.out", "to_q.in"))
    heads = _count(module, _HEADS)
    if not inner or not keys or not stream or not heads:
        return
    if inner % heads:
        raise UserError(f"widths: {name!r}: {heads} heads do not divide {inner} channels")
    shared = getattr(module, "inner_kv_dim", 0) != getattr(module, "inner_dim", 0)
    kv_heads = _count(module, _KV_HEADS) or (keys * heads // inner if shared else heads)
    _agree(name, "to_k.out", keys, kv_heads * (inner // heads))
    if not kv_heads or heads % kv_heads:
        raise UserError(f"widths: {name!r}: {heads} heads cannot share {kv_heads} keys evenly")
    if getattr(module, "is_cross_attention", None) is False:
        for side in ("to_k.in", "to_v.in"):
            _agree(name, side, _side(module, side) or stream, stream)
    if getattr(module, "residual_connection", False):
        for side in ("to_out.0.out", "group_norm.channels"):
            _agree(name, side, _side(module, side) or stream, stream)


def _sync_heads(module: nn.Module) -> None:
    inner, held = _side(module, "to_q.out"), attributes(module)
    heads, kv_heads = _count(module, _HEADS), _count(module, _KV_HEADS)
    if not inner or not heads:
        return
    follow = dict.fromkeys(_PER_HEAD, inner // heads) | {"sliceable_head_dim": heads}
    if kv_heads:
        follow["num_key_value_groups"] = heads // kv_heads
    for name in follow.keys() & held.keys():
        setattr(module, name, follow[name])
    if hasattr(module, "scale_qk"):
        setattr(module, "scale", (inner // heads) ** -0.5 if module.scale_qk else 1.0)  # noqa: B010


def _sync_parallel(name: str, module: nn.Module) -> None:
    """Update blocks whose last layer reads the attention output joined with feed-forward units."""
    held = attributes(module)
    inner, reads = _side(module, "attn.to_q.out"), _side(module, "proj_out.in")
    made, joint = _side(module, "to_qkv_mlp_proj.out"), _side(module, "to_out.in")
    if made and joint:  # Flux.2 computes all in one layer
        module.inner_dim = inner = held["heads"] * held["head_dim"]  # type: ignore[assignment]
        hidden, reads = held["mlp_mult_factor"] * (joint - inner), joint
        _agree(name, "to_qkv_mlp_proj.out", made, 3 * inner + hidden)
    if not inner or not reads or "mlp_hidden_dim" not in held:
        return
    module.mlp_hidden_dim = hidden = reads - inner  # type: ignore[assignment]
    if made := _side(module, "proj_mlp.out"):
        gated = isinstance(getattr(module, "act_mlp", None), nn.SiLU)
        _agree(name, "proj_mlp.out", made, (2 if gated else 1) * hidden)
    for reader in module.children():  # tensor parallelism splits it there
        if hasattr(reader, "_tp_packed_row_blocks"):
            setattr(reader, "_tp_packed_row_blocks", [inner, hidden])  # noqa: B010
        if hasattr(reader, "_tp_packed_col_blocks"):
            parts = [inner] * 3 + [hidden] * held["mlp_mult_factor"]
            setattr(reader, "_tp_packed_col_blocks", parts)  # noqa: B010


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    held = attributes(module)
    return next((held[name] for name in names if name in held), None)


def _agree(block: str, side: str, width: int, expected: int) -> None:
    if width != expected:
        child = side.rpartition(".")[0]
        raise UserError(
            f"widths: '{block}.{child}' is {width} wide where its block needs {expected}"
        )
