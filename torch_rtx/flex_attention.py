"""Attention whose scores a function modifies, and its gradients: `torch_rtx.flex_attention` and three for the backward.

They are PyTorch's higher-order operators of these names, with modifications as text (see `score_mods`). Kernels inline
that text; the definitions here run it, for a range of queries at a time. Other than PyTorch's own definition they honor
the lists of blocks, as its kernels do: a key is seen if its block is listed as whole, or if its block is listed and the
mask lets it through.

`blocks` are the lists of a `BlockMask`: for each block of queries how many blocks of keys there are, (B, H, blocks),
and which, (B, H, blocks, places), then the same of blocks that are seen as a whole; B and H may be 1. No lists: all are
seen. `block_size` has the queries and keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_rtx.dtypes import DTYPES
from torch_rtx.ir import Attr, Graph, TensorType, Value, attr_values
from torch_rtx.score_mods import buffer_index, modification, terms_of

MOST_SCORES = 1 << 25  # that exist at once
LN2 = math.log(2)
IN_ORDER = (0, 1, 2, 3)  # of dimensions in memory, the last one moves fastest


@dataclass(frozen=True)
class _Scores:
    """Scores of the queries `rows` with all keys: before and after the modification, and which keys are seen."""

    rows: slice
    scaled: Tensor
    modified: Tensor
    seen: Tensor | None
    places: Mapping[str, Tensor]


def _run(text: str, given: Mapping[str, Tensor], buffers: Sequence[Tensor]) -> Tensor:
    """The result of a modification for tensors that broadcast to (B, H, M, N); in float64 if scores or buffers are."""
    (found,) = _run_graph(modification(text), given, buffers).values()
    return found


def _run_graph(graph: Graph, given: Mapping[str, Tensor], buffers: Sequence[Tensor]) -> dict[Value, Tensor]:
    """What the outputs of a modification's graph are; see `_run`."""
    values = dict[str, Tensor]()
    exact = any(tensor.dtype == torch.float64 for tensor in (*given.values(), *buffers))
    for value in graph.inputs:
        index = buffer_index(value)
        tensor = given[value.name] if index is None else buffers[index]
        values[value.name] = tensor if tensor.dim() else tensor.view(1, 1, 1, 1)

    def concrete(name: str, attr: Attr) -> Any:
        if isinstance(attr, Value):
            return values[attr.name]
        if isinstance(attr, tuple):
            return [concrete("", one) for one in attr]
        return dtype(str(attr)) if name == "dtype" and attr is not None else attr

    def dtype(name: str) -> torch.dtype:
        found = getattr(torch, DTYPES[name].torch)
        return torch.float64 if exact and found.is_floating_point else found

    device = next(iter(given.values())).device
    for node in graph.nodes:
        _, name, overload = node.op.split(".")
        made = getattr(getattr(torch.ops.aten, name), overload)(**{key: concrete(key, attr) for key, attr in node.args})
        (result,) = node.results
        assert isinstance(result.type, TensorType)
        found = made.to(device, dtype(result.type.dtype))
        values[result.name] = found if found.dim() else found.view(1, 1, 1, 1)
    return {value: values[value.name] for value in attr_values(graph.outputs)}


def _listed(count: Tensor, indices: Tensor, columns: int, share: tuple[int, int]) -> Tensor:
    """Which of `columns` blocks lists have in a share of their places: (B, H, blocks, columns)."""
    places, (which, shares) = torch.arange(indices.shape[-1], device=count.device), share
    count = count.clamp(max=indices.shape[-1])[..., None]
    is_listed = (places >= count * which // shares) & (places < count * (which + 1) // shares)
    room = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=count.device)
    return room.scatter_(-1, torch.where(is_listed, indices, columns).long(), True)[..., :columns]


def _seen(
    query: Tensor,
    key: Tensor,
    rows: slice,
    places: Mapping[str, Tensor],
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    mask_mod: str,
    block_size: Sequence[int],
    by_keys: bool,
    share: tuple[int, int],
) -> Tensor | None:
    """Which keys queries see, in a shape that broadcasts to (B, H, rows, N); None: all.

    Args:
        by_keys: the lists are of blocks of queries, for each block of keys.
        share: which share of the keys it is, and of how many.
    """
    mask = _run(mask_mod, places, buffers) if mask_mod else None
    if not blocks:
        which, shares = share
        size = -(-key.shape[2] // shares)
        within = (places["k"] >= size * which) & (places["k"] < size * (which + 1))
        return mask if shares == 1 else within if mask is None else mask & within
    sizes = list(zip((query, key), block_size, strict=True))
    counts = [-(-one.shape[2] // size) for one, size in sizes]
    at = [torch.arange(one.shape[2], device=query.device) // size for one, size in sizes]
    found: Tensor | None = None
    for index in range(0, len(blocks), 2):
        listed = _listed(blocks[index], blocks[index + 1], counts[0 if by_keys else 1], share)
        listed = listed.mT if by_keys else listed
        whole = listed[:, :, at[0][rows]][..., at[1]]
        if index:
            return whole if found is None else whole | found
        found = whole if mask is None else whole & mask
    return found


def _scores(
    query: Tensor,
    key: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scale: float,
    score_mod: str,
    mask_mod: str,
    block_size: Sequence[int],
    by_keys: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[_Scores]:
    batch, heads, queries, _ = query.shape
    step = max(1, MOST_SCORES // max(1, batch * heads * key.shape[2]))
    wide, device = torch.promote_types(query.dtype, torch.float32), query.device
    sizes = {"b": (batch, 1, 1, 1), "h": (heads, 1, 1), "q": (queries, 1), "k": (key.shape[2],)}
    all_places = {
        name: torch.arange(shape[0], dtype=torch.int32, device=device).view((1,) * (4 - len(shape)) + shape)
        for name, shape in sizes.items()
    }
    keys = key.to(wide).mT
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        places = {**all_places, "q": all_places["q"][:, :, rows]}
        scaled = query[:, :, rows].to(wide) @ keys * scale
        seen = _seen(query, key, rows, places, blocks, buffers, mask_mod, block_size, by_keys, share)
        modified = _run(score_mod, {"score": scaled, **places}, buffers).to(wide) if score_mod else scaled
        modified = modified.expand(scaled.shape)
        modified = modified if seen is None else torch.where(seen, modified, -torch.inf)
        yield _Scores(rows, scaled, modified, seen, places)


def _shared(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values with batches and heads repeated for the queries that share them."""
    times = query.shape[1] // tensor.shape[1]
    tensor = tensor if times == 1 else tensor.repeat_interleave(times, 1)
    return tensor.expand(query.shape[0], *tensor.shape[1:])


def _room(like: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    return torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device)  # type: ignore[arg-type]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    block_size: Sequence[int] = (),
    order: Sequence[int] = IN_ORDER,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(score_mod(q k^T * scale)) v over the keys that are seen.

    Args:
        query: (B, H, M, D).
        key, value: (B, H, N, D) and (B, H, N, E); B may be 1, and H a divisor of that of queries, which share them.
        blocks, block_size: see above.
        buffers: tensors that the modifications read.
        score_mod, mask_mod: see `score_mods`.
        order: of the dimensions of the result in memory.

    Returns:
        The result (B, H, M, E), 0 for a query that sees no key; and of each query, in float32 and in units of log(2),
        the logarithm of the sum of exponentials of its scores and the largest score: minus infinity without a key.

    Raises:
        InvalidIR: a text is no modification.
    """
    sizes = {"block_size": block_size, "order": order}
    out, logsumexp, largest = _forward_room(query, key, value, blocks, buffers, scale=scale, **sizes)  # type: ignore[arg-type]
    wide = torch.promote_types(query.dtype, torch.float32)
    values = _shared(value, query).to(wide)
    for part in _scores(query, _shared(key, query), blocks, buffers, scale, score_mod, mask_mod, block_size):
        top = part.modified.amax(-1, keepdim=True) if key.shape[2] else part.modified.new_full((), -torch.inf)
        weights = (part.modified - top.clamp_min(torch.finfo(wide).min)).exp()
        total = weights.sum(-1, keepdim=True)
        out[:, :, part.rows] = (weights / torch.where(total == 0, 1, total)) @ values
        logsumexp[:, :, part.rows] = ((top + total.log()) / LN2).squeeze(-1)
        largest[:, :, part.rows] = (top / LN2).squeeze(-1)
    return out, logsumexp, largest


def _check_lists(held: Tensor, blocks: Sequence[Tensor], block_size: Sequence[int], by_keys: bool = False) -> None:
    """Check that every block of `held`, queries or `by_keys` keys, has lists: kernels read these without a look at how
    many there are."""
    torch._check(len(blocks) in (0, 2, 4), lambda: f"{len(blocks)} tensors are no lists of blocks")
    if not blocks:
        return
    torch._check(len(block_size) == 2 and min(block_size) > 0, lambda: f"blocks of {list(block_size)} elements")
    needed = -(-held.shape[2] // block_size[by_keys])
    for count, indices in zip(blocks[::2], blocks[1::2], strict=True):
        torch._check(indices.dim() == 4 and count.dim() == 3, lambda: "lists of blocks have other dimensions")
        if all(isinstance(size, int) for size in (needed, *indices.shape, *count.shape)):  # others are not known yet
            problem = f"lists {tuple(count.shape)} and {tuple(indices.shape)} of {needed} blocks"
            torch._check(count.shape[2] >= needed and count.shape == indices.shape[:3], lambda text=problem: text)


def _forward_room(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    block_size: Sequence[int] = (),
    order: Sequence[int] = IN_ORDER,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_lists(query, blocks, block_size)
    rows = query.shape[:3]
    out = _room(query, (*rows, value.shape[3]), order)
    return out, query.new_empty(rows, dtype=torch.float32), query.new_empty(rows, dtype=torch.float32)


def _partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    shares: int,
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    block_size: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`flex_attention` before the division by the sum of weights, for each of `shares` parts of every list of blocks,
    or of the keys if there is none. In float32: weighted sums of values (shares, B, H, M, E), the largest score m of
    each query (shares, B, H, M, 1), finite also without a key, and the sums of weights exp(score - m) in this shape."""
    results = _partial_room(query, key, value, blocks, buffers, shares=shares, block_size=block_size)
    keys, values = _shared(key, query), _shared(value, query)
    for which in range(shares):
        share = (which, shares)
        for part in _scores(query, keys, blocks, buffers, scale, score_mod, mask_mod, block_size, share=share):
            top = part.modified.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
            weights = (part.modified - top).exp()
            found = weights @ values.to(weights.dtype), top, weights.sum(-1, keepdim=True)
            for result, one in zip(results, found, strict=True):
                result[which, :, :, part.rows] = one
    return results


def _partial_room(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Tensor],
    *_: Any,
    shares: int,
    block_size: Sequence[int] = (),
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_lists(query, blocks, block_size)
    shape, dtype = (shares, *query.shape[:3]), torch.promote_types(query.dtype, torch.float32)
    one = query.new_empty((*shape, value.shape[3]), dtype=dtype)
    return one, one.new_empty((*shape, 1)), one.new_empty((*shape, 1))


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    buffers: Sequence[Tensor],
    score_gradient: str,
    parts: Iterator[_Scores],
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each range of queries: which, the weights, the gradient of the scaled scores, and that of the result."""
    for part, of_modified, weights, gradient in _of_modified(grad_out, query, value, logsumexp, delta, parts):
        wide, rows = part.scaled.dtype, part.rows
        given = {"score": part.scaled, "g": of_modified, **part.places}
        of_scores = _run(score_gradient, given, buffers).to(wide) if score_gradient else given["g"]
        of_scores = of_scores.expand(part.scaled.shape)
        yield rows, weights, of_scores if part.seen is None else torch.where(part.seen, of_scores, 0), gradient


def _of_modified(
    grad_out: Tensor, query: Tensor, value: Tensor, logsumexp: Tensor, delta: Tensor, parts: Iterator[_Scores]
) -> Iterator[tuple[_Scores, Tensor, Tensor, Tensor]]:
    """For each range of queries: the scores, the gradient of the modified ones, the weights and the gradient of the
    result."""
    values = _shared(value, query)
    for part in parts:
        wide, rows = part.scaled.dtype, part.rows
        gradient, shift = grad_out[:, :, rows].to(wide), logsumexp[:, :, rows, None].to(wide)
        weights = torch.where(shift.isinf(), 0, (part.modified - shift * LN2).exp())
        of_weights = gradient @ values.to(wide).mT - delta[:, :, rows, None].to(wide)
        yield part, weights * of_weights, weights, gradient


def _grad_query(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    score_gradient: str = "",
    block_size: Sequence[int] = (),
    order: Sequence[int] = IN_ORDER,
) -> Tensor:
    """The gradient of the query of `flex_attention`, whose other arguments are the same.

    Args:
        grad_out: of the result (B, H, M, E).
        logsumexp: the second result of the forward (B, H, M).
        delta: for each query the sum of `grad_out` times the result, less the gradient of `logsumexp` in natural units.
        score_gradient: that of `score_mod` by its score, see `score_mods`; "": it is 1.
    """
    found, keys = _room(query, query.shape, order), _shared(key, query)
    parts = _scores(query, keys, blocks, buffers, scale, score_mod, mask_mod, block_size)
    saved = (logsumexp, delta, buffers, score_gradient, parts)
    for rows, _, of_scores, _ in _gradients(grad_out, query, key, value, *saved):
        found[:, :, rows] = of_scores @ keys.to(of_scores.dtype) * scale
    return found


def _grad_key_value(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    score_gradient: str = "",
    block_size: Sequence[int] = (),
    key_order: Sequence[int] = IN_ORDER,
    value_order: Sequence[int] = IN_ORDER,
) -> tuple[Tensor, Tensor]:
    """The gradients of key and value; see `_grad_query`.

    Args:
        blocks: the lists of blocks of queries, for each block of keys.
    """
    parts = _scores(query, _shared(key, query), blocks, buffers, scale, score_mod, mask_mod, block_size, by_keys=True)
    of_key = of_value = torch.zeros((), device=query.device)
    saved = (logsumexp, delta, buffers, score_gradient, parts)
    for rows, weights, of_scores, gradient in _gradients(grad_out, query, key, value, *saved):
        of_key = of_key + of_scores.mT @ query[:, :, rows].to(of_scores.dtype) * scale
        of_value = of_value + weights.mT @ gradient
    results = []
    for like, found, order in ((key, of_key, key_order), (value, of_value, value_order)):
        found = found.expand(*query.shape[:2], *like.shape[2:]).unflatten(1, (like.shape[1], -1)).sum(2)
        results.append(_room(like, like.shape, order).copy_(found.sum_to_size(like.shape)))
    return results[0], results[1]


def _grad_captured(
    self: Tensor,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    gradients: str,
    sizes: Sequence[int],
    ranks: Sequence[int],
    targets: Sequence[int],
    scale: float,
    score_mod: str = "",
    mask_mod: str = "",
    block_size: Sequence[int] = (),
) -> Tensor:
    """The gradients of tensors that `score_mod` captures, added to `self`; see `_grad_query`.

    Args:
        self: all elements of all these tensors, in the order of `sizes`, (total,).
        gradients, sizes, ranks, targets: see `score_mods.terms_of`. What would be added outside of a tensor is not.

    Raises:
        InvalidIR: they do not fit each other.
    """
    found, (graph, terms) = self.clone(), terms_of(gradients, sizes, ranks, targets)
    parts = _scores(query, _shared(key, query), blocks, buffers, scale, score_mod, mask_mod, block_size)
    for part, of_modified, *_ in _of_modified(grad_out, query, value, logsumexp, delta, parts):
        given = {"score": part.scaled, "g": of_modified, **part.places}
        values, shape = _run_graph(graph, given, buffers), part.scaled.shape
        for term in terms:
            added = values[term.number].to(found.dtype).expand(shape)
            is_added = torch.ones((), dtype=torch.bool, device=query.device) if part.seen is None else part.seen
            at = torch.full((), term.offset, device=query.device)
            for index, (place, size) in enumerate(zip(term.places, term.size, strict=True)):
                wrapped = torch.where(values[place] < 0, values[place] + size, values[place]).long()
                is_added = is_added & (wrapped >= 0) & (wrapped < size)
                at = at + wrapped * math.prod(term.size[index + 1 :])
            at, is_added = at.expand(shape), is_added.expand(shape)
            added = torch.where(is_added, added, 0)
            found.index_put_((torch.where(is_added, at, term.offset),), added, accumulate=True)
    return found


def _grad_captured_room(self: Tensor, grad_out: Tensor, query: Tensor, *given: Any, **options: Any) -> Tensor:
    _check_lists(query, given[4], options.get("block_size", ()))
    _, terms = terms_of(*(options[name] for name in ("gradients", "sizes", "ranks", "targets")))
    needed = max(term.offset + math.prod(term.size) for term in terms)
    fits = self.dim() == 1 and self.shape[0] >= needed
    torch._check(fits, lambda: f"{tuple(self.shape)} are not the {needed} elements of the gradients")
    return self.new_empty(self.shape)


def _grad_query_room(grad_out: Tensor, query: Tensor, *given: Any, **options: Any) -> Tensor:
    _check_lists(query, given[4], options.get("block_size", ()))
    return _room(query, query.shape, options.get("order", IN_ORDER))


def _grad_key_value_room(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    _check_lists(key, given[2], options.get("block_size", ()), by_keys=True)
    orders = options.get("key_order", IN_ORDER), options.get("value_order", IN_ORDER)
    return _room(key, key.shape, orders[0]), _room(value, value.shape, orders[1])


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_MODIFIED = 'float scale, str score_mod="", str mask_mod=""'
_LIBRARY.define(
    "flex_attention(Tensor query, Tensor key, Tensor value, Tensor[] blocks, Tensor[] buffers, *,"
    f" {_MODIFIED}, int[] block_size=[], int[] order=[0, 1, 2, 3]) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("flex_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_attention", _forward_room, "Meta")
_LIBRARY.define(
    "flex_attention_partial(Tensor query, Tensor key, Tensor value, Tensor[] blocks, Tensor[] buffers, *, int shares,"
    f" {_MODIFIED}, int[] block_size=[]) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("flex_attention_partial", _partial, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_attention_partial", _partial_room, "Meta")
_GIVEN = (
    "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor logsumexp, Tensor delta, Tensor[] blocks,"
    f' Tensor[] buffers, *, {_MODIFIED}, str score_gradient="", int[] block_size=[]'
)
_LIBRARY.define(f"flex_attention_grad_query({_GIVEN}, int[] order=[0, 1, 2, 3]) -> Tensor")
_CAPTURED = "str gradients, int[] sizes, int[] ranks, int[] targets"
_LIBRARY.define(
    "flex_attention_grad_captured(Tensor self, Tensor grad_out, Tensor query, Tensor key, Tensor value,"
    " Tensor logsumexp, Tensor delta, Tensor[] blocks, Tensor[] buffers, *,"
    f" {_CAPTURED}, {_MODIFIED}, int[] block_size=[]) -> Tensor"
)
_LIBRARY.impl("flex_attention_grad_captured", _grad_captured, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_attention_grad_captured", _grad_captured_room, "Meta")
_ORDERS = "int[] key_order=[0, 1, 2, 3], int[] value_order=[0, 1, 2, 3]"
_LIBRARY.define(f"flex_attention_grad_key_value({_GIVEN}, {_ORDERS}) -> (Tensor, Tensor)")
_LIBRARY.impl("flex_attention_grad_query", _grad_query, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_attention_grad_query", _grad_query_room, "Meta")
_LIBRARY.impl("flex_attention_grad_key_value", _grad_key_value, "CompositeExplicitAutograd")
_LIBRARY.impl("flex_attention_grad_key_value", _grad_key_value_room, "Meta")
