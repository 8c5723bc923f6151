"""The only intermediate representation, from capture to launch: immutable classes, a text form, and a verifier.

A `Graph` is a list of `Node`s in topological order over named `Value`s. All levels use the same classes; a level is an
invariant that `verify` checks:

    import   nodes of kind `op` (an ATen overload, by name), `fallback` and, once regions are formed, `kernel`
    fused    nodes of kind `kernel` (its body is a Graph), `extern` (an ATen call), `view` (an ATen call that moves no
             data) and `fallback`: the runtime matches on these four and never learns a new op

`str(graph)` is the text form and `parse` reads it back: `parse(str(g)) == g`. Right-hand sides, types and dims are
Python expressions, parsed by Python's own parser and never evaluated. This file imports neither torch nor triton.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from keyword import iskeyword

from torch_rtx.dims import DIM_OPS as DIM_OPS
from torch_rtx.dims import INT64_MIN as INT64_MIN
from torch_rtx.dims import Dim as Dim
from torch_rtx.dims import Expr as Expr
from torch_rtx.dims import Sym as Sym
from torch_rtx.dims import contiguous as contiguous
from torch_rtx.dims import dim_expr as dim_expr
from torch_rtx.dims import dim_syms as dim_syms
from torch_rtx.dims import evaluate as evaluate
from torch_rtx.dims import typical_size as typical_size
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import InvalidIR

MAIN = "main"  # the device of a session; every other device is named ("cpu")
COPY = "aten.copy_.default"  # overwrites an input or weight; has no result
# In-place updates of elements of an input or weight. As in PyTorch they return the written tensor: readers of the new
# contents read the result, and nothing reads the target after the write, so that edges alone order the accesses.
# Each stands with the call that makes a new tensor instead.
UPDATES = {
    f"aten.{name}_.{overload}": f"aten.{name}.{overload}"
    for name, *overloads in (("index_copy", "default"), ("index_put", "default"), ("scatter", "src", "value"))
    for overload in overloads
}
MAX_RANK = 64  # as in PyTorch
LEVELS = {"import": ("op", "kernel", "fallback"), "fused": ("kernel", "extern", "view", "fallback")}
COND, LOOP, SCAN, CALL = (f"torch_rtx.{name}" for name in ("cond", "while_loop", "scan", "call"))
CONTROL = frozenset((COND, LOOP, SCAN, CALL))  # fallbacks with a body, see `control`
SCALARS = frozenset(("int", "float", "bool", "object"))

# ---- types and values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor: `dtype` in DTYPES, `shape` and `strides` in elements, `device` MAIN or a name such as "cpu"."""

    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...]
    device: str = MAIN

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape)) or '()'}]"
        if self.strides != contiguous(self.shape):
            text += f"({', '.join(map(str, self.strides))})"
        return text if self.device == MAIN else f"{text}.{self.device}"


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number, or an `object` that fallbacks alone take: a random generator, a process group, a sparse tensor.
    `dim`: the dim that an int equals, if known."""

    kind: str
    dim: Dim | None = None

    def __str__(self) -> str:
        return self.kind if self.dim is None else f"{self.kind}[{self.dim}]"


Type = TensorType | ScalarType
OBJECT = ScalarType("object")


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value: a name, unique in its graph, and a type."""

    name: str
    type: Type

    def __str__(self) -> str:
        return self.name


Attr = None | bool | int | float | str | Sym | Expr | Value | tuple["Attr", ...]


def attr_values(attr: Attr) -> Iterator[Value]:
    """The values in an attribute, in order, with repeats."""
    if isinstance(attr, Value):
        yield attr
    for item in attr if isinstance(attr, tuple) else ():
        yield from attr_values(item)


def attr_map(attr: Attr, fn: Callable[[Value], Attr]) -> Attr:
    """`attr` with `fn` applied to each value in it."""
    if isinstance(attr, Value):
        return fn(attr)
    return tuple(attr_map(item, fn) for item in attr) if isinstance(attr, tuple) else attr


def attr_dims(attr: Attr) -> Iterator[Dim]:
    """The dims in an attribute that are not plain integers."""
    if isinstance(attr, Sym | Expr):
        yield attr
    elif isinstance(attr, tuple):
        for item in attr:
            yield from attr_dims(item)


def type_dims(type_: Type) -> tuple[Dim, ...]:
    """The dims of a type: sizes, then strides."""
    if isinstance(type_, TensorType):
        return (*type_.shape, *type_.strides)
    return () if type_.dim is None else (type_.dim,)


def attr_text(attr: Attr) -> str:
    """The text form of an attribute."""
    if isinstance(attr, tuple):
        return f"[{', '.join(map(attr_text, attr))}]"
    return str(attr) if isinstance(attr, Value | Sym | Expr) else repr(attr)


# ---- nodes and graphs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loc:
    """The origin of a node in the user's model: module path, source file, line.

    Paths must not contain line ends, " @ ", "  #" and "{", which are delimiters of the text form.
    """

    module: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        position = f"@ {self.file}:{self.line}" if self.file else ""
        return f"{self.module} {position}".strip()


@dataclass(frozen=True)
class Node:
    """`outputs = kind op(args)`: `args` are (schema name, attribute) pairs; an unused output is None."""

    kind: str
    op: str
    args: tuple[tuple[str, Attr], ...]
    outputs: tuple[Value | None, ...]
    body: Graph | None = None
    loc: Loc | None = None

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """The values that the node reads, in argument order, with repeats."""
        return tuple(value for _, attr in self.args for value in attr_values(attr))

    @cached_property
    def results(self) -> tuple[Value, ...]:
        """The used outputs, in order."""
        return tuple(value for value in self.outputs if value is not None)

    @cached_property
    def targets(self) -> tuple[Value, ...]:
        """The operands that the node writes to, each an input or weight of the graph: the argument `self` of COPY and
        UPDATES, and what the body of a kernel writes to."""
        if self.kind == "kernel" and self.body is not None and self.body.written:
            pairs = zip(self.body.inputs, self.inputs, strict=False)
            return tuple(given for own, given in pairs if own.name in self.body.written)
        target = self.arg("self") if self.kind != "fallback" and (self.op == COPY or self.op in UPDATES) else None
        return (target,) if isinstance(target, Value) else ()

    @property
    def writes(self) -> bool:
        """Whether the node writes to an operand."""
        return bool(self.targets)

    @cached_property
    def updates(self) -> dict[str, Value]:
        """By the name of each result that is an operand after the node wrote to it: that operand."""
        if self.kind != "kernel" or self.body is None:
            return {value.name: target for target in self.targets for value in self.results}
        given = {own.name: value for own, value in zip(self.body.inputs, self.inputs, strict=False)}
        pairs = zip(attr_values(self.body.outputs), self.results, strict=False)
        found = ((made.name, given.get(self.body.updated.get(own.name, ""))) for own, made in pairs)
        return {name: target for name, target in found if target is not None}

    def arg(self, name: str, default: Attr = None) -> Attr:
        """The argument `name`, or `default` if the call omits it."""
        return next((attr for key, attr in self.args if key == name), default)

    def map_inputs(self, fn: Callable[[Value], Attr]) -> tuple[tuple[str, Attr], ...]:
        """`args` with each value replaced by the result of `fn`."""
        return tuple((key, attr_map(attr, fn)) for key, attr in self.args)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named tensor of the model that the engine needs. `aliases` are other names of the same (tied) tensor. The data
    of a `constant` is part of the engine file, even if weights are stripped."""

    name: str
    type: TensorType
    aliases: tuple[str, ...] = ()
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A value computed from parameters alone: the parameter itself, or the single output of `recipe`, whose inputs are
    the parameters in the order of `names`."""

    value: Value
    names: tuple[str, ...]
    recipe: Graph | None = None


@dataclass(frozen=True)
class Graph:
    """A program: `outputs` are values, dims and plain constants; its only effects are COPY and UPDATES of an input or
    weight, also in bodies of its kernels."""

    level: str
    inputs: tuple[Value, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    weights: tuple[Weight, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Attr, ...] = ()

    @cached_property
    def syms(self) -> dict[str, Sym]:
        """All symbols of the graph, by name, sorted."""
        found: dict[str, Sym] = {}

        def add(dims: Iterator[Dim]) -> None:
            for dim in dims:
                for sym in dim_syms(dim):
                    if found.setdefault(sym.name, sym) != sym:
                        raise InvalidIR(f"symbol {sym.name} has two different ranges")

        for value in self.values():
            add(iter(type_dims(value.type)))
        for node in self.nodes:
            for _, attr in node.args:
                add(attr_dims(attr))
        add(attr_dims(self.outputs))
        return dict(sorted(found.items()))

    @cached_property
    def updated(self) -> dict[str, str]:
        """By the name of each result of an update: the input or weight that it is."""
        found: dict[str, str] = {}
        for node in self.nodes:
            found |= {name: found.get(target.name, target.name) for name, target in node.updates.items()}
        return found

    @cached_property
    def written(self) -> frozenset[str]:
        """The names of the inputs and weights that the graph writes to."""
        targets = (target.name for node in self.nodes for target in node.targets)
        return frozenset(self.updated.get(name, name) for name in targets)

    def values(self) -> Iterator[Value]:
        """Every value that the graph defines, in order of definition."""
        yield from self.inputs
        yield from (weight.value for weight in self.weights)
        yield from (value for node in self.nodes for value in node.results)

    def __str__(self) -> str:
        return "\n".join(_lines(self)) + "\n"


def kernel_nodes(graph: Graph) -> Iterator[Node]:
    """The nodes of kind `kernel` in order, including those in bodies of other nodes that may be launched alone."""
    for node in graph.nodes:
        yield from (node,) * (node.kind == "kernel")
        if node.body is not None and not (node.kind == "kernel" and has_parts(node.body)):
            yield from kernel_nodes(node.body)


def has_parts(body: Graph) -> bool:
    """`body` is that of a horizontal kernel: several kernels that need nothing of each other, its parts."""
    return len(body.nodes) > 1 and all(n.kind == "kernel" and {*n.inputs} <= {*body.inputs} for n in body.nodes)


def node_text(node: Node) -> str:
    """The text form of one node, without its body."""
    left = ", ".join("_" if value is None else f"{value.name}: {value.type}" for value in node.outputs)
    # Some ops have an argument `from`, which Python's parser does not accept as a name.
    args = [f"{key}{'_' * iskeyword(key)}={attr_text(attr)}" for key, attr in node.args]
    right = f"{node.kind} {node.op}({', '.join(args)})"
    return f"{left} = {right}" if left else right


def _lines(graph: Graph) -> Iterator[str]:
    yield f"graph {graph.level} {{"
    for sym in graph.syms.values():
        yield f"  dim {_dim_text(sym)}"
    for value in graph.inputs:
        yield f"  input {value.name}: {value.type}"
    for parameter in graph.parameters:
        word = "constant" if parameter.constant else "parameter"
        names = ", ".join(repr(name) for name in (parameter.name, *parameter.aliases))
        yield f"  {word} {names}: {parameter.type}"
    for weight in graph.weights:
        line = f"  weight {weight.value.name}: {weight.value.type} = {', '.join(map(repr, weight.names))}"
        yield from _with_body(line, weight.recipe)
    for node in graph.nodes:
        line = "  " + node_text(node)
        if node.loc or "  #" in line:  # a string may contain "  #": the last one in the line starts the comment
            line += f"  # {node.loc or ''}"
        yield from _with_body(line, node.body)
    yield f"  return {attr_text(graph.outputs)}"
    yield "}"


def _dim_text(sym: Sym) -> str:
    numbers = (sym.min, sym.max, sym.multiple, *(() if sym.typical is None else (sym.typical,)))
    return f"{sym.name} = {', '.join(map(str, numbers))}"


def _with_body(line: str, body: Graph | None) -> Iterator[str]:
    if body is None:
        yield line.rstrip()
        return
    head, *rest = _lines(body)
    yield f"{line.rstrip()} {head}"
    yield from ("  " + text for text in rest)


# ---- verification ----------------------------------------------------------------------------------------------------


def verify(graph: Graph, ops: Container[str] | None = None) -> None:
    """Check the rules of `graph.level`. Graphs are immutable: the result is cached per `ops`.

    Args:
        ops: the ATen overloads that `op`, `extern` and `view` nodes may name; None: unchecked.

    Raises:
        InvalidIR: the broken rule, with the nodes before and at the failure.
    """
    if vars(graph).get("_passed", graph) is ops:
        return
    if graph.level not in LEVELS:
        raise InvalidIR(f"unknown level {graph.level!r}; the levels are {', '.join(LEVELS)}")
    known: dict[str, Value] = {}
    parameters = {p.name: p.type for p in graph.parameters}
    names = [name for p in graph.parameters for name in (p.name, *p.aliases)]
    if len(set(names)) != len(names):
        raise InvalidIR("two parameters have the same name")
    for name, type_ in parameters.items():
        _verify_type(f"parameter {name!r}", type_)
        if not all(type(dim) is int for dim in type_dims(type_)):
            raise InvalidIR(f"parameter {name!r} has no static shape")
    for value in graph.inputs:
        _define(value, known)
    for weight in graph.weights:
        _verify_weight(weight, parameters, ops)
        _define(weight.value, known)
    writes = _WriteChecker(set(known), graph.level)
    for sym in graph.syms.values():
        high = math.inf if sym.max is None else sym.max
        if not is_name(sym.name) or sym.multiple < 1 or high < sym.min:
            raise InvalidIR(f"dim {_dim_text(sym)} has an empty range or an invalid name")
        if sym.typical is not None and (not max(sym.min, 1) <= sym.typical <= high or sym.typical % sym.multiple):
            raise InvalidIR(f"dim {_dim_text(sym)} has a typical value outside of its range")
    for index, node in enumerate(graph.nodes):
        try:
            _verify_node(node, graph.level, known, writes, ops)
        except InvalidIR as error:
            around = "\n".join(f"    {node_text(n)}" for n in graph.nodes[max(0, index - 3) : index + 1])
            raise InvalidIR(f"{error.message}\n{around}", loc=node.loc) from None
    for value in attr_values(graph.outputs):
        _use(value, known)
    clash = graph.syms.keys() & known.keys()
    if clash:
        raise InvalidIR(f"{', '.join(sorted(clash))} names both a dim and a value")
    vars(graph)["_passed"] = ops  # like a cached property: not a field, so that equality ignores it


def _verify_weight(weight: Weight, parameters: dict[str, TensorType], ops: Container[str] | None) -> None:
    unknown = [name for name in weight.names if name not in parameters]
    if unknown:
        raise InvalidIR(f"weight {weight.value} needs unknown parameters {', '.join(unknown)}")
    recipe = weight.recipe
    if recipe is None:
        if len(weight.names) != 1 or weight.value.type != parameters[weight.names[0]]:
            raise InvalidIR(f"weight {weight.value} has no recipe and must be one parameter, of its type")
        return
    given = [parameters[name] for name in weight.names]
    if [value.type for value in recipe.inputs] != given or recipe.weights or len(recipe.outputs) != 1 or recipe.syms:
        raise InvalidIR(f"the recipe of {weight.value} must take its parameters and return one static tensor")
    output = recipe.outputs[0]
    if not isinstance(output, Value) or output.type != weight.value.type:
        raise InvalidIR(f"the recipe of {weight.value} does not return {weight.value.type}")
    verify(recipe, ops)


def _verify_node(
    node: Node, level: str, known: dict[str, Value], writes: _WriteChecker, ops: Container[str] | None
) -> None:
    if node.kind not in LEVELS[level]:
        raise InvalidIR(f"a node of kind {node.kind!r} does not belong in level {level!r}")
    if node.kind in ("op", "extern", "view") and ops is not None and node.op not in ops:
        raise InvalidIR(f"op {node.op} is not on the allow-list")
    if (node.kind == "kernel" or (node.kind == "fallback" and node.op in CONTROL)) != (node.body is not None):
        raise InvalidIR("a kernel must have a body, as must control flow, and other nodes must not")
    if len({key for key, _ in node.args}) != len(node.args):
        raise InvalidIR("an argument is given twice")
    for value in node.inputs:
        _use(value, known)
    if node.kind != "fallback" and any(value.type == OBJECT for value in (*node.inputs, *node.results)):
        raise InvalidIR("only a fallback takes or makes an object")
    writes.visit(node)
    if re.fullmatch(r"[A-Za-z0-9_.]+", node.op) is None:
        raise InvalidIR(f"{node.op!r} is not a valid op name")
    if node.body is not None:
        _verify_body(node, node.body, ops)
    for output in node.outputs:
        if output is not None:
            _define(output, known)


class _WriteChecker:
    """Checks that nodes write only to inputs and weights, and do not read a tensor after it was overwritten. Level
    fused, which distinguishes views, checks reads."""

    def __init__(self, mutable: set[str], level: str) -> None:
        self.mutable, self.checks_reads = mutable, level == "fused"
        self.overwritten: set[str] = set()
        self.base: dict[str, str] = {}  # from a view to its base tensor

    def visit(self, node: Node) -> None:
        """Check the reads and writes of `node`."""
        names = [self.base.get(value.name, value.name) for value in node.inputs]
        if node.kind == "view" and not node.writes:
            self.base |= {value.name: names[0] for value in node.results if names}
            return
        for name in names:
            if name in self.overwritten and self.checks_reads:
                raise InvalidIR(f"value {name} is read after it was written to; read the result of the write instead")
        is_call = node.kind != "fallback" and (node.op == COPY or node.op in UPDATES)
        if (is_call and not node.targets) or any(target.name not in self.mutable for target in node.targets):
            raise InvalidIR(f"{node.op.split('.')[is_call]} must write to an input or weight")
        if node.op == COPY and node.outputs:
            raise InvalidIR("copy_ must not return anything")
        if node.op == COPY or not node.writes:
            return
        written = [target.name for target in node.targets]
        self.overwritten.update(written)
        changed = any(value.type != node.updates.get(value.name, value).type for value in node.results)
        complete = len(node.outputs) == 1 if is_call else {v.name for v in node.updates.values()} == {*written}
        if changed or not complete or any(names.count(name) != 1 for name in written):
            raise InvalidIR(f"{node.op} must return its target with its type, and read it in no other argument")
        self.mutable.update(node.updates)


def _verify_body(node: Node, body: Graph, ops: Container[str] | None) -> None:
    outputs = [value for value in body.outputs if isinstance(value, Value)]
    if (node.kind == "kernel" and body.level != "import") or body.weights or len(outputs) != len(body.outputs):
        raise InvalidIR("a kernel's body must be a graph of ops that returns tensors")
    if body.written and node.kind != "kernel" and node.op != LOOP:
        raise InvalidIR("a body must not write to its inputs")
    overwritten, parts = set[str](), has_parts(body)
    for step in body.nodes if node.kind == "kernel" and body.written else ():
        reads = [value.name for value in step.inputs]
        if step.op == COPY or not overwritten.isdisjoint(reads):
            raise InvalidIR("a kernel's body may write to an input by one update, and not use it afterwards")
        overwritten.update(target.name for target in step.targets)
        overwritten.update(body.written.intersection(reads) if parts else ())  # parts have no order
    if node.kind == "kernel" and [v.type for v in body.inputs] != [v.type for v in node.inputs]:
        raise InvalidIR("a kernel's body must have the kernel's input types")
    if node.kind == "kernel" and [v.type for v in outputs] != [v.type for v in node.results]:
        raise InvalidIR("a kernel's body must have the kernel's output types")
    verify(body, ops)


def _define(value: Value, known: dict[str, Value]) -> None:
    if not is_name(value.name):
        raise InvalidIR(f"{value.name!r} is not a valid name")
    if value.name in known:
        raise InvalidIR(f"value {value.name} is defined twice")
    _verify_type(f"value {value.name}", value.type)
    known[value.name] = value


def _verify_type(what: str, type_: Type) -> None:
    if isinstance(type_, ScalarType):
        if type_.kind not in SCALARS or (type_.dim is not None and type_.kind != "int"):
            raise InvalidIR(f"{what} has the unknown type {type_}")
        return
    if type_.dtype not in DTYPES:
        raise InvalidIR(f"{what} has the unknown dtype {type_.dtype!r}")
    if len(type_.shape) != len(type_.strides):
        raise InvalidIR(f"{what} has {len(type_.shape)} sizes and {len(type_.strides)} strides")
    if len(type_.shape) > MAX_RANK:
        raise InvalidIR(f"{what} has {len(type_.shape)} dimensions, more than {MAX_RANK}")
    numbers = [dim for dim in type_dims(type_) if isinstance(dim, int)]
    if min(numbers, default=0) < 0:
        raise InvalidIR(f"{what} has a negative size or stride")
    if max(numbers, default=0) >= 2**63:
        raise InvalidIR(f"{what} has a size or stride that does not fit in 64 bits")
    if re.fullmatch(r"[a-z]+\d*", type_.device) is None:
        raise InvalidIR(f"{what} is on the unknown device {type_.device!r}")


def _use(value: Value, known: dict[str, Value]) -> None:
    if known.get(value.name) != value:
        raise InvalidIR(f"value {value.name} is used before it is defined, or with another type")


def is_name(text: str) -> bool:
    """Whether `text` is a valid name of a value or symbol: an ASCII identifier, except keywords, dtypes, words of the
    text form, and names with a leading `_`, which generated code uses."""
    reserved = text in DTYPES or text in SCALARS or text in ("inf", "nan", "min", "max") or iskeyword(text)
    return not reserved and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text) is not None
