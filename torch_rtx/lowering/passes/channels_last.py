"""Propagates the channels-last layout from convolutions, whose kernels and libraries are fastest with it.

Each convolution gets a channels-last image and weight. Calls that follow keep the layout that their ATen call returns
for such inputs: pointwise operations, pooling and concatenation stay channels-last, so that no copy remains between
convolutions. Where a kernel computes what ATen returns row by row, such as a group norm, it gives a channels-last copy
in its place. The captured layout is restored by a copy where a view is not possible, or where a call or the caller must
see it. The weight's copy becomes part of its recipe. A 1d convolution becomes a 2d one of height 1: a model's transpose
of its result, before attention, is then a view. A transposed convolution becomes a plain one (`lowering.phases`).

If an image of few channels must be copied, as often for the first convolution, the copy is padded by channels of zeros
to a multiple of 4: the kernel loads four halves of a pixel at once, but three one by one. That makes copy and
convolution a quarter faster. Images that are already channels-last are not padded: the additional copy pays off for
large batches alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import gcd

from torch_rtx import aten
from torch_rtx.dtypes import DTYPES, HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.ir import (
    COPY,
    Attr,
    Dim,
    Expr,
    Graph,
    Node,
    TensorType,
    Type,
    Value,
    attr_map,
    attr_values,
    contiguous,
    dim_expr,
)
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import type_of
from torch_rtx.lowering.kernels.kernel_ir import ZERO, address, load
from torch_rtx.lowering.kernels.region import express, is_loop
from torch_rtx.lowering.phases import TRANSPOSED, Calls, Phases, is_transposed
from torch_rtx.lowering.rewrite import Rewriter, from_weights
from torch_rtx.op_work import INT_CONV

CAST, CONV1D = "aten._to_copy.default", "aten.conv1d.default"
CONVOLUTION_OF_RANK = {2: "aten.conv2d.default", 3: "aten.conv3d.default"}
GRADIENTS = "aten.convolution_backward.default"
NAMED_PADDING = frozenset(f"aten.conv{rank}d.padding" for rank in (1, 2, 3))  # "same" or "valid"
CONVOLUTIONS = frozenset((*CONVOLUTION_OF_RANK.values(), "aten.convolution.default", CONV1D, INT_CONV, *NAMED_PADDING))
FORMATS = ("contiguous_format", "channels_last", "channels_last_3d")
VECTOR = 4  # channels per vectorized load
VECTOR_BYTES = 16  # of the longest load
FEW = 12  # channels; padding to VECTOR gains nothing from here on, since loads are longer vectors anyway


def channels_last(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import. Changes strides, but not those of the graph's results."""
    if not any(node.op in {*CONVOLUTIONS, *TRANSPOSED, GRADIENTS} and node.kind == "op" for node in graph.nodes):
        return graph
    writer = _Writer(graph, infer)
    for node in graph.nodes:
        writer.visit(node)
    for value in attr_values(graph.outputs):
        writer.restore(value)
    return writer.finish()


class _Writer(Rewriter):
    """Rebuilds the graph in the new layout."""

    def __init__(self, graph: Graph, infer: Inference) -> None:
        super().__init__(graph, infer)
        self._bases, self._shared = aten.bases(graph), aten.shared(graph)
        self._restored: set[str] = set()  # views that were recomputed
        self._constant = from_weights(graph)
        self._twins: dict[str, Value] = {}  # by the name of a value: the same in another layout
        # The values in whose memory results lie, or in which none may: that of the caller.
        results = set(map(self._memory, attr_values(graph.outputs)))
        self._given = results | {value.name for value in graph.inputs} | self._constant
        self._narrow: dict[str, Value] = {}  # by the name of a value: what it is a cast of that takes more memory

    def visit(self, node: Node) -> None:
        """Add `node` in the new layout if possible, else with its inputs in the captured layout."""
        if node.kind == "op" and self._rebuilt(node):
            return
        changed = any(self.current(value) != value for value in node.inputs)
        free = node.kind == "op" and node.op != COPY and node.op not in aten.STRIDED and not _is_grouped(node)
        if changed and not (free and self._propagate(node, node.map_inputs(self.current))):
            for value in node.inputs:
                self.restore(value)
            changed = False
        if not changed:
            self.nodes.append(replace(node, args=node.map_inputs(self.current)))
        self._note_widening(self.nodes[-1])
        self._note_copy(self.nodes[-1])
        if node.kind == "op" and is_loop(node.op) and not aten.is_view(aten.overload(node.op)):
            for old, new in zip(node.outputs, self.nodes[-1].outputs, strict=True):
                if old is not None and new is not None and self._loses_layout(new, self.nodes[-1]):
                    self.replace(old, self._to_channels_last(new))

    def _rebuilt(self, node: Node) -> bool:
        """Add what takes the place of a call that the layout is for, or of a copy; False: nothing does."""
        if is_transposed(node):
            return self._transposed(node)
        if node.op in CONVOLUTIONS:
            return self._convolution(node)
        return self._gradients(node) if node.op == GRADIENTS else self._is_there(node)

    def _is_there(self, node: Node) -> bool:
        """A copy in another layout is what is computed in this layout already. Nothing may write to this, and no two
        results of the graph may come to lie in the same memory."""
        if node.op != "aten.clone.default":
            return False
        (image,), (copy,) = node.inputs, node.results
        given = self.current(image)
        assert isinstance(given, Value)
        found = next((one for one in (given, self._twins.get(given.name)) if one and one.type == copy.type), None)
        if found is None or found == image:
            return False
        memory = {self._memory(image), self._memory(found)}
        if not memory.isdisjoint(self.graph.written | (self._given if copy.name in self._given else set())):
            return False
        if copy.name in self._given:
            self._given |= memory
        self.replace(copy, found)
        return True

    def _memory(self, value: Value) -> str:
        """The name of the value in whose memory it lies."""
        return self._bases.get(value.name, value.name)

    def _gradients(self, node: Node) -> bool:
        """The gradients of a convolution, of channels-last images and weight; libraries return them in this layout."""
        if _is_grouped(node) or any(len(type_of(one).shape) - 2 not in CONVOLUTION_OF_RANK for one in node.inputs):
            return False
        args = tuple(
            (key, self._to_channels_last(attr) if isinstance(attr, Value) else attr) for key, attr in node.args
        )
        outputs = tuple(
            replace(one, type=replace(type_of(one), strides=strides_of(type_of(one).shape)))
            if one is not None and len(type_of(one).shape) > 1
            else one
            for one in node.outputs
        )
        self._add(node, args, outputs)
        return True

    def _note_widening(self, node: Node) -> None:
        """Remember a call that casts a tensor to a dtype of more bits, and does nothing else."""
        if node.op != CAST or {name for name, _ in node.args} != {"self", "dtype"} or len(node.results) != 1:
            return
        before, after = (type_of(value) for value in (*node.inputs, *node.results))
        if DTYPES[before.dtype].bits < DTYPES[after.dtype].bits:
            self._narrow[node.results[0].name] = node.inputs[0]

    def _note_copy(self, node: Node) -> None:
        """Remember what a call copies that is channels-last already, unless the graph writes to it."""
        if node.op != "aten.clone.default" or node.arg("memory_format") != "contiguous_format":
            return
        (image,), (copy,) = node.inputs, node.results
        if (
            self._memory(image) not in self.graph.written
            and 4 <= len(type_of(image).shape) <= 5
            and _is_channels_last(type_of(image))
        ):
            self._twins.setdefault(copy.name, image)

    def _loses_layout(self, value: Value, node: Node) -> bool:
        """`value`, a result of `node`, lies row by row, although an input of its shape does not."""
        if not isinstance(value.type, TensorType) or not 4 <= len(value.type.shape) <= 5:
            return False
        shape, strides = value.type.shape, strides_of(value.type.shape)
        given = [(one.type.shape, one.type.strides) for one in node.inputs if isinstance(one.type, TensorType)]
        return value.type.strides == contiguous(shape) and (shape, strides) in given and not _coincide(shape)

    def _convolution(self, node: Node) -> bool:
        if node.op in NAMED_PADDING:
            numeric = _with_numeric_padding(node)
            return numeric is not None and self._convolution(numeric)
        image = node.arg("input")
        if not isinstance(image, Value) or not isinstance(image.type, TensorType):
            return False
        if node.op in (CONV1D, INT_CONV) and len(image.type.shape) == 3:
            return self._conv1d(node)
        if len(image.type.shape) - 2 not in CONVOLUTION_OF_RANK:
            return False
        (result,) = node.outputs
        assert result is not None
        assert isinstance(result.type, TensorType)
        extra = self._padding_channels(node)
        layouts = (
            {"weight"}
            if not extra and self._is_range_of_channels(attr_map(image, self.current))
            else {"input", "weight"}
        )
        args = [(key, self._to_channels_last(a, extra) if key in layouts else a) for key, a in node.args]
        # The layout that libraries return; the meta function of a convolution returns another.
        output = Value(result.name, replace(result.type, strides=strides_of(result.type.shape)))
        self._add(node, tuple((key, attr_map(attr, self.current)) for key, attr in args), (output,))
        return True

    def _conv1d(self, node: Node) -> bool:
        """Rewrite a convolution of [batch, channels, length] as one of [batch, channels, 1, length]."""
        (result,) = node.outputs
        assert result is not None
        assert isinstance(result.type, TensorType)
        batch, channels, length = result.type.shape
        args = dict(node.args)
        for key in ("input", "weight"):
            args[key] = self._to_channels_last(self._with_height(attr_map(args[key], self.current)))
        for key, of_height in (("stride", 1), ("padding", 0), ("dilation", 1)):
            of_length = args.get(key, ())
            assert isinstance(of_length, tuple)
            if of_length:
                args[key] = (of_height, *of_length)
        shape = (batch, channels, 1, length)
        type_ = replace(result.type, shape=shape, strides=strides_of(shape))
        op = "aten.conv2d.default" if node.op == CONV1D else node.op
        image = self.emit(op, node.loc, (type_,), **args)
        self.replace(result, self.emit("aten.squeeze.dim", node.loc, None, self=image, dim=2))
        return True

    def _transposed(self, node: Node) -> bool:
        """Rewrite a transposed convolution, of a batch and with a weight that is a parameter."""
        (result,) = node.outputs
        image, weight, bias = (attr_map(node.arg(name), self.current) for name in ("input", "weight", "bias"))
        assert result is not None
        assert isinstance(image, Value)
        assert isinstance(weight, Value)
        type_, rank = type_of(result), len(type_of(weight).shape) - 2
        phases = Phases.of(node) if weight.name in self._constant and len(type_.shape) == rank + 2 else None
        if phases is None:
            return False
        calls = Calls(self, node.loc)
        filters = phases.filters(calls, weight)
        biases = phases.biases(calls, bias) if isinstance(bias, Value) else None
        if rank == 1:
            image, filters, phases = self._with_height(image), self._with_height(filters), phases.with_height()
            type_ = replace(type_, shape=(*type_.shape[:2], 1, type_.shape[2]))
        batch, _, *sizes = type_of(image).shape
        shape = (batch, type_of(filters).shape[0], *map(phases.count, range(len(sizes)), sizes))
        channels = self.fresh(replace(type_, shape=shape, strides=contiguous(shape)))
        args = ("input", image), ("weight", filters), ("bias", biases), *phases.arguments
        self._convolution(Node("op", CONVOLUTION_OF_RANK[len(sizes)], args, (channels,), None, node.loc))
        (made,) = self.nodes[-1].results
        found = phases.in_place(calls, made, type_)
        if rank == 1:
            found = self.emit("aten.squeeze.dim", node.loc, None, self=found, dim=2)
        self.replace(result, found)
        return True

    def _with_height(self, sequence: Attr) -> Value:
        """[n, channels, length] as [n, channels, 1, length]. Inference would guard on symbolic strides."""
        assert isinstance(sequence, Value)
        assert isinstance(sequence.type, TensorType)
        (batch, channels, length), (*outer, step) = sequence.type.shape, sequence.type.strides
        strides = (*outer, dim_expr("*", length, step), step)
        type_ = replace(sequence.type, shape=(batch, channels, 1, length), strides=strides)
        return self.emit("aten.unsqueeze.default", None, (type_,), self=sequence, dim=2)

    def _padding_channels(self, node: Node) -> int:
        """The number of zero channels to append to an image that is copied anyway, if overlapping windows reread it."""
        image, weight, stride = (
            attr_map(node.arg("input"), self.current),
            node.arg("weight"),
            node.arg("stride", (1, 1)),
        )
        assert isinstance(image, Value)
        assert isinstance(image.type, TensorType)
        assert isinstance(weight, Value)
        assert isinstance(weight.type, TensorType)
        assert isinstance(stride, tuple)
        channels, *window = (size if isinstance(size, int) else 0 for size in weight.type.shape[1:])
        copied = image.type.strides == contiguous(image.type.shape) and weight.name in self._constant
        narrow = image.type.dtype in HALVES or node.op == INT_CONV
        vectorizes = node.op in ("aten.conv2d.default", INT_CONV) and node.arg("groups", 1) == 1 and narrow
        overlaps = any(isinstance(step, int) and tap > step for tap, step in zip(window, stride, strict=False))
        return -channels % VECTOR if copied and vectorizes and overlaps and VECTOR // 2 < channels < FEW else 0

    def _is_range_of_channels(self, image: Attr) -> bool:
        """An image is channels-last but for other channels between its pixels, and a copy without these would not be
        read in longer vectors."""
        if not isinstance(image, Value) or image.name in self._constant:
            return False
        type_ = type_of(image)
        order = (0, *range(2, len(type_.shape)), 1)  # in memory
        strides = [stride for axis in order if isinstance(stride := type_.strides[axis], int)]
        sizes = [size for axis in order[1:] if isinstance(size := type_.shape[axis], int)]
        if len(strides) < len(order) or len(sizes) < len(order) - 1 or strides[-1] != 1:
            return False
        if any(outer < size * inner for outer, inner, size in zip(strides, strides[1:], sizes, strict=False)):
            return False
        start, vector = self._start(image), VECTOR_BYTES // DTYPES[type_.dtype].bytes
        return start is not None and gcd(vector, start, *strides[:-1]) >= gcd(vector, sizes[-1])

    def _start(self, value: Value) -> int | None:
        """Where in the memory that it is a view of a value begins, in elements; None: not known."""
        made, chain, base = {one.name: node for node in self.nodes for one in node.results}, list[Node](), value
        while (node := made.get(base.name)) is not None and node.kind == "op" and aten.is_view(aten.overload(node.op)):
            chain, base = [node, *chain], node.inputs[0]
        try:
            found = {base.name: load(base.name, type_of(base))}
            for node in chain:
                found |= express(node, found)
        except Unsupported:
            return None
        tensor = found[value.name]
        start = address(tensor, (ZERO,) * len(tensor.shape))
        return None if start is None else start.number

    def _to_channels_last(self, attr: Attr, extra: int = 0) -> Attr:
        """A channels-last copy of an image or a weight, with `extra` channels of zeros."""
        value = attr_map(attr, self.current)
        assert isinstance(value, Value)
        if extra:
            value = self._pad_channels(value, extra)
        type_, strides = type_of(value), strides_of(type_of(value).shape)
        if type_.strides == strides:
            return value
        if value.name in self._twins:
            twin = self._twins[value.name]
            return twin if type_of(twin).strides == strides else self._to_channels_last(twin)
        if value.name not in self._constant and _is_channels_last(type_):
            return self._paired(value, self._with_own_strides(value))
        if value.name in self._narrow:  # the copy is one of few bits
            copy = self._to_channels_last(self._narrow[value.name])
            return self._paired(value, self.emit(CAST, self=copy, dtype=type_.dtype))
        dense = type_.strides == contiguous(type_.shape)
        if dense and _coincide(type_.shape) and value.name not in self._constant:
            batch, channels, *sizes = type_.shape
            moved = self.emit("aten.view.default", self=value, size=(batch, *sizes, channels))
            order = (0, len(sizes) + 1, *range(1, len(sizes) + 1))
            return self.emit("aten.permute.default", self=moved, dims=order)
        form = "channels_last" if len(strides) == 4 else "channels_last_3d"
        types = (replace(type_, strides=strides),)
        return self._paired(value, self.emit("aten.clone.default", None, types, self=value, memory_format=form))

    def _with_own_strides(self, value: Value) -> Value:
        """A view of a channels-last image in which dimensions of one element have the strides that follow from those
        of others."""
        batch, channels, *sizes = type_of(value).shape
        moved = self.emit("aten.permute.default", self=value, dims=(0, *range(2, len(sizes) + 2), 1))
        moved = self.emit("aten.view.default", self=moved, size=(batch, *sizes, channels))
        return self.emit("aten.permute.default", self=moved, dims=(0, len(sizes) + 1, *range(1, len(sizes) + 1)))

    def _paired(self, value: Value, copy: Value) -> Value:
        """`copy`, from now on known as the same as `value`."""
        self._twins |= {value.name: copy, copy.name: value}
        return copy

    def _pad_channels(self, value: Value, extra: int) -> Value:
        assert isinstance(value.type, TensorType)
        first, channels, *rest = value.type.shape
        shape = (first, dim_expr("+", channels, extra), *rest)
        # Inference of this op does not support symbolic sizes.
        dense = value.type.strides == contiguous(value.type.shape)
        types = (replace(value.type, shape=shape, strides=contiguous(shape)),) if dense else None
        return self.emit("aten.constant_pad_nd.default", None, types, self=value, pad=(0, 0, 0, 0, 0, extra))

    def _propagate(self, node: Node, args: tuple[tuple[str, Attr], ...]) -> bool:
        """Add the call with inputs of other strides; False if it does not support them or changes more than strides."""
        try:
            types = self.infer(node.op, args)
        except Unsupported:
            return False
        if len(types) != len(node.outputs) or any(map(_differs, types, node.outputs)):
            return False
        named = zip(node.outputs, types, strict=True)
        kept = tuple(None if old is None or type_ is None else Value(old.name, type_) for old, type_ in named)
        self._add(node, args, kept)
        return True

    def _add(self, node: Node, args: tuple[tuple[str, Attr], ...], outputs: tuple[Value | None, ...]) -> None:
        self.nodes.append(replace(node, args=args, outputs=outputs))
        for old, new in zip(node.outputs, outputs, strict=True):
            if new != old:
                self.replace(old, new)

    def restore(self, value: Value) -> None:
        """Make later nodes read `value` in its captured layout."""
        current = self.current(value)
        if not isinstance(current, Value) or not isinstance(value.type, TensorType):
            return
        if value.name in self._restored:
            return
        if value.name in self._shared and self._bases.get(value.name) in self._replaced:
            self._restore_view(value)  # a copy would part it from the other results in the same memory
            return
        if current.type == value.type:
            return
        twin = self._twins.get(current.name)
        if twin is not None and twin.type == value.type:
            self.replace(value, twin)
            return
        for form in FORMATS:
            try:
                (type_,) = self.infer("aten.clone.default", (("self", current), ("memory_format", form)))
            except Unsupported:
                continue
            if type_ == value.type:
                copy = self.emit("aten.clone.default", None, (type_,), self=current, memory_format=form)
                self.replace(value, self._paired(current, copy))
                return
        moved = self._dense_copy(current, value.type)
        if moved is None:
            self._restore_view(value)
        else:
            self.replace(value, moved)

    def _dense_copy(self, current: Attr, type_: TensorType) -> Value | None:
        """A copy of `current` in the strides of `type_`, a permutation of a contiguous tensor; None if they are not."""
        for order in permutations(range(len(type_.shape))):
            inverse = tuple(map(order.index, range(len(order))))
            strides = contiguous(tuple(type_.shape[axis] for axis in order))
            if tuple(strides[axis] for axis in inverse) == tuple(map(_of_nonempty, type_.strides)):
                permuted = self.emit("aten.permute.default", None, None, self=current, dims=order)
                copy = self.emit("aten.clone.default", None, None, self=permuted, memory_format="contiguous_format")
                return self.emit("aten.permute.default", None, (type_,), self=copy, dims=inverse)
        return None

    def _restore_view(self, value: Value) -> None:
        """Recompute the view `value` from its source in the captured layout."""
        node = next(node for node in self.graph.nodes if value in node.outputs)
        if not aten.may_alias(node):
            raise Unsupported(f"the layout {value.type}")
        for given in node.inputs:
            self.restore(given)
        outputs = tuple(None if old is None else self.fresh(old.type) for old in node.outputs)
        self.nodes.append(replace(node, args=node.map_inputs(self.current), outputs=outputs))
        for old, new in zip(node.outputs, outputs, strict=True):
            if old is not None and new is not None:
                self.replace(old, new)
                self._restored.add(old.name)


def _is_grouped(node: Node) -> bool:
    """The gradients of a convolution of groups of several channels, for which libraries are slow in this layout."""
    weight = node.arg("weight")
    if node.op != GRADIENTS or not isinstance(weight, Value):
        return False
    return node.arg("groups") != 1 and type_of(weight).shape[1] != 1


def _of_nonempty(stride: Dim) -> Dim:
    """A stride of a nonempty tensor: without the max(size, 1) that PyTorch writes for data-dependent sizes."""
    if not isinstance(stride, Expr):
        return stride
    return dim_expr(stride.op, *(_of_nonempty(arg) for arg in stride.args if (stride.op, arg) != ("max", 1)))


def _with_numeric_padding(node: Node) -> Node | None:
    """A convolution with named padding ("same", "valid") as one with numeric padding; None if it is asymmetric."""
    weight = node.arg("weight")
    assert isinstance(weight, Value)
    assert isinstance(weight.type, TensorType)
    sizes = weight.type.shape[2:]
    dilation, same = node.arg("dilation", (1,) * len(sizes)), node.arg("padding", "valid") == "same"
    assert isinstance(dilation, tuple)
    total = [step * (size - 1) if same else 0 for step, size in zip(dilation, sizes, strict=True)]  # type: ignore[operator]
    if any(count % 2 for count in total):
        return None
    args = {**dict(node.args), "padding": tuple(count // 2 for count in total)}
    return replace(node, op=node.op.replace(".padding", ".default"), args=tuple(args.items()))


def _differs(type_: Type | None, value: Value | None) -> bool:
    """Whether a result differs from the captured one in more than strides."""
    if value is None:
        return False
    old = value.type
    if not isinstance(type_, TensorType) or not isinstance(old, TensorType):
        return type_ != old
    return (type_.dtype, type_.shape, type_.device) != (old.dtype, old.shape, old.device)


def _coincide(shape: tuple[Dim, ...]) -> bool:
    """Whether images of `shape` lie in memory the same way in both layouts."""
    return shape[1] == 1 or all(size == 1 for size in shape[2:])


def _is_channels_last(type_: TensorType) -> bool:
    """An image lies channels-last; strides of dimensions of one element do not matter. Where it lies the same way in
    both layouts it does not count as one."""
    each = zip(type_.shape, type_.strides, strides_of(type_.shape), strict=True)
    return not _coincide(type_.shape) and all(size == 1 or stride == own for size, stride, own in each)


def strides_of(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The strides of a channels-last image."""
    batch, channels, *rest = shape
    moved = contiguous((batch, *rest, channels))
    return (moved[0], moved[-1], *moved[1:-1])
