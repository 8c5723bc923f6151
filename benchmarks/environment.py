"""Where a measurement was taken: device, driver, clocks, versions, processor and the state of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "safetensors", "onnxruntime", "torch_tensorrt", "tensorrt_rtx")
# Field of nvidia-smi: its name in the record.
_SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.limit": "power_limit_w",
}


def _output(*command: str) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def packages() -> dict[str, str]:
    """Versions of the libraries that matter, of those that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source, with `+` where files differ from it; None outside a repository."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _output("git", "status", "--porcelain") else "")


def clocks() -> dict[str, str]:
    """Driver, clocks and limits as nvidia-smi says; empty without it."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", "--id=0")
    values = text.splitlines()[0].split(", ") if text else []
    return dict(zip(_SMI.values(), values, strict=True)) if len(values) == len(_SMI) else {}


def record(device: str) -> dict[str, Any]:
    """All of it, as JSON; `device` is "cpu" or "cuda"."""
    import torch

    import torch_rtx

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "kind": device,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {"torch_rtx": torch_rtx.__version__, **packages(), "torch": torch.__version__},
        "commit": commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "multiprocessors": properties.multi_processor_count,
            "clocks": clocks(),
        }
    return found
