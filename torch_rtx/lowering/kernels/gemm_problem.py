"""What the performance model needs to know of a contraction, read off its region."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, gcd, prod

from torch_rtx.dtypes import OPERANDS
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.epilogue_index import epilogue_indexing
from torch_rtx.lowering.kernels.float32_dots import IEEE, precisions
from torch_rtx.lowering.kernels.index import Atom, Div, from_dim, linear, variable
from torch_rtx.lowering.kernels.kernel_ir import (
    ZERO,
    Load,
    Pointwise,
    Position,
    Select,
    Tensor,
    View,
    children,
    everything,
)
from torch_rtx.lowering.kernels.matmul_template import (
    FLOAT8,
    KB,
    Contraction,
    GemmConfig,
    KLoop,
    dot_dtype,
    packing,
    stored_load,
    swaps,
    uncast,
)
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.kernels.packed import Packing
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import MIN_BLOCK
from torch_rtx.lowering.kernels.triton_ops import is_expensive
from torch_rtx.targets import Arch, lacks

BLOCK_SCALED = {1: "mxfp8", 2: "fp4_x2"}  # by the values of an element
SIZES = {name: dtype.bytes for name, dtype in OPERANDS.items()}


@dataclass(frozen=True)
class GemmProblem:
    """What the model needs to know of a contraction.

    Attributes:
        batch, rows, columns, depth: sizes, with `columns` per accumulator; K is `taps` times `depth`.
        accumulators: column ranges that one program computes side by side.
        dtype: of the operands; see `dtypes.OPERANDS`.
        bytes_moved: compulsory memory traffic.
        columns_last: the second operand is contiguous along columns, not along K.
        needs_few_registers: operands are plain loads and the epilogue is cheap.
        vector_elements: elements of the first operand per load, at most 16 bytes.
        uncoalesced_loads: per element of a computed second operand, the loads that are not contiguous along K, as of
            packed integers. `tl.dot` has columns in neighbouring threads, so each of these reads its own sector.
        promoted: see `GemmConfig`.
        second_bytes: of an element of the second operand in memory.
        unpacking: operations that compute an element of it; 0 for a plain load.
        swapped: see `matmul_template.swaps`.
        packing: see `packed`.
        is_sliceable: `SlicedWriter` takes it.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    taps: int
    accumulators: int
    dtype: str
    bytes_moved: int
    columns_last: bool
    needs_few_registers: bool
    vector_elements: int = 8
    uncoalesced_loads: int = 0
    promoted: bool = False
    second_bytes: float = 2
    unpacking: int = 0
    swapped: bool = False
    packing: Packing | None = None
    is_sliceable: bool = False

    @property
    def has_groups(self) -> bool:
        """Values along K have several scales: those of a run take at least a byte."""
        return self.packing is not None and (self.second_bytes - self.packing.bits / 8) * self.packing.depth >= 1

    def step_bytes(self, config: GemmConfig) -> float:
        """Bytes that a step reads."""
        width = config.width * self.accumulators
        return (config.block_m * SIZES[self.dtype] + width * self.second_bytes) * config.block_k


def precisions_of(contraction: Contraction, arch: Arch) -> tuple[str, ...]:
    """The values of `GemmConfig.input_precision` for a contraction on `arch`.

    Raises:
        Unsupported: see `dot_dtype`.
    """
    level = arch.float32.convolutions if contraction.grouped else arch.float32.products
    return precisions(arch, level) if dot_dtype(contraction) == "f32" else (IEEE,)


def gemm_problem(
    region: Region, contraction: Contraction, arch: Arch, input_precision: str = IEEE, block_scaled: bool = False
) -> GemmProblem:
    """The problem that a region poses, at typical values of its symbolic sizes.

    Args:
        block_scaled: operands are multiplied as they are in memory, see `BlockScaledWriter`.

    Raises:
        Unsupported: the target's tensor cores lack the dtype, or the epilogue can't be indexed.
    """
    dtype = dot_dtype(contraction)
    if lacks(arch, dtype):
        raise Unsupported(f"a matrix product of {dtype} on sm_{arch.sm}")
    epilogue = epilogue_indexing(region.outputs, contraction.tile())
    width = epilogue.width.number
    depth, taps, vector = typical(contraction.depth), prod(contraction.taps), 16 // SIZES[dtype]
    if KLoop(contraction, MIN_BLOCK).flat:
        depth, taps, vector = depth * taps, 1, gcd(depth, vector) if contraction.channels_last else 1
    is_computed, packed = stored_load(contraction.b) is None, packing(contraction)
    found = GemmProblem(
        batch=typical(contraction.batch),
        rows=typical(contraction.rows),
        columns=typical(contraction.columns) if width is None else width,
        depth=depth,
        taps=taps,
        accumulators=len(epilogue.columns),
        dtype=input_precision if dtype == "f32" and input_precision != IEEE else dtype,
        bytes_moved=sum(map(bytes_of, region.memory_types)),
        columns_last=_column_stride(contraction) == 1,
        needs_few_registers=_needs_few_registers(region, contraction),
        vector_elements=vector,
        promoted=dtype in FLOAT8 and not contraction.fast_accum and "fp8_in_f32" not in arch.features,
        uncoalesced_loads=_uncoalesced_loads(contraction) if is_computed and not packed else 0,
        second_bytes=_stored_bytes(contraction.b) if is_computed else SIZES[dtype],
        unpacking=_operations(contraction.b) if is_computed else 0,
        swapped=swaps(contraction),
        packing=packed,
        is_sliceable=swaps(contraction) and not contraction.taps and contraction.ends is None,
    )
    if contraction.ends is not None:  # rows are equally divided among groups, and matrices without rows not read
        batch = max(min(found.batch, found.rows), 1)
        unread = (found.batch - batch) * typical(contraction.columns) * depth * found.second_bytes
        moved, rows = found.bytes_moved - int(unread), ceil(found.rows / batch)
        found = replace(found, batch=batch, rows=rows, bytes_moved=moved)
    if block_scaled:
        dtype, depth = BLOCK_SCALED[contraction.block_scaled], ceil(depth / contraction.block_scaled)
        found = replace(found, dtype=dtype, depth=depth, vector_elements=16, uncoalesced_loads=0)
        found = replace(found, second_bytes=SIZES[dtype], unpacking=0, swapped=False, packing=None)
    return found


def _stored_bytes(operand: Tensor) -> float:
    """Bytes in memory per element of a computed operand."""
    loads = [one for one in everything([operand]) if isinstance(one, Load)]
    return sum(_elements(one) * SIZES[one.dtype] for one in loads) / _elements(operand)


def _operations(operand: Tensor) -> int:
    """Operations per element of a computed operand."""
    size = _elements(operand)
    return sum(
        isinstance(one, Pointwise) and one.same_register is None and _elements(one) == size
        for one in everything([operand])
    )


def _elements(tensor: Tensor) -> int:
    """Elements of a tensor, with symbolic sizes as 1."""
    return prod(size.number or 1 for size in tensor.shape)


def _uncoalesced_loads(contraction: Contraction) -> int:
    """See `GemmProblem.uncoalesced_loads`."""
    k = variable(KB, from_dim(contraction.depth))
    seen: set[tuple[Tensor, Position]] = set()  # what is read twice is loaded once

    def count(tensor: Tensor, position: Position) -> int:
        if (tensor, position) in seen:
            return 0
        seen.add((tensor, position))
        match tensor:
            case Load():
                address = linear(position, tensor.strides)
                along = [(atoms, n) for atoms, n in address.terms if any(map(_moves, atoms))]
                return int(along not in ([], list(k.terms)))
            case View():
                return count(tensor.source, tensor.at(position))
            case Select():
                moved = tuple(at - start for at, start in zip(position, tensor.starts, strict=True))
                return count(tensor.inner, moved) + count(tensor.outer, position)
        return sum(count(child, position) for child in children(tensor) if len(child.shape) == len(position))

    column = variable("N", from_dim(contraction.columns))
    return count(contraction.b, contraction.b_at(ZERO, column, (*[ZERO] * len(contraction.taps), k)))


def _moves(atom: Atom) -> bool:
    """Whether the atom changes with each or every few elements of K: a scale that a group shares does not."""
    if isinstance(atom, Div) and not atom.remainder and (atom.by.number or 0) >= MIN_BLOCK:
        return False
    return KB in str(atom)


def _column_stride(contraction: Contraction) -> int | None:
    """The stride of the second operand along columns, in elements; None if it has no constant one."""
    column = variable("N", from_dim(contraction.columns))
    tensor, position = contraction.b, contraction.b_at(ZERO, column, (ZERO,) * (len(contraction.taps) + 1))
    while not isinstance(tensor, Load):
        position = tensor.at(position) if isinstance(tensor, View) else position
        inner = tensor.source if isinstance(tensor, View) else uncast(tensor)
        if inner is None:
            return None
        tensor = inner
    ((monomial, _),) = column.terms
    return next((count for atoms, count in linear(position, tensor.strides).terms if atoms == monomial), None)


def _needs_few_registers(region: Region, contraction: Contraction) -> bool:
    """See `GemmProblem.needs_few_registers`."""
    is_plain = prod(contraction.taps) == 1 and all(map(stored_load, (contraction.a, contraction.b)))
    computed = (one for one in everything(region.outputs) if isinstance(one, Pointwise))
    return is_plain and not any(is_expensive(one.expression) for one in computed)
