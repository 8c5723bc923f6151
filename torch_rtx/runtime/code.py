"""Generates the Python code of a graph: one flat function of ATen calls and kernel launches.

The function binds symbols from the shapes of the inputs, makes each call in order, and drops every value after its last
use. Outputs and the inputs of fallback operators get the strides of the capture, whatever strides a library call chose.
Kernels pass each other addresses in an arena (`runtime.plan`); values in it become tensors only if a call needs them.
"""

from __future__ import annotations

import linecache
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torch_rtx import aten
from torch_rtx.accumulation import continued
from torch_rtx.collectives import is_collective, waited
from torch_rtx.control import all_syms, branches, check, is_control
from torch_rtx.errors import InvalidIR
from torch_rtx.functional import FUNCTIONAL, copied, plain
from torch_rtx.ir import (
    COPY,
    SCAN,
    Attr,
    Dim,
    Expr,
    Graph,
    Node,
    ScalarType,
    Sym,
    TensorType,
    Value,
    attr_values,
    dim_syms,
    type_dims,
)
from torch_rtx.optable import NUMBERS
from torch_rtx.runtime.check import in_range, needs, stated
from torch_rtx.runtime.control import Owned, Runner, runner
from torch_rtx.runtime.convolve import CONVOLUTION, convolve
from torch_rtx.runtime.inline import in_place, inline_kernels, launched
from torch_rtx.runtime.launch import Launcher, LoadedTactic
from torch_rtx.runtime.overwriting import overwritten
from torch_rtx.runtime.plan import Plan, Room
from torch_rtx.runtime.streaming import Lines, Streamer
from torch_rtx.runtime.strided import aligned, are_apart, copy_all, copy_together, restride, target_of


@dataclass(frozen=True, eq=False)
class Code:
    """The code of a graph; call it, or `run`, with inputs and weights.

    Attributes:
        run: `run(inputs, weights)` returns the outputs. A third argument allocates what kernels write beside the arena,
            as a function in `EMPTY`. With a room, a fourth is its memory, as bytes, and a fifth allocates outputs that
            library calls write.
        source: its text.
        plan: its memory.
        graph, tactics: the graph, and the tactics of its kernel nodes by `op`.
    """

    run: Runner
    source: str
    plan: Plan
    graph: Graph
    tactics: Mapping[str, LoadedTactic]

    def __call__(self, inputs: Sequence[Any], weights: Sequence[torch.Tensor]) -> list[Any]:
        """The outputs."""
        return self.run(inputs, weights)


# `torch.empty_strided` on the current device, without the cost of argument parsing; Inductor's code calls the same.
EMPTY: dict[str, Callable[..., torch.Tensor]] = {
    "cpu": torch._C._dynamo.guards._empty_strided_cpu,  # type: ignore[attr-defined]
    "cuda": torch._C._dynamo.guards._empty_strided_cuda,  # type: ignore[attr-defined]
}
# A tensor in the memory of another one of its dtype, equally fast.
PLACED: Callable[..., torch.Tensor] = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
# A library call may return other strides than in the capture, so a view of its result may have to copy.
RELAXED = dict.fromkeys(("aten.view.default", "aten._unsafe_view.default"), torch.ops.aten.reshape.default)

# The model's own checks of sizes, and what these need.
CHECKS = NUMBERS | {"aten._assert_scalar.default", "aten.sym_size.int"}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """The state in which the code of a graph runs: no gradients, no autocast, since the capture resolved casts, and
    `device` as the current device."""
    kind = device.type
    autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    elsewhere = kind == "cuda" and torch._C._cuda_getDevice() != device.index
    with torch.no_grad(), autocast, torch.cuda.device(device) if elsewhere else nullcontext():
        yield


def compile_graph(
    graph: Graph,
    device: torch.device,
    callables: Sequence[Callable[..., Any]] = (),
    trusted_ops: frozenset[str] = frozenset(),
    name: str = "graph",
    tactics: Mapping[str, LoadedTactic] | None = None,
    probe: Callable[[], None] | None = None,
    streamer: Streamer | None = None,
    distinct: bool = False,
    guarded: bool = True,
    stay: frozenset[str] = frozenset(),
    room: Room | None = None,
) -> Code:
    """Compile `graph` to a function `(inputs, weights) -> outputs`.

    Args:
        device: the device that MAIN stands for.
        callables: the functions of `python` fallback nodes, by index.
        trusted_ops: operators outside the allow-list that fallback nodes may name.
        tactics: of kernel nodes, by op; their device must be the current one during a call.
        probe: called before the first node and after each node; for measuring.
        streamer: brings weights to the device; the function must then be called in a turn of it.
        distinct: what the graph writes to overlaps none of the other inputs, so that kernels may write there.
        guarded: nor do the inputs that it writes to overlap each other or weights. Otherwise the code compares them.
        stay, room: see `Plan`.

    Raises:
        InvalidIR: an op does not exist in this process, or no input determines a dim.
    """
    tactics = tactics or {}
    given = device, callables, trusted_ops, tactics, probe
    writer = _Writer(inline_kernels(graph, tactics), *given, stay=stay, room=room)
    if streamer is not None:
        writer.names["_stream"], writer.streaming = streamer, streamer.lines(graph, in_place(graph, tactics))
    writer.targets, writer.guarded = overwritten(writer.graph, trusted_ops) if distinct else {}, guarded
    source = writer.write()
    file = f"<torch_rtx {name} {id(writer.names):x}>"  # unique while the function lives
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # tracebacks show the generated line
    exec(compile(source, file, "exec"), writer.names)
    run: Runner = writer.names.pop("run")  # no cycle: what the code holds is freed with it, such as streamed weights
    weakref.finalize(run, linecache.cache.pop, file, None)
    return Code(run, source, writer.plan, graph, tactics)


@dataclass
class _Writer:
    graph: Graph
    device: torch.device
    callables: Sequence[Callable[..., Any]]
    trusted_ops: frozenset[str]
    tactics: Mapping[str, LoadedTactic]
    probe: Callable[[], None] | None = None
    streaming: Lines = ((), {}, {})
    stay: frozenset[str] = frozenset()
    room: Room | None = None
    lines: list[str] = field(default_factory=list)
    bound: set[str] = field(default_factory=set)  # symbols that have a value by now
    names: dict[str, Any] = field(default_factory=dict)  # the globals of the generated function
    written: set[str] = field(default_factory=set)  # values that kernels write
    tensors: set[str] = field(default_factory=set)  # values in the arena that have become tensors by now
    targets: dict[str, Value] = field(default_factory=dict)  # results that kernels write over inputs and weights
    guarded: bool = True
    begun: dict[str, Value] = field(default_factory=dict)  # what results of kernels start from, of which none is copied
    shared: set[str] = field(default_factory=set)  # values in whose memory several results lie
    inputs: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)  # results of collectives, which nothing may copy before the wait
    kernels: dict[str, Launcher] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)  # of sizes, to come after the model's own

    def write(self) -> str:
        # Names of the code itself begin with `_`, those of values never do.
        self.kernels = launched(self.tactics)
        self.names |= {"_restride": restride, "_copy_together": copy_together, "inf": math.inf, "nan": math.nan}
        graph = self.graph
        self.inputs = {value.name for value in graph.inputs}
        for source, values in (("_inputs", graph.inputs), ("_weights", [w.value for w in graph.weights])):
            if values:
                self.lines.append(f"{', '.join(v.name for v in values)}, = {source}")
        if graph.inputs:
            self.lines.append(f"if type(_inputs) is {self.name_of('owned', Owned)}: _inputs.clear()")
        self.bind(graph.inputs)
        self.compare()
        known, elsewhere = frozenset(self.bound), frozenset(self.targets)
        cudnn = self.device.type == "cuda"
        self.plan = Plan(graph, self.trusted_ops, known, elsewhere, self.stay, self.room, cudnn)
        self.offsets = self.arena() | {name: ("_room", offset) for name, offset in self.plan.placed.items()}
        self.lines += ["_room_base = _room.data_ptr()"] * bool(self.plan.placed)
        for node in graph.nodes:
            places = continued(node)
            self.begun |= places
            self.offsets |= {n: self.offsets[v.name] for n, v in places.items() if v.name in self.offsets}
        self.shared = aten.shared(graph, self.trusted_ops)
        first, before, after = self.streaming
        self.lines += first
        last = self.last_uses()
        probe = [] if self.probe is None else [f"{self.name_of('probe', self.probe)}()"]
        self.lines += probe
        runs = {} if probe or before or after else _runs_of_copies(graph, self.trusted_ops)
        for index, node in enumerate(graph.nodes):
            self.lines += before.get(index, ())
            if index in runs:
                self.copies(runs[index])
            else:
                self.node(node)
            drops = [name for name in last[index] if name not in self.offsets]
            if drops:
                self.lines.append(f"del {', '.join(drops)}")
            self.lines += after.get(index, ())
            self.lines += probe
        self.lines += self.checks
        for value in attr_values(graph.outputs):
            self.materialize(value)
        kept = self.kept()
        copied = [value.name for value in dict.fromkeys(attr_values(graph.outputs)) if value.name in kept]
        if copied:  # one copy per value: a value returned twice stays one object
            self.lines.append(f"{', '.join(copied)}, = _copy_together([{', '.join(copied)}])")
        self.lines.append(f"return [{', '.join(self.output(attr) for attr in graph.outputs)}]")
        empty = self.name_of("empty", EMPTY[self.device.type])
        return f"def run(_inputs, _weights, _new={empty}, _room=None, _keep={empty}):\n" + "".join(
            f"    {line}\n" for line in self.lines
        )

    def compare(self) -> None:
        """Write `_free`, whether what is written over shares its memory with nothing else that is written or a weight,
        unless guards say so."""
        weights = [weight.value.name for weight in self.graph.weights]
        targets = [value.name for value in self.targets.values()]
        self.guarded = self.guarded and set(targets).isdisjoint(weights)
        if targets and not self.guarded:
            written = sorted(self.graph.written)
            lists = (f"[{', '.join(names)}]" for names in (written, [one for one in weights if one not in written]))
            self.lines.append(f"_free = {self.name_of('apart', are_apart)}({', '.join(lists)})")

    def arena(self) -> dict[str, tuple[str, int | str]]:
        """Write the allocation of the arena; returns the place of each value in it: the name of the arena, and the
        offset as a number or code."""
        plan = self.plan
        if not plan.buffers:
            return {}
        offsets: dict[str, tuple[str, int | str]]
        if plan.symbols:
            self.lines.append(f"_at = {self.name_of('offsets', plan.offsets)}({', '.join(plan.symbols)})")
            total, offsets = "_at[0]", {n: ("_arena", f"_at[{i + 1}]") for n, i in plan.index.items()}
        else:
            numbers = plan.offsets()
            total, offsets = str(numbers[0]), {n: ("_arena", numbers[i + 1]) for n, i in plan.index.items()}
        empty = self.name_of("empty", EMPTY[self.device.type])
        self.lines.append(f"_arena = {empty}(({total},), (1,), {self.name_of('torch.uint8', torch.uint8)})")
        self.lines.append("_arena_base = _arena.data_ptr()")
        return offsets

    def kept(self) -> set[str]:
        """The values in memory that the engine keeps: constants, results of recipes, and views of these.

        The caller may write to a result, so it gets a copy of such a value. Views of parameters are not copied: they
        alias the parameter in the original model, too.
        """
        constants = {p.name for p in self.graph.parameters if p.constant}
        kept = {
            weight.value.name
            for weight in self.graph.weights
            if not weight.names
            or not constants.isdisjoint(weight.names)
            or (weight.recipe is not None and not all(aten.is_view(aten.overload(n.op)) for n in weight.recipe.nodes))
        }
        for node in self.graph.nodes:
            if aten.may_alias(node, self.trusted_ops) and any(value.name in kept for value in aten.aliased(node)):
                kept.update(value.name for value in node.outputs if value is not None)
        return kept

    def last_uses(self) -> list[list[str]]:
        """Per node, the values to drop after it, inputs and weights included: the caller may hold those longer."""
        seen = {value.name for value in attr_values(self.graph.outputs)}
        drops: list[list[str]] = []
        for node in reversed(self.graph.nodes):
            names = dict.fromkeys(v.name for v in (*node.outputs, *node.inputs) if v is not None)
            drops.append([name for name in names if name not in seen])
            seen.update(names)
        return drops[::-1]

    def bind(self, values: Sequence[Value | None], decided: bool = False) -> None:
        """Write assignments of the symbols that the types of `values` determine.

        Args:
            decided: nothing has compared these values with their types yet: write checks, too.
        """
        sources = [pair for value in values for pair in _dim_sources(value)]
        for source, dim in sorted(sources, key=lambda pair: needs(pair[1])):
            if decided:
                size, source = source, f"_size{len(self.lines)}"
                self.lines.append(f"{source} = {size}")
                self.checks.append(f"{self.name_of('stated', stated)}({source}, {dim})")
            for sym, text in solve(dim, source, self.bound):
                self.bound.add(sym.name)
                self.lines.append(f"{sym} = {text}")
                if decided:
                    limits = f"({sym.name}, {sym.min}, {sym.max}, {sym.multiple})"
                    self.checks.append(f"{self.name_of('in_range', in_range)}{limits}")
            self.check_bound(dim)

    def node(self, node: Node) -> None:
        if node.op not in CHECKS:
            self.lines += self.checks
            self.checks = []
        if node.kind == "kernel":
            self.launch(node)
            return
        for value in node.inputs:
            self.materialize(value)
        if is_control(node):
            self.control(node)
            return
        if node.op == FUNCTIONAL:
            copies = copied(node).values()
            self.lines += [f"{copy.name} = _restride({one.name}.clone(), {self.strides(copy)})" for one, copy in copies]
            self.node(plain(node))
            return
        if self.place(node):
            return
        if is_collective(node):
            self.pending.update(value.name for value in node.results)
        tensor = waited(node)
        if tensor is not None:  # without what it holds: PyTorch's own call takes less time
            wait = torch.ops._c10d_functional.wait_tensor.default._op
            call = f"{self.name_of('wait', wait)}({tensor.name})"
        else:
            call = self.python_call(node) if node.op == "python" else self.aten_call(node)
        call += ".zero_()" * (node.op in aten.UNINITIALIZED)
        if not node.outputs:
            self.lines.append(call)
            return
        left = [value.name if value is not None else "_" for value in node.outputs]
        single = node.op != "python" and _returns_one(aten.overload(node.op, self.trusted_ops))
        self.lines.append(f"{left[0]} = {call}" if single else f"{', '.join(left)}, = {call}")
        decided = aten.is_decided(node)
        if decided or node.kind == "fallback":
            self.bind(node.outputs, decided)
        if tensor is not None or not aten.may_alias(node, self.trusted_ops):
            # In the captured strides where it is made, so that no result has to be copied, away from the others.
            self.lines += [f"{v.name} = {self.strided(v)}" for v in node.results if v.name in self.shared]

    def control(self, node: Node) -> None:
        """Write control flow, whose bodies are functions of their own."""
        check(node)
        bodies = branches(node)
        syms = {name: sym for body in bodies for name, sym in all_syms(body).items() if name in self.bound}
        sizes = tuple(Value(f"_size_{name}", ScalarType("int", sym)) for name, sym in syms.items())
        given = self.device, self.callables, self.trusted_ops, node.op, self.tactics
        runs = [compile_graph(replace(body, inputs=(*body.inputs, *sizes)), *given).run for body in bodies]
        function = self.name_of(node.op, runner(node, runs))
        groups = [self.text(attr, fallback=True) for name, attr in node.args if name in ("pred", "state", "rows")]
        operands = self.text((*attr_values(node.arg("operands")), *syms.values()), fallback=True)
        stacks = node.outputs[len([*attr_values(node.arg("state"))]) :] if node.op == SCAN else ()
        empty = self.name_of("empty", EMPTY[self.device.type])
        made = [f"[{', '.join(self.new(empty, value) for value in stacks if value)}]"] * (node.op == SCAN)
        left = "".join(f"{value.name}, " for value in node.results)
        self.lines.append(f"{left}{'= ' * bool(left)}{function}({', '.join((*groups, operands, *made))})")
        self.bind(node.outputs, decided=True)

    def place(self, node: Node) -> bool:
        """Write a library call whose result has a place before it; False if it has none."""
        target = node.outputs[0] if node.outputs else None
        if target is None:
            return False
        if target.name in self.offsets:
            self.materialize(target)
        elif self.room is not None and target.name in self.plan.returned:
            self.lines.append(f"{target.name} = {self.new('_keep', target)}")
        else:
            return False
        out = None if node.op == CONVOLUTION else aten.out_of(node.op)
        self.lines.append(self.aten_call(node, out, target.name))
        return True

    def new(self, allocator: str, value: Value) -> str:
        """A new tensor for `value`, as code."""
        type_ = _tensor_type(value)
        dtype = aten.to_torch("ScalarType", type_.dtype, self.device)
        return f"{allocator}({self.numbers(type_.shape)}, {self.strides(value)}, {self.name_of(str(dtype), dtype)})"

    def copies(self, run: Sequence[Node]) -> None:
        """Write a run of copies, those of one dtype as one call."""
        groups: dict[str, list[Node]] = {}
        for node in run:
            for value in node.inputs:
                self.materialize(value)
            groups.setdefault(_tensor_type(node.arg("src")).dtype, []).append(node)
        for group in groups.values():
            lists = (self.text(tuple(node.arg(name) for node in group)) for name in ("self", "src"))
            self.lines.append(f"{self.name_of('copies', copy_all)}({', '.join(lists)})")

    def materialize(self, value: Value) -> None:
        """Write the tensor of a value in the arena, unless it is written already."""
        if value.name not in self.offsets or value.name in self.tensors:
            return
        assert isinstance(value.type, TensorType)
        dtype = aten.DTYPES[value.type.dtype]
        memory, offset = self.offsets[value.name]
        alias = f"{memory}_{value.type.dtype}"
        if alias not in self.tensors:
            self.lines.append(f"{alias} = {memory}.view({self.name_of(str(dtype), dtype)})")
        self.tensors |= {alias, value.name}
        at = offset // dtype.itemsize if isinstance(offset, int) else f"{offset} // {dtype.itemsize}"
        sizes, strides = self.numbers(value.type.shape), self.strides(value)
        self.lines.append(f"{value.name} = {self.name_of('placed', PLACED)}({alias}, {sizes}, {strides}, {at})")

    def launch(self, node: Node) -> None:
        """Write the launch of a kernel, whose inputs and outputs have the captured strides."""
        addresses: list[str] = []
        held: list[str] = []
        tensors = {value.name: value.name for value in node.inputs}
        for value in node.inputs:
            if value.name in self.written:
                addresses.append(self.address(value))
                continue
            held.append(f"_in{len(held)}")  # possibly a copy, which has to live until the launch
            tensors[value.name] = held[-1]
            self.lines.append(f"{held[-1]} = {self.name_of('aligned', aligned)}({value.name}, {self.strides(value)})")
            addresses.append(f"{held[-1]}.data_ptr()")
        for output in node.outputs:
            assert output is not None  # `tactics.check` saw to it
            if output.name in node.updates:  # the address of what is written, or of a copy of it
                addresses.append(addresses[node.inputs.index(node.updates[output.name])])
                continue
            if output.name in self.begun:
                if output.name not in self.offsets:
                    self.lines.append(f"{output.name} = {tensors[self.begun[output.name].name]}")
            elif output.name in self.targets:
                given = f"{self.targets[output.name].name}, {self.strides(output)}{', _free' * (not self.guarded)}"
                self.lines.append(f"{output.name} = {self.name_of('target', target_of)}({given})")
            elif output.name not in self.offsets:
                self.lines.append(f"{output.name} = {self.new('_new', output)}")
            self.written.add(output.name)
            addresses.append(self.address(output))
        launcher = self.kernels[node.op]
        numbers = f"{self.numbers(launcher.scalars)}, {self.numbers(launcher.grid)}"
        pointers = "".join(f"{address}, " for address in addresses)
        self.lines.append(f"{self.name_of(node.op, launcher)}(({pointers}), {numbers})")
        if node.writes:
            names, copies = [value.name for value in node.targets], [tensors[value.name] for value in node.targets]
            function = self.name_of("copies", copy_all)  # which counts a write to what is no copy
            self.lines.append(f"{function}([{', '.join(names)}], [{', '.join(copies)}])")
            self.lines += [f"{name} = {target.name}" for name, target in node.updates.items()]
        if held:
            self.lines.append(f"del {', '.join(held)}")

    def address(self, value: Value) -> str:
        """The address, as code, of a value that a kernel writes."""
        if value.name in self.offsets:
            memory, offset = self.offsets[value.name]
            return f"{memory}_base + {offset}"
        return f"{value.name}.data_ptr()"

    def python_call(self, node: Node) -> str:
        function = self.name_of("python", self.callables[node.arg("index")])  # type: ignore[index]
        arguments = node.arg("inputs", ())
        return f"{function}({', '.join(self.text(a, fallback=True) for a in arguments)})"  # type: ignore[union-attr]

    def aten_call(self, node: Node, out: torch._ops.OpOverload | None = None, target: str = "") -> str:
        """A call as code; with a `target`, which it writes to: of the overload `out`, or of `convolve`."""
        written = aten.overload(node.op, self.trusted_ops)
        op, types = out or RELAXED.get(node.op, written), aten.schema(written)
        fallback = node.kind == "fallback" or node.op in aten.STRIDED
        parts, keyword = [], False
        names = list(aten.schema(op))  # the arguments of the called overload
        for position, (key, attr) in enumerate(node.args):
            type_, keyword_only = types.get(key, ("", False))
            if not type_:
                raise InvalidIR(f"{node.op} has no argument {key!r}", loc=node.loc)
            # Positional until an argument is left out: the dispatcher parses these fastest.
            keyword = keyword or keyword_only or list(types)[position] != key
            text = self.argument(type_, attr, fallback)
            parts.append(f"{key if key in names else names[position]}={text}" if keyword else text)
        parts += [f"out={target}"] * bool(target)
        function = convolve if target and out is None else op._op
        return f"{self.name_of(str(op).replace('.', '_'), function)}({', '.join(parts)})"

    def argument(self, type_: str, attr: Attr, fallback: bool) -> str:
        value = aten.to_torch(type_, attr, self.device)
        return self.text(attr, fallback) if value is attr else self.name_of(str(value), value)

    def text(self, attr: Attr, fallback: bool = False) -> str:
        """An attribute as code; `fallback`: tensors get the captured strides."""
        if isinstance(attr, tuple):
            return f"[{', '.join(self.text(item, fallback) for item in attr)}]"
        if isinstance(attr, Value):
            return self.strided(attr) if fallback else attr.name
        if isinstance(attr, Sym | Expr):
            self.check_bound(attr)
            return str(attr)
        return repr(attr)

    def strided(self, value: Value) -> str:
        if not isinstance(value.type, TensorType) or not value.type.shape or value.name in self.pending:
            return value.name
        return f"_restride({value.name}, {self.strides(value)})"

    def strides(self, value: Value) -> str:
        """The captured strides, as code."""
        assert isinstance(value.type, TensorType)
        return self.numbers(value.type.strides)

    def numbers(self, dims: Sequence[Dim]) -> str:
        """Dims as a tuple, as code."""
        for dim in dims:
            self.check_bound(dim)
        return f"({''.join(f'{dim}, ' for dim in dims)})"

    def output(self, attr: Attr) -> str:
        if isinstance(attr, Value) and attr.name in self.inputs:
            return attr.name
        return self.text(attr, fallback=True)

    def check_bound(self, dim: Dim) -> None:
        for sym in dim_syms(dim):
            if sym.name not in self.bound:
                raise InvalidIR(f"no input determines the dim {sym.name}")

    def name_of(self, hint: str, value: Any) -> str:
        """A global of the generated function that holds `value`."""
        name = base = "_" + "".join(c if c.isalnum() else "_" for c in hint)
        count = 0
        while name in self.names and self.names[name] is not value:
            count += 1
            name = f"{base}_{count}"
        self.names[name] = value
        return name


def _runs_of_copies(graph: Graph, trusted_ops: frozenset[str]) -> dict[int, Sequence[Node]]:
    """Runs of at least two copies in a row, by the position of the first; the positions of the others have empty runs.
    The order in a run does not matter: the sources are results of the graph, and the targets inputs or weights."""
    calls = (node for node in graph.nodes if not node.writes and not aten.may_alias(node, trusted_ops))
    made = {value.name for node in calls for value in node.outputs if value is not None}
    runs: dict[int, Sequence[Node]] = {}
    first, run = 0, list[Node]()
    for index, node in enumerate((*graph.nodes, None)):
        if node is not None and _is_plain_copy(node, made):
            first, run = (first if run else index), [*run, node]
            continue
        if len(run) > 1:
            runs |= {first + offset: () for offset in range(len(run))} | {first: run}
        run = []
    return runs


def _is_plain_copy(node: Node, made: set[str]) -> bool:
    """`node` copies one of the values `made` to an input or weight of its type."""
    target, source = node.arg("self"), node.arg("src")
    if node.op != COPY or not isinstance(target, Value) or not isinstance(source, Value):
        return False
    return len(node.args) == 2 and source.name in made and target.type == source.type


def _tensor_type(attr: Attr) -> TensorType:
    assert isinstance(attr, Value)
    assert isinstance(attr.type, TensorType)
    return attr.type


def _returns_one(op: torch._ops.OpOverload) -> bool:
    """The Python call returns a bare tensor or number, not a tuple or list."""
    returns = op._schema.returns
    return len(returns) == 1 and not str(returns[0].type).startswith("List")


def _dim_sources(value: Value | None) -> Iterator[tuple[str, Dim]]:
    """The dims of a value, each with the code that reads it at run time."""
    if value is None:
        return
    if isinstance(value.type, ScalarType):
        yield from ((value.name, dim) for dim in type_dims(value.type))
        return
    for axis, dim in enumerate(value.type.shape):
        yield f"{value.name}.shape[{axis}]", dim


def solve(dim: Dim, source: str, known: set[str]) -> Iterator[tuple[Sym, str]]:
    """`(symbol, code)` if `dim`, which the code `source` reads, determines an unknown symbol: s, c*s or c+s."""
    if isinstance(dim, Sym) and dim.name not in known:
        yield dim, source
    if not isinstance(dim, Expr) or dim.op not in ("*", "+"):
        return
    unknown = [arg for arg in dim.args if any(sym.name not in known for sym in dim_syms(arg))]
    if len(unknown) != 1:
        return
    rest = " * ".join(str(a) for a in dim.args if a is not unknown[0]) if dim.op == "*" else ""
    if dim.op == "+":
        rest = " - ".join(str(a) for a in dim.args if a is not unknown[0])
    yield from solve(unknown[0], f"({source} // ({rest}))" if dim.op == "*" else f"({source} - {rest})", known)
