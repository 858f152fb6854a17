"""One thread: the test models are too small for more to help."""

import gc
import os

import pytest

import prunedm  # noqa: F401 - before torch: its threads then wait as prunedm lets them

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# the old scripts' three suites: `pytest -m foundation`
GROUPS = {
    "foundation": ("masks", "maskpro_layer", "distribution", "estimators", "swaps", "permutation"),
    "integration": ("folder", "masks_stage", "loss_stage", "mechanisms", "stages", "evaluator"),
    "training": ("maskpro_trainer", "learning", "loop", "recovery", "tracking", "train_processes"),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The collector passes over all that modules make, and looks seldom: it took a tenth."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)  # new objects; Python's own is 700
        gc.enable()


def pytest_collection_modifyitems(items):
    # last, for an audit hook stays: with it, what copies modules and tensors takes a tenth longer
    items.sort(key=lambda item: "killer" in item.fixturenames)
    for item in items:
        for group, files in GROUPS.items():
            if item.path.stem.removeprefix("test_") in files:
                item.add_marker(group)


@pytest.fixture(scope="session", autouse=True)
def _place_of_what_is_made_once(tmp_path_factory):
    import helpers  # not above: the process that only hands tests out has no use for PyTorch

    base = tmp_path_factory.getbasetemp()
    # below that of the run, where there are several processes
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    place.mkdir(exist_ok=True)
    helpers.SHARED[:] = [place]


@pytest.fixture(scope="session", autouse=True)
def _state_of_running_stages(tmp_path_factory):
    """No test writes to the home directory; of the session, for fixtures of modules too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNEDM_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("PRUNEDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _blank_figures():
    """Half a second for each figure of each stage would be a third of the suite's time.

    Who looks at one asks for `helpers.drawn_figures`.
    """
    import helpers  # noqa: F401 - it keeps what draws them
    from matplotlib.figure import Figure
    from PIL import Image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **__: Image.new("RGB", (8, 8)).save(path))
        yield
