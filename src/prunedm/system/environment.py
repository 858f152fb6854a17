"""Environment variables that dependencies read when they are imported; child processes inherit them.

*Telemetry* is off: no dependency counts uses or sends anything unless the user asked for it. *OpenMP*'s
threads spin only briefly before they sleep: PyTorch's spin while they wait for one another (libgomp:
300,000 rounds), and beside other busy processes they occupy the cores that the work needs, so that a
call of 50 ms takes seconds (figures in docs/log.md). Variables set by the user, and modules that are
already imported, are left alone.
"""

import os
import sys
from pathlib import Path

_SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it diffusers and datasets
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.29 and later: a device id and events to Microsoft
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio and its client, which trackio uses
    "WANDB_ERROR_REPORTING": "false",  # reports of wandb's own crashes; runs are still sent
}
# of OpenVINO and NNCF: has no variable, but both work where it cannot be imported
_OPENVINO = "openvino_telemetry"


_OMP_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN = "1000"  # rounds: enough for the next parallel loop, microseconds otherwise


def spin_briefly() -> None:
    """Limit OpenMP's spinning, unless the user has set a policy; call it before importing torch."""
    if not any(name in os.environ for name in _OMP_POLICIES):
        os.environ["GOMP_SPINCOUNT"] = SPIN


def switch_off() -> None:
    """Switch telemetry off. Idempotent and cheap: it imports nothing."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    if not _agreed_to_openvino():
        sys.modules.setdefault(_OPENVINO, None)  # type: ignore[arg-type]


def _agreed_to_openvino() -> bool:
    """Whether `opt_in_out --opt_in` was called, which writes this file."""
    try:
        return (Path.home() / "intel" / _OPENVINO).read_bytes()[:1] == b"1"
    except (OSError, RuntimeError):  # no such file, no home
        return False
