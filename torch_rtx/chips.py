"""GPUs as the cost model sees them, and the constants of that model, all of them here.

A `Chip` is a GPU's data sheet times what code reaches of it, or what `torch-rtx measure-gpu` found. Every expected time
is computed from a chip and these few constants, which were fitted on an H200; nothing is a measurement of another GPU.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf, isfinite
from typing import Any

from torch_rtx.dtypes import OPERANDS, PACKED

log = logging.getLogger(__name__)

# ---- constants of the model ------------------------------------------------------------------------------------------

MEMORY_REACHED = 0.875  # of the bandwidth of the data sheet
LAUNCH_US = 1.5  # before the first operands of a kernel arrive, and after its last store
LAUNCHES_OF_A_NODE = 1.44  # LAUNCH_US over the time that a node adds to a CUDA graph
LATENCY_US = 0.8  # of DRAM under load
BARRIER_US = 0.03  # of a step of a program
READ_BYTES = 32  # that a multiprocessor reads in a cycle from L2
CACHED_BYTES = 48  # the same of what its programs share, some of which is in its own cache
OVERLAP = 0.8  # how much of what is not the bottleneck is hidden behind it
LANES = 128  # instructions of a thread that a multiprocessor issues in a cycle
LANES_OF_WARP = 16  # those of one warp: they wait for each other
STEP_US = 0.3  # of a loop over a row, most of which is in a cache
SECTOR_BYTES, CACHE_SPEEDUP = 32, 1.3  # what a cache fetches at once; how much faster it is than memory
CYCLES_PER_ELEMENT = 0.09  # of a loop over rows, on one multiprocessor
RUN_OF_DOUBLE_COST = 20  # elements: those of rows in runs of so many cost twice as much
HANDOVER_US = {2: 0.6, 3: 3.9}  # of so many kernels that read each other's results, beside their launches
PDL_SAVES_US = 0.4  # by one kernel that starts early in a CUDA graph (programmatic dependent launch)

MODEL_ERROR = 1.07  # measured over modelled time of kernels; a little less than it is, so that ties go to kernels
SLOWER = 1.1  # a library call relative to the kernel, outside of what libraries are tuned for
TUNED = 0.95  # the same at least, where both have the same instructions (all but wgmma) and memory does not bound them
ATTENTION_REACHED = 0.6  # of the tensor-core rate: softmax runs between the products
FMA_REACHED = 0.7  # of the rate of f32 without tensor cores, in libraries
BIAS_COST = 1.25  # a product in f32 whose bias cuBLASLt adds, relative to one without
FASTER = 0.95  # a library's attention relative to the kernel, where products are asynchronous (wgmma) and these hold:
ATTENTION_LEAST_US, MANY_KEYS = 18.5, 3000  # of its products at their full rate


@dataclass(frozen=True, slots=True)
class Library:
    """What library calls for one kind of anchor take.

    Attributes:
        reached: of the rate of large products of libraries.
        us: of overhead.
        least_us: at the full rate of products in f16: below this a call is not faster than a kernel.
    """

    reached: float
    us: float
    least_us: float


# Products from 3072 x 768 x 768 to 4608 x 21504 x 3072, convolutions of 7.5e9 to 483e9 FLOP.
LIBRARY: Mapping[str, Library] = {
    "gemm": Library(1.0, 5.0, 1.734),
    "conv": Library(0.826, 12.0, 5.78),
}


# ---- chips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chip:
    """A GPU.

    Attributes:
        processors: how many multiprocessors.
        tensor: TFLOP/s of dense f16 products that are summed in f32.
        plain: TFLOP/s of f32 without tensor cores.
        memory: GB/s, as copies reach.
        clock: GHz under load.
        cache: bytes of the L2 cache that a multiprocessor reads in a cycle.
        overlap: see OVERLAP.
        launch: microseconds, see LAUNCH_US.
        library: how much of the rate of products the libraries' large ones reach.
        ratios: rates of products relative to f16, by dtype, where they are not those of `dtypes`.
    """

    processors: int
    tensor: float
    plain: float
    memory: float
    clock: float
    cache: float = READ_BYTES
    overlap: float = OVERLAP
    launch: float = LAUNCH_US
    library: float = 1.0
    ratios: Mapping[str, float] = field(default_factory=dict, hash=False)

    def rate(self, dtype: str) -> float:
        """TFLOP/s of dense products of operands, as `dtypes.OPERANDS` names them; elements count, except of PACKED, of
        which values do."""
        if dtype == PACKED:
            return 2 * self.rate("fp4_x2")
        ratio = self.ratios.get(dtype, OPERANDS[dtype].tensor_rate)
        return self.plain if ratio is None else self.tensor * ratio

    def scaled(self, processors: int, memory: float, clock: float) -> Chip:
        """A chip of the same kind.

        Args:
            processors: see above.
            memory: GB/s of its data sheet.
            clock: GHz of its data sheet, at most.
        """
        clock = min(clock, self.clock)
        more = processors * clock / (self.processors * self.clock)
        return replace(
            self,
            processors=processors,
            tensor=more * self.tensor,
            plain=more * self.plain,
            memory=MEMORY_REACHED * memory,
            clock=clock,
        )

    def measured(self, figures: Mapping[str, float]) -> Chip:
        """The chip with what was measured on a GPU of its kind.

        Args:
            figures: see `FIGURES`.
        """
        clock = figures["clock"]
        rates = {name: figures[name] / figures["f16"] for name in PRODUCTS if name in figures and name != "f32"}
        if "fp4" in rates:
            rates["fp4_x2"] = rates.pop("fp4") / 2
        cache = figures["l2"] / (self.processors * clock) if isfinite(self.cache) else self.cache
        return replace(
            self,
            tensor=figures["f16"] / self.library,
            plain=figures["f32"] / self.library,
            memory=figures["memory"],
            clock=clock,
            cache=cache,
            launch=LAUNCHES_OF_A_NODE * figures["node"],
            ratios={**self.ratios, **rates},
        )


# What is measured on a GPU, with its unit. Products are those of libraries; a dtype that a GPU lacks has no figure.
PRODUCTS = ("f16", "bf16", "f32", "i8", "f8e4m3fn", "mxfp8", "fp4")
FIGURES: Mapping[str, str] = {
    "memory": "GB/s",
    "l2": "GB/s",
    "clock": "GHz",
    "node": "us",
    "launch": "us",
    **dict.fromkeys(PRODUCTS, "TFLOP/s"),
}
REQUIRED = ("memory", "l2", "clock", "node", "f16", "f32")


def read_figures(stored: bytes | None) -> Mapping[str, float] | None:
    """Figures from the JSON in a runtime cache; None: it has none, or unreadable ones, of which the log tells."""
    if stored is None:
        return None
    try:
        given = {str(name): float(figure) for name, figure in json.loads(stored).items() if name in FIGURES}
        if not all(name in given for name in REQUIRED) or not all(0 < f < inf for f in given.values()):
            raise ValueError("figures are missing or not positive")
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("the runtime cache has unreadable figures of the GPU, its data sheet counts: %s", error)
        return None
    return given


# By SM version: FLOP that a multiprocessor does in a cycle, as products in f16 (where sums in f32 have the full rate)
# and in f32 without tensor cores, at the clock below. Of sm_100 to sm_110 half the data sheet: nothing was measured.
_PER_CYCLE = {
    75: (1024, 128),
    80: (2048, 128),
    86: (1024, 256),
    87: (2048, 256),
    89: (1024, 256),
    90: (4096, 284),
    100: (4096, 256),
    103: (4096, 256),
    110: (4096, 256),
    120: (1024, 256),
    121: (1024, 256),
}
# Asynchronous products (wgmma) hide all else behind the bottleneck, and never wait for L2.
_ASYNCHRONOUS: Mapping[int, Mapping[str, Any]] = {90: {"cache": inf, "overlap": 1.0, "library": 0.896}}
# GeForce GPUs sum products of f16 and float8 in f32 at half the rate of tensor cores; those of int8 and fp4 keep it.
_HALF_RATE = {"i8": 4.0, "fp4_x2": 4.0}
# Public data sheets: SM version, multiprocessors, boost clock in GHz, bandwidth in GB/s. GeForce GPUs keep that clock
# while tensor cores are busy; Hopper does not, and has the one that an H200 keeps.
_SHEETS = """
rtx2060 75 30 1.68 336
rtx2060super 75 34 1.65 448
rtx2070 75 36 1.62 448
rtx2070super 75 40 1.77 448
rtx2080 75 46 1.71 448
rtx2080super 75 48 1.815 496
rtx2080ti 75 68 1.545 616
titanrtx 75 72 1.77 672
t4 75 40 1.59 320
a100 80 108 1.41 1555
a10080gb 80 108 1.41 2039
a100sxm480gb 80 108 1.41 2039
a30 80 56 1.44 933
rtx3050 86 20 1.777 224
rtx3060 86 28 1.777 360
rtx3060ti 86 38 1.665 448
rtx3070 86 46 1.725 448
rtx3070ti 86 48 1.77 608
rtx3080 86 68 1.71 760
rtx3080ti 86 80 1.665 912
rtx3090 86 82 1.695 936
rtx3090ti 86 84 1.86 1008
rtxa4000 86 48 1.56 448
rtxa5000 86 64 1.695 768
rtxa6000 86 84 1.8 768
a10 86 72 1.695 600
a40 86 84 1.74 696
orin 87 16 1.3 205
rtx4060 89 24 2.46 272
rtx4060ti 89 34 2.535 288
rtx4070 89 46 2.475 504
rtx4070super 89 56 2.475 504
rtx4070ti 89 60 2.61 504
rtx4070tisuper 89 66 2.61 672
rtx4080 89 76 2.505 717
rtx4080super 89 80 2.55 736
rtx4090 89 128 2.52 1008
rtx6000ada 89 142 2.505 960
l4 89 58 2.04 300
l40s 89 142 2.52 864
h100 90 132 1.6 3350
h100pcie 90 114 1.4 2039
h200 90 132 1.6 4800
b200 100 148 1.9 8000
b300 103 148 1.9 8000
thor 110 20 1.57 273
rtx5050 120 20 2.57 320
rtx5060 120 30 2.497 448
rtx5060ti 120 36 2.572 448
rtx5070 120 48 2.512 672
rtx5070ti 120 70 2.452 896
rtx5080 120 84 2.617 960
rtx5090 120 170 2.407 1792
rtxpro6000 120 188 2.6 1792
gb10 121 48 2.5 273
"""
_HALVED = re.compile(r"rtx[2-5]0[5-9]0|gb10")
# The chip that stands for an SM version, unless the GPU is known.
TYPICAL = {
    75: "rtx2080ti",
    80: "a100",
    86: "rtx3090",
    87: "orin",
    89: "rtx4090",
    90: "h200",
    100: "b200",
    103: "b300",
    110: "thor",
    120: "rtx5090",
    121: "gb10",
}
_MAKERS = re.compile(r"nvidia|geforce|tesla|quadro|jetson|agx|[\s_-]")
_SAME_CHIP = re.compile(r"(?:gpu|\d+gb|sxm\d?|pcie|hbm\d?e?|generation|blackwell|workstation|server|edition)*")


@cache
def _chips() -> Mapping[str, tuple[int, Chip]]:
    """The SM version and the chip of every data sheet, by name."""
    found = {}
    for line in _SHEETS.strip().splitlines():
        name, *numbers = line.split()
        found[name] = int(numbers[0]), _chip(name, int(numbers[0]), int(numbers[1]), *map(float, numbers[2:]))
    return found


def _chip(name: str, sm: int, processors: int, clock: float, memory: float) -> Chip:
    products, plain = _PER_CYCLE[sm]
    halved = _HALVED.match(name) is not None
    chip = Chip(
        processors,
        tensor=processors * clock * products / (2e3 if halved else 1e3),
        plain=processors * clock * plain / 1e3,
        memory=MEMORY_REACHED * memory,
        clock=clock,
        ratios=_HALF_RATE if halved else {},
    )
    return replace(chip, **_ASYNCHRONOUS.get(sm, {}))


def chip_on(sm: int, name: str, processors: int, memory: float, clock: float) -> Chip:
    """The chip of a GPU: its data sheet, or one of its SM version of that size.

    Args:
        sm: a known SM version.
        name: as CUDA reports it.
        processors, memory, clock: see `Chip.scaled`; 0: unknown.
    """
    known, typical = chip_named(name, sm), typical_chip(sm)
    if known is not None and known.processors == processors:
        return known
    return typical.scaled(processors, memory, clock) if processors and memory and clock else typical


def kernels_us(chip: Chip, count: int) -> float:
    """The time of two or three kernels that read each other's results, without their own work, in microseconds."""
    return count * chip.launch + HANDOVER_US[count]


def typical_chip(sm: int) -> Chip:
    """The chip that stands for a known SM version."""
    return _chips()[TYPICAL[sm]][1]


def chip_named(name: str, sm: int | None = None) -> Chip | None:
    """The chip of a GPU with this name, as CUDA reports it or as people write it; None: no data sheet of it is known,
    or of another SM version than `sm`. A GPU of laptops has the name of another one, but not its chip."""
    given = _MAKERS.sub("", name.lower())
    for known in sorted(_chips(), key=len, reverse=True):
        if given.startswith(known) and _SAME_CHIP.fullmatch(given, len(known)):
            found, chip = _chips()[known]
            return chip if sm in (None, found) else None
    return None
