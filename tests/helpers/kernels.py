"""Kernels and graphs with kernels, written by hand, as code generation makes them."""

from __future__ import annotations

from dataclasses import replace

from torch_rtx.ir import Graph, Sym, dim_expr
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.kernel import Kernel

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
S = Sym("s", 1, 1 << 20)
S16 = Sym("s", 16, 1 << 20, 16)


def blocks(dim: object, size: int) -> object:
    """How many blocks of `size` cover a dim."""
    return dim_expr("//", dim_expr("+", dim, size - 1), size)  # type: ignore[arg-type]


# out = x + y, of any number of elements.
ADD = Kernel(
    "add",
    HEAD
    + """\
def add(x, y, out, n):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask) + tl.load(y + at, mask), mask)
""",
    ("f32", "f32", "f32"),
    (S,),
    (blocks(S, 1024), 1, 1),  # type: ignore[arg-type]
)
ADD_BF16 = replace(ADD, pointers=("bf16",) * 3)
# The same for 1000 elements.
ADD_1000 = Kernel(
    "add_1000",
    HEAD
    + """\
def add_1000(x, y, out):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    mask = at < 1000
    tl.store(out + at, tl.load(x + at, mask) + tl.load(y + at, mask), mask)
""",
    ("f32", "f32", "f32"),
    (),
    (1, 1, 1),
)
# Softmax of each row of x[s, 1000].
SOFTMAX = Kernel(
    "softmax",
    HEAD
    + """\
def softmax(x, out):
    row = tl.program_id(0)
    at = tl.arange(0, 1024)
    mask = at < 1000
    value = tl.load(x + row * 1000 + at, mask, float("-inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * 1000 + at, value / tl.sum(value, 0), mask)
""",
    ("f32", "f32"),
    (),
    (S, 1, 1),
)


def matmul(block: int = 128, stages: int = 4, dtype: str = "f16", deep: int = 64, size: Sym = S) -> Kernel:
    """a[m, k] @ b[k, n], with m = k = n = size. Shared memory grows with `stages`."""
    sum_dtype = "tl.int32" if dtype == "i8" else "tl.float32"
    source = f"""\
def matmul(a, b, out, m, n, k):
    rows = tl.program_id(0) * {block} + tl.arange(0, {block})
    columns = tl.program_id(1) * {block} + tl.arange(0, {block})
    depth = tl.arange(0, {deep})
    sum = tl.zeros(({block}, {block}), {sum_dtype})
    for start in range(0, k, {deep}):
        at = start + depth
        x = tl.load(a + rows[:, None] * k + at[None, :], (rows[:, None] < m) & (at[None, :] < k), 0)
        y = tl.load(b + at[:, None] * n + columns[None, :], (at[:, None] < k) & (columns[None, :] < n), 0)
        sum = tl.dot(x, y, sum, out_dtype={sum_dtype})
    mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], sum, mask)
"""
    grid = (blocks(size, block), blocks(size, block), 1)
    return Kernel("matmul", HEAD + source, (dtype,) * 3, (size,) * 3, grid, 8, stages)  # type: ignore[arg-type]


# Sums rows of 8192 elements in registers: 256 per thread of its only warp, more than there are.
SPILLING = Kernel(
    "spilling",
    HEAD
    + """\
def spilling(x, out):
    at = tl.arange(0, 8192)
    sum = tl.zeros((8192,), tl.float32)
    for row in range(100):
        sum += tl.load(x + row * 8192 + at)
    tl.store(out + at, sum)
""",
    ("f32", "f32"),
    (),
    (1, 1, 1),
    num_warps=1,
)

# Two nodes of one kernel, one of another, and calls around them.
GRAPH: Graph = parse("""\
graph fused {
  dim s = 1, 1048576, 1
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel add(in0=x, in1=y) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    input in1: f32[s]
    a: f32[s] = op aten.add.Tensor(self=in0, other=in1)
    return [a]
  }
  b: f32[s] = extern aten.neg.default(self=a)
  c: f32[s] = kernel add(in0=b, in1=y)  # model.add @ model.py:3 graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    input in1: f32[s]
    a: f32[s] = op aten.add.Tensor(self=in0, other=in1)
    return [a]
  }
  d: f32[s], e: f32[s] = kernel both(in0=c) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    a: f32[s] = op aten.exp.default(self=in0)
    k3_a: f32[s] = op aten.mul.Scalar(self=a, other=2.0)
    b: f32[s] = op aten.add.Tensor(self=k3_a, other=in0)
    return [b, a]
  }
  return [a, c, d, e]
}
""")
