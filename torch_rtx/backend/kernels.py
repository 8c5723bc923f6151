"""Builds the kernels of a graph ahead of time, with the best configuration that fits each target, and reports them."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from torch_rtx.artefacts import NO_FILES, Artefacts
from torch_rtx.backend.compiler import Program, named_targets
from torch_rtx.errors import InvalidIR, KernelError, LoweringError, Unsupported
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Graph, Node, TensorType, kernel_nodes
from torch_rtx.lowering.kernels.build import Binaries, Progress, Result, Wanted, build, show_offers, show_results
from torch_rtx.lowering.kernels.generate import Form, forms
from torch_rtx.progress import progress
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import OWN, KernelTable, Launch, Tactics, check, fastest_first
from torch_rtx.targets import LATER, Option, Target, by_age, is_explicit, usable

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
Forms = Callable[[Node, Target], list[Form]]
Slot = tuple[str, Target]  # of the table: the op of a kernel node, and a target


@dataclass(frozen=True)
class KernelReport:
    """One kernel that was built.

    Attributes:
        name: of its function in Triton.
        targets: those that share its binaries.
        registers, spills: registers, and bytes of spill stores, per thread.
        shared: bytes of shared memory per block.
        nbytes: of its binaries, before a file compresses them.
    """

    op: str
    name: str
    targets: tuple[Target, ...]
    num_warps: int
    registers: int
    spills: int
    shared: int
    nbytes: int


@dataclass(frozen=True)
class BuildReport:
    """The result of a build; `print` it, or read the fields.

    Attributes:
        missing: kernels without a binary: op, target, and the problem of each configuration.
        nbytes: of all binaries, each counted once.
        seconds: duration of the build.
    """

    kernels: tuple[KernelReport, ...]
    missing: tuple[tuple[str, Target, str], ...]
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        ops = len({kernel.op for kernel in self.kernels})
        lines = [f"{ops} kernel{'s' * (ops != 1)}, {self.nbytes / 1024:.1f} KiB of binaries, {self.seconds:.1f} s"]
        if self.kernels:
            width = max(len(kernel.op) for kernel in self.kernels)
            lines.append(f"  {'kernel':{width}}  warps  registers  spills  shared   bytes  targets")
            for kernel in self.kernels:
                lines.append(
                    f"  {kernel.op:{width}}  {kernel.num_warps:>5}  {kernel.registers:>9}  {kernel.spills:>6}  "
                    f"{kernel.shared:>6}  {kernel.nbytes:>6}  {', '.join(map(str, kernel.targets))}"
                )
        lines += [f"  {op} runs call by call on {target}: {reason}" for op, target, reason in self.missing]
        return "\n".join(lines)


def kernels_of(program: Program, settings: CompilationSettings) -> KernelTable:
    """Build the kernels of a program for `settings.targets`; the report goes to the log and to the dump.

    Raises:
        SettingsError, KernelError, LoweringError: see `targets_for` and `build_kernels`.
    """
    if settings.targets in (None, LATER) or all(node.kind != "kernel" for node in program.graph.nodes):
        return KernelTable()
    assert settings.targets is not None
    found = targets_for(settings.targets, program.graph, program.device)
    targets = [replace(target, float32=program.float32) for target in found]
    with progress("building kernels") as update:
        artefacts = Artefacts.at(program.folder, settings.override_dir)
        table, report = build_kernels(program.graph, targets, progress=update, artefacts=artefacts)
    log.info("%s", report)
    program.dump("kernels.txt", str(report))
    _check_foreign(program.graph, table, report, is_explicit(settings.targets))
    return table


def _check_foreign(graph: Graph, table: KernelTable, report: BuildReport, explicit: bool) -> None:
    """Kernels that others wrote have no calls to fall back on.

    Raises:
        KernelError: one has no code for a target that was named, or for any.
    """
    nodes = {node.op: node for node in kernel_nodes(graph) if launch_in(node.body) is not None}
    for op, target, problem in report.missing:
        if op not in nodes:
            continue
        if explicit or op not in table.tactics:
            hint = "change the kernel, or leave this target out: targets=[...]"
            raise KernelError(f"the kernel {op} has no code for {target}: {problem}", loc=nodes[op].loc, hint=hint)
        log.warning("the engine does not run on %s: the kernel %s has no code for it: %s", target, op, problem)


def targets_for(option: Option, graph: Graph, device: torch.device) -> tuple[Target, ...]:
    """The targets that the option `targets` selects for `graph` on `device`, without those that lack a dtype of its
    kernels.

    Raises:
        SettingsError: an unknown target; "current" without a GPU; an explicit target, or every one, lacks a dtype.
    """
    targets = named_targets(option, device)
    kept = usable(targets, _dtypes(graph), is_explicit(option))
    for target in targets:
        if target not in kept:
            log.warning("the engine has no kernels for %s, which lacks a dtype of the model", target)
    if not is_explicit(option):
        log.info('the portable targets leave out RTX 20 and T4 (sm_75): targets=["portable", "sm_75"] adds them')
    return kept


def _dtypes(graph: Graph) -> Iterator[tuple[str, str]]:
    """Op and dtype of every tensor in the kernels."""
    for node in kernel_nodes(graph):
        for inner in node.body.nodes if node.body is not None else ():
            for value in (*inner.inputs, *inner.outputs):
                if value is not None and isinstance(value.type, TensorType):
                    yield inner.op, value.type.dtype


def generated(node: Node, target: Target) -> list[Form]:
    """The forms of a kernel node on a target; none if no code can be generated."""
    assert node.body is not None
    try:
        return forms(node.body, node.op, target.arch)
    except Unsupported:
        return []


def build_kernels(
    graph: Graph,
    targets: Iterable[Target],
    forms: Forms = generated,
    progress: Progress | None = None,
    artefacts: Artefacts = NO_FILES,
) -> tuple[KernelTable, BuildReport]:
    """Build every kernel node of `graph` for every target: the tactics that may be the fastest, each in its first
    configuration that fits.

    Args:
        forms: see `generate.forms`; called once per op and target, since nodes of one op have equal bodies.
        progress, artefacts: see `kernels.build.build`.

    Raises:
        KernelError: see `compile_kernels`.
        LoweringError: two kernels have one name, or a kernel takes something else than tensors of the session's device.
    """
    start = time.perf_counter()
    nodes = {node.op: node for node in reversed(list(kernel_nodes(graph)))}
    targets = by_age(set(targets))  # so that kernels begin with the oldest, see `Compilations.begin`
    offers, rejected = dict[Slot, list[Form]](), dict[Slot, str]()

    def wanted() -> Iterator[Wanted[tuple[Slot, int]]]:
        for slot in itertools.product(sorted(nodes), targets):
            op, target = slot
            try:
                offers[slot] = _may_be_fastest(forms(nodes[op], target))
            except KernelError as error:  # Triton rejects a kernel that others wrote
                offers[slot], rejected[slot] = [], error.message
            for which, (head, rest) in enumerate(offers[slot]):
                yield (slot, which), enumerate(chain((head,), rest)), target

    found: Iterable[Wanted[tuple[Slot, int]]] = wanted()
    if artefacts.dump is not None:
        found = list(found)
        for op, target in itertools.product(reversed(nodes), targets):
            if (op, target) not in rejected:
                _show(nodes[op], target, forms(nodes[op], target), artefacts)
    chosen, tried = build(found, progress, artefacts)
    for ((op, target), _), results in tried.items():
        show_results(artefacts, op, target, results)
    built: dict[Slot, list[Result]] = {}
    missing = []
    for slot, heads in offers.items():
        keys = [(slot, which) for which in range(len(heads))]
        built[slot] = _fitting([chosen[key] for key in keys if key in chosen])
        if not built[slot]:
            problems = [result.problem for key in keys for result in tried[key] if result.problem]
            missing.append((*slot, "; ".join(problems) or rejected.get(slot, "no code")))
    table, reports = _table(built)
    try:
        check(table, graph)
    except InvalidIR as error:
        raise LoweringError(f"the kernels do not fit the graph: {error}") from error
    nbytes = sum(map(len, table.binaries.values()))
    return table, BuildReport(reports, tuple(missing), nbytes, time.perf_counter() - start)


def _fitting(results: list[Result]) -> list[Result]:
    """The tactics for the table: those that fit, and if none of them launches a kernel, also those that spill too much;
    none if no tactic launches a kernel."""
    fitting = [result for result in results if result.problem is None]
    if not any(result.built for result in fitting):
        fitting += [result for result in results if result.problem is not None]
    return fitting if any(result.built for result in fitting) else []


def _table(built: Mapping[Slot, list[Result]]) -> tuple[KernelTable, tuple[KernelReport, ...]]:
    """The table, and the reports; targets with equal binaries share a report."""
    binaries = Binaries()
    table: dict[str, dict[Target, Tactics]] = {}
    rows: dict[tuple[str, str, Launch], list[Target]] = {}
    for (op, target), results in built.items():
        tactics = [binaries.tactic(result) for result in results]
        if tactics:
            table.setdefault(op, {})[target] = fastest_first(tactics)
        for result, tactic in zip(results, tactics, strict=True):
            for inner, launch in tactic.kernels.items():
                row = op if inner == OWN else inner, result.tactic.kernels[inner].name, launch
                rows.setdefault(row, []).append(target)
    made = KernelTable(table, binaries.stored)
    return made, tuple(_report(*row, targets, made) for row, targets in rows.items())


def _show(node: Node, target: Target, found: list[Form], artefacts: Artefacts) -> None:
    """Write the ranking of a kernel node: its forms, each ranked on its own."""
    assert node.body is not None
    offers = chain.from_iterable(enumerate(chain((head,), rest)) for head, rest in found)
    show_offers(artefacts, node.op, node.body, target, offers)


def _may_be_fastest(found: list[Form]) -> list[Form]:
    """The forms for an engine: the node's own kernel, those expected to be faster, and those without binaries."""
    own_us = min((head.expected_us for head, _ in found if head.body is None and head.kernels), default=math.inf)
    return [form for form in found if not form[0].kernels or form[0].expected_us <= own_us]


def _report(op: str, name: str, launch: Launch, targets: Sequence[Target], table: KernelTable) -> KernelReport:
    variants = launch.variants
    return KernelReport(
        op,
        name,
        tuple(targets),
        max(variant.num_warps for variant in variants),
        max(variant.registers for variant in variants),
        max(variant.spills for variant in variants),
        max(variant.shared for variant in variants),
        sum(len(table.binaries[digest]) for digest in {variant.binary for variant in variants}),
    )
