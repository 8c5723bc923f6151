"""The performance model: expected kernel times in microseconds, by which tile configurations are ranked.

Thread blocks (programs) run in waves: shared memory and registers bound how many a multiprocessor holds, and the last
wave may leave most of the chip idle, which favours small tiles for small problems. A step of the loop over K takes as
long as its slowest resource: tensor cores, shared memory (larger tiles per warp read less), L2 (larger tiles read
less), or memory latency divided by the pipeline stages. No kernel is faster than its compulsory memory traffic.

The model only has to rank; where there is time, candidates are measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import ceil, inf

from torch_rtx.chips import BARRIER_US, LANES, LANES_OF_WARP, LATENCY_US, Chip
from torch_rtx.dtypes import HALVES
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.float32_dots import IEEE, TF32, TF32X3
from torch_rtx.lowering.kernels.gemm_problem import SIZES, GemmProblem, gemm_problem, precisions_of
from torch_rtx.lowering.kernels.matmul_template import FLOAT8, MAX_GEMV_ROWS, Contraction, GemmConfig
from torch_rtx.lowering.kernels.memory_model import bytes_of, typical
from torch_rtx.lowering.kernels.mma_template import FEW_ROWS
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.sliced_template import MAX_ROWS, MIN_ROWS, rows_of_tile
from torch_rtx.lowering.kernels.source import MIN_BLOCK, block_of
from torch_rtx.targets import Arch

MAX_CONFIGS, MAX_PER_TILE = 12, 2  # configurations kept: in all, and per tile shape
NUM_SPLITS = (2, 4, 8, 16)  # candidates for split-K and split-KV
FULL_TILES, TILE = 0.75, 64  # no split-K with more TILE x TILE tiles per multiprocessor than this
SLICES = (2, 4, 8)  # of K in a tile
RIVAL = 3  # over the time of the fastest configuration: a slower one is no rival of another precision
SPLIT_MULTIPLE = 32  # elements of K: each split has a multiple of this
MAX_IMPRECISE = 128  # products of float8 that tensor cores may sum in less than f32, as in libraries
MAX_PACKED, MAX_COMPUTED = 128, 64  # elements of a packed, or another computed operand per thread and step
BITS = 4  # of packed values whose sums have a number in them, see `packed.with_magic`
UNPACKED = 2  # instructions for a value that Hopper's products take from registers, or for an operation on others
SHOWN = 0.7  # of what programs unpack that are on one multiprocessor
UNPACKING_US, SCALES_US = 0.05, 0.25  # of a step that unpacks for such products, and until scales of groups are there
MAX_SCALED = 3  # operations for an element whose scale follows the sums
MAX_UNPACKED = 240  # registers per thread for accumulators, elements of an operand, and two for each load
# Of operands of 8 bits: operations for an element of a tile, and bytes from L2 for a multiprocessor and cycle.
RESULT_OPERATIONS, L2_BYTES = 4.7, 40
I8_COLUMNS = 128  # of Triton's largest instruction of wgmma
# Of persistent programs: steps of a tile, how many a multiprocessor holds, and bytes of a warp for parts of a tile.
LEAST_STEPS, MOST_RESIDENT, PIECES_BYTES = 2, 2, 4096
FEW_BYTES = 128  # of a column that a step reads, at least, where rows are few
MAX_NARROW_LOADS = 16  # per thread and step: loads of less than 16 bytes
F32 = "f32"
ROUNDING = {TF32: 3, TF32X3: 5}  # operations that make what tensor cores read of a number in f32
CHECKING = 3  # operations for a sum of a step, with TF32X3
WGMMA_WAITS_US, MMA_WAITS_US = 0.045, 0.05  # of a step with TF32X3, for each warp that waits
Found = tuple[float, GemmConfig, str, bool]  # microseconds, a configuration, and what its precision adds to that
FMA_SLOWER = 4.2  # steps without tensor cores, which read operands from shared memory one by one, than the model says


def ranked_configs(
    region: Region, contraction: Contraction, arch: Arch, whole: Region | None = None
) -> list[GemmConfig]:
    """At most MAX_CONFIGS configurations, the fastest first.

    Args:
        whole: the region of a horizontal kernel with parts like `region`.

    Raises:
        Unsupported: see `gemm_problem`.
    """
    block_scaled = contraction.block_scaled > 0 and "block_scale" in arch.features
    found = list[Found]()
    for precision in precisions_of(contraction, arch):
        problem = _with_parts(gemm_problem(region, contraction, arch, precision, block_scaled), whole)
        ranked = _ranked(problem, _is_gemv(contraction) and not block_scaled, arch)
        found += [
            (us, config, precision, problem.promoted)
            for us, config in ranked
            if not (config.gemv and precision != IEEE)  # which has no products
            and not (config.programs and whole is not None)
        ]
    found.sort(key=lambda one: one[0])
    kept, rivals = list[Found](), dict[str, Found]()
    of_tile = Counter[tuple[object, ...]]()
    for one in found:
        us, config, precision, _ = one
        if us <= RIVAL * found[0][0]:
            rivals.setdefault(precision, one)
        tile = config.gemv, config.slices, config.stacked, config.block_m, config.width, config.programs > 0, precision
        of_tile[tile] += 1
        if of_tile[tile] <= MAX_PER_TILE:
            kept.append(one)
    # Times of different instructions are the least certain, and where libraries do not use TF32 it can't pass: the best
    # of each precision comes first.
    first = list(dict.fromkeys((*rivals.values(), *kept)))[:MAX_CONFIGS]
    return [
        replace(config, input_precision=precision, promoted=promoted, block_scaled=block_scaled)
        for _, config, precision, promoted in first
    ]


def gemm_us(region: Region, contraction: Contraction, arch: Arch) -> float:
    """The time of the fastest kernel if its operands were plain loads, in microseconds.

    Raises:
        Unsupported: see `gemm_problem`.
    """
    times = list[float]()
    for precision in precisions_of(contraction, arch):
        problem = gemm_problem(region, contraction, arch, precision)
        size = SIZES[problem.dtype]
        more = (size - problem.second_bytes) * problem.columns * problem.depth * problem.taps
        moved = problem.bytes_moved + int(more)
        problem = replace(problem, bytes_moved=moved, uncoalesced_loads=0, second_bytes=size)
        problem = replace(problem, unpacking=0, packing=None, swapped=False)
        times += [us for us, _ in _ranked(problem, _is_gemv(contraction), arch)[:1]]
    if not times:
        raise Unsupported("no tile fits into the registers")
    return min(times)


def config_us(
    region: Region, contraction: Contraction, arch: Arch, config: GemmConfig, whole: Region | None = None
) -> float:
    """The time of the kernel in one configuration, in microseconds.

    Args:
        whole: see `ranked_configs`.

    Raises:
        Unsupported: see `gemm_problem`.
    """
    problem = gemm_problem(region, contraction, arch, config.input_precision, config.block_scaled)
    problem = _with_parts(problem, whole)
    if config.gemv:
        return gemv_us(problem, config, arch.chip)
    return sliced_us(problem, config, arch) if config.slices > 1 else mma_us(problem, config, arch)


def _with_parts(problem: GemmProblem, whole: Region | None) -> GemmProblem:
    """Parts of one kernel are like batches, but for the operands that they share."""
    if whole is None:
        return problem
    moved = sum(map(bytes_of, whole.memory_types))
    return replace(problem, batch=len(whole.parts) * problem.batch, bytes_moved=moved)


def _is_gemv(contraction: Contraction) -> bool:
    """There are few enough rows to do without tensor cores."""
    return isinstance(contraction.rows, int) and contraction.rows <= MAX_GEMV_ROWS and contraction.ends is None


@lru_cache(maxsize=1024)
def _ranked(problem: GemmProblem, is_gemv: bool, arch: Arch) -> list[tuple[float, GemmConfig]]:
    """All configurations with their times in microseconds, the fastest first."""
    found = [(mma_us(problem, config, arch), config) for config in _mma_configs(problem, arch)]
    if is_gemv:
        found += [(sliced_us(problem, config, arch), config) for config in _sliced_configs(problem, arch)]
    if problem.unpacking:  # of equals, those with the largest tiles and most loads in flight
        found.reverse()
    if is_gemv:
        found += [(gemv_us(problem, config, arch.chip), config) for config in _gemv_configs(problem)]
    return sorted(found, key=lambda one: one[0])


# ---- split-K ---------------------------------------------------------------------------------------------------------


def best_num_splits(region: Region, contraction: Contraction, arch: Arch) -> tuple[int, float]:
    """The best number of splits along K, and the time of the two kernels in microseconds. (1, infinity): K has no
    equal splits, or unsplit tiles fill the chip.

    Raises:
        Unsupported: see `gemm_problem`.
    """
    found = [_best_num_splits(region, contraction, arch, one) for one in precisions_of(contraction, arch)]
    return min(found, key=lambda one: one[1])


def _best_num_splits(region: Region, contraction: Contraction, arch: Arch, precision: str) -> tuple[int, float]:
    problem, chip = gemm_problem(region, contraction, arch, precision), arch.chip
    columns = typical(contraction.columns)  # of all accumulators
    tiles = problem.batch * ceil(problem.rows / TILE) * ceil(columns / TILE)
    best, fastest_us = 1, inf
    if not isinstance(contraction.depth, int) or tiles > FULL_TILES * chip.processors:
        return best, fastest_us
    result = problem.batch * problem.rows * columns
    first_bytes, second_bytes = problem.rows * SIZES[problem.dtype], columns * problem.taps * problem.second_bytes
    operands = int(problem.batch * (first_bytes + second_bytes) * problem.depth)
    multiple = max(SPLIT_MULTIPLE, problem.packing.depth if problem.packing else 1)
    for num_splits in NUM_SPLITS:
        if contraction.depth % (num_splits * multiple) or tiles * num_splits > 2 * chip.processors:
            continue
        moved = operands + 4 * num_splits * result
        partial = replace(problem, batch=problem.batch * num_splits, columns=columns, depth=problem.depth // num_splits)
        partial = replace(partial, accumulators=1, bytes_moved=moved, needs_few_registers=True)
        combined = 4 * num_splits * result + max(problem.bytes_moved - operands, 0)
        combine_us = chip.launch + combined / (chip.memory * 1e3)
        ranked = _ranked(partial, _is_gemv(contraction), arch)
        both_us = ranked[0][0] + combine_us if ranked else inf  # none: so short a sum has no tile
        if both_us >= fastest_us:
            break  # more splits are no better
        fastest_us, best = both_us, num_splits
    return best, fastest_us


# ---- tensor cores ----------------------------------------------------------------------------------------------------


def _mma_configs(problem: GemmProblem, arch: Arch) -> Iterator[GemmConfig]:
    per_half = max(2 // SIZES[problem.dtype], 1)  # elements of K where a half would have one: as many bytes
    few = problem.swapped and problem.rows <= MIN_ROWS and problem.dtype in HALVES
    depths = (64, 128, 256) if problem.packing else (16, 32, 64, 128, 256)[: 5 if few else 4]
    sizes = (16, 32, 64, 128, 256)
    tiles = [(MIN_ROWS,) if few else sizes, sizes, [per_half * size for size in depths]]
    most_m, most_n, most_k = map(block_of, (problem.rows, problem.columns, problem.depth))
    most_k = max(most_k, 16 * per_half)  # of an instruction
    least_k = 32 * per_half
    if few:  # memory is read in long runs
        least_k = 8 * FEW_BYTES // problem.packing.bits if problem.packing else FEW_BYTES
    stages = (2, 3, 4, 5) if "cp_async" in arch.features else (1,)
    forms = [(False, False)]  # with extra columns, which are measured for wgmma alone, or with stacked accumulators
    if "wgmma" in arch.features:
        forms.append((True, False))
        if problem.swapped and problem.accumulators == 2 and problem.dtype in HALVES:
            forms.append((False, True))
    for (block_m, block_n, block_k), (extra, stacked) in itertools.product(itertools.product(*tiles), forms):
        if block_m > most_m or block_n > most_n or not min(most_k, least_k) <= block_k <= most_k:
            continue
        if problem.promoted and block_k > MAX_IMPRECISE:
            continue
        if problem.dtype in (F32, TF32X3) and block_k > 32:
            continue  # operands of FMA products take registers, and so do both parts of an operand
        if extra and (problem.unpacking or not 64 <= block_n <= 128 or block_k < 64):
            continue
        extra_n = block_n // 2 if extra else 0
        area = block_m * (block_n + extra_n) * problem.accumulators
        warps = [count for count in (2, 4, 8) if 256 <= area // count <= 4096] or [1]
        if few:  # warps divide the columns, so that none is unpacked twice; the rows are those of one instruction
            warps = [count for count in (1, 2) if block_n in (16 * count, 32 * count)]
        most_stages = max(ceil(problem.depth / block_k), 2) if few else stages[-1]  # more would be empty
        for num_warps in warps:
            given = GemmConfig(block_m, block_n, block_k, num_warps, extra_n=extra_n, stacked=stacked)
            config = _of_computed(problem, given, arch)
            if config is None or (extra and not _uses_wgmma(problem, config, arch)):
                continue
            if not _fits_registers(problem, config, arch):
                continue
            tile = block_m, block_n, block_k, num_warps
            for num_stages in stages:
                staged = GemmConfig(*tile, num_stages, extra_n=extra_n, joined=config.joined, stacked=stacked)
                if num_stages <= most_stages and shared_memory(problem, staged, arch) <= arch.shared:
                    yield staged
                    yield from _persistent(problem, staged, arch)


def _persistent(problem: GemmProblem, config: GemmConfig, arch: Arch) -> Iterator[GemmConfig]:
    """`config` with programs that compute several tiles each. That pays where a tile takes little more than its first
    loads and its stores, as of operands of 8 bits on Hopper; with halves nothing was gained there."""
    is_plain = not (problem.promoted or problem.unpacking or problem.taps > 1 or config.extra_n)
    is_plain = is_plain and not (problem.dtype == "i8" and config.block_n > I8_COLUMNS)
    is_plain = is_plain and _is_narrow(problem) and problem.depth >= LEAST_STEPS * config.block_k
    if is_plain and _uses_wgmma(problem, config, arch):
        looped = replace(config, programs=1)
        if shared_memory(problem, looped, arch) <= arch.shared:
            resident = min(_resident_programs(problem, looped, arch), MOST_RESIDENT)
            if _tiles(problem, config) > resident * arch.chip.processors:
                yield replace(config, programs=resident * arch.chip.processors)


def _is_narrow(problem: GemmProblem) -> bool:
    """Operands have 8 bits: a step of Hopper's products takes half as long as of halves, and all around it as long."""
    return problem.dtype in FLOAT8 or problem.dtype == "i8"


def _tiles(problem: GemmProblem, config: GemmConfig) -> int:
    return problem.batch * ceil(problem.rows / config.block_m) * ceil(problem.columns / config.width)


def _of_computed(problem: GemmProblem, config: GemmConfig, arch: Arch) -> GemmConfig | None:
    """`config` for the second operand, if that is computed; None if it does not suit the operand."""
    if problem.dtype not in HALVES or not (problem.swapped or problem.packing):
        return config
    parts = problem.packing.parts if problem.packing else 1
    if config.block_k < MIN_BLOCK * parts:  # a part has the elements of an instruction
        return None
    if problem.packing and problem.has_groups and config.block_k > problem.packing.depth:  # each value has a scale
        return None
    if not _uses_wgmma(problem, config, arch):
        if config.stacked:
            return None
        # A thread reads at least 4 bytes of each part of the first operand, so that these are copied ahead of time.
        read = config.block_m * config.block_k // (32 * config.num_warps)
        return None if problem.packing and read < 2 * parts else config
    if problem.swapped and _rows(problem, config) < 16 * config.num_warps:  # two warpgroups would unpack the same
        return None
    if config.stacked and config.block_n >= 16 * config.num_warps:  # there are as many rows without
        return None
    return replace(config, joined=parts > 1)


def accumulator_regs(problem: GemmProblem, config: GemmConfig) -> int:
    """Registers per thread for accumulators."""
    each = 1 + (problem.promoted or problem.dtype == TF32X3)
    return each * config.block_m * config.width * problem.accumulators // (32 * config.num_warps)


def _computed_elements(problem: GemmProblem, config: GemmConfig) -> int:
    """Elements of the second operand per thread and step."""
    return config.width * problem.accumulators * config.block_k // (32 * config.num_warps)


def _fits_registers(problem: GemmProblem, config: GemmConfig, arch: Arch) -> bool:
    """The kernel should not spill. Empirical: of 255 registers accumulators may take a quarter, or half with wgmma and
    a cheap epilogue; each 16-byte load takes a pointer and, without `cp.async`, its data; more narrow loads than
    MAX_NARROW_LOADS would cost the second resident program."""
    if _unpacks_for_wgmma(problem, config, arch):
        loads = int(problem.step_bytes(config)) // (16 * 32 * config.num_warps)
        return accumulator_regs(problem, config) + _computed_elements(problem, config) // 2 + 2 * loads <= MAX_UNPACKED
    is_light = _uses_wgmma(problem, config, arch) and problem.needs_few_registers
    most = 16 if problem.dtype == F32 else 128 if is_light and problem.dtype != TF32X3 else 64
    threads = 32 * config.num_warps
    columns = config.width * problem.accumulators
    loaded = (config.block_m + columns) * SIZES[problem.dtype] * config.block_k  # of what computes an element, at least
    is_few = config.block_m == MIN_ROWS
    if is_few:
        loaded = int(columns * problem.second_bytes * config.block_k)
    elif problem.packing:
        loaded = int(problem.step_bytes(config))
    pointers = loaded // (16 * threads)
    is_least = config.block_m <= 16 and config.width <= 16
    most_pointers = 12 if "cp_async" in arch.features or is_few or is_least else 6
    if config.num_warps == 4 and _is_narrow(problem) and _uses_wgmma(problem, config, arch):
        most_pointers = 16
    elements = _computed_elements(problem, config) if problem.unpacking else 0
    most_elements = MAX_PACKED if problem.packing or is_few else MAX_COMPUTED
    if problem.packing and is_few:  # a part after the other
        most_elements *= 2
    is_narrow = problem.vector_elements * SIZES[problem.dtype] < 16
    narrow_loads = config.block_m * config.block_k // (problem.vector_elements * threads) if is_narrow else 0
    return (
        accumulator_regs(problem, config) <= most
        and pointers <= most_pointers
        and narrow_loads <= MAX_NARROW_LOADS
        and elements <= most_elements
    )


def _uses_wgmma(problem: GemmProblem, config: GemmConfig, arch: Arch) -> bool:
    """Products run as Hopper's wgmma, which reads operands from shared memory, and the first one from registers, too: a
    computed one comes first, see `MmaWriter`."""
    if "wgmma" not in arch.features or config.num_warps < 4 or problem.dtype == F32:
        return False
    rows = _rows(problem, config) if problem.swapped else config.block_m
    along_k = problem.dtype not in FLOAT8 or not problem.columns_last  # float8 lies along K in shared memory
    return rows >= 64 and along_k


def _rows(problem: GemmProblem, config: GemmConfig) -> int:
    """The rows of a product whose second operand comes first."""
    return config.block_n * (problem.accumulators if config.stacked else 1)


def _unpacks_for_wgmma(problem: GemmProblem, config: GemmConfig, arch: Arch) -> bool:
    """Wgmma takes a computed operand from registers."""
    return problem.swapped and _uses_wgmma(problem, config, arch)


def shared_memory(problem: GemmProblem, config: GemmConfig, arch: Arch) -> int:
    """Bytes of shared memory per program: of the pipeline stages, one more with wgmma, which reads from there, also
    what is computed and does not come first."""
    step, is_wgmma = int(problem.step_bytes(config)), _uses_wgmma(problem, config, arch)
    steps = config.num_stages - (not is_wgmma)
    is_written = is_wgmma and problem.unpacking and not problem.swapped
    computed = config.block_n * config.block_k * SIZES[problem.dtype] if is_written else 0
    if config.programs:  # pieces of a tile are put in order while the next one is read
        return step * max(steps, 1) + computed + PIECES_BYTES * config.num_warps
    return max(step * max(steps, 1) + computed, config.block_m * config.block_n * 2)


def mma_us(problem: GemmProblem, config: GemmConfig, arch: Arch) -> float:
    """The time of a `tl.dot` kernel, in microseconds."""
    chip = arch.chip
    width = config.width * problem.accumulators
    tiles = _tiles(problem, config)
    steps = problem.taps * ceil(problem.depth / config.block_k)
    resident = config.programs // chip.processors or _resident_programs(problem, config, arch)
    full_waves, tail = divmod(tiles, chip.processors * resident)
    waves = [(full_waves, resident), (1, ceil(tail / chip.processors))]
    store_us = config.block_m * width * 2 / (chip.memory * 1e3 / chip.processors)
    busy_us = sum(
        times * (steps * _step_us(problem, config, arch, count) + count * store_us)
        for times, count in waves
        if times and count
    )
    if _is_narrow(problem) and problem.taps == 1 and "wgmma" in arch.features:  # measured for products
        area, cycle = config.block_m * width, chip.clock * 1e3
        # Several programs on a multiprocessor hide from each other what they do with their sums.
        busy_us += sum(times for times, count in waves if count == 1) * RESULT_OPERATIONS * area / (LANES * cycle)
        moved = tiles * (steps * problem.step_bytes(config) + 2 * area)
        busy_us = max(busy_us, moved / (L2_BYTES * cycle * chip.processors))
    # The first loads of a wave; of persistent programs, only those of their first tile are waited for.
    busy_us += LATENCY_US * (1 if config.programs else full_waves + (tail > 0))
    return chip.launch + _overlapped_us(chip, busy_us, problem.bytes_moved / (chip.memory * 1e3))


def _overlapped_us(chip: Chip, *times: float) -> float:
    """The time of operations that overlap, as well as the chip overlaps them."""
    longest = max(times)
    return longest + (1 - chip.overlap) * (sum(times) - longest)


def _resident_programs(problem: GemmProblem, config: GemmConfig, arch: Arch) -> int:
    """Programs per multiprocessor."""
    threads = 32 * config.num_warps
    is_once = _uses_wgmma(problem, config, arch) and not config.programs  # a tile per program
    used = accumulator_regs(problem, config) + (56 if is_once else 80)
    if _unpacks_for_wgmma(problem, config, arch):
        used += _computed_elements(problem, config) * 3 // 4  # of this step and the next
    elif problem.packing:  # a part after the other, but all scales
        used += int(_computed_elements(problem, config) * (1 / 16 + problem.second_bytes - problem.packing.bits / 8))
    registers = min(used, 255)
    return max(
        1,
        min(arch.shared // shared_memory(problem, config, arch), 65536 // (threads * registers), 1536 // threads),
    )


def _step_us(problem: GemmProblem, config: GemmConfig, arch: Arch, count: int) -> float:
    """The time of one step over K of `count` programs on one multiprocessor, in microseconds; fitted on Hopper."""
    chip, size, warps = arch.chip, SIZES[problem.dtype], config.num_warps
    width = config.width * problem.accumulators
    rate = chip.rate(problem.dtype) * 1e6 / chip.processors
    across, is_wgmma = 1, _uses_wgmma(problem, config, arch)  # warps that read the same columns
    if is_wgmma:
        # A warpgroup multiplies 64 rows at a time: it reads all columns, and per accumulator its rows once. Of an
        # operand that it computes from what is in memory, the columns are those rows.
        ranges = problem.accumulators * (2 if config.extra_n else 1) * max(warps * 16 // config.block_m, 1)
        ranges *= ceil(config.block_n / I8_COLUMNS) if problem.dtype == "i8" else 1
        shared = width * config.block_m / 64 * size
        shared += width * problem.second_bytes if problem.swapped else config.block_m * ranges * size
        if problem.dtype in ROUNDING:  # what it is made of the second operand is written again, and read
            shared += width * size * (2 if problem.dtype == TF32 else 3 + 2 * config.block_m / 64)
    else:
        # Warps divide the tile into near squares; each reads its rows and its columns, and unpacks these.
        while across * across < warps and config.block_m // across > 16:
            across *= 2
        second = problem.second_bytes if problem.unpacking else size
        shared = warps * (config.block_m / across * size + width / max(warps // across, 1) * second)
        if "wgmma" in arch.features:  # mma.sync has half the rate there, and Triton makes float8 halves for it
            rate = (chip.tensor * 1e6 / chip.processors if problem.dtype in FLOAT8 else rate) / 2
    shared += (config.block_m + width) * size if "wgmma" in arch.features else 0  # copies to shared memory
    math_us = 2 * config.block_m * width * config.block_k / rate
    is_scaled = config.block_m <= FEW_ROWS and not config.joined  # scales follow the sums, see `MmaWriter`
    if is_scaled and problem.packing and problem.packing.bits == BITS:  # sums of the first operand are products, too
        math_us *= 2
    if problem.promoted:
        math_us += config.block_m * width / (chip.plain * 1e6 / 2 / chip.processors)
    shared_us = shared * config.block_k / (128e3 * chip.clock)
    l2_us = problem.step_bytes(config) / (chip.cache * 1e3 * chip.clock)
    if _unpacks_for_wgmma(problem, config, arch):
        return BARRIER_US + _unpacking_step_us(problem, config, chip, count, math_us, max(shared_us, l2_us))
    # A load is due num_stages - 1 steps later.
    latency_us = (LATENCY_US + math_us) / max(config.num_stages - 1, 1)
    uncoalesced_us = problem.uncoalesced_loads * width * config.block_k / (chip.clock * 1e3)
    operations = min(problem.unpacking, MAX_SCALED) if is_scaled else problem.unpacking
    lanes = min(LANES, LANES_OF_WARP * warps * count)
    computed = operations * width * config.block_k * across
    if problem.dtype in ROUNDING:
        by_row_warps, by_column_warps = (1, 1) if is_wgmma else (across, max(warps // across, 1))
        parted = width * by_row_warps + config.block_m * by_column_warps
        computed += ROUNDING[problem.dtype] * parted * config.block_k
        computed += CHECKING * config.block_m * width if problem.dtype == TF32X3 else 0
    unpack_us = computed / (lanes * chip.clock * 1e3)
    waiting_us = 0.0
    if problem.dtype == TF32X3:  # products of which each needs the one before
        waiting_us = WGMMA_WAITS_US * warps if is_wgmma else MMA_WAITS_US * (2 + warps * count)
    on_chip_us = count * math_us, count * shared_us, count * l2_us, count * unpack_us
    slower = FMA_SLOWER if problem.dtype == F32 else 1.0
    return slower * (BARRIER_US + waiting_us + _overlapped_us(chip, *on_chip_us, latency_us, count * uncoalesced_us))


def _unpacking_step_us(
    problem: GemmProblem, config: GemmConfig, chip: Chip, count: int, math_us: float, read_us: float
) -> float:
    """As `_step_us`, where wgmma takes an operand from registers. The warps that unpack it also start the products, so
    that little of their work is hidden; of several programs, some. What is copied comes from L2 mostly, in half the
    time that memory takes."""
    packing, elements = problem.packing, config.width * problem.accumulators * config.block_k
    operations = UNPACKED * (1 if packing else problem.unpacking)
    unpack_us = operations * elements / (LANES * chip.clock * 1e3)
    unpack_us += SCALES_US if problem.has_groups else 0
    latency_us = (LATENCY_US / 2 + math_us + unpack_us) / max(config.num_stages - 1, 1)
    busy_us = count * (math_us + unpack_us * (SHOWN if count > 1 else 1))
    return UNPACKING_US + max(busy_us, count * read_us, latency_us)


# ---- slices of K side by side ----------------------------------------------------------------------------------------


def _sliced_configs(problem: GemmProblem, arch: Arch) -> Iterator[GemmConfig]:
    for slices in SLICES if problem.is_sliceable else ():
        multiple = max(SPLIT_MULTIPLE, problem.packing.depth if problem.packing else 1)
        is_whole = problem.depth % (slices * multiple) == 0
        rows = rows_of_tile(problem.rows, slices)
        if is_whole and rows <= MAX_ROWS:
            for config in _mma_configs(_sliced(problem, slices), arch):
                if config.block_m == rows and not config.joined and config.block_n % slices == 0:
                    yield replace(config, block_n=config.block_n // slices, slices=slices)


def _sliced(problem: GemmProblem, slices: int) -> GemmProblem:
    """The problem whose tiles are those with slices."""
    rows = rows_of_tile(problem.rows, slices)
    return replace(problem, rows=rows, columns=problem.columns * slices, depth=problem.depth // slices)


def sliced_us(problem: GemmProblem, config: GemmConfig, arch: Arch) -> float:
    """The time of a kernel of tiles with slices, in microseconds. Their sum goes through shared memory, twice."""
    whole = replace(config, block_n=config.block_n * config.slices)
    return mma_us(_sliced(problem, config.slices), whole, arch) + 2 * BARRIER_US


# ---- GEMV ------------------------------------------------------------------------------------------------------------


def _gemv_configs(problem: GemmProblem) -> Iterator[GemmConfig]:
    if problem.columns_last:  # steps would be too short to hide latency
        return
    depths = (512, 1024, 2048, 4096) if problem.packing else (128, 256, 512, 1024)
    for block_n, block_k in itertools.product((4, 8, 16, 32), depths):
        accumulators = block_n * block_k * problem.rows * problem.accumulators // 128
        accumulators //= problem.packing.values if problem.packing else 1
        waste_k, waste_n = block_k // 2 >= max(problem.depth, 64), block_n // 2 >= max(problem.columns, 32)
        if 4 <= accumulators <= 64 and not waste_k and not waste_n:
            yield GemmConfig(16, block_n, block_k, 4, 1, gemv=True)


def gemv_us(problem: GemmProblem, config: GemmConfig, chip: Chip) -> float:
    """The time of a GEMV kernel, in microseconds: bound by memory, or by conversions to f32 and FMAs."""
    weights = problem.columns * problem.accumulators * problem.depth * problem.taps
    programs = problem.batch * ceil(problem.columns / config.block_n)
    # A multiprocessor holds at most 12 such programs; about half of them saturate its share of bandwidth.
    busy = min(programs / chip.processors / 6, 1)
    read_us = problem.batch * weights * problem.second_bytes / (chip.memory * 1e3 * busy)
    flops = problem.batch * weights * 2 * (problem.rows + 1 + problem.unpacking / 4)
    fma_us = flops / (chip.plain * 1e6 * min(programs / chip.processors, 1)) * 4
    steps = problem.taps * ceil(problem.depth / config.block_k) * ceil(programs / chip.processors / 12)
    return chip.launch + _overlapped_us(chip, read_us, fma_us, steps * LATENCY_US)
