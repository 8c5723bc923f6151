"""Lets calls that address memory count from where a tensor starts, instead of from where its storage starts.

`as_strided` and its like count from the start of the storage. The trace has a storage for each result; a program has
the arena, in which each result has a place. Memory of the caller has storages as in PyTorch: there they count as they
did.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_rtx import aten
from torch_rtx.errors import Unsupported

OFFSET = "storage_offset"
STRIDED, COPIED, SCATTERED = (
    getattr(torch.ops.aten, name).default for name in ("as_strided", "as_strided_copy", "as_strided_scatter")
)
SLICE, SLICE_SCATTER = torch.ops.aten.slice.Tensor, torch.ops.aten.slice_scatter.default
ARGUMENTS = {op: [argument.name for argument in op._schema.arguments] for op in (STRIDED, COPIED, SCATTERED)}


def count_from_tensors(gm: fx.GraphModule) -> None:
    """Rewrite the calls in `gm` that name a storage offset in memory which the graph, or the forward of it, computes.

    Raises:
        Unsupported: one addresses what no tensor of its dtype there holds.
    """
    for node in list(gm.graph.nodes):
        if node.target not in ARGUMENTS:
            continue
        named = dict(zip(ARGUMENTS[node.target], node.args, strict=False)) | node.kwargs
        if named.get(OFFSET) is None or not _is_computed(_memory(named["self"])):
            continue
        offset = _number(named.pop(OFFSET))
        if node.target is not SCATTERED:
            named["self"] = _memory(named["self"], same_dtype=True)
        offset = offset - named["self"].meta["val"].storage_offset()
        with gm.graph.inserting_before(node):
            found = _call(node, node.target, *named.values()) if _holds(offset == 0) else _moved(node, named, offset)
        node.replace_all_uses_with(found)
        gm.graph.erase_node(node)
        found.name = node.name


def _moved(node: fx.Node, named: dict[str, Any], offset: Any) -> fx.Node:
    """The call `node` with arguments `named`, which begins at `offset` elements after the start of its tensor."""
    base = named.pop("self")
    tensor = base.meta["val"]
    length = aten.extent(tensor.shape, tensor.stride())
    reach = aten.extent(*([_number(x) for x in named[name]] for name in ("size", "stride")))
    if not (_holds(offset >= 0) and _holds(offset + reach <= length)):
        raise Unsupported(f"{node.target} at an offset outside of the tensor that it is given")
    flat = _call(node, STRIDED, base, [length], [1])
    found = _call(node, node.target, _call(node, SLICE, flat, 0, offset), *named.values())
    if node.target is not SCATTERED:
        return found
    return _call(node, STRIDED, _call(node, SLICE_SCATTER, flat, found, 0, offset), [*tensor.shape], [*tensor.stride()])


def _call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call from the same place in the program as `like`."""
    made = like.graph.call_function(target, args)
    made.meta |= {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    made.meta["val"] = target(*fx.map_arg(args, _number))
    return made


def _number(argument: Any) -> Any:
    """What a node computes in the trace; other arguments as they are."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _holds(condition: Any) -> bool:
    return bool(statically_known_true(condition))


def _is_computed(root: fx.Node) -> bool:
    """Whether memory is that of a result: of this graph or, in a backward, of the forward. AOTAutograd's partitioners
    go by the same names."""
    if root.op != "placeholder":
        return root.op == "call_function"
    names = [node.name for node in root.graph.find_nodes(op="placeholder")]
    is_backward = any(name.startswith("tangents_") for name in names)
    return is_backward and not root.name.startswith(("primals_", "tangents_"))


def _memory(node: fx.Node, same_dtype: bool = False) -> fx.Node:
    """The tensor of which `node` is a view, or a view of views; with `same_dtype`, one of its dtype."""
    while (source := _source(node)) is not None:
        if same_dtype and source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that a node is a view of; None: it is none."""
    call: Any = node.args[0] if node.target is operator.getitem else node
    is_view = isinstance(call.target, torch._ops.OpOverload) and aten.is_view(call.target)
    return call.args[0] if is_view else None
