"""Operators that capture replaces by other ATen calls: those of `prims`, of lists of tensors, of checks, `resize`,
instance norms, fake quantization, products that have several forms, those of packed weights, distances, and cells of
recurrences.

Composite operators decompose by themselves, see `capture`. These do not, and would be opaque to an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import _prims as prims
from torch._inductor import inductor_prims

from torch_rtx.backend.fake_quantization import FAKE_QUANTIZATION

Overload = torch._ops.OpOverload

# What `_foreach_NAME` does to one item of the lists, where `torch.NAME` does not do it.
_ITEM: dict[str, Callable[..., Tensor]] = {
    "copy": lambda x, source, non_blocking=False: torch.ops.aten.copy(x, source, non_blocking),
    "zero": torch.zeros_like,
    "norm": lambda x, ord=2, dtype=None: torch.linalg.vector_norm(x, ord, dtype=dtype),
    "addcdiv": lambda x, one, two, value=1: torch.addcdiv(x, one, two, value=value),
    "addcmul": lambda x, one, two, value=1: torch.addcmul(x, one, two, value=value),
    "maximum": lambda x, other: (torch.maximum if isinstance(other, Tensor) else torch.clamp_min)(x, other),
    "minimum": lambda x, other: (torch.minimum if isinstance(other, Tensor) else torch.clamp_max)(x, other),
}


def _prims() -> Iterator[tuple[Overload, Callable[..., Any]]]:
    """Each operator of `prims`, and the ATen calls that PyTorch implements it by."""
    for operator in (*vars(prims).values(), getattr(inductor_prims, "fma", None)):  # fma: of optimizers
        if isinstance(operator, Overload) and operator.namespace == "prims" and not operator._schema.is_mutable:
            yield operator, operator.impl_aten  # type: ignore[attr-defined]


def _foreach() -> Iterator[tuple[Overload, Callable[..., Any]]]:
    """Each functional operator on lists of tensors, as one call per item of the lists."""
    for schema in torch._C._jit_get_all_schemas():
        name, overload = schema.name.removeprefix("aten::_foreach_"), schema.overload_name or "default"
        function = _ITEM.get(name) or getattr(torch, name, None)
        if name != schema.name and not schema.is_mutable and "out" not in overload and function is not None:
            packet = getattr(torch.ops.aten, f"_foreach_{name}")
            if "Tensor scalars" not in str(schema):  # a tensor of numbers on the host
                yield getattr(packet, overload), partial(_by_item, function)


def _by_item(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    count = next(len(arg) for arg in args if isinstance(arg, list | tuple))
    items = [[arg[i] if isinstance(arg, list | tuple) else arg for arg in args] for i in range(count)]
    return [function(*item, **kwargs) for item in items]


def _resize(self: Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None) -> Any:
    """The first elements in memory in another shape; those beyond the old ones, which have no defined value in PyTorch,
    are 0."""
    if memory_format not in (None, torch.contiguous_format):
        return NotImplemented
    flat = self.reshape(-1) if self.is_contiguous() else self.clone().as_strided((self.numel(),), (1,))
    count = math.prod(size)
    if count > flat.shape[0]:
        flat = torch.cat((flat, flat.new_zeros(count - flat.shape[0])))
    return flat[:count].clone().view(size)


def _resize_as(self: Tensor, the_template: Tensor, *, memory_format: torch.memory_format | None = None) -> Any:
    return _resize(self, the_template.shape, memory_format=memory_format)


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """A group norm with a group for each channel; with running statistics, a batch norm in inference."""
    if not use_input_stats:
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    channels = input.shape[1]
    if running_mean is not None or running_var is not None or not isinstance(channels, int):
        return NotImplemented
    return torch.nn.functional.group_norm(input, channels, weight, bias, eps)


TENSOR_WISE, ROW_WISE, BLOCKS_OF_16, BLOCKS_OF_32 = range(4)  # of `torch.nn.functional.ScalingType`
BLOCK_RECIPES = ((BLOCKS_OF_16,), (BLOCKS_OF_32,), (BLOCKS_OF_16, TENSOR_WISE))


def _scaled_mm_v2(
    self: Tensor,
    mat2: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Any:
    """`F.scaled_mm`, where it has one scale, one for each row and column, or one for each block, and then one more for
    the whole."""
    recipe = tuple(recipe_a)
    if recipe != tuple(recipe_b) or contraction_dim:
        return NotImplemented
    multiply = torch.ops.aten._scaled_mm
    if recipe in BLOCK_RECIPES:
        one, two = scale_a[0], scale_b[0]  # PyTorch takes these in the layout of tensor cores alone
        if len(recipe) == 1:
            return multiply(self, mat2, one, two, bias, None, out_dtype, use_fast_accum)
        total = multiply(self, mat2, one, two, None, None, torch.float32, use_fast_accum) * (scale_a[1] * scale_b[1])
        return (total if bias is None else total + bias).to(out_dtype or torch.bfloat16)
    if recipe not in ((TENSOR_WISE,), (ROW_WISE,)) or any((*swizzle_a, *swizzle_b)):
        return NotImplemented
    (one,), (two,) = scale_a, scale_b
    if recipe == (ROW_WISE,):
        one, two = one.reshape(-1, 1), two.reshape(1, -1)
    return multiply(self, mat2, one, two, bias, None, out_dtype, use_fast_accum)


def _weight_int4pack_mm(self: Tensor, mat2: Tensor, qGroupSize: int, qScaleAndZeros: Tensor) -> Tensor:
    """A linear layer. In the layout of `_convert_weight_to_int4pack`, a word has 8 values of a column for one thread of
    a tensor core: of 32 along K four pairs, 8 apart; first those at even places."""
    tiles, runs, _, inner = mat2.shape
    lanes = mat2.view(tiles, runs, 8, 4, inner)  # K in runs of `inner` times 32; columns and pairs in 32 threads
    codes = lanes.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=mat2.device) & 15
    codes = codes.view(tiles, runs, 8, 4, inner, 2, 4).permute(0, 2, 1, 4, 6, 3, 5)
    columns, depth = 8 * tiles, 32 * runs * inner
    scale, zero = (one.t().unsqueeze(-1) for one in qScaleAndZeros.unbind(-1))
    wide = (codes.reshape(columns, -1, qGroupSize) - 8).to(self.dtype) * scale + zero
    return torch.nn.functional.linear(self, wide.view(columns, depth))


def _weight_int8pack_mm(self: Tensor, mat2: Tensor, scales: Tensor) -> Tensor:
    return torch.nn.functional.linear(self, mat2.to(self.dtype)) * scales


def _grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Groups of rows, with a matrix for each; groups of columns, or of K, remain a call."""
    if offs is None or bias is not None or self.dim() != 2 or mat2.dim() != 3 or out_dtype not in (None, self.dtype):
        return NotImplemented
    return torch.ops.torch_rtx.grouped_mm(self, mat2, offs)


def _euclidean_dist(x1: Tensor, x2: Tensor) -> Tensor:
    """By the squares of lengths, and one product."""
    squares = x1.pow(2).sum(-1, True) + x2.pow(2).sum(-1).unsqueeze(-2)
    return (squares - 2 * torch.matmul(x1, x2.mT)).clamp_min(0).sqrt()


def _gates(gates: Tensor, bias: Tensor | None, count: int) -> Sequence[Tensor]:
    return (gates if bias is None else gates + bias).chunk(count, 1)


def _lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state, the memory, and what the gradient needs."""
    pairs = zip(_gates(input_gates, input_bias, 4), _gates(hidden_gates, hidden_bias, 4), strict=True)
    taken, kept, new, shown = (one + two for one, two in pairs)
    taken, kept, new, shown = taken.sigmoid(), kept.sigmoid(), new.tanh(), shown.sigmoid()
    memory = kept * cx + taken * new
    return shown * memory.tanh(), memory, torch.cat((taken, kept, new, shown), 1)


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state, and what the gradient needs; of `aten._thnn_fused_gru_cell`, which has no other definition."""
    given, found = _gates(input_gates, input_bias, 3), _gates(hidden_gates, hidden_bias, 3)
    reset, update = ((given[gate] + found[gate]).sigmoid() for gate in (0, 1))
    new = (given[2] + reset * found[2]).tanh()
    return new + update * (hx - new), torch.cat((reset, update, new, hx, found[2]), 1)


DECOMPOSITIONS: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    **dict(_prims()),
    **dict(_foreach()),
    **FAKE_QUANTIZATION,
    torch.ops.prims.convert_element_type.default: lambda a, dtype: torch.ops.aten._to_copy(a, dtype=dtype),
    torch.ops.aten._is_all_true.default: torch.all,  # of `torch._check_tensor_all`
    torch.ops.aten._is_any_true.default: torch.any,
    torch.ops.aten.resize.default: _resize,
    torch.ops.aten.resize_as.default: _resize_as,
    torch.ops.aten.instance_norm.default: _instance_norm,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
    torch.ops.aten._scaled_mm_v2.default: _scaled_mm_v2,
    torch.ops.aten._euclidean_dist.default: _euclidean_dist,
    torch.ops.aten._thnn_fused_lstm_cell.default: _lstm_cell,
    torch.ops.aten._thnn_fused_gru_cell.default: gru_cell,
    torch.ops.aten._weight_int4pack_mm.default: _weight_int4pack_mm,
    torch.ops.aten._weight_int8pack_mm.default: _weight_int8pack_mm,
}
