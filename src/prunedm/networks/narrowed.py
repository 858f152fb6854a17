"""Narrowed networks of any class, which diffusers or transformers load once `prunedm` is imported.

diffusers' configs give one width for a whole stage, and its classes build every block.
`narrowed(UNet2DModel)` is the class `PrunedUNet2DModel`: its config has the dense architecture, and
    widths:  module name => sizes that differ from it (`prunedm.networks.widths`)
    dropped: names of the dropped blocks (`prunedm.networks.blocks`)
Those of transformers are in `prunedm.networks.narrowed_language`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from prunedm.errors import UserError
from prunedm.networks.blocks import drop_blocks, dropped_blocks
from prunedm.networks.narrowed_language import (
    dense_language_config,
    narrowed_language_class,
    plain_config,
    plain_values,
)
from prunedm.networks.widths import (
    Widths,
    attributes,
    differences,
    resize,
    sizes,
    sync_attributes,
)

PREFIX = "Pruned"
_OTHERS: dict[str, type] = {}  # narrowed versions of classes outside diffusers


class Narrowed:
    """Base of all narrowed classes; `dense_class` is the class of the dense architecture."""

    dense_class: type


def __getattr__(name: str) -> type:
    """`PrunedX` for every class X of diffusers, which looks here for classes of a model_index.json."""
    if name in _OTHERS:
        return _OTHERS[name]
    if name.startswith(PREFIX):
        for library in (diffusers, transformers):
            cls = getattr(library, name.removeprefix(PREFIX), None)
            if _is_model(cls) or _is_language_model(cls):
                return narrowed(cls)
    raise AttributeError(f"prunedm has no {name!r}")


@cache
def narrowed(cls: Any) -> Any:
    """The class of narrowed networks of a model class of diffusers or transformers.

    Its arguments are those of `cls`, for the dense architecture, and `widths` and `dropped`. Raises
    `UserError` where `cls` is not a model class.
    """
    if not (_is_model(cls) or _is_language_model(cls)):
        raise UserError(
            f"{cls.__name__} is not a model class of diffusers or transformers, so it cannot be "
            "narrowed"
        )
    if issubclass(cls, Narrowed):
        return cls
    if _is_language_model(cls):
        return narrowed_language_class(cls, PREFIX, Narrowed)
    # diffusers writes the module into model_index.json, and looks for ModelMixin in it
    own = {"__init__": _init(cls), "__module__": "prunedm", "dense_class": cls}
    made = type(PREFIX + cls.__name__, (Narrowed, cls), own | {"__doc__": _init.__doc__})
    if getattr(diffusers, cls.__name__, None) is not cls:
        _OTHERS[made.__name__] = made
    return made


def as_narrowed(network: Any) -> Any:
    """Turn a network with narrowed layers or dropped blocks into one that can be saved, in place.

    A language model keeps its own class where its config can say the widths. Raises `UserError` unless
    a network built from the new config has the same shapes and integer attributes, and so will load
    again.
    """
    cls = narrowed(_dense_class(network))
    sync_attributes(network)
    if _is_language_model(cls):
        _name_language_model(network, cls)
        return network
    with torch.device("meta"):
        twin = cls(
            **_dense_config(network),
            widths=widths_of(network),
            dropped=dropped_blocks(network) or None,
        )
    _check_same(network, twin)
    network.__class__ = cls
    network._internal_dict = twin._internal_dict  # what `config` reads
    return network


def widths_of(network: Any) -> Widths:
    """Sizes of modules that differ from the dense architecture of `network.config`."""
    dense = _dense(network)
    drop_blocks(dense, dropped_blocks(network))
    before = {name: sizes(module) for name, module in dense.named_modules()}
    after = {name: sizes(module) for name, module in network.named_modules()}
    widths = {name: own for name, own in after.items() if own and own != before.get(name)}
    resize(dense, widths)
    twins = dict(dense.named_modules())
    for name, module in network.named_modules():  # attributes that no rule derives from the layers
        rest = attributes(module).items() - attributes(twins[name]).items()
        if rest and not sizes(module).keys() & {"in", "channels"}:
            widths[name] = widths.get(name, {}) | dict(sorted(rest))
    return widths


def loads_plainly(network: Any) -> bool:
    """Whether a narrowed language model loads without `prunedm`: its class's config says its widths."""
    return plain_config(network, _dense(network), _dense_class(network)) is not None


def _name_language_model(network: Any, cls: Any) -> None:
    """Give a language model the class and config that say its widths."""
    dense, attention = _dense(network), network.config._attn_implementation
    if dict(dense.named_modules()).keys() != dict(network.named_modules()).keys():
        raise UserError(f"a {cls.dense_class.__name__} has other modules than its config builds")
    config = plain_config(network, dense, cls.dense_class)
    kind = cls.dense_class if config is not None else cls
    if config is None:
        config = cls.config_class(**dense_language_config(network).to_dict())
        config.widths = widths_of(network)
        with torch.device("meta"):
            twin = cls(config)
        if wrong := differences(network, twin, plain_values):
            raise UserError(f"{min(wrong)} would be otherwise when it is loaded again")
    # one object, which the modules share; private attributes say how attention is computed
    held, new = vars(network.config), vars(config)
    private = {n: value for n, value in held.items() if n.startswith("_") and n not in new}
    network.config.__class__ = type(config)
    held.clear()
    held.update(new | private)
    network.config._attn_implementation = attention
    network.__class__ = kind


def _dense(network: Any) -> Any:
    """The dense architecture of the network's config, on the meta device."""
    with torch.device("meta"):
        if _is_language_model(type(network)):
            return _dense_class(network)(dense_language_config(network))
        return _dense_class(network)(**_dense_config(network))


def _is_model(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, ModelMixin) and issubclass(cls, ConfigMixin)


def _is_language_model(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel)


def _init(cls: Any) -> Callable[..., None]:
    """Build the dense architecture of the arguments, drop `dropped`, narrow to `widths`."""

    def __init__(
        self: Any,
        *args: Any,
        widths: Mapping[str, Mapping[str, int]] | None = None,
        dropped: Sequence[str] | None = None,
        **dense: Any,
    ) -> None:
        cls.__init__(self, *args, **dense)
        # without dropped blocks, configs are the same as those of older versions
        self.register_to_config(widths=widths, **({"dropped": dropped} if dropped else {}))
        drop_blocks(self, () if dropped is None else dropped)
        resize(self, widths or {})

    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("widths", "dropped")
    ]
    dense = inspect.signature(cls.__init__)
    # diffusers takes the keys of a config from it
    signature = dense.replace(parameters=[*dense.parameters.values(), *own])
    setattr(__init__, "__signature__", signature)  # noqa: B010 (functions have none for mypy)
    return __init__


def _dense_class(network: Any) -> Any:
    return network.dense_class if isinstance(network, Narrowed) else type(network)


def _dense_config(network: Any) -> dict[str, Any]:
    names = inspect.signature(_dense_class(network).__init__).parameters
    return {name: value for name, value in network.config.items() if name in names}


def _check_same(network: nn.Module, twin: nn.Module) -> None:
    for name, (own, other) in differences(network, twin, attributes).items():
        if isinstance(own, int):
            raise UserError(f"{name} is {own}, which a config cannot say")
        raise UserError(
            f"{name} is {own}, but {other} when it is loaded again: "
            f"its kind of layer cannot be narrowed"
        )
