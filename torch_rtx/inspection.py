"""What is in an engine file, for people: `inspect`. Needs no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch_rtx import tactics
from torch_rtx.engine import calls, needs_trust, packs_by_binary, program_of
from torch_rtx.engine_header import DTYPES, names_of_sizes, parse_header, reading
from torch_rtx.files import Path
from torch_rtx.foreign import launch_of
from torch_rtx.ir import Loc, Node, TensorType, Value
from torch_rtx.machine import size_text as _size
from torch_rtx.manifest import Manifest
from torch_rtx.op_work import ANCHORS, PRODUCTS, SCALED_MM, scales_of
from torch_rtx.profiles import Shape, profiles_of, shapes, shapes_text
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import Arch, by_age, lacks


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of an engine: `dtype` as the IR names it, `shape`, size in bytes, and whether it is a constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    constant: bool

    def __str__(self) -> str:
        note = ", constant" if self.constant else ""
        return f"{self.name!r}: {self.dtype}{list(self.shape)}, {_size(self.nbytes)}{note}"


@dataclass(frozen=True)
class LayerInfo:
    """A matrix product, convolution or attention of an engine.

    Attributes:
        name: the path of its module, or else the line of the model, or its kernel.
        op: the ATen call.
        operands: the dtypes, as the IR names them, of what is multiplied: a weight that the kernel unpacks is "f16 from
            i8".
        result: the dtype of the result.
        emulated: the targets, oldest first, that have no instruction for these operands, so that their kernels multiply
            wider ones, with the same result.
    """

    name: str
    op: str
    operands: tuple[str, ...]
    result: str
    emulated: tuple[str, ...] = ()

    def __str__(self) -> str:
        note = f", emulated on {', '.join(self.emulated)}" if self.emulated else ""
        return f"{self.name}: {' x '.join(self.operands)} -> {self.result}{note}"


@dataclass(frozen=True)
class Inspection:
    """The contents of a file; `str()` is a summary.

    Attributes:
        kinds, ops: numbers of nodes by kind and op, most frequent first, without those in recipes and bodies.
        engine_bytes: the size of the file without weights.
        weight_bytes: the size of all weights, including those not in the file.
        kernels: for each target, the number of its kernels and the size of the tensors that have their binaries;
            targets may share these.
        needs_trust: the operators that the file may call only if `load` gets their names as `trusted_ops`.
        layers: in the order of the program.
        tactics: per target, for how many kernel nodes each kind of tactic is expected to be the fastest.
        drivers: per target, the CUDA version of the oldest driver that takes its code, where it is known.
        foreign: the kernels that others wrote, which the program launches: their names with digests, and how often. The
            file has no source of them: they run only as the binaries for the targets, or where their author's code is
            imported.
        profiles: for each optimization profile, the shape of each input: static sizes and ranges.
        sizes: by symbol of the program, the name of a size.
        inputs: the type of each input, with the names of sizes: "f32[batch, 64]".
    """

    manifest: Manifest
    kinds: Mapping[str, int]
    ops: Mapping[str, int]
    parameters: tuple[ParameterInfo, ...]
    engine_bytes: int
    weight_bytes: int
    graph_text: str
    kernels: Mapping[str, tuple[int, int]]
    tactics: Mapping[str, Mapping[str, int]]
    profiles: tuple[Mapping[str, Shape], ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    needs_trust: tuple[str, ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    drivers: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text()

    def text(self, limit: int | None = None, search: str = "") -> str:
        """The summary, with at most `limit` layers and parameters (None: all), those whose line has `search` in it."""
        manifest = self.manifest
        versions = manifest.producer.items()
        producer = ", ".join(f"{name} {version}" for name, version in versions if not name.startswith("ptxas for"))
        lines = [
            f"format {manifest.format_version}, built by {producer or 'unknown'}",
            f"float32 products {manifest.float32.products}, convolutions {manifest.float32.convolutions}",
            f"device {manifest.device}, platform {manifest.platform}, inputs {', '.join(manifest.inputs) or 'none'}",
            *(f"input {name}: {type_}" for name, type_ in self.inputs.items()),
            f"engine {_size(self.engine_bytes)}, weights {_size(self.weight_bytes)}"
            + (" (stripped: not in the file)" if manifest.stripped else ""),
            *(f"profile {number}: {shapes_text(profile)}" for number, profile in enumerate(self.profiles)),
            *(f"size {name}: {symbol} in the program" for symbol, name in self.sizes.items()),
            "nodes: " + (", ".join(f"{count} {kind}" for kind, count in self.kinds.items()) or "none"),
            *(f"  {count:>6} {op}" for op, count in self.ops.items()),
            *(f"needs trusted_ops={list(self.needs_trust)}" for _ in self.needs_trust[:1]),
            *(f"foreign kernel {name}, launched {count} times" for name, count in self.foreign.items()),
            "kernels: " + ("none" if not self.kernels else "compiled for (they run only with trust_binaries=True)"),
            *(
                f"  {target}: {count}, {_size(size)}; fastest by expectation: {_counts(self.tactics[target])}"
                + (f"; drivers of CUDA {self.drivers[target]} or later" if target in self.drivers else "")
                for target, (count, size) in self.kernels.items()
            ),
            *(listed("layers", self.layers, limit, search) if self.layers else ()),
            *listed("parameters", self.parameters, limit, search),
        ]
        return "\n".join(lines)


def listed(title: str, items: Sequence[object], limit: int | None = None, search: str = "") -> list[str]:
    """The number of items, and a line for each of the first `limit` ones (None: all) that have `search` in theirs."""
    found = [line for line in map(str, items) if search in line]
    more = [] if limit is None or len(found) <= limit else [f"  and {len(found) - limit} more"]
    head = f"{title}: {len(items)}" + (f", {len(found)} with {search!r}" if search else "")
    return [head, *(f"  {line}" for line in found[:limit]), *more]


def inspect(path: Path) -> Inspection:
    """Summarizes the contents of a file without reading its data. Needs no torch.

    Raises:
        EngineFormatError, EngineVersionError, OSError: as `load`, but the digest of the data is not checked.
    """
    with reading(path) as file:
        header = parse_header(file)
        graph, table = program_of(header)
        sizes = names_of_sizes(header.manifest.signature)
    parameters = tuple(
        ParameterInfo(p.name, p.type.dtype, shape, math.prod(shape) * DTYPES[p.type.dtype][1], p.constant)
        for p in graph.parameters
        for shape in [tuple(dim for dim in p.type.shape if isinstance(dim, int))]  # `_parsed` checked that all are
    )
    stored = sum(info.nbytes for key, info in header.tensors.items() if key.startswith("weight/"))
    return Inspection(
        header.manifest,
        dict(Counter(node.kind for node in graph.nodes).most_common()),
        dict(Counter(node.op for node in graph.nodes).most_common()),
        parameters,
        header.file_bytes - stored,
        sum(info.nbytes for info in parameters if not info.constant),
        header.graph_text,
        tactics.bytes_of(table, packs_by_binary(header), {key: info.nbytes for key, info in header.tensors.items()}),
        tactics.kinds_of(table),
        tuple(shapes(graph, profile) for profile in profiles_of(graph, header.manifest.profiles)),
        sizes,
        needs_trust(graph),
        tuple(_layers(graph.nodes, table)),
        {name: _named(value, sizes) for name, value in zip(header.manifest.inputs, graph.inputs, strict=False)},
        {str(t): f"{v[0]}.{v[1]}" for t, v in tactics.oldest_drivers(table, header.manifest.producer).items()},
        dict(Counter(launch.kernel for node in calls(graph) if (launch := launch_of(node)) is not None)),
    )


def _named(value: Value, sizes: Mapping[str, str]) -> str:
    """The type of an input, without its layout."""
    if not isinstance(value.type, TensorType):
        return str(value.type)
    dims = ", ".join(map(str, value.type.shape))
    return f"{value.type.dtype}[{re.sub(r'[a-z][0-9]+', lambda found: sizes.get(found[0], found[0]), dims)}]"


_FACTORS = {op: (names.first, names.second) for op, names in PRODUCTS.items()}
_FACTORS_OF = {
    "conv": ("input", "weight"),
    **dict.fromkeys(("attention", "attention_backward", "attention_flex"), ("query", "key", "value")),
}


def _layers(nodes: Sequence[Node], table: KernelTable, kernel: Node | None = None) -> Iterator[LayerInfo]:
    """The layers among `nodes`: those of a program, or those in the body of a kernel."""
    made = {value.name: node for node in nodes for value in node.results} if kernel is not None else {}
    for node in nodes:
        names = _FACTORS.get(node.op) or _FACTORS_OF.get(ANCHORS.get(node.op, ""), ())
        factors = [value for value in map(node.arg, names) if isinstance(value, Value)]
        if factors and node.results:
            outer = kernel or node
            operands = tuple(_operand(value, made) for value in factors)
            targets = by_age(table.tactics.get(outer.op, {}))
            emulated = tuple(str(target) for target in targets if _is_emulated(node, factors, target.arch))
            yield LayerInfo(_place(outer.loc) or outer.op, node.op, operands, _dtype(node.results[0]), emulated)
        elif node.body is not None:
            yield from _layers(node.body.nodes, table, kernel or node)


def _is_emulated(node: Node, factors: Sequence[Value], arch: Arch) -> bool:
    """See `LayerInfo.emulated`."""
    types = {name: attr.type for name, attr in node.args if isinstance(attr, Value)}
    if node.op == SCALED_MM and scales_of(types) == "by block":  # type: ignore[arg-type]
        return "block_scale" not in arch.features
    return any(lacks(arch, _dtype(value)) for value in factors)


def _operand(value: Value, made: Mapping[str, Node]) -> str:
    """The dtype of a factor, and that of the largest tensor in memory which the kernel makes it from."""
    stored, left = list[Value](), [value]
    while left:
        node = made.get((found := left.pop()).name)
        left += () if node is None else node.inputs
        stored += (found,) if node is None else ()
    largest = max(stored, key=_elements, default=value)
    return _dtype(value) if _dtype(largest) == _dtype(value) else f"{_dtype(value)} from {_dtype(largest)}"


def _elements(value: Value) -> int:
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    return math.prod(size for size in shape if isinstance(size, int))


def _dtype(value: Value) -> str:
    return value.type.dtype if isinstance(value.type, TensorType) else str(value.type)


def _place(loc: Loc | None) -> str:
    return "" if loc is None else loc.module or (f"{loc.file}:{loc.line}" if loc.file else "")


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
