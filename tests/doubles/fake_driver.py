"""A stand-in for the CUDA driver API: it answers, and records what is launched, read from the memory it is given."""

from __future__ import annotations

import ctypes
import threading
import zlib
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch_rtx.targets import arch_of

STREAM = 77  # what `torch._C._cuda_getCurrentRawStream` is patched to return


class Kept(dict[tuple[str, str], bytes]):
    """A runtime cache."""

    stats = None

    def get(self, kind: str, key: str) -> bytes | None:  # type: ignore[override]
        return super().get((kind, key))

    def put(self, kind: str, key: str, value: bytes) -> None:
        self[kind, key] = value


class Function(NamedTuple):
    """A kernel: its entry and its image."""

    entry: str
    image: bytes

    def __int__(self) -> int:
        return zlib.crc32(self.entry.encode() + self.image)


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_PTX = 218


@dataclass(frozen=True)
class Launched:
    """One launch: entry and image of the kernel, and the bytes of its parameters."""

    entry: str
    image: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    parameters: tuple[int, ...]


class FakeDriver:
    """The calls that `runtime.launch` makes.

    Args:
        sizes: bytes of each parameter of every kernel; those of 8 bytes are read unsigned, others signed.
        capability: of the device.
        refused: images that can't be loaded.
    """

    def __init__(
        self, sizes: tuple[int, ...], capability: tuple[int, int] = (9, 0), refused: tuple[bytes, ...] = ()
    ) -> None:
        self.sizes, self.capability, self.refused = sizes, capability, refused
        self.launched: list[Launched] = []
        self.loaded: list[bytes] = []
        self.opted_in: dict[str, int] = {}
        self.max_threads = 1024
        self.status = Status.CUDA_SUCCESS
        self.contexts = threading.local()
        self.CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=97,
        )
        self.linked = 0
        self.CUjitInputType = SimpleNamespace(CU_JIT_INPUT_PTX=1)
        self.CUfunction_attribute = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK=0, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8
        )

    def cuInit(self, flags: int) -> tuple[Status]:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, index: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, 100 + index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, 1000 + device

    def cuDeviceGetAttribute(self, name: int, device: int) -> tuple[Status, int]:
        shared = arch_of(10 * self.capability[0] + self.capability[1]).shared
        return Status.CUDA_SUCCESS, {75: self.capability[0], 76: self.capability[1], 97: shared}[name]

    def cuCtxGetCurrent(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, getattr(self.contexts, "current", 0)

    def cuCtxSetCurrent(self, context: int) -> tuple[Status]:
        self.contexts.current = context
        return (Status.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Status]:
        self.contexts.before, self.contexts.current = getattr(self.contexts, "current", 0), context
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Status, int]:
        popped, self.contexts.current = self.contexts.current, self.contexts.before
        return Status.CUDA_SUCCESS, popped

    def cuModuleLoadData(self, image: bytes) -> tuple[Status, Any]:
        assert self.contexts.current == 1100
        if image in self.refused:
            return Status.CUDA_ERROR_INVALID_PTX, None
        self.loaded.append(image)
        return Status.CUDA_SUCCESS, image

    def cuLinkCreate(self, count: int, options: list[Any], values: list[Any]) -> tuple[Status, Any]:
        assert self.contexts.current == 1100
        return Status.CUDA_SUCCESS, []

    def cuLinkAddData(
        self, state: list[Any], kind: int, data: bytes, size: int, name: bytes, count: int, options: Any, values: Any
    ) -> tuple[Status]:
        assert (kind, size, data[-1]) == (1, len(data), 0)
        if data[:-1] in self.refused:
            return (Status.CUDA_ERROR_INVALID_PTX,)
        state.append(ctypes.create_string_buffer(b"compiled " + data[:-1]))
        self.linked += 1
        return (Status.CUDA_SUCCESS,)

    def cuLinkComplete(self, state: list[Any]) -> tuple[Status, int, int]:
        return Status.CUDA_SUCCESS, ctypes.addressof(state[0]), len(state[0]) - 1

    def cuLinkDestroy(self, state: list[Any]) -> tuple[Status]:
        state.clear()
        return (Status.CUDA_SUCCESS,)

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Status, Any]:
        return Status.CUDA_SUCCESS, Function(name.decode(), module)

    def cuFuncGetAttribute(self, name: int, function: Function) -> tuple[Status, int]:
        assert name == 0
        return Status.CUDA_SUCCESS, self.max_threads

    def cuFuncSetAttribute(self, function: Function, name: int, value: int) -> tuple[Status]:
        assert name == 8
        self.opted_in[function.entry] = value
        return (Status.CUDA_SUCCESS,)

    def cuLaunchKernel(
        self, function: Function, x: int, y: int, z: int, bx: int, by: int, bz: int, shared: int, stream: int,
        parameters: int, extra: int,
    ) -> tuple[Status]:  # fmt: skip
        assert self.contexts.current == 1100, "no context in this thread"
        assert extra == 0
        places = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        values = tuple(
            int.from_bytes(ctypes.string_at(place, size), "little", signed=size < 8)  # type: ignore[arg-type]
            for place, size in zip(places, self.sizes, strict=True)
        )
        self.launched.append(Launched(*function, (x, y, z), (bx, by, bz), shared, stream, values))
        return (self.status,)
