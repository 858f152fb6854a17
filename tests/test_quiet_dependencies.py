"""Neither prunedm nor what it depends on sends anything: seen by a guard of sockets, and at home."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import tiny_folder

from prunedm.system import environment

# Python imports this by itself, in child processes too: it refuses, and writes down, every address
# that is not this machine's. Code in C is not seen: what it leaves at home is
GUARD = """
import ipaddress, os, socket, sys

def is_here(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if arguments[0].family not in (socket.AF_INET, socket.AF_INET6) or arguments[1] is None:
            return
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_here(host):
        with open(os.environ["GUARD_LOG"], "a") as log:
            log.write(f"{event} {host} by {sys.argv}\\n")
        raise OSError(f"the guard refuses {event} {host}")

sys.addaudithook(guard)
"""
# caches, and prunedm's own notes of what runs; nothing that identifies anybody
AT_HOME = (
    ".cache/huggingface/trackio/", ".cache/matplotlib/", ".cache/torch/", ".config/matplotlib/",
    ".local/state/prunedm/", ".swanlab/", ".triton/", ".nv/",
)  # fmt: skip
SWITCHED = [*environment._SWITCHES, "HF_HUB_OFFLINE", "CI", "TF_BUILD", "JENKINS_URL"]
TUNE = ("--steps", "1", "--batch-size", "4", "--validation-problems", "8", "--teacher", "none")
TUNE += ("--track-images", "0", "--dataset", "digits", "--convert-channels", "--device", "cpu")
RUN = {
    "device": "cpu",
    "convert_channels": True,
    "stages": ["mask", "finetune"],
    "mask": {"mechanism": "nm", "score": "magnitude", "pictures": 0},
    "finetune": {"steps": 1, "batch_size": 4, "validation_problems": 8},
    "evaluate": {"depth": "quick", "problems": 8, "latency_repeats": 1},
}


class Guarded:
    """Python in a home of its own, under the guard; `said` is what it printed."""

    def __init__(self, place: Path) -> None:
        self.home, self.place, self.log = place / "home", place, place / "guard.log"
        for folder in (self.home, place / "guard"):
            folder.mkdir()
        (place / "guard" / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        kept = {k: v for k, v in os.environ.items() if k not in SWITCHED}
        path = os.pathsep.join([str(place / "guard"), os.environ.get("PYTHONPATH", "")])
        self.environment = {
            name: value
            for name, value in kept.items()
            if not name.startswith(("XDG_", "WANDB_", "SWANLAB_", "TRACKIO_", "PRUNEDM_"))
        } | {"HOME": str(self.home), "PYTHONPATH": path, "GUARD_LOG": str(self.log)}

    def python(self, code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=self.place, env=self.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        self.said = done.stdout + done.stderr
        assert done.returncode == 0, self.said[-2000:]
        return self.said

    def prunedm(self, *commands: list[str]) -> str:
        """The commands, one after the other, in one process."""
        code = "import json, sys; from prunedm.cli import main\n"
        code += "for words in json.loads(sys.argv[1]): main(words)"
        return self.python(code, json.dumps([[str(word) for word in words] for words in commands]))

    def check(self) -> None:
        """Nothing was sent, and nothing was left at home that has no business there."""
        assert not self.log.exists(), self.log.read_text(encoding="utf-8")
        files = [p.relative_to(self.home).as_posix() for p in self.home.rglob("*") if p.is_file()]
        assert not [file for file in files if not file.startswith(AT_HOME)]
        assert not (self.home / "intel").exists()


@pytest.fixture
def guarded(tmp_path) -> Guarded:
    return Guarded(tmp_path)


def test_the_guard_sees_child_processes_and_lets_this_machine_be(guarded):
    ask = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.{}\n"
    child = f"import subprocess, sys; code = {ask!r}.format(sys.argv[1]);"
    child += "subprocess.run([sys.executable, '-c', code])"
    guarded.python(child, "create_connection(('127.0.0.1', 9), 1)")
    guarded.check()
    for call in ("create_connection(('192.0.2.1', 9), 1)", "getaddrinfo('example.org', 80)"):
        guarded.python(child, call)
    seen = guarded.log.read_text(encoding="utf-8").splitlines()
    assert [line.split(" by ")[0] for line in seen] == [
        "socket.getaddrinfo 192.0.2.1",
        "socket.getaddrinfo example.org",
    ]


def test_export_and_sampling_send_nothing(guarded):
    """OpenVINO's, which has a telemetry."""
    pytest.importorskip("openvino")
    guarded.prunedm(
        ["export", str(tiny_folder()), "file", "--format", "openvino"],
        ["sample", "file", "images", "--count", "2", "--sampling-steps", "2"],
    )
    guarded.check()


@pytest.mark.slow
def test_trackers_send_nothing(guarded):
    said = guarded.prunedm(
        *(
            ["finetune", str(tiny_folder()), f"by-{name}", *TUNE, "--tracker", name]
            + ["--tracker-mode", "offline"] * (name == "swanlab")
            for name in ("tensorboard", "trackio", "swanlab")
            if find_spec(name)
        ),
    )
    guarded.check()
    assert "pload" not in said


@pytest.mark.slow
def test_run_sweep_and_int8_send_nothing(guarded):
    recipe = RUN | {"model": str(tiny_folder())}
    search = {"trials": 1, "space": {"finetune.lr": {"low": 1e-4, "high": 1e-3}}}
    files = {
        "recipe": recipe,
        "sweep": {"recipe": recipe, "grid": {"mask.pattern": ["2:4", "1:4"]}},
        "search": {"recipe": recipe, "search": search, "objectives": {"loss": "minimize"}},
    }
    for name, content in files.items():
        (guarded.place / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    guarded.prunedm(
        ["run", "recipe.yaml", "run"],
        ["sweep", "sweep.yaml", "grid", "--workers", "1"],
        ["sweep", "search.yaml", "searched", "--workers", "1"],
    )
    int8 = [
        "--precision",
        "int8",
        "--problems",
        "8",
        "--samples",
        "0",
        "--convert-channels",
        "--tolerance",
        "9",
    ]
    for name in ("openvino", "onnx"):
        if find_spec("nncf") and find_spec("onnxruntime"):
            guarded.prunedm(["export", recipe["model"], name, "--format", name, *int8])
    guarded.check()


@pytest.mark.parametrize("name", environment._SWITCHES)
def test_what_the_user_has_set_stays(name, monkeypatch):
    for each in environment._SWITCHES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "theirs")
    environment.switch_off()
    assert os.environ[name] == "theirs"
    assert all(os.environ[each] for each in environment._SWITCHES)


@pytest.mark.parametrize(("consent", "imports"), [(None, False), ("0", False), ("1", True)])
def test_openvino_counts_only_where_the_user_has_opted_in(consent, imports, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if consent is not None:
        (tmp_path / "intel").mkdir()
        (tmp_path / "intel" / "openvino_telemetry").write_text(consent, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    del sys.modules["openvino_telemetry"]
    environment.switch_off()
    assert ("openvino_telemetry" not in sys.modules) is imports
