"""prunedm: make trained diffusion models small and fast, and prove what is left still works.

The public names are loaded when first used, so that `import prunedm` and `prunedm --help` are fast.
"""

from importlib import import_module
from typing import Any

from prunedm import options as options
from prunedm.system.auto_classes import know_narrowed_models
from prunedm.system.environment import spin_briefly, switch_off

__version__ = "0.1.0"

switch_off()  # before torch and the dependencies are imported
spin_briefly()
know_narrowed_models()

from prunedm.stages.table import VERBS  # noqa: E402

_HOME = {
    "load": "prunedm.folder",
    "save": "prunedm.folder",
    **dict.fromkeys(VERBS, "prunedm.stages"),
    "run": "prunedm.recipe",
    "Recipe": "prunedm.recipe",
    "sweep": "prunedm.experiments.sweep",
    "Sweep": "prunedm.experiments.plan",
    "UserError": "prunedm.errors",
    "PrunedUNet2DModel": "prunedm.networks.narrowed",
    "use_sparse_kernels": "prunedm.sparse_kernels.selection",
    "MaskProLayer": "prunedm.learning.layer",
    "wrap_model_with_maskpro": "prunedm.learning.layer",
    "unwrap_model": "prunedm.learning.layer",
    "maskpro_layers": "prunedm.learning.layer",
    "separate_parameters": "prunedm.learning.layer",
    "check_nm_compatibility": "prunedm.learning.sparsity",
    "get_model_sparsity_summary": "prunedm.learning.sparsity",
    "DiffusionMaskProTrainer": "prunedm.maskpro.trainer",
    "MaskProConfig": "prunedm.maskpro.config",
    "MaskProEvaluator": "prunedm.maskpro.evaluator",
    # diffusers asks a component's library for its base class before it loads the component
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME and not name.startswith("Pruned"):
        raise AttributeError(f"module 'prunedm' has no attribute {name!r}")
    # PrunedX is the narrowed class X of diffusers
    return getattr(import_module(_HOME.get(name, "prunedm.networks.narrowed")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


__all__ = sorted(_HOME)  # noqa: PLE0605
