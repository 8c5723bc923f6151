"""What a session on this machine's GPU is specialized with."""

from __future__ import annotations

import logging
from functools import partial

import torch

from torch_rtx.ir import Graph
from torch_rtx.kerneltable import Candidate, KernelTable
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.builder import BUILDER
from torch_rtx.runtime.job import Tools
from torch_rtx.runtime.knowledge import Knowledge
from torch_rtx.runtime.launch import Gpu, Launcher, gpu_of, launchers
from torch_rtx.runtime.trial import microseconds
from torch_rtx.settings import RuntimeSettings
from torch_rtx.targets import Target

log = logging.getLogger(__name__)


def tools_for(table: KernelTable, graph: Graph, device: torch.device, settings: RuntimeSettings) -> Tools | None:
    """The tools for a graph; None where nothing can be specialized.

    Args:
        table: the kernels that come with the engine.
    """
    if device.type != "cuda" or settings.tactics != "best":
        return None
    driver = driver_api.driver()
    if driver is None:
        log.warning("no kernels are compiled for this GPU: the package cuda-bindings is not installed")
        return None
    gpu = gpu_of(driver, device.index)
    BACKGROUND.on_stop(BUILDER.close)
    knowledge = Knowledge(gpu.sm, BUILDER.build)
    jit = partial(launchers, table, graph, device, settings.tactics)
    return Tools(knowledge, partial(_load, gpu), jit, microseconds(device), BACKGROUND)


def _load(gpu: Gpu, op: str, candidate: Candidate, pointers: int) -> Launcher:
    return Launcher(gpu, op, candidate.launch, Target(gpu.sm), candidate.binaries, pointers)
