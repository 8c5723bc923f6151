"""Products of groups of rows with a matrix for each group; the data say where each group ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch_rtx.chips import MODEL_ERROR
from torch_rtx.dtypes import DTYPES, FLOAT
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Dim, dim_expr
from torch_rtx.lowering.kernels.body_builder import argument, type_of
from torch_rtx.lowering.kernels.emit import Axis, Emitter
from torch_rtx.lowering.kernels.families.family import Family, Offer, library_us
from torch_rtx.lowering.kernels.gemm_perf_model import config_us, gemm_us, ranked_configs
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.index import from_dim, variable
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.kernel_ir import ONE, cast
from torch_rtx.lowering.kernels.matmul_template import Contraction, GemmConfig, M, Z, anchor_result
from torch_rtx.lowering.kernels.memory_model import epilogue_us, prologue_us, streaming_us
from torch_rtx.lowering.kernels.mma_template import MmaWriter
from torch_rtx.lowering.kernels.region import Region
from torch_rtx.lowering.kernels.source import next_power_of_2
from torch_rtx.op_work import GROUPED_MM
from torch_rtx.targets import Arch

G = "G"  # the index of a group
MAX_GROUPS = 1024  # each program looks for its group among all
OVERLAP = 0.9  # of memory traffic and other work, at most
CALLS = 5  # beside the library's: they put ends of groups in order, and zeros behind the last group, if need be
LIBRARY_SMS = (90, 100)  # where `aten._grouped_mm` is one kernel; elsewhere it waits for the offsets
LATER = """

@triton.jit
def _later(a, b):
    return tl.maximum(a, b)
"""


def grouped_contraction(region: Region) -> Contraction:
    """The region's product as a contraction whose batches are groups.

    Raises:
        Unsupported: no such product, too many groups, or groups whose number is no constant.
    """
    node, out, type_ = anchor_result(region, "grouped")
    a, b, ends = (region.values[argument(node, name).name] for name in ("self", "mat2", "offs"))
    groups, depth, columns = type_of(argument(node, "mat2")).shape
    if not isinstance(groups, int) or not 0 < groups < MAX_GROUPS or DTYPES[out.dtype].kind != FLOAT:
        raise Unsupported(f"a product of {groups} groups in {out.dtype}")
    return Contraction(
        out=out,
        axis=1,
        batch=groups,
        rows=type_.shape[0],
        columns=columns,
        grouped=False,
        taps=(),
        depth=depth,
        channels_last=True,
        a=a,
        b=b,
        a_at=lambda z, m, k: (m, *k),
        b_at=lambda z, n, k: (z, *k, n),
        epilogue=lambda total: cast(total, out.dtype),
        ends=ends,
        whole=node.arg("whole", False) is True,
    )


class GroupedWriter(MmaWriter):
    """A program looks up which group its tile of rows is in: each group has tiles of its own, and so have the rows
    behind the last group, for which nothing is summed. Programs are as many as there may be tiles."""

    live = "live"

    def __init__(self, region: Region, contraction: Contraction, config: GemmConfig) -> None:
        super().__init__(region, contraction, config)
        self.rows_mask = "in_m"
        self.loop_rows = replace(self.loop_rows, mask=self.rows_mask)  # a tile may reach beyond all rows
        self.functions += "" if contraction.whole else LATER

    @property
    def batch(self) -> Dim:
        """Tiles of all groups are along the rows."""
        return 1

    @property
    def tiles(self) -> tuple[Dim, Dim]:
        """At most one tile of a group is not full, and none is empty."""
        rows, (_, across) = self.contraction.rows, super().tiles
        whole = dim_expr("//", rows, self.config.block_m)
        behind = 0 if self.contraction.whole else 1
        return dim_expr("min", rows, dim_expr("+", whole, self.contraction.batch, behind)), across

    def rows(self, tile: str) -> list[str]:
        """The group of a tile, and its rows."""
        groups, block = self.contraction.batch, self.config.block_m
        assert isinstance(groups, int)
        width = next_power_of_2(groups + 1)
        return [
            f"{G} = tl.arange(0, {width})",
            *self._ends("end", width, 0),
            *self._ends("begin", width, 1),
            f"row = {tile or '0'}",
            f"count = (end - begin + {block - 1}) // {block}",
            "before = tl.cumsum(count, 0) - count",
            "group = tl.sum((before + count <= row).to(tl.int32), 0)",
            f"start = tl.sum(tl.where({G} == group, begin + (row - before) * {block}, 0), 0)",
            f"stop = tl.sum(tl.where({G} == group, end, 0), 0)",
            f"live = (start < stop) & (group < {groups})",
            f"{Z} = tl.minimum(group, {groups - 1}){self.cast}",
            f"{M} = start + tl.arange(0, {block}){self.row_axis}{self.cast}",
            f"in_m = {M} < stop",
        ]

    def _ends(self, name: str, width: int, behind: int) -> list[str]:
        """Where the group that is `behind` another one ends. Behind the last group is one of all other rows, if there
        may be any. Offsets out of order give empty groups, so that no row is in two."""
        contraction = self.contraction
        assert contraction.ends is not None
        emitter = Emitter([Axis(G, width, f"in_{name}")], name)
        groups, rows = from_dim(contraction.batch), from_dim(contraction.rows)
        at = variable(G, groups)
        value = emitter.value(contraction.ends, (at - ONE if behind else at,)).text
        most = f"{G} < {groups}" if contraction.whole or not behind else f"{G} <= {groups}"
        known = [f"in_{name} = {f'({G} > 0) & ({most})' if behind else most}", *emitter.outer.lines]
        if contraction.whole:
            return [*known, f"{name} = tl.where(in_{name}, {value}, 0)"]
        other = f"tl.where({G} > {groups}, {rows}, 0)" if behind else f"{rows}"
        within = f"tl.minimum(tl.maximum({value}, 0), {rows})"
        return [*known, f"{name} = tl.associative_scan(tl.where(in_{name}, {within}, {other}), 0, _later)"]


def _kernel(region: Region, name: str, config: GemmConfig) -> Kernel:
    return GroupedWriter(region, grouped_contraction(region), config).kernel(name)


def _configs(region: Region, arch: Arch) -> list[GemmConfig]:
    """Of those that wait for memory alone, as with few rows of each group, the ones with the least other work first."""
    chip = replace(arch.chip, overlap=min(arch.chip.overlap, OVERLAP))
    found = ranked_configs(region, grouped_contraction(region), replace(arch, chip=chip))
    # These times hardly differ, and few are measured: of each tile one before other depths of its pipeline.
    of_tile = {replace(one, num_stages=0): one for one in reversed(found)}
    return list(dict.fromkeys((*reversed(of_tile.values()), *found)))


def _expected_us(region: Region, arch: Arch, config: GemmConfig) -> float:
    return MODEL_ERROR * config_us(region, grouped_contraction(region), arch, config)


def _others(region: Region, name: str, arch: Arch, us: float) -> Iterator[Offer]:
    contraction = grouped_contraction(region)
    if arch.sm not in LIBRARY_SMS or contraction.out.dtype != "bf16":
        return
    _, _, type_ = anchor_result(region, "grouped")
    before_us = prologue_us(region, arch)
    before_us += 0 if contraction.whole else CALLS * arch.chip.launch + streaming_us([type_, type_], arch)
    plain, after_us = MODEL_ERROR * gemm_us(region, contraction, arch), epilogue_us(region, arch)
    moved = gemm_problem(region, contraction, arch).bytes_moved  # not of matrices without rows
    yield Offer("library", library_us("gemm", region, arch, plain, before_us, after_us, True, moved))


FAMILY = Family("grouped", frozenset((GROUPED_MM,)), _configs, _kernel, _expected_us, _others)
