"""Attention of a training step, and its gradients: `torch_rtx.attention_forward` and `torch_rtx.attention_backward`.

PyTorch has a pair of operators for each library of attention. These two are all of them, without dropout: `library`,
a key of `LIBRARIES`, says whose call it is. It decides the layout of results, which is that of the library also where a
generated kernel computes them, so that either side of a step may be a kernel and the other one a call. Devices and
dtypes that the library does not have run the definition, in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARIES = {
    "efficient": "_scaled_dot_product_efficient_attention",
    "flash": "_scaled_dot_product_flash_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
}
ALIGNMENT = 16  # elements: of the rows of masks that "efficient" takes
_DTYPES = (torch.float16, torch.bfloat16)


def operators(library: str) -> tuple[Any, Any]:
    """The operators of a library, forward and backward."""
    name, calls = LIBRARIES[library], torch.ops.aten
    return getattr(calls, name).default, getattr(calls, f"{name}_backward").default


def _has_call(query: Tensor, library: str) -> bool:
    if library == "cpu":
        return query.device.type == "cpu"
    return query.is_cuda and (query.dtype in _DTYPES or (library == "efficient" and query.dtype == torch.float32))


def _in_aligned_rows(mask: Tensor | None) -> Tensor | None:
    """A mask in rows that "efficient" takes, padded as PyTorch does it before its own call."""
    if mask is None or mask.device.type == "meta":
        return mask
    *strides, last = mask.stride()
    if last == 1 and not any(stride % ALIGNMENT for stride in strides):
        return mask
    size = mask.shape[-1]
    once = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]  # of what is repeated
    return torch.nn.functional.pad(once, (0, -size % ALIGNMENT))[..., :size].expand(mask.shape)


def _one_mask(query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What a library takes in place of a mask and a bias."""
    if mask is None or bias is None:
        return mask
    return (mask + bias).to(query.dtype).expand(*query.shape[:3], key.shape[2])


def _forward_call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, library: str, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    call, _ = operators(library)
    if library == "cpu":
        found = call(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    else:
        masks = () if library == "flash" else (_in_aligned_rows(mask) if library == "efficient" else mask, True)
        found = call(query, key, value, *masks, 0.0, is_causal, scale=scale)
    return found[0], found[1]


def _backward_call(
    grad_out: Tensor,
    operands: Sequence[Tensor],
    mask: Tensor | None,
    results: Sequence[Tensor],
    library: str,
    is_causal: bool,
    scale: float | None,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The call of a library. The state of random numbers, of which there are none, is never read."""
    query, key, _ = operands
    lengths = (None, None, query.shape[2], key.shape[2])
    sizes, dtype = (((2,), ()), torch.uint64) if library == "flash" else (((), ()), torch.int64)
    state = [torch.empty(size, dtype=dtype, device=query.device) for size in sizes]
    _, call = operators(library)
    if library == "efficient":
        wanted = [True, True, True, mask_gradient]
        found = call(grad_out, *operands, _in_aligned_rows(mask), *results, *state, 0.0, wanted, is_causal, scale=scale)
        return found[0], found[1], found[2], found[3].contiguous() if mask_gradient else _nothing(query)
    if library == "cpu":
        found = call(grad_out, *operands, *results, 0.0, is_causal, attn_mask=mask, scale=scale)
    elif library == "flash":
        found = call(grad_out, *operands, *results, *lengths, 0.0, is_causal, *state, scale=scale)
    else:
        found = call(grad_out, *operands, *results, *state, mask, *lengths, 0.0, is_causal, scale=scale)
    return (*found, _nothing(query))


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _weights(
    query: Tensor, key: Tensor, masks: Sequence[Tensor | None], is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The weights of keys, and the logarithm of their sum before the division: 0 for a query that sees no key, whose
    weights are 0."""
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    for mask in (one for one in masks if one is not None):
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    statistic = torch.where(total == 0, 0.0, largest + total.log())
    return weights / torch.where(total == 0, 1.0, total), statistic.squeeze(-1)


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [one.to(dtype) for one in tensors]


def _shared(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values with each head repeated for the query heads that share it."""
    times = heads // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, 1)


def _laid_out(found: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Results in the dtypes and in the layout of `like`."""
    made = (
        torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=mine.device)
        for mine, one in zip(found, like, strict=True)
    )
    return [one.copy_(mine) for mine, one in zip(found, made, strict=True)]


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[Tensor | None],
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and scores, in float32 or wider."""
    heads, number = query.shape[1], 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    gradient, wide, keys, values = _wide(grad_out, query, *(_shared(one, heads) for one in (key, value)))
    weights, _ = _weights(wide, keys, masks, is_causal, scale)
    of_weights = gradient @ values.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    sums = (of_scores.mT @ wide * number, weights.mT @ gradient)
    of_key, of_value = (one.unflatten(1, (key.shape[1], -1)).sum(2) for one in sums)
    return of_scores @ keys * number, of_key, of_value, of_scores


def _on_meta(function: Callable[..., Any], *given: Any) -> Any:
    """The results of a function for tensors without memory."""
    return function(*(one.to("meta") if isinstance(one, Tensor) else one for one in given))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    library: str,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v, and what its gradient needs.

    Args:
        query: (B, H, M, D).
        key, value: (B, H, N, D) and (B, H, N, E), or of fewer heads, each of which several query heads share.
        attn_mask: boolean, True for what is visible, or added to the scores; of a shape that expands to (B, H, M, N).
        library: whose layout the results have.
        is_causal: a query sees the keys up to its own position.
        scale: of the scores; None: 1 / sqrt(D).
        bias: added to the scores beside a mask, and as large.

    Returns:
        The result (B, H, M, E), and of each query the logarithm of the sum of exponentials of scores, in float32 or
        wider. Those of "efficient" are padded with infinity to a multiple of 32; those of "cudnn" may have a last
        dimension of 1.
    """
    if _has_call(query, library):
        mask = _one_mask(query, key, attn_mask, bias)
        return _forward_call(query, key, value, mask, library, is_causal, scale)
    wide, keys, values = _wide(query, *(_shared(one, query.shape[1]) for one in (key, value)))
    weights, statistic = _weights(wide, keys, (attn_mask, bias), is_causal, scale)
    like = _forward_room(query, key, value, attn_mask, library=library, is_causal=is_causal, scale=scale, bias=bias)
    statistic = torch.nn.functional.pad(statistic, (0, like[1].shape[2] - query.shape[2]), value=torch.inf)
    out, statistic = _laid_out((weights @ values, statistic.view(like[1].shape)), like)
    return out, statistic


def _forward_room(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    library: str,
    is_causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if library not in LIBRARIES:
        raise ValueError(f"library is {library!r}, not one of {', '.join(LIBRARIES)}")
    mask = _one_mask(query, key, attn_mask, bias)
    out, statistic = _on_meta(_forward_call, query, key, value, mask, library, is_causal, scale)
    return out, statistic.double() if query.dtype == torch.float64 else statistic


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *,
    library: str,
    is_causal: bool = False,
    scale: float | None = None,
    mask_gradient: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `attention_forward`, whose results are `out` and `logsumexp`.

    Args:
        mask_gradient: that of the mask, or of its sum with a bias, is wanted, in the shape (B, H, M, N). A mask without
            a bias must then have this shape.

    Returns:
        The gradients of query, key, value and mask in the dtypes of these; the last one is empty if it is not wanted.
    """
    options = (library, is_causal, scale, mask_gradient)
    if _has_call(query, library):
        mask = _one_mask(query, key, attn_mask, bias)
        return _backward_call(grad_out, (query, key, value), mask, (out, logsumexp), *options)
    *sums, of_scores = _gradients(grad_out, query, key, value, (attn_mask, bias), is_causal, scale)
    like = _backward_room(
        grad_out,
        query,
        key,
        value,
        attn_mask,
        out,
        logsumexp,
        library=library,
        is_causal=is_causal,
        scale=scale,
        mask_gradient=mask_gradient,
        bias=bias,
    )
    found = (*sums, of_scores if mask_gradient else _nothing(query))
    of_query, of_key, of_value, of_mask = _laid_out(found, like)
    return of_query, of_key, of_value, of_mask


def _backward_room(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *,
    library: str,
    is_causal: bool = False,
    scale: float | None = None,
    mask_gradient: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def call(*given: Any) -> Any:
        gradient, query, key, value, mask, out, logsumexp, *options = given
        return _backward_call(gradient, (query, key, value), mask, (out, logsumexp), *options)

    options = (library, is_causal, scale, mask_gradient)
    mask = _one_mask(query, key, attn_mask, bias)
    given = (grad_out, query, key, value, mask, out, logsumexp)
    of_query, of_key, of_value, of_mask = _on_meta(call, *given, *options)
    return of_query, of_key, of_value, of_mask


def _backward_partial(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    rows: int,
    scale: float | None = None,
    mask_gradient: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attention_backward`, but for each range of `rows` queries gradients of keys and values of its own, in float32
    or wider, with the number of the range before all other dimensions."""
    found = []
    for start in range(0, query.shape[2], rows):
        at = slice(start, start + rows)
        gradient, queries = (one[:, :, at] for one in (grad_out, query))
        masks = [one if one is None or one.shape[-2] == 1 else one[..., at, :] for one in (attn_mask, bias)]
        found.append(_gradients(gradient, queries, key, value, masks, False, scale))
    of_queries, of_keys, of_values, of_scores = zip(*found, strict=True)
    of_mask = torch.cat(of_scores, 2).to(query.dtype) if mask_gradient else _nothing(query)
    return torch.cat(of_queries, 2).to(query.dtype), torch.stack(of_keys), torch.stack(of_values), of_mask


_LIBRARY = torch.library.Library("torch_rtx", "FRAGMENT")
_OPTIONS = "str library, bool is_causal=False, float? scale=None"
_BIAS = "Tensor? bias=None"
_LIBRARY.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, {_OPTIONS}, {_BIAS})"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor out,"
    f" Tensor logsumexp, *, {_OPTIONS}, bool mask_gradient=False, {_BIAS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_backward_partial(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *,"
    f" int rows, float? scale=None, bool mask_gradient=False, {_BIAS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention_backward_partial", _backward_partial, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_forward", _forward_room, "Meta")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _backward_room, "Meta")
