"""`torch-rtx cache runtime`: list the runtime cache, export it to another machine, fill it ahead of time, clear it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from torch_rtx.cache.runtime import intact
from torch_rtx.cache.runtime_file import FIGURES_KEY, GPU, SUFFIXES, DeviceKey, DeviceSummary, RuntimeFile, export_file
from torch_rtx.chips import FIGURES, read_figures
from torch_rtx.cli.cache import size_of, time_text
from torch_rtx.cli.terminal import Report, command, escaped
from torch_rtx.errors import CacheDamaged, CacheError, SettingsError
from torch_rtx.progress import stage
from torch_rtx.settings import RuntimeSettings, runtime_cache_path
from torch_rtx.targets import parse_targets

app = typer.Typer(no_args_is_help=True, help="The runtime cache: kernels and tuning results by device.")
File = Annotated[str | None, typer.Option("--file", help="The runtime cache; default: that of the settings.")]
Gpu = Annotated[str | None, typer.Option("--gpu", help="Only entries of GPUs whose name contains this.")]


def path_of(file: str | None) -> str:
    """The runtime cache that a command is about.

    Raises:
        CacheError: there is none, or its folder does not exist.
    """
    path = runtime_cache_path(RuntimeSettings() if file is None else RuntimeSettings(runtime_cache=file))
    if path is None:
        raise CacheError("the runtime cache is off", hint="name a file with --file")
    if file is not None and not Path(path).absolute().parent.is_dir():
        raise CacheError(f"there is no folder of {path}")
    return path


def _devices(path: str) -> list[DeviceSummary]:
    with suppress(FileNotFoundError), closing(RuntimeFile(path)) as cache:
        return cache.devices()
    return []


def _figures(path: str) -> dict[DeviceKey, Mapping[str, float]]:
    """What was measured of GPUs, by device."""
    with suppress(FileNotFoundError), closing(RuntimeFile(path)) as cache:
        rows = [(device, cache.read(row)) for row, device in cache.find(GPU, FIGURES_KEY)]
        entries = [(device, read[1]) for device, read in rows if read is not None]
        found = [(device, read_figures(entry.value)) for device, entry in entries if entry is not None]
        return {device: figures for device, figures in found if figures is not None}
    return {}


def _named(gpu: str | None) -> Callable[[DeviceKey], bool]:
    return lambda device: gpu is None or gpu.lower() in device.name.lower()


def info(file: File = None) -> Report:
    """List the devices with their numbers of entries, the most recently used first, and what was measured of GPUs."""
    path = path_of(file)
    found = _devices(path)
    figures = _figures(path) if any(GPU in summary.counts for summary in found) else {}
    from rich.console import Console  # importing rich takes 0.1 s, and only tables need it
    from rich.markup import escape
    from rich.table import Table

    table = Table("GPU", "SM", "driver", "kernels", "tactics", "KiB", "last used", "made by", box=None)
    for summary in found:
        device = summary.device
        counts = [str(summary.counts.get(kind, 0)) for kind in ("kernel", "tactic")]
        about = f"{summary.bytes / 1024:.1f}", time_text(summary.used), escape(escaped(device.versions))
        table.add_row(escape(escaped(device.name)), str(device.sm), str(device.driver), *counts, *about)
    console = Console(color_system=None)
    if not console.is_terminal:
        console.width = 10_000  # one line per device in a pipe
    with console.capture() as lines:
        if found:
            console.print(table, highlight=False)
    entries, size = sum(sum(summary.counts.values()) for summary in found), sum(summary.bytes for summary in found)
    told = [f"{device.name}, driver {device.driver}\n" + figures_text(figures[device]) for device in figures]
    text = f"{lines.get()}{entries} entries of {len(found)} devices, {size / 1024**2:.1f} MiB, in {path}"
    value = [{**asdict(summary), "figures": figures.get(summary.device)} for summary in found]
    return Report(value, "\n".join([text, *told]))


def figures_text(figures: Mapping[str, float]) -> str:
    """A line for each figure of a GPU, with its unit."""
    return "\n".join(f"  {name:9}{figures[name]:10.4g} {unit}" for name, unit in FIGURES.items() if name in figures)


def verify(file: File = None) -> Report:
    """Read every entry and check its digest. Exit status 1 if one is damaged; damaged entries are not removed."""
    with closing(RuntimeFile(path_of(file))) as cache:
        found = [entry is not None for entry in cache.entries()]
    damaged = len(found) - sum(found)
    text = f"{sum(found)} of {len(found)} entries are intact"
    return Report({"entries": len(found), "damaged": damaged}, text, f"{damaged} are damaged" if damaged else None)


def export_(
    path: Annotated[Path, typer.Argument(help="The file to write.")], gpu: Gpu = None, file: File = None
) -> Report:
    """Write entries to a file to ship; the file is a runtime cache itself."""
    with closing(RuntimeFile(path_of(file))) as cache:
        named = _named(gpu)
        count = export_file((entry for entry in intact(cache) if named(entry.device)), path)
    return Report({"entries": count, "file": str(path)}, f"{count} entries in {path}")


def import_(
    paths: Annotated[list[Path], typer.Argument(help="Files that `export` wrote, or other runtime caches.")],
    file: File = None,
) -> Report:
    """Import entries that are new or newer; running programs may use the cache meanwhile."""
    limit = RuntimeSettings().runtime_cache_size
    counts = {}
    for path in paths:
        with closing(RuntimeFile(path)) as other, closing(RuntimeFile(path_of(file), create=True)) as cache:
            counts[str(path)] = cache.merge(intact(other), limit)
    return Report(counts, "\n".join(f"{count} new entries from {path}" for path, count in counts.items()))


def generate(
    engine: Annotated[Path, typer.Argument(help="The engine to compile kernels for.")],
    gpu: Annotated[str, typer.Option("--gpu", help="The GPU's name, as CUDA reports it.")],
    sm: Annotated[int, typer.Option("--sm", help="Its SM version: 89.")],
    driver: Annotated[int, typer.Option("--driver", help="The oldest driver, as CUDA reports it: 12080.")],
    size: Annotated[
        list[str] | None, typer.Option("--size", help="A dynamic size: batch=8. Default: any size.")
    ] = None,
    file: File = None,
) -> Report:
    """Compile the kernels of an engine for a GPU that this machine need not have, to ship with the engine."""
    parse_targets(sm)  # raises if it does not exist
    from torch_rtx import engine as engine_file  # slow imports that only this command needs
    from torch_rtx.cli.calls import sizes_given
    from torch_rtx.runtime.tuning_context import pregenerate

    found = engine_file.load(engine)
    if found.manifest.device != "cuda":
        hint = 'build it with CompilationSettings(device="cuda")'
        raise SettingsError(f"{engine} was built for the {found.manifest.device}, which runs no kernels", hint=hint)
    sizes = sizes_given(found, size) if size else {}
    stage("compiling kernels")
    path = path_of(file)
    count = pregenerate(found.graph, sizes, DeviceKey(gpu, sm, driver, ""), path, found.manifest.float32)
    return Report({"regions": count, "file": path}, f"{count} regions for {gpu}")


def prune(
    size: Annotated[str | None, typer.Option("--size", help="Keep at most this size: 100M, 2G.")] = None,
    days: Annotated[float | None, typer.Option("--days", help="Remove entries unused for this many days.")] = None,
    outdated: Annotated[
        bool, typer.Option("--outdated", help="Remove entries of versions other than the most recently used ones.")
    ] = False,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Remove entries of GPUs whose name contains this.")] = None,
    file: File = None,
) -> Report:
    """Remove the entries that all options fit; without options, the least recently used beyond the settings' size."""
    removed, left = 0, 0
    path = path_of(file)
    devices = _devices(path)
    # The most recently used one wins; figures of a GPU are of no version.
    latest = {one.device.sm: one.device.versions for one in reversed(devices) if one.counts.keys() != {GPU}}

    def removes(kind: str, device: DeviceKey) -> bool:
        is_named = gpu is None or _named(gpu)(device)
        return is_named and not (outdated and (kind == GPU or latest.get(device.sm) == device.versions))

    limit = size_of(size) if size is not None else RuntimeSettings().runtime_cache_size
    with suppress(FileNotFoundError), closing(RuntimeFile(path)) as cache:
        before = None if days is None else time.time() - days * 86400
        removed = cache.prune(limit, before, removes if outdated or gpu is not None else None)
        left = cache.size()[0]
    return Report({"removed": removed, "left": left}, f"removed {removed} entries; {left} are left")


def clear(file: File = None) -> Report:
    """Remove every entry and all renamed damaged files; running programs may use the cache meanwhile."""
    removed = 0
    path = path_of(file)
    old = {f".damaged{suffix}" for suffix in SUFFIXES}
    try:
        with suppress(FileNotFoundError), closing(RuntimeFile(path)) as cache:
            removed = cache.prune(which=lambda kind, device: True)
    except CacheDamaged:
        old |= set(SUFFIXES)
    for suffix in old:
        Path(path + suffix).unlink(missing_ok=True)
    return Report({"removed": removed}, f"removed {removed} entries")


for each in (info, verify, export_, import_, generate, prune, clear):
    app.command(each.__name__.strip("_"))(command(each))
