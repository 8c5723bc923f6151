"""Matrix products: mm, addmm, bmm, baddbmm, linear, matmul, _int_mm, _scaled_mm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce

from torch_rtx.chips import BIAS_COST, MODEL_ERROR
from torch_rtx.dtypes import DTYPES, FLOAT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Graph, Node, TensorType, Value, attr_values, contiguous, dim_expr
from torch_rtx.lowering.kernels.block_scaled import (
    BlockScaledWriter,
    block_scaled_contraction,
    is_block_scaled,
)
from torch_rtx.lowering.kernels.body_builder import BodyBuilder, argument, names_in, type_of
from torch_rtx.lowering.kernels.expressions import A, B
from torch_rtx.lowering.kernels.families.family import Family, Offer, around, bare, library_us, splits
from torch_rtx.lowering.kernels.gemm_perf_model import best_num_splits, config_us, gemm_us, ranked_configs
from torch_rtx.lowering.kernels.gemv_template import GemvWriter
from torch_rtx.lowering.kernels.index import Index, bounds, from_dim, multiple, product, ravel, unravel, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import (
    ONE,
    ZERO,
    Load,
    Pointwise,
    Position,
    Tensor,
    View,
    cast,
    number,
    pointwise,
)
from torch_rtx.lowering.kernels.matmul_template import Contraction, GemmConfig, TileWriter, anchor_result, dot_dtype
from torch_rtx.lowering.kernels.memory_model import epilogue_us, prologue_us, streaming_us, typical
from torch_rtx.lowering.kernels.mma_template import MmaWriter
from torch_rtx.lowering.kernels.ops.views import reshape
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.sliced_template import SlicedWriter
from torch_rtx.lowering.kernels.split import added, split_anchor
from torch_rtx.lowering.kernels.stacked_template import StackedWriter
from torch_rtx.op_work import ANCHORS, INT_MM, PRODUCTS, SCALED_MM, SCALES, library_has
from torch_rtx.targets import HIGHEST, Arch


def gemm_kernel(region: Region, name: str, config: GemmConfig) -> Kernel:
    """The kernel that computes a region around a matrix product.

    Raises:
        Unsupported: another anchor, a dtype that `tl.dot` does not multiply, or an epilogue whose indices can't be
            inverted.
    """
    return gemm_writer(region, config).kernel(name)


def gemm_writer(region: Region, config: GemmConfig) -> TileWriter:
    """What writes `gemm_kernel`.

    Raises:
        Unsupported: see there.
    """
    tiled = SlicedWriter if config.slices > 1 else StackedWriter if config.stacked else MmaWriter
    writer = BlockScaledWriter if config.block_scaled else GemvWriter if config.gemv else tiled
    return writer(region, gemm_contraction(region), config)


def gemm_configs(region: Region, arch: Arch) -> list[GemmConfig]:
    """Configurations for `arch`, the fastest first.

    Raises:
        Unsupported: see `gemm_kernel`, or a dtype that the target does not multiply.
    """
    return ranked_configs(region, gemm_contraction(region), arch)


def gemm_contraction(region: Region) -> Contraction:
    """The region's matrix product as a contraction.

    Raises:
        Unsupported: no matrix product, or one with a vector.
    """
    node, out, type_ = anchor_result(region, "gemm")
    shape = type_.shape
    first, second, added = PRODUCTS[node.op]
    if is_block_scaled(node):
        return block_scaled_contraction(region, node, out, _epilogue(region, node, out, added))
    a, b = (region.values[argument(node, name).name] for name in (first, second))
    if len(a.shape) < 1 + (node.op != "aten.linear.default") or len(b.shape) < 2:
        raise Unsupported("a matrix product with a vector")
    transposed = node.op == "aten.linear.default"
    # Batches that share the second operand are rows of one product.
    lead = shape[:-1] if len(b.shape) == 2 else shape[-2:-1]
    batch = shape[: len(shape) - 1 - len(lead)]
    batch_shape, rows_shape = (tuple(map(from_dim, dims)) for dims in (batch, lead))

    def a_at(z: Index, m: Index, k: Position) -> Position:
        return (*_batch_at(z, batch_shape, a.shape[: len(a.shape) - 1 - len(lead)]), *unravel(m, rows_shape), *k)

    def b_at(z: Index, n: Index, k: Position) -> Position:
        return (n, *k) if transposed else (*_batch_at(z, batch_shape, b.shape[:-2]), *k, n)

    return Contraction(
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
        epilogue=_epilogue(region, node, out, added),
        fast_accum=node.arg("use_fast_accum", False) is True,
    )


def _batch_at(z: Index, batch: Position, own: Position) -> Position:
    """The position of batch `z` in an operand's own leading dimensions, which may be broadcast."""
    position = unravel(z, batch)[len(batch) - len(own) :]
    return tuple(ZERO if size == ONE else at for at, size in zip(position, own, strict=True))


def _epilogue(region: Region, node: Node, out: Load, added: str) -> Callable[[Tensor], Tensor]:
    beta, alpha = (node.arg(name, 1) for name in ("beta", "alpha"))
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        raise Unsupported("a factor of a matrix product that is a dim")
    other = None
    if added and node.arg(added) is not None and beta != 0:
        other = region.values[argument(node, added).name]

    scales = _scales(region, node, out)

    def epilogue(total: Tensor) -> Tensor:
        sums = total.dtype
        found = total if alpha == 1 else pointwise(A * B, sums, total, number(alpha, sums))
        whole = [scale for scale in scales if not scale.shape]  # multiplied once, not for each element
        each = [scale for scale in scales if scale.shape]
        for scale in [*each, reduce(partial(pointwise, A * B, sums), whole)] if whole else each:
            found = pointwise(A * B, sums, found, scale)
        if other is not None:
            scaled = cast(other, sums)
            scaled = scaled if beta == 1 else pointwise(A * B, sums, scaled, number(beta, sums))
            found = pointwise(A + B, sums, found, scaled)
        return cast(found, out.dtype)

    return epilogue


def _scales(region: Region, node: Node, out: Load) -> list[Tensor]:
    """The factors of a product of float8: of all elements, or of each row [rows, 1] and each column [1, columns].

    Raises:
        Unsupported: other scales, such as those of blocks, or a result in float8.
    """
    if node.op != SCALED_MM or is_block_scaled(node):
        return []
    found = [region.values[argument(node, name).name] for name in SCALES]
    for axis, scale in enumerate(found):
        each = tuple(size if at == axis else ONE for at, size in enumerate(out.shape))
        if scale.dtype != "f32" or (product(scale.shape) != ONE and scale.shape != each):
            raise Unsupported("a product with scales of blocks")
    if node.arg("scale_result") is not None or DTYPES[out.dtype].packing:
        raise Unsupported("a product with a result in float8")
    return [reshape(scale, ()) if product(scale.shape) == ONE else scale for scale in found]


# ---- split-K ---------------------------------------------------------------------------------------------------------


def gemm_split(body: Graph, name: str, num_splits: int) -> Graph:
    """`body`, of the kernel `name`, with K of its product split into `num_splits` (split-K); see `split_anchor`."""
    anchor = next(node for node in body.nodes if node.op in OPS)
    return split_anchor(body, name, anchor, num_splits, _product, _product_sum, (PRODUCTS[anchor.op].added, *SCALES))


def _merged(a: Value, b: Value) -> bool:
    """Batches share the second operand, so they are rows of one product."""
    return len(type_of(b).shape) == 2 and len(type_of(a).shape) != 2


def _product(calls: BodyBuilder, anchor: Node, num_splits: int) -> tuple[Value, ...]:
    """[num_splits, *batch, rows, columns]: a batched product over K / num_splits, in the dtype of the sums."""
    if is_block_scaled(anchor):
        raise Unsupported("a split form of a product with scales of blocks")
    a, b = (argument(anchor, name) for name in PRODUCTS[anchor.op][:2])
    if anchor.op == "aten.linear.default":
        b = calls.permute(b, (1, 0))
    if _merged(a, b):
        *lead, depth = type_of(a).shape
        a = calls.reshape(a, (dim_expr("*", 1, *lead), depth))
    rank = max(len(type_of(a).shape), len(type_of(b).shape))
    shape = _broadcast(type_of(a).shape[:-2], type_of(b).shape[:-2])
    shape = (num_splits, *shape, type_of(a).shape[-2], type_of(b).shape[-1])
    sides, sums = [], DTYPES[type_of(a).dtype].sums
    for side, axis in ((a, -1), (b, -2)):
        own = len(type_of(side).shape)
        side = calls.move_to_front(calls.split_dim(side, own + axis, num_splits), own + axis)
        for _ in range(rank - own):
            side = calls.unsqueeze(side, 1)
        sides.append(calls.cast(side, sums))
    return (calls.call("matmul.default", TensorType(sums, shape, contiguous(shape)), self=sides[0], other=sides[1]),)


def _broadcast(one: tuple[Dim, ...], two: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rank = max(len(one), len(two))
    pairs = zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(two)) + two, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)


def _product_sum(calls: BodyBuilder, anchor: Node, partials: tuple[Value, ...]) -> Value:
    (result,) = anchor.outputs
    assert result is not None
    terms = calls.unbind(partials[0], 0)
    total = added(calls, terms, type_of(terms[0]).strides)
    total = calls.reshape(total, type_of(result).shape)
    alpha, beta = anchor.arg("alpha", 1), anchor.arg("beta", 1)
    if alpha != 1:
        total = calls.pointwise("mul.Scalar", total, other=alpha)
    for scale in (argument(anchor, name) for name in SCALES if anchor.op == SCALED_MM):
        shape = type_of(scale).shape
        total = calls.mul(total, scale if len(shape) == 2 else calls.reshape(scale, (1, 1)))
    term = anchor.arg(PRODUCTS[anchor.op].added)
    if isinstance(term, Value) and beta != 0:
        other = term if beta == 1 else calls.pointwise("mul.Scalar", calls.cast(term, type_of(total).dtype), other=beta)
        total = calls.pointwise("add.Tensor", total, other=other)
    return total


# ---- library calls ---------------------------------------------------------------------------------------------------


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    contraction = gemm_contraction(region)
    num_splits, split_us = best_num_splits(region, contraction, arch)
    yield from splits(gemm_split, region.body, name, num_splits, split_us * MODEL_ERROR, us)
    assert region.anchor is not None
    if region.anchor.op == SCALED_MM:
        yield from _scaled_call(region, arch, contraction)
        return
    if not _library_takes(region.anchor) or dot_dtype(contraction) != contraction.a.dtype:
        return  # of halves that are cast to float32, a library multiplies the casts
    usual, before_us = _has_aligned_rows(region.anchor), prologue_us(region, arch)
    plain = MODEL_ERROR * gemm_us(region, contraction, arch)
    after_us, without = epilogue_us(region, arch), _without_bias(region.body, name)
    is_slower = without is not None and arch.float32.products == HIGHEST  # with the bias
    expected_us = library_us(FAMILY.name, region, arch, plain, before_us, after_us, usual)
    yield Offer("library", expected_us * (BIAS_COST if is_slower else 1.0))
    if without is not None:
        bias_us = after_us or streaming_us([*region.types, *region.types], arch)
        yield Offer("bare", library_us(FAMILY.name, region, arch, plain, before_us, bias_us, usual), without)
    calls = {
        "cublaslt": _with_activation(region.body),
        "cublas": _in_float32(region),
    }
    for kind, call in calls.items():
        if call is not None:
            yield Offer(kind, library_us(FAMILY.name, region, arch, plain, before_us, 0.0, usual), call)


def _scaled_call(region: Region, arch: Arch, contraction: Contraction) -> Iterator[Offer]:
    """The region's own calls, if the library has the product of float8."""
    anchor = region.anchor
    assert anchor is not None
    types = {name: type_of(attr) for name, attr in anchor.args if isinstance(attr, Value)}
    (result,) = anchor.outputs
    if not library_has(arch.sm, types, type_of(result)):
        return
    plain = MODEL_ERROR * gemm_us(region, contraction, arch)
    after_us, before_us = epilogue_us(region, arch), prologue_us(region, arch)
    yield Offer("library", library_us(FAMILY.name, region, arch, plain, before_us, after_us, True))


def _library_takes(anchor: Node) -> bool:
    """Libraries have the product: on GPUs, of integers only `_int_mm`, in certain sizes."""
    (result,) = anchor.outputs
    assert result is not None
    if DTYPES[type_of(result).dtype].kind == FLOAT:
        return True
    shapes = [type_of(argument(anchor, name)).shape for name in PRODUCTS[anchor.op][:2]]
    rows, sizes = shapes[0][0], (shapes[0][-1], shapes[1][-1])
    return anchor.op == INT_MM and bounds(rows)[0] > 16 and all(multiple(size) % 8 == 0 for size in sizes)


def _has_aligned_rows(anchor: Node) -> bool:
    """All rows can start at multiples of 16 bytes; without that libraries are several times slower than kernels."""
    types = [value.type for value in (*anchor.inputs, *anchor.outputs) if value is not None]
    shapes = [type_.shape for type_ in types if isinstance(type_, TensorType) and len(type_.shape) > 1]
    return all(typical(shape[-1]) % 8 == 0 for shape in shapes)


def _with_activation(body: Graph) -> Graph | None:
    """`body` as one call of cuBLASLt (`aten._addmm_activation`), if it is relu(product + bias) or the same with a tanh
    GELU, in half precision."""
    before, anchor, after = around(body, OPS)
    if len(after) != 1 or after[0].inputs != anchor.outputs:
        return None
    (last,) = after
    is_gelu = last.op == "aten.gelu.default" and last.arg("approximate") == "tanh"
    if not is_gelu and last.op != "aten.relu.default":
        return None
    bias, result = anchor.arg(PRODUCTS[anchor.op].added), body.outputs[0]
    if not isinstance(bias, Value) or len(type_of(bias).shape) != 1 or type_of(bias).dtype not in ("f16", "bf16"):
        return None
    if body.outputs != last.outputs or (anchor.arg("alpha", 1), anchor.arg("beta", 1)) != (1, 1):
        return None
    assert isinstance(result, Value)
    if type_of(result).strides != contiguous(type_of(result).shape):
        return None
    calls = BodyBuilder(names_in(body), before)
    matrices = _matrices(calls, anchor)
    if matrices is None:
        return None
    first, second, shape = matrices
    type_ = TensorType(type_of(result).dtype, shape, contiguous(shape))
    gelu = {"use_gelu": True} if is_gelu else {}
    total = calls.call("_addmm_activation.default", type_, self=bias, mat1=first, mat2=second, **gelu)
    calls.reshape(total, type_of(result).shape)
    return calls.body(body.inputs, result)


def _without_bias(body: Graph, name: str) -> Graph | None:
    """See `bare`; in float32, where cuBLASLt's kernels that add a bias are the slower ones, and no sum is rounded."""
    _, anchor, _ = around(body, OPS)
    (result,) = anchor.outputs
    added = anchor.arg(PRODUCTS[anchor.op].added)
    if result is None or type_of(result).dtype != "f32" or (anchor.arg("alpha", 1), anchor.arg("beta", 1)) != (1, 1):
        return None

    def call(calls: BodyBuilder) -> Value | None:
        matrices = _matrices(calls, anchor)
        if matrices is None or type_of(matrices[0]).dtype != "f32":
            return None
        first, second, shape = matrices
        total = calls.call("mm.default", TensorType("f32", shape, contiguous(shape)), self=first, mat2=second)
        return calls.reshape(total, type_of(result).shape)

    return bare(body, name, anchor, added, call)


def _in_float32(region: Region) -> Graph | None:
    """The body as one call of cuBLAS that writes float32 (`aten.mm.dtype`), if nothing but a cast of the product of
    halves to float32, and views, follows: no kernel has to read and write that product again."""
    body, (_, out, type_) = region.body, anchor_result(region, "gemm")
    before, anchor, _ = around(body, OPS)
    if [found.dtype for found in region.types] != ["f32"] or type_.dtype not in ("f16", "bf16"):
        return None
    if anchor.arg(PRODUCTS[anchor.op].added) is not None or not _is_reshaped(region, out):
        return None
    calls, op = BodyBuilder(names_in(body), before), "mm.dtype"
    matrices = _matrices(calls, anchor)
    if matrices is None and anchor.op == "aten.bmm.default":
        matrices, op = (argument(anchor, "self"), argument(anchor, "mat2"), type_.shape), "bmm.dtype"
    if matrices is None:
        return None
    first, second, shape = matrices
    total = calls.call(op, TensorType("f32", shape, contiguous(shape)), self=first, mat2=second, out_dtype="f32")
    (result,) = attr_values(body.outputs)
    calls.reshape(total, type_of(result).shape)
    return calls.body(body.inputs, result)


def _matrices(calls: BodyBuilder, anchor: Node) -> tuple[Value, Value, tuple[Dim, ...]] | None:
    """The factors of a product as two matrices, and the shape of their product; None for batches of both."""
    first, second = (argument(anchor, operand) for operand in PRODUCTS[anchor.op][:2])
    if len(type_of(second).shape) != 2:
        return None
    if anchor.op == "aten.linear.default":
        second = calls.permute(second, (1, 0))
    *lead, depth = type_of(first).shape
    rows = dim_expr("*", 1, *lead)
    return calls.reshape(first, (rows, depth)), second, (rows, type_of(second).shape[-1])


def _is_reshaped(region: Region, out: Load) -> bool:
    """The only result of `region` has the elements of the anchor's result `out`, in row-major order of both."""
    (tensor,), (type_,) = region.outputs, region.types
    shape = tensor.shape
    position = index = tuple(variable(f"i{axis}", size) for axis, size in enumerate(shape))
    while tensor is not out:
        if isinstance(tensor, View):
            position, tensor = tensor.at(position), tensor.source
        elif isinstance(tensor, Pointwise) and tensor.same_register is not None:
            tensor = tensor.same_register
        else:
            return False
    if type_.strides != contiguous(type_.shape) or product(shape) != product(out.shape):
        return False
    return ravel(position, out.shape) == ravel(index, shape)


def _expected_us(region: Region, arch: Arch, config: GemmConfig) -> float:
    return MODEL_ERROR * config_us(region, gemm_contraction(region), arch, config)


OPS = frozenset(op for op, kind in ANCHORS.items() if kind == "gemm")
FAMILY = Family("gemm", OPS, gemm_configs, gemm_kernel, _expected_us, _others)
