"""Makes a kernel node of each launch of a kernel that others wrote, so that it is compiled, planned and launched like a
generated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from torch_rtx import aten
from torch_rtx.foreign import Launch, filled_by_launches, launch_of
from torch_rtx.ir import MAIN, Graph, Node, TensorType, Value, attr_values
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import Rewriter, rewrite


def form_launches(graph: Graph, infer: Inference) -> Graph:
    """Level import to the same level. What a kernel writes first is not filled before: its memory becomes part of the
    kernel node. A launch with a number that the graph computes, or with tensors of another device, stays a call."""
    formed = {id(node): launch for node in graph.nodes if (launch := launch_of(node)) and _is_kernel(node, launch)}
    called = {value.name for node in graph.nodes if id(node) not in formed for value in node.inputs}
    filled = filled_by_launches(graph) - called
    blank = {v.name for node in graph.nodes if node.op in aten.UNINITIALIZED for v in node.results if v.name in filled}

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.results and blank.issuperset(value.name for value in node.results):
            return True
        launch = formed.get(id(node))
        if launch is not None:
            made = [value or rewriter.fresh(launch.tensors[at].type) for value, at in _pairs(node, launch)]
            rewriter.keep(_formed(replace(node, outputs=tuple(made)), launch, blank))
        return launch is not None

    return rewrite(graph, infer, visit)


def _pairs(node: Node, launch: Launch) -> Sequence[tuple[Value | None, int]]:
    return list(zip(node.outputs, launch.written, strict=True))


def _is_kernel(node: Node, launch: Launch) -> bool:
    types = [value.type for value in attr_values(tuple(attr for _, attr in node.args))]
    return bool(launch.written) and all(isinstance(t, TensorType) and t.device == MAIN for t in types)


def _formed(node: Node, launch: Launch, blank: set[str]) -> Node:
    """The kernel node of a launch. `blank`: the names of values whose contents nobody needs."""
    operands, fresh = dict[str, Value](), dict[str, Value]()
    for value in launch.tensors:
        (fresh if value.name in blank else operands)[value.name] = value
    # Equal launches have equal bodies, whatever their values are called.
    names = {name: f"a{index}" for index, name in enumerate(operands)}
    names |= {name: f"e{index}" for index, name in enumerate(fresh)}
    names |= {value.name: f"r{index}" for index, value in enumerate(node.results)}

    def inner(value: Value) -> Value:
        return Value(names[value.name], value.type)

    call = replace(node, args=node.map_inputs(inner), outputs=tuple(map(inner, node.results)), loc=None)
    nodes = (*(_empty(inner(value)) for value in fresh.values()), call)
    body = Graph("import", tuple(map(inner, operands.values())), nodes=nodes, outputs=tuple(map(inner, node.results)))
    digest = blake2b(str(body).encode(), digest_size=4).hexdigest()
    title = launch.kernel.rpartition("_")[0]
    args = tuple((f"in{index}", value) for index, value in enumerate(operands.values()))
    return Node("kernel", f"{title}_{digest}", args, node.outputs, body, node.loc)


def _empty(value: Value) -> Node:
    """A call that makes memory for `value`."""
    assert isinstance(value.type, TensorType)
    args = ("size", value.type.shape), ("stride", value.type.strides), ("dtype", value.type.dtype), ("device", MAIN)
    return Node("op", "aten.empty_strided.default", args, (value,))
