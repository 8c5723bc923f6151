"""Loads and launches kernels through the CUDA driver API, without Triton.

A binary is loaded once per device and process and never unloaded, since captured CUDA graphs may hold its kernels.
Loading happens when a session or a tactic is made, never during a capture.
"""

from __future__ import annotations

import ctypes
import logging
import operator
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, reduce
from itertools import count
from typing import Any, Protocol

import torch

from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph, Node, kernel_nodes
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.bind import bind, bind_dim
from torch_rtx.runtime.driver import checked
from torch_rtx.settings import BEST, CALLS
from torch_rtx.tactics import NUMBERS, KernelTable, Launch, Runnable, Slot, Tactic, Variant, runnable_tactics
from torch_rtx.targets import ALIGNMENT, GRID, Target, arch_of

log = logging.getLogger(__name__)
OPT_IN = 48 << 10  # bytes of shared memory; a kernel that needs more has to opt in
_MAX_X, _MAX_Y, _MAX_Z = GRID


def load_tactics(
    table: KernelTable,
    graph: Graph,
    device: torch.device,
    wanted: str = BEST,
    driver: Any = None,
    jit: bool = True,
    open_store: Callable[[], Store | None] = lambda: None,
) -> dict[str, LoadedTactic]:
    """Load a tactic for each kernel node of `graph`, by `op`. Nodes without one run call by call; the log says why.

    Args:
        wanted: see `RuntimeSettings.tactics`.
        driver: the driver API; None: that of this process.
        jit: False skips nodes whose tactic the driver would have to compile from PTX, which takes seconds.
        open_store: opens the store of binaries that the driver compiled.
    """
    if device.type != "cuda" or wanted == CALLS:
        return {}
    if not table:
        if wanted != BEST and any(kernel_nodes(graph)):
            remedy = 'build it with named targets, such as targets="current"'
            log.warning("tactics=%r: the engine contains no kernels and runs call by call: %s", wanted, remedy)
        return {}
    driver = driver or driver_api.driver()
    if driver is None:
        log.warning("the engine's kernels are not used: the package cuda-bindings is not installed")
        return {}
    gpu = gpu_of(driver, device.index)
    store = open_store() if any(target.ptx for target in table.targets) else None
    nodes = {node.op: node for node in kernel_nodes(graph) if node.op in table.tactics}
    chosen = {op: _loaded(gpu, node, table, wanted, jit, store) for op, node in nodes.items()}
    found = {op: tactic for op, tactic in chosen.items() if tactic is not None}
    _check_kinds(table, wanted)
    kinds = Counter(tactic.kind for tactic in found.values())
    about = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    log.info("tactics of %d of %d kernels on sm_%d: %s", len(found), len(nodes), gpu.sm, about)
    return found


def _check_kinds(table: KernelTable, wanted: str) -> None:
    """Warn if no node has a tactic of a wanted kind."""
    kinds = {t.kind for found in table.tactics.values() for tactics in found.values() for t in tactics}
    if wanted != BEST and kinds.isdisjoint(wanted.split(",")):
        log.warning("tactics=%r: no kernel has such a tactic; there are %s", wanted, ", ".join(sorted(kinds)))


def _loaded(
    gpu: Gpu, node: Node, table: KernelTable, wanted: str, jit: bool, store: Store | None
) -> LoadedTactic | None:
    """The first tactic of `node` that can be loaded."""
    runnable = runnable_tactics(table.tactics[node.op], gpu.sm, gpu.shared)
    for tactic, target in preferred(runnable, wanted):
        if target.ptx and tactic.kernels and not jit:
            return None
        try:
            return load(gpu, node, tactic, target, table.binaries, store)
        except KernelError as error:
            log.warning("%s", error)
    reason = "none of its binaries can be loaded" if runnable else f"it has no binary for sm_{gpu.sm}"
    log.warning("kernel %s runs call by call: %s", node.op, reason)
    return None


def load_rivals(table: KernelTable, graph: Graph, gpu: Gpu, op: str) -> list[LoadedTactic]:
    """The tactics that `table` has for the kernel nodes `op`, of the target that fits the GPU best; none if there are
    not several, or if the driver would have to compile them."""
    node = next((node for node in kernel_nodes(graph) if node.op == op), None)
    runnable = runnable_tactics(table.tactics.get(op, {}), gpu.sm, gpu.shared)
    found = [(tactic, target) for tactic, target in runnable if target == runnable[0][1] and not target.ptx]
    if node is None or len(found) < 2:
        return []
    return [load(gpu, node, tactic, target, table.binaries) for tactic, target in found]


def load(
    gpu: Gpu,
    node: Node,
    tactic: Tactic[Launch],
    target: Target,
    binaries: Mapping[str, bytes],
    store: Store | None = None,
) -> LoadedTactic:
    """Load the kernels of a tactic of `node`.

    Args:
        target: the one that `tactic` was built for.
        binaries: see `KernelTable`.
        store: see `Gpu.function`.

    Raises:
        KernelError: the driver refuses a binary.
    """
    nodes = tactic.nodes(node)

    def launcher(op: str, launch: Launch) -> Launcher:
        kernel = nodes[op]
        return Launcher(gpu, kernel.op, launch, target, binaries, len(kernel.inputs) + len(kernel.outputs), store)

    return tactic.with_kernels(launcher)


def preferred(runnable: Sequence[Runnable], wanted: str) -> list[Runnable]:
    """`runnable` in the order in which to try them: the kinds in `wanted` come first, in its order."""
    kinds = [] if wanted == BEST else wanted.split(",")
    return sorted(runnable, key=lambda one: kinds.index(one[0].kind) if one[0].kind in kinds else len(kinds))


class Store(Protocol):
    """Storage that outlives the process: the runtime cache."""

    @property
    def stats(self) -> Any:
        """Its statistics."""

    def get(self, kind: str, key: str) -> bytes | None:
        """The entry, or None."""

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Store an entry."""


class Gpu:
    """A device and the binaries loaded on it.

    Attributes:
        sm: compute capability without the dot.
        shared: limit of shared memory per block, in bytes.
        context: the primary context, which PyTorch uses too.
    """

    def __init__(self, driver: Any, index: int) -> None:
        self.driver, self.index = driver, index
        self.context = driver_api.context_of(driver, index)
        device = checked(driver.cuDeviceGet(index))
        names = driver.CUdevice_attribute
        major, minor, self.shared = (
            int(checked(driver.cuDeviceGetAttribute(name, device)))
            for name in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )
        )
        self.sm = 10 * major + minor
        self._modules: dict[str, Any] = {}
        self._lock = threading.Lock()

    def function(self, variant: Variant, binaries: Mapping[str, bytes], ptx: bool, store: Store | None = None) -> Any:
        """The driver's handle of a kernel; loads its binary if necessary.

        Args:
            binaries: see `KernelTable`.
            ptx: its binary is PTX, which the driver compiles.
            store: keeps the result of that.

        Raises:
            RuntimeError: the driver refuses the binary, or it is damaged.
        """
        driver, attributes = self.driver, self.driver.CUfunction_attribute
        image = b""
        if variant.binary not in self._modules:  # not under the lock: compiling takes seconds
            image = binaries[variant.binary]
            image = self._compiled(variant.binary, image, store) if ptx else image
        with self._lock:
            checked(driver.cuCtxPushCurrent(self.context))
            try:
                if variant.binary not in self._modules:
                    self._modules[variant.binary] = checked(driver.cuModuleLoadData(image))
                module = self._modules[variant.binary]
                function = checked(driver.cuModuleGetFunction(module, variant.entry.encode()))
                # Reading an attribute makes the driver load the code now; by default it does so at the first launch.
                threads = attributes.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
                if checked(driver.cuFuncGetAttribute(threads, function)) < 32 * variant.num_warps:
                    raise RuntimeError(f"a block can't have {32 * variant.num_warps} threads")
                if variant.shared > OPT_IN:
                    size = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    checked(driver.cuFuncSetAttribute(function, size, variant.shared))
            finally:
                checked(driver.cuCtxPopCurrent())
        return function

    def _compiled(self, name: str, text: bytes, store: Store | None) -> bytes:
        """The cubin of PTX: from `store`, else compiled by the driver."""
        driver, key = self.driver, f"ptx {name}"
        known = None if store is None else store.get("kernel", key)
        if known is not None:
            return known
        checked(driver.cuCtxPushCurrent(self.context))
        try:
            state = checked(driver.cuLinkCreate(0, [], []))
            try:
                kind, text = driver.CUjitInputType.CU_JIT_INPUT_PTX, text + b"\0"
                checked(driver.cuLinkAddData(state, kind, text, len(text), name.encode(), 0, [], []))
                status, address, size = driver.cuLinkComplete(state)
                checked((status,))
                binary = ctypes.string_at(int(address), size)
            finally:
                checked(driver.cuLinkDestroy(state))
        finally:
            checked(driver.cuCtxPopCurrent())
        if store is not None:
            store.put("kernel", key, binary)
        return binary

    def enter(self) -> None:
        """Make the context current in a thread that has none: it has not called the CUDA runtime yet."""
        if int(checked(self.driver.cuCtxGetCurrent())) == 0:
            checked(self.driver.cuCtxSetCurrent(self.context))


gpu_of = cache(Gpu)


class _Parameters(threading.local):
    """The memory of a launch's parameters. One per thread: the driver reads it without the interpreter lock.

    Attributes:
        buffer: the parameters, in the layout of C.
        addresses: address of the array of the parameters' addresses.
    """

    buffer: Any
    addresses: int

    def __init__(self, *given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        """Makes both attributes at the first launch of a thread, when the device is the current one."""
        self._make(*self._given)
        return self.__dict__[name]

    def _make(self, gpu: Gpu, formats: str) -> None:
        gpu.enter()
        ends = [struct.calcsize(f"@{formats[: index + 1]}") for index in range(len(formats))]
        self.buffer = ctypes.create_string_buffer(max(ends, default=0) or 1)
        start = ctypes.addressof(self.buffer)
        places = [start + end - struct.calcsize(f"@{one}") for end, one in zip(ends, formats, strict=True)]
        self._array = (ctypes.c_void_p * len(places))(*places)
        self.addresses = ctypes.addressof(self._array)


class Launcher:
    """Launches one kernel. Thread-safe, on any stream.

    Attributes:
        scalars, grid: the arguments of a call, as dims of the graph.
        pdl_functions: the driver's handles of the variants that use PDL, see `Variant.uses_pdl`.
        pointers: the positions of the parameters that are addresses of tensors.
        has_slots: others wrote the kernel: not every input and output is a parameter of its own.
        num_parameters: of the kernel.

    Args:
        op: the kernel's name in messages.
        target: the one that `launch` was built for.
        binaries: see `KernelTable`.
        store: see `Gpu.function`.

    Raises:
        KernelError: the driver refuses the binary.
    """

    def __init__(
        self,
        gpu: Gpu,
        op: str,
        launch: Launch,
        target: Target,
        binaries: Mapping[str, bytes],
        pointers: int,
        store: Store | None = None,
    ) -> None:
        self.op, self.target, self.scalars, self.grid = op, target, launch.scalars, launch.grid
        slots = _default_slots(pointers, launch) if launch.slots is None else launch.slots
        self.has_slots = launch.slots is not None
        self.pointers = tuple(index for index, slot in enumerate(slots) if slot.kind == "pointer")
        self.num_parameters = len(slots)
        self._index, self._launch = gpu.index, gpu.driver.cuLaunchKernel
        try:
            codes = [
                (
                    gpu.function(v, binaries, target.ptx, store),
                    launch.block or (32 * v.num_warps, 1, 1),
                    v.shared,
                )
                for v in launch.variants
            ]
        except RuntimeError as error:  # includes EngineFormatError: a damaged binary
            raise KernelError(f"the binary of kernel {op} for {target} can't be loaded: {error}") from None
        self._aligned, self._generic = codes[0], codes[-1]
        self.pdl_functions = tuple(int(code[0]) for code, v in zip(codes, launch.variants, strict=True) if v.uses_pdl)
        self._check_scalars = launch.generic is not None
        formats = "".join({"pointer": "Q", **NUMBERS}[slot.kind] for slot in slots)
        self._pack = struct.Struct(f"@{formats}").pack_into
        self._parameters = _Parameters(gpu, formats)
        self._constants = tuple(slot.value for slot in slots if slot.source == "constant")
        self._order = None if launch.slots is None else _order(slots, pointers, len(launch.scalars))

    @property
    def functions(self) -> tuple[int, ...]:
        """The driver's handles of both variants."""
        return tuple(int(function) for function, _, _ in (self._aligned, self._generic))

    def is_for(self, sm: int) -> bool:
        """The kernel was built for this SM version, not for an older one."""
        return self.target == arch_of(sm).target

    def bound(self, sizes: Mapping[str, int]) -> Launcher:
        """The same kernel for a graph in which `sizes` replaces symbols."""
        other = copy(self)
        other.scalars = tuple(bind_dim(dim, sizes) for dim in self.scalars)
        x, y, z = (bind_dim(dim, sizes) for dim in self.grid)
        other.grid = x, y, z
        return other

    def __call__(self, pointers: Sequence[int], scalars: Sequence[int], grid: tuple[int, int, int]) -> None:
        """Launch on the current stream of the kernel's device, which must be the current device.

        Args:
            pointers: addresses of the inputs, then of the outputs; multiples of ALIGNMENT.
            scalars: the integer parameters.
            grid: blocks along x, y and z; an empty grid is not launched.

        Raises:
            KernelError: the grid or a scalar is too large, or the driver refuses the launch.
        """
        x, y, z = grid
        if not (0 < x <= _MAX_X and 0 < y <= _MAX_Y and 0 < z <= _MAX_Z):
            if 0 in grid:
                return
            raise KernelError(f"kernel {self.op} can't be launched with {x} x {y} x {z} blocks")
        aligned = not self._check_scalars or reduce(operator.or_, scalars, 0) % ALIGNMENT == 0
        function, block, shared = self._aligned if aligned else self._generic
        parameters, values = self._parameters, (*pointers, *scalars, *self._constants)
        try:
            self._pack(parameters.buffer, 0, *(values if self._order is None else self._order(values)))
        except struct.error as error:
            raise KernelError(f"kernel {self.op} can't be launched with the sizes {list(scalars)}: {error}") from None
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        (status,) = self._launch(function, x, y, z, *block, shared, stream, parameters.addresses, 0)
        if status != 0:
            raise KernelError(f"launching kernel {self.op} for {self.target} failed: {status.name}")


def _default_slots(pointers: int, launch: Launch) -> tuple[Slot, ...]:
    """The parameters of a generated kernel: pointers, scalars, and two null pointers."""
    kind = "i64" if launch.wide else "i32"
    scalars = [Slot(kind, "scalar", index) for index in range(len(launch.scalars))]
    tensors = [Slot("pointer", "tensor", index) for index in range(pointers)]
    return (*tensors, *scalars, *[Slot("u64", "constant", 0)] * 2)


def _order(slots: Sequence[Slot], pointers: int, scalars: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """From pointers, scalars and constants to the parameters in order."""
    after = count(pointers + scalars)
    first = {"tensor": 0, "scalar": pointers}
    places = [next(after) if slot.source == "constant" else first[slot.source] + int(slot.value) for slot in slots]
    if len(places) > 1:  # of one place, `itemgetter` gives no tuple
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


LoadedTactic = Tactic[Launcher]


def bound(tactic: LoadedTactic, sizes: Mapping[str, int]) -> LoadedTactic:
    """The same tactic for a graph in which `sizes` replaces symbols."""
    body = None if tactic.body is None else bind(tactic.body, sizes)
    return replace(tactic.with_kernels(lambda op, launcher: launcher.bound(sizes)), body=body)


def is_for(tactic: LoadedTactic, sm: int) -> bool:
    """All kernels of the tactic were built for this SM version, not for an older one."""
    return all(launcher.is_for(sm) for launcher in tactic.kernels.values())
