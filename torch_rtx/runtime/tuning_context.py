"""Makes the `TuningContext` of a session, and fills runtime caches ahead of time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from torch_rtx.artefacts import Artefacts
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import FIGURES_KEY, GPU, DeviceKey
from torch_rtx.chips import Chip, chip_named, chip_on, read_figures
from torch_rtx.ir import Graph, Node, kernel_nodes
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.benchmark import timer
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.compile_client import COMPILE_CLIENT
from torch_rtx.runtime.driver import checked
from torch_rtx.runtime.launch import Gpu, LoadedTactic, gpu_of, load, load_rivals, load_tactics
from torch_rtx.runtime.region_keys import plain, region_key
from torch_rtx.runtime.tuner import TuningContext
from torch_rtx.runtime.tuning_db import TuningDatabase
from torch_rtx.settings import BEST, RuntimeSettings, opens_stages, runtime_cache_path
from torch_rtx.tactics import Candidate, KernelTable
from torch_rtx.targets import EXACT, Float32, arch_of

log = logging.getLogger(__name__)
_READ_BY_LOWERING = (
    "accumulation",
    "binaries",
    "chips",
    "dims",
    "dtypes",
    "foreign",
    "ir",
    "irparse",
    "manifest",
    "op_work",
    "optable",
    "profiles",
    "score_mods",
    "tactics",
    "targets",
)


def tactics_and_context(
    table: KernelTable,
    graph: Graph,
    device: torch.device,
    settings: RuntimeSettings,
    float32: Float32 = EXACT,
) -> tuple[Mapping[str, LoadedTactic], TuningContext | None]:
    """The tactics of an engine that can be used at once, and the context of its tuners; None: nothing is tuned.

    Args:
        float32: how exact products of float32 in new kernels have to be.
    """
    driver = driver_api.driver() if device.type == "cuda" else None
    if driver is None or settings.tactics != BEST:
        return load_tactics(table, graph, device, settings.tactics), None
    gpu = gpu_of(driver, device.index)
    BACKGROUND.on_stop(COMPILE_CLIENT.stop)
    open_store = partial(_runtime_cache, gpu, device, settings)
    context = TuningContext(
        TuningDatabase(
            gpu.sm,
            COMPILE_CLIENT,
            open_store,
            Artefacts.at(settings.dump_dir, settings.override_dir),
            known_chip(gpu.sm, device),
            float32,
        ),
        load=partial(_load, gpu, open_store),
        jit=partial(load_tactics, table, graph, device, open_store=open_store),
        time=timer(device),
        background=BACKGROUND,
        rivals=partial(load_rivals, table, graph, gpu),
    )
    at_once = settings.specialization_strategy != "lazy"
    return load_tactics(table, graph, device, jit=at_once, open_store=open_store), context


@cache
def chip_here(index: int) -> Chip:
    """The GPU `index` as the cost model sees it in this process: with its figures, if the runtime cache has some."""
    driver, device = driver_api.driver(), torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    known = known_chip(10 * major + minor, device)
    if driver is None:
        return known
    store = _runtime_cache(gpu_of(driver, index), device, RuntimeSettings())
    figures = None if store is None else read_figures(store.get(GPU, FIGURES_KEY))
    return known if figures is None else known.measured(figures)


def known_chip(sm: int, device: torch.device) -> Chip:
    """What is known of a GPU without measuring it."""
    arch = arch_of(sm)
    facts = torch.cuda.get_device_properties(device)
    clock, memory_clock, bits = (
        getattr(facts, name, 0) for name in ("clock_rate", "memory_clock_rate", "memory_bus_width")
    )
    memory = 2 * memory_clock * bits / 8e6  # GB/s: kHz, two transfers in a cycle
    return chip_on(arch.like or arch.sm, facts.name, facts.multi_processor_count, memory, clock / 1e6)


def _load(gpu: Gpu, open_store: Callable[[], RuntimeCache | None], node: Node, candidate: Candidate) -> LoadedTactic:
    target = arch_of(gpu.sm).target
    return load(gpu, node, candidate.tactic, target, candidate.binaries, open_store() if target.ptx else None)


def _runtime_cache(gpu: Gpu, device: torch.device, settings: RuntimeSettings) -> RuntimeCache | None:
    path = None if opens_stages(settings) else runtime_cache_path(settings)
    return None if path is None else _open(path, settings.runtime_cache_size, device_key(gpu, device))


_open = cache(lambda path, size, key: RuntimeCache(path, key, size=size))  # one per file and device


def device_key(gpu: Gpu, device: torch.device) -> DeviceKey:
    """The device that a tuning result is valid for."""
    driver = int(checked(gpu.driver.cuDriverGetVersion()))
    return DeviceKey(torch.cuda.get_device_name(device), gpu.sm, driver, versions())


def pregenerate(graph: Graph, sizes: Mapping[str, int], device: DeviceKey, path: str, float32: Float32 = EXACT) -> int:
    """Compile the tactics expected to be fastest into a runtime cache; returns how many.

    Args:
        graph: level fused.
        sizes: numbers for its symbols, by name; empty: kernels for any sizes.
        device: the GPU, which need not be in this machine; its `versions` are filled in.
        float32: of the manifest.

    Raises:
        KernelError: see `CompileClient.build`.
    """
    bodies = (node.body for node in kernel_nodes(bind(graph, sizes)) if node.body is not None)
    wanted = {region_key(body, float32): (plain(body), 0) for body in bodies}
    with closing(RuntimeCache(path, replace(device, versions=versions()))) as store:
        chip = chip_named(device.name, device.sm)
        database = TuningDatabase(device.sm, COMPILE_CLIENT, lambda: store, chip=chip, float32=float32)
        return len(database.candidates(wanted))


@cache
def versions() -> str:
    """The version of the code generator: a digest of the sources that generate and store kernels."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in generator_sources()))
    return f"kernels {digest.hexdigest()[:12]}"


def generator_sources() -> list[Path]:
    """The sources that decide what is generated for a region, and how it is stored: `lowering` and what it reads."""
    home = Path(__file__).parents[1]
    return sorted([*(home / "lowering").rglob("*.py"), *(home / f"{name}.py" for name in _READ_BY_LOWERING)])
