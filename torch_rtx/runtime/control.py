"""Runs control flow: the host asks a tensor, or knows, what runs next. `torch_rtx.control` says what the nodes mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from torch_rtx.control import given, written
from torch_rtx.ir import COND, LOOP, Node
from torch_rtx.runtime import conditional

Runner = Callable[..., list[Any]]  # `run(inputs, weights)`, see `code.Code`


class Owned(list[Any]):
    """Inputs that nothing but their call needs: the code empties the list as soon as each input has a name, so that it
    frees a tensor after its last use. Activations of a training step are such."""


def runner(node: Node, bodies: Sequence[Runner]) -> Callable[..., list[Any]]:
    """A function of the arguments of `node` that returns its results. The last of the operands are sizes; a scan gets
    one list more, tensors for the rows that it makes.

    Args:
        bodies: the code of `branches(node)`.
    """
    if node.op == COND:
        return partial(_condition, bodies[0], bodies[1])
    if node.op == LOOP:
        return partial(_stacked_loop, bodies[0]) if node.arg("stacked") else partial(_loop, bodies[0], written(node))
    return partial(_scan, bodies[0], len(given(node, "state")))


def _condition(then: Runner, otherwise: Runner, pred: Any, operands: list[Any]) -> list[Any]:
    if conditional.records(pred):
        return conditional.condition(then, otherwise, pred, operands)
    return (then if pred else otherwise)(operands, ())


def _loop(body: Runner, places: Sequence[int], state: list[Any], operands: list[Any]) -> list[Any]:
    if conditional.records(state[0]):
        return conditional.loop(body, state, operands)
    if not state[0]:
        return list(map(_copied, state))
    for place in places:
        state[place] = _copied(state[place])
    while state[0]:
        taken = Owned((*state, *operands))
        state.clear()  # so that the pass frees what the one before has made
        state = body(taken, ())
    return state


def _stacked_loop(body: Runner, state: list[Any], operands: list[Any]) -> list[Any]:
    passes = [] if state[0] else [state]
    while state[0]:
        state = body([*state, *operands], ())
        passes.append(state)
    return [torch.stack(column) for column in zip(*passes, strict=True)]


def _scan(
    body: Runner, count: int, state: list[Any], rows: list[Any], operands: list[Any], made: list[Any]
) -> list[Any]:
    if not rows[0].shape[0]:
        return [*map(_copied, state), *made]
    for number in range(rows[0].shape[0]):
        taken = Owned((*state, *(x[number] for x in rows), *operands))
        state.clear()
        results = body(taken, ())
        state = results[:count]
        for stack, row in zip(made, results[count:], strict=True):
            stack[number] = row
    return [*state, *made]


def _copied(value: Any) -> Any:
    """A result in memory of its own."""
    return value.clone() if isinstance(value, torch.Tensor) else value
