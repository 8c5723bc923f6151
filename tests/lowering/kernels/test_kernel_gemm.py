"""Kernels around a matrix product, in Triton's interpreter against ATen."""

from __future__ import annotations

from dataclasses import replace

import pytest
from expecttest import TestCase

from tests.lowering.kernels.kernel_bodies import body, check, library, offered
from torch_rtx.chips import LIBRARY
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.families.gemm import GemmConfig, gemm_configs, gemm_contraction, gemm_kernel
from torch_rtx.lowering.kernels.gemm_perf_model import best_num_splits, gemm_us, shared_memory
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.region import region
from torch_rtx.targets import ARCHES, Arch, Float32, arch_of

SMALL = GemmConfig(32, 32, 32, group_m=2)
WIDE = GemmConfig(64, 32, 64)
GEMV = GemmConfig(16, 16, 64, gemv=True)
EXTRA = GemmConfig(32, 32, 32, extra_n=16)
DTYPES = ("f16", "bf16", "f32")

MM = """
x: H[37, 50]
w: H[50, 19]
y: H[37, 19] = mm.default(self=x, mat2=w)
return y
"""
LINEAR = """
x: H[2, 20, 96]
w: H[40, 96]
b: H[40]
y: H[2, 20, 40] = linear.default(input=x, weight=w, bias=b)
return y
"""
CALLS = {
    "mm": MM,
    "linear": LINEAR,
    "one tile in each direction, one step": """
x: H[32, 32]
w: H[32, 32]
y: H[32, 32] = mm.default(self=x, mat2=w)
return y
""",
    "columns in order, many groups of rows": """
x: H[130, 32]
w: H[70, 32]
y: H[130, 70] = linear.default(input=x, weight=w)
return y
""",
    "transposed operands": """
x: H[40, 33](1, 40)
w: H[33, 20](1, 33)
y: H[40, 20](1, 40) = mm.default(self=x, mat2=w)
return y
""",
    "views of operands": """
x: H[33, 40]
w: H[24, 66]
a: H[40, 33](1, 40) = t.default(self=x)
c: H[24, 33](66, 1) = slice.Tensor(self=w, dim=1, start=33, end=66)
d: H[33, 24](1, 66) = t.default(self=c)
y: H[40, 24] = mm.default(self=a, mat2=d)
return y
""",
    "heads before a projection": """
x: H[2, 4, 10, 16]
w: H[24, 64]
t: H[2, 10, 4, 16](640, 16, 160, 1) = transpose.int(self=x, dim0=1, dim1=2)
h: H[2, 10, 4, 16] = clone.default(self=t)
v: H[2, 10, 64] = _unsafe_view.default(self=h, size=[2, 10, 64])
y: H[2, 10, 24] = linear.default(input=v, weight=w)
return y
""",
    "addmm with factors": """
b: H[19]
x: H[37, 50]
w: H[50, 19]
y: H[37, 19] = addmm.default(self=b, mat1=x, mat2=w, beta=0.5, alpha=2)
return y
""",
    "addmm without what is added": """
b: H[1, 19]
x: H[37, 50]
w: H[50, 19]
y: H[37, 19] = addmm.default(self=b, mat1=x, mat2=w, beta=0)
return y
""",
    "bmm": """
x: H[3, 20, 33]
w: H[3, 33, 40]
y: H[3, 20, 40] = bmm.default(self=x, mat2=w)
return y
""",
    "bmm of one batch for all": """
x: H[3, 20, 33]
w: H[3, 33, 40](0, 40, 1)
y: H[3, 20, 40] = bmm.default(self=x, mat2=w)
return y
""",
    "baddbmm": """
b: H[3, 1, 40]
x: H[3, 20, 33]
w: H[3, 33, 40]
y: H[3, 20, 40] = baddbmm.default(self=b, batch1=x, batch2=w, alpha=0.125)
return y
""",
    "matmul, broadcast": """
x: H[2, 1, 20, 33]
w: H[3, 33, 40]
y: H[2, 3, 20, 40] = matmul.default(self=x, other=w)
return y
""",
    "matmul by a matrix": """
x: H[2, 3, 20, 33]
w: H[33, 40]
y: H[2, 3, 20, 40] = matmul.default(self=x, other=w)
return y
""",
    "a vector times a matrix": """
x: H[64]
w: H[40, 64]
y: H[40] = linear.default(input=x, weight=w)
return y
""",
    "attention scores": """
q: H[2, 3, 20, 16](960, 16, 48, 1)
k: H[2, 3, 20, 16](960, 16, 48, 1)
m: bool[20, 20]
t: H[2, 3, 16, 20](960, 16, 1, 48) = transpose.int(self=k, dim0=-2, dim1=-1)
s: H[2, 3, 20, 20] = matmul.default(self=q, other=t)
c: H[2, 3, 20, 20] = mul.Scalar(self=s, other=0.25)
y: H[2, 3, 20, 20] = masked_fill.Scalar(self=c, mask=m, value=-100.0)
return y
""",
}
EPILOGUES = {
    "bias and gelu": """
x: H[40, 64]
w: H[48, 64]
b: H[48]
h: H[40, 48] = linear.default(input=x, weight=w, bias=b)
y: H[40, 48] = gelu.default(self=h)
return y
""",
    "residual and relu": """
x: H[2, 20, 64]
w: H[48, 64]
r: H[2, 20, 48]
h: H[2, 20, 48] = linear.default(input=x, weight=w)
a: H[2, 20, 48] = add.Tensor(self=h, other=r)
y: H[2, 20, 48] = relu.default(self=a)
return y
""",
    "scale and cast": """
x: H[40, 64]
w: H[64, 48]
c: f32[48]
h: H[40, 48] = mm.default(self=x, mat2=w)
f: f32[40, 48] = _to_copy.default(self=h, dtype='f32')
y: f32[40, 48] = mul.Tensor(self=f, other=c)
return y
""",
    "two outputs": """
x: H[40, 64]
w: H[64, 48]
h: H[40, 48] = mm.default(self=x, mat2=w)
y: H[40, 48] = sigmoid.default(self=h)
return h, y
""",
    "rows in another shape": """
x: H[40, 64]
w: H[64, 48]
r: H[4, 10, 48]
h: H[40, 48] = mm.default(self=x, mat2=w)
v: H[4, 10, 48] = view.default(self=h, size=[4, 10, 48])
y: H[4, 10, 48] = add.Tensor(self=v, other=r)
return h, y
""",
    "columns as heads, dimensions in another order": """
x: H[2, 10, 64]
w: H[48, 64]
h: H[2, 10, 48] = linear.default(input=x, weight=w)
v: H[2, 10, 3, 16] = view.default(self=h, size=[2, 10, 3, 16])
t: H[2, 3, 10, 16](480, 16, 48, 1) = transpose.int(self=v, dim0=1, dim1=2)
y: H[2, 3, 10, 16] = mul.Scalar(self=t, other=0.25)
return y
""",
    "heads side by side": """
x: H[2, 3, 10, 16]
w: H[2, 3, 16, 8]
h: H[2, 3, 10, 8] = matmul.default(self=x, other=w)
t: H[2, 10, 3, 8](240, 8, 80, 1) = transpose.int(self=h, dim0=1, dim1=2)
c: H[2, 10, 3, 8] = clone.default(self=t)
y: H[2, 10, 24] = view.default(self=c, size=[2, 10, 24])
return y
""",
    "a slice in one dimension": """
x: H[8, 64]
w: H[64, 48]
h: H[8, 48] = mm.default(self=x, mat2=w)
s: H[8, 16](48, 1) = slice.Tensor(self=h, dim=1, start=24, end=40)
c: H[8, 16] = clone.default(self=s)
y: H[128] = view.default(self=c, size=[128])
return y
""",
    "an operand that is one number": """
o: H[1, 1]
w: H[64, 48]
x: H[40, 64](0, 0) = expand.default(self=o, size=[40, 64])
h: H[40, 48] = mm.default(self=x, mat2=w)
return h
""",
    "a slice": """
x: H[40, 64]
w: H[64, 48]
h: H[40, 48] = mm.default(self=x, mat2=w)
s: H[40, 16](48, 1) = slice.Tensor(self=h, dim=1, start=24, end=40)
y: H[40, 16] = relu.default(self=s)
return y
""",
}
GATED = {
    "two halves": """
x: H[2, 10, 64]
w: H[48, 64]
b: H[48]
h: H[2, 10, 48] = linear.default(input=x, weight=w, bias=b)
a: H[2, 10, 24](480, 48, 1), u: H[2, 10, 24](480, 48, 1) = split.Tensor(self=h, split_size=24, dim=-1)
s: H[2, 10, 24] = silu.default(self=a)
y: H[2, 10, 24] = mul.Tensor(self=s, other=u)
return y
""",
    "every other column": """
x: H[20, 64]
w: H[48, 64]
h: H[20, 48] = linear.default(input=x, weight=w)
a: H[20, 24](48, 2) = slice.Tensor(self=h, dim=1, start=0, end=48, step=2)
u: H[20, 24](48, 2) = slice.Tensor(self=h, dim=1, start=1, end=48, step=2)
s: H[20, 24] = gelu.default(self=a)
y: H[20, 24] = mul.Tensor(self=s, other=u)
return y
""",
    "three outputs": """
x: H[20, 64]
w: H[72, 64]
h: H[20, 72] = linear.default(input=x, weight=w)
q: H[20, 24](72, 1), k: H[20, 24](72, 1), v: H[20, 24](72, 1) = split.Tensor(self=h, split_size=24, dim=1)
a: H[20, 24] = relu.default(self=q)
c: H[2, 10, 24](720, 72, 1) = view.default(self=k, size=[2, 10, 24])
d: H[20, 24] = neg.default(self=v)
return a, c, d
""",
}
PROLOGUES = {
    "a norm that is applied": """
x: H[40, 70]
m: f32[40, 1]
g: H[70]
w: H[48, 70]
f: f32[40, 70] = _to_copy.default(self=x, dtype='f32')
n: f32[40, 70] = mul.Tensor(self=f, other=m)
c: H[40, 70] = _to_copy.default(self=n, dtype=TYPE)
a: H[40, 70] = mul.Tensor(self=c, other=g)
y: H[40, 48] = linear.default(input=a, weight=w)
return y
""",
    "weights in 8 bits": """
x: H[40, 64]
q: i8[48, 64]
s: H[48, 1]
f: H[48, 64] = _to_copy.default(self=q, dtype=TYPE)
w: H[48, 64] = mul.Tensor(self=f, other=s)
y: H[40, 48] = linear.default(input=x, weight=w)
return y
""",
    "what is infinite beyond the end of K": """
x: H[20, 40]
w: H[24, 40]
e: H[20, 40] = exp.default(self=x)
l: H[20, 40] = reciprocal.default(self=e)
y: H[20, 24] = linear.default(input=l, weight=w)
return y
""",
    "two tensors side by side": """
x: H[20, 24]
z: H[20, 40]
w: H[24, 64]
c: H[20, 64] = cat.default(tensors=[x, z], dim=1)
y: H[20, 24] = linear.default(input=c, weight=w)
return y
""",
    "rows by number": """
i: i64[20]
e: H[7, 64]
w: H[24, 64]
x: H[20, 64] = embedding.default(weight=e, indices=i)
y: H[20, 24] = linear.default(input=x, weight=w)
return y
""",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, dtype: str) -> None:
    check(CALLS[name], gemm_kernel, SMALL, dtype)


@pytest.mark.parametrize("config", [WIDE, EXTRA, GemmConfig(16, 16, 16, programs=3), GemmConfig(128, 16, 128)])
@pytest.mark.parametrize("name", ["mm", "linear", "bmm"])
def test_configurations(name: str, config: GemmConfig) -> None:
    check(CALLS[name], gemm_kernel, config)


@pytest.mark.parametrize("config", [SMALL, EXTRA])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str, config: GemmConfig) -> None:
    check(EPILOGUES[name], gemm_kernel, config)


@pytest.mark.parametrize("extra", [0, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATED)
def test_ranges_of_columns(name: str, dtype: str, extra: int) -> None:
    check(GATED[name], gemm_kernel, GemmConfig(16, 16, 32, extra_n=extra), dtype)


@pytest.mark.parametrize("config", [SMALL, EXTRA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROLOGUES)
def test_prologues(name: str, dtype: str, config: GemmConfig) -> None:
    check(PROLOGUES[name].replace("TYPE", repr(dtype)), gemm_kernel, config, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(rows: int, dtype: str) -> None:
    text = GATED["two halves"].replace("[2, 10,", f"[{rows}, 1,").replace("480", "48")
    check(text, gemm_kernel, GEMV, dtype)
    text = PROLOGUES["a norm that is applied"].replace("40", str(rows)).replace("TYPE", repr(dtype))
    check(text, gemm_kernel, GEMV, dtype)


@pytest.mark.quick
def test_few_rows_of_batches() -> None:
    check(CALLS["matmul, broadcast"].replace("20", "2"), gemm_kernel, GemmConfig(16, 16, 64, gemv=True, programs=5))


SYMBOLIC = """
dim s = 0, LAST, 1
x: H[2, s, 64]
w: H[48, 64]
b: H[24]
r: H[2, s, 24]
h: H[2, s, 48] = linear.default(input=x, weight=w)
a: H[2, s, 24]((s * 48), 48, 1), u: H[2, s, 24]((s * 48), 48, 1) = split.Tensor(self=h, split_size=24, dim=-1)
g: H[2, s, 24] = silu.default(self=a)
m: H[2, s, 24] = mul.Tensor(self=g, other=u)
c: H[2, s, 24] = add.Tensor(self=m, other=b)
y: H[2, s, 24] = add.Tensor(self=c, other=r)
return y
"""
SCORES = """
dim s = 1, 4096, 1
q: H[2, s, 48]
k: H[2, s, 48]
e: H[2, s, 3, 16] = view.default(self=q, size=[2, s, 3, 16])
f: H[2, s, 3, 16] = view.default(self=k, size=[2, s, 3, 16])
a: H[2, 3, s, 16]((s * 48), 16, 48, 1) = transpose.int(self=e, dim0=1, dim1=2)
t: H[2, 3, 16, s]((s * 48), 16, 1, 48) = permute.default(self=f, dims=[0, 2, 3, 1])
p: H[2, 3, s, s] = matmul.default(self=a, other=t)
y: H[2, 3, s, s] = relu.default(self=p)
return y
"""
MIXED = """
dim s = 1, 4096, 1
p: H[2, 3, s, s]
v: H[2, 3, s, 16]
o: H[2, 3, s, 16] = matmul.default(self=p, other=v)
t: H[2, s, 3, 16]((s * 48), 16, (s * 16), 1) = transpose.int(self=o, dim0=1, dim1=2)
y: H[2, s, 3, 16] = clone.default(self=t)
return y
"""


@pytest.mark.parametrize("last", ["4096", "None"])
@pytest.mark.parametrize("size", [0, 1, 9])
def test_symbolic_rows(size: int, last: str) -> None:
    kernel = check(SYMBOLIC.replace("LAST", last), gemm_kernel, GemmConfig(16, 16, 32, group_m=1), dims={"s": size})
    assert kernel.wide == (last == "None")


@pytest.mark.parametrize("text", [SCORES, MIXED])
def test_symbolic_sizes_on_all_sides(text: str) -> None:
    check(text, gemm_kernel, GemmConfig(16, 16, 16, programs=2), dims={"s": 21})


def test_more_than_32_bits() -> None:
    text = MM.replace("[37, 50]", "[37, 50](99999999, 1)")
    assert ".to(tl.int64)" in gemm_kernel(region(body(text)), "kernel", SMALL).source


PARTIALS = """
x: f16[3, 20, 32](32, 96, 1)
w: f16[3, 32, 40](32, 1, 96)
a: f32[3, 20, 32](32, 96, 1) = _to_copy.default(self=x, dtype='f32')
b: f32[3, 32, 40](32, 1, 96) = _to_copy.default(self=w, dtype='f32')
y: f32[3, 20, 40] = bmm.default(self=a, mat2=b)
return y
"""


def test_products_of_halves_in_f32_are_dots_of_halves() -> None:
    kernel = check(PARTIALS, gemm_kernel, SMALL)
    assert "float32)" not in kernel.source.replace("tl.zeros([32, 32], tl.float32)", "")


def test_precision_of_f32() -> None:
    source = gemm_kernel(region(body(MM, "f32")), "kernel", GemmConfig(16, 16, 16, input_precision="tf32")).source
    assert 'input_precision="tf32"' in source
    assert "input_precision" not in gemm_kernel(region(body(MM)), "kernel", SMALL).source


REFUSED = {
    "a matrix product of f64": MM.replace("H[", "f64["),
    "a matrix product of i64": MM.replace("H[", "i64["),
    "a matrix product with a vector": """
x: H[20, 64]
w: H[64]
y: H[20] = matmul.default(self=x, other=w)
return y
""",
    "at another position": """
x: H[20, 64]
w: H[64, 20]
h: H[20, 20] = mm.default(self=x, mat2=w)
t: H[20, 20](1, 20) = t.default(self=h)
y: H[20, 20] = add.Tensor(self=h, other=t)
return y
""",
    "different parts": GATED["three outputs"].replace("return a, c, d", "return h, a"),
    "nothing to do with": GATED["three outputs"].replace(
        "d: H[20, 24] = neg.default(self=v)", "d: H[20, 64] = neg.default(self=x)"
    ),
    "inside of another loop": EPILOGUES["bias and gelu"].replace("gelu.default(self=h)", "softmax.int(self=h, dim=1)"),
    "repeats": """
x: H[20, 64]
w: H[64, 24]
h: H[20, 24] = mm.default(self=x, mat2=w)
y: H[2, 20, 24](0, 24, 1) = expand.default(self=h, size=[2, 20, 24])
return y
""",
    "as a gemm kernel": """
x: H[20, 64]
y: H[20, 64] = relu.default(self=x)
return y
""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        gemm_kernel(region(body(REFUSED[reason])), "kernel", SMALL)


def test_few_rows_are_known_and_few() -> None:
    for text in (MM, SYMBOLIC.replace("LAST", "8")):
        with pytest.raises(Unsupported, match="rows at once"):
            gemm_kernel(region(body(text)), "kernel", GEMV)


# ---- configurations --------------------------------------------------------------------------------------------------


def linear(rows: int | str, columns: int, depth: int) -> str:
    """A linear layer."""
    dim = f"dim {rows} = 1, None, 1\n" if isinstance(rows, str) else ""
    return f"""{dim}x: H[{rows}, {depth}]
w: H[{columns}, {depth}]
y: H[{rows}, {columns}] = linear.default(input=x, weight=w)
return y
"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [*((rows, 2304, 768) for rows in (1, 16, 3072, "s")), (4, 8, 64), (3, 1, 24)]
)
def test_configurations_fit_their_target(rows: int | str, columns: int, depth: int, arch: Arch, dtype: str) -> None:
    given = region(body(linear(rows, columns, depth), dtype))
    if (arch.sm, dtype) == (75, "bf16"):
        with pytest.raises(Unsupported, match="bf16 on sm_75"):
            gemm_configs(given, arch)
        return
    configs = gemm_configs(given, arch)
    assert len(configs) == len(set(configs)) > 0
    what = gemm_problem(given, gemm_contraction(given), arch)
    for config in configs:
        assert config.gemv or shared_memory(what, config, arch) <= arch.shared
    assert gemm_kernel(given, "kernel", configs[0]) == gemm_kernel(given, "kernel", configs[0])
    assert gemm_us(given, gemm_contraction(given), arch) > 0
    assert best_num_splits(given, gemm_contraction(given), arch)[0] > 0  # none may have a tile


def best(rows: int, columns: int, depth: int, target: int) -> GemmConfig:
    """The first configuration of a linear layer in f16."""
    return gemm_configs(region(body(linear(rows, columns, depth))), arch_of(target))[0]


def test_f32_on_tensor_cores() -> None:
    given = region(body(linear(1024, 1024, 1024), "f32"))
    for level, precision in (("highest", "tf32x3"), ("high", "tf32")):
        arch = replace(arch_of(90), float32=Float32(level))
        assert gemm_configs(given, arch)[0].input_precision == precision
        turing = replace(arch_of(75), float32=Float32(level))  # which has no TF32
        assert {config.input_precision for config in gemm_configs(given, turing)} == {"ieee"}


def test_the_performance_model() -> None:
    assert best(1, 8192, 2048, 90).gemv
    assert not best(8, 8192, 2048, 90).gemv
    by_columns = linear(1, 8192, 2048).replace("[8192, 2048]", "[8192, 2048](1, 8192)")
    assert not any(config.gemv for config in gemm_configs(region(body(by_columns)), arch_of(90)))
    large, small = best(4096, 4096, 4096, 90), best(128, 768, 768, 90)
    assert large.block_m * large.block_n >= 128 * 128 > 64 * 64 >= small.block_m * small.block_n
    assert best(16, 2048, 2048, 89).block_m == 16
    with pytest.raises(Unsupported, match="sm_70"):
        best(16, 16, 16, 70)


def test_tiles_of_two_widths() -> None:
    # 96 of them for 132 processors, where 72 of 256 columns would be too few and 144 of 128 a few too many.
    assert (best(3072, 768, 3072, 90).width, best(3072, 768, 3072, 89).extra_n) == (192, 0)


def test_large_products_are_the_library_s() -> None:
    def rival(rows: int, columns: int, depth: int, sm: int = 90, after: str = "") -> str:
        text = linear(rows, columns, depth)
        return library(body(text.replace("return y", after) if after else text), sm)

    gelu = "z: H[3072, 3072] = gelu.default(self=y)\nreturn z"
    assert rival(3072, 768, 3072) == "faster"
    assert rival(3072, 3072, 768, after=gelu) == "slower"  # the call and a kernel for the gelu take longer than both
    assert rival(4096, 4096, 4096) == rival(4608, 9216, 3072) == "faster"
    assert rival(3072, 768, 3072, sm=89) == "faster"  # if only just
    assert rival(3072, 3072, 768, sm=89, after=gelu) == "slower"
    assert rival(128, 768, 768) == rival(128, 768, 768, sm=89) == "slower"
    assert rival(512, 50257, 768) == "slower"  # its rows do not begin at multiples of 16 bytes
    assert rival(64, 14336, 4096) == "slower"  # it reads as much memory


def test_what_follows_a_library_call_reads_residuals_too() -> None:
    def after(text: str) -> float:
        """The time of a library call beyond that of the product itself."""
        call, rate = LIBRARY["gemm"], chip.library * chip.tensor * 1e6
        return offered(body(text), 90)["library"].expected_us - (call.us + 2 * 2048 * 1024 * 1024 / rate)

    chip = arch_of(90).chip
    plain = linear(2048, 1024, 1024)
    gelu = plain.replace("return y", "z: H[2048, 1024] = gelu.default(self=y)\nreturn z")
    residual = f"r: H[2048, 1024]\n{plain}".replace(
        "return y", "z: H[2048, 1024] = add.Tensor(self=y, other=r)\nreturn z"
    )
    result = 2048 * 1024 * 2 / (chip.memory * 1e3)
    assert after(plain) == 0
    assert after(gelu) == pytest.approx(chip.launch + 2 * result)
    assert after(residual) == pytest.approx(chip.launch + 3 * result)


@pytest.mark.parametrize("name", ["mm", "linear", "bmm", "baddbmm"])
def test_the_best_configurations_are_right(name: str) -> None:
    for config in gemm_configs(region(body(CALLS[name])), arch_of(89))[:2]:
        check(CALLS[name], gemm_kernel, config)


def test_stores_of_single_elements() -> None:
    text = linear(512, 1001, 64)
    assert "out0 + (1001 * M) + (N)" in gemm_kernel(region(body(text)), "kernel", SMALL).source
    assert "out0 + (1008 * M + N)" in gemm_kernel(region(body(text.replace("1001", "1008"))), "kernel", SMALL).source


# ---- text ------------------------------------------------------------------------------------------------------------


class TestSource(TestCase):
    """What kernels look like."""

    def source(self, text: str, config: GemmConfig) -> str:
        """The text of the function."""
        kernel = gemm_kernel(region(body(text)), "kernel", config)
        return "".join(kernel.source.partition("@triton.jit")[1:])

    def test_linear_and_gelu(self) -> None:
        text = EPILOGUES["bias and gelu"].replace("40", "s").replace("x:", "dim s = 1, 4096, 1\nx:", 1)
        text = text.replace("64]", "768]").replace("48]", "3072]")
        self.assertExpectedInline(
            self.source(text, GemmConfig(128, 128, 64, 8)),
            """\
@triton.jit
def kernel(x, w, b, out0, s):
    tile = tl.program_id(0)
    first = tile // 192 * 8
    height = tl.minimum(((s + 127) // 128) - first, 8)
    M = (first + tile % 192 % height) * 128 + tl.arange(0, 128)[:, None]
    in_m = M < s
    N = (tile % 192 // height) * 128 + tl.arange(0, 128)[None, :]
    KA = tl.arange(0, 64)[None, :]
    KB = tl.arange(0, 64)[:, None]
    ap0 = x + (KA + 768 * M)
    bp0 = w + (KB + 768 * N)
    acc0 = tl.zeros([128, 128], tl.float32)
    for step in range(0, 12):
        at1 = tl.load(ap0 + (64 * step), mask=in_m, other=0)
        bt1 = tl.load(bp0 + (64 * step))
        acc0 = tl.dot(at1, bt1, acc0)
    t0 = tl.load(b + (N)).to(tl.float32)
    t1 = acc0 + t0
    t2 = 0.5 * t1
    t3 = tl.minimum(tl.abs(t1), 12.0)
    t4 = 3.244454e-05 * t3 + -0.0007484183
    t5 = t4 * t3 + 0.0079422587
    t6 = t5 * t3 + -0.053051794
    t7 = t6 * t3 + -0.45917046
    t8 = t7 * t3 + -1.1510367
    t9 = t8 * t3 + -1.0000075788
    t10 = t2 + tl.abs(t2) - t3 * tl.exp2(t9)
    tl.store(out0 + (3072 * M + N), t10, mask=in_m)
""",
        )

    def test_gated_pair(self) -> None:
        text = GATED["two halves"].replace("[2, 10, ", "[4, 128, ").replace("480", "6144")
        self.assertExpectedInline(
            self.source(text, GemmConfig(64, 8, 32)),
            """\
@triton.jit
def kernel(x, w, b, out0):
    tile = tl.program_id(0)
    M = (tile % 8) * 64 + tl.arange(0, 64)[:, None]
    N = (tile // 8) * 8 + tl.arange(0, 8)[None, :]
    KA = tl.arange(0, 32)[None, :]
    KB = tl.arange(0, 32)[:, None]
    ap0 = x + (KA + 64 * M)
    bp0 = w + (KB + 64 * N)
    bp2 = w + (KB + 64 * N + 1536)
    acc0 = tl.zeros([64, 8], tl.float32)
    acc1 = tl.zeros([64, 8], tl.float32)
    for step in range(0, 2):
        at1 = tl.load(ap0 + (32 * step))
        bt1 = tl.load(bp0 + (32 * step))
        bt3 = tl.load(bp2 + (32 * step))
        acc0 = tl.dot(at1, bt1, acc0)
        acc1 = tl.dot(at1, bt3, acc1)
    t0 = tl.load(b + (N)).to(tl.float32)
    t1 = acc0 + t0
    t2 = tl.load(b + (N + 24)).to(tl.float32)
    t3 = acc1 + t2
    t4 = t1 * libdevice.fast_dividef(1.0, 1.0 + tl.exp2(t1 * -1.4426950408889634))
    t5 = t4 * t3
    tl.store(out0 + (24 * M + N), t5)
""",
        )

    def test_few_rows(self) -> None:
        self.assertExpectedInline(
            self.source(linear(1, 768, 770), GemmConfig(16, 8, 256, gemv=True)),
            """\
@triton.jit
def kernel(x, w, out0):
    tile = tl.program_id(0)
    N = tile * 8 + tl.arange(0, 8)[:, None]
    KB = tl.arange(0, 256)[None, :]
    p0 = x + (KB)
    p2 = w + (KB + 770 * N)
    acc0_0 = tl.zeros([8, 256], tl.float32)
    for step in range(0, 4):
        in_kb = KB < -256 * step + 770
        t1 = tl.load(p0 + (256 * step), mask=in_kb, other=0).to(tl.float32)
        t3 = tl.load(p2 + (256 * step), mask=in_kb, other=0).to(tl.float32)
        acc0_0 += t1 * t3
    sum4 = tl.sum(acc0_0, 1)[:, None]
    tl.store(out0 + (N), sum4)
""",
        )

    def test_programs_that_share_batches(self) -> None:
        text = CALLS["bmm"].replace("33", "64").replace("20", "128")
        self.assertExpectedInline(
            self.source(text, GemmConfig(64, 16, 64, programs=132)),
            """\
@triton.jit
def kernel(x, w, out0):
    for program in tl.range(tl.program_id(0), 18, 132, flatten=True):
        tile = program
        Z = tile // 6
        tile = tile % 6
        M = (tile % 2) * 64 + tl.arange(0, 64)[:, None]
        N = (tile // 2) * 16 + tl.arange(0, 16)[None, :]
        in_n = N < 40
        KA = tl.arange(0, 64)[None, :]
        KB = tl.arange(0, 64)[:, None]
        at0 = tl.load(x + (KA + 64 * M + 8192 * Z))
        bt0 = tl.load(w + (40 * KB + N + 2560 * Z), mask=in_n, other=0)
        acc0 = tl.zeros([64, 16], tl.float32)
        acc0 = tl.dot(at0, bt0, acc0)
        tl.store(out0 + (40 * M + N + 5120 * Z), acc0, mask=in_n)
""",
        )
