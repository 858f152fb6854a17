"""Dependencies count nobody's uses and send nothing, unless the user has asked them to.

Most look at a variable of the environment when they are imported, so this comes before any of them;
child processes inherit it. What is already imported, and what the user has set, stays as it is.
"""

import os
import sys
from pathlib import Path

_SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it diffusers and datasets
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.29 and later: a device id, and events to Microsoft
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio and its client, which trackio takes
    "WANDB_ERROR_REPORTING": "false",  # reports of wandb's own failures; runs go where you send them
}
# of OpenVINO and NNCF; has no variable, and both do without it where it cannot be imported
_OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Idempotent, and cheap: it imports nothing."""
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
