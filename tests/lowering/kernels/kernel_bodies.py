"""Bodies of kernels, written down in short, and what ATen makes of them.

x: H[37, 50]                                    an input; H is the dtype of the test
y: H[37, 19] = mm.default(self=x, mat2=w)       a call of an ATen overload, or of one that starts with torch_rtx.
return y
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import begin, run
from tests.helpers.splits import split_in
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph, TensorType, attr_values, evaluate, verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import Form, forms, generate
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.strided import copy_strided
from torch_rtx.tactics import OWN, Tactic
from torch_rtx.targets import arch_of

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


FLOATS = r"\b(b?f16|f32|f8e4m3fn|f8e5m2)\b"


def body(text: str, dtype: str = "f16") -> Graph:
    """The graph that `text` describes."""
    lines = []
    for line in text.replace("H[", f"{dtype}[").strip().splitlines():
        if " = " in line and not line.strip().startswith("dim "):
            line = line.replace(" = ", " = op aten.").replace("op aten.torch_rtx.", "op torch_rtx.")
        elif ":" in line:
            line = f"input {line.strip()}"
        elif line.strip().startswith("return"):
            line = f"return [{line.strip().removeprefix('return').strip()}]"
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
    inputs = [random_tensor(value.type, sizes) for value in graph.inputs]
    eager = compile_graph(graph, torch.device("cpu"))([one.clone() for one in inputs], ())
    wide = parse(re.sub(FLOATS, "f64", str(graph)))
    exact = compile_graph(wide, torch.device("cpu"))(
        [one.to(torch.float64 if one.is_floating_point() else one.dtype, copy=True) for one in inputs], ()
    )
    outputs = [empty(value.type, sizes) for value in attr_values(graph.outputs)]
    begin(graph, inputs, outputs)
    run(kernel, [*inputs, *outputs], sizes)
    assert_right(outputs, eager, exact)
    return kernel


def _sized(type_: Any, sizes: Mapping[str, int]) -> tuple[torch.dtype, list[int], list[int]]:
    assert isinstance(type_, TensorType)
    shape, strides = ([evaluate(dim, sizes) for dim in dims] for dims in (type_.shape, type_.strides))
    return DTYPES[type_.dtype], shape, strides


def random_tensor(type_: Any, sizes: Mapping[str, int]) -> torch.Tensor:
    """A tensor of a type of the IR, with numbers for its symbols."""
    dtype, shape, strides = _sized(type_, sizes)
    ranges = {torch.bool: (0, 2), torch.int8: (-128, 128), torch.int32: (-(2**31), 2**31)}  # words of packed values
    values = torch.randn(shape) if dtype.is_floating_point else torch.randint(*ranges.get(dtype, (0, 7)), shape)
    return copy_strided(values.to(dtype), strides)


def empty(type_: Any, sizes: Mapping[str, int]) -> torch.Tensor:
    """Memory for a tensor of a type of the IR, that holds NaN."""
    dtype, shape, strides = _sized(type_, sizes)
    found = torch.empty_strided(shape, strides, dtype=dtype)
    return found.fill_(math.nan if dtype.is_floating_point else 1)


def check_split(text: str, parts: int, dtype: str = "f16", dims: Mapping[str, int] | None = None) -> Graph:
    """As `check`, of the split form of a body: its two kernels interpreted, and its calls; returns it."""
    graph = body(text, dtype)
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, dims or {}) for value in graph.inputs]
    exact = parse(re.sub(FLOATS, "f64", str(graph)))
    return check_split_graph(graph, exact, parts, inputs, dims or {})


def check_split_graph(
    graph: Graph, exact: Graph, parts: int, inputs: list[torch.Tensor], sizes: Mapping[str, int]
) -> Graph:
    """As `check_split`; `exact` is the body in f64."""
    form = split_in(graph, "body", parts)
    verify(form, ALLOWED)
    assert (form.inputs, form.outputs) == (graph.inputs, graph.outputs)
    assert parse(str(form)) == form
    cpu = torch.device("cpu")
    eager = compile_graph(graph, cpu)(inputs, ())
    wide = compile_graph(exact, cpu)([one.double() if one.is_floating_point() else one for one in inputs], ())
    values = {value.name: tensor for value, tensor in zip(graph.inputs, inputs, strict=True)}
    for node in form.nodes:
        assert node.body is not None
        kernel = generate(node.body, node.op, arch_of(80), 0)
        assert kernel is not None
        made = {value.name: empty(value.type, sizes) for value in node.outputs if value is not None}
        run(kernel, [*(values[value.name] for value in node.inputs), *made.values()], dict(sizes))
        values |= made
    assert_right([values[value.name] for value in attr_values(form.outputs)], eager, wide)
    assert_right(compile_graph(form, cpu)(inputs, ()), eager, wide)
    return form


# ---- tactics ---------------------------------------------------------------------------------------------------------


def offered(graph: Graph, sm: int, name: str = "k") -> dict[str, Tactic[Kernel]]:
    """The first tactic of each kind for a body on SM version `sm`, the one expected to be fastest first."""
    heads = [head for head, _ in forms(graph, name, arch_of(sm))]
    assert [head.expected_us for head in heads] == sorted(head.expected_us for head in heads)
    assert [head.kind for head in heads if OWN in head.kernels] in (["kernel"], [])
    found: dict[str, Tactic[Kernel]] = {}
    for head in heads:
        found.setdefault(head.kind, head)
    return found


def split(graph: Graph, name: str, sm: int) -> Graph | None:
    """The split form of a body where it is expected to be faster than the body's own kernel; None where it is not, and
    where no kernel computes the body."""
    try:
        found = offered(graph, sm, name)
    except Unsupported:
        return None
    if "split" not in found or found["split"].expected_us > found["kernel"].expected_us:
        return None
    assert found["split"].body is not None
    return found["split"].body


def library(graph: Graph, sm: int) -> str:
    """What the library call in a body is expected to be against its kernel: "slower", "faster", or "none" if there is
    none."""
    found = offered(graph, sm)
    if "library" not in found:
        return "none"
    assert (found["library"].body, found["library"].kernels) == (None, {})  # the calls of the body itself
    return "faster" if found["library"].expected_us < found["kernel"].expected_us else "slower"


def whole(kernels: Iterable[Kernel]) -> Form:
    """The form of a node that is launched whole, by kernels that stand for its configurations."""
    found = (Tactic("kernel", 0.0, {OWN: kernel}) for kernel in kernels)
    return next(found), found
