"""Imports a captured FX graph into the IR.

Symbolic sizes are not nodes of the IR: an expression replaces each use of an FX node that only computes a size. Other
arithmetic on numbers of the host is calls of `host_ops`, before all other nodes where sizes of the inputs decide them.
`getitem` nodes become the outputs of the node that they index. Nodes on the partition's fallback list become `fallback`
nodes: a call by name if the IR can express it, else a Python callable, which engine files can't store.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from torch_rtx import aten, collectives
from torch_rtx.errors import Unsupported
from torch_rtx.functional import FUNCTIONAL
from torch_rtx.ir import (
    COPY,
    OBJECT,
    Attr,
    Graph,
    Loc,
    Node,
    Parameter,
    ScalarType,
    TensorType,
    Type,
    Value,
    Weight,
    attr_dims,
    attr_map,
    attr_values,
    dim_syms,
    is_name,
    type_dims,
)
from torch_rtx.lowering.control_flow import attribute, flow_of, import_flow, inner_nodes
from torch_rtx.lowering.effects import COLLECTIVES_AS, WAIT_TENSOR
from torch_rtx.lowering.exact_sizes import SYM_QUERIES, ExactSizes, is_sym_node
from torch_rtx.lowering.foreign_calls import import_launch, is_launch
from torch_rtx.lowering.functional_calls import functional_call
from torch_rtx.lowering.location import Locations
from torch_rtx.lowering.symbols import Symbols

# Checks of what types of the IR state, and of ranges that `_assert_scalar` checks as well.
DROPPED = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
    if hasattr(torch.ops.aten, name)
)
# Operators by others that take the same arguments and mean the same. Views that only set a tensor's conjugate or
# negative bit become copies that apply it: the types of the IR have no such bits. Where results of the graph would tell
# a view from a copy, the call falls back. PyTorch inserts the cast after decomposition.
SAME = {
    torch.ops.aten._conj.default: torch.ops.aten._conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
    torch.ops.prims.convert_element_type.default: torch.ops.aten._to_copy.default,
} | COLLECTIVES_AS
PLAIN = (bool, int, float, str, type(None))
ASSERTION = torch.ops.aten._assert_scalar.default
GENERATED = "Runtime assertion failed for expression"  # how messages begin that PyTorch writes for lack of one
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float)
Arguments = tuple[tuple[str, Attr], ...]


@dataclass(frozen=True)
class Role:
    """The role of a placeholder: an `input` of each call, a `parameter` (weights, buffers), a `constant`, or `zeros`:
    state that starts as zeros, such as a KV cache, and needs no data in the file. `number`: the only element of a
    constant, which becomes part of the graph."""

    kind: str
    name: str
    aliases: tuple[str, ...] = ()
    number: bool | int | float | None = None


def number_of(tensor: torch.Tensor) -> bool | int | float | None:
    """The only element of a constant, such as `torch.tensor(0.5)`; None for others, and for what no literal is."""
    if type(tensor) is not torch.Tensor or tensor.numel() != 1 or tensor.is_complex() or tensor.is_meta:
        return None
    if tensor.layout != torch.strided or set(tensor.stride()) - {1}:
        return None
    if tensor.dtype not in aten.DTYPES.values() or (tensor.is_floating_point() and tensor.itemsize == 1):
        return None
    with unset_fake_temporarily():
        value: bool | int | float = tensor.item()
    return value if math.isfinite(value) else None


@dataclass
class Imported:
    """A graph of level `import`, the data of its constants, its Python fallback callables with their FX nodes
    (`called`), and the origins of its locations."""

    graph: Graph
    constants: dict[str, torch.Tensor]
    callables: list[Callable[..., Any]]
    called: list[fx.Node]
    locations: Locations


def from_fx(
    gm: fx.GraphModule,
    roles: Sequence[Role],
    fallbacks: Mapping[fx.Node, str],
    symbols: Symbols,
    writes: Mapping[int, str] | None = None,
) -> Imported:
    """Import `gm`.

    Args:
        roles: one per placeholder, in order.
        fallbacks: the nodes that must not run in the engine, each with its reason.
        symbols: of the graph.
        writes: positions of outputs that are written back to an input or buffer, with the name of its placeholder.

    Raises:
        Unsupported: the IR can't express a node outside of `fallbacks`; `lowering.support` prevents this.
    """
    importer = _Importer(gm, fallbacks, symbols)
    remaining = iter(roles)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            importer.placeholder(node, next(remaining))
        elif node.op == "get_attr":
            importer.get_attr(node)
        elif node.op == "output":
            importer.output(node, writes or {})
        else:
            importer.call(node)
    return importer.result()


def is_number(node: fx.Node) -> bool:
    """Whether the node is arithmetic on numbers of the host that `host_ops` has."""
    return aten.number_op(node.target) is not None and isinstance(node.meta.get("val"), NUMBERS)


def is_asserted(node: fx.Node) -> bool:
    """Whether the node is a condition on sizes that only assertions read, directly or through other conditions.
    torch.export asserts its assumptions about data-dependent sizes. The assertion accepts any number, so that a dim of
    0 or 1 can replace the condition."""
    known = isinstance(node.meta.get("val"), torch.SymBool) and is_sym_node(node)
    return known and all(user.target is ASSERTION or is_asserted(user) for user in node.users)


def is_fixed(placeholder: fx.Node) -> bool:
    """Whether the capture specialized this input to a constant (and guards on it): it is not an input of the graph."""
    return isinstance(placeholder.meta["val"], PLAIN)


def _content(node: fx.Node) -> Any:
    """The result of a call as fake tensors. Calls that the partitioner inserted have none: their getitems do."""
    users = [user for user in node.users if user.target is operator.getitem]
    items: dict[Any, Any] = {user.args[1]: user.meta.get("val") for user in users}
    if "val" in node.meta or not items:
        return node.meta.get("val")
    return tuple(items.get(index) for index in range(max(items) + 1))


def _is_nested(content: Any) -> bool:
    """Whether a call returns a dict or nested sequences."""
    return isinstance(content, dict) or (isinstance(content, tuple | list) and any(map(_is_container, content)))


def _is_container(content: Any) -> bool:
    return isinstance(content, dict | tuple | list)


def _leaves(content: Any, like: Any) -> Iterator[Any]:
    """The items of `content` at the positions of the leaves of `like`."""
    if _is_container(like):
        for key, part in like.items() if isinstance(like, dict) else enumerate(like):
            yield from _leaves(content[key], part)
    else:
        yield content


def unique_name(name: str, taken: Container[str]) -> str:
    """A valid name that is not in `taken`: `name` itself, if possible."""
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    base = name if is_name(name) and not re.fullmatch(r"[sd]\d+", name) else f"x_{name}"  # dims: see `Symbols`
    unique, count = base, 1
    while unique in taken:
        unique, count = f"{base}_{count}", count + 1
    return unique


def flow_problem(node: fx.Node, symbols: Symbols) -> str | None:
    """Why control flow falls back; None if the IR expresses it, or the node is something else."""
    flow = flow_of(node)
    if flow is None:
        return None
    assert node.graph.owning_module is not None  # else there were no bodies
    functions = {n: "" for n in inner_nodes(node) if not isinstance(n.target, torch._ops.OpOverload) and not flow_of(n)}
    trial = _Importer(node.graph.owning_module, functions, symbols)
    for given in node.all_input_nodes:
        content = attribute(trial.gm, given) if given.op == "get_attr" else given.meta.get("val")
        trial.env[given] = content if isinstance(content, fx.GraphModule) else trial.given(content)
    try:
        import_flow(flow, node, trial, None)
    except Unsupported as error:
        return error.message
    return None


def python_call(gm: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    """A callable that runs the FX node: takes its inputs without graph modules, returns a flat tuple.

    Raises:
        Unsupported: the node does not call a function.
    """
    if not callable(node.target):
        raise Unsupported(f"a node of kind {node.op}", loc=Locations().of(node))
    gm = node.graph.owning_module or gm  # the node may be in a body
    order = [n for n in node.all_input_nodes if not _is_module(gm, n)]
    fixed = {n: attribute(gm, n) for n in node.all_input_nodes if _is_module(gm, n)}
    target, args, kwargs, content = node.target, node.args, node.kwargs, _content(node)

    def call(*values: Any) -> tuple[Any, ...]:
        bound = {**fixed, **dict(zip(order, values, strict=True))}
        result = target(*fx.map_arg(args, bound.__getitem__), **fx.map_arg(kwargs, bound.__getitem__))
        return tuple(_leaves(result, content))

    return call


def _is_generated(node: Node) -> bool:
    """Whether the node is an assertion that PyTorch wrote."""
    return node.op == str(ASSERTION) and str(node.arg("assert_msg")).startswith(GENERATED)


def _may_follow(node: Node, assertion: Node) -> bool:
    """Whether `node` is an assertion that PyTorch wrote, or computes what such a one reads: a failure should have the
    message of the user's own `assertion` of the same."""
    numbers = all(isinstance(value.type, ScalarType) for value in (*node.inputs, *node.results))
    computes = bool(node.results) and numbers and not set(node.results) & set(assertion.inputs)
    return _is_generated(node) or computes


def _is_module(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(attribute(gm, node), torch.Tensor)


def _dim_or_value(value: Value | None) -> Attr:
    """The attribute that refers to a value: the dim of a size, else the value."""
    is_size = value is not None and isinstance(value.type, ScalarType) and value.type.dim is not None
    return value.type.dim if is_size else value  # type: ignore[union-attr]


def op_of(node: fx.Node) -> Any:
    """What the node calls in the IR: an operator, if it can be called by name."""
    target: Any = node.target
    return aten.number_op(target) or SAME.get(target, target)


def call_arguments(node: fx.Node) -> list[tuple[str, Any]]:
    """The call's arguments by their schema names, in schema order, without defaults and without those of no effect."""
    arguments = op_of(node)._schema.arguments
    given: dict[str, Any] = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    kept = []
    for argument in arguments:
        value = given.get(argument.name)
        if argument.name not in given or argument.name == "pin_memory":
            continue
        if argument.name == "layout" and value in (None, torch.strided):  # no type of the IR has another one
            continue
        if argument.has_default_value():
            default, deprecated = argument.default_value, argument.name.startswith("cudnn_enable")  # of norms
            if deprecated or value is None and default is None or type(value) is type(default) and value == default:
                continue
        kept.append((argument.name, value))
    return kept


@dataclass
class _Importer:
    gm: fx.GraphModule
    fallbacks: Mapping[fx.Node, str]
    symbols: Symbols
    env: dict[fx.Node, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    inputs: list[Value] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    by_name: dict[str, Value] = field(default_factory=dict)  # of parameters
    nodes: list[Node] = field(default_factory=list)
    numbers: list[Node] = field(default_factory=list)  # calls of `host_ops` that sizes of inputs decide
    outputs: tuple[Attr, ...] = ()
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    callables: list[Callable[..., Any]] = field(default_factory=list)
    called: list[fx.Node] = field(default_factory=list)
    locations: Locations = field(default_factory=Locations)
    exact: ExactSizes = field(default_factory=ExactSizes)
    reads: dict[Value, tuple[Value, ...]] = field(default_factory=dict)  # by result of a collective, see `collectives`
    held: dict[int, Value] | None = None  # in a body: its inputs for tensors of the model, by `id`

    def result(self) -> Imported:
        inputs, parameters = tuple(self.inputs), tuple(self.parameters)
        graph = Graph("import", inputs, parameters, tuple(self.weights), (*self.numbers, *self.nodes), self.outputs)
        return Imported(graph, self.constants, self.callables, self.called, self.locations)

    def value(self, name: str, type_: Type) -> Value:
        """A new value, called `name` if no other value is."""
        unique = unique_name(name, self.names)
        self.names.add(unique)
        return Value(unique, type_)

    def next_value(self, type_: Type) -> Value:
        return self.value(f"v{len(self.names)}", type_)

    def type(self, content: Any, opaque: bool = False) -> Type:
        """The type of an input or of the result of a fallback; OBJECT for what only fallbacks can take."""
        try:
            return self.symbols.type(content, opaque)
        except Unsupported:
            return OBJECT

    def placeholder(self, node: fx.Node, role: Role) -> None:
        content = node.meta["val"]
        if is_fixed(node):
            self.env[node] = content
        elif role.kind == "input":
            value = self.value(role.name, self.type(content))
            self.inputs.append(value)
            self.env[node] = _dim_or_value(value)
        elif role.kind == "zeros":
            self.env[node] = self.zeros(content)
        elif role.number is not None:
            self.env[node] = self.number(role.number, content)
        else:
            self.env[node] = self.parameter(role, content)

    def given(self, content: Any) -> Attr:
        """What stands for an input of the graph, or for a value that a capture fixed."""
        if isinstance(content, PLAIN):
            return content
        self.inputs.append(self.next_value(self.type(content)))
        return _dim_or_value(self.inputs[-1])

    def zeros(self, content: torch.Tensor) -> Value:
        type_ = self.symbols.type(content)
        assert isinstance(type_, TensorType)
        value = self.value(f"w{len(self.weights)}", type_)
        args = (("size", type_.shape), ("dtype", type_.dtype), ("device", type_.device))
        recipe = Graph("import", nodes=(Node("op", "aten.zeros.default", args, (value,)),), outputs=(value,))
        self.weights.append(Weight(value, (), recipe))
        return value

    def number(self, number: bool | int | float, content: torch.Tensor) -> Value:
        type_ = self.symbols.type(content)
        assert isinstance(type_, TensorType)
        args = (("size", type_.shape), ("fill_value", number), ("dtype", type_.dtype), ("device", type_.device))
        value = self.next_value(type_)
        self.nodes.append(Node("op", "aten.full.default", args, (value,)))
        return value

    def parameter(self, role: Role, content: torch.Tensor) -> Value:
        tied = next((self.by_name[name] for name in (role.name, *role.aliases) if name in self.by_name), None)
        if tied is not None:
            return tied
        type_ = self.symbols.type(content)
        assert isinstance(type_, TensorType)
        self.parameters.append(Parameter(role.name, type_, role.aliases, role.kind == "constant"))
        value = self.value(f"w{len(self.weights)}", type_)
        self.weights.append(Weight(value, (role.name,)))
        self.by_name[role.name] = value
        return value

    def get_attr(self, node: fx.Node) -> None:
        content = attribute(self.gm, node)
        if isinstance(content, torch.Tensor) and (number := number_of(content)) is not None:
            self.env[node] = self.number(number, content)
        elif isinstance(content, torch.Tensor):
            self.env[node] = self.constant(content)
        else:
            self.env[node] = content  # a graph module that a higher-order operator calls, or an object

    def constant(self, content: torch.Tensor) -> Value:
        if self.held is not None:
            return self.held[id(content)]
        name = f"constant.{len(self.constants)}"
        self.constants[name] = content.detach()
        return self.parameter(Role("constant", name), content)

    def inner(self, gm: fx.GraphModule) -> _Importer:
        """See `control_flow.Importer`."""
        shared = {name: getattr(self, name) for name in ("callables", "called", "locations", "exact")}
        return _Importer(gm, self.fallbacks, self.symbols, **shared)

    def inline(self, gm: fx.GraphModule, given: Sequence[Attr]) -> tuple[Attr, ...]:
        """See `control_flow.Importer`."""
        around, self.gm, remaining = self.gm, gm, iter(given)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(remaining)
            elif node.op == "get_attr":
                self.get_attr(node)
            elif node.op != "output":
                self.call(node)
        results = self.attr(gm.graph.output_node().args[0])
        self.gm = around
        return results if isinstance(results, tuple) else (results,)

    def body(self, outputs: Sequence[Attr]) -> Graph:
        """See `control_flow.Importer`."""
        return Graph("import", tuple(self.inputs), nodes=(*self.numbers, *self.nodes), outputs=tuple(outputs))

    def call(self, node: fx.Node) -> None:
        if node.target in DROPPED:
            return
        if node.target is operator.getitem and isinstance(self.env[node.args[0]], tuple | dict):  # type: ignore[index]
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        loc = self.locations.of(node)
        if self.exact.replaced(node):
            value = self.next_value(ScalarType("int", self.symbols.dim(self.exact(node))))
            self.nodes.append(Node("fallback", str(node.target), self.arguments(node), (value,), None, loc))
            self.env[node] = self.sym(node.meta["val"])
            return
        if is_sym_node(node) or (is_number(node) and isinstance(node.meta.get("val"), torch.SymInt)):
            try:
                self.env[node] = self.host(node)
                return
            except Unsupported:
                pass  # a call computes it at run time
        if node.target is torch.ops.aten.copy_.default and node not in self.fallbacks:
            self.env[node] = self.env[node.args[0]]  # type: ignore[index]
            self.nodes.append(Node("op", str(node.target), self.arguments(node), (), None, loc))
            return
        flow = None if node in self.fallbacks else flow_of(node)
        if flow is not None:
            self.exact.meet(node)
            import_flow(flow, node, self, loc)
            return
        outputs = self.node_outputs(node)
        if is_launch(node) and node not in self.fallbacks:
            self.append(import_launch(node, outputs, self, loc))
            return
        if is_number(node):
            arguments = self.arguments(node)
            first = self.decided(arguments)
            made = Node("op" if first else "fallback", str(op_of(node)), arguments, outputs, None, loc)
            (self.numbers if first else self.nodes).append(made)
            return
        if node not in self.fallbacks and not is_sym_node(node):
            self.append(Node("op", str(op_of(node)), self.arguments(node), outputs, None, loc))
            return
        try:
            if (found := functional_call(node)) is not None:
                self.exact.meet(node)
                self.functional(node, *found, loc)
                return
            if not isinstance(node.target, torch._ops.OpOverload):
                raise Unsupported("a Python function")
            if _is_nested(_content(node)):
                raise Unsupported("a nested result")
            call, arguments = str(node.target), self.arguments(node)
        except Unsupported:
            inputs = tuple(self.attr(n) for n in node.all_input_nodes if not _is_module(self.gm, n))
            call, arguments = "python", (("index", len(self.callables)), ("inputs", inputs))
            self.callables.append(python_call(self.gm, node))
            self.called.append(node)
        self.exact.meet(node)
        self.append(Node("fallback", call, arguments, outputs, None, loc))

    def functional(
        self, node: fx.Node, op: Any, given: Mapping[str, Any], written: Sequence[str], loc: Loc | None
    ) -> None:
        """Append a call of an operator that writes to copies of its arguments."""
        args = ("op", str(op)), ("names", (*given,)), ("values", self.attr([*given.values()])), ("written", (*written,))
        results = [None if one is None else self.next_value(self.symbols.type(one)) for one in node.meta["val"]]
        self.env[node] = tuple(results)
        outputs = tuple(results if results[0] else results[1:])
        self.append(Node("fallback", FUNCTIONAL, args, outputs, None, loc))

    def append(self, made: Node) -> None:
        """Append a node; an assertion of the user's goes before those that PyTorch wrote for it."""
        if collectives.starts(made):
            self.reads |= dict.fromkeys(made.results, collectives.held(made))
        place = len(self.nodes)
        if made.op == str(ASSERTION) and not _is_generated(made):
            while place and _may_follow(self.nodes[place - 1], made):
                place -= 1
        self.nodes.insert(place, made)

    def decided(self, arguments: Arguments) -> bool:
        """Whether inputs that are numbers, and sizes of inputs, decide all arguments."""
        values = [*self.inputs, *(value for node in self.numbers for value in node.results)]
        known = {sym for value in values for dim in type_dims(value.type) for sym in dim_syms(dim)}
        attrs = [attr for _, attr in arguments]
        read = {value for attr in attrs for value in attr_values(attr)}
        return read <= set(values) and {sym for attr in attrs for d in attr_dims(attr) for sym in dim_syms(d)} <= known

    def output(self, node: fx.Node, writes: Mapping[int, str]) -> None:
        results: Any = node.args[0]
        placeholders = {n.name: n for n in self.gm.graph.nodes if n.op == "placeholder"} if writes else {}
        written: dict[str, Value] = {}
        for position, result in enumerate(results):
            if position in writes:
                target, source = self.attr(placeholders[writes[position]]), self.attr(result)
                self.nodes.append(Node("op", COPY, (("self", target), ("src", source)), ()))
                if isinstance(target, Value) and isinstance(source, Value) and target.type == source.type:
                    written[source.name] = target
        makers = {value.name: made for made in self.nodes for value in made.results} if written else {}
        outputs = (self.attr(result) for i, result in enumerate(results) if i not in writes)
        self.outputs = tuple(attr_map(attr, lambda value: self.placed(value, written, makers)) for attr in outputs)

    def placed(self, value: Value, written: dict[str, Value], makers: Mapping[str, Node]) -> Value:
        """A result in the memory where the model has it: what was `written` to an input, and its views, lies there."""
        if value.name in written:
            return written[value.name]
        node = makers.get(value.name)
        if node is None or node.kind != "op" or not node.inputs or not aten.may_alias(node):
            return value
        source = node.inputs[0]
        moved = self.placed(source, written, makers)
        if moved is source:
            return value
        outputs = tuple(None if old is None else self.next_value(old.type) for old in node.outputs)
        args = node.map_inputs(lambda given: moved if given == source else given)
        self.nodes.append(replace(node, args=args, outputs=outputs))
        written |= {old.name: new for old, new in zip(node.outputs, outputs, strict=True) if old and new}
        return written[value.name]

    def host(self, node: fx.Node) -> Attr:
        """The size or condition that the node computes.

        Raises:
            Unsupported: no dim expresses it.
        """
        read = node.all_input_nodes if is_sym_node(node) and node.target not in SYM_QUERIES else ()
        if any(isinstance(self.env[n], Value) for n in read):
            raise Unsupported("a number that the graph computes")
        return self.symbols.condition(self.exact(node)) if is_asserted(node) else self.sym(node.meta["val"])

    def sym(self, value: Any) -> Attr:
        if isinstance(value, torch.SymBool) or self.symbols.is_computed(value):
            raise Unsupported("a condition on sizes, or a size that a call computes")
        return self.symbols.dim(value) if isinstance(value, torch.SymInt) else value

    def node_outputs(self, node: fx.Node) -> tuple[Value | None, ...]:
        """New values for the node's results; adds them to `env`."""
        content = _content(node)
        if content is None:
            self.env[node] = None
            return ()
        flat: list[Value | None] = []

        def enter(item: Any, used: bool = True) -> Any:
            if isinstance(item, dict):
                return {key: enter(part, used) for key, part in item.items()}
            if isinstance(item, tuple | list):
                return tuple(enter(part, used) for part in item)
            type_ = None if item is None or not used else self.type(item, opaque=True)
            if isinstance(type_, ScalarType) and isinstance(type_.dim, int):
                type_ = replace(type_, dim=None)  # what the data decides is no constant, whatever a check proves of it
            flat.append(None if type_ is None else self.next_value(type_))
            # The dim of a size that a fallback computes replaces the value from here on.
            return _dim_or_value(flat[-1])

        if isinstance(content, tuple | list):
            used = {user.args[1] for user in node.users if user.target is operator.getitem}
            self.env[node] = tuple(enter(item, index in used) for index, item in enumerate(content))
        else:
            self.env[node] = enter(content)
        return tuple(flat)

    def arguments(self, node: fx.Node) -> Arguments:
        found = tuple((name, self.attr(value)) for name, value in call_arguments(node))
        held = self.reads.get(found[0][1]) if node.target is WAIT_TENSOR else None  # type: ignore[arg-type]
        return (*found, ("held", held)) if held else found

    def attr(self, argument: Any) -> Attr:
        """An FX argument as an attribute of the IR."""
        if isinstance(argument, fx.Node):
            found = self.env[argument]
            if _is_module(self.gm, argument):
                raise Unsupported(f"an argument of type {type(found).__name__}")
            return found
        if isinstance(argument, PLAIN):
            return argument
        if isinstance(argument, list | tuple):
            return tuple(map(self.attr, argument))
        if isinstance(argument, torch.dtype):
            return aten.dtype_name(argument)
        if isinstance(argument, torch.device):
            return self.symbols.device(argument)
        if isinstance(argument, torch.memory_format):
            return str(argument).removeprefix("torch.")
        raise Unsupported(f"an argument of type {type(argument).__name__}")
