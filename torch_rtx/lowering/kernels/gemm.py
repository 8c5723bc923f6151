"""Kernels around a matrix product: mm, addmm, bmm, baddbmm, linear, matmul."""

from __future__ import annotations

from collections.abc import Callable

from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, dim_expr
from torch_rtx.lowering.kernels.body_builder import argument
from torch_rtx.lowering.kernels.cost import best_time, configurations, loop_time
from torch_rtx.lowering.kernels.expressions import A, B
from torch_rtx.lowering.kernels.index import Index, from_dim, unravel
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Load,
    Pointwise,
    Position,
    Tensor,
    cast,
    everything,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.product import DotWriter, GemmConfig, Product, SumWriter, result
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.targets import Arch

# Operator: the arguments that are multiplied and what is added, by name.
OPERANDS = {
    "aten.mm.default": ("self", "mat2", ""),
    "aten.bmm.default": ("self", "mat2", ""),
    "aten.matmul.default": ("self", "other", ""),
    "aten.linear.default": ("input", "weight", "bias"),
    "aten.addmm.default": ("mat1", "mat2", "self"),
    "aten.baddbmm.default": ("batch1", "batch2", "self"),
}


def gemm_kernel(region: Region, name: str, config: GemmConfig) -> Kernel:
    """The kernel that computes a region around a matrix product.

    Raises:
        Unsupported: another anchor, a dtype that has no product, a result that is needed in a shape that no tile of it
            has.
    """
    writer = SumWriter if config.sums else DotWriter
    return writer(region, gemm_product(region), config).kernel(name)


def gemm_configs(region: Region, arch: Arch, input_precision: str = "ieee") -> list[GemmConfig]:
    """Configurations for `arch`, those that should be fastest first; `input_precision` is that of f32 operands.

    Raises:
        Unsupported: see `gemm_kernel`, or a dtype that the target does not multiply.
    """
    return configurations(region, gemm_product(region), arch, input_precision)


def gemm_time(region: Region, arch: Arch) -> float:
    """The time that the kernel should take on `arch`, in microseconds.

    Raises:
        Unsupported: see `gemm_configs`.
    """
    return best_time(region, gemm_product(region), arch)


def after_call(region: Region, arch: Arch) -> float:
    """The time of what is left of the region when a library call has multiplied, in microseconds."""
    return loop_time(region, arch) if any(isinstance(one, Pointwise) for one in everything(region.outputs)) else 0.0


def gemm_product(region: Region) -> Product:
    """The product that a region is built around.

    Raises:
        Unsupported: there is none, or it is one of vectors.
    """
    node, out, type_ = result(region, "gemm")
    shape = type_.shape
    first, second, added = OPERANDS[node.op]
    a, b = (region.values[argument(node, name).name] for name in (first, second))
    if len(a.shape) < 1 + (node.op != "aten.linear.default") or len(b.shape) < 2:
        raise Unsupported("a matrix product with a vector")
    transposed = node.op == "aten.linear.default"
    # Where all batches have one second operand, they are rows of one product.
    lead = shape[:-1] if len(b.shape) == 2 else shape[-2:-1]
    batch = shape[: len(shape) - 1 - len(lead)]
    batch_shape, rows_shape = (tuple(map(from_dim, dims)) for dims in (batch, lead))

    def a_at(z: Index, m: Index, k: Position) -> Position:
        return (*_batch_at(z, batch_shape, a.shape[: len(a.shape) - 1 - len(lead)]), *unravel(m, rows_shape), *k)

    def b_at(z: Index, n: Index, k: Position) -> Position:
        return (n, *k) if transposed else (*_batch_at(z, batch_shape, b.shape[:-2]), *k, n)

    return Product(
        out=out,
        axis=len(shape) - 1,
        batch=dim_expr("*", 1, *batch),
        rows=dim_expr("*", 1, *lead),
        columns=shape[-1],
        grouped=False,
        taps=(),
        depth=tensor_type(argument(node, first)).shape[-1],
        channels_last=True,
        a=a,
        b=b,
        a_at=a_at,
        b_at=b_at,
        finish=_finish(region, node, out, added),
    )


def _batch_at(z: Index, batch: Position, own: Position) -> Position:
    """The position of a batch in the leading dimensions of an operand, some of which may be broadcast."""
    position = unravel(z, batch)[len(batch) - len(own) :]
    return tuple(ZERO if size == ONE else at for at, size in zip(position, own, strict=True))


def _finish(region: Region, node: Node, out: Load, added: str) -> Callable[[Tensor], Tensor]:
    beta, alpha = (node.arg(name, 1) for name in ("beta", "alpha"))
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise Unsupported("a factor of a matrix product that is a dim")
    other = None
    if added and node.arg(added) is not None and beta != 0:
        other = region.values[argument(node, added).name]

    def finish(total: Tensor) -> Tensor:
        found = total if alpha == 1 else pointwise(A * B, "f32", total, number(alpha, "f32"))
        if other is None:
            return found
        scaled = cast(other, "f32")
        scaled = scaled if beta == 1 else pointwise(A * B, "f32", scaled, number(beta, "f32"))
        return pointwise(A + B, out.dtype, found, scaled)

    return finish
