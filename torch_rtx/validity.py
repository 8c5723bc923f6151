"""Whether an engine file is fit for a machine, by its header alone: `check_engine`. Needs no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import accumulate
from math import prod
from typing import Any

from torch_rtx.engine import program_of
from torch_rtx.engine_header import DTYPES, parse_header, reading
from torch_rtx.errors import EngineFormatError, EngineVersionError, SettingsError, Unsupported
from torch_rtx.files import Path
from torch_rtx.foreign import launch_in
from torch_rtx.ir import MAIN, Graph, TensorType, Type, attr_values, evaluate
from torch_rtx.machine import Machine, size_text, text_of, this_machine
from torch_rtx.manifest import Manifest
from torch_rtx.platforms import ANY
from torch_rtx.profiles import profiles_of
from torch_rtx.tactics import KernelTable, oldest_drivers, runnable_tactics
from torch_rtx.targets import Target, arch_of, by_age, sm_versions


class Validity(StrEnum):
    """How fit an engine is for a machine.

    VALID: it loads, and runs as it was built to. SUBOPTIMAL: it loads and its results are right, but it is slower than
    one that is built for this machine. INVALID: it does not load, or does not fit in the GPU's memory.
    """

    VALID = "VALID"
    SUBOPTIMAL = "SUBOPTIMAL"
    INVALID = "INVALID"


@dataclass(frozen=True)
class Reason:
    """One finding.

    Attributes:
        what: "format", "version", "platform", "gpu", "kernels", "driver", "packages" or "memory".
        validity: what an engine with this finding is at best; VALID for a remark.
        text: the finding, in one sentence.
        remedy: what to do; "": nothing.
    """

    what: str
    validity: Validity
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.text}" + f"\n  {self.remedy}" * bool(self.remedy)


@dataclass(frozen=True)
class EngineCheck:
    """The answer of `check_engine`; `str()` is a summary.

    Attributes:
        validity: the worst of the reasons.
        reasons: the findings, worst first.
        machine: what the engine was checked for.
    """

    validity: Validity
    reasons: tuple[Reason, ...]
    machine: Machine

    def __str__(self) -> str:
        return "\n".join([f"{self.validity} for {self.machine}", *map(str, self.reasons)])

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


def check_engine(path: Path, machine: Machine | str | int | None = None) -> EngineCheck:
    """Say whether an engine file is fit for a machine, and if not, why. Reads the header alone, and needs no torch.

    Args:
        machine: None: this one, whose CUDA driver is started for that. Or a GPU, as `targets` names one: "RTX 4090",
            "sm_89"; nothing else is then known of the machine. Or a `Machine`, such as `machine.this_machine(1)`, this
            one with its second GPU.

    Raises:
        SettingsError: there is no such GPU, or several have this name.
        OSError: the file can't be opened.
    """
    if machine is None:
        machine = this_machine()
    elif not isinstance(machine, Machine):
        machine = Machine(sm=_sm_of(machine))
    try:
        with reading(path) as file:
            header = parse_header(file)
            graph, table = program_of(header)
    except EngineFormatError as error:
        what = "version" if isinstance(error, EngineVersionError) else "format"
        found = [Reason(what, Validity.INVALID, error.message, error.hint or "")]
    else:
        found = list(_reasons(header.manifest, graph, table, machine))
    order = list(Validity)
    found.sort(key=lambda reason: -order.index(reason.validity))
    return EngineCheck(found[0].validity if found else Validity.VALID, tuple(found), machine)


def _sm_of(gpu: str | int) -> int:
    found = sm_versions(gpu)
    if len(found) > 1:
        names = ", ".join(f"sm_{sm}" for sm in found)
        raise SettingsError(f"{gpu!r} means GPUs of several SM versions: {names}", hint="name one of these")
    return found[0]


def _reasons(manifest: Manifest, graph: Graph, table: KernelTable, machine: Machine) -> Iterator[Reason]:
    if ANY not in (manifest.platform, machine.platform) and manifest.platform != machine.platform:
        text = f"the engine was built for {manifest.platform}, and this is {machine.platform}"
        remedy = f"build it for {machine.platform}, or for any platform"
        yield Reason("platform", Validity.INVALID, text, remedy)
    if manifest.device == "cpu":
        return
    if machine.sm is None:
        text = "the engine was built for cuda and runs on the CPU here" + f": {machine.why}" * bool(machine.why)
        yield Reason("gpu", Validity.SUBOPTIMAL, text)
        return
    try:
        arch_of(machine.sm)
    except Unsupported as error:
        yield Reason("gpu", Validity.INVALID, error.message)
        return
    yield from _kernels(manifest, graph, table, machine, machine.sm)
    yield from _memory(manifest, graph, machine)


def _kernels(manifest: Manifest, graph: Graph, table: KernelTable, machine: Machine, sm: int) -> Iterator[Reason]:
    ops = {node.op for node in graph.nodes if node.kind == "kernel"}
    if not ops:
        return
    launching = {node.op for node in graph.nodes if launch_in(node.body) is not None}
    lacking = sum(target is None for target in _chosen(table, launching, sm).values())
    if lacking:
        text = (
            f"{lacking} kernels that others wrote have no code that runs on sm_{sm}, and no operations stand for them"
        )
        yield Reason("kernels", Validity.INVALID, text, f'build it with targets that include "sm_{sm}"')
    if machine.bindings is False:
        remedy = "pip install cuda-bindings"
        yield Reason("packages", Validity.SUBOPTIMAL, "no kernel can be launched without cuda-bindings", remedy)
    remedy = f'build it with targets that include "sm_{sm}"'
    if machine.triton is None:
        without = "Triton compiles them there"
    elif machine.triton:
        without = "Triton compiles them in the background of the first calls"
    else:
        without, remedy = "operations run one by one", remedy + ", or install Triton"
    if not table:
        validity = Validity.SUBOPTIMAL if machine.triton is False else Validity.VALID
        yield Reason("kernels", validity, f"the file has none: {without}", remedy * (machine.triton is False))
        return
    own, wanted = arch_of(sm).target, _chosen(table, ops, sm)
    others = by_age({target for target in wanted.values() if target not in (None, own)})
    if others:
        text = f"there are none for sm_{sm}, so that those for {_listed(others)} run"
        yield Reason("kernels", Validity.SUBOPTIMAL, text, remedy)
    missing = sum(target is None for target in wanted.values())
    if missing:
        text = f"{missing} of {len(ops)} have no code that runs on sm_{sm}: {without}"
        yield Reason("kernels", Validity.SUBOPTIMAL, text, remedy)
    oldest = oldest_drivers(table, manifest.producer)
    refused = {target for target, version in oldest.items() if machine.driver is not None and machine.driver < version}
    left = _chosen(table, ops, sm, refused)
    lost = by_age({target for op, target in wanted.items() if target is not None and target != left[op]})
    if lost:
        needed = text_of(max(oldest[target] for target in lost))
        text = f"the driver refuses the kernels for {_listed(lost)}, which need one for CUDA {needed}"
        yield Reason("driver", Validity.SUBOPTIMAL, text, "update the driver")


def _chosen(
    table: KernelTable, ops: Iterable[str], sm: int, refused: Container[Target] = ()
) -> dict[str, Target | None]:
    """By kernel, the target whose code a GPU runs; None: there is no code that it can run.

    Args:
        refused: targets whose code the driver does not take.
    """
    found = {op: runnable_tactics(table.tactics.get(op, {}), sm, arch_of(sm).shared) for op in ops}
    return {
        op: next((target for tactic, target in runnable if not (tactic.kernels and target in refused)), None)
        for op, runnable in found.items()
    }


def _listed(targets: Iterable[Target]) -> str:
    return ", ".join(map(str, targets))


def _memory(manifest: Manifest, graph: Graph, machine: Machine) -> Iterator[Reason]:
    if machine.memory is None:
        return
    weights = sum(_bytes(weight.value.type, {}) for weight in graph.weights)
    bounds = {name: sym.min for name, sym in graph.syms.items()}
    profiles = profiles_of(graph, manifest.profiles) or ({},)
    smallest = [bounds | {name: span.min for name, span in profile.items()} for profile in profiles]
    typical = bounds | {name: span.opt or span.max or span.min for name, span in profiles[0].items()}
    for sizes, which, validity in (
        (smallest, "smallest", Validity.INVALID),
        ([typical], "typical", Validity.SUBOPTIMAL),
    ):
        call = min(_peak(graph, given) for given in sizes)
        if weights + call > machine.memory:
            of = f" of the {which} sizes" if bounds else ""
            needed = f"the weights take {size_text(weights)} and a call{of} {size_text(call)}"
            text = f"{needed}, which is more than the {size_text(machine.memory)} of the GPU"
            remedy = "set weight_streaming_budget" if call < machine.memory else "take a GPU with more memory"
            yield Reason("memory", validity, text, remedy)
            return


def _peak(graph: Graph, sizes: Mapping[str, int]) -> int:
    """The most bytes that are alive at once in a call: inputs, and values from their node to the last one that reads
    them. A view has the memory of what it is of."""
    owner: dict[str, str] = {}
    spans: dict[str, list[int]] = {}  # first node, last node, bytes
    for value in graph.inputs:
        owner[value.name] = value.name
        spans[value.name] = [0, len(graph.nodes), _bytes(value.type, sizes)]
    for position, node in enumerate(graph.nodes):
        sources = [owner[value.name] for value in node.inputs if value.name in owner]
        for name in sources:
            spans[name][1] = max(spans[name][1], position)
        for value in node.results:
            if node.kind != "view" and value.name not in node.updates:
                owner[value.name] = value.name
                spans[value.name] = [position, position, _bytes(value.type, sizes)]
            elif sources:  # others are of weights
                owner[value.name] = sources[0]
    for value in attr_values(graph.outputs):
        if value.name in owner:
            spans[owner[value.name]][1] = len(graph.nodes)
    changes = [0] * (len(graph.nodes) + 2)
    for first, last, size in spans.values():
        changes[first] += size
        changes[last + 1] -= size
    return max(accumulate(changes))


def _bytes(type_: Type, sizes: Mapping[str, int]) -> int:
    """Of a tensor on the device of the engine; 0 for everything else."""
    if not isinstance(type_, TensorType) or type_.device != MAIN:
        return 0
    return prod(evaluate(dim, sizes) or 0 for dim in type_.shape) * DTYPES[type_.dtype][1]
