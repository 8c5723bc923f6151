"""From a captured FX graph to a fused graph: the driver that torch.compile and ahead-of-time builds share."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from torch_rtx import aten, collectives
from torch_rtx.backend.partition import check_ops, partition
from torch_rtx.errors import CaptureError, LoweringError, RtxError, SettingsError
from torch_rtx.ir import Graph, verify
from torch_rtx.lowering.from_fx import Role, from_fx
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.support import reasons
from torch_rtx.lowering.symbols import Symbols, main_device
from torch_rtx.runtime.background import BACKGROUND
from torch_rtx.runtime.code import EMPTY
from torch_rtx.runtime.garbage import uncollected
from torch_rtx.runtime.tuning_context import chip_here
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import EXACT, HIGH, HIGHEST, LATER, PORTABLE, Float32, Option, Target, parse_targets

log = logging.getLogger(__name__)
REPRODUCTION = """\"\"\"Runs the pipeline on the graph that failed: python reproduce.py\"\"\"
from pathlib import Path

from torch_rtx.irparse import parse
from torch_rtx.lowering.pipeline import lower
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import parse_targets

text = (Path(__file__).parent / "00_import.rtxir").read_text()
settings = CompilationSettings(disabled_passes={disabled!r}, copy_weights={copy_weights!r})
print(lower(parse(text), settings, targets=parse_targets({targets!r}))[0])
"""


@dataclass
class Program:
    """A lowered graph, the data of its constants, the callables of its Python fallbacks, and its kernels.

    Attributes:
        folder: receives dumped artefacts; None: no dump.
        entry: the key of its entry in the engine cache, if it has one.
        origins: for each location in the graph, the FX node that it comes from.
        float32: how exact products of float32 in its kernels have to be.
    """

    graph: Graph
    constants: dict[str, torch.Tensor]
    callables: list[Callable[..., Any]]
    device: torch.device
    folder: Path | None = None
    kernels: KernelTable = field(default_factory=KernelTable)
    entry: str | None = None
    origins: Sequence[fx.Node | None] = ()
    float32: Float32 = EXACT

    def dump(self, name: str, text: str) -> None:
        """Write an artefact to `folder`, if there is one."""
        if self.folder is not None:
            (self.folder / name).write_text(text)


@dataclass
class Built:
    """A new program, and the FX nodes of its locations, of its Python fallbacks, and of its fallbacks with reasons."""

    program: Program
    locations: Locations
    called: list[fx.Node]
    fallbacks: dict[fx.Node, str]


def check_settings(settings: CompilationSettings) -> None:
    """Raises SettingsError if the settings name an unknown operator or pass, or disable a required pass."""
    check_ops(settings)
    if not settings.disabled_passes:
        return
    from torch_rtx.lowering.pipeline import PASSES  # takes as long as what else a process needs that builds nothing

    unknown = settings.disabled_passes - PASSES.keys()
    required = {name for name in settings.disabled_passes - unknown if PASSES[name].required}
    if unknown or required:
        names = ", ".join(sorted(unknown or required))
        problem = f"unknown passes {names}" if unknown else f"{names} can't be disabled"
        raise SettingsError(f"disabled_passes: {problem}", hint=f"the passes are {', '.join(PASSES)}")


def _on_the_host() -> AbstractContextManager[object]:
    """What passes compute, they compute here, whatever device the caller has made the default."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@BACKGROUND.paused()
@uncollected()
def compile_fx(
    gm: fx.GraphModule,
    roles: Sequence[Role],
    settings: CompilationSettings,
    writes: Mapping[int, str] | None = None,
    ranges: Mapping[Any, Any] | None = None,
    typical: Mapping[Any, int] | None = None,
) -> Built:
    """Partition, import and lower `gm`, bypassing the engine cache.

    Args:
        roles: one per placeholder.
        writes: see `from_fx`.
        ranges, typical: see `Symbols`.

    Raises:
        CaptureError: the tensors are on a device on which no engine runs.
        PartitionError: a node falls back although `require_full_compilation` is set.
        LoweringError: a bug of torch_rtx; names the folder with the graph and a script that reproduces the bug.
    """
    from torch_rtx.lowering.pipeline import lower  # see `check_settings`

    start = time.perf_counter()
    check_settings(settings)
    device = device_of(gm)
    if device.type not in EMPTY:
        problem = f"tensors of this graph are on {device.type}, and torch_rtx runs on {' and '.join(EMPTY)}"
        raise CaptureError(problem, hint="move the model and its inputs, or compile a part that has none of these")
    targets = formed_for(settings, device)
    if settings.targets not in (None, LATER) and device.type != "cuda":
        log.warning("targets has no effect: the model is captured for the %s, which runs no kernels", device.type)
    symbols = Symbols(device, ranges, typical)
    parts = partition(gm, reasons(gm, symbols), settings)
    log_fallbacks(parts.fallbacks)
    folder = _folder(settings.dump_dir)
    graph = None
    try:
        if folder is not None:
            (folder / "00_fx.py").write_text(gm.print_readable(print_output=False))
            (folder / "00_partition.txt").write_text(str(parts))
        imported = from_fx(gm, roles, parts.fallbacks, symbols, writes)
        graph = imported.graph
        verify(graph, aten.ALLOWED)
        with _on_the_host():
            lowered, _ = lower(graph, settings, folder, targets)
        collectives.check(lowered)
    except Exception as error:
        raise _bug(error, gm, graph, settings, folder) from error
    seconds = time.perf_counter() - start
    log.info("%d blocks, %d fallback nodes, %.0f ms", len(parts.blocks), len(parts.fallbacks), 1e3 * seconds)
    program = Program(lowered, imported.constants, imported.callables, device, folder, float32=float32_of(settings))
    return Built(program, imported.locations, imported.called, parts.fallbacks)


def log_fallbacks(fallbacks: Mapping[fx.Node, str]) -> None:
    """Log which nodes stay in PyTorch, and why."""
    for node, why in fallbacks.items():
        log.info("fallback: %s: %s", node.target, why)


def float32_of(settings: CompilationSettings) -> Float32:
    """How exact products of float32 have to be: what the settings say, or what PyTorch is set to now."""
    if settings.float32_precision is not None:
        return Float32(settings.float32_precision, settings.float32_precision)
    found = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    return Float32(*(HIGH if one == "tf32" else HIGHEST for one in found))


def named_targets(option: Option, device: torch.device) -> tuple[Target, ...]:
    """The targets that the option `targets` names on this machine; "current" is the GPU `device`.

    Raises:
        SettingsError: an unknown target, or "current" without a GPU.
    """
    if not torch.cuda.is_available():
        return parse_targets(option)
    index = torch.cuda.current_device() if device.index is None else device.index
    return parse_targets(option, torch.cuda.get_device_capability(index), lambda: chip_here(index))


def formed_for(settings: CompilationSettings, device: torch.device) -> tuple[Target, ...]:
    """What the kernels of an engine are formed for; none: it has no kernels. Those that are compiled where the engine
    runs may be for any of the portable targets.

    Raises:
        SettingsError: see `named_targets`.
    """
    if settings.targets is None or device.type != "cuda":
        return ()
    return PORTABLE if settings.targets == LATER else named_targets(settings.targets, device)


def device_of(gm: fx.GraphModule) -> torch.device:
    """The device on which the engine of `gm` runs."""
    return main_device(node.meta.get("val") for node in gm.graph.nodes)


def _folder(dump_dir: str | None) -> Path | None:
    """A new folder `graph_NNN` in `dump_dir`; several processes may dump there at the same time."""
    if dump_dir is None:
        return None
    root = Path(dump_dir)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(len(list(root.iterdir())), 1_000_000):
        try:
            (folder := root / f"graph_{number:03}").mkdir()
            return folder
        except FileExistsError:
            continue
    raise SettingsError(f"dump_dir {dump_dir} is full")


def _reproduction(settings: CompilationSettings, device: torch.device) -> str:
    return REPRODUCTION.format(
        disabled=sorted(settings.disabled_passes),
        copy_weights=settings.copy_weights,
        targets=[str(target) for target in formed_for(settings, device)] or LATER,
    )


def _bug(
    error: Exception, gm: fx.GraphModule, graph: Graph | None, settings: CompilationSettings, folder: Path | None
) -> LoweringError:
    """Write the graph and a script that reproduces the failure; the error names them."""
    folder = folder or Path(tempfile.mkdtemp(prefix="torch_rtx_"))
    (folder / "00_fx.py").write_text(gm.print_readable(print_output=False))
    script = folder / "00_fx.py"
    if graph is not None:
        (folder / "00_import.rtxir").write_text(str(graph))
        script = folder / "reproduce.py"
        script.write_text(_reproduction(settings, device_of(gm)))
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)))
    message = error.message if isinstance(error, RtxError) else f"{type(error).__name__}: {error}"
    return LoweringError(
        f"compiling a graph of {len(gm.graph.nodes)} nodes failed, which is a bug of torch_rtx: {message}",
        loc=getattr(error, "loc", None),
        hint=f"reproduce it with {script}; report it to torch_rtx with that folder\n"
        "  fallback_on_error=True runs such graphs in PyTorch",
    )
