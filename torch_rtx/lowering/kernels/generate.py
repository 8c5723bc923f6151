"""The kernel of a region, in its best configurations first; and what rival a library call is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.attention import attention_configs, attention_kernel
from torch_rtx.lowering.kernels.conv import conv_configs, conv_kernel
from torch_rtx.lowering.kernels.gemm import gemm_configs, gemm_kernel
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import ANCHORS, Region, region

# Per kind of anchor ("" for loops): the configurations for an SM version, best first, and the kernel in one of them.
Family = tuple[Callable[[Region, int], Sequence[Any]], Callable[[Region, str, Any], Kernel]]
FAMILIES: Mapping[str, Family] = {
    "": (lambda found, sm: loop_configs(found), loop_kernel),
    "attention": (attention_configs, attention_kernel),
    "conv": (conv_configs, conv_kernel),
    "gemm": (gemm_configs, gemm_kernel),
}


def generate(body: Graph, name: str, sm: int, which: int) -> Kernel | None:
    """The kernel that computes `body` on SM version `sm` (89), in its configuration number `which`; None if there are
    fewer.

    Raises:
        Unsupported: no kernel computes this.
    """
    found, configs = _prepared(body, sm)
    return FAMILIES[family(found)][1](found, name, configs[which]) if which < len(configs) else None


@lru_cache(maxsize=1024)  # asked for once per configuration, and for equal regions of many layers
def _prepared(body: Graph, sm: int) -> tuple[Region, Sequence[Any]]:
    found = region(body)
    return found, FAMILIES[family(found)][0](found, sm)


def family(found: Region) -> str:
    """The kind of a region's anchor, "" for a loop."""
    return "" if found.anchor is None else ANCHORS[found.anchor.op]


def library(body: Graph, sm: int) -> str:
    """What the library call in `body` is expected to be on SM version `sm` against its kernel: "slower", "faster", or
    "none" if there is none."""
    return "none" if region(body).anchor is None else "faster"
