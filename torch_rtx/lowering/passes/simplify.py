"""Removes no-ops: aliases, views and casts to the same type, padding by nothing, images resampled to their own size,
choices that constants decide, scatters that replace all elements, and copies of values that do not escape.

Softmax of halves with a float result has one form for CUDA alone, which takes no other dtypes: it becomes the call that
names the dtype, and has the same meaning everywhere. `unbind` becomes a call for each position. A number that is cast,
as the batching of `torch.func.vmap` does, is a constant. What PyTorch leaves uninitialized is zeros in an engine,
unless kernels that others wrote are all that it is for.
"""

from __future__ import annotations

import math

from torch_rtx import aten
from torch_rtx.foreign import filled_by_launches
from torch_rtx.ir import Attr, Graph, Node, TensorType, Value, contiguous
from torch_rtx.lowering.constants import Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.rewrite import COPIES, Rewriter, escaping, returned, rewrite

ALIASES = frozenset(f"aten.{name}.default" for name in ("alias", "detach", "lift_fresh", "view", "expand", "permute"))
CAST = "aten._to_copy.default"
COPY_AS = "aten.copy.default"  # `src` in the type of `self`, whose elements it does not read
HALF_TO_FLOAT = {"aten._softmax.default": "aten.softmax.int", "aten._log_softmax.default": "aten.log_softmax.int"}
PAD = "aten.constant_pad_nd.default"
SELECT, UNBIND = "aten.select.int", "aten.unbind.int"
SCATTER = "aten.as_strided_scatter.default"  # of the gradient of `as_strided`, which gives a pooled image its strides
WHERE = "aten.where.self"
RESAMPLING = frozenset(
    f"aten.{name}.{overload}"
    for name in ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d")
    for overload in ("default", "vec")
)
SCALES = ("scale_factors", "scales_h", "scales_w")  # of an image, where it is not resampled by its sizes alone
SAME_TYPE = ALIASES | COPIES | {COPY_AS, WHERE, "aten.slice.Tensor", "aten.squeeze.dims", "aten.transpose.int"}


def simplify(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import; the graph computes the same values with fewer nodes."""
    escapes, base = escaping(graph), aten.bases(graph)
    owned = aten.shared(graph) | {v.name for v in (*graph.inputs, *(weight.value for weight in graph.weights))}
    views = {name for name in returned(graph) if base.get(name) in owned}  # tensors of their own in memory of another
    constants, filled = Constants(graph), filled_by_launches(graph)
    reshaped: dict[str, Value] = {}  # from the result of a view to its source
    copied: dict[str, Value] = {}  # the same of copies

    def is_owned(value: Value) -> bool:
        return base.get(value.name, value.name) in owned

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op in aten.UNINITIALIZED and not filled.issuperset(value.name for value in node.results):
            return _as_full(node, 0, rewriter)
        if node.op == SCATTER:
            whole = node.arg("self")
            return isinstance(whole, Value) and not is_owned(whole) and _replaced(node, whole, rewriter, copied)
        source = node.arg("src" if node.op == COPY_AS else "self", node.arg("input"))
        if node.op == CAST and isinstance(source, bool | int | float):
            return _as_full(node, source, rewriter)
        if node.op == WHERE:
            source = _chosen(node, constants)
        if node.op == UNBIND and isinstance(source, Value):
            for place, result in enumerate(node.outputs):
                if result is not None:
                    at = ("self", rewriter.current(source)), ("dim", node.arg("dim", 0)), ("index", place)
                    rewriter.nodes.append(Node("op", SELECT, at, (result,), None, node.loc))
            return True
        if len(node.outputs) != 1 or not isinstance(source, Value) or node.outputs[0] is None:
            return False
        current = rewriter.current(source)
        if not isinstance(current, Value):
            return False
        output = node.outputs[0]
        if node.op in HALF_TO_FLOAT and node.arg("half_to_float") is True:
            named = ("self", current), ("dim", node.arg("dim")), ("dtype", "f32")
            rewriter.nodes.append(Node("op", HALF_TO_FLOAT[node.op], named, node.outputs, None, node.loc))
            return True
        kept = escapes if node.op in (*COPIES, *RESAMPLING, COPY_AS, PAD, WHERE) else views
        if _is_identity(node, current):
            if not is_owned(current):  # nothing writes to it later
                copied[output.name] = current
            if output.name not in kept:
                rewriter.replace(output, current)
                return True
        if node.op == "aten.view.default" and current.name in reshaped:
            first = reshaped[current.name]
            args = ("self", first), ("size", node.arg("size"))
            rewriter.nodes.append(Node("op", node.op, args, node.outputs, None, node.loc))
            reshaped[output.name] = first
            return True
        if node.op == "aten.view.default":
            reshaped[output.name] = current
        return False

    return rewrite(graph, infer, visit)


def _as_full(node: Node, number: bool | int | float, rewriter: Rewriter) -> bool:
    type_ = node.outputs[0].type if node.outputs[0] is not None else None
    if not isinstance(type_, TensorType) or type_.strides != contiguous(type_.shape):
        return False
    args = ("size", type_.shape), ("fill_value", number), ("dtype", type_.dtype), ("device", type_.device)
    rewriter.nodes.append(Node("op", "aten.full.default", args, node.outputs, None, node.loc))
    return True


def _replaced(node: Node, whole: Value, rewriter: Rewriter, copied: dict[str, Value]) -> bool:
    """`src` in another shape, where it replaces every element of `whole`. That is no input: AOTAutograd traces the
    common memory of several inputs as if it were as large as one of them."""
    part, output = node.arg("src"), node.outputs[0]
    if not isinstance(part, Value) or output is None:
        return False
    old, new = whole.type, part.type
    size, stride = node.arg("size"), node.arg("stride")
    if not isinstance(old, TensorType) or not isinstance(new, TensorType) or old.dtype != new.dtype:
        return False
    if not all(type(length) is int for length in (*old.shape, *size, *stride)):  # type: ignore[misc]
        return False
    order = sorted(range(len(size)), key=lambda dim: (size[dim] == 1, -stride[dim]))  # type: ignore[arg-type,index,operator]
    lengths = tuple(size[dim] for dim in order if size[dim] != 1)  # type: ignore[index]
    is_dense = tuple(stride[dim] for dim in order if size[dim] != 1) == contiguous(lengths)  # type: ignore[index]
    covers = is_dense and math.prod(lengths) == math.prod(old.shape) and not node.arg("storage_offset")  # type: ignore[arg-type]
    if not covers or old.strides != contiguous(old.shape):
        return False
    source = copied.get(part.name, rewriter.current(part))
    moved = rewriter.emit("aten.permute.default", node.loc, self=source, dims=tuple(order))
    dense = rewriter.emit("aten.clone.default", node.loc, self=moved, memory_format="contiguous_format")
    rewriter.replace(output, rewriter.emit("aten.view.default", node.loc, self=dense, size=old.shape))
    return True


def _chosen(node: Node, constants: Constants) -> Attr:
    """The operand whose elements a choice takes, where a constant condition decides it for all of them."""
    condition = constants.find(node.arg("condition"))
    if condition is None or condition.all() != condition.any():
        return None
    return node.arg("self" if condition.all() else "other")


def _is_identity(node: Node, source: Value) -> bool:
    """Whether the result equals `source`: the same type, and the same elements in the same order."""
    if node.outputs[0] is None or node.outputs[0].type != source.type or not isinstance(source.type, TensorType):
        return False
    if node.op in ("aten.permute.default", "aten.transpose.int"):
        # Equal types do not suffice: the transpose of a square matrix may have the same strides.
        dims = node.arg("dims", (node.arg("dim0"), node.arg("dim1")))
        moved = dims[0] != dims[1] if node.op == "aten.transpose.int" else tuple(dims) != tuple(range(len(dims)))  # type: ignore[index,arg-type]
        return not moved
    if node.op == "aten.slice.Tensor":
        return node.arg("start", None) in (None, 0) and node.arg("step", 1) == 1
    if node.op == PAD:
        return not any(node.arg("pad"))  # type: ignore[arg-type]
    if node.op in RESAMPLING:
        return all(node.arg(name) is None for name in SCALES)
    return node.op in SAME_TYPE
