"""Which tiles suit a product: a model of the time that a kernel takes, in microseconds.

Programs run in waves: a multiprocessor holds as many as its shared memory and registers allow, and the last wave may
leave most of the chip idle, so that smaller tiles win small problems. A step of the loop over K takes about as long as
the slowest of what overlaps in it: tensor cores, shared memory, which feeds them (large tiles per warp need less of
it), the L2 cache, which feeds that (large tiles need less of it), and the latency of memory, over the steps that are in
flight. No kernel is faster than memory is read and written once.

It ranks configurations and need not be right: what counts is measured where there is time to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, gcd, inf, prod

from torch_rtx.dtypes import DTYPES, TF32
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, TensorType, typical_size
from torch_rtx.lowering.kernels.epilogue_index import epilogue_indexing
from torch_rtx.lowering.kernels.index import from_dim, linear, variable
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
from torch_rtx.lowering.kernels.product import KB, MOST_ROWS, GemmConfig, Product, Steps, dot_dtype, in_memory
from torch_rtx.lowering.kernels.region import Region, tensor_type
from torch_rtx.lowering.kernels.triton_ops import is_expensive
from torch_rtx.targets import Arch, Chip

TYPICAL = 1024  # what a symbolic size without a typical one is taken for, within its range
LAUNCH = 1.5  # until the first program has its first operands, and after the last one
LATENCY = 0.8  # of memory under load
BARRIER = 0.03  # of a step
KEPT, ALIKE = 12, 2  # configurations, and those of one tile among them
PARTS = (2, 4, 8, 16)  # in which a depth is cut
FILLED, TILE = 0.75, 64  # a chip is full with this many tiles of this size for each processor
DEPTH = 32  # elements of a depth that every part has a multiple of
SCATTERED = 16  # loads of a thread for one step, each of less than 16 bytes
OPERANDS = {**DTYPES, "tf32": TF32}
SIZES = {name: dtype.bytes for name, dtype in OPERANDS.items()}
RATES = {name: dtype.tensor_rate for name, dtype in OPERANDS.items() if dtype.tensor_rate}


@dataclass(frozen=True)
class Problem:
    """What the cost of a product depends on.

    Attributes:
        batch, rows, columns, depth: sizes; `columns` are those of one accumulator.
        taps: how many times K runs over the depth.
        accumulators: how many ranges of columns are computed side by side.
        dtype: of operands; "tf32" where f32 goes to tensor cores.
        moved: bytes of memory that any kernel has to read and write.
        columns_last: neighbouring columns, not elements of K, are neighbours in the memory of the second operand.
        plain: operands are plainly in memory and the result is little more than stored, which needs few registers.
        run: elements of the first operand that are loaded at once, at most 8.
        scattered: loads for each element of the second operand, where that is computed, whose neighbours along K are no
            neighbours in memory: packed integers. `tl.dot` has columns in neighbouring threads, so that each thread
            then reads a sector of its own.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    taps: int
    accumulators: int
    dtype: str
    moved: int
    columns_last: bool
    plain: bool
    run: int = 8
    scattered: int = 0


def problem(region: Region, of: Product, arch: Arch, input_precision: str = "ieee") -> Problem:
    """The problem that a region is, with symbolic sizes taken for typical ones.

    Raises:
        Unsupported: a dtype that the target's tensor cores do not have; or the region has no epilogue.
    """
    dtype = dot_dtype(of)
    if dtype == "bf16" and "bf16" not in arch.features:
        raise Unsupported(f"a matrix product of bf16 on sm_{arch.sm}")
    epilogue = epilogue_indexing(region.outputs, of.tile())
    width = epilogue.width.number
    tensors = [tensor_type(value) for value in region.body.inputs] + list(region.types)
    depth, taps, run = typical(of.depth), prod(of.taps), 8
    if Steps(of, 1).flat:
        depth, taps, run = depth * taps, 1, gcd(depth, run) if of.channels_last else 1
    return Problem(
        batch=typical(of.batch),
        rows=typical(of.rows),
        columns=typical(of.columns) if width is None else width,
        depth=depth,
        taps=taps,
        accumulators=len(epilogue.columns),
        dtype="tf32" if dtype == "f32" and input_precision != "ieee" else dtype,
        moved=sum(map(bytes_of, tensors)),
        columns_last=_stride(of) == 1,
        plain=prod(of.taps) == 1 and all(in_memory(operand) for operand in (of.a, of.b)) and _plain(region.outputs),
        run=run,
        scattered=0 if in_memory(of.b) else _scattered(of),
    )


def _scattered(of: Product) -> int:
    """See `Problem.scattered`."""
    k = variable(KB, from_dim(of.depth))

    def count(tensor: Tensor, position: Position) -> int:
        match tensor:
            case Load():
                address = linear(position, tensor.strides)
                along = [(atoms, n) for atoms, n in address.terms if any(KB in str(atom) for atom in atoms)]
                return int(along not in ([], list(k.terms)))
            case View():
                return count(tensor.source, tensor.at(position))
            case Select():
                moved = tuple(at - start for at, start in zip(position, tensor.starts, strict=True))
                return count(tensor.inner, moved) + count(tensor.outer, position)
        return sum(count(child, position) for child in children(tensor) if len(child.shape) == len(position))

    column = variable("N", from_dim(of.columns))
    return count(of.b, of.b_at(ZERO, column, (*[ZERO] * len(of.taps), k)))


def bytes_of(type_: TensorType) -> int:
    """How much memory a tensor has."""
    sizes = (typical(size) for size, stride in zip(type_.shape, type_.strides, strict=True) if stride != 0)
    return prod(sizes) * SIZES[type_.dtype]


def _stride(of: Product) -> int | None:
    """How far apart neighbouring columns of the second operand are in memory; None if that is not one number."""
    column = variable("N", from_dim(of.columns))
    tensor, position = of.b, of.b_at(ZERO, column, (ZERO,) * (len(of.taps) + 1))
    while isinstance(tensor, View | Pointwise):
        if isinstance(tensor, Pointwise) and tensor.same_register is None:
            return None
        position = tensor.at(position) if isinstance(tensor, View) else position
        tensor = tensor.source if isinstance(tensor, View) else tensor.args[0]
    if not isinstance(tensor, Load):
        return None
    ((monomial, _),) = column.terms
    return next((count for atoms, count in linear(position, tensor.strides).terms if atoms == monomial), None)


def _plain(outputs: tuple[Tensor, ...]) -> bool:
    """Whether outputs need none of the functions that take many registers."""
    return not any(isinstance(one, Pointwise) and is_expensive(one.expression) for one in everything(outputs))


def typical(dim: Dim) -> int:
    """A number for a dim."""
    return typical_size(dim, TYPICAL)


def configurations(region: Region, of: Product, arch: Arch, input_precision: str) -> list[GemmConfig]:
    """The best configurations, best first.

    Raises:
        Unsupported: see `problem`.
    """
    precision = input_precision if "tf32" in arch.features else "ieee"
    best = [config for _, config in _ranked(problem(region, of, arch, precision), _few(of), arch)]
    tiles = [(config.sums, config.block_m, config.width) for config in best]
    kept = [config for at, config in enumerate(best) if tiles[:at].count(tiles[at]) < ALIKE][:KEPT]
    return [replace(config, input_precision=precision) for config in kept]


def plain_us(region: Region, of: Product, arch: Arch) -> float:
    """The time of the best kernel if all operands were plainly in memory, in microseconds.

    Raises:
        Unsupported: see `problem`.
    """
    return _ranked(replace(problem(region, of, arch), scattered=0), _few(of), arch)[0][0]


def config_us(region: Region, of: Product, arch: Arch, config: GemmConfig) -> float:
    """The time of a kernel in a configuration, in microseconds.

    Raises:
        Unsupported: see `problem`.
    """
    what = problem(region, of, arch, config.input_precision)
    return sums_time(what, config, arch.chip) if config.sums else dots_time(what, config, arch)


def loop_time(region: Region, arch: Arch) -> float:
    """The time of a kernel that reads what the anchor has written, and all else that the results need, and writes
    these."""
    assert region.anchor is not None
    read = {one.name for one in everything(region.outputs) if isinstance(one, Load) and not one.anchor}
    moved = [value for value in region.body.inputs if value.name in read]
    moved += [value for value in region.anchor.outputs if value is not None]
    types = [*map(tensor_type, moved), *region.types]
    return LAUNCH + sum(map(bytes_of, types)) / (arch.chip.memory * 1e3)


def prologue_time(region: Region, arch: Arch) -> float:
    """The time of the kernels that write the anchor's operands to memory, where these are computed on the way."""
    assert region.anchor is not None
    computed = [value for value in region.anchor.inputs if in_memory(region.values[value.name]) is None]
    return sum(LAUNCH + bytes_of(tensor_type(value)) / (arch.chip.memory * 1e3) for value in computed)


def _few(of: Product) -> bool:
    """Whether there are so few rows that they need no tensor cores."""
    return isinstance(of.rows, int) and of.rows <= MOST_ROWS


@lru_cache(maxsize=1024)
def _ranked(what: Problem, few: bool, arch: Arch) -> list[tuple[float, GemmConfig]]:
    """All configurations with their times, the fastest first."""
    found = [(dots_time(what, config, arch), config) for config in _dots(what, arch)]
    if few:
        found += [(sums_time(what, config, arch.chip), config) for config in _sums(what)]
    return sorted(found, key=lambda one: one[0])


# ---- parts -----------------------------------------------------------------------------------------------------------


def best_parts(region: Region, of: Product, arch: Arch) -> tuple[int, float]:
    """In how many parts the depth of a product is best cut, so that they fill the chip, and the time of its kernels in
    microseconds; (1, infinity): the depth can't be cut, or whole tiles fill the chip.

    Raises:
        Unsupported: see `problem`.
    """
    what, on = problem(region, of, arch), arch.chip
    columns = typical(of.columns)  # of all accumulators
    tiles = what.batch * ceil(what.rows / TILE) * ceil(columns / TILE)
    best, fastest = 1, inf
    if not isinstance(of.depth, int) or tiles > FILLED * on.processors:
        return best, fastest
    result = what.batch * what.rows * columns
    operands = what.batch * (what.rows + columns * what.taps) * what.depth * SIZES[what.dtype]
    for parts in PARTS:
        if of.depth % (parts * DEPTH) or tiles * parts > 2 * on.processors:
            continue
        moved = operands + 4 * parts * result
        partial = replace(what, batch=what.batch * parts, columns=columns, accumulators=1, moved=moved, plain=True)
        partial = replace(partial, depth=what.depth // parts)
        rest = LAUNCH + (4 * parts * result + max(what.moved - operands, 0)) / (on.memory * 1e3)
        time = _ranked(partial, _few(of), arch)[0][0] + rest
        if time >= fastest:
            break  # more parts are no better
        fastest, best = time, parts
    return best, fastest


# ---- tensor cores ----------------------------------------------------------------------------------------------------


def _dots(what: Problem, arch: Arch) -> Iterator[GemmConfig]:
    tiles = [(16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32, 64, 128)]
    most_m, most_n, most_k = (max(16, _power(size)) for size in (what.rows, what.columns, what.depth))
    stages = (2, 3, 4, 5) if "cp_async" in arch.features else (1,)
    for block_m, block_n, block_k, extra in itertools.product(*tiles, (False, True)):
        if block_m > most_m or block_n > most_n or not min(most_k, 32) <= block_k <= most_k:
            continue
        if what.dtype == "f32" and block_k > 32:
            continue  # all of a step goes through registers
        extra_n = block_n // 2 if extra else 0
        area = block_m * (block_n + extra_n) * what.accumulators
        warps = [count for count in (2, 4, 8) if 256 <= area // count <= 4096] or [1]
        for num_warps, num_stages in itertools.product(warps, stages):
            config = GemmConfig(block_m, block_n, block_k, num_warps, num_stages, extra_n=extra_n)
            if extra and not (64 <= block_n <= 128 and block_k >= 64 and _warpgroup(what, config, arch)):
                continue  # measured on Hopper alone
            if shared_memory(what, config, arch) <= arch.shared and _fits_registers(what, config, arch):
                yield config


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _held(what: Problem, config: GemmConfig) -> int:
    """Registers of a thread that hold sums."""
    return config.block_m * config.width * what.accumulators // (32 * config.num_warps)


def _fits_registers(what: Problem, config: GemmConfig, arch: Arch) -> bool:
    """Whether nothing should have to be spilled, as far as that was seen: of 255 registers sums take a quarter, or half
    where products read shared memory and little follows; loads of 16 bytes take a pointer each, and on Turing, where
    they cannot go right to shared memory, their data as well. Shorter ones, of windows over few channels, take more of
    both than would leave room for a second program: 102 us against 82 for 256 rows of ResNet's first convolution."""
    roomy = _warpgroup(what, config, arch) and what.plain
    most = 16 if what.dtype == "f32" else 128 if roomy else 64
    width = config.block_m + config.width * what.accumulators
    threads = 32 * config.num_warps
    pointers = width * config.block_k * SIZES[what.dtype] // (16 * threads)
    scattered = config.block_m * config.block_k // (what.run * threads) if what.run * SIZES[what.dtype] < 16 else 0
    return (
        _held(what, config) <= most
        and pointers <= (12 if "cp_async" in arch.features else 6)
        and scattered <= SCATTERED
    )


def _warpgroup(what: Problem, config: GemmConfig, arch: Arch) -> bool:
    """Hopper's products, which take operands from shared memory."""
    return "wgmma" in arch.features and what.dtype != "f32" and config.block_m >= 64 and config.num_warps >= 4


def shared_memory(what: Problem, config: GemmConfig, arch: Arch) -> int:
    """Bytes for the steps in flight; Hopper's products keep one more step there while they read it."""
    width = config.width * what.accumulators
    step = (config.block_m + width) * config.block_k * SIZES[what.dtype]
    steps = config.num_stages - (not _warpgroup(what, config, arch))
    return max(step * max(steps, 1), config.block_m * config.block_n * 2)


def dots_time(what: Problem, config: GemmConfig, arch: Arch) -> float:
    """The time of a product by `tl.dot`."""
    on = arch.chip
    width = config.width * what.accumulators
    tiles = what.batch * ceil(what.rows / config.block_m) * ceil(what.columns / config.width)
    steps = what.taps * ceil(what.depth / config.block_k)
    resident = _resident(what, config, arch)
    whole, rest = divmod(tiles, on.processors * resident)
    waves = [resident] * whole + ([ceil(rest / on.processors)] if rest else [])
    store = config.block_m * width * 2 / (on.memory * 1e3 / on.processors)
    busy = sum(LATENCY + steps * _step(what, config, arch, count) + count * store for count in waves)
    return LAUNCH + _overlapped(on, busy, what.moved / (on.memory * 1e3))


def _overlapped(on: Chip, *times: float) -> float:
    """The time of things that happen at once."""
    longest = max(times)
    return longest + (1 - on.overlap) * (sum(times) - longest)


def _resident(what: Problem, config: GemmConfig, arch: Arch) -> int:
    """How many programs a processor holds."""
    threads = 32 * config.num_warps
    registers = min(_held(what, config) + (56 if _warpgroup(what, config, arch) else 80), 255)
    return max(
        1,
        min(arch.shared // shared_memory(what, config, arch), 65536 // (threads * registers), 1536 // threads),
    )


def _step(what: Problem, config: GemmConfig, arch: Arch, count: int) -> float:
    """The time of a step of `count` programs on one processor.

    What is said of Hopper predicts 1860 measured times of 31 products on an H200 within 16 % (root mean square); the
    first configuration took 3 % longer than the best one, in the geometric mean.
    """
    on, size, warps = arch.chip, SIZES[what.dtype], config.num_warps
    width = config.width * what.accumulators
    rate = (on.plain if what.dtype == "f32" else on.tensor * RATES[what.dtype]) * 1e6 / on.processors
    if _warpgroup(what, config, arch):
        # 64 rows at a time read all columns, and for each accumulator these rows once.
        ranges = what.accumulators * (2 if config.extra_n else 1) * max(warps * 16 // config.block_m, 1)
        parts = config.block_m * ranges + width * config.block_m / 64
    else:
        # Warps share the tile as evenly as they can, and each reads its part of both operands.
        across = 1
        while across * across < warps and config.block_m // across > 16:
            across *= 2
        parts = warps * (config.block_m / across + width / max(warps // across, 1))
        rate /= 2 if "wgmma" in arch.features else 1  # older instructions
    parts += config.block_m + width if "wgmma" in arch.features else 0  # what copies write
    products = 2 * config.block_m * width * config.block_k / rate
    local = parts * config.block_k * size / (128e3 * on.clock)
    cache = (config.block_m + width) * config.block_k * size / (on.cache * 1e3 * on.clock)
    # What a program loads now it multiplies this many steps later.
    latency = (LATENCY + products) / max(config.num_stages - 1, 1)
    scattered = what.scattered * width * config.block_k / (on.clock * 1e3)
    return BARRIER + _overlapped(on, count * products, count * local, count * cache, latency, count * scattered)


# ---- sums ------------------------------------------------------------------------------------------------------------


def _sums(what: Problem) -> Iterator[GemmConfig]:
    if what.columns_last:  # short steps, each of which waits for memory
        return
    for block_n, block_k in itertools.product((4, 8, 16, 32), (128, 256, 512, 1024)):
        held = block_n * block_k * what.rows * what.accumulators // 128
        waste_k, waste_n = block_k // 2 >= max(what.depth, 64), block_n // 2 >= max(what.columns, 32)
        if 4 <= held <= 64 and not waste_k and not waste_n:
            yield GemmConfig(16, block_n, block_k, 4, 1, sums=True)


def sums_time(what: Problem, config: GemmConfig, on: Chip) -> float:
    """The time of a product without tensor cores: memory, or turning halves into f32 and summing."""
    weights = what.columns * what.accumulators * what.depth * what.taps
    programs = what.batch * ceil(what.columns / config.block_n)
    # Each processor holds at most 12 such programs, and about half of these keep its share of memory busy.
    busy = min(programs / on.processors / 6, 1)
    read = what.batch * weights * SIZES[what.dtype] / (on.memory * 1e3 * busy)
    work = what.batch * weights * 2 * (what.rows + 1) / (on.plain * 1e6 * min(programs / on.processors, 1)) * 4
    steps = what.taps * ceil(what.depth / config.block_k) * ceil(programs / on.processors / 12)
    return LAUNCH + _overlapped(on, read, work, steps * LATENCY)
