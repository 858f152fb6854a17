"""Narrowed language models: folders that `AutoModelForCausalLM` loads once `prunedm` is imported.

transformers' configs give one width for all blocks. Where such a config can say what is left, a network
keeps its class and plain transformers loads it. Else `PrunedLlamaForCausalLM` takes its place, whose
config has the dense architecture and `widths`: module name => sizes that differ from it
(`prunedm.networks.widths`). Its `model_type` is `prunedm_llama`, so that plain transformers, which
does not know it, names what is missing.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import nn

from prunedm.networks.widths import attributes, differences, resize, sizes
from prunedm.system.auto_classes import MODEL_TYPE

# in names of numbers that say something else than the width of heads or hidden units
_OTHER = re.compile(r"vocab|position|_id$|window|layers?$|hidden_size|d_model|n_embd|embed|rank")
_MOST_TRIED = 64  # configs


@cache
def narrowed_language_class(cls: Any, prefix: str, base: type) -> Any:
    """The class of narrowed networks of a `PreTrainedModel`, and of their config."""
    dense = cls.config_class
    config = type(
        prefix + dense.__name__,
        (dense,),
        {
            "model_type": MODEL_TYPE + dense.model_type,
            "__module__": "prunedm",
            "dense_class": dense,
        },
    )

    def __init__(self: Any, config: Any, *args: Any, **named: Any) -> None:
        """The dense architecture of the config, narrowed to its `widths`."""
        cls.__init__(self, config, *args, **named)
        resize(self, getattr(config, "widths", None) or {})

    own = {
        "__init__": __init__,
        "__module__": "prunedm",
        "config_class": config,
        "dense_class": cls,
    }
    made = type(prefix + cls.__name__, (base, cls), own)
    _convert_alike(cls, made)
    return made


def _convert_alike(cls: Any, made: Any) -> None:
    """Read and write the tensors of files as for the dense class (fused experts)."""
    from transformers import conversion_mapping

    for old, new in (
        (cls.__name__, made.__name__),
        (cls.config_class.model_type, made.config_class.model_type),
    ):
        if (known := conversion_mapping.get_checkpoint_conversion_mapping(old)) is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(new, known, overwrite=True)


def dense_language_config(network: Any, **changes: Any) -> Any:
    """The config of the dense architecture, a copy, with other values."""
    config = network.config
    cls = getattr(config, "dense_class", type(config))
    values = {k: v for k, v in config.to_dict().items() if k not in ("widths", "model_type")}
    return cls.from_dict(values | changes)


def plain_config(network: Any, dense: Any, cls: Any) -> Any:
    """A config with which the plain class has the network's shapes and attributes, or None.

    dense: the dense architecture on the meta device. Numbers of the dense config that equal a width
    or a count that has changed are changed alike, most of them first.
    """
    changed = _changed(network, dense)
    if changed is None:
        return None
    values = dense_language_config(network).to_dict()
    fixed = {}
    if "head_dim" in values and values["head_dim"] is None:  # else it would follow from the heads
        dims = (vars(module).get("head_dim") for module in network.modules())
        fixed = {"head_dim": next(filter(None, dims), None)}
    candidates = [
        (name, new)
        for name, value in values.items()
        if not _OTHER.search(name)
        for new in _possible(name, value, changed)
    ]
    for chosen in _subsets(candidates):
        try:
            config = dense_language_config(network, **(fixed | dict(chosen)))
            with torch.device("meta"):
                twin = cls(config)
        except Exception:  # validators of transformers raise many types
            continue
        if not differences(network, twin, plain_values):
            return config
    return None


def plain_values(module: nn.Module) -> dict[str, int | float | str]:
    """The numbers, texts and truths that a module holds itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name != "training" and not name.startswith("_")
    }


def _changed(network: nn.Module, dense: nn.Module) -> dict[int, int] | None:
    """Old widths and counts => new ones; None where one became several."""
    changed: dict[int, int] = {}
    before = dict(dense.named_modules())
    for name, module in network.named_modules():
        old, new = (attributes(m) | sizes(m) for m in (before[name], module))
        for key in old.keys() & new.keys():
            if old[key] != new[key] and changed.setdefault(old[key], new[key]) != new[key]:
                return None
    return changed


def _possible(name: str, value: object, changed: Mapping[int, int]) -> set[int]:
    """New values that a config's number may have: a width's, or a count of heads in proportion."""
    if value is None and re.search("inner|interm|ff", name):
        return set(changed.values())
    if type(value) is not int:
        return set()
    if "head" in name and "dim" not in name:
        return {value * new // old for old, new in changed.items() if value * new % old == 0}
    return {changed[value]} if value in changed else set()


def _subsets(candidates: list[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], ...]]:
    tried = 0
    for count in range(len(candidates), -1, -1):
        for chosen in combinations(candidates, count):
            if len({name for name, _ in chosen}) == count and (tried := tried + 1) <= _MOST_TRIED:
                yield chosen
