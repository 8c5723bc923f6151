"""`torch-rtx doctor`: what of this machine torch_rtx can use, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from torch_rtx.cli.terminal import Report
from torch_rtx.errors import KernelError, Unsupported
from torch_rtx.settings import CompilationSettings, RuntimeSettings, cache_dir, runtime_cache_path
from torch_rtx.targets import arch_of
from torch_rtx.version import __version__

PACKAGES = ("torch", "safetensors", "triton", "triton-windows", "cuda-bindings", "onnx_ir", "transformers")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok", "missing" where something works without it, or "fault".
        remedy: what to do; "" where nothing is to be done.
    """

    what: str
    state: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:>7}  {self.what}: {self.text}" + f"\n{'':9}{self.remedy}" * bool(self.remedy)


def doctor() -> Report:
    """Say what works here, and what does not and why. The exit status is 1 if there is a fault."""
    found = list(findings())
    faults = [finding.what for finding in found if finding.state == "fault"]
    return Report(found, "\n".join(map(str, found)), f"faults: {', '.join(faults)}" if faults else None)


def findings() -> Iterator[Finding]:
    """What there is to say about this machine, one thing after another."""
    yield Finding("torch_rtx", "ok", f"{__version__}, Python {platform.python_version()} on {sys.platform}")
    installed = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    yield Finding("packages", "ok", ", ".join(installed))
    for look in (_gpus, _bindings, _kernels, _engine_cache, _runtime_cache):
        try:
            yield from look()
        except Exception as error:  # a fault of one thing keeps no other from being looked at
            yield Finding(look.__name__.strip("_").replace("_", " "), "fault", f"{type(error).__name__}: {error}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        remedy = "engines are built and run on the CPU here; for a GPU install a CUDA build of PyTorch"
        yield Finding("GPU", "missing", f"PyTorch {torch.__version__} has no CUDA", remedy)
        return
    if not torch.cuda.is_available():
        remedy = "nvidia-smi says whether there is a driver; engines for GPUs can be built without one"
        yield Finding("GPU", "missing", f"PyTorch with CUDA {torch.version.cuda} finds no GPU", remedy)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        sm, text = gpu.major * 10 + gpu.minor, f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 20} MiB"
        yield _gpu(f"GPU {index}", text, sm)


def _gpu(what: str, text: str, sm: int) -> Finding:
    try:
        known = arch_of(sm).like is None
    except Unsupported as error:
        return Finding(what, "fault", text, str(error))
    remedy = "" if known else "kernels come as PTX, which the driver compiles: a newer torch_rtx may know this GPU"
    return Finding(what, "ok" if known else "missing", text, remedy)


def _bindings() -> Iterator[Finding]:
    import torch

    from torch_rtx.runtime.driver import checked, driver

    cuda = driver()
    if cuda is None:
        state = "missing" if torch.version.cuda is None else "fault"
        yield Finding("CUDA graphs", state, "cuda-bindings is not installed", "pip install cuda-bindings")
    elif torch.cuda.is_available():
        version = checked(cuda.cuDriverGetVersion())
        text = f"cuda-bindings {_version('cuda-bindings')}, driver for CUDA {version // 1000}.{version % 1000 // 10}"
        yield Finding("CUDA graphs", "ok", text)


def _kernels() -> Iterator[Finding]:
    from torch_rtx.lowering.kernels.toolchain import versions

    try:
        yield Finding("kernel compiler", "ok", ", ".join(f"{name} {version}" for name, version in versions().items()))
    except KernelError as error:
        remedy = "; ".join(filter(None, (error.hint, "engines with kernels (targets=...) run without it")))
        yield Finding("kernel compiler", "missing", error.message, remedy)


def _engine_cache() -> Iterator[Finding]:
    folder = os.path.join(cache_dir(CompilationSettings()), "engines")
    yield _folder("engine cache", folder)


def _runtime_cache() -> Iterator[Finding]:
    path = runtime_cache_path(RuntimeSettings())
    yield Finding("runtime cache", "ok", "off") if path is None else _folder("runtime cache", os.path.dirname(path))


def _folder(what: str, folder: str) -> Finding:
    """Whether files can be written to a folder, or where it will be made."""
    present = folder
    while not os.path.isdir(present) and present != os.path.dirname(present):
        present = os.path.dirname(present)
    try:
        with tempfile.TemporaryFile(dir=present):
            return Finding(what, "ok", folder + " (not made yet)" * (present != folder))
    except OSError as error:
        return Finding(what, "fault", f"{folder}: {error.strerror}", "set TORCH_RTX_CACHE_DIR to another folder")
