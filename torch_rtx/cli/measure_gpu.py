"""`torch-rtx measure-gpu`: what this machine's GPU reaches, kept for the choice of kernels on it."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cli.runtime_cache import File, figures_text, path_of
from torch_rtx.cli.terminal import Report
from torch_rtx.errors import CacheError, SettingsError
from torch_rtx.progress import stage


def measure_gpu(
    device: Annotated[int, typer.Option("--device", help="The GPU, as CUDA counts them.")] = 0,
    file: File = None,
) -> Report:
    """Measure bandwidth, products and launches of this machine's GPU, and keep them in the runtime cache: programs that
    start later choose kernels by them. It takes less than a minute, in which nothing else should use the GPU."""
    path = path_of(file)
    import torch

    from torch_rtx.runtime import driver as driver_api
    from torch_rtx.runtime.gpu_figures import measure, measured_on, write_figures
    from torch_rtx.runtime.launch import gpu_of
    from torch_rtx.runtime.tuning_context import device_key

    if not torch.cuda.is_available():
        raise SettingsError("there is no GPU to measure", hint="`torch-rtx doctor` says why PyTorch finds none")
    if not 0 <= device < torch.cuda.device_count():
        raise SettingsError(f"there is no GPU {device}", hint="`torch-rtx targets` lists those of this machine")
    driver = driver_api.driver()
    if driver is None:
        raise SettingsError("kernels are not compiled here without cuda-bindings", hint="pip install cuda-bindings")
    at = torch.device("cuda", device)
    found = measure(at, stage)
    key = measured_on(device_key(gpu_of(driver, device), at))
    with closing(RuntimeCache(path, key)) as cache:
        write_figures(cache, found)
        if not cache.flush():
            raise CacheError(f"the figures can't be written to {path}", hint="name another file with --file")
    text = f"{key.name}, driver {key.driver}\n{figures_text(found)}\nkept in {path}"
    return Report({"gpu": key.name, "driver": key.driver, "figures": found, "file": path}, text)
