"""Transposed convolutions as convolutions of the same image.

With a stride of s, the position s * q + r of the result is the sum over j of x[q - j] * w[s * j + r]: a convolution for
each remainder r, its *phase*, and all of them read the same window. One convolution computes all phases, as channels,
which are then put in their places (Shi et al., 2016): address arithmetic of whatever reads the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch_rtx.ir import Attr, Dim, Loc, Node, TensorType, Value, dim_expr
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, Values, type_of
from torch_rtx.lowering.rewrite import Rewriter

TRANSPOSED = frozenset(("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"))
CONVOLUTION = "aten.convolution.default"
MOST_PADDING = 2.5  # multiplications of a window padded to whole strides, relative to those of the window
Sizes = tuple[int, ...]


def is_transposed(node: Node) -> bool:
    """Whether `node` is a transposed convolution."""
    return node.op in TRANSPOSED or (node.op == CONVOLUTION and node.arg("transposed") is True)


class Calls(BodyBuilder):
    """Calls in the graph that `rewriter` builds."""

    def __init__(self, rewriter: Rewriter, loc: Loc | None) -> None:
        super().__init__(set())
        self.rewriter, self.loc = rewriter, loc

    def calls(self, op: str, types: Iterable[TensorType], /, **args: Attr) -> Values:
        """The results of a call."""
        self.rewriter.emit(f"aten.{op}", self.loc, tuple(types), **args)
        return tuple(value for value in self.rewriter.nodes[-1].outputs if value is not None)

    def inferred(self, op: str, /, **args: Attr) -> Value:
        """The result of a call, with the type that ATen gives it."""
        return self.rewriter.emit(f"aten.{op}", self.loc, None, **args)


@dataclass(frozen=True)
class Phases:
    """A transposed convolution as one convolution, a number for each dimension of the image.

    Attributes:
        strides: of the transposed convolution.
        taps: the window of each phase.
        padding, dilation: of the convolution.
        start: where the result begins in the phases put in their places.
    """

    groups: int
    strides: Sizes
    taps: Sizes
    padding: Sizes
    dilation: Sizes
    start: Sizes

    @staticmethod
    def of(node: Node) -> Phases | None:
        """The phases of a transposed convolution; None where a call does better: much of them would be padding, or a
        part of the result depends on no element of the image."""
        window = type_of(node.arg("weight")).shape[2:]
        rank, groups = len(window), node.arg("groups", 1)
        given = [_sizes(node.arg(name, default), rank) for name, default in _DEFAULTS.items()]
        if not isinstance(groups, int) or not all(isinstance(size, int) for size in (*window, *sum(given, ()))):
            return None
        found = []
        for size, stride, padding, more, dilation in zip(window, *given, strict=True):
            taps = -(-size // stride)
            reach = dilation * (size - 1)
            before, after = reach // stride - padding // stride, (reach + more - padding) // stride
            if (dilation > 1 and stride > 1) or before < 0 or after < 0:
                return None
            wide = max(before, after)
            found.append((stride, taps, wide, dilation, (wide - before) * stride + padding % stride))
        strides, taps, *rest = (tuple(each) for each in zip(*found, strict=True))
        if prod(taps) * prod(strides) > MOST_PADDING * prod(window):  # type: ignore[arg-type]
            return None
        return Phases(groups, strides, taps, *rest)

    def with_height(self) -> Phases:
        """The same of images of height 1."""
        sizes = (self.strides, 1), (self.taps, 1), (self.padding, 0), (self.dilation, 1), (self.start, 0)
        return Phases(self.groups, *((height, *each) for each, height in sizes))

    @property
    def arguments(self) -> tuple[tuple[str, Attr], ...]:
        """The arguments of the convolution after its tensors; its stride is 1."""
        ones = (1,) * len(self.taps)
        return ("stride", ones), ("padding", self.padding), ("dilation", self.dilation), ("groups", self.groups)

    def count(self, axis: int, size: Dim) -> Dim:
        """The size of the convolution's result along a dimension in which the image has `size`."""
        return dim_expr("+", size, 2 * self.padding[axis] - self.dilation[axis] * (self.taps[axis] - 1))

    def filters(self, calls: Calls, weight: Value) -> Value:
        """[groups * phases * channels of a group, inputs of a group, *taps] of [inputs, channels of a group, *window]:
        what is a loop over q - j in the one is a loop over a window, in order, in the other."""
        inputs, channels, *window = type_of(weight).shape
        rank, shape = len(window), tuple(tap * stride for tap, stride in zip(self.taps, self.strides, strict=True))
        lacking = [size - old for size, old in zip(shape, window, strict=True)]  # type: ignore[operator]
        if any(lacking):
            pad = tuple(side for count in reversed(lacking) for side in (0, count))
            weight = calls.inferred("constant_pad_nd.default", self=weight, pad=pad)
        pairs = [size for both in zip(self.taps, self.strides, strict=True) for size in both]
        weight = calls.reshape(weight, (self.groups, dim_expr("//", inputs, self.groups), channels, *pairs))
        taps, phases = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
        weight = calls.inferred("flip.default", self=weight, dims=tuple(taps))
        weight = calls.permute(weight, (0, *phases, 2, 1, *taps))
        count = self.groups * prod(self.strides)
        return calls.reshape(weight, (dim_expr("*", count, channels), dim_expr("//", inputs, self.groups), *self.taps))

    def biases(self, calls: Calls, bias: Value) -> Value:
        """A bias of channels, as one of the channels of all phases."""
        (channels,) = type_of(bias).shape
        phases, each = prod(self.strides), dim_expr("//", channels, self.groups)
        rows = calls.reshape(bias, (self.groups, 1, each))
        strides = type_of(rows).strides
        wide = TensorType(type_of(bias).dtype, (self.groups, phases, each), (strides[0], 0, strides[2]))
        rows = calls.call("expand.default", wide, self=rows, size=wide.shape)
        return calls.reshape(rows, (dim_expr("*", phases, channels),))

    def in_place(self, calls: Calls, image: Value, result: TensorType) -> Value:
        """The result, channels-last, of the channels of all phases, channels-last as well."""
        batch, channels, *sizes = result.shape
        _, _, *places = type_of(image).shape
        each, rank = dim_expr("//", channels, self.groups), len(sizes)
        image = calls.reshape(image, (batch, self.groups, *self.strides, each, *places))
        pairs = [axis for which in range(rank) for axis in (3 + rank + which, 2 + which)]
        image = calls.permute(image, (0, *pairs, 1, 2 + rank))
        whole = [dim_expr("*", *both) for both in zip(places, self.strides, strict=True)]
        image = calls.reshape(image, (batch, *whole, channels))
        image = calls.permute(image, (0, rank + 1, *range(1, rank + 1)))
        for axis, (size, start) in enumerate(zip(sizes, self.start, strict=True), 2):
            type_ = type_of(image)
            if type_.shape[axis] != size:
                shape = (*type_.shape[:axis], size, *type_.shape[axis + 1 :])
                type_ = TensorType(type_.dtype, shape, type_.strides)
                end = dim_expr("+", size, start)
                image = calls.call("slice.Tensor", type_, self=image, dim=axis, start=start, end=end)
        return image


# The arguments of a transposed convolution with a number for each dimension, and what they are by default.
_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}


def _sizes(given: Attr, rank: int) -> tuple[Attr, ...]:
    found = given if isinstance(given, tuple) else (given,)
    return found * rank if len(found) == 1 else found
