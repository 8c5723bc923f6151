"""The passes in their order, and the driver that times, checks and dumps the graph after each of them."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from torch_rtx import aten
from torch_rtx.control import is_control
from torch_rtx.errors import InvalidIR, LoweringError, RtxError
from torch_rtx.ir import Graph, Node, attr_values, verify
from torch_rtx.lowering.bodies import lowered_control
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.passes.accumulate import accumulate
from torch_rtx.lowering.passes.affine_batch_norm import affine_batch_norm
from torch_rtx.lowering.passes.attend_in_bands import attend_in_bands
from torch_rtx.lowering.passes.channels_last import channels_last
from torch_rtx.lowering.passes.cse import cse
from torch_rtx.lowering.passes.dce import dce
from torch_rtx.lowering.passes.decide_by_range import decide_by_range
from torch_rtx.lowering.passes.decompose import decompose
from torch_rtx.lowering.passes.expand_attention import expand_attention
from torch_rtx.lowering.passes.expand_bags import expand_bags
from torch_rtx.lowering.passes.expand_norms import expand_norms
from torch_rtx.lowering.passes.expand_sorts import expand_sorts
from torch_rtx.lowering.passes.finish import finish
from torch_rtx.lowering.passes.fold_batch_norm import fold_batch_norm
from torch_rtx.lowering.passes.fold_padding import fold_padding
from torch_rtx.lowering.passes.form_launches import form_launches
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.lowering.passes.fuse_column_sums import fuse_column_sums
from torch_rtx.lowering.passes.fuse_horizontally import fuse_horizontally
from torch_rtx.lowering.passes.hoist_weights import hoist_weights
from torch_rtx.lowering.passes.merge_linears import merge_linears
from torch_rtx.lowering.passes.merge_steps import merge_steps
from torch_rtx.lowering.passes.mix_before_resampling import mix_before_resampling
from torch_rtx.lowering.passes.move_numbers import move_numbers
from torch_rtx.lowering.passes.pack_weights import pack_weights
from torch_rtx.lowering.passes.pad_products import pad_products
from torch_rtx.lowering.passes.place_waits import place_waits
from torch_rtx.lowering.passes.raise_attention import raise_attention
from torch_rtx.lowering.passes.raise_gelu import raise_gelu
from torch_rtx.lowering.passes.raise_group_norm import raise_group_norm
from torch_rtx.lowering.passes.raise_linear import raise_linear
from torch_rtx.lowering.passes.raise_products import raise_products
from torch_rtx.lowering.passes.raise_quantized import kept_floats, raise_quantized
from torch_rtx.lowering.passes.read_in_place import read_in_place
from torch_rtx.lowering.passes.reduce_in_place import reduce_in_place
from torch_rtx.lowering.passes.results_for_writes import results_for_writes
from torch_rtx.lowering.passes.separate_pools import separate_pools
from torch_rtx.lowering.passes.simplify import simplify
from torch_rtx.lowering.passes.simplify_masks import simplify_masks
from torch_rtx.lowering.passes.sort_by_counting import sort_by_counting
from torch_rtx.lowering.passes.split_scans import split_scans
from torch_rtx.lowering.passes.sum_few_rows import sum_few_rows
from torch_rtx.lowering.passes.transpose_weights import transpose_weights
from torch_rtx.lowering.passes.unroll_recurrences import unroll_recurrences
from torch_rtx.lowering.passes.write_in_place import write_in_place
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import HIGHEST, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What passes may ask for beside the graph.

    Attributes:
        settings: the options of the engine.
        targets: what kernels are formed for; none: no kernels are.
    """

    settings: CompilationSettings
    targets: tuple[Target, ...] = ()

    @property
    def weight_copies(self) -> bool:
        """A recipe may hold a second copy of large weights, beside the model's own, in the same precision."""
        return self.settings.copy_weights is not False

    @property
    def atomics(self) -> bool:
        """Kernels may add floats to memory in any order, so that runs differ in their last bits."""
        return not torch.are_deterministic_algorithms_enabled()

    @property
    def exact_products(self) -> bool:
        """Products of matrices in float32 are as exact as other sums in float32: never in TF32."""
        asked = self.settings.float32_precision
        return asked == HIGHEST if asked is not None else torch.backends.cuda.matmul.fp32_precision != "tf32"


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline, from a graph of level import to a graph with the same inputs and types of results.

    Attributes:
        run: `run(graph, infer, **arguments) -> graph`; its name is the name of the pass.
        needs: names of attributes of `Context`; the pass is left out where one of them is false or empty.
        takes: names of attributes of `Context` that `run` gets as keyword arguments.
        ensures: level of the graph that it returns.
    """

    run: Callable[..., Graph]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    ensures: str = "import"

    @property
    def name(self) -> str:
        """The name in `disabled_passes`, in logs and in dumps."""
        return self.run.__name__

    @property
    def required(self) -> bool:
        """No engine can do without a pass that lowers the graph to the next level."""
        return self.ensures != "import"

    def applies(self, context: Context) -> bool:
        """Everything that the pass needs is there."""
        return all(getattr(context, name) for name in self.needs)

    def __call__(self, graph: Graph, infer: Inference, context: Context, checked: bool = True) -> Graph:
        """Run the pass and, if `checked`, check what it returns; a graph that it leaves as it is was checked before.

        Raises:
            LoweringError: the pass failed, or it returned a graph that breaks a rule of the IR, has another level than
                `ensures`, or has other inputs than `graph`, or results of other types or in memory shared otherwise.
        """
        try:
            after = self.run(graph, infer, **{name: getattr(context, name) for name in self.takes})
        except Exception as error:
            raise LoweringError(
                f"pass {self.name} failed with {type(error).__name__}: {_message(error)}",
                loc=getattr(error, "loc", None),
            ) from error
        if checked and (after is not graph or after.level != self.ensures):
            self._check(graph, after)
        return after

    def _check(self, before: Graph, after: Graph) -> None:
        try:
            verify(after, aten.ALLOWED)
        except InvalidIR as error:
            message = f"pass {self.name} left a graph that does not verify: {error.message}"
            raise LoweringError(message, loc=error.loc) from error
        for what, was, now in (
            ("level", self.ensures, after.level),
            ("inputs", _inputs(before), _inputs(after)),
            ("types of the results", _result_types(before), _result_types(after)),
            ("memory that results share", _result_memory(before), _result_memory(after)),
        ):
            if was != now:
                raise LoweringError(f"pass {self.name} changed the {what}: expected {was}, found {now}")


PIPELINE = (
    Pass(simplify),
    Pass(cse),
    Pass(raise_products, needs=("targets",), takes=("exact_products",)),
    Pass(raise_attention),
    Pass(raise_gelu),
    Pass(raise_group_norm),
    Pass(raise_linear),
    Pass(raise_quantized, needs=("targets",)),
    Pass(simplify_masks),
    Pass(attend_in_bands, needs=("targets",)),
    Pass(read_in_place, needs=("targets",)),
    Pass(cse),  # what was raised alike in each layer, such as a mask with a bias
    Pass(fold_padding),
    Pass(fold_batch_norm),
    Pass(affine_batch_norm, needs=("targets",)),
    Pass(mix_before_resampling, needs=("targets", "weight_copies")),
    Pass(expand_attention, needs=("targets",), takes=("targets",)),
    Pass(expand_bags, needs=("targets",)),
    Pass(separate_pools, needs=("targets",)),
    Pass(expand_norms, needs=("targets",)),
    Pass(decide_by_range, needs=("targets",)),
    Pass(sort_by_counting, needs=("targets", "atomics")),
    Pass(expand_sorts, needs=("targets", "atomics")),
    Pass(split_scans, needs=("targets",)),
    Pass(sum_few_rows, needs=("targets",)),
    Pass(accumulate, needs=("targets", "atomics")),
    Pass(unroll_recurrences, needs=("targets", "weight_copies")),
    Pass(decompose, needs=("targets",), takes=("targets",)),
    Pass(merge_steps),
    Pass(merge_linears, takes=("weight_copies",)),
    Pass(transpose_weights, needs=("targets",), takes=("weight_copies",)),
    Pass(pad_products, needs=("targets",)),
    Pass(channels_last, needs=("targets",)),
    Pass(write_in_place),
    Pass(move_numbers, needs=("targets",)),
    Pass(hoist_weights, takes=("targets",)),
    Pass(pack_weights, needs=("targets",), takes=("weight_copies",)),
    Pass(dce),
    Pass(fuse, needs=("targets",), takes=("targets", "atomics")),
    Pass(fuse_column_sums, needs=("targets",), takes=("targets",)),
    Pass(results_for_writes, needs=("targets",)),
    Pass(fuse_horizontally, needs=("targets",), takes=("targets",)),
    Pass(form_launches, needs=("targets",)),
    Pass(place_waits),
    Pass(reduce_in_place),
    Pass(finish, ensures="fused"),
)
PASSES = {step.name: step for step in PIPELINE}


@dataclass
class Report:
    """What the passes did: seconds and nodes left, per pass, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)


def lower(
    graph: Graph, settings: CompilationSettings, dump: Path | None = None, targets: tuple[Target, ...] = ()
) -> tuple[Graph, Report]:
    """Run the pipeline over a graph of level import.

    Args:
        targets: what kernels are formed for; none: no kernels are.
        dump: folder for `NN_pass.rtxir` after each pass and `NN_pass.diff` where it changed something.

    Returns:
        The graph of level fused, and the report.

    Raises:
        LoweringError: a pass failed, left a graph that does not verify, or changed the inputs or the types of the
            results; the message names it and the passes before it.
    """
    context = Context(settings, targets)
    infer, report = Inference(), Report()
    if any(map(is_control, graph.nodes)):
        # A body has no weights: its operands come from the graph around it.
        inner = replace(settings, disabled_passes=settings.disabled_passes | {hoist_weights.__name__})
        nodes = (lowered_control(node, lambda body: lower(body, inner, None, targets)[0]) for node in graph.nodes)
        graph = replace(graph, nodes=tuple(nodes))
    _write(dump, 0, "import", graph, None)
    for index, step in enumerate(PIPELINE, 1):
        name = step.name
        if name in settings.disabled_passes or not step.applies(context):
            continue
        start = time.perf_counter()
        try:
            after = step(graph, infer, context)
        except LoweringError as error:
            _write(dump, index, f"{name}.before", graph, None)
            raise _with_hint(error, name, report, dump) from error.__cause__
        report.seconds[name] = time.perf_counter() - start
        report.nodes[name] = len(after.nodes)
        log.debug("%s: %d -> %d nodes, %.1f ms", name, len(graph.nodes), len(after.nodes), 1e3 * report.seconds[name])
        _write(dump, index, name, after, graph)
        graph = after
    return graph, report


def quantized_floats(graph: Graph) -> list[tuple[Node, str]]:
    """The products of a graph of level import that have a quantized operand and that engines for a GPU compute with
    floats, each with the reason."""
    context, infer = Context(CompilationSettings()), Inference()
    for step in PIPELINE[: PIPELINE.index(PASSES[raise_quantized.__name__])]:
        graph = step(graph, infer, context, checked=False) if step.applies(context) else graph
    return kept_floats(graph, infer)


def _inputs(graph: Graph) -> str:
    return ", ".join(f"{value.name}: {value.type}" for value in graph.inputs) or "none"


def _result_types(graph: Graph) -> str:
    return ", ".join(str(value.type) for value in attr_values(graph.outputs)) or "none"


def _result_memory(graph: Graph) -> str:
    """In whose memory each result lies: an input's, a weight's, or that of the first result that lies in the same."""
    base, names = aten.bases(graph), [value.name for value in attr_values(graph.outputs)]
    owners = [base.get(name, name) for name in names]
    given = {value.name for value in graph.inputs} | {weight.value.name for weight in graph.weights}
    return ", ".join(name if name in given else f"result {owners.index(name)}" for name in owners) or "none"


def _message(error: Exception) -> str:
    return error.message if isinstance(error, RtxError) else str(error)


def _with_hint(error: LoweringError, name: str, report: Report, dump: Path | None) -> LoweringError:
    where = f"the graph before it is in {dump}" if dump else "set TORCH_RTX_DUMP=dir to get the graph before it"
    before = ", ".join(report.seconds) or "none"
    hint = f"passes before it: {before}; {where}; disabled_passes=[{name!r}] leaves it out"
    return LoweringError(error.message, loc=error.loc, hint=hint)


def _write(dump: Path | None, index: int, name: str, graph: Graph, before: Graph | None) -> None:
    if dump is None:
        return
    dump.mkdir(parents=True, exist_ok=True)
    text = str(graph)
    (dump / f"{index:02}_{name}.rtxir").write_text(text)
    if before is not None and before != graph:
        lines = difflib.unified_diff(str(before).splitlines(), text.splitlines(), "before", name, lineterm="")
        (dump / f"{index:02}_{name}.diff").write_text("\n".join(lines) + "\n")
