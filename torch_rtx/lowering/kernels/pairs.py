"""Neighbours as pairs: a stack of what is computed of elements 2 * H and 2 * H + 1, as in rotary embeddings.

Threads would read each of the two by itself, and compute both parts for every element. Instead, a tile is split in
registers, where the elements of a pair are in one thread, and the parts are joined again:

    R = tl.arange(0, 128)[None, :]
    H = tl.arange(0, 64)[None, :]
    x = tl.load(in0 + (R + 128 * X))
    even, odd = tl.split(tl.reshape(x, [8, 64, 2]))
    cos = tl.load(in1 + (H + 64 * X))
    ...
    y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [8, 128])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch_rtx.lowering.kernels.emit import Axes, Axis, Emitter, Operand
from torch_rtx.lowering.kernels.index import Index, constant, substitute, variable, within
from torch_rtx.lowering.kernels.kernel_ir import ONE, ZERO, Const, Position, Select, Tensor, View

H = "H"
TWO = constant(2)


class PairEmitter(Emitter):
    """An emitter that computes pairs of neighbours along the axis `paired` in half tiles, with index H; "": in none.

    Attributes:
        has_pairs: lines refer to H.
    """

    def __init__(self, axes: Sequence[Axis], paired: str, size: Index) -> None:
        super().__init__(axes)
        number = size.number or 1
        fits = paired in self.axes and not self.axes[paired].mask and self.axes[paired].block % 2 == number % 2 == 0
        self.paired, self.has_pairs = paired if fits else "", False
        self._whole, self._half = variable(paired, size), variable(H, constant(number // 2))
        self._varying[H] = frozenset((H,))

    def shape(self, axes: Axes) -> str:
        """The shape of a tile that depends on `axes`, 1 along all others; along H half of one."""
        if H not in axes:
            return super().shape(axes)
        blocks = {name: axis.block if name in axes else 1 for name, axis in self.axes.items()}
        blocks[self.paired] = self.axes[self.paired].block // 2
        return f"[{', '.join(map(str, blocks.values()))}]"

    def value(self, tensor: Tensor, position: Position, conditions: tuple[Operand, ...] = ()) -> Operand:
        """See `Emitter.value`; elements of either parity are a half of those of both."""
        if self.has_pairs and not isinstance(tensor, View | Const) and self._is_free(conditions):
            both = self._both(tensor, position)
            if both is not None:
                return self._split(super().value(tensor, both[0], conditions), both[1])
        return super().value(tensor, position, conditions)

    def _is_free(self, conditions: tuple[Operand, ...]) -> bool:
        """No condition varies among pairs."""
        return not any({self.paired, H} & condition.axes for condition in conditions)

    def _both(self, tensor: Tensor, position: Position) -> tuple[Position, int] | None:
        """The position of whole pairs, if `position` is that of the elements of one parity; and the parity."""
        if H not in self.varies(*position):
            return None
        for axis, at in enumerate(position):
            parity = next((count for atoms, count in at.terms if not atoms), 0) % 2
            moved = [substitute(one, {H: self._whole // TWO}) for one in position]
            moved[axis] = moved[axis] + self._whole % TWO - constant(parity)
            if any(text in str(one) for one in moved for text in (f"({self.paired} // 2)", f"({self.paired} % 2)")):
                continue
            if within(moved[axis], tensor.shape[axis]):
                return tuple(moved), parity
        return None

    def _split(self, both: Operand, parity: int) -> Operand:
        """The elements of a parity of a tile of pairs."""
        if self.paired not in both.axes:
            return both
        axes = both.axes - {self.paired} | {H}
        home, keys = self._home(axes), [("half", parity, both.text) for parity in (0, 1)]
        if keys[0] not in home.known:
            even, odd = (self.assign("", axes, "h") for _ in keys)
            del home.lines[-2:]
            home.lines.append(
                f"{even.text}, {odd.text} = tl.split(tl.reshape({both.text}, {self.shape(axes)[:-1]}, 2]))"
            )
            home.known.update(zip(keys, (even, odd), strict=True))
        return home.known[keys[parity]]

    def _select(self, tensor: Select, position: Position, conditions: tuple[Operand, ...]) -> Operand:
        if not self._is_stack(tensor, position) or not self._is_free(conditions):
            return super()._select(tensor, position, conditions)
        before = self.has_pairs, list(self.outer.lines), dict(self.outer.known)
        self.has_pairs = True
        even, odd = (
            tuple(substitute(at, {self.paired: self._half * TWO + constant(parity)}) for at in position)
            for parity in (0, 1)
        )
        parts = self.value(tensor.inner, even, conditions), self.value(tensor.outer, odd, conditions)
        if not all(H in part.axes for part in parts):
            self.has_pairs, self.outer.lines, self.outer.known = before
            return super()._select(tensor, position, conditions)
        axes = parts[0].axes | parts[1].axes
        texts = [
            part.text if part.axes == axes else f"tl.broadcast_to({part.text}, {self.shape(axes)})" for part in parts
        ]
        whole = axes - {H} | {self.paired}
        return self.assign(f"tl.reshape(tl.join({', '.join(texts)}), {self.shape(whole)})", whole)

    def _is_stack(self, tensor: Select, position: Position) -> bool:
        """The elements of even positions along the axis are those of the inner tensor."""
        if not self.paired or self.looped:
            return False
        tests: list[Any] = [
            (at, start, size)
            for at, start, size in zip(position, tensor.starts, tensor.inner.shape, strict=True)
            if start != ZERO or not within(at, start + size)
        ]
        return tests == [(self._whole % TWO, ZERO, ONE)]
