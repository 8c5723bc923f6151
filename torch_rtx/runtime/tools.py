"""What a session on a GPU of this machine is specialized with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import DeviceKey
from torch_rtx.ir import Graph, kernel_nodes
from torch_rtx.kerneltable import Candidate, KernelTable
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.builder import BUILDER
from torch_rtx.runtime.driver import checked
from torch_rtx.runtime.job import Tools
from torch_rtx.runtime.knowledge import Knowledge, region_key
from torch_rtx.runtime.launch import Gpu, Launcher, Way, gpu_of, launchers
from torch_rtx.runtime.trial import microseconds
from torch_rtx.settings import RuntimeSettings, runtime_cache_path

log = logging.getLogger(__name__)


def kernels_and_tools(
    table: KernelTable, graph: Graph, device: torch.device, settings: RuntimeSettings
) -> tuple[Mapping[str, Way], Tools | None]:
    """What of an engine's kernels can be launched at once, and what makes more of them; None: nothing does.

    Args:
        table: the engine's kernels.
    """
    driver = driver_api.driver() if device.type == "cuda" else None
    if driver is None or settings.tactics != "best":
        return launchers(table, graph, device, settings.tactics), None
    gpu = gpu_of(driver, device.index)
    BACKGROUND.on_stop(BUILDER.stop)
    open_store = partial(_runtime_cache, gpu, device, settings)
    knowledge = Knowledge(gpu.sm, BUILDER, open_store)
    tools = Tools(
        knowledge,
        load=partial(_load, gpu, open_store),
        jit=partial(launchers, table, graph, device, open_store=open_store),
        time=microseconds(device),
        background=BACKGROUND,
    )
    at_once = settings.specialization_strategy != "lazy"
    return launchers(table, graph, device, jit=at_once, open_store=open_store), tools


def _load(
    gpu: Gpu, open_store: Callable[[], RuntimeCache | None], op: str, candidate: Candidate, pointers: int
) -> Launcher:
    (target,) = candidate.launch.targets
    store = open_store() if target.ptx else None
    return Launcher(gpu, op, candidate.launch, target, candidate.binaries, pointers, store)


def _runtime_cache(gpu: Gpu, device: torch.device, settings: RuntimeSettings) -> RuntimeCache | None:
    path = runtime_cache_path(settings)
    return None if path is None else _open(path, settings.runtime_cache_size, device_key(gpu, device))


_open = cache(lambda path, size, key: RuntimeCache(path, key, size=size))  # one per file and device


def device_key(gpu: Gpu, device: torch.device) -> DeviceKey:
    """What is learnt on a GPU holds for."""
    driver = int(checked(gpu.driver.cuDriverGetVersion()))
    return DeviceKey(torch.cuda.get_device_name(device), gpu.sm, driver, versions())


def pregenerate(graph: Graph, sizes: Mapping[str, int], device: DeviceKey, path: str) -> int:
    """Put kernels for a GPU that need not be here in a runtime cache; returns how many there are.

    Args:
        graph: of an engine whose regions are formed.
        sizes: numbers of its symbols, by name; none: for any sizes.
        device: the GPU; its `versions` are filled in.

    Raises:
        KernelError: see `Builder.build`.
    """
    bodies = (node.body for node in kernel_nodes(bind(graph, sizes)) if node.body is not None)
    wanted = {region_key(body): (body, 0) for body in bodies}
    with closing(RuntimeCache(path, replace(device, versions=versions()))) as store:
        return len(Knowledge(device.sm, BUILDER, lambda: store).kernels(wanted))


@cache
def versions() -> str:
    """What generates kernels, in short: a digest of its sources."""
    home = Path(__file__).parents[1] / "lowering" / "kernels"
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(home.rglob("*.py"))))
    return f"kernels {sources.hexdigest()[:12]}"
