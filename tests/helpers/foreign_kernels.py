"""Triton kernels as users write them, and models that launch them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton


@triton.jit
def scaled_sum(x, y, out, n, alpha, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + alpha * tl.load(y + at, mask=inside), mask=inside)


@triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 128}, num_warps=4)], key=["n"])
@triton.jit
def tuned_sum(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.heuristics({"WHOLE": lambda args: args["columns"] == args["BLOCK"]})
@triton.jit
def row_softmax(x, out, stride, columns, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    if WHOLE:
        values = tl.load(x + row * stride + at).to(tl.float32)
    else:
        values = tl.load(x + row * stride + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + at, (weights / tl.sum(weights, 0)).to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


@triton.jit
def transposed(x, out, rows, columns, step_r, step_c, BLOCK: tl.constexpr):
    """Elements of `x`, with any strides, row by row; one program for each row and block of columns."""
    row, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * step_r + at * step_c, mask=at < columns)
    tl.store(out + row * columns + at, values, mask=at < columns)


@triton.jit
def wrong(x, out, n, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + n.no_such_thing))


@triton.jit
def product(a, b, out, scale, n, BLOCK: tl.constexpr):
    """`scale`: an element for each row, which the forward alone writes."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(a + at, mask=inside) * tl.load(b + at, mask=inside), mask=inside)
    tl.store(scale + tl.program_id(0), 1.0)


class Product(torch.autograd.Function):
    """A product whose gradients are kernels, too. It makes the device of its operands the current one."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return launch_product(a, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        return launch_product(grad.contiguous(), b), launch_product(grad.contiguous(), a)


def launch_product(a: Tensor, b: Tensor) -> Tensor:
    out, scale = torch.empty_like(a), torch.empty(triton.cdiv(a.numel(), 64), device=a.device)
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        product[(triton.cdiv(a.numel(), 64),)](a, b, out, scale, a.numel(), BLOCK=64)
    return out


@triton_op("rtxtests::scaled_sum", mutates_args={})
def scaled_sum_op(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    out = torch.empty_like(x)
    grid = lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)  # noqa: E731
    wrap_triton(scaled_sum)[grid](x, y, out, x.numel(), alpha, BLOCK=64)
    return out


@triton_op("rtxtests::softmax_plus_one", mutates_args={})
def softmax_plus_one(x: Tensor) -> Tensor:
    """Two launches, of which the second one writes to what the first one made."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    wrap_triton(row_softmax.fn)[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=block, WHOLE=False)
    wrap_triton(add_one)[(triton.cdiv(out.numel(), 64),)](out, out.numel(), BLOCK=64)
    return out


class Launches(nn.Module):
    """A model that calls a function of tensors, between operations that become kernels of the engine."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*(2 * x for x in args)).relu()


def directly(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    scaled_sum[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), 0.5, BLOCK=64)
    return out


def tuned(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    tuned_sum[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, out, x.numel())
    return out


def heuristic(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    row_softmax[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def in_place(x: Tensor) -> Tensor:
    add_one[(triton.cdiv(x.numel(), 64),)](x, x.numel(), BLOCK=64)
    return x


def of_a_view(x: Tensor) -> Tensor:
    """A transposed operand, and a grid of two axes."""
    view = x.t()
    out = torch.empty(view.shape, dtype=x.dtype, device=x.device)
    rows, columns = view.shape
    transposed[(triton.cdiv(columns, 32), rows)](view, out, rows, columns, *view.stride(), BLOCK=32)
    return out


def into_part(x: Tensor) -> Tensor:
    """Writes to the second half of rows of zeros."""
    out = torch.zeros(2 * x.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    half = out[x.shape[0] :]
    scaled_sum[(triton.cdiv(x.numel(), 64),)](x, x, half, x.numel(), 1.0, BLOCK=64)
    return out


# By name: the function, how many operands it takes, and the same in PyTorch.
CASES: dict[str, tuple[Callable[..., Tensor], int, Callable[..., Tensor]]] = {
    "function": (lambda x, y: Product.apply(x, y), 2, lambda x, y: x * y),
    "direct": (directly, 2, lambda x, y: x + 0.5 * y),
    "triton_op": (lambda x, y: scaled_sum_op(x, y, 0.25), 2, lambda x, y: x + 0.25 * y),
    "autotune": (tuned, 2, lambda x, y: x + y),
    "heuristics": (heuristic, 1, lambda x: x.softmax(-1)),
    "several": (softmax_plus_one, 1, lambda x: x.softmax(-1) + 1),
    "in_place": (in_place, 1, lambda x: x + 1),
    "view": (of_a_view, 1, lambda x: x.t().contiguous()),
    "part": (into_part, 1, lambda x: torch.cat((torch.zeros_like(x), x + x))),
}


@triton.jit
def rounded(x, out, n, BLOCK: tl.constexpr):
    """Through a float8 that GPUs have from sm_89 on."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    narrow = tl.load(x + at, mask=at < n).to(tl.float8e4nv)
    tl.store(out + at, narrow.to(tl.float32), mask=at < n)


def through_float8(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    rounded[(1,)](x, out, x.numel(), BLOCK=16)
    return out


@triton.jit
def of_a_pair(pair, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pair[1] + at, tl.load(pair[0] + at, mask=at < n), mask=at < n)


@triton.jit
def to_addresses(addresses, x, n, BLOCK: tl.constexpr):
    """Writes to memory whose address is a number in a tensor."""
    at = tl.arange(0, BLOCK)
    out = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


def hidden(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    of_a_pair[(1,)]((x, out), x.numel(), BLOCK=16)
    return out


def elsewhere(x: Tensor) -> Tensor:
    to_addresses[(1,)](torch.zeros(1, dtype=torch.int64, device=x.device), x, x.numel(), BLOCK=16)
    return x


def with_options(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    options = {"num_warps": 2, "maxnreg": 64, "enable_fp_fusion": False, "launch_pdl": True}
    scaled_sum[(1,)](x, x, out, x.numel(), 1.0, BLOCK=16, **options)
    return out
