"""The tree is the architecture: imports point one way, and nothing unsafe is called anywhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunedm

SOURCE = Path(prunedm.__file__).parent
# from the top down; a module may import from its own level or below
LEVELS = [
    {"__main__"},
    {"cli"},
    {"experiments"},
    {
        "recipe",
        "recipe_draft",
        "console",
        "messages",
        "maskpro",
        "preset_table",
        "monitor",
        "export",
    },
    {"stages", "configuration"},
    {"folder", "scores", "removal", "learning", "recovery", "evaluation", "sampling", "deployment"}
    | {"sparse_kernels"},
    {"training"},
    {
        "masks",
        "packed",
        "calibration",
        "record",
        "data",
        "networks",
        "architecture",
        "architectures",
    }
    | {"task", "tensor_cache", "model_files"},
    {"options", "tables", "progress", "system", "randomness", "errors", "hub", "reading"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
BELOW_STAGES = {name for names in LEVELS[5:] for name in names}


def modules() -> dict[str, ast.Module]:
    """Every module's tree by dotted name, without "prunedm."."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    trees.pop("")  # the public names point to everything, by strings
    return trees


MODULES = modules()


def imports(tree: ast.Module) -> set[str]:
    """All that a module imports anywhere in it, dotted; `from a import b` is "a.b"."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(tree: ast.Module) -> set[str]:
    """The top-level parts of prunedm that a module imports."""
    names = {name.split(".")[1] for name in imports(tree) if name.startswith("prunedm.")}
    return names - {"__version__"}


def calls(tree: ast.Module) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_module_has_its_place():
    assert {name.split(".")[0] for name in MODULES} - {"assets"} == set(LEVEL)


def test_imports_point_down():
    upward = {
        name: others
        for name, tree in MODULES.items()
        if (others := {o for o in own(tree) if LEVEL[o] < LEVEL[name.split(".")[0]]})
    }
    assert not upward


@pytest.mark.parametrize(
    ("above", "below"),
    [
        ("scores", "removal"),
        ("removal", "scores"),
        ("scores", "learning"),
        ("recovery", "learning"),
        ("learning", "recovery"),
        ("evaluation", "folder"),
        ("evaluation", "recovery"),
        ("masks", "networks.narrowed"),
    ],
)
def test_parts_that_change_apart_do_not_know_each_other(above, below):
    for name, tree in MODULES.items():
        if name.split(".")[0] == above:
            assert not any(f"{path}.".startswith(f"prunedm.{below}.") for path in imports(tree)), (
                name
            )


NETWORKS = {"denoiser", "network", "unet", "student", "teacher"}
FEATURES = {"evaluation.features", "stages.distance"}  # their networks look at finished images


def test_one_function_calls_networks():
    """By the names that networks have here, and by diffusers' `return_dict`."""
    others = []
    for name, tree in MODULES.items():
        for call in calls(tree) if name not in {"architecture", *FEATURES} else []:
            called = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if called in NETWORKS or "return_dict" in {keyword.arg for keyword in call.keywords}:
                others.append(f"{name}:{call.lineno}")
    assert not others


def test_there_are_no_cycles_between_modules():
    graph = {
        name: {
            max((m for m in MODULES if f"{path}.".startswith(f"prunedm.{m}.")), key=len, default="")
            for path in imports(tree)
            if path.startswith("prunedm.")
        }
        - {name, ""}
        for name, tree in MODULES.items()
    }
    graph = {n: others for n, others in graph.items() if n not in ("stages", "scores")}
    while graph:
        leaves = [name for name, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_nothing_below_stages_prints_or_parses():
    talk = {"rich", "cyclopts", "argparse", "yaml", "logging"}
    offenders = []
    for name, tree in MODULES.items():
        if name.split(".")[0] not in BELOW_STAGES or name == "reading":
            continue
        offenders += [name] * bool({path.split(".")[0] for path in imports(tree)} & talk)
        offenders += [name] * bool(own(tree) & {"cli", "console", "configuration", "recipe"})
        offenders += [f"{name}:{c.lineno}" for c in calls(tree) if ast.unparse(c.func) == "print"]
    assert not offenders


def test_stages_do_not_print_either():
    for name, tree in MODULES.items():
        if name.split(".")[0] in ("stages", "recipe"):
            assert not {"cli", "console"} & own(tree)
            assert not [
                c for c in calls(tree) if isinstance(c.func, ast.Name) and c.func.id == "print"
            ]


def test_nothing_is_unpickled_or_executed():
    assert not [f"{name}:{what}" for name, tree in MODULES.items() for what in _unsafe(tree)]


def _unsafe(tree: ast.Module) -> Iterator[str]:
    """Calls and imports that could run what stands in a file."""
    for call in calls(tree):
        function = ast.unparse(call.func)
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            function in ("eval", "exec", "compile", "__import__", "torch.save", "pd.read_pickle")
            or function.startswith(("pickle.", "marshal.", "joblib.", "os.system"))
            or (function == "torch.load" and named.get("weights_only") != "True")
            or (
                function in ("np.load", "numpy.load", "np.save", "numpy.save")
                and named.get("allow_pickle") != "False"
            )
            or named.get("trust_remote_code", "False") != "False"
            or named.get("shell", "False") != "False"
        ):
            yield f"{call.lineno} {function}"
    for path in imports(tree):
        if path.split(".")[0] in ("joblib", "dill", "marshal") or path.startswith("pickle."):
            yield path
    # the name of an exception is all that pickle may be imported for
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    yield from {u for u in used if u.startswith("pickle.")} - {"pickle.UnpicklingError"}


def test_files_and_functions_stay_small():
    offenders = []
    for name, tree in MODULES.items():
        path = SOURCE / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        offenders += [name] * (len(path.read_text(encoding="utf-8").splitlines()) > 500)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                said = ast.get_docstring(node) or node.name.startswith("_") or _is_small(node)
                if node.end_lineno - node.lineno >= 80 or not said:
                    offenders.append(f"{name}.{node.name}")
    assert not offenders


def _is_small(node: ast.FunctionDef) -> bool:
    """What may go without a docstring: its name and its types say it all."""
    return node.end_lineno - node.lineno < 20


def test_random_numbers_come_from_named_seeds():
    drawing = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm")}
    for name, tree in MODULES.items():
        drawn = {ast.unparse(c.func) for c in calls(tree)}
        assert not drawn & {"random.random", "random.seed", "np.random.seed", "np.random.rand"}, (
            name
        )
        assert not any(path.split(".")[0] == "random" for path in imports(tree)), name
        for call in calls(tree):
            if ast.unparse(call.func) in drawing:
                seeded = "generator" in {keyword.arg for keyword in call.keywords}
                assert seeded or name == "evaluation.speed", f"{name}:{call.lineno}"


def test_one_name_is_one_class():
    places: dict[str, list[str]] = {}
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}
