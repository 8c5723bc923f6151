"""Gives the calls of attention libraries in a joint graph one name, see `attention_gradients`.

Autograd calls a library's operators, which return and take, beside what is computed, the state of random numbers and
what describes ragged batches. Without dropout nothing reads these, but they would be saved. The operators that replace
them have kernels, and a definition that runs in any dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_rtx.attention_gradients import LIBRARIES, operators
from torch_rtx.backend.training import traced
from torch_rtx.lowering.kernels.attention_backward import MAX_KEYS

FORWARD = torch.ops.torch_rtx.attention_forward.default
BACKWARD = torch.ops.torch_rtx.attention_backward.default
aten = torch.ops.aten
FEW = 2  # times that what a mask is the sum of is in it, at least
RESULTS = 2  # of a library's forward that the operator has, too


def name_attention(graph: fx.Graph) -> None:
    """Replace the calls without dropout in `graph`."""
    for library in LIBRARIES:
        forward, backward = operators(library)
        for node in graph.find_nodes(op="call_function", target=backward):
            _replace_backward(graph, node, library)
        for node in graph.find_nodes(op="call_function", target=forward):
            _replace_forward(graph, node, library)
    _drop_padded_gradients(graph)


def _unpadded(graph: fx.Graph, mask: Any) -> Any:
    """A mask before PyTorch padded its rows for the library; a kernel reads rows that lie side by side faster. Where
    the library is called, its operator pads them again."""
    if mask is None or not statically_known_true(mask.meta["val"].shape[-1] <= MAX_KEYS):
        return mask
    cut = mask.args[0] if mask.target is aten.expand.default else mask
    if cut.target is not aten.slice.Tensor or len(cut.args) != 4:
        return mask
    padded, dim, start, _ = cut.args
    if padded.target is not aten.constant_pad_nd.default or dim not in (-1, 3) or start != 0:
        return mask
    before, pads = padded.args[:2]
    if len(pads) != 2 or pads[0] != 0 or before.meta["val"].shape != cut.meta["val"].shape:
        return mask
    if cut is mask:
        return before
    with graph.inserting_before(mask):
        made = graph.call_function(mask.target, (before, *mask.args[1:]))
    made.meta = {**mask.meta, "val": traced(made.target, made.args, {})}
    return made


def _addends(mask: Any) -> tuple[Any, Any]:
    """A mask as two, of which it is the sum, where both are much smaller: kernels add them as they read them. None for
    the second where there is no such sum."""
    if mask is None or not statically_known_true(mask.meta["val"].shape[-1] <= MAX_KEYS):
        return mask, None
    added = mask
    if added.target is aten.expand.default and added.args[0].meta["val"].shape == mask.meta["val"].shape:
        added = added.args[0]
    if added.target is aten._to_copy.default and added.kwargs.keys() == {"dtype"}:
        added = added.args[0]
    terms: tuple[Any, ...] = added.args if added.target is aten.add.Tensor and not added.kwargs else ()
    sizes = [term.meta["val"].numel() for term in terms if isinstance(term, fx.Node)]
    floats = all(isinstance(term, fx.Node) and term.meta["val"].is_floating_point() for term in terms)
    if len(sizes) == len(terms) == 2 and floats and statically_known_true(FEW * sum(sizes) <= mask.meta["val"].numel()):
        return terms[0], terms[1]
    return mask, None


def _drop_padded_gradients(graph: fx.Graph) -> None:
    """The gradient of such a mask is padded as the mask was, and cut again."""
    for node in graph.find_nodes(op="call_function", target=aten.constant_pad_nd.default):
        padded, pads = node.args[:2]
        if padded.target is not aten.slice_backward.default or len(pads) != 2 or pads[0] != 0:
            continue
        given = _arguments(padded)
        before, after = (one.meta["val"] for one in (given["grad_output"], node))
        same = before.shape == after.shape and before.stride() == after.stride()
        if same and given["dim"] in (-1, before.dim() - 1) and (given["start"], given["step"]) == (0, 1):
            node.replace_all_uses_with(given["grad_output"])
            graph.erase_node(node)


def _replace_forward(graph: fx.Graph, node: fx.Node, library: str) -> None:
    given = _arguments(node)
    _drop_unread(graph, node)
    results = {user.args[1] for user in node.users if user.target is operator.getitem}
    left_out = not given.get("compute_log_sumexp", True) or given.get("return_debug_mask", False)
    if left_out or not _is_plain(given, library) or not results <= set(range(RESULTS)):
        return
    mask, bias = _addends(_unpadded(graph, _mask(given)))
    operands = (given["query"], given["key"], given["value"], mask)
    _replace(graph, node, FORWARD, operands, {**_options(given, library), "bias": bias})


def _replace_backward(graph: fx.Graph, node: fx.Node, library: str) -> None:
    given = _arguments(node)
    mask, wanted = _mask(given), given.get("grad_input_mask", (True, True, True, False))
    if not _is_plain(given, library) or given.get("cum_seq_q") is not None:
        return
    options = _options(given, library)
    if mask is not None and wanted[3]:
        query, key = given["query"].meta["val"], given["key"].meta["val"]
        pairs = zip(mask.meta["val"].shape, (*query.shape[:3], key.shape[2]), strict=False)
        if mask.meta["val"].dim() != query.dim() or not all(statically_known_true(a == b) for a, b in pairs):
            return
        options["mask_gradient"] = True
    gradient = given.get("grad_out_", given.get("grad_out"))
    mask, options["bias"] = _addends(_unpadded(graph, mask))
    operands = (gradient, given["query"], given["key"], given["value"], mask, given["out"], given["logsumexp"])
    _replace(graph, node, BACKWARD, operands, options)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call, by name; those that it leaves out are not there."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _mask(given: Mapping[str, Any]) -> Any:
    return given.get("attn_bias", given.get("attn_mask"))


def _is_plain(given: Mapping[str, Any], library: str) -> bool:
    """No dropout; and a causal mask starts at the first query and the first key, where libraries agree."""
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    square = library == "efficient" or statically_known_true(query.shape[-2] == key.shape[-2])
    return given.get("dropout_p", 0.0) == 0.0 and query.dim() == 4 and (square or not given.get("is_causal", False))


def _options(given: Mapping[str, Any], library: str) -> dict[str, Any]:
    return {"library": library, "is_causal": given.get("is_causal", False), "scale": given.get("scale")}


def _drop_unread(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and not user.users:
            graph.erase_node(user)


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with graph.inserting_before(node):
        made = graph.call_function(target, args, kwargs)
    made.meta = {**node.meta, "val": traced(target, args, kwargs)}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    for user in made.users:
        if user.target is operator.getitem:
            user.meta["val"] = made.meta["val"][user.args[1]]
