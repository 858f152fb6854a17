"""Narrowed language models in transformers' tables of classes, which `AutoModelForCausalLM` reads.

transformers has no entry point for this, and to import it at once would cost every start seconds: its
table of configs is completed right after it is imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

MODEL_TYPE = "prunedm_"  # begins the `model_type` of narrowed models
_TABLE = "transformers.models.auto.configuration_auto"


def know_narrowed_models() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know narrowed models, now or on their import."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _OnImport())


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers after transformers' table of configs was imported, once."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
    auto.CONFIG_MAPPING._extra_content = _Configs(auto.CONFIG_MAPPING)


class _Configs(dict[str, Any]):
    """The configs of narrowed models by their `model_type`, made when one is asked for."""

    def __init__(self, mapping: Any) -> None:
        super().__init__(mapping._extra_content)
        self.dense = mapping

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or not (
            isinstance(name, str) and name.startswith(MODEL_TYPE)
        ):
            return super().__contains__(name)
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return name.removeprefix(MODEL_TYPE) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def __missing__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        from transformers import AutoModelForCausalLM

        config = self.dense[name.removeprefix(MODEL_TYPE)]
        dense: Any = AutoModelForCausalLM._model_mapping[config]
        made = getattr(sys.modules["prunedm"], f"Pruned{dense.__name__}")
        AutoModelForCausalLM.register(made.config_class, made, exist_ok=True)
        return made.config_class
