"""Which results of the forward a training step saves, and which the backward computes again.

PyTorch's min-cut solver finds the fewest bytes to save. Which results may be computed again it takes from Inductor: a
list of operators that Inductor fuses, and nothing that the backward needs in memory, as the gradient of a weight does.
Here operators count that kernels compute in loops, norms among them, and such a result is computed again if the memory
is worth the work: `PRICE`. For a layer of a transformer this leaves the operands of attention, the sums before norms,
and the input of the activation; results of norms and activations are computed again, and so are large casts of
parameters, unless gradients take that memory later anyway: `save_for_free`.

Two wishes of users come first: regions of `checkpoint`, which PyTorch tags, and an `activation_memory_budget` below 1.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import config
from torch._functorch.partitioners import _size_of, min_cut_rematerialization_partition
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy

from torch_rtx import aten
from torch_rtx.backend.training import traced
from torch_rtx.lowering.from_fx import op_of
from torch_rtx.lowering.kernels.region import is_loop
from torch_rtx.lowering.passes.expand_norms import NORMS

PRICE = 4  # bytes that a kernel reads or writes in order to save one byte of memory
FEW = 4  # results of a reduction have so many times fewer bytes than its operands, and are always saved
SURE = 0.8  # of the most memory that a backward needs: what packing loses, and how kernels are fused, is not known yet
LAUNCH_BYTES = 2 << 20  # what a GPU reads or writes in the time that one more kernel takes beside that
# What a decision of ours replaces: the list of operators, and that nothing is computed again to lie in memory.
LEFT_TO_TAGS = {"ban_recompute_not_in_allowlist": False, "ban_recompute_materialized_backward": False}
TAG = "recompute"  # the key of PyTorch's decision on a node
POOLING = torch.ops.aten.max_pool2d_with_indices.default  # reads each element several times, in memory
BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default


def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph of a joint graph; arguments as for PyTorch's partitioner, which it calls.

    PyTorch's settings apply to a step that computes more again: `activation_memory_budget`, by region too, and
    `aggressive_recomputation`.
    """
    for norm in joint.graph.find_nodes(op="call_function", target=BATCH_NORM):
        _split_batch_norm(joint.graph, norm)
    later = _computed_from_gradients(joint.graph)
    budget = _budget(joint.graph)
    for node in joint.graph.nodes if later else ():
        undecided = node.meta.get(TAG) in (None, CheckpointPolicy.PREFER_SAVE)
        if node in later or node.op != "call_function" or not undecided:
            continue
        if _draws(node.target, node.args, node.kwargs):
            # PyTorch repeats the numbers of tagged nodes alone.
            node.meta[TAG] = CheckpointPolicy.MUST_SAVE if budget else CheckpointPolicy.PREFER_RECOMPUTE
        elif budget == 1 and not config.aggressive_recomputation and not _is_cheap(node, later):
            node.meta[TAG] = CheckpointPolicy.MUST_SAVE
    with config.patch(LEFT_TO_TAGS):
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
    forward, backward = _drop_generators(forward), _drop_generators(backward)
    if budget == 1 and not config.aggressive_recomputation:
        save_for_free(forward, backward, options["num_fwd_outputs"])
    return forward, backward


def _split_batch_norm(graph: fx.Graph, norm: fx.Node) -> None:
    """Standardize by the statistics that a batch norm returns, element by element, so that the result can be computed
    again without them. Kernels compute both as loops of their own anyway."""
    results = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    value, *statistics = norm.meta["val"][:3]
    wide, column = torch.promote_types(value.dtype, torch.float32), [-1] + [1] * (value.dim() - 2)
    if not results or norm.args[5] is not True or any(one.dtype != wide for one in statistics):
        return  # in evaluation there are no statistics
    aten_ops, (result,) = torch.ops.aten, results
    if not _is_worth(_size_of(result), _size_of(result)):
        return

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {**result.meta, "val": traced(target, args, kwargs)}
        return node

    def cast(node: Any, dtype: torch.dtype) -> Any:
        same = node.meta["val"].dtype == dtype
        return node if same else call(aten_ops._to_copy.default, node, dtype=dtype)

    def of_channels(node: Any) -> fx.Node:
        return call(aten_ops.view.default, cast(node, wide), column)

    with graph.inserting_before(result):
        image, weight, bias = norm.args[:3]
        mean, scale = (of_channels(call(operator.getitem, norm, index)) for index in (1, 2))
        made = call(aten_ops.mul.Tensor, call(aten_ops.sub.Tensor, cast(image, wide), mean), scale)
        if weight is not None:
            made = call(aten_ops.mul.Tensor, made, of_channels(weight))
        if bias is not None:
            made = call(aten_ops.add.Tensor, made, of_channels(bias))
        made = cast(made, value.dtype)
    if made.meta["val"].stride() == value.stride():
        result.replace_all_uses_with(made)
        graph.erase_node(result)


def _computed_from_gradients(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of the backward: all that depends on the gradients of the results."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and "tangents" in str(node.target)
        if given or (node.op != "output" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _budget(graph: fx.Graph) -> float:
    """The least budget that the user has set, for all graphs or for a region."""
    regions = (node.meta.get("custom") for node in graph.nodes)
    annotated = [found.get("_region_activation_memory_budget") for found in regions if isinstance(found, dict)]
    marked = [node.meta.get("memory_budget") for node in graph.nodes]
    return min(found for found in (config.activation_memory_budget, *annotated, *marked) if found is not None)


def _draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """The call draws random numbers; attention is such an operator, but not without dropout."""
    if not isinstance(op, torch._ops.OpOverload) or not aten.is_random(op):
        return False
    given = {**dict(zip(aten.schema(op), args, strict=False)), **kwargs}
    return "dropout_p" not in aten.schema(op) or given.get("dropout_p", 0.0) != 0.0


def _drop_generators(gm: fx.GraphModule) -> fx.GraphModule:
    """PyTorch makes generators of their own for all calls that it repeats and that may draw. Those that do not draw
    need none, and remain calls that an engine can hold."""
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.higher_order.graphsafe_run_with_rng_state:
            op, *args = node.args
            kwargs = {key: value for key, value in node.kwargs.items() if key != "rng_state"}
            if not _draws(op, args, kwargs):
                node.target, node.args, node.kwargs = op, tuple(args), kwargs
                node.meta["val"] = traced(op, args, kwargs)
    gm.recompile()
    return gm


def save_for_free(forward: fx.GraphModule, backward: fx.GraphModule, count: int) -> None:
    """Save what both graphs compute from one saved input alone, such as the cast of a weight, in place of that input,
    as far as the backward needs no more memory at once. Saved tensors go while gradients come: where these are more
    than what is saved, as with checkpoints, the cast of a weight lies where gradients will.

    Args:
        count: of the results of the forward that are not saved.
    """
    twins = {node.name: node for node in forward.graph.nodes}
    given = [node for node in backward.graph.find_nodes(op="placeholder") if node.name in twins and _is_tensor(node)]
    order = {node: index for index, node in enumerate(backward.graph.nodes)}
    needed = _needed([node for node in given if twins[node.name].op != "placeholder"], order)
    alone = {node: made for node in given if (made := _made_alone(node, twins)) is not None}
    most, instead = max(needed), dict[fx.Node, fx.Node]()
    for node, made in sorted(alone.items(), key=lambda pair: _last_use(pair[1], order)):
        until, size = _last_use(made, order) + 1, _size_of(made)
        if max(needed[:until]) + size > SURE * most:
            continue
        needed[:until] = [before + size for before in needed[:until]]
        instead[twins[node.name]] = twins[made.name]
        _give(node, made)
    output = forward.graph.output_node()
    results: Any = output.args[0]
    output.args = ((*results[:count], *(instead.get(one, one) for one in results[count:])),)
    forward.recompile()
    backward.recompile()


def _needed(saved: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> list[int]:
    """The bytes of saved tensors, gradients, and values between that lie in memory, by the position of each node."""
    *nodes, output = order
    results, sizes = set(output.all_input_nodes), dict[StorageWeakRef, tuple[int, int]]()
    for node in saved:
        memory = StorageWeakRef(node.meta["val"].untyped_storage())
        last, size = sizes.get(memory, (0, 0))
        sizes[memory] = max(last, _last_use(node, order)), max(size, _size_of(node))
    spans = [(0, last, size) for last, size in sizes.values()]
    for node in nodes:
        lies = node in results or not _is_loop(op_of(node)) or _needed_in_memory(node, order)
        if lies and node.op == "call_function" and "val" in node.meta and not _is_view(node):
            spans.append((order[node], _last_use(node, order), _size_of(node)))
    needed = [0] * len(order)
    for first, last, size in spans:
        needed[first : last + 1] = [before + size for before in needed[first : last + 1]]
    return needed


def _made_alone(given: fx.Node, twins: Mapping[str, fx.Node]) -> fx.Node | None:
    """What the backward computes from a saved input alone, instead of any other use of it, and the forward, too."""
    node, found = given, None
    while twins[given.name].op == "placeholder" and len(node.users) == 1:
        (user,) = node.users
        twin = twins.get(user.name)
        if twin is None or twin.target != user.target or user.all_input_nodes != [node]:
            break
        node = user
        if not _is_view(node) and _is_tensor(node):
            found = node
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)  # else a size, of which the runtime knows where it is saved


def _give(node: fx.Node, made: fx.Node) -> None:
    """Let the placeholder `node` be `made`, which is computed from it. The forward knows what it saves by name."""
    made.replace_all_uses_with(node)
    node.meta, name = made.meta, made.name
    while made is not node:
        (before,) = made.all_input_nodes
        made.graph.erase_node(made)
        made = before
    node.name = node.target = name


def _last_use(node: fx.Node, order: Mapping[fx.Node, int]) -> int:
    """The position of the last node that reads `node` or a view of it."""
    return max((_last_use(user, order) if _is_view(user) else order[user] for user in node.users), default=order[node])


def _is_cheap(node: fx.Node, later: set[fx.Node]) -> bool:
    """A kernel computes `node`, and it is part of one that the backward has anyway, or worth one of its own."""
    op = op_of(node)
    if _is_view(node) or not isinstance(op, torch._ops.OperatorBase):  # a function of sizes
        return True
    if not _is_loop(op) or op is POOLING:
        return False
    results = [user for user in node.users if user.target is operator.getitem] or [node]
    made, read = (sum(map(_size_of, nodes)) for nodes in (results, node.all_input_nodes))
    if made * FEW < read:
        return False
    return not _needed_in_memory(node, later) or _is_worth(made, read)


def _is_worth(made: int, read: int) -> bool:
    """Saving the memory of `made` bytes is worth a kernel that reads so many bytes."""
    return made + read + LAUNCH_BYTES <= PRICE * made


def _is_loop(op: Any) -> bool:
    return str(op) in NORMS or is_loop(str(op))


def _needed_in_memory(node: fx.Node, later: Container[fx.Node]) -> bool:
    """A call of the backward that is no kernel of loops reads `node`, an item of it, or a view."""
    return any(
        _needed_in_memory(user, later) if _is_view(user) else user in later and not _is_loop(op_of(user))
        for user in node.users
    )


def _is_view(node: fx.Node) -> bool:
    op = op_of(node)
    if node.target is operator.getitem:
        return True
    return isinstance(op, torch._ops.OpOverload) and (aten.is_view(op) or str(op) in aten.MAY_ALIAS)
