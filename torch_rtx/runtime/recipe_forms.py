"""When two recipes, or two calls of them, compute the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch_rtx.ir import Attr, Graph, Node, Value


def form_of(recipe: Graph) -> Hashable:
    """Equal for recipes that compute the same of inputs of the same types, whatever values are called."""
    numbers = {value.name: number for number, value in enumerate(recipe.values())}

    def numbered(value: Value) -> Hashable:
        return numbers[value.name], value.type

    calls = tuple(call_form(node, numbered) for node in recipe.nodes)
    return tuple(value.type for value in recipe.inputs), calls, _exact(recipe.outputs, numbered)


def call_form(node: Node, name: Callable[[Value], Hashable]) -> Hashable:
    """Equal for calls that compute the same of the same inputs.

    Args:
        name: stands for an input.
    """
    types = tuple(None if value is None else value.type for value in node.outputs)
    return node.op, node.body, tuple((key, _exact(attr, name)) for key, attr in node.args), types


def _exact(attr: Attr, name: Callable[[Value], Hashable]) -> Hashable:
    """The attribute; Python's own comparison takes zeros of both signs for equal, and numbers of several types."""
    if isinstance(attr, Value):
        return name(attr)
    if isinstance(attr, tuple):
        return tuple(_exact(item, name) for item in attr)
    return (type(attr), repr(attr)) if isinstance(attr, bool | int | float) else attr
