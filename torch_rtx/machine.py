"""What a machine has that decides how an engine runs there: its GPU, driver and packages. Imports neither torch nor
Triton."""

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch_rtx.platforms import ANY, here

Version = tuple[int, int]
_MAJOR, _MINOR = 75, 76  # of the driver's CUdevice_attribute: the compute capability


@dataclass(frozen=True)
class Machine:
    """A machine, or as much of it as is known.

    Attributes:
        platform: its operating system, as in `CompilationSettings`; "any": unknown.
        sm: the compute capability of its GPU, without the dot; None: no GPU that PyTorch can use.
        gpu: the name of the GPU; "": unknown.
        memory: bytes of the GPU's memory; None: unknown.
        driver: the CUDA version of the driver; None: unknown.
        bindings, triton: whether cuda-bindings and Triton are installed; None: unknown.
        why: why there is no GPU, if that is known.
    """

    platform: str = ANY
    sm: int | None = None
    gpu: str = ""
    memory: int | None = None
    driver: Version | None = None
    bindings: bool | None = None
    triton: bool | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.sm is None:
            return "a machine without a GPU" + f" ({self.why})" * bool(self.why)
        facts = [f"{self.gpu} (sm_{self.sm})" if self.gpu else f"sm_{self.sm}"]
        facts += [] if self.memory is None else [size_text(self.memory)]
        facts += [] if self.driver is None else [f"driver for CUDA {text_of(self.driver)}"]
        return ", ".join(facts)


def text_of(version: Version) -> str:
    """A version as people write it: 12.8."""
    return ".".join(map(str, version))


def size_text(count: float) -> str:
    """A number of bytes as people write it: 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def this_machine(index: int = 0) -> Machine:
    """This machine with the GPU `index`, as CUDA counts them.

    Starts the driver in this process, as the first use of the GPU does: processes forked afterwards can't use the GPU.
    """
    known = Machine(here(), bindings=_is_installed("cuda.bindings"), triton=_is_installed("triton"))
    built_for = _cuda_of_torch()
    if built_for == "":
        return replace(known, why="this build of PyTorch has no CUDA")
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return replace(known, why="there is no NVIDIA driver")
    with suppress(_Refused):
        driver = _version_of(cuda)
        known = replace(known, driver=driver)
        if built_for and int(built_for.partition(".")[0]) > driver[0]:
            return replace(known, why=f"the driver is for CUDA {text_of(driver)}, PyTorch for {built_for}")
        return _with_gpu(known, cuda, index)
    return replace(known, why=f"the driver finds no GPU {index}")


class _Refused(Exception):
    """A call of the driver failed."""


def _call(cuda: Any, function: str, *args: Any) -> None:
    if getattr(cuda, function)(*args) != 0:
        raise _Refused


def _version_of(cuda: Any) -> Version:
    version = ctypes.c_int()
    _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _with_gpu(machine: Machine, cuda: Any, index: int) -> Machine:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuInit", 0)
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    sm, text = 10 * major.value + minor.value, name.value.decode(errors="replace")
    return replace(machine, sm=sm, gpu=text, memory=memory.value)


def _is_installed(name: str) -> bool:
    with suppress(ModuleNotFoundError):  # of the package around it
        return find_spec(name) is not None
    return False


def _cuda_of_torch() -> str | None:
    """The CUDA version that the installed PyTorch was built for; "": none; None: unknown."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b.*= *(?:None|['\"](\d+\.\d+))", text, re.MULTILINE)
    return None if match is None else match[1] or ""
