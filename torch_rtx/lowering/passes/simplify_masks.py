"""Simplifies attention masks: causal masks become the flag `is_causal`, masks that hide no key are removed, and masks
that add zeros and minus infinity become the condition by which they do.

Models compute masks by comparisons of positions. The pass evaluates those that do not depend on inputs, whatever their
form: with static sizes by their elements, otherwise by a formula for an element.
"""

from __future__ import annotations

import torch

from torch_rtx.ir import MAIN, Attr, Graph, Node, TensorType, Value, attr_map, contiguous
from torch_rtx.lowering.constants import MAX_ELEMENTS, Constants
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.index import from_dim, product, ravel
from torch_rtx.lowering.kernels.kernel_ir import ONE
from torch_rtx.lowering.positions import AtLeastZero, Positions
from torch_rtx.lowering.rewrite import Rewriter, escaping, rewrite
from torch_rtx.op_work import ATTENTION, SDPA

CONJUNCTIONS = ("aten.bitwise_and.Tensor", "aten.logical_and.default")


def simplify_masks(graph: Graph, infer: Inference) -> Graph:
    """Level import to level import."""
    constants, positions, escapes = Constants(graph), Positions(graph), escaping(graph)
    made: dict[tuple[int, str], Value] = {}  # by the id of a choice and by condition: the choice by this condition

    def chosen(choice: Node, condition: Value, rewriter: Rewriter) -> Value:
        key = id(choice), condition.name
        if key not in made:
            args = {**dict(choice.args), "condition": condition}
            current = {name: attr_map(attr, rewriter.current) for name, attr in args.items()}
            made[key] = rewriter.emit(choice.op, choice.loc, **current)
        return made[key]

    def visit(node: Node, rewriter: Rewriter) -> bool:
        if node.op == "aten.index.Tensor":
            aliased = any(value is not None and value.name in escapes for value in (*node.inputs, *node.outputs))
            return not aliased and _as_view(node, constants, positions, rewriter)
        mask = node.arg("attn_mask")
        if node.op not in (SDPA, ATTENTION) or not isinstance(mask, Value) or node.arg("is_causal"):
            return False
        if node.arg("bias") is not None:
            return False
        condition, choice = condition_of(mask, constants)
        needed, op = _needed(condition, constants, positions), node.op
        sees_itself = op == SDPA or (node.arg("sink") is not None and node.arg("fill") is None)
        causal = needed is not None and sees_itself and _is_causal(needed, _scores(node), constants, positions)
        if needed is not None and not causal and choice is not None:
            needed = mask if needed is condition else chosen(choice, needed, rewriter)
        args: dict[str, Attr] = dict(node.args)
        if needed is None:
            del args["attn_mask"]
            args.pop("fill", None)
            op = SDPA if node.arg("sink") is None else op
        elif causal:
            del args["attn_mask"]
            args["is_causal"] = True
        elif needed is not mask and len(needed.type.shape) >= 2:  # type: ignore[union-attr]  # a tensor, like `mask`
            args["attn_mask"] = needed
        else:
            return False
        order = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "fill", "enable_gqa", "sink")
        pairs = tuple((name, args[name]) for name in order if name in args)
        rewriter.keep(Node("op", op, pairs, node.outputs, None, node.loc))
        return True

    return rewrite(graph, infer, visit)


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """True where a mask lets a query attend to a key. The minimum of a dtype counts as minus infinity, as in models."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min


def condition_of(mask: Value, constants: Constants) -> tuple[Value, Node | None]:
    """The condition of a mask that adds 0 where it holds and else minus infinity; another mask as it is. And the call
    that chooses by the condition, if a mask must still be made of it: the minimum of a dtype hides nothing in rows
    without a visible key.
    """
    node = constants.producer.get(mask.name)
    while node is not None and node.op == "aten.expand.default" and isinstance(source := node.arg("self"), Value):
        node = constants.producer.get(source.name)
    if node is None or node.op != "aten.where.self":
        return mask, None
    condition, *numbers = (node.arg(name) for name in ("condition", "self", "other"))
    zero, hidden = map(constants.find, numbers)
    if zero is None or hidden is None or not isinstance(condition, Value) or not isinstance(condition.type, TensorType):
        return mask, None
    if zero.dtype == torch.bool or not bool((zero == 0).all()) or bool(visible_keys(hidden).any()):
        return mask, None
    if len(condition.type.shape) < 2:
        return mask, None
    return condition, None if bool((hidden == -torch.inf).all()) else node


def _needed(mask: Value, constants: Constants, positions: Positions) -> Value | None:
    """`mask` without the operands of conjunctions that hide no key; None if nothing remains."""
    known = constants.find(mask)
    if known is not None:
        neutral = known if known.dtype == torch.bool else known == 0
        return None if bool(neutral.all()) else mask
    type_ = mask.type
    if isinstance(type_, TensorType) and type_.dtype == "bool" and positions.element(mask)[1] == ONE:
        return None
    node = constants.producer.get(mask.name)
    if node is None or node.op not in CONJUNCTIONS:
        return mask
    operands = [value for name in ("self", "other") if isinstance(value := node.arg(name), Value)]
    if any(not isinstance(v.type, TensorType) or v.type.dtype != "bool" for v in operands) or len(operands) < 2:
        return mask
    needed = [value for value in operands if _needed(value, constants, positions) is not None]
    if len(needed) == len(operands):
        return mask
    return _needed(needed[0], constants, positions) if needed else None


def _scores(node: Node) -> tuple[object, object]:
    query, key = node.arg("query"), node.arg("key")
    assert isinstance(query, Value)
    assert isinstance(query.type, TensorType)
    assert isinstance(key, Value)
    assert isinstance(key.type, TensorType)
    return query.type.shape[-2], key.type.shape[-2]


def _is_causal(mask: Value, size: tuple[object, object], constants: Constants, positions: Positions) -> bool:
    """Whether each query attends to exactly the keys up to its own position, with nothing added to their scores."""
    source = constants.producer.get(mask.name)
    known = constants.find(mask)
    if known is None and source is not None and source.op == "aten.expand.default":
        known = constants.find(source.arg("self"))  # expanded to a dynamic batch
    if known is None:
        position, element = positions.element(mask)
        fits = len(position) > 1 and mask.type.shape[-2:] == size  # type: ignore[union-attr]  # it has positions
        return fits and element == AtLeastZero(position[-2] - position[-1])
    if not all(isinstance(s, int) for s in size) or known.dim() < 2 or known.shape[-2:] != size:
        return False
    visible = visible_keys(known)
    adds_nothing = known.dtype == torch.bool or bool((known[visible] == 0).all())
    return adds_nothing and bool((visible == torch.ones(known.shape[-2:], dtype=torch.bool).tril()).all())


def _as_view(node: Node, constants: Constants, positions: Positions, rewriter: Rewriter) -> bool:
    """Replace an index that reads every element in order by a view, as for lookups of padding by positions."""
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
    rewriter.replace(
        output, rewriter.emit("aten.view.default", node.loc, self=rewriter.current(source), size=result.shape)
    )
    return True


def _in_order(type_: TensorType, indices: tuple[Attr, ...], constants: Constants) -> bool:
    """Whether constant indices of a tensor with static sizes read every element in order."""
    found = [constants.find(index) for index in indices]
    sizes = [size for size in type_.shape if isinstance(size, int)]
    if any(index is None for index in found) or len(sizes) != len(type_.shape):
        return False
    count = int(torch.Size(sizes).numel())
    if count > MAX_ELEMENTS:
        return False
    taken = torch.arange(count).view(sizes)[tuple(index for index in found if index is not None)]
    return taken.numel() == count and torch.equal(taken.flatten(), torch.arange(count))


def _in_order_for_any_size(node: Node, source: TensorType, result: TensorType, positions: Positions) -> bool:
    if source.device != MAIN:
        return False
    position, there = positions.taken(node)
    shape, sizes = (tuple(map(from_dim, type_.shape)) for type_ in (result, source))
    return there is not None and product(shape) == product(sizes) and ravel(position, shape) == ravel(there, sizes)
