"""FakeTensors on `cuda` in a process that has no GPU.

Building an engine needs shapes, dtypes and devices, never data, so a FakeTensorMode is enough. But every ATen call on
a CUDA tensor asks c10 for the *device guard* of CUDA (the object that switches the current device), and a CPU build of
PyTorch has none: slicing a fake CUDA tensor fails with "PyTorch is not linked with support for cuda devices". A CUDA
build that finds no GPU installs a no-op guard itself (`c10::impl::ensureCUDADeviceGuardSet`). This module does the same
for CPU builds: it copies the CPU's guard, a no-op too, into the slot of CUDA.

Without a GPU, PyTorch does not know either that cuDNN computes the convolutions of CUDA tensors, and which layout it
returns. A FakeTensor gets its memory format from `torch._C._conv_determine_backend_memory_format`, which is replaced by
one that does.

A trace also computes real values: PyTorch carries the value of a scalar constant (`torch.tensor(2.0, device=x.device)`)
along with the graph, in case the model reads it, and copies it to the constant's device. Without a GPU,
`constants_on_cpu` lets such a copy allocate its "cuda" memory on the CPU. There the types of the results of a GRU's
cell, which PyTorch knows from its CUDA kernel alone, are those of the calls that it decomposes to. There the current
device is the one that the FakeTensors are on, for models that compare, or that make it the current one before they
launch a kernel, and its compute capability that of the oldest portable target, for models that choose their operators
by it: what that one can do, every portable one can.
"""

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from torch_rtx.backend.decompositions import gru_cell
from torch_rtx.errors import CaptureError
from torch_rtx.targets import PORTABLE

_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
_CPU, _CUDA = 0, 1  # c10::DeviceType, which is serialized in checkpoints and therefore does not change
_WORD = struct.calcsize("P")
_CAPABILITY = divmod(min(target.sm for target in PORTABLE), 10)
_known_format = torch._C._conv_determine_backend_memory_format
_HINT = "capture on the CPU (device=None with a CPU model), or on a machine with a CUDA build of PyTorch"


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def install_cuda_guard() -> None:
    """Make FakeTensors on `cuda` usable in this process, with or without a GPU.

    With a GPU PyTorch needs nothing. Otherwise the layout of convolutions and, in a CPU build, the no-op guard stay
    installed until the process ends, because shape inference reads captured graphs long after the capture. Real CUDA
    tensors remain impossible. Idempotent.

    Raises CaptureError when the guard cannot be installed: not Linux, or a PyTorch whose guard registry is unknown.
    """
    if torch.cuda.is_available():
        return
    torch._C._conv_determine_backend_memory_format = _convolution_format
    if torch.backends.cuda.is_built():
        return
    if sys.platform != "linux":
        raise CaptureError(f"fake CUDA tensors need Linux, this is {sys.platform}", hint=_HINT)
    address = _registry_address()
    guard, installed = _read_word(address + _CPU * _WORD), _read_word(address + _CUDA * _WORD)
    _check_guard(guard)
    if installed:
        _check_guard(installed)
    else:
        ctypes.c_void_p.from_address(address + _CUDA * _WORD).value = guard


def _convolution_format(input: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
    """The memory format of a convolution's result: of cuDNN's (`cudnn_conv_suggest_memory_format`) on CUDA."""
    if input.device.type != "cuda":
        return _known_format(input, weight, backend)
    formats = {suggest_memory_format(input), suggest_memory_format(weight)} - {torch.contiguous_format}
    wide = torch.float64 in (input.dtype, weight.dtype)  # for which cuDNN has contiguous kernels alone
    return formats.pop() if formats and not wide else torch.contiguous_format


@contextlib.contextmanager
def constants_on_cpu() -> Iterator[None]:
    """Allocate real `cuda` tensors on the CPU inside of this context, if the process has no GPU.

    Changes the process's operator table: hold a lock around it.
    """
    if torch.cuda.is_available():
        yield
        return
    names = "current_device", "get_device_capability", "_exchange_device", "_maybe_exchange_device"
    before = {name: getattr(torch.cuda, name) for name in names}
    with torch.library._scoped_library("aten", "IMPL") as library:
        for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
            library.impl(op, _on_cpu(op), "CUDA")
        library.impl(torch.ops.aten._thnn_fused_gru_cell.default, gru_cell, "Meta")
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_capability = lambda device=None: _CAPABILITY
        torch.cuda._exchange_device = lambda device: 0
        torch.cuda._maybe_exchange_device = lambda device: 0  # not the same: Dynamo has a table of these functions
        try:
            yield
        finally:
            for name, own in before.items():
                setattr(torch.cuda, name, own)


def _on_cpu(op: torch._ops.OpOverload) -> Any:
    return lambda *args, **kwargs: op(*args, **{**kwargs, "device": "cpu", "pin_memory": False})


def _registry_address() -> int:
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
    try:
        return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(library), _REGISTRY))
    except (OSError, ValueError) as error:  # no such file; no such symbol
        raise CaptureError(f"PyTorch {torch.__version__} has no device guard registry: {error}", hint=_HINT) from error


def _read_word(address: int) -> int:
    """The pointer stored at `address`. Read through the kernel: a wrong address is an error here, not a crash."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return struct.unpack("P", memory.read(_WORD))[0]
    except (OSError, OverflowError, struct.error) as error:
        raise CaptureError(f"cannot read the device guard registry at {address:#x}: {error}", hint=_HINT) from error


def _check_guard(guard: int) -> None:
    """Raise CaptureError unless `guard` points to a C++ object whose class is defined in PyTorch's own libraries."""
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    found = guard and dladdr(_read_word(guard), ctypes.byref(info))  # the first word of an object is its vtable
    if not found or not os.path.basename(info.file).startswith((b"libtorch", b"libc10")):
        raise CaptureError(
            f"the device guard registry of PyTorch {torch.__version__} does not look as expected", hint=_HINT
        )
