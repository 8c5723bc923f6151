"""Words of device memory that are recorded and compared by kernels. These are PTX, so that they need no compiler."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

from torch_rtx.runtime.driver import checked, driver, relaxed
from torch_rtx.runtime.launch import Gpu, gpu_of

THREADS = 256  # per block; each handles one word
_BODY = """
.visible .entry {name}(.param .u64 addresses, .param .u64 known, .param .u64 found, .param .u32 count)
{{
    .reg .pred %p;
    .reg .b32 %i, %n, %word, %other;
    .reg .b64 %at, %address, %place, %flag;
    mov.u32 %i, %ctaid.x;
    mov.u32 %n, %ntid.x;
    mul.lo.u32 %i, %i, %n;
    mov.u32 %n, %tid.x;
    add.u32 %i, %i, %n;
    ld.param.u32 %n, [count];
    ld.param.u64 %flag, [found];
    setp.ge.u32 %p, %i, %n;
    @%p ret;
    ld.param.u64 %at, [addresses];
    mad.wide.u32 %at, %i, 8, %at;
    ld.global.u64 %address, [%at];
    ld.global.u32 %word, [%address];
    ld.param.u64 %place, [known];
    mad.wide.u32 %place, %i, 4, %place;
{end}
    ret;
}}
"""
_RECORD = """    st.global.u32 [%place], %word;
    setp.ne.u32 %p, %i, 0;
    @%p ret;
    st.volatile.global.u32 [%flag], 0;"""
_COMPARE = """    ld.global.u32 %other, [%place];
    setp.eq.u32 %p, %word, %other;
    @%p ret;
    st.volatile.global.u32 [%flag], 1;"""
PTX = ".version 6.3\n.target sm_75\n.address_size 64\n" + "".join(
    _BODY.format(name=name, end=end) for name, end in (("record", _RECORD), ("compare", _COMPARE))
)


@cache
def _kernels(gpu: Gpu) -> tuple[Any, Any]:
    """The driver's handles of both kernels."""
    api = gpu.driver
    checked(api.cuCtxPushCurrent(gpu.context))
    try:
        with relaxed():
            module = checked(api.cuModuleLoadData(PTX.encode() + b"\0"))
            return tuple(checked(api.cuModuleGetFunction(module, name)) for name in (b"record", b"compare"))
    finally:
        checked(api.cuCtxPopCurrent())


class _Parameters(ctypes.Structure):
    """Of both kernels."""

    _fields_ = (
        ("addresses", ctypes.c_uint64),
        ("known", ctypes.c_uint64),
        ("found", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
    )


@cache
def _side_stream(gpu: Gpu) -> int:
    """The stream of comparisons. It has the highest priority: other work should not delay their few blocks."""
    api = gpu.driver
    checked(api.cuCtxPushCurrent(gpu.context))
    try:
        status, _, highest = api.cuCtxGetStreamPriorityRange()
        checked((status,))
        return int(checked(api.cuStreamCreateWithPriority(api.CUstream_flags.CU_STREAM_NON_BLOCKING, highest)))
    finally:
        checked(api.cuCtxPopCurrent())


class Words:
    """Words of 4 bytes at `addresses` of a CUDA device, and what they were when they were recorded.

    Needs the driver API. The device must be the current one in each call.

    Args:
        addresses: int64, on the CPU; multiples of 4.
    """

    def __init__(self, addresses: torch.Tensor, device: torch.device) -> None:
        self._gpu = gpu_of(driver(), device.index)
        self._api, self._kernels, self._side = self._gpu.driver, _kernels(self._gpu), _side_stream(self._gpu)
        with torch.inference_mode(False):
            self._addresses = addresses.to(device)
            self._known = torch.empty(len(addresses), dtype=torch.int32, device=device)
            self._found = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._flag = ctypes.c_int32.from_address(self._found.data_ptr())
        self._all = self._parameters(0, len(addresses))
        self._events = threading.local()  # of each thread: those of another are on another stream

    def record(self, start: int, count: int) -> None:
        """Record words, after what is queued on the current stream."""
        self._run(self._kernels[0], self._parameters(start, count), self._stream())

    def mark(self) -> None:
        """Let the next comparison of this thread be after what is queued on the current stream."""
        try:
            before = self._events.before
        except AttributeError:
            before = self._new_events()
        checked(self._api.cuEventRecord(before, self._stream()))

    def _new_events(self) -> int:
        """Make the handles `before` and `end` for this thread; returns the first."""
        events = self._events
        events.owners = torch.cuda.Event(), torch.cuda.Event()
        for event in events.owners:
            event.record()  # which makes it
        events.before, events.end = (int(event.cuda_event) for event in events.owners)
        return int(events.before)

    def differ(self) -> bool:
        """Whether a word has another value after the last mark of this thread. Waits for that, and no other work."""
        api, events = self._api, self._events
        checked(api.cuStreamWaitEvent(self._side, events.before, 0))
        self._run(self._kernels[1], self._all, self._side)
        checked(api.cuEventRecord(events.end, self._side))
        with relaxed():
            checked(api.cuEventSynchronize(events.end))
        return self._flag.value != 0

    def _stream(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self._gpu.index))

    def _parameters(self, start: int, count: int) -> tuple[int, int, Any]:
        """Number of blocks, address of the array of the parameters' addresses, and what lies there."""
        found = self._found.data_ptr()
        given = _Parameters(self._addresses.data_ptr() + 8 * start, self._known.data_ptr() + 4 * start, found, count)
        places = [ctypes.addressof(given) + getattr(_Parameters, name).offset for name, _ in _Parameters._fields_]
        array = (ctypes.c_void_p * len(places))(*places)
        return -(-count // THREADS), ctypes.addressof(array), (given, array)

    def _run(self, kernel: Any, parameters: tuple[int, int, Any], stream: int) -> None:
        checked(self._api.cuLaunchKernel(kernel, parameters[0], 1, 1, THREADS, 1, 1, 0, stream, parameters[1], 0))
