"""The kernel of a region, in its best configurations first."""

from __future__ import annotations

from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.attention import attention_configs, attention_kernel
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import ANCHORS, region


def generate(body: Graph, name: str, sm: int, which: int) -> Kernel | None:
    """The kernel that computes `body` on SM version `sm` (89), in its configuration number `which`; None if there are
    fewer.

    Raises:
        Unsupported: no kernel computes this.
    """
    found = region(body)
    if found.anchor is not None and ANCHORS[found.anchor.op] == "attention":
        cuts = attention_configs(found, sm)
        return attention_kernel(found, name, cuts[which]) if which < len(cuts) else None
    configs = loop_configs(found)
    return loop_kernel(found, name, configs[which]) if which < len(configs) else None


def library(body: Graph, sm: int) -> str:
    """What the library call in `body` is expected to be on SM version `sm` against its kernel: "slower", "faster", or
    "none" if there is none."""
    return "none" if region(body).anchor is None else "faster"
