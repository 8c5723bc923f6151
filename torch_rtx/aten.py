"""The ATen calls that an engine may make, and the conversion of IR attributes to their arguments.

An op of the IR has the name and the meaning of an ATen overload such as `aten.linear.default`. Only the names in
`ALLOWED` are ever looked up, so that the text of an engine can't reach anything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from torch_rtx import (
    attention_gradients,
    collectives,
    detection,
    dtypes,
    flex_attention,
    foreign_op,
    grouped_mm,
    host_ops,
    one_shot,
    scaled_mm,
    scatters,
)
from torch_rtx.errors import InvalidIR, Unsupported
from torch_rtx.ir import MAIN, Attr, Graph, Node, TensorType, Value, attr_values
from torch_rtx.optable import ALLOWED, COLLECTIVES, DECIDED, LAUNCH, WAIT

__all__ = [
    *("ALLOWED", "DTYPES", "MAY_ALIAS", "OUT", "STRIDED", "UNINITIALIZED"),
    *("aliased", "bases", "draws", "dtype_name", "exists", "extent", "is_random", "is_view", "may_alias", "number_op"),
    *("out_of", "overload", "schema", "shared", "to_torch"),
]

number_op = host_ops.number_op
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch) for name, dtype in dtypes.DTYPES.items() if hasattr(torch, dtype.torch)
}
# Ops whose result depends on the strides of their inputs, or that expect some and do not check: these must be the
# strides of the capture.
STRIDED = frozenset(
    f"aten.{name}"
    for name in (
        "as_strided.default",
        "as_strided_copy.default",
        "as_strided_scatter.default",
        "_reshape_alias.default",
        "_weight_norm_interface.default",
    )
) | {"aten.view.dtype", "aten.view_as_complex.default", LAUNCH, *COLLECTIVES}
# Library calls whose `out=` writes the result in place; the `out=` of others copies it there.
OUT = frozenset(
    f"aten.{name}"
    for name in ("mm.default", "mm.dtype", "addmm.default", "bmm.default", "bmm.dtype", "baddbmm.default")
)
# Ops whose results may alias an input although their schemas do not say so.
MAY_ALIAS = frozenset(
    f"aten.{name}"
    for name in (
        "_unsafe_view.default",
        "channel_shuffle.default",
        "lift.default",
        "native_dropout.default",
        "pixel_shuffle.default",
        "pixel_unshuffle.default",
        "unsafe_split.Tensor",
    )
) | {WAIT}
# Ops whose results PyTorch does not initialize. An engine fills them with zeros: it returns no memory of the process.
UNINITIALIZED = frozenset(
    f"aten.{name}"
    for name in (
        *("empty.memory_format", "empty_like.default", "empty_permuted.default", "empty_strided.default"),
        *("new_empty.default", "new_empty_strided.default"),
    )
)
# Operators of this package that run in place of calls with the same arguments, which exist for some of them alone, or
# copy memory that is not theirs.
_STAND_INS = {
    "aten._int_mm.default": "torch_rtx.int_mm.default",
    "aten._scaled_mm.default": "torch_rtx.scaled_mm.default",
    **{f"aten.{name}.default": f"torch_rtx.{name}.default" for name in scatters.VIEWS},
    "_c10d_functional.all_reduce_.default": "torch_rtx.all_reduce_.default",
}
_IN_PLACE_OF = {own: name for name, own in _STAND_INS.items()}
_DECLARED = (
    attention_gradients,
    detection,
    flex_attention,
    foreign_op,
    grouped_mm,
    one_shot,
    scaled_mm,
)  # importing them declares operators
_DECLARING = {  # by namespace: the module that declares what its operators return
    "_c10d_functional": "torch.distributed._functional_collectives",
    "_dtensor": "torch.distributed.tensor._collective_utils",
}
_OPTIONAL = re.compile(r"Optional\[(.*)\]")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The IR's name of a dtype.

    Raises:
        Unsupported: the IR has no name for it (quantized and sub-byte dtypes).
    """
    if dtype not in _NAMES:
        raise Unsupported(f"dtype {dtype}")
    return _NAMES[dtype]


@cache
def overload(name: str, trusted: frozenset[str] = frozenset()) -> torch._ops.OpOverload:
    """The operator called `name` (namespace.op.overload).

    Args:
        trusted: names allowed in addition to the allow-list, for operators that fall back.

    Raises:
        InvalidIR: not allowed, or not registered in this process.
    """
    if name not in ALLOWED and name not in trusted:
        hint = "trusted_ops=[...] allows more, if you trust the file"
        raise InvalidIR(f"op {name} is not on the allow-list", hint=hint)
    namespace, _, rest = _STAND_INS.get(name, name).partition(".")
    if namespace in _DECLARING and torch.distributed.is_available():
        import_module(_DECLARING[namespace])
    op, _, overload_name = rest.rpartition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), op), overload_name)
    except AttributeError:
        hint = "import the library that registers it first" if namespace != "aten" else f"torch is {torch.__version__}"
        raise InvalidIR(f"op {name} does not exist in this process", hint=hint) from None


def of_pytorch(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The operator in whose place one of this package runs; others as they are."""
    namespace, _, rest = _IN_PLACE_OF.get(str(op), "aten.").partition(".")
    name, _, overload_name = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload_name) if name else op


def exists(name: str) -> bool:
    """Whether this PyTorch has the operator: some that are allowed come with a release, or go."""
    namespace, op, overload_name = name.split(".")
    return hasattr(getattr(getattr(torch.ops, namespace), op, None), overload_name)


@cache
def schema(op: torch._ops.OpOverload) -> dict[str, tuple[str, bool]]:
    """For each argument of `op`, in order: its schema type without Optional, and whether it is keyword-only."""
    types = ((arg, _OPTIONAL.sub(r"\1", str(arg.real_type))) for arg in op._schema.arguments)
    return {arg.name: (type_, arg.kwarg_only) for arg, type_ in types}


def out_of(name: str) -> torch._ops.OpOverload:
    """The `out=` overload of an operator of `OUT`."""
    _, op, kind = name.split(".")
    return getattr(getattr(torch.ops.aten, op), "out" if kind == "default" else f"{kind}_out")


@cache
def is_view(op: torch._ops.OpOverload) -> bool:
    """Whether every output of `op` is an alias of an input, so that it moves no data."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def may_alias(node: Node, trusted: frozenset[str] = frozenset()) -> bool:
    """Whether a result of `node` may lie in the memory of an input. Results of kernels, of control flow, of Python
    functions and of fallbacks that are not `trusted` count as new."""
    return node.body is None and _may_alias(node.op, trusted)


@cache
def _may_alias(name: str, trusted: frozenset[str]) -> bool:
    if name == "python" or (name not in ALLOWED and name not in trusted):
        return False
    returns = overload(name, trusted)._schema.returns
    return name in MAY_ALIAS or any(result.alias_info is not None for result in returns)


def aliased(node: Node) -> tuple[Value, ...]:
    """The inputs of `node`, for which `may_alias` holds, in whose memory a result may lie."""
    tensor = collectives.waited(node)
    return node.inputs if tensor is None else (tensor,)


def bases(graph: Graph, trusted: frozenset[str] = frozenset()) -> dict[str, str]:
    """By the name of each value that may be a view: the name of the value in whose memory it lies."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        found |= {name: found.get(target.name, target.name) for name, target in node.updates.items()}
        if may_alias(node, trusted) and node.inputs:
            source = aliased(node)[0].name
            found.update(dict.fromkeys(_aliases(node, trusted), found.get(source, source)))
    return found


def _aliases(node: Node, trusted: frozenset[str]) -> list[str]:
    """The results of `node`, for which `may_alias` holds, that may lie in the memory of an input."""
    returns = overload(node.op, trusted)._schema.returns
    if len(returns) == 1:  # which may be a list
        return [value.name for value in node.results]
    declared = [i for i, result in enumerate(returns) if result.alias_info is not None]
    # Of the ops in MAY_ALIAS with several results, the first is the input itself and the others are new: of a dropout
    # that drops nothing, the mask.
    return [value.name for i in declared or [0] if (value := node.outputs[i]) is not None]


def shared(graph: Graph, trusted: frozenset[str] = frozenset()) -> set[str]:
    """The names of the values in whose memory several results of `graph` lie, and of all views of these."""
    base = bases(graph, trusted)
    results = {value.name for value in attr_values(graph.outputs)}
    counts = Counter(base.get(name, name) for name in results)
    found = {name for name, count in counts.items() if count > 1}
    return found | {view for view, name in base.items() if name in found}


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The span in memory from a tensor's first to its last element, in elements; 0 for an empty tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0


@cache
def is_random(op: torch._ops.OpOverload) -> bool:
    """Whether `op` draws from the random number generator, so that two calls differ."""
    return torch.Tag.nondeterministic_seeded in op.tags


def draws(node: Node) -> bool:
    """Whether a call draws random numbers; attention is a random operator that does not without dropout."""
    op = overload(node.op)
    return is_random(op) and ("dropout_p" not in schema(op) or node.arg("dropout_p", 0.0) != 0.0)


def is_decided(node: Node) -> bool:
    """Whether contents of tensors, or numbers of the host, decide a size or a number among the results."""
    if node.op == "aten.index.Tensor":
        masks = [one.type for one in node.arg("indices", ()) if isinstance(one, Value)]  # type: ignore[union-attr]
        return any(isinstance(type_, TensorType) and type_.dtype in ("bool", "u8") for type_ in masks)
    return node.op in DECIDED


@cache
def _device(name: str) -> torch.device:
    """The torch.device of `cpu`, `cuda`, `cuda1`, ..."""
    match = re.fullmatch(r"([a-z]+)(\d*)", name)
    if match is None or match[1] not in ("cpu", "cuda"):
        raise InvalidIR(f"no device {name!r}")
    return torch.device(match[1], int(match[2])) if match[2] else torch.device(match[1])


def to_torch(type_: str, attr: Attr, device: torch.device) -> Any:
    """The torch object for an attribute of schema type ScalarType, Device or MemoryFormat, which the IR has by name
    alone: PyTorch takes any number for one of these. Else `attr`.

    Args:
        device: the device that MAIN stands for.

    Raises:
        InvalidIR: unknown dtype, device or memory format.
    """
    if attr is None or not isinstance(attr, str):
        if attr is not None and type_ in ("ScalarType", "Device", "MemoryFormat", "Layout"):
            raise InvalidIR(f"{attr!r} is no {type_}")
        return attr
    if type_ == "ScalarType":
        if attr not in DTYPES:
            raise InvalidIR(f"this torch has no dtype {attr!r}")
        return DTYPES[attr]
    if type_ == "Device":
        return device if attr == MAIN else _device(attr)
    if type_ == "MemoryFormat":
        if attr not in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d"):
            raise InvalidIR(f"no memory format {attr!r}")
        return getattr(torch, attr)
    return attr


def _attention_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention to a range of the keys, before the division by the sum of the weights, in float32 or wider: the
    weighted sums of values, the largest score m of each query, and the sums of the weights exp(score - m). Where every
    score is minus infinity, m is finite and all weights are 0."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * scale
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (scores - largest).exp()
    return weights @ value.to(wide), largest, weights.sum(-1, keepdim=True)


def _seen(query: torch.Tensor, key: torch.Tensor, is_causal: bool, band: Sequence[int]) -> torch.Tensor | None:
    """Which keys queries see by their positions; None: all."""
    if not (is_causal or band):
        return None
    rows, columns = (torch.arange(one.shape[-2], device=query.device) for one in (query, key))
    distance = columns - rows[:, None]
    return distance <= 0 if is_causal else (distance >= band[0]) & (distance <= band[1])


def _both(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A mask without the keys that are not `seen`."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float,
    fill: float | None = None,
    enable_gqa: bool = False,
    bias: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    is_causal: bool = False,
    band: Sequence[int] = (),
) -> torch.Tensor:
    """Attention as models write it out. It differs from `aten.scaled_dot_product_attention` for scores that a boolean
    mask hides: they become `fill`, by default minus infinity. So a query that sees no key attends to all keys equally,
    or is NaN. A `bias` is added to the scores before these are hidden. A `sink` (..., queries, 1) is one more score of
    each query, which has no value: a query that sees no key is 0 then. With a `band`, (first, last), query i sees no
    key but those from i + first to i + last; with nothing else but a mask this is the ATen call with both masks."""
    seen = _seen(query, key, is_causal, band)
    if seen is not None and not is_causal and fill is None and bias is None and sink is None:
        mask = seen if attn_mask is None else _both(attn_mask, seen)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    scores = scores if bias is None else scores + bias
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        number = -torch.inf if fill is None else fill
        scores = scores.masked_fill(~attn_mask, number) if masked else scores + attn_mask
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    if sink is None:
        weights = scores.softmax(-1)
    else:
        joined = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        weights = joined.softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value


def _int_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> torch.Tensor:
    """The convolution of int8 [N, C, ...] with int8 filters [F, C / groups, ...], summed in int32. As `aten._int_mm`,
    it is undefined where a sum overflows, which takes at least 2**17 terms. Sums in float64 are exact until then.

    Raises:
        TypeError: an operand is not int8.
    """
    if input.dtype != torch.int8 or weight.dtype != torch.int8:
        raise TypeError(f"int_conv takes int8, not {input.dtype} and {weight.dtype}")
    rank = weight.dim() - 2
    sizes = [list(given) * (rank if len(given) == 1 else 1) for given in (stride, padding, dilation)]
    wide = (input.double(), weight.double(), None, *sizes, False, [0] * rank, groups)
    return torch.ops.aten.convolution.default(*wide).to(torch.int32)


def _int_mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """`aten._int_mm`, also for sizes that CUDA does not have it for."""
    return _padded_int_mm(self, mat2) if self.is_cuda else torch.ops.aten._int_mm.default(self, mat2)


def _padded_int_mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """CUDA's `aten._int_mm` has more than 16 rows, and multiples of 8 terms and columns: zeros fill these up."""
    (rows, terms), columns = self.shape, mat2.shape[1]
    below, right, deep = max(17 - rows, 0), -columns % 8, -terms % 8 if terms else 8
    if not below | right | deep:
        return torch.ops.aten._int_mm.default(self, mat2)
    self, mat2 = torch.constant_pad_nd(self, (0, deep, 0, below)), torch.constant_pad_nd(mat2, (0, right, 0, deep))
    return torch.ops.aten._int_mm.default(self, mat2)[:rows, :columns].contiguous()


def _to_int8(self: torch.Tensor) -> torch.Tensor:
    """Whole numbers as int8, for recipes of weights; waits for the device.

    Raises:
        OverflowError: one does not fit.
    """
    narrow = self.to(torch.int8)
    captured = self.is_cuda and torch.cuda.is_current_stream_capturing()
    if not captured and not torch.equal(narrow.to(self.dtype), self):
        low, high = (int(limit) for limit in self.aminmax())
        raise OverflowError(f"less its zero points it has {low} to {high}, and is stored as -128 to 127")
    return narrow


# What kernels compute and ATen has no call for; where no kernel is launched, this runs.
_LIBRARY = torch.library.Library("torch_rtx", "DEF")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, float scale, float? fill=None,"
    " bool enable_gqa=False, Tensor? bias=None, Tensor? sink=None, bool is_causal=False,"
    " int[] band=[]) -> Tensor"
)
_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")
_LIBRARY.define(
    "attention_partial(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, *, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention_partial", _attention_partial, "CompositeImplicitAutograd")
_LIBRARY.define(
    "int_conv(Tensor input, Tensor weight, int[1] stride=1, int[1] padding=0, int[1] dilation=1, int groups=1)"
    " -> Tensor"
)
_LIBRARY.impl("int_conv", _int_conv, "CompositeExplicitAutograd")
_LIBRARY.define("int_mm(Tensor self, Tensor mat2) -> Tensor")
_LIBRARY.impl("int_mm", _int_mm, "CompositeExplicitAutograd")
_LIBRARY.define("to_int8(Tensor self) -> Tensor")
_LIBRARY.impl("to_int8", _to_int8, "CompositeExplicitAutograd")
_LIBRARY.impl("to_int8", lambda self: torch.empty_like(self, dtype=torch.int8), "Meta")
