"""Writes LSTMs and GRUs of few steps out: one product of all inputs, then for each step a product of the state and a
loop for the cell.

PyTorch's layer is one call of cuDNN. It copies the weights into a buffer of its own if they do not lie in one, as those
of an engine, and no loop fuses with its input or its results. The two directions of a layer take each step together, as
a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Attr, Graph, Node, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.rewrite import Rewriter, rewrite

MAX_STEPS = 64  # of a call: each of its layers takes a step for each element of the sequences
STATES = {"aten.lstm.input": 2, "aten.gru.input": 1}


def unroll_recurrences(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Calls with projections, with dropout or of a symbolic length are left."""

    def visit(node: Node, rewriter: Rewriter) -> bool:
        return node.op in STATES and rewriter.expand(node, lambda: _Unrolled(node, rewriter).results())

    return rewrite(graph, infer, visit)


@dataclass(frozen=True)
class _Unrolled:
    """Emits calls in place of `node`. A state is [batch, size], or [2, batch, size] of both directions."""

    node: Node
    rewriter: Rewriter

    def call(self, op: str, /, **args: Attr) -> Value:
        """A call with inferred types."""
        return self.rewriter.emit(f"aten.{op}", self.node.loc, **args)

    def results(self) -> tuple[Value, ...]:
        """The outputs of all steps, and the last states of all layers.

        Raises:
            Unsupported: the call stays.
        """
        node, current = self.node, self.rewriter.current
        x, states = current(argument(node, "input")), node.arg("hx")
        states = states if isinstance(states, tuple) else (states,)
        params, layers = node.arg("params"), node.arg("num_layers")
        directions, kinds = 1 + bool(node.arg("bidirectional")), 2 + 2 * bool(node.arg("has_biases"))
        assert isinstance(x, Value)
        assert isinstance(params, tuple)
        assert isinstance(layers, int)
        if node.arg("batch_first"):
            x = self.call("transpose.int", self=x, dim0=0, dim1=1)
        length, each = type_of(x).shape[0], directions * kinds
        if not isinstance(length, int) or not 0 < length * layers <= MAX_STEPS:
            raise Unsupported("many steps, or nobody knows how many")
        if len(params) != layers * each or (node.arg("train") and node.arg("dropout")):
            raise Unsupported("projections, or dropout")
        last = list[Sequence[Value]]()
        for layer in range(layers):
            weights = [current(one) for one in params[layer * each :][:each]]  # type: ignore[arg-type]
            first = [self._of_layer(current(state), layer, directions) for state in states]  # type: ignore[arg-type]
            x, final = self._layer(x, first, [weights[kind::kinds] for kind in range(kinds)], length)
            last.append(final)
        if node.arg("batch_first"):
            x = self.call("transpose.int", self=x, dim0=0, dim1=1)
        join = "stack.default" if directions == 1 else "cat.default"
        return (x, *(self.call(join, tensors=parts) for parts in zip(*last, strict=True)))

    def _of_layer(self, states: Attr, layer: int, directions: int) -> Value:
        """The first state of a layer."""
        if directions == 1:
            return self.call("select.int", self=states, dim=0, index=layer)
        return self._range(states, 0, layer, directions)

    def _layer(
        self, x: Value, state: Sequence[Value], weights: Sequence[Sequence[Attr]], length: int
    ) -> tuple[Value, Sequence[Value]]:
        """The outputs of a layer, and its last state. `weights` has those of both products, then the biases, each for
        all directions."""
        products = self._linear(x, *(self._joined("cat.default", kind) for kind in weights[::2]))
        inner = [self._joined("stack.default", kind) for kind in weights[1::2]]
        both, columns = len(weights[0]) > 1, type_of(inner[0]).shape[-2]
        assert isinstance(columns, int)
        if both:
            inner[0] = self.call("transpose.int", self=inner[0], dim0=1, dim1=2)
        outputs = list[Value]()
        for step in range(length):
            # Rows of all directions: kernels take their address, and so have equal code for each step.
            parts = [self.call("select.int", self=products, dim=0, index=step)]
            if both:
                parts.append(self.call("select.int", self=products, dim=0, index=length - 1 - step))
                parts = [self._range(part, -1, direction, columns) for direction, part in enumerate(parts)]
            state = self._cell(parts, self._product(state[0], inner), state)
            outputs.append(state[0])
        found = self.call("stack.default", tensors=tuple(outputs))
        if both:
            there, back = (self.call("select.int", self=found, dim=1, index=direction) for direction in (0, 1))
            back = self.call("flip.default", self=back, dims=(0,))
            found = self.call("cat.default", tensors=(there, back), dim=-1)
        return found, state

    def _joined(self, op: str, parts: Sequence[Attr]) -> Value:
        """What all directions have, in one tensor; of one direction, as it is."""
        if len(parts) > 1:
            return self.call(op, tensors=tuple(parts))
        (one,) = parts
        assert isinstance(one, Value)
        return one

    def _range(self, value: Attr, dim: int, which: int, size: int) -> Value:
        """A range of `size`, the one at `which`."""
        return self.call("slice.Tensor", self=value, dim=dim, start=which * size, end=(which + 1) * size)

    def _linear(self, x: Value, weight: Value, *bias: Value) -> Value:
        return self.call("linear.default", input=x, weight=weight, **dict(zip(("bias",), bias, strict=False)))

    def _product(self, state: Value, weights: Sequence[Value]) -> Value:
        """The product of a state of one direction or two."""
        if len(type_of(state).shape) == 2:
            return self._linear(state, *weights)
        found = self.call("bmm.default", self=state, mat2=weights[0])
        for bias in weights[1:]:
            found = self.call("add.Tensor", self=found, other=self.call("unsqueeze.default", self=bias, dim=1))
        return found

    def _cell(self, inputs: Sequence[Value], hidden: Value, state: Sequence[Value]) -> Sequence[Value]:
        """The next state: of an LSTM (Hochreiter and Schmidhuber, 1997) with its memory, or of a GRU (Cho et al., 2014)
        whose reset gate follows the product, as in cuDNN. `inputs`: of each direction."""
        if len(state) == 2:
            both = self.call("add.Tensor", self=self._joined("stack.default", inputs), other=hidden)
            whole = self._gates(both, 4)
            taken, kept, shown = (self.call("sigmoid.default", self=whole[at]) for at in (0, 1, 3))
            new = self.call("mul.Tensor", self=taken, other=self.call("tanh.default", self=whole[2]))
            old = self.call("mul.Tensor", self=kept, other=state[1])
            memory = self.call("add.Tensor", self=old, other=new)
            return self.call("mul.Tensor", self=shown, other=self.call("tanh.default", self=memory)), memory
        # Gates of directions are joined one by one: each join has the elements of the state.
        given = [
            self._joined("stack.default", one) for one in zip(*(self._gates(one, 3) for one in inputs), strict=True)
        ]
        found = self._gates(hidden, 3)
        sums = [self.call("add.Tensor", self=given[at], other=found[at]) for at in (0, 1)]
        reset, update = (self.call("sigmoid.default", self=one) for one in sums)
        inner = self.call("mul.Tensor", self=reset, other=found[2])
        new = self.call("tanh.default", self=self.call("add.Tensor", self=given[2], other=inner))
        change = self.call("sub.Tensor", self=state[0], other=new)
        return [self.call("add.Tensor", self=new, other=self.call("mul.Tensor", self=update, other=change))]

    def _gates(self, value: Value, count: int) -> list[Value]:
        """The gates, which lie next to each other."""
        size = type_of(value).shape[-1]
        assert isinstance(size, int)
        return [self._range(value, -1, which, size // count) for which in range(count)]
