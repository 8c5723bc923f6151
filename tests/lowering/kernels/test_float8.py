"""float8 in kernels: casts have the bits of PyTorch's own, on targets with the dtypes and on others."""

from __future__ import annotations

import math

import pytest
import torch

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import DTYPES, body, random_tensor
from torch_rtx.dtypes import DTYPES as ROWS
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import arch_of

FLOAT8 = ("f8e4m3fn", "f8e5m2")
SATURATES = torch.tensor(1e3).to(torch.float8_e4m3fn).float() == 448
TARGETS = (80, 90)  # without float8, and with it


def called(text: str, sm: int, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The results of the kernel of a body for an SM version."""
    graph = body(text)
    kernel = generate(graph, "kernel", arch_of(sm), 0)
    assert kernel is not None
    has = "u8" if sm < 89 else None
    types = [value.type for value in (*graph.inputs, *graph.outputs)]
    assert kernel.pointers == tuple(has if has and one.dtype in FLOAT8 else one.dtype for one in types)
    outputs = [torch.full(value.type.shape, 1, dtype=DTYPES[value.type.dtype]) for value in graph.outputs]
    run(kernel, [*inputs, *outputs])
    return outputs


def same(found: torch.Tensor, right: torch.Tensor) -> bool:
    """The same bits, but for those of NaN."""
    nan = right.float().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[right.itemsize]
    equal = torch.equal(found.view(bits)[~nan], right.view(bits)[~nan])
    return equal and torch.equal(found.float().isnan(), nan)


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """What PyTorch 2.12 and later round `x` to: before, e4m3 had NaN beyond its range."""
    most = 448 if name == "f8e4m3fn" else math.inf
    found = x.float().clamp(-most, most).to(DTYPES[name])
    assert not SATURATES or same(found, x.to(DTYPES[name]))
    return found


def numbers(dtype: str) -> torch.Tensor:
    """Numbers of a dtype where rounding to float8 could go wrong: all of f16, many others, and borders of float8."""
    if dtype == "f16":
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    found = [torch.randn(512, dtype=torch.float64) * 2.0**power for power in range(-20, 20, 4)]
    for name in FLOAT8:
        every = torch.arange(128, dtype=torch.uint8).view(DTYPES[name]).double()
        every = every[every.isfinite()]
        middle = torch.cat([(every[1:] + every[:-1]) / 2, every, every[-1:] * 15 / 14, every[-1:] * 29 / 28])
        found += [sign * middle * (1 + step) for sign in (1, -1) for step in (0, 2**-23, -(2**-23), 2**-40)]
    ends = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38, -3e38, 464.0, 464.0001, 480.0, 61439.9, 61440.0]
    return torch.cat([*found, torch.tensor(ends, dtype=torch.float64)]).to(DTYPES[dtype])


@pytest.mark.quick
@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("wide", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", FLOAT8)
def test_casts(name: str, wide: str, sm: int) -> None:
    every = torch.arange(256).to(torch.uint8).view(DTYPES[name])
    (found,) = called(f"x: {name}[256]\ny: {wide}[256] = _to_copy.default(self=x, dtype='{wide}')\nreturn y", sm, every)
    assert same(found, every.to(DTYPES[wide]))
    x = numbers(wide)
    text = f"x: {wide}[{len(x)}]\ny: {name}[{len(x)}] = _to_copy.default(self=x, dtype='{name}')\nreturn y"
    (found,) = called(text, sm, x)
    assert same(found, rounded(x, name))


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("name", FLOAT8)
def test_numbers_that_are_rounded_and_used_further(name: str, sm: int) -> None:
    x = numbers("f32")
    text = f"""
x: f32[{len(x)}]
q: {name}[{len(x)}] = _to_copy.default(self=x, dtype='{name}')
y: f32[{len(x)}] = _to_copy.default(self=q, dtype='f32')
z: f32[{len(x)}] = mul.Scalar(self=y, other=3)
return q, y, z
"""
    found = called(text, sm, x)
    right = rounded(x, name)
    assert all(map(same, found, (right, right.float(), right.float() * 3)))


@pytest.mark.parametrize("name", FLOAT8)
def test_numbers_of_a_program(name: str) -> None:
    packing = ROWS[name].packing
    assert packing is not None
    x = numbers("f32")[::29]
    nearest = torch.tensor([packing.nearest(float(one)) for one in x])
    assert same(nearest, rounded(x, name).float())


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("name", FLOAT8)
def test_what_is_only_moved_keeps_its_bits(name: str, sm: int) -> None:
    every = torch.arange(256).to(torch.uint8).view(DTYPES[name]).view(16, 16)
    turned = f"t: {name}[16, 16](1, 16) = t.default(self=x)\ny: {name}[16, 16] = clone.default(self=t)"
    joined = f"y: {name}[16, 32] = cat.default(tensors=[x, x], dim=1)"
    for call, right in ((turned, every.t().contiguous()), (joined, torch.cat([every, every], 1))):
        (found,) = called(f"x: {name}[16, 16]\n{call}\nreturn y", sm, every)
        assert same(found, right)


QUANTIZED = """
x: f16[20, 100]
b: f16[20, 100] = abs.default(self=x)
m: f16[20, 1] = amax.default(self=b, dim=[-1], keepdim=True)
f: f32[20, 1] = _to_copy.default(self=m, dtype='f32')
s: f32[20, 1] = div.Scalar(self=f, other=448.0)
w: f32[20, 100] = _to_copy.default(self=x, dtype='f32')
d: f32[20, 100] = div.Tensor(self=w, other=s)
l: f32[20, 100] = clamp.default(self=d, min=-448.0, max=448.0)
q: f8e4m3fn[20, 100] = _to_copy.default(self=l, dtype='f8e4m3fn')
return q, s
"""


@pytest.mark.parametrize("sm", TARGETS)
def test_quantization_of_rows(sm: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 100, dtype=torch.float16)
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    found, scales = called(QUANTIZED, sm, x)
    assert torch.equal(scales, scale)
    assert same(found, (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn))


CALLS = {
    "to integers": """
x: f8e5m2[64]
y: i32[64] = _to_copy.default(self=x, dtype='i32')
z: bool[64] = _to_copy.default(self=x, dtype='bool')
return y, z
""",
    "from integers": """
x: i8[64]
y: f8e5m2[64] = _to_copy.default(self=x, dtype='f8e5m2')
return y
""",
    "a number": """
x: f32[64]
z: f8e4m3fn[64] = full_like.default(self=x, fill_value=0.3, dtype='f8e4m3fn')
f: f32[64] = _to_copy.default(self=z, dtype='f32')
y: f32[64] = add.Tensor(self=x, other=f)
return y, z
""",
    "a comparison": """
x: f8e4m3fn[64]
y: f8e4m3fn[64]
z: bool[64] = eq.Tensor(self=x, other=y)
return z
""",
    "a result for each row": """
x: f32[64, 100]
m: f32[64, 1] = amax.default(self=x, dim=[-1], keepdim=True)
z: f8e4m3fn[64, 1] = _to_copy.default(self=m, dtype='f8e4m3fn')
return z
""",
}


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_other_calls(name: str, sm: int) -> None:
    torch.manual_seed(0)
    graph = body(CALLS[name])
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    eager = compile_graph(graph, torch.device("cpu"))(inputs, ())
    for mine, right in zip(called(CALLS[name], sm, *inputs), eager, strict=True):
        assert same(mine, right) if mine.is_floating_point() else torch.equal(mine, right)


@pytest.mark.parametrize(
    ("least", "most", "left"), [(-448, 448, 0), (-500.0, 460.0, 0), (-400.0, 448, 1), (448, -448, 2)]
)
def test_limits_that_a_conversion_has_itself_are_left_out(least: float, most: float, left: int) -> None:
    text = f"""
    x: f32[2600]
    c: f32[2600] = clamp.default(self=x, min={least}, max={most})
    y: f8e4m3fn[2600] = _to_copy.default(self=c, dtype='f8e4m3fn')
    return y
    """
    kernel = generate(body(text), "kernel", arch_of(90), 0)
    assert kernel is not None
    assert kernel.source.count("tl.where") == left
    x = numbers("f32")[:2600].float()
    x[:6] = torch.tensor([math.nan, math.inf, -math.inf, 449.0, -1e30, -0.0])
    assert same(called(text, 90, x)[0], rounded(x.clamp(least, most), "f8e4m3fn"))


@pytest.mark.parametrize(("least", "shared"), [(1e-30, True), (1e-38, False), (0, False)])
def test_numbers_of_a_row_are_multiplied_by_the_reciprocal_of_a_divisor(least: float, shared: bool) -> None:
    text = f"""
    x: f32[7, 60]
    d: f32[7, 1]
    c: f32[7, 1] = clamp.default(self=d, min={least})
    y: f32[7, 60] = div.Tensor(self=x, other=c)
    return y
    """
    kernel = generate(body(text), "kernel", arch_of(90), 0)
    assert kernel is not None
    assert ("1.0 / " in kernel.source) == shared
    x, d = torch.randn(7, 60), torch.rand(7, 1)
    x[0, :3], d[1:5, 0] = torch.tensor([math.nan, math.inf, 0]), torch.tensor([0, math.inf, math.nan, 1e-39])
    torch.testing.assert_close(called(text, 90, x, d)[0], x / d.clamp(least), equal_nan=True)
