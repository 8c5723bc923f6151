"""From an ONNX graph to steps: each calls an operator with values from numbered slots.

Functions of the model are put in the place of their calls. Graphs of If, Loop and Scan are `Body`s, which read the
slots around them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import zip_longest
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from torch_rtx.errors import OnnxError
from torch_rtx.onnx import host, reader
from torch_rtx.onnx import ops as _declared  # noqa: F401
from torch_rtx.onnx.formulas import computed, formula
from torch_rtx.onnx.ops.cast import cast_in
from torch_rtx.onnx.registry import REFUSED, TOLD, Operator, find

GRADIENT = "ai.onnx.preview.training.Gradient"
CONTROL = ("If", "Loop", "Scan", GRADIENT)
# By these PyTorch's exporter says which initializers are a module's tensors, and what it computed others from.
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
FOLDED = "pkg.onnxscript.optimizer.folded_from"
COMPUTED = Operator("Constant", "", 1, (), computed)
_signature = cache(inspect.signature)
Slots = tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """A node.

    Attributes:
        name, op, file: for errors.
        inputs, outputs: slots; None: the node does not have this one.
        operator: None for what only the host computes, and for control flow.
        ints, state: for each input, whether it arrives as a list of numbers, and whether nothing learns it.
        told: the operator's parameters for what it is told of the node.
        bodies: the graphs among the attributes.
        frees: slots that no later step reads.
        scopes: the modules that PyTorch's exporter made the node from, a list as text; or empty.
    """

    name: str
    op: str
    file: str | None
    inputs: Slots
    outputs: Slots
    attributes: Mapping[str, Any]
    operator: Operator | None
    ints: tuple[bool, ...] = ()
    state: tuple[bool, ...] = ()
    told: tuple[str, ...] = ()
    bodies: Mapping[str, Body] = field(default_factory=dict)
    frees: tuple[int, ...] = ()
    scopes: str = ""

    def error(self, message: str, hint: str | None = None) -> OnnxError:
        """An error at this node."""
        return OnnxError(message, file=self.file, node=self.name, op=self.op, hint=hint)

    def reads(self) -> Iterator[int]:
        """The slots that the step reads, those that its bodies read included."""
        yield from (slot for slot in self.inputs if slot is not None)
        for body in self.bodies.values():
            yield from body.captured


@dataclass(frozen=True)
class Body:
    """A graph inside a node: `captured` are the slots that it reads from around it."""

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    captured: tuple[int, ...]


@dataclass
class Weight:
    """A tensor of the model: an initializer, or what a Constant node holds.

    Attributes:
        constant: it came from a Constant node, or the exporter made it.
        made: the exporter made it, from no tensor of a module.
        known: it takes part in the arithmetic of sizes, and so belongs to the program.
        state: operators read it only as what nothing learns.
    """

    name: str
    slot: int
    tensor: Tensor
    constant: bool
    known: bool = False
    state: bool = False
    made: bool = False


@dataclass
class Plan:
    """The steps of a model, with its tensors.

    Attributes:
        copies: the slots of tensors by the names that Identity nodes of the model's graph give them, too.
    """

    steps: tuple[Step, ...]
    weights: list[Weight]
    inputs: list[int]
    outputs: list[int]
    copies: dict[str, int]


def plan(model: ir.Model, file: str | None, fixed: Mapping[str, Tensor], mapped: bool = False) -> Plan:
    """The plan of a checked model.

    Args:
        fixed: inputs that have one value in every call, by name.
        mapped: see `reader.data`.

    Raises:
        OnnxError: an operator is not known, or has attributes that it does not take.
    """
    planner = _Planner(model, file, mapped)
    graph = model.graph
    inputs = [planner.slot(value) for value in graph.inputs]
    for value in graph.inputs:
        if value.name is not None and value.name in fixed:
            planner.weight(value, fixed[value.name], _Scope({}, {}))
    planner.initializers(graph)
    steps = planner.steps(graph, _Scope(dict(graph.opset_imports), {}))
    outputs = [planner.slot(value) for value in graph.outputs]
    known = _known_slots(steps, planner.weights)
    uses = {use for step in every(steps) for use in zip_longest(step.inputs, step.state, fillvalue=False)}
    for weight in planner.weights.values():
        weight.known = weight.slot in known or weight.name in fixed
        weight.state = (weight.slot, True) in uses and (weight.slot, False) not in uses
    copies = planner.copies(graph)
    steps = [*planner.described(), *steps]
    return Plan(tuple(_freeing(steps, {*inputs, *outputs})), list(planner.weights.values()), inputs, outputs, copies)


@dataclass(frozen=True)
class _Scope:
    """Where a node is: the versions of the operators there, and the values of a function's attributes."""

    opsets: Mapping[str, int]
    attributes: Mapping[str, ir.Attr]
    prefix: str = ""
    calls: tuple[Any, ...] = ()


class _Planner:
    def __init__(self, model: ir.Model, file: str | None, mapped: bool) -> None:
        self.file, self.functions, self.mapped = file, model.functions, mapped
        self.slots: dict[ir.Value, int | None] = {}  # None: an input that a function was not given
        self.count = 0
        self.weights: dict[int, Weight] = {}
        self.names: set[str] = set()
        self.has_initializers = False

    def slot(self, value: ir.Value) -> Any:
        """The slot of a value."""
        if value not in self.slots:
            self.slots[value] = self.count
            self.count += 1
        return self.slots[value]

    def weight(self, value: ir.Value, tensor: Tensor, scope: _Scope | None = None, made: bool = False) -> None:
        """Add a tensor of the model. `scope`: where the constant is that it comes from."""
        name = (scope.prefix if scope else "") + (value.name or "constant")
        while name in self.names:
            name += "_"
        self.names.add(name)
        slot = self.slot(value)
        self.weights[slot] = Weight(name, slot, tensor, scope is not None, made=made)

    def described(self) -> Iterator[Step]:
        """The steps that compute, by a formula, what an exporter wrote as a tensor; of that one number is left."""
        for weight in list(self.weights.values()):
            indices = weight.constant and weight.tensor.dtype in (torch.int64, torch.bool)
            found = formula(weight.tensor) if (indices or weight.made) and not weight.known else None
            if found is not None:
                target, weight.slot, weight.tensor = weight.slot, self.count, weight.tensor.reshape(-1)[:1]
                self.count += 1
                yield Step(
                    name=weight.name,
                    op="Constant",
                    file=self.file,
                    inputs=(weight.slot,),
                    outputs=(target,),
                    attributes={"formula": found},
                    operator=COMPUTED,
                    ints=(False,),
                    state=(False,),
                )

    def initializers(self, graph: ir.Graph) -> None:
        """Add the initializers of a graph; those that an exporter made count as Constant nodes."""
        marks = {
            mark for value in graph.initializers.values() for mark in (KIND, FOLDED) if mark in value.metadata_props
        }
        for value in graph.initializers.values():
            if value.const_value is not None and self.slots.get(value) not in self.weights:
                made = bool(marks) and _made_by_exporter(value, graph, KIND in marks)
                self.weight(
                    value,
                    reader.data(value.const_value, self.file, self.mapped),
                    _Scope({}, {}) if made else None,
                    made,
                )
                self.has_initializers |= not made

    def copies(self, graph: ir.Graph) -> dict[str, int]:
        """The names that Identity nodes of a graph give its tensors: an exporter stores equal ones once."""
        found: dict[str, int] = {}
        for node in graph:
            if (node.domain, node.op_type) in (("", "Identity"), ("ai.onnx", "Identity")) and node.inputs[0]:
                name, slot = node.inputs[0].name or "", self.slots.get(node.inputs[0])
                slot = found.get(name, slot if slot in self.weights else None)
                if slot is not None and node.outputs[0].name:
                    found[node.outputs[0].name] = slot
        return found

    def steps(self, nodes: Sequence[ir.Node] | ir.Graph, scope: _Scope) -> list[Step]:
        """The steps of nodes, in their order."""
        found: list[Step] = []
        for node in nodes:
            found += self.node(node, scope, found)
        return found

    def node(self, node: ir.Node, scope: _Scope, before: Sequence[Step]) -> Iterator[Step]:
        """The steps of a node: none for a constant, several for the call of a function."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        name, op = scope.prefix + (node.name or ""), f"{domain}.{node.op_type}".lstrip(".")
        step = Step(name, op, self.file, (), (), {}, None)
        attributes = _attributes(node, scope, step)
        if domain == "" and node.op_type == "Constant":
            # What nobody made is among the initializers, if there are any.
            self.weight(node.outputs[0], self.constant(attributes, step), scope, self.has_initializers)
            return
        function = self.functions.get(node.op_identifier()) or _composed(node, domain, scope, step)
        if function is not None:
            yield from self.call(node, function, attributes, scope, step)
            return
        inputs = tuple(None if value is None else self.slot(value) for value in node.inputs)
        bodies = {key: self.body(attr.value, scope) for key, attr in attributes.items() if _is_graph(attr)}
        values = {key: self.attribute(attr) for key, attr in attributes.items() if not _is_graph(attr)}
        if op == GRADIENT:
            bodies = {"y": self.recomputed(node, values, before, step)}
        outputs = tuple(self.slot(value) if value.name else None for value in node.outputs)
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        step = replace(step, inputs=inputs, outputs=outputs, attributes=values, bodies=bodies, scopes=scopes)
        yield self.bound(step, domain, node.op_type, scope, attributes)

    def bound(self, step: Step, domain: str, name: str, scope: _Scope, attributes: Mapping[str, ir.Attr]) -> Step:
        """The step with its operator, whose parameters are checked."""
        version = _version(domain, scope)
        if version is None:
            raise step.error(f"the model imports no operators of the domain {domain or 'ai.onnx'!r}")
        _check_attributes(attributes, domain, name, version, step)
        if step.op in CONTROL or step.op in host.OF_TENSORS:
            return step
        operator = find(domain, name, version)
        if operator is None:
            reason = REFUSED.get((domain, name))
            raise step.error(f"the operator {step.op} of version {version} is not supported", reason)
        taken = _signature(operator.function).parameters
        positional = [p for p in taken.values() if p.kind is not p.KEYWORD_ONLY]
        told = tuple(name for name in TOLD if name in taken)
        given = {**step.attributes, **dict.fromkeys(told)}
        try:
            _signature(operator.function).bind(*step.inputs, **given)
        except TypeError as error:
            raise step.error(f"the node does not fit the operator: {error}") from None
        names = [positional[min(number, len(positional) - 1)].name for number in range(len(step.inputs))]
        ints, state = (tuple(name in kind for name in names) for kind in (operator.ints, operator.state))
        return replace(step, operator=operator, ints=ints, state=state, told=told)

    def body(self, graph: ir.Graph, scope: _Scope) -> Body:
        """A graph inside a node."""
        self.initializers(graph)
        inputs = tuple(self.slot(value) for value in graph.inputs)
        steps = self.steps(graph, scope)
        return _body(steps, inputs, tuple(self.slot(value) for value in graph.outputs))

    def recomputed(self, node: ir.Node, attributes: Mapping[str, Any], before: Sequence[Step], step: Step) -> Body:
        """The steps that make the value `y` of other values of the graph, the `xs` and `zs`."""
        named = {value.name: value for one in node.graph or () for value in one.outputs}
        named |= {value.name: value for value in (node.graph.inputs if isinstance(node.graph, ir.Graph) else ())}
        names = [*attributes["xs"], *attributes.get("zs", ())]
        unknown = [name for name in [attributes["y"], *names] if name not in named]
        if unknown or len(names) != len(node.inputs):
            raise step.error(
                f"there is no value {unknown[0]!r}" if unknown else "the inputs are not those of xs and zs"
            )
        inputs, output = tuple(self.slot(named[name]) for name in names), self.slot(named[attributes["y"]])
        needed, found = {output} - {*inputs}, []
        for one in reversed(before):
            if needed & {*one.outputs}:
                found.append(one)
                needed |= {*one.reads()} - {*inputs}
        return _body(found[::-1], inputs, (output,))

    def call(
        self, node: ir.Node, function: ir.Function, attributes: Mapping[str, ir.Attr], scope: _Scope, step: Step
    ) -> Iterator[Step]:
        """The steps of a function, with the slots of the call's inputs and outputs."""
        if function.identifier() in scope.calls:
            raise step.error("the function calls itself")
        if len(node.inputs) > len(function.inputs):
            raise step.error(f"the function takes {len(function.inputs)} inputs, not {len(node.inputs)}")
        # A body is planned once for each call, with slots of its own.
        outer, self.slots = self.slots, dict(self.slots)
        for value in function_values(function):
            self.slots.pop(value, None)
        for parameter, argument in zip_longest(function.inputs, node.inputs):
            self.slots[parameter] = None if argument is None else outer[argument]
        given = {attr.name: attr for attr in function.attributes.values() if attr.value is not None} | dict(attributes)
        prefix = f"{scope.prefix}{node.name or function.name}/"
        inner = _Scope(dict(function.opset_imports), given, prefix, (*scope.calls, function.identifier()))
        yield from self.steps(function.graph, inner)
        results = [self.slots[value] for value in function.outputs]
        self.slots = outer
        for value, slot in zip(node.outputs, results, strict=False):
            if value.name:
                outer[value] = slot

    def constant(self, attributes: Mapping[str, ir.Attr], step: Step) -> Tensor:
        """What a Constant node holds."""
        kinds = {
            "value_int": torch.int64,
            "value_ints": torch.int64,
            "value_float": torch.float32,
            "value_floats": torch.float32,
        }
        for name, attr in attributes.items():
            if name == "value":
                return reader.data(attr.value, self.file)
            if name in kinds:
                return torch.tensor(attr.value, dtype=kinds[name])
        raise step.error(f"constants of kind {', '.join(attributes) or 'none'} are not supported")

    def attribute(self, attr: ir.Attr) -> Any:
        """The value of an attribute: Python numbers, strings and lists, and tensors."""
        if attr.type is ir.AttributeType.TENSOR:
            return reader.data(attr.value, self.file)
        if attr.type is ir.AttributeType.TENSORS:
            return [reader.data(tensor, self.file) for tensor in attr.value]
        return list(attr.value) if isinstance(attr.value, tuple | list) else attr.value


def _body(steps: Sequence[Step], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Body:
    made = {*inputs, *(slot for step in steps for slot in step.outputs)}
    read = dict.fromkeys([slot for step in steps for slot in step.reads()] + list(outputs))
    return Body(tuple(steps), inputs, outputs, tuple(slot for slot in read if slot not in made))


def _made_by_exporter(value: ir.Value, graph: ir.Graph, marked: bool) -> bool:
    """Whether an initializer is neither a tensor of the module that was exported nor computed from one.

    Args:
        marked: those of the module are marked; other tools drop the marks, but keep the exporter's names.
    """
    sources = re.findall(r"'([^']*)'", value.metadata_props.get(FOLDED, ""))
    signature = graph.metadata_props.get(SIGNATURE)
    own = [name for name in sources if ("." in name if signature is None else f"target='{name}'" in signature)]
    named = marked or re.fullmatch(r"val_\d+", value.name or "") is not None
    return KIND not in value.metadata_props and named and not own


def _version(domain: str, scope: _Scope) -> int | None:
    return scope.opsets.get(domain, scope.opsets.get("ai.onnx") if domain == "" else None)


def _composed(node: ir.Node, domain: str, scope: _Scope, step: Step) -> ir.Function | None:
    """ONNX's own definition of an operator by others, for one that has no declaration; None: there is none."""
    version = _version(domain, scope)
    if version is None or node.op_type in CONTROL or find(domain, node.op_type, version) is not None:
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    stored = _definition(schema, node, version, scope)
    if stored is None:
        return None
    proto = onnx.FunctionProto.FromString(stored)
    defaults = [
        ir.serde.deserialize_attribute(attribute.default_value)
        for attribute in schema.attributes.values()
        if attribute.default_value.name
    ]
    function = ir.serde.deserialize_function(proto)
    function.graph.opset_imports.setdefault("", scope.opsets.get("", reader.NEWEST))
    return ir.Function(domain, node.op_type, graph=function.graph, attributes=defaults)


def _definition(schema: Any, node: ir.Node, version: int, scope: _Scope) -> bytes | None:
    """The function that defines an operator; some depend on the types of the inputs, which functions do not know."""
    versions = [number for number in schema.function_opset_versions if number <= version]
    if versions:
        return schema.get_function_with_opset_version(max(versions))
    versions = [number for number in schema.context_dependent_function_opset_versions if number <= version]
    if not versions or scope.calls or any(value is not None and value.type is None for value in node.inputs):
        return None
    types = [onnx.TypeProto() for _ in node.inputs]
    for value, proto in zip(node.inputs, types, strict=True):
        if value is not None and value.type is not None:
            ir.serde.serialize_type_into(proto, value.type)
            if value.shape is not None:
                ir.serde.serialize_shape_into(proto, value.shape)
    return schema.get_context_dependent_function_with_opset_version(
        max(versions), ir.serde.serialize_node(node).SerializeToString(), [one.SerializeToString() for one in types]
    )


def _check_attributes(attributes: Mapping[str, ir.Attr], domain: str, name: str, version: int, step: Step) -> None:
    """Raises OnnxError if an attribute has another type than ONNX gives it."""
    try:
        declared: Any = onnx.defs.get_schema(name, version, domain).attributes
    except onnx.defs.SchemaError:
        return
    for key, attr in attributes.items():
        if key in declared and declared[key].type.name != attr.type.name:
            raise step.error(f"attribute {key!r} is of type {attr.type.name}, not {declared[key].type.name}")


def function_values(function: ir.Function) -> Iterator[ir.Value]:
    """The values that a function makes, in its subgraphs too, and its inputs."""
    yield from function.inputs
    for node in ir.traversal.RecursiveGraphIterator(function.graph):
        yield from node.outputs
        for attr in node.attributes.values():
            if _is_graph(attr):
                yield from attr.value.inputs
                yield from attr.value.initializers.values()


def _is_graph(attr: ir.Attr) -> bool:
    return attr.type is ir.AttributeType.GRAPH and not attr.is_ref()


def _attributes(node: ir.Node, scope: _Scope, step: Step) -> dict[str, ir.Attr]:
    """The attributes of a node; of those that refer to a function's, what the call gives."""
    found = {}
    for name, attr in node.attributes.items():
        given = scope.attributes.get(attr.ref_attr_name or "") if attr.is_ref() else attr
        if given is not None:
            if given.type is not attr.type:
                raise step.error(f"attribute {name!r} is {given.type.name}, not {attr.type.name}")
            found[name] = given
    return found


def in_dtype(steps: Sequence[Step], dtype: torch.dtype) -> tuple[Step, ...]:
    """The steps of a module that has another dtype for float32. Arithmetic of sizes stays as it is."""
    return tuple(_in_dtype(step, dtype) for step in steps)


def _in_dtype(step: Step, dtype: torch.dtype) -> Step:
    bodies = {name: replace(body, steps=in_dtype(body.steps, dtype)) for name, body in step.bodies.items()}
    attributes = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.dtype is torch.float32 else value
        for name, value in step.attributes.items()
    }
    operator = step.operator
    if step.op == "Cast" and step.attributes.get("to") == onnx.TensorProto.FLOAT and operator is not None:
        operator = replace(operator, function=partial(cast_in, dtype))
    return replace(step, bodies=bodies, attributes=attributes, operator=operator)


# ---- analyses --------------------------------------------------------------------------------------------------------


def every(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, each followed by those of its bodies."""
    for step in steps:
        yield step
        for body in step.bodies.values():
            yield from every(body.steps)


def _known_slots(steps: Sequence[Step], weights: Mapping[int, Weight]) -> set[int]:
    """The tensors of the model that shape others: wanted as integers, or computed with sizes."""
    small = {slot for slot, weight in weights.items() if host.fits(weight.tensor)}
    integral = {slot for slot in small if not weights[slot].tensor.is_floating_point()}
    known: set[int] = set()
    computed: set[int] = set()
    for step in every(steps):
        wanted = {slot for slot, ints in zip(step.inputs, step.ints, strict=False) if ints and slot in weights}
        known |= {slot for slot in wanted if slot is not None}
        inputs = {slot for slot in step.inputs if slot is not None}
        if step.op in CONTROL:
            known |= inputs & integral
        lone = {slot for slot in inputs & small if weights[slot].tensor.numel() == 1}
        if "known" in step.told:
            known |= lone - {step.inputs[0]}
        if "constants" in step.told:
            known |= {slot for slot in lone if weights[slot].constant}
        if step.op in host.OF_TENSORS or _on_host(step, inputs, computed, small, integral):
            computed |= {slot for slot in step.outputs if slot is not None}
            known |= inputs & small
    return known


def _on_host(step: Step, inputs: set[int], computed: set[int], small: set[int], integral: set[int]) -> bool:
    if step.op not in host.HOST_OPS or not inputs:
        return False
    # A weight that is expanded to a computed size, or looked up at a computed position, is a weight all the same.
    sizes = {step.inputs[0]} & inputs if step.op in host.MOVES else inputs
    return inputs <= computed | integral or (inputs <= computed | small and bool(sizes & computed))


def _freeing(steps: Sequence[Step], kept: set[int]) -> Iterator[Step]:
    """The steps with the slots that nothing reads after each."""
    last = {slot: number for number, step in enumerate(steps) for slot in (*step.outputs, *step.reads())}
    by_step: dict[int, list[int]] = {}
    for slot, number in last.items():
        if slot is not None and slot not in kept:
            by_step.setdefault(number, []).append(slot)
    for number, step in enumerate(steps):
        yield replace(step, frees=tuple(by_step.get(number, ())))
