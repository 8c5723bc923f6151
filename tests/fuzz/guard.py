"""Builds `guard.c`, and starts a program with it: accesses outside of a tensor's memory end the process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.c")
VARIABLE = "TORCH_RTX_GUARD"  # the folder of the library, in a process that has it
OFF = -1
LIMIT = 256 << 20  # bytes of all tensors that are alive


def active() -> bool:
    """Whether this process has the library."""
    return VARIABLE in os.environ


def fill(value: int) -> None:
    """From here on, new tensors begin with this byte; OFF: they are allocated as without the library."""
    if active():
        guard = ctypes.CDLL(None).guard_set
        guard.argtypes = [ctypes.c_size_t, ctypes.c_int]
        guard(LIMIT, value)


def restart(arguments: Sequence[str]) -> None:
    """Start this Python anew with the library, in place of this process. Returns in the new one; and where there is no
    C compiler or this is not Linux, which it says."""
    if active():
        shutil.rmtree(os.environ[VARIABLE], ignore_errors=True)  # it stays loaded
        os.environ.pop("LD_PRELOAD", None)
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        print("memory is not guarded: this is not Linux, or there is no C compiler", flush=True)
        return
    folder = tempfile.mkdtemp(prefix="torch_rtx_guard_")
    library = os.path.join(folder, "guard.so")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, str(SOURCE)], check=True)
    environment = {**os.environ, VARIABLE: folder, "LD_PRELOAD": library, "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *arguments], environment)
