"""Specializes graphs for given sizes: replaces symbols by numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch_rtx.ir import Attr, Dim, Expr, Graph, Node, ScalarType, Sym, Type, Value, dim_expr


def bind(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """`graph` with numbers in place of the symbols in `sizes`: in types, arguments and bodies."""
    if not any(name in sizes for name in graph.syms):
        return graph
    return replace(
        graph,
        inputs=tuple(_value(value, sizes) for value in graph.inputs),
        nodes=tuple(bind_node(node, sizes) for node in graph.nodes),
        outputs=tuple(_attr(attr, sizes) for attr in graph.outputs),
    )


def bind_node(node: Node, sizes: Mapping[str, int]) -> Node:
    """As `bind`, for one node."""
    return Node(
        node.kind,
        node.op,
        tuple((name, _attr(attr, sizes)) for name, attr in node.args),
        tuple(None if value is None else _value(value, sizes) for value in node.outputs),
        None if node.body is None else bind(node.body, sizes),
        node.loc,
    )


def _attr(attr: Attr, sizes: Mapping[str, int]) -> Attr:
    if isinstance(attr, Value):
        return _value(attr, sizes)
    if isinstance(attr, tuple):
        return tuple(_attr(item, sizes) for item in attr)
    return bind_dim(attr, sizes) if isinstance(attr, Sym | Expr) else attr


def _value(value: Value, sizes: Mapping[str, int]) -> Value:
    return Value(value.name, _type(value.type, sizes))


def _type(type_: Type, sizes: Mapping[str, int]) -> Type:
    if isinstance(type_, ScalarType):
        return type_ if type_.dim is None else replace(type_, dim=bind_dim(type_.dim, sizes))
    shape, strides = (tuple(bind_dim(dim, sizes) for dim in dims) for dims in (type_.shape, type_.strides))
    return replace(type_, shape=shape, strides=strides)


def bind_dim(dim: Dim, sizes: Mapping[str, int]) -> Dim:
    """As `bind`, for one dim."""
    if isinstance(dim, Sym):
        return sizes.get(dim.name, dim)
    return dim_expr(dim.op, *(bind_dim(arg, sizes) for arg in dim.args)) if isinstance(dim, Expr) else dim
