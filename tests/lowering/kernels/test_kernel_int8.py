"""Products and convolutions of int8, summed in int32: in Triton's interpreter against ATen, integers bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, check_split, offered
from tests.lowering.kernels.test_kernel_conv import SHAPES, call
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families.conv import conv_configs, conv_contraction, conv_kernel
from torch_rtx.lowering.kernels.families.gemm import GemmConfig, gemm_configs, gemm_contraction, gemm_kernel
from torch_rtx.lowering.kernels.gemm_perf_model import shared_memory
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.region import region
from torch_rtx.targets import ARCHES, Arch, Target, arch_of

SMALL = GemmConfig(32, 16, 32, group_m=2)
EXTRA = GemmConfig(32, 32, 64, extra_n=16)
GEMV = GemmConfig(16, 16, 64, gemv=True)
LONG = GemmConfig(16, 16, 256)


def int_mm(rows: int, depth: int, columns: int, k_major: bool = True, rest: str = "return y") -> str:
    """A product, and what follows; M and N in there stand for its sizes."""
    strides = f"(1, {depth})" if k_major else ""
    text = f"""
x: i8[M, {depth}]
w: i8[{depth}, N]{strides}
y: i32[M, N] = _int_mm.default(self=x, mat2=w)
{rest}
"""
    given = [line for line in rest.splitlines() if ":" in line and " = " not in line]
    lines = [line for line in text.splitlines() if line not in given]
    lines[1:1] = given
    return "\n".join(lines).replace("M", str(rows)).replace("N", str(columns))


SCALED = """a: f32[M, 1]
s: f16[N]
f: f32[M, N] = _to_copy.default(self=y, dtype='f32')
e: f32[M, N] = mul.Tensor(self=f, other=0.0001)
g: f32[M, N] = mul.Tensor(self=e, other=a)
h: f32[M, N] = mul.Tensor(self=g, other=s)
"""
QUANTIZED = """r: f32[M, N] = round.default(self=LAST)
c: f32[M, N] = clamp.default(self=r, min=-128, max=127)
q: i8[M, N] = _to_copy.default(self=c, dtype='i8')
"""
EPILOGUES = {
    "scales of tokens and channels": SCALED + "z: f16[M, N] = _to_copy.default(self=h, dtype='f16')\nreturn z",
    "bias, residual and activation": SCALED
    + """b: f16[N]
r: f16[M, N]
z: f16[M, N] = _to_copy.default(self=h, dtype='f16')
c: f16[M, N] = add.Tensor(self=z, other=b)
d: f16[M, N] = gelu.default(self=c)
i: f16[M, N] = add.Tensor(self=d, other=r)
return i""",
    "a scale of the tensor, quantized for the next layer": """f: f32[M, N] = _to_copy.default(self=y, dtype='f32')
g: f32[M, N] = mul.Tensor(self=f, other=0.001)
u: f32[M, N] = relu.default(self=g)
"""
    + QUANTIZED.replace("LAST", "u")
    + "return q",
    "a zero point": """z: i32[N]
d: i32[M, N] = sub.Tensor(self=y, other=z)
e: i32[M, N] = mul.Tensor(self=d, other=3)
return e, y""",
    "quantized, and as it is": SCALED + QUANTIZED.replace("LAST", "h") + "return q, h",
    "heads": """v: i32[M, 3, 8] = view.default(self=y, size=[M, 3, 8])
t: i32[3, M, 8](8, 24, 1) = transpose.int(self=v, dim0=0, dim1=1)
f: f32[3, M, 8](8, 24, 1) = _to_copy.default(self=t, dtype='f32')
return f""",
}
CALLS = {
    "unpacked from 4 bits": """
x: i8[20, 64]
q: u8[24, 32]
l: u8[24, 32] = bitwise_and.Scalar(self=q, other=15)
h: u8[24, 32] = bitwise_right_shift.Tensor_Scalar(self=q, other=4)
s: u8[24, 32, 2] = stack.default(tensors=[l, h], dim=-1)
c: i8[24, 32, 2] = _to_copy.default(self=s, dtype='i8')
m: i8[24, 32, 2] = sub.Tensor(self=c, other=8)
v: i8[24, 64] = view.default(self=m, size=[24, 64])
t: i8[64, 24](1, 64) = t.default(self=v)
y: i32[20, 24] = _int_mm.default(self=x, mat2=t)
return y
""",
    "what is not zero beyond the end of K": """
x: i8[20, 40]
w: i8[40, 24](1, 40)
o: i8[20, 40] = add.Tensor(self=x, other=1)
y: i32[20, 24] = _int_mm.default(self=o, mat2=w)
return y
""",
    "cast to int32, batches": """
x: i8[2, 20, 40]
w: i8[2, 40, 24](960, 1, 40)
a: i32[2, 20, 40] = _to_copy.default(self=x, dtype='i32')
b: i32[2, 40, 24](960, 1, 40) = _to_copy.default(self=w, dtype='i32')
y: i32[2, 20, 24] = bmm.default(self=a, mat2=b)
return y
""",
    "cast to int32, with an addend": """
x: i8[20, 40]
w: i8[40, 24]
c: i32[24]
a: i32[20, 40] = _to_copy.default(self=x, dtype='i32')
b: i32[40, 24] = _to_copy.default(self=w, dtype='i32')
y: i32[20, 24] = addmm.default(self=c, mat1=a, mat2=b, beta=2, alpha=3)
return y
""",
    "as int8, modulo 256": """
x: i8[20, 40]
w: i8[40, 24]
y: i8[20, 24] = mm.default(self=x, mat2=w)
return y
""",
}


@pytest.mark.parametrize("config", [SMALL, EXTRA, GEMV])
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("k_major", [True, False])
def test_products(depth: int, k_major: bool, config: GemmConfig) -> None:
    # PyTorch's own product on CPUs is wrong for one column of strides (1, 1).
    check(int_mm(3 if config.gemv else 37, depth, 19, k_major and depth > 1), gemm_kernel, config)


@pytest.mark.parametrize("config", [SMALL, GEMV])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str, config: GemmConfig) -> None:
    text = int_mm(5 if config.gemv else 40, 64, 24, rest=EPILOGUES[name])
    check(text, gemm_kernel, config)
    check_split(text, 2)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    kernel = check(CALLS[name], gemm_kernel, SMALL)
    assert "out_dtype=tl.int32" in kernel.source


@pytest.mark.parametrize("config", [LONG, GEMV])
def test_large_sums_are_exact(config: GemmConfig) -> None:
    """Beyond the 24 bits of a float32, up to the 31 of an int32."""
    depth = 2**17 - 1
    graph = body(int_mm(2, depth, 1))
    left = torch.full((2, depth), -128, dtype=torch.int8)
    left[1, 7] = 127
    right = torch.full((1, depth), -128, dtype=torch.int8).t()
    out = torch.zeros(2, 1, dtype=torch.int32)
    run(gemm_kernel(region(graph), "kernel", config), [left, right, out])
    assert out.flatten().tolist() == [depth << 14, (depth << 14) - 255 * 128]


@pytest.mark.quick
@pytest.mark.parametrize("size", [0, 1, 33])
def test_symbolic_rows(size: int) -> None:
    rest = EPILOGUES["bias, residual and activation"]
    text = "dim rows = 0, 64, 1\n" + int_mm(7777, 96, 24, rest=rest).replace("7777", "rows").lstrip()
    check(text, gemm_kernel, SMALL, dims={"rows": size})
    check_split(text, 3, dims={"rows": size})


def test_partial_products_are_dots_of_int8() -> None:
    form = check_split(int_mm(40, 256, 48, rest=EPILOGUES["scales of tokens and channels"]), 4)
    assert form.nodes[0].body is not None
    kernel = generate(form.nodes[0].body, "k", arch_of(80), 0)
    assert kernel is not None
    assert kernel.pointers == ("i8", "i8", "i32")
    assert ".to(" not in kernel.source


def test_products_of_wide_integers_are_refused() -> None:
    text = "x: i64[20, 40]\nw: i64[40, 24]\ny: i64[20, 24] = mm.default(self=x, mat2=w)\nreturn y"
    with pytest.raises(Unsupported, match="i64"):
        gemm_kernel(region(body(text)), "kernel", SMALL)


# ---- convolutions ----------------------------------------------------------------------------------------------------

REQUANTIZED = """s: f32[1, F, 1, 1]
b: f32[1, F, 1, 1]
f: f32OUT = _to_copy.default(self=h, dtype='f32')
g: f32OUT = mul.Tensor(self=f, other=s)
i: f32OUT = add.Tensor(self=g, other=b)
u: f32OUT = relu.default(self=i)
j: f32OUT = round.default(self=u)
c: f32OUT = clamp.default(self=j, max=127)
q: i8OUT = _to_copy.default(self=c, dtype='i8')
return q"""


def int_conv(name: str, rest: str = "return h", **changed: Any) -> str:
    """A case of SHAPES in int8."""
    shapes: dict[str, Any] = {**SHAPES[name], "bias": False, **changed, "rest": rest}
    shapes["rest"] = shapes["rest"].replace("F,", f"{shapes['weight'][0]},")
    text = call(**shapes).replace("conv2d.", "torch_rtx.int_conv.").replace("h: H[", "h: i32[")
    lines = [line for line in text.splitlines() if not line.startswith("b: H[")]
    return "\n".join(lines).replace("f32H[", "f32[").replace("i8H[", "i8[")


IN_OTHER_DIMENSIONS = {
    "one": """
x: i8[2, 32, 12]
w: i8[24, 32, 3]
h: i32[2, 24, 6] = torch_rtx.int_conv.default(input=x, weight=w, stride=[2], padding=[1])
return h
""",
    "three": """
x: i8[1, 16, 4, 5, 4]
w: i8[8, 16, 2, 3, 2]
h: i32[1, 8, 3, 5, 3] = torch_rtx.int_conv.default(input=x, weight=w, padding=[0, 1, 0])
return h
""",
}
CONV = GemmConfig(64, 16, 32)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions(name: str, channels_last: bool) -> None:
    check(int_conv(name, channels_last=channels_last), conv_kernel, CONV, "i8")


@pytest.mark.parametrize("name", ["3x3", "few channels", "1x1", "groups", "depthwise"])
def test_quantized_for_the_next_convolution(name: str) -> None:
    check(int_conv(name, REQUANTIZED), conv_kernel, CONV, "i8")


@pytest.mark.parametrize("text", IN_OTHER_DIMENSIONS.values(), ids=IN_OTHER_DIMENSIONS)
def test_convolutions_in_other_dimensions(text: str) -> None:
    check(text, conv_kernel, CONV)


def test_parts_of_a_convolution_are_convolutions_of_int8() -> None:
    form = check_split(int_conv("3x3", REQUANTIZED), 2, "i8")
    assert form.nodes[0].body is not None
    assert [node.op for node in form.nodes[0].body.nodes][-1] == "torch_rtx.int_conv.default"


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_operator_is_exact(groups: int) -> None:
    x, w = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((2, 4, 9, 8), (8, 4 // groups, 3, 2)))
    found = torch.ops.torch_rtx.int_conv(x, w, [2, 1], [1, 1], [1, 2], groups)
    windows = F.pad(x.long(), (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 1)[..., ::2]
    parts = [
        torch.einsum("nchwij,fcij->nfhw", part, filters)
        for part, filters in zip(windows.chunk(groups, 1), w.long().chunk(groups), strict=True)
    ]
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), torch.cat(parts, 1))


def test_the_operator_takes_int8_alone() -> None:
    x = torch.zeros(1, 4, 5, 5)
    with pytest.raises(TypeError, match=r"takes int8, not torch\.float32 and torch\.int8"):
        torch.ops.torch_rtx.int_conv(x, torch.zeros(4, 4, 3, 3, dtype=torch.int8))


# ---- targets ---------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {
    75: b"mma.sync.aligned.m8n8k16.row.col.satfinite.s32.s8.s8.s32",
    80: b"mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    89: b"mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    90: b"wgmma.mma_async.sync.aligned.m64",
    120: b"mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
}


def test_tensor_cores_multiply_int8() -> None:
    layer = region(body(int_mm(512, 256, 512, rest=EPILOGUES["bias, residual and activation"])))
    shapes = {"source": (8, 64, 28, 28), "weight": (128, 64, 3, 3), "padding": (1, 1)}
    window = region(body(int_conv("3x3", REQUANTIZED, **shapes), "i8"))
    kernels = {
        (kernel, Target(sm)): instruction
        for sm, instruction in INSTRUCTIONS.items()
        for kernel in (
            gemm_kernel(layer, "layer", gemm_configs(layer, arch_of(sm))[0]),
            conv_kernel(window, "window", conv_configs(window, arch_of(sm))[0]),
        )
    }
    for key, found in compile_kernels(list(kernels)).items():
        assert found.problem is None
        (code,) = found.codes
        assert kernels[key] in code.ptx
        assert b".s8.s8" in code.ptx
        assert code.spills == 0


@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
@pytest.mark.parametrize(("rows", "depth"), [(1, 16), (64, 40), (3072, 768), (16, 4096)])
def test_configurations_fit_their_target(rows: int, depth: int, arch: Arch) -> None:
    given = region(body(int_mm(rows, depth, 768)))
    problem = gemm_problem(given, gemm_contraction(given), arch)
    configs = gemm_configs(given, arch)
    assert configs
    assert all(config.block_k >= 32 for config in configs)
    assert all(config.gemv or shared_memory(problem, config, arch) <= arch.shared for config in configs)


def test_tensor_cores_are_expected_to_be_twice_as_fast() -> None:
    half = "x: f16[4096, 8192]\nw: f16[4096, 8192]\ny: f16[4096, 4096] = linear.default(input=x, weight=w)\nreturn y"
    for sm, narrow in product((80, 90, 120), (int_mm(4096, 8192, 4096),)):
        slow, fast = (offered(body(text), sm)["kernel"].expected_us for text in (half, narrow))
        assert 1.6 * fast < slow


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(16, 64, 64), (17, 68, 64), (17, 64, 68)], ids=["few rows", "depth", "columns"]
)
def test_libraries_have_some_sizes_alone(rows: int, depth: int, columns: int) -> None:
    assert "library" in offered(body(int_mm(17, 64, 64)), 90)
    assert "library" not in offered(body(int_mm(rows, depth, columns)), 90)


def test_libraries_have_no_other_products_of_integers() -> None:
    for text in (CALLS["cast to int32, batches"], CALLS["as int8, modulo 256"], int_conv("3x3")):
        assert offered(body(text, "i8"), 90).keys() <= {"kernel", "split"}


def test_a_convolution_has_a_contraction_of_int8() -> None:
    given = region(body(int_conv("few channels"), "i8"))
    problem = gemm_problem(given, conv_contraction(given), arch_of(90))
    assert (problem.dtype, problem.depth, problem.vector_elements) == ("i8", 45, 1)
