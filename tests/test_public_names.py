"""A name is one thing: whatever is imported first, and however often it is asked for."""

import importlib
import inspect
import multiprocessing
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import prunedm
from prunedm import data
from prunedm.data import images
from prunedm.stages.table import VERBS

SUBMODULES = [
    module.name
    for module in pkgutil.walk_packages(prunedm.__path__, "prunedm.")
    if not module.name.endswith("__main__")
]


def compared(first: str) -> dict[str, bool]:
    """By public name: whether it is the same callable before and after all modules are imported.

    In a fork that forgets prunedm, for what other tests have imported must not decide.
    """
    for name in [name for name in sys.modules if name.split(".")[0] == "prunedm"]:
        del sys.modules[name]
    package = importlib.import_module("prunedm")

    def seen() -> dict[str, object]:
        return {name: getattr(package, name) for name in package.__all__}

    before = seen() if first == "names" else {}
    for module in SUBMODULES:
        importlib.import_module(module)
    after, again = seen(), seen()
    same = {n: before.get(n, value) is value is again[n] for n, value in after.items()}
    return {n: same[n] and callable(value) for n, value in after.items()}


@pytest.mark.parametrize("first", ["names", "modules"])
def test_a_public_name_is_the_same_callable_after_every_import(first):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply(compared, [first])
    assert found.keys() == set(prunedm.__all__)
    assert all(found.values()), [name for name, same in found.items() if not same]


def test_no_name_of_a_package_hides_a_module():
    hidden = []
    for module in [prunedm, *map(importlib.import_module, SUBMODULES)]:
        for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
            value = getattr(module, child.name, None)
            hidden += [f"{module.__name__}.{child.name}"] * (not isinstance(value, ModuleType))
    assert [name for name in hidden if not name.endswith("__main__")] == ["prunedm.export"]


def test_the_one_module_of_a_public_name_is_the_function():
    export = prunedm.export
    assert importlib.import_module("prunedm.export") is export is prunedm.stages.export
    assert callable(export)


def test_export_is_called_twice(tmp_path):
    for name in ("first", "second"):
        prunedm.export("digits", tmp_path / name, prunedm.options.ExportOptions(format="packed"))


@pytest.mark.parametrize(
    ("verb", "first"),
    [("train", "out"), ("prune", "source"), ("learn", "source"), ("compare", "models")],
)
def test_help_names_the_verbs_own_parameters(verb, first):
    function = getattr(prunedm, verb)
    parameters = list(inspect.signature(function).parameters)
    titled = ["title"] * (verb == "compare")
    named = [first, *(["out"] if first != "out" else []), "options"]
    assert parameters == [*named, *titled, "progress", "overwrite"]
    assert function.__doc__.startswith(VERBS[verb].help[:40])
    assert function.__annotations__["options"] is VERBS[verb].options


def test_compare_wants_labels(tmp_path):
    with pytest.raises(prunedm.UserError, match="compare takes models by label"):
        prunedm.compare("digits", tmp_path / "out")


def test_what_images_are_read_with_is_found_at_the_package_and_costs_no_torch():
    from prunedm.data import ImageSet, load_images, to_model_range

    assert (ImageSet, load_images, to_model_range) == (
        images.ImageSet, images.load_images, images.to_model_range
    )  # fmt: skip
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        data.nothing  # noqa: B018
    code = "import sys, prunedm.data.hub; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
