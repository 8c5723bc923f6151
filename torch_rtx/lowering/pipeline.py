"""The passes in their order, and the driver that times, checks and dumps each of them."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch_rtx import aten
from torch_rtx.errors import InvalidIR, LoweringError, RtxError
from torch_rtx.ir import Graph, verify
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.affine_batch_norm import affine_batch_norm
from torch_rtx.lowering.passes.channels_last import channels_last
from torch_rtx.lowering.passes.cse import cse
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.passes.expand_norms import expand_norms
from torch_rtx.lowering.passes.finish import finish
from torch_rtx.lowering.passes.fold_batch_norm import fold_batch_norm
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.lowering.passes.hoist_weights import hoist_weights
from torch_rtx.lowering.passes.merge_linears import merge_linears
from torch_rtx.lowering.passes.raise_attention import raise_attention
from torch_rtx.lowering.passes.raise_gelu import raise_gelu
from torch_rtx.lowering.passes.read_in_place import read_in_place
from torch_rtx.lowering.passes.simplify import simplify
from torch_rtx.lowering.passes.simplify_masks import simplify_masks
from torch_rtx.lowering.passes.write_in_place import write_in_place
from torch_rtx.settings import CompilationSettings

log = logging.getLogger(__name__)

Pass = Callable[[Graph, Inference], Graph]
PIPELINE: Mapping[str, Pass] = {
    "simplify": simplify,
    "cse": cse,
    "raise_attention": raise_attention,
    "raise_gelu": raise_gelu,
    "simplify_masks": simplify_masks,
    "read_in_place": read_in_place,
    "fold_batch_norm": fold_batch_norm,
    "affine_batch_norm": affine_batch_norm,
    "expand_norms": expand_norms,
    "merge_linears": merge_linears,
    "channels_last": channels_last,
    "write_in_place": write_in_place,
    "hoist_weights": hoist_weights,
    "dce": dce,
    "fuse": fuse,
    "finish": finish,
}
REQUIRED = frozenset(("finish",))
# Passes that form kernels and get them what they are best at: only for engines that have a GPU target.
FORMING = frozenset(("affine_batch_norm", "channels_last", "expand_norms", "fuse", "read_in_place"))
# Passes whose recipes double the memory of large weights, where the model keeps its own: see `copy_weights`.
COPYING = frozenset(("merge_linears",))


@dataclass
class Report:
    """What the passes did: seconds and nodes left, per pass, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)


def lower(
    graph: Graph, settings: CompilationSettings, dump: Path | None = None, kernels: bool = False
) -> tuple[Graph, Report]:
    """Run the pipeline over a graph of level import.

    Args:
        kernels: form kernels.
        dump: folder for `NN_pass.rtxir` after each pass and `NN_pass.diff` where it changed something.

    Returns:
        The graph of level fused, and the report.

    Raises:
        LoweringError: a pass failed or left a graph that does not verify; the message names it and those before it.
        SettingsError: never here; `settings.disabled_passes` is checked by `check_settings`.
    """
    infer, report = Inference(), Report()
    _write(dump, 0, "import", graph, None)
    for index, (name, run) in enumerate(PIPELINE.items(), 1):
        if name in settings.disabled_passes or (name in COPYING and settings.copy_weights is False):
            continue
        if name in FORMING and not kernels:
            continue
        start = time.perf_counter()
        try:
            after = run(graph, infer)
            verify(after, aten.ALLOWED)
        except Exception as error:
            _write(dump, index, f"{name}.before", graph, None)
            raise _bug(name, report, dump, error) from error
        report.seconds[name] = time.perf_counter() - start
        report.nodes[name] = len(after.nodes)
        log.debug("%s: %d -> %d nodes, %.1f ms", name, len(graph.nodes), len(after.nodes), 1e3 * report.seconds[name])
        _write(dump, index, name, after, graph)
        graph = after
    return graph, report


def _bug(name: str, report: Report, dump: Path | None, error: Exception) -> LoweringError:
    where = f"the graph before it is in {dump}" if dump else "set TORCH_RTX_DUMP=dir to get the graph before it"
    before = ", ".join(report.seconds) or "none"
    kind = (
        "left a graph that does not verify" if isinstance(error, InvalidIR) else f"failed with {type(error).__name__}"
    )
    return LoweringError(
        f"pass {name} {kind}: {error.message if isinstance(error, RtxError) else error}",
        loc=getattr(error, "loc", None),
        hint=f"passes before it: {before}; {where}; disabled_passes=[{name!r}] leaves it out",
    )


def _write(dump: Path | None, index: int, name: str, graph: Graph, before: Graph | None) -> None:
    if dump is None:
        return
    dump.mkdir(parents=True, exist_ok=True)
    text = str(graph)
    (dump / f"{index:02}_{name}.rtxir").write_text(text)
    if before is not None and before != graph:
        lines = difflib.unified_diff(str(before).splitlines(), text.splitlines(), "before", name, lineterm="")
        (dump / f"{index:02}_{name}.diff").write_text("\n".join(lines) + "\n")
