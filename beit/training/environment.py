"""What a run's numbers rest on besides its settings: versions, device, command. Never the host's name."""

import contextlib
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ENVIRONMENT = "environment.json"
LIBRARIES = ("beit", "torch", "torchvision", "timm", "numpy")


def describe_environment(device: torch.device, processes: int) -> dict[str, object]:
    """Returns versions, device, number of processes (on all machines) and the command line, as plain values."""
    content: dict[str, object] = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # of beit in a clone that is not installed
            content[name] = version(name)
    content["torch"] = torch.__version__  # with the build, such as +cpu
    content |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    content["device"] = f"CPU {_processor()}".strip() if device.type == "cpu" else device.type.upper()
    if device.type == "cuda":
        content["device"] = f"GPU {torch.cuda.get_device_name(device)}"
        content["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    content |= {"processes": processes, "threads": torch.get_num_threads()}
    if command := command_line(sys.argv):
        content["command"] = command
    return content


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def command_line(argv: Sequence[str]) -> list[str]:
    """Returns how the process was started, as one would type it; nothing where no command started it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m package
        return ["python", "-m", spec.name.removesuffix(".__main__"), *argv[1:]]
    if not argv or argv[0] in ("", "-c"):
        return []
    script = Path(argv[0])
    return ["python", *argv] if script.suffix == ".py" else [script.name, *argv[1:]]
