"""Builds the kernels of a graph for its targets: the best configuration that fits each, and an account of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from torch_rtx.backend.compiler import Program
from torch_rtx.errors import InvalidIR, LoweringError
from torch_rtx.ir import Graph, Node, TensorType, kernel_nodes
from torch_rtx.kerneltable import KernelTable, Launch, Split, Variant, check, pack
from torch_rtx.lowering.kernels.aot import Built, Code, compile_kernels
from torch_rtx.lowering.kernels.generate import generate, library
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.split import split
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import LATER, Option, Target, by_age, is_explicit, parse_targets, usable

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)
Generate = Callable[[Node, Target, int], Kernel | None]
Divide = Callable[[Node, Target], Graph | None]
Choice = tuple[str, Target]  # the op of a kernel node, and a target
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class KernelReport:
    """A kernel as built for some targets: registers and bytes of spill stores per thread, bytes of shared memory of a
    block, bytes of its binaries as stored. `name` is that of its code."""

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
    """What a build of kernels made. `print` it, or read it.

    Attributes:
        missing: kernels that no target of a kind can run: op, target, and what was wrong with each configuration.
        nbytes: of all binaries, each counted once.
        seconds: the build took.
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
            lines.append(f"  {'kernel':{width}}  warps  registers  spills  shared  stored  targets")
            for kernel in self.kernels:
                lines.append(
                    f"  {kernel.op:{width}}  {kernel.num_warps:>5}  {kernel.registers:>9}  {kernel.spills:>6}  "
                    f"{kernel.shared:>6}  {kernel.nbytes:>6}  {', '.join(map(str, kernel.targets))}"
                )
        lines += [f"  {op} runs call by call on {target}: {reason}" for op, target, reason in self.missing]
        return "\n".join(lines)


def kernels_of(program: Program, settings: CompilationSettings) -> KernelTable:
    """The kernels of a program, built for `settings.targets`; the report goes to the log, and to its dumped artefacts.

    Raises:
        SettingsError, KernelError, LoweringError: see `targets_for` and `build_kernels`.
    """
    if settings.targets in (None, LATER) or all(node.kind != "kernel" for node in program.graph.nodes):
        return KernelTable()
    assert settings.targets is not None
    targets = targets_for(settings.targets, program.graph)
    with progress_bar() as progress:
        table, report = build_kernels(program.graph, targets, _generate, _library, _split, progress)
    log.info("%s", report)
    program.dump("kernels.txt", str(report))
    return table


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[int, int], object]]:
    """What to call with how many binaries are built, and how many there are: a bar, if the console (None: that of
    errors) is a terminal."""
    from rich.console import Console  # these take a tenth of a second, which only builds of kernels have to spend
    from rich.progress import Progress

    console = console or Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("building kernels", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _generate(node: Node, target: Target, which: int) -> Kernel | None:
    assert node.body is not None
    return generate(node.body, node.op, target.arch.sm, which)


def _library(node: Node, target: Target) -> str:
    assert node.body is not None
    return library(node.body, target.arch.sm)


def _split(node: Node, target: Target) -> Graph | None:
    assert node.body is not None
    return split(node.body, node.op, target.arch.sm)


def targets_for(option: Option, graph: Graph) -> tuple[Target, ...]:
    """The targets that the option `targets` means for `graph`; the log names those that lack a dtype of its kernels.

    Raises:
        SettingsError: an unknown target; "current" without a GPU; an explicit target, or every one, lacks a dtype.
    """
    targets = named_targets(option)
    kept = usable(targets, _dtypes(graph), is_explicit(option))
    for target in targets:
        if target not in kept:
            log.warning("the engine has no kernels for %s, which lacks a dtype of the model", target)
    if not is_explicit(option):
        log.info('the portable targets leave out RTX 20 and T4 (sm_75): targets=["portable", "sm_75"] adds them')
    return kept


def named_targets(option: Option) -> tuple[Target, ...]:
    """The targets that the option `targets` names on this machine.

    Raises:
        SettingsError: an unknown target, or "current" without a GPU.
    """
    return parse_targets(option, torch.cuda.get_device_capability() if torch.cuda.is_available() else None)


def _dtypes(graph: Graph) -> Iterator[tuple[str, str]]:
    """Op and dtype of everything that kernels read, compute and write."""
    for node in kernel_nodes(graph):
        for inner in node.body.nodes if node.body is not None else ():
            for value in (*inner.inputs, *inner.outputs):
                if value is not None and isinstance(value.type, TensorType):
                    yield inner.op, value.type.dtype


def build_kernels(
    graph: Graph,
    targets: Iterable[Target],
    generate: Generate,
    library: Callable[[Node, Target], str] = lambda node, target: "none",
    divide: Divide = lambda node, target: None,
    progress: Progress | None = None,
) -> tuple[KernelTable, BuildReport]:
    """Build every kernel node of `graph` for every target.

    Args:
        generate: the source of a node for a target in its n-th best configuration, from 0; None where there are no
            more. Called once per op: nodes of one op have equal bodies. The first that fits is taken. Where only
            spilling ones do, it is the one that spills least.
        library: the field of this name of a node's `Launch` for a target.
        divide: the split body of a node for a target; None where there is none. It is left out where one of its kernels
            does not fit the target.
        progress: see `compile_kernels`; starts again with each round of configurations.

    Raises:
        KernelError: see `compile_kernels`.
        LoweringError: two kernels have one name, or a kernel takes something else than tensors of the session's device.
    """
    start = time.perf_counter()
    nodes = {node.op: node for node in reversed(list(kernel_nodes(graph)))}
    wanted = {(op, target): nodes[op] for op in sorted(nodes) for target in by_age(set(targets))}
    bodies = {(op, target): divide(node, target) for (op, target), node in wanted.items()}
    splits = {choice: body for choice, body in bodies.items() if body is not None}
    chosen, reasons = _fitting(wanted | _inside(splits), generate, progress)

    def fits(choice: Choice) -> bool:
        return choice in chosen and chosen[choice][1].problem is None

    splits = {
        choice: body for choice, body in splits.items() if fits(choice) and all(map(fits, _inside({choice: body})))
    }
    kept = wanted | _inside(splits)
    chosen = {choice: found for choice, found in chosen.items() if choice in kept}
    rivals = {choice: library(wanted[choice], choice[1]) if choice in wanted else "none" for choice in chosen}
    table, reports = _table(chosen, rivals)
    table = replace(table, splits=_shared(splits))
    try:
        check(table, graph)
    except InvalidIR as error:
        raise LoweringError(f"the kernels do not fit the graph: {error}") from error
    missing = tuple((*choice, "; ".join(reasons[choice]) or "no code") for choice in wanted if choice not in chosen)
    nbytes = sum(map(len, table.binaries.values()))
    return table, BuildReport(reports, missing, nbytes, time.perf_counter() - start)


def _fitting(
    wanted: Mapping[Choice, Node], generate: Generate, progress: Progress | None
) -> tuple[dict[Choice, tuple[Kernel, Built]], dict[Choice, list[str]]]:
    """The best configuration that fits, of each node that has one for its target; and why others do not fit."""
    chosen: dict[Choice, tuple[Kernel, Built]] = {}
    reasons: dict[Choice, list[str]] = {choice: [] for choice in wanted}
    pending = list(wanted)
    config = 0
    while pending:
        made = {choice: generate(wanted[choice], choice[1], config) for choice in pending}
        kernels = {choice: kernel for choice, kernel in made.items() if kernel is not None}
        built = compile_kernels(((kernel, choice[1]) for choice, kernel in kernels.items()), progress=progress)
        for choice, kernel in kernels.items():
            found = built[kernel, choice[1]]
            if found.problem is not None:
                reasons[choice].append(found.problem)
                log.debug("%s does not fit %s: %s", kernel.name, choice[1], found.problem)
            if found.codes and (choice not in chosen or found.spills < chosen[choice][1].spills):
                chosen[choice] = kernel, found
        pending = [choice for choice in kernels if choice not in chosen or chosen[choice][1].problem is not None]
        config += 1
    return chosen, reasons


def _inside(splits: Mapping[Choice, Graph]) -> dict[Choice, Node]:
    """The kernels of split bodies, each with the target that it is for."""
    return {(node.op, target): node for (_, target), body in splits.items() for node in kernel_nodes(body)}


def _shared(splits: Mapping[Choice, Graph]) -> dict[str, tuple[Split, ...]]:
    """Split bodies by op; targets that have the same one share it."""
    found: dict[str, dict[Graph, list[Target]]] = {}
    for (op, target), body in splits.items():
        found.setdefault(op, {}).setdefault(body, []).append(target)
    return {op: tuple(Split(tuple(some), body) for body, some in bodies.items()) for op, bodies in found.items()}


def _table(
    chosen: dict[Choice, tuple[Kernel, Built]], rivals: dict[Choice, str]
) -> tuple[KernelTable, tuple[KernelReport, ...]]:
    """The table of the chosen kernels; targets that run the same binaries in the same way share a launch."""
    binaries: dict[str, bytes] = {}
    packed: dict[bytes, str] = {}

    def variant(code: Code, ptx: bool) -> Variant:
        binary = code.ptx if ptx else code.cubin
        if binary not in packed:
            packed[binary], stored = pack(binary)
            binaries[packed[binary]] = stored
        return code.variant(packed[binary])

    shared: dict[str, dict[tuple[Kernel, Variant, Variant | None, str], list[Target]]] = {}
    for (op, target), (kernel, built) in chosen.items():
        assert built.aligned is not None  # what was not compiled is not chosen
        generic = None if built.generic is None else variant(built.generic, target.ptx)
        key = kernel, variant(built.aligned, target.ptx), generic, rivals[op, target]
        shared.setdefault(op, {}).setdefault(key, []).append(target)
    launches: dict[str, tuple[Launch, ...]] = {}
    reports = []
    for op, found in shared.items():
        launches[op] = tuple(
            Launch(tuple(targets), kernel.scalars, kernel.grid, kernel.wide, aligned, generic, rival)
            for (kernel, aligned, generic, rival), targets in found.items()
        )
        reports += [
            _report(op, kernel.name, launch, binaries) for (kernel, *_), launch in zip(found, launches[op], strict=True)
        ]
    return KernelTable(launches, binaries), tuple(reports)


def _report(op: str, name: str, launch: Launch, binaries: dict[str, bytes]) -> KernelReport:
    worst = launch.variants
    return KernelReport(
        op,
        name,
        launch.targets,
        max(variant.num_warps for variant in worst),
        max(variant.registers for variant in worst),
        max(variant.spills for variant in worst),
        max(variant.shared for variant in worst),
        sum(len(binaries[digest]) for digest in {variant.binary for variant in worst}),
    )
