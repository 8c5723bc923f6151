"""Control flow: nodes that run a graph as often as data says.

They are fallbacks with a body, so that passes leave them in their places and their operands in memory.

    torch_rtx.cond(pred, operands)            the body is two calls, `torch_rtx.call(operands)`, each with a body of its
                                              own: the first one runs if `pred` holds, else the second one
    torch_rtx.while_loop(state, operands)     the body takes the state and the operands, and returns the state. It runs
                                              while the first value of the state, a truth value, holds. `stacked`: the
                                              results are the states after each pass; without a pass, that before it.
                                              It may write to state that it returns
    torch_rtx.scan(state, rows, operands)     the body takes the state, a row of each tensor of `rows`, and the
                                              operands; it returns the state and other rows, which are stacked

Types of operands and results are those of the body except for strides: code that makes or takes tensors sees to these.
A body may name symbols of the graph around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch_rtx.errors import InvalidIR
from torch_rtx.ir import (
    CALL,
    COND,
    CONTROL,
    LOOP,
    SCAN,
    Dim,
    Graph,
    Node,
    ScalarType,
    Sym,
    TensorType,
    Value,
    attr_values,
)

Kind = tuple[str, tuple[Dim, ...], str]  # dtype or kind of number, shape, device


def is_control(node: Node) -> bool:
    """Whether the node is control flow."""
    return node.body is not None and node.op in CONTROL


def given(node: Node, name: str) -> list[Value]:
    """The values in an argument."""
    return [*attr_values(node.arg(name))]


def branches(node: Node) -> list[Graph]:
    """The bodies of the calls of a condition, or the body of other control flow."""
    assert node.body is not None  # by the verifier
    return [part.body for part in node.body.nodes if part.body] if node.op == COND else [node.body]


def written(node: Node) -> list[int]:
    """The places in the state of a loop that a pass writes to in place of returning other values there."""
    assert node.body is not None
    pairs = zip(node.body.inputs[: len(given(node, "state"))], node.body.outputs, strict=False)
    return [place for place, (old, new) in enumerate(pairs) if old == new and old.name in node.body.written]


def with_bodies(node: Node, fn: Callable[[Graph], Graph]) -> Node:
    """`node` with `fn` applied to each of its `branches`."""
    body = node.body
    if body is None or not is_control(node):
        return node
    if node.op != COND:
        return replace(node, body=fn(body))
    parts = (replace(part, body=None if part.body is None else fn(part.body)) for part in body.nodes)
    return replace(node, body=replace(body, nodes=tuple(parts)))


def all_syms(body: Graph) -> dict[str, Sym]:
    """The symbols in a body and in those inside of it, by name."""
    found = dict(body.syms)
    for node in filter(is_control, body.nodes):
        for inner in branches(node):
            found |= all_syms(inner)
    return found


def check_all(graph: Graph) -> None:
    """`check` all control flow in a graph, and in its bodies."""
    for node in filter(is_control, graph.nodes):
        check(node)
        for body in branches(node):
            check_all(body)


def check(node: Node) -> None:
    """Check the types of control flow, whose bodies `verify` has accepted.

    Raises:
        InvalidIR: bodies do not fit the operands and results.
    """
    assert node.body is not None
    bodies, takes, makes = branches(node), _kinds(node.inputs), _kinds(node.outputs)
    state = len(given(node, "state"))
    if node.op == CALL:
        raise InvalidIR("a call that is no branch of a condition", loc=node.loc)
    if node.op == COND:
        parts = node.body.nodes
        if len(bodies) != 2 or len(parts) != 2 or any(part.op != CALL for part in parts):
            raise InvalidIR("the body of a condition must be two calls", loc=node.loc)
        if not isinstance(node.arg("pred"), Value) or takes.pop(0)[0] != "bool":
            raise InvalidIR("a condition must have a truth value", loc=node.loc)
    elif node.op == LOOP:
        stacked = node.arg("stacked", False)
        makes = [_row(kind) if stacked else kind for kind in makes]
        if not state or takes[0][0] != "bool" or makes != takes[:state]:
            raise InvalidIR("a loop must return its state, which begins with a truth value", loc=node.loc)
        if len(written(node)) != len(node.body.written) or (stacked and node.body.written):
            raise InvalidIR("a loop may write only to state that it returns", loc=node.loc)
    elif node.op == SCAN:
        rows = state + len(given(node, "rows"))
        if rows == state or len({kind[1][:1] for kind in (*takes[state:rows], *makes[state:])}) != 1:
            raise InvalidIR("a scan must have rows, and all tensors as many", loc=node.loc)
        takes[state:rows] = map(_row, takes[state:rows])
        makes[state:] = map(_row, makes[state:])
    for body in bodies:
        if _kinds(body.inputs) != takes or _kinds(_values(body)) != makes:
            raise InvalidIR(f"a body of {node.op} does not have the types of its operands and results", loc=node.loc)


def _values(body: Graph) -> list[Value]:
    return [value for value in body.outputs if isinstance(value, Value)]


def _kinds(values: Sequence[Value | None]) -> list[Kind]:
    """What must be the same inside and outside of a body. Results that nothing reads exist, too."""
    if any(value is None for value in values):
        raise InvalidIR("control flow must name all of its results")
    types = [value.type for value in values if value is not None]
    return [(t.dtype, t.shape, t.device) if isinstance(t, TensorType) else _number(t) for t in types]


def _number(type_: ScalarType) -> Kind:
    return type_.kind, (), ""


def _row(kind: Kind) -> Kind:
    dtype, shape, device = kind
    if not shape:
        raise InvalidIR("a tensor without dimensions has no rows")
    return dtype, shape[1:], device
