"""Gradients of what a modification of scores captures, in the joint graph module of a `flex_attention_backward`.

Each score adds to an element of a captured tensor's gradient: PyTorch writes `flex_lib.zeros_and_scatter` for a
look-up, and a number for a tensor without dimensions. These are the *sums*: an operator makes all of them at once
(`torch_rtx.flex_attention_grad_captured`). What the module does with them afterwards, such as the gradient of a table
that is computed of another, is linear, and is therefore done once, in the outer graph, with the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Value

aten = torch.ops.aten
SCATTER = "flex_lib.zeros_and_scatter.default"
LOOK_UPS = ("aten.index.Tensor", "aten._unsafe_index.Tensor")
WIDE = ("add", "sub", "mul", "div", "neg", "view", "reshape", "expand", "sum")  # take sums in f32 beside any dtype
PROBLEM = "a gradient of a captured tensor that is no sum over scores"
OF_SUMS = ("add", "sub")  # linear if all operands are sums
PRODUCTS = ("mul", "mm", "bmm", "mv", "dot")  # linear in each operand
OF_ONE = (  # linear in the first operand
    *("div", "neg", "_to_copy", "clone", "detach", "alias", "view", "_unsafe_view", "reshape", "expand"),
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "select", "slice", "sum", "select_backward"),
    *("slice_backward", "sigmoid_backward", "tanh_backward", "gelu_backward", "silu_backward", "softplus_backward"),
    *("threshold_backward", "_softmax_backward_data", "cumsum", "flip", "roll", "repeat"),
)


@dataclass(frozen=True)
class Added:
    """A number for each score, and the place of the element that it is added to."""

    number: Value
    places: tuple[Value, ...]


@dataclass(eq=False)
class Sum:
    """A sum over scores.

    Attributes:
        like: a tensor of the size and dtype of the result.
    """

    added: tuple[Added, ...]
    like: torch.Tensor

    def size(self) -> tuple[int, ...]:
        """The size of the tensor.

        Raises:
            Unsupported: it is open.
        """
        if not all(isinstance(one, int) for one in self.like.shape):
            raise Unsupported("gradients of a captured tensor of an open size")
        return tuple(self.like.shape)


@dataclass(frozen=True)
class Later:
    """What is computed of sums, a node of the joint graph."""

    node: fx.Node


@dataclass
class Gradients:
    """The sums of one joint graph module, and what is done with them.

    Attributes:
        env: what nodes stand for; shared with who writes the text.
        widened: finds what a number was before it was rounded.
        sums: those that are needed as tensors.
        later: the calls that are made of these.
    """

    env: dict[fx.Node, Any]
    widened: Callable[[Value], Value]
    sums: list[Sum] = field(default_factory=list)
    later: list[fx.Node] = field(default_factory=list)
    _numbers: dict[fx.Node, Sum] = field(default_factory=dict)

    def takes(self, node: fx.Node) -> bool:
        """A call makes a sum, or is of sums."""
        read = [self.env.get(one) for one in node.all_input_nodes]
        is_wide = isinstance(like := node.meta.get("val"), torch.Tensor) and like.dim() > 0
        is_wide = is_wide and str(node.target) not in LOOK_UPS
        made = str(node.target) == SCATTER or (is_wide and any(isinstance(one, Value) for one in read))
        return made or any(isinstance(one, Sum | Later) for one in read)

    def call(self, node: fx.Node) -> Sum | Later:
        """What a call makes.

        Raises:
            Unsupported: it is not linear, or reads something of each score.
        """
        name = _name(node)
        if str(node.target) == SCATTER:
            return self._scatter(node)
        listed = {at: self._given(one) for at, one in enumerate(node.args) if isinstance(one, fx.Node)}
        at = [index for index, one in listed.items() if isinstance(one, Sum | Later)]
        of_scores = [listed[index] for index in at]
        if name in OF_SUMS and at == [0, 1]:
            first, second = of_scores
            joined = name == "add" and not node.kwargs and isinstance(first, Sum) and isinstance(second, Sum)
            if joined and first.like.shape == second.like.shape:
                return Sum((*first.added, *second.added), node.meta["val"])
        elif not (at == [0] and name in OF_ONE) and not (len(at) == 1 and name in PRODUCTS):
            raise Unsupported(PROBLEM)
        if isinstance(of_scores[0], Sum) and name in ("clone", "detach", "alias"):
            return of_scores[0]
        self.later.append(node)
        for one in of_scores:
            self.need(one)
        return Later(node)

    def _scatter(self, node: fx.Node) -> Sum:
        _, places, number = node.args
        found = self._given(number)  # type: ignore[arg-type]
        listed = tuple(self.env[one] for one in places)  # type: ignore[union-attr, index]
        if not isinstance(found, Sum) or not all(isinstance(one, Value) for one in listed):
            raise Unsupported(PROBLEM)
        return Sum(tuple(Added(one.number, (*listed, *one.places)) for one in found.added), node.meta["val"])

    def _given(self, node: fx.Node) -> Any:
        """What a node stands for, with a number of each score as a sum of all."""
        found = self.env[node]
        if isinstance(found, Value) and node not in self._numbers:
            self._numbers[node] = Sum((Added(self.widened(found), ()),), node.meta["val"])
        return self._numbers.get(node, found)

    def result(self, node: fx.Node) -> Any:
        """A gradient, which has to be there."""
        made = self._given(node)
        self.need(made)
        return made

    def need(self, one: Any) -> None:
        """A sum has to be there as a tensor."""
        if isinstance(one, Sum) and one not in self.sums:
            one.size()
            self.sums.append(one)

    def texts(self) -> tuple[list[Value], dict[str, list[int]]]:
        """The outputs of the text, and the arguments that say what they are."""
        outputs, targets = list[Value](), list[int]()
        for index, one in enumerate(self.sums):
            rank = len(one.size())
            for added in one.added:
                if len(added.places) != rank:
                    raise Unsupported(PROBLEM)
                outputs += [added.number, *added.places]
                targets.append(index)
        sizes = [size for one in self.sums for size in one.size()]
        return outputs, {"sizes": sizes, "ranks": [len(one.size()) for one in self.sums], "targets": targets}

    def finish(self, total: fx.Node | None, emit: Callable[..., fx.Node]) -> Callable[[Any], Any]:
        """Write what is done with the sums to the outer graph; returns what finds the node of a gradient there.

        Args:
            total: all sums, one after the other; None if there are none.
            emit: writes a call.
        """
        made = dict[Sum, fx.Node]()
        starts = [sum(math.prod(one.size()) for one in self.sums[:index]) for index in range(len(self.sums))]
        for start, one in zip(starts, self.sums, strict=True):
            part = emit(aten.slice.Tensor, (total, 0, start, start + math.prod(one.size())))
            made[one] = emit(aten.view.default, (part, list(one.size())))
        calls = dict[fx.Node, fx.Node]()

        def outer(found: Any, is_wide: bool = False) -> Any:
            if not isinstance(found, Sum | Later):
                return found
            tensor = made[found] if isinstance(found, Sum) else calls[found.node]
            like = found.like if isinstance(found, Sum) else found.node.meta["val"]
            return tensor if is_wide else _cast(tensor, like, emit)

        for node in self.later:
            is_wide = _name(node) in WIDE
            given = {one: outer(self._given(one), is_wide) for one in node.all_input_nodes}
            args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
            calls[node] = emit(node.target, args, kwargs)
        return outer


def _name(node: fx.Node) -> str:
    """ "mul" for `aten.mul.Tensor`; "" for what is no operator of ATen."""
    namespace, *rest = str(node.target).split(".")
    return rest[0] if namespace == "aten" and len(rest) == 2 else ""


def _cast(tensor: fx.Node, like: torch.Tensor, emit: Callable[..., fx.Node]) -> fx.Node:
    """A sum, which is as exact as it can be, in the dtype that it has in PyTorch."""
    if like.dtype == tensor.meta["val"].dtype:
        return tensor
    return emit(aten._to_copy.default, (tensor,), {"dtype": like.dtype})


def total_of(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """The elements of all sums."""
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    return sum(math.prod(sizes[start : start + rank]) for start, rank in zip(starts, ranks, strict=True))
