"""Products of block-scaled formats: `aten._scaled_mm` with a scale per block of K, see `block_formats`.

Tensor cores that have no such product multiply the values with their scales, which halves hold exactly: these are
computed operands of an ordinary contraction. Others take data and scales as they are in memory: `BlockScaledWriter`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch_rtx.dtypes import DTYPES, PACKED
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, Node, Value, dim_expr
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.emit import Axis, Emitter, Operand
from torch_rtx.lowering.kernels.expressions import A, B, from_bits, shl, shr
from torch_rtx.lowering.kernels.index import Index, constant, from_dim, product, substitute, unravel, variable
from torch_rtx.lowering.kernels.kernel_ir import (
    Iota,
    Load,
    Position,
    Tensor,
    View,
    cast,
    pointwise,
    reinterpret,
)
from torch_rtx.lowering.kernels.matmul_template import (
    KA,
    KB,
    Contraction,
    KLoop,
    M,
    N,
    TileWriter,
    operand,
    stored_load,
)
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import blocks
from torch_rtx.lowering.kernels.triton_ops import tl_dtype
from torch_rtx.op_work import SCALED_MM

SIZES = {"f8e8m0fnu": 32, "f8e4m3fn": 16}  # values of a block, by the dtype of its scale
FORMATS = {PACKED: "e2m1", "f8e4m3fn": "e4m3", "f8e5m2": "e5m2"}  # as `tl.dot_scaled` names them
TALL, WIDE = 128, 4  # of a tile of scales, see `block_formats.to_blocked`
SA, SB, ROWS_OF_B = "SA", "SB", "NS"  # blocks in a step, and the columns as rows of scales


@dataclass(frozen=True)
class Side:
    """An operand of a product, seen as rows of K.

    Attributes:
        data, scales: as they are in memory, values of their dtypes.
        row: the axis of `data` that is no part of K.
        blocks: how many blocks a row has.
    """

    data: Tensor
    scales: Tensor
    row: int
    blocks: Dim

    @property
    def size(self) -> int:
        """Values of a block."""
        return SIZES[self.scales.dtype]

    @property
    def per_element(self) -> int:
        """Values of an element of `data`."""
        return 2 if self.data.dtype == PACKED else 1

    def at(self, row: Index, element: Index) -> Position:
        """The position of an element of a row."""
        return (element, row) if self.row else (row, element)

    def scale_at(self, row: Index, block: Index) -> Position:
        """The position of the scale of a block."""
        tall, wide, group = map(constant, (TALL, WIDE, TALL // 4))
        tile = row // tall * from_dim(blocks(self.blocks, WIDE)) + block // wide
        inside = row % group * constant(4) + row % tall // group
        return unravel((tile * tall + inside) * wide + block % wide, self.scales.shape)

    def along(self, row: Index) -> Callable[[Index], Position]:
        """The positions of the elements of a row."""
        return lambda element: self.at(row, element)

    def scales_along(self, row: Index) -> Callable[[Index], Position]:
        """The positions of the scales of a row."""
        return lambda block: self.scale_at(row, block)

    def values(self, dtype: str) -> Tensor:
        """The values times their scales, of the shape of `data` with K in place of its elements, as `dtype`."""
        per, k_axis = constant(self.per_element), 1 - self.row
        shape = tuple(size * per if axis == k_axis else size for axis, size in enumerate(self.data.shape))
        values = self.data
        if values.dtype == PACKED:
            pairs = View(
                shape,
                "u8",
                reinterpret(values, "u8"),
                lambda position: self.at(position[self.row], position[k_axis] // per),
            )
            shift = Iota(shape, "i32", lambda position: position[k_axis] % per * constant(4))
            values = pointwise(_E2M1, "f32", pointwise(_CODE, "i32", cast(pairs, "i32"), shift))

        def scale(position: Position) -> Position:
            return self.scale_at(position[self.row], position[k_axis] // constant(self.size))

        scales = View(shape, self.scales.dtype, self.scales, scale)
        return pointwise(A * B, dtype, cast(values, "f32"), cast(scales, "f32"))


_CODE = shr(A, B) & 15
# Exponent and fraction of a code are where f32 has them; 2**126 is what the biases of the exponents differ by.
_E2M1 = from_bits(shl(A & 7, 22) | shl(A & 8, 28)) * 2.0**126


def is_block_scaled(node: Node) -> bool:
    """Whether `node` is a product with a scale for each block of K."""
    return node.op == SCALED_MM and type_of(argument(node, "scale_a")).dtype in SIZES


def sides(region: Region, node: Node) -> tuple[Side, Side]:
    """The operands of a block-scaled product.

    Raises:
        Unsupported: formats that PyTorch does not multiply, a scale of the result, or scales that are not known to be
            as many as products have.
    """
    a, b, scale_a, scale_b = (
        region.values[argument(node, name).name] for name in ("self", "mat2", "scale_a", "scale_b")
    )
    mx = scale_a.dtype == "f8e8m0fnu"
    formats = {a.dtype, b.dtype}
    if scale_b.dtype != scale_a.dtype or not (formats == {PACKED} or (mx and formats <= FORMATS.keys() - {PACKED})):
        raise Unsupported(f"a product of {a.dtype} and {b.dtype}, with scales in {scale_a.dtype} and {scale_b.dtype}")
    if isinstance(node.arg("scale_result"), Value):
        raise Unsupported("a block-scaled product whose result has a scale")
    count = blocks(_depth(node, a), SIZES[scale_a.dtype])
    for rows, scales in ((a.shape[0], scale_a), (b.shape[1], scale_b)):
        tiles = (rows + constant(TALL - 1)) // constant(TALL) * from_dim(blocks(count, WIDE))
        if product(scales.shape) != tiles * constant(TALL * WIDE):
            raise Unsupported(f"{product(scales.shape)} scales of {rows} rows")
    return Side(a, scale_a, 0, count), Side(b, scale_b, 1, count)


def _depth(node: Node, a: Tensor) -> Dim:
    return dim_expr("*", type_of(argument(node, "self")).shape[1], 2 if a.dtype == PACKED else 1)


def block_scaled_contraction(
    region: Region, node: Node, out: Load, epilogue: Callable[[Tensor], Tensor]
) -> Contraction:
    """A block-scaled product as a contraction of halves in which values with their scales are exact: bf16 has the range
    of scales that are powers of two, and all targets have f16.

    Raises:
        Unsupported: see `sides`.
    """
    a, b = sides(region, node)
    dtype = "bf16" if a.scales.dtype == "f8e8m0fnu" else "f16"
    rows, columns = (type_of(argument(node, name)).shape[axis] for name, axis in (("self", 0), ("mat2", 1)))
    return Contraction(
        out=out,
        axis=1,
        batch=1,
        rows=rows,
        columns=columns,
        grouped=False,
        taps=(),
        depth=_depth(node, a.data),
        channels_last=True,
        a=a.values(dtype),
        b=b.values(dtype),
        a_at=lambda z, m, k: (m, *k),
        b_at=lambda z, n, k: (*k, n),
        epilogue=epilogue,
        block_scaled=a.per_element,
    )


class BlockScaledWriter(TileWriter):
    """A block-scaled product by the instructions for it: `tl.dot_scaled` of tiles as they are in memory.

    `block_k` of its configuration counts elements of the data, each of which may be two values.
    """

    def body(self) -> list[str]:
        """Pointers, the loop over K, and the epilogue."""
        node, block_k, loads = self.region.anchor, self.config.block_k, Loads(self.region, self.cast)
        assert node is not None
        a, b = sides(self.region, node)
        # K in elements of the data, and in blocks: both loops have the same steps.
        data = KLoop(replace(self.contraction, depth=type_of(argument(node, "self")).shape[1]), block_k)
        scales = KLoop(replace(self.contraction, depth=a.blocks), block_k * a.per_element // a.size)
        rows, columns = Axis(M, self.config.block_m, self.rows_mask), self.ranges[0]
        as_rows = replace(columns, name=ROWS_OF_B, mask=columns.mask and "in_ns")
        lines = [f"{ROWS_OF_B} = tl.reshape({N}, [{columns.block}, 1])"]
        if as_rows.mask:
            lines.append(f"{as_rows.mask} = {ROWS_OF_B} < {from_dim(self.columns)}")
        left = loads.tile("a", rows, KA, data, a.data, a.along(self.m))
        scale = loads.tile("s", rows, SA, scales, a.scales, a.scales_along(self.m))
        totals, dots, formats = [], [], [f'"{FORMATS[side.data.dtype]}"' for side in (a, b)]
        for which, column in enumerate(self.indexing.columns):
            row = substitute(column, {N: variable(ROWS_OF_B, self.indexing.width)})
            right = loads.tile(f"b{which}", columns, KB, data, b.data, b.along(column))
            other = loads.tile(f"t{which}", as_rows, SB, scales, b.scales, b.scales_along(row))
            totals.append(Operand(f"acc{which}", frozenset((M, N))))
            given = f"{left}, {scale}, {formats[0]}, {right}, {other}, {formats[1]}, {totals[-1].text}"
            dots.append(f"{totals[-1].text} = tl.dot_scaled({given})")
        loads.before += [f"{total.text} = tl.zeros([{rows.block}, {columns.block}], tl.float32)" for total in totals]
        epilogue = Emitter([rows, columns])
        self.write_epilogue(epilogue, totals)
        loop = data.loop(loads.before, list(loads.masks), loads.inside + dots)
        return [*lines, *loads.ranges, *loop, *epilogue.outer.lines]


class Loads:
    """The tiles that a block-scaled product loads in a step over K.

    Attributes:
        ranges, masks: of the elements of a step, each line once.
        before, inside: the lines before the loop, and in it.
    """

    def __init__(self, region: Region, cast: str) -> None:
        self.region, self.cast = region, cast
        self.ranges, self.masks = dict[str, None](), dict[str, None]()
        self.before, self.inside = list[str](), list[str]()

    def tile(
        self, prefix: str, outer: Axis, name: str, loop: KLoop, tensor: Tensor, at: Callable[[Index], Position]
    ) -> str:
        """The tile of `tensor`, as it is in memory, along `outer` and the axis `name` of K.

        Raises:
            Unsupported: the kernel computes it.
        """
        raw = reinterpret(tensor, "u8") if tensor.dtype in self.region.as_bytes else tensor
        if stored_load(raw) is None:
            raise Unsupported("a block-scaled product of what the same kernel computes")
        inner = Axis(name, loop.block, f"in_{name.lower()}" if loop.masked else "")
        self.ranges[f"{name} = tl.arange(0, {loop.block}){'[:, None]' if name == KB else '[None, :]'}{self.cast}"] = (
            None
        )
        self.masks.update(dict.fromkeys(loop.mask(inner.mask, name)))
        emitter = Emitter([inner, outer] if name == KB else [outer, inner], prefix)
        loop.enter(emitter, inner.mask)
        text = operand(emitter, raw, at(*loop.position(name)), raw.dtype, inner.mask)
        self.before += emitter.outer.lines
        self.inside += emitter.inner()
        typed = raw.dtype != tensor.dtype and DTYPES[tensor.dtype].tl
        return f"{text}.to({tl_dtype(tensor.dtype)}, bitcast=True)" if typed else text
