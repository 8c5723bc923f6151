"""Profiles of made-up numbers."""

from __future__ import annotations

from torch_rtx.ir import Loc
from torch_rtx.runtime.node_cost import Cost
from torch_rtx.runtime.profiling import Profile, Row


def made(times: list[tuple[float, ...]], modules: list[str], inputs: list[tuple[int, ...]] | None = None) -> Profile:
    """A profile of made-up numbers."""
    total = sum(sorted(t)[len(t) // 2] for t in times)
    rows = [
        Row(
            f"v{index}",
            "extern",
            "aten.exp.default",
            "library call",
            "calls",
            ("exp",),
            (Loc(module, "model.py", index),),
            spent,
            sorted(spent)[len(spent) // 2] / total,
            Cost(1000, 3000, 0),
            () if inputs is None else inputs[index],
        )
        for index, (spent, module) in enumerate(zip(times, modules, strict=True))
    ]
    return Profile(tuple(rows), "the CPU", 100.0, 90.0, False)
