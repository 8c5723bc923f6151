"""The figures of a GPU that the cost model computes with: how they are measured and kept.

They are measured with PyTorch's own operators, so that nothing has to be compiled. See `chips.FIGURES`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from torch_rtx.cache.runtime_file import FIGURES_KEY, GPU, DeviceKey
from torch_rtx.chips import FIGURES, PRODUCTS, REQUIRED
from torch_rtx.errors import KernelError
from torch_rtx.runtime.benchmark import device_us
from torch_rtx.runtime.launch import Store

log = logging.getLogger(__name__)
MOVED, MOVED_CACHES = 256 << 20, 8  # bytes, and L2 caches, that are read at least, and written
READ = 1 << 30  # bytes, again and again from a part of the L2 cache
NODES = 256  # of a CUDA graph
SIDE = 4096  # of the matrices of a product
BUSY_RUNS, CYCLES = 24, 1_000_000  # products before the clock is measured, and for how long it is
TENSORS: Mapping[str, torch.dtype] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "i8": torch.int8,
    "f8e4m3fn": torch.float8_e4m3fn,
    "mxfp8": torch.float8_e4m3fn,
    "fp4": torch.uint8,
}


def measure(device: torch.device, say: Callable[[str], object] = lambda text: None) -> dict[str, float]:
    """What is measured of a GPU on the current stream, by the names in `chips.FIGURES`. It takes some seconds, and 512
    MiB of memory or 16 times the L2 cache.

    Args:
        say: called with what is measured next.

    Raises:
        KernelError: a figure that every GPU has can't be measured.
    """
    found: dict[str, float] = {}
    with torch.cuda.device(device), torch.no_grad():
        for name, measured in _steps(device):
            say(f"measuring {name}")
            try:
                figure = measured()
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
                problem = str(error).partition("\n")[0]
                if name in REQUIRED:
                    hint = "other programs may use the GPU, or its memory"
                    raise KernelError(f"{name} of {device} can't be measured: {problem}", hint=hint) from error
                log.info("no products of %s: %s", name, problem)
                continue
            if not 0 < figure < math.inf:
                raise KernelError(f"{name} of {device} was measured as {figure} {FIGURES[name]}")
            found[name] = figure
    return found


def _steps(device: torch.device) -> Iterator[tuple[str, Callable[[], float]]]:
    """The figures in the order of measuring; the clock is that of a GPU that is warm."""
    gpu = torch.cuda.get_device_properties(device)
    yield "memory", lambda: _memory(device, gpu.L2_cache_size)
    yield "l2", lambda: _l2(device, gpu.L2_cache_size)
    yield "launch", lambda: device_us([_tiny(device)])
    yield "node", lambda: _node(device)
    for name in PRODUCTS:
        yield name, lambda name=name: _product(name, device)  # type: ignore[misc]
    yield "clock", lambda: _clock(device)


def _memory(device: torch.device, cache: int) -> float:
    """GB/s of a kernel that reads and writes; a copy need not be one."""
    count = max(MOVED, MOVED_CACHES * cache) // 4
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    return 8 * count / (1e3 * device_us([lambda: torch.neg(source, out=target)]))


def _l2(device: torch.device, cache: int) -> float:
    """GB/s of sums of the same rows, a quarter of the cache: too much for the caches of multiprocessors."""
    row = torch.zeros(max(cache, 1 << 20) // 16, device=device)
    rows = row.expand(READ // (4 * row.numel()), row.numel())
    sums = torch.empty(rows.shape[0], device=device)
    return 4 * rows.numel() / (1e3 * device_us([lambda: torch.sum(rows, 1, out=sums)]))


def _tiny(device: torch.device) -> Callable[[], object]:
    """A kernel that takes no longer than its launch."""
    one = torch.zeros(1, device=device)
    return lambda: one.add_(1)


def _node(device: torch.device) -> float:
    """Microseconds that a node adds to a CUDA graph."""
    run, graph = _tiny(device), torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU
        for _ in range(NODES):
            run()
    return device_us([graph.replay]) / NODES


def _product(name: str, device: torch.device) -> float:
    """TFLOP/s of a library's product of a dtype."""
    return 2 * SIDE**3 / (1e6 * device_us([_multiply(name, device)]))


def _multiply(name: str, device: torch.device) -> Callable[[], object]:
    """A product of two matrices of SIDE x SIDE values; the second one lies along K, as weights do."""
    kind, columns = TENSORS[name], SIDE // 2 if name == "fp4" else SIDE
    if name == "fp4":
        one, two = (torch.randint(256, (SIDE, columns), dtype=kind, device=device) for _ in range(2))
        one, two = (x.view(torch.float4_e2m1fn_x2) for x in (one, two))
    else:
        one, two = (torch.randn(SIDE, columns, device=device).to(kind) for _ in range(2))
    if name == "i8":
        return lambda: torch._int_mm(one, two.t())
    if name not in ("f8e4m3fn", "mxfp8", "fp4"):
        return lambda: torch.mm(one, two.t())
    scales = {"f8e4m3fn": (1, torch.float32), "mxfp8": (SIDE * SIDE // 32, torch.float8_e8m0fnu)}
    count, dtype = scales.get(name, (SIDE * SIDE // 16, torch.float8_e4m3fn))
    scale: Any = torch.ones(count, device=device).to(dtype)
    scale = scale.reshape(()) if count == 1 else scale
    return lambda: torch._scaled_mm(one, two.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


def _clock(device: torch.device) -> float:
    """GHz while products run, or right after: the clock does not change as fast."""
    run, begin, end = _multiply("f16", device), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(BUSY_RUNS):
        run()
    begin.record()
    torch.cuda._sleep(CYCLES)
    end.record()
    end.synchronize()
    return CYCLES / (1e6 * begin.elapsed_time(end))


# ---- in the runtime cache --------------------------------------------------------------------------------------------


def measured_on(key: DeviceKey) -> DeviceKey:
    """The device of figures: whatever versions of the code generator read them."""
    return replace(key, versions="torch-rtx measure-gpu")


def write_figures(store: Store, figures: Mapping[str, float]) -> None:
    """Keep figures in a store of the device `measured_on`."""
    store.put(GPU, FIGURES_KEY, json.dumps(figures).encode())
