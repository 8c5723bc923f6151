"""Simplifies the masks of attention: causal ones become a flag, what hides nothing is left out.

Models write masks out as comparisons of positions. Those that no input decides are evaluated here, which proves what
they are whatever form they have: where all sizes are numbers by their elements, else by formulas for these.
"""

from __future__ import annotations

import torch

from torch_rtx.ir import MAIN, Attr, Graph, Node, TensorType, Value, contiguous
from torch_rtx.lowering.constants import LARGEST, Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.index import from_dim, product, ravel
from torch_rtx.lowering.kernels.kernel_ir import ONE
from torch_rtx.lowering.positions import AtLeastZero, Positions
from torch_rtx.lowering.rewrite import Rewriter, rewrite, seen_outside

ATTENTION = "aten.scaled_dot_product_attention.default"
CONJUNCTIONS = ("aten.bitwise_and.Tensor", "aten.logical_and.default")


def simplify_masks(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    constants, positions, fresh = Constants(graph), Positions(graph), seen_outside(graph)

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op == "aten.index.Tensor":
            aliased = any(value is not None and value.name in fresh for value in (*node.inputs, *node.outputs))
            return not aliased and _as_view(node, constants, positions, rewriter)
        mask = node.arg("attn_mask")
        if node.op != ATTENTION or not isinstance(mask, Value) or node.arg("is_causal"):
            return False
        left = _needed(mask, constants, positions)
        args: dict[str, Attr] = dict(node.args)
        if left is None:
            del args["attn_mask"]
        elif _is_causal(left, _scores(node), constants, positions):
            del args["attn_mask"]
            args["is_causal"] = True
        elif left is not mask and len(left.type.shape) >= 2:  # type: ignore[union-attr]  # a tensor, as what it is from
            args["attn_mask"] = left
        else:
            return False
        order = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        pairs = tuple((name, args[name]) for name in order if name in args)
        rewriter.keep(Node("op", node.op, pairs, node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def seen(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets a query see a key. The least number of a dtype stands for minus infinity, as models use it."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min


def _needed(mask: Value, constants: Constants, positions: Positions) -> Value | None:
    """What is left of `mask` without the parts that hide nothing."""
    known = constants.find(mask)
    if known is not None:
        nothing = known if known.dtype == torch.bool else known == 0
        return None if bool(nothing.all()) else mask
    type_ = mask.type
    if isinstance(type_, TensorType) and type_.dtype == "bool" and positions.element(mask)[1] == ONE:
        return None
    node = constants.producer.get(mask.name)
    if node is None or node.op not in CONJUNCTIONS:
        return mask
    parts = [part for name in ("self", "other") if isinstance(part := node.arg(name), Value)]
    if any(not isinstance(part.type, TensorType) or part.type.dtype != "bool" for part in parts) or len(parts) < 2:
        return mask
    left = [part for part in parts if _needed(part, constants, positions) is not None]
    if len(left) == len(parts):
        return mask
    return _needed(left[0], constants, positions) if left else None


def _scores(node: Node) -> tuple[object, object]:
    query, key = node.arg("query"), node.arg("key")
    assert isinstance(query, Value)
    assert isinstance(query.type, TensorType)
    assert isinstance(key, Value)
    assert isinstance(key.type, TensorType)
    return query.type.shape[-2], key.type.shape[-2]


def _is_causal(mask: Value, size: tuple[object, object], constants: Constants, positions: Positions) -> bool:
    """Whether each query sees the keys up to its own position, those that are added as they are."""
    source = constants.producer.get(mask.name)
    known = constants.find(mask)
    if known is None and source is not None and source.op == "aten.expand.default":
        known = constants.find(source.arg("self"))  # to a batch of any size
    if known is None:
        position, element = positions.element(mask)
        keeps = len(position) > 1 and mask.type.shape[-2:] == size  # type: ignore[union-attr]  # a tensor, as it has them
        return keeps and element == AtLeastZero(position[-2] - position[-1])
    if not all(isinstance(s, int) for s in size) or known.dim() < 2 or known.shape[-2:] != size:
        return False
    visible = seen(known)
    plain = known.dtype == torch.bool or bool((known[visible] == 0).all())
    return plain and bool((visible == torch.ones(known.shape[-2:], dtype=torch.bool).tril()).all())


def _as_view(node: Node, constants: Constants, positions: Positions, rewriter: Rewriter) -> bool:
    """An index that takes every element in order is a view, as where padding is looked up by positions."""
    source, indices, output = node.arg("self"), node.arg("indices"), node.outputs[0]
    if not isinstance(source, Value) or not isinstance(indices, tuple) or output is None:
        return False
    type_, result = source.type, output.type
    if not isinstance(type_, TensorType) or not isinstance(result, TensorType):
        return False
    if type_.strides != contiguous(type_.shape) or not (
        _in_order(type_, indices, constants) or _in_order_for_any_size(node, type_, result, positions)
    ):
        return False
    rewriter.replace(output, rewriter.emit("aten.view.default", node.loc, self=rewriter.now(source), size=result.shape))
    return True


def _in_order(type_: TensorType, indices: tuple[Attr, ...], constants: Constants) -> bool:
    """Whether these indices of a tensor of numbers for sizes take every element in order."""
    found = [constants.find(index) for index in indices]
    sizes = [size for size in type_.shape if isinstance(size, int)]
    if any(index is None for index in found) or len(sizes) != len(found):
        return False
    count = int(torch.Size(sizes).numel())
    if count > LARGEST:
        return False
    taken = torch.arange(count).view(sizes)[tuple(index for index in found if index is not None)]
    return taken.numel() == count and torch.equal(taken.flatten(), torch.arange(count))


def _in_order_for_any_size(node: Node, source: TensorType, result: TensorType, positions: Positions) -> bool:
    if source.device != MAIN:
        return False
    position, there = positions.taken(node)
    shape, sizes = (tuple(map(from_dim, type_.shape)) for type_ in (result, source))
    return there is not None and product(shape) == product(sizes) and ravel(position, shape) == ravel(there, sizes)
