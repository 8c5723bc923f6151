"""Bodies of kernels, written down in short, and what ATen makes of them.

x: H[37, 50]                                    an input; H is the dtype of the test
y: H[37, 19] = mm.default(self=x, mat2=w)       a call of an ATen overload
return y
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.numerics import assert_right
from tests.interpreter import run
from torch_rtx.ir import Graph, TensorType, attr_values, evaluate, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.runtime.reference import compile_graph, copy_strided

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i8": torch.int8,
    "bool": torch.bool,
}


def body(text: str, dtype: str = "f16") -> Graph:
    """The graph that `text` describes."""
    lines = []
    for line in text.replace("H[", f"{dtype}[").strip().splitlines():
        if " = " in line and not line.strip().startswith("dim "):
            line = line.replace(" = ", " = op aten.")
        elif ":" in line:
            line = f"input {line.strip()}"
        elif line.strip().startswith("return "):
            line = f"return [{line.strip().removeprefix('return ')}]"
        lines.append(line)
    graph = parse("\n".join(["graph import {", *lines, "}"]))
    verify(graph)
    return graph


def check(
    text: str,
    make: Callable[[Region, str, Any], Kernel],
    config: Any,
    dtype: str = "f16",
    dims: Mapping[str, int] | None = None,
) -> Kernel:
    """Interprets the kernel and compares every output by the float64 criterion; returns it."""
    sizes = dict(dims or {})
    graph = body(text, dtype)
    kernel = make(region(graph), "kernel", config)
    torch.manual_seed(0)
    inputs = [_random(value.type, sizes) for value in graph.inputs]
    eager = compile_graph(graph, torch.device("cpu"))(inputs, ())
    wide = parse(re.sub(r"\b(b?f16|f32)\b", "f64", str(graph)))
    exact = compile_graph(wide, torch.device("cpu"))(
        [one.double() if one.is_floating_point() else one for one in inputs], ()
    )
    outputs = [_empty(value.type, sizes) for value in attr_values(graph.outputs)]
    run(kernel, [*inputs, *outputs], sizes)
    assert_right(outputs, eager, exact)
    return kernel


def _sized(type_: Any, sizes: Mapping[str, int]) -> tuple[torch.dtype, list[int], list[int]]:
    assert isinstance(type_, TensorType)
    shape, strides = ([evaluate(dim, sizes) for dim in dims] for dims in (type_.shape, type_.strides))
    return DTYPES[type_.dtype], shape, strides


def _random(type_: Any, sizes: Mapping[str, int]) -> torch.Tensor:
    dtype, shape, strides = _sized(type_, sizes)
    values = torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2 if dtype == torch.bool else 7, shape)
    return copy_strided(values.to(dtype), strides)


def _empty(type_: Any, sizes: Mapping[str, int]) -> torch.Tensor:
    dtype, shape, strides = _sized(type_, sizes)
    found = torch.empty_strided(shape, strides, dtype=dtype)
    return found.fill_(math.nan if dtype.is_floating_point else 1)
