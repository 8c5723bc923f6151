"""What is said of the elements of tensors holds for all that are computed."""

from __future__ import annotations

import math

import pytest
import torch

from tests.lowering.test_passes import graph
from torch_rtx.lowering.ranges import ANY, Range, Ranges
from torch_rtx.runtime.code import compile_graph

PROGRAM = """
input x: f32[1, 2, 6, 6]
input y: i8[1, 2, 6, 6]
input z: i32[()]
a: f32[1, 2, 6, 6] = op aten.round.default(self=x)
b: f32[1, 2, 6, 6] = op aten.clamp.default(self=a, min=-9, max=7)
c: f32[1, 2, 6, 6] = op aten.clamp.default(self=x, min=-1.5, max=2.5)
d: f32[1, 2, 6, 6] = op aten.floor.default(self=c)
e: f32[1, 2, 6, 6] = op aten.ceil.default(self=c)
f: f32[1, 2, 6, 6] = op aten.add.Tensor(self=b, other=z)
g: f32[1, 2, 6, 6] = op aten.sub.Tensor(self=b, other=d)
h: f32[1, 2, 6, 6] = op aten.neg.default(self=g)
i: f32[1, 2, 6, 6] = op aten.relu.default(self=h)
j: i32[1, 2, 6, 6] = op aten._to_copy.default(self=y, dtype='i32')
k: i32[1, 2, 6, 6] = op aten.sub.Tensor(self=j, other=100)
l: i8[1, 2, 6, 6] = op aten._to_copy.default(self=k, dtype='i8')
m: i8[1, 2, 6, 6] = op aten._to_copy.default(self=c, dtype='i8')
n: f16[1, 2, 6, 6] = op aten._to_copy.default(self=k, dtype='f16')
o: bf16[1, 2, 6, 6] = op aten._to_copy.default(self=c, dtype='bf16')
p: f32[1, 2, 3, 3], q: i64[1, 2, 3, 3] = op aten.max_pool2d_with_indices.default(self=b, kernel_size=[2, 2])
r: f32[1, 4, 6, 6] = op aten.cat.default(tensors=[b, e], dim=1)
s: f32[2, 36] = op aten.view.default(self=b, size=[2, 36])
t: f32[()] = op aten.full.default(size=[], fill_value=4.0, dtype='f32', device='main')
u: f32[1, 2, 6, 6] = op aten.minimum.default(self=b, other=t)
v: f32[1, 2, 6, 6] = op aten.maximum.default(self=x, other=t)
w: f32[1, 2, 6, 6] = op aten.clamp_min.default(self=b, min=3.5)
return [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w]
"""


@pytest.mark.quick
def test_ranges_hold():
    program = graph(PROGRAM)
    ranges = Ranges(program)
    torch.manual_seed(0)
    given = [torch.randn(1, 2, 6, 6) * 8, torch.randint(-128, 128, (1, 2, 6, 6), dtype=torch.int8), torch.tensor(5)]
    given[2] = given[2].int()
    results = compile_graph(program, torch.device("cpu"))(given, [])
    found = {}
    for value, result in zip(program.outputs, results, strict=True):
        found[value.name] = low, high, whole = ranges.of(value)
        exact = result.double()
        assert low <= exact.min(), value.name
        assert exact.max() <= high, value.name
        assert not whole or torch.equal(exact.round(), exact), value.name
    assert found["b"] == Range(-9, 7, True)
    assert found["g"] == Range(-12, 9, True)
    assert found["i"] == Range(0, 12, True)
    assert found["k"] == found["n"] == Range(-228, 27, True)
    assert found["l"] == Range(-128, 127, True)
    assert found["p"] == found["s"] == found["b"]
    assert found["r"] == Range(-9, 7, True)
    assert found["u"] == Range(-9, 4, True)
    assert found["v"] == Range(4, math.inf, False)
    assert found["w"] == Range(3.5, 7, False)
    assert ranges.of(program.inputs[0]) == ANY


def test_long_chains_are_followed_to_some_depth():
    """As residual sums of a model with very many layers are."""
    lines = [f"v{i + 1}: f32[2] = op aten.add.Tensor(self=v{i}, other=1)" for i in range(3000)]
    program = graph("\n".join(["input v0: f32[2]", *lines, "return [v3000]"]))
    assert Ranges(program).of(program.outputs[0]) == ANY
