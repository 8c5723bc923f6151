"""Block-scaled formats in kernels, in Triton's interpreter: their dtypes, views of bits, and products."""

from __future__ import annotations

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body
from torch_rtx.block_formats import FORMATS, dequantize, to_blocked
from torch_rtx.errors import Unsupported
from torch_rtx.ir import TensorType, Value
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.loops import loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.targets import Target, arch_of

BYTES = torch.arange(256, dtype=torch.uint8)
# Around every point where the rounding to a power of two changes, of both signs, subnormal and not finite.
BITS = (torch.arange(512).reshape(-1, 1) << 23) + torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF])
SINGLES = BITS.flatten().to(torch.uint32).view(torch.float32)


def looped(text: str, *given: torch.Tensor) -> torch.Tensor:
    """The result, of the shape of the first input, of a body of plain loops."""
    output = torch.empty(given[0].shape, dtype=torch.uint8)
    run(loop_kernel(region(body(text)), "k"), [*given, output])
    return output


def test_exponents_are_read() -> None:
    text = 'x: f8e8m0fnu[256]\ny: f32[256] = _to_copy.default(self=x, dtype="f32")\nreturn y'
    output = torch.empty(256)
    run(loop_kernel(region(body(text)), "k"), [BYTES, output])
    torch.testing.assert_close(output, BYTES.view(torch.float8_e8m0fnu).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_exponents_are_rounded_as_pytorch_rounds_them(dtype: str) -> None:
    text = """x: DTYPE[3072]
    y: f8e8m0fnu[3072] = _to_copy.default(self=x, dtype="f8e8m0fnu")
    return y""".replace("DTYPE", dtype)
    given = SINGLES.to(torch.float32 if dtype == "f32" else torch.bfloat16)
    assert torch.equal(looped(text, given), given.to(torch.float8_e8m0fnu).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["f8e8m0fnu", "f4e2m1fn_x2", "i8"])
def test_bits_come_back(dtype: str) -> None:
    text = f"""x: u8[256]
    y: {dtype}[256] = view.dtype(self=x, dtype="{dtype}")
    z: {dtype}[256] = flip.default(self=y, dims=[0])
    w: u8[256] = view.dtype(self=z, dtype="u8")
    return {{}}"""
    assert torch.equal(looped(text.format("w"), BYTES), BYTES.flip(0))
    assert torch.equal(looped(text.format("z"), BYTES), BYTES.flip(0))


@pytest.mark.parametrize(("floats", "ints"), [(torch.float16, torch.int16), (torch.float32, torch.int32)])
def test_bits_of_floats(floats: torch.dtype, ints: torch.dtype) -> None:
    name, other = {torch.float16: ("f16", "i16"), torch.float32: ("f32", "i32")}[floats]
    text = f"""x: {name}[6]
    y: {other}[6] = view.dtype(self=x, dtype="{other}")
    z: {other}[6] = bitwise_xor.Scalar(self=y, other=1)
    w: {name}[6] = view.dtype(self=z, dtype="{name}")
    return w"""
    x = torch.tensor([0.0, -0.0, 1.5, -65504.0, 6e-8, float("inf")]).to(floats)
    output = torch.empty_like(x)
    run(loop_kernel(region(body(text)), "k"), [x, output])
    assert torch.equal(output.view(ints), x.view(ints) ^ 1)


def test_nothing_is_computed_with_pairs_of_values() -> None:
    with pytest.raises(Unsupported, match="arithmetic with f4e2m1fn_x2"):
        region(body("x: f4e2m1fn_x2[8]\ny: f4e2m1fn_x2[8] = mul.Tensor(self=x, other=x)\nreturn y"))


# ---- products --------------------------------------------------------------------------------------------------------

SIZES = [(1, 16, 32), (133, 24, 160)]
# Targets whose tensor cores have the instruction, and others.
ARCHES = {"native": arch_of(120), "emulated": arch_of(80)}


def product(name: str, rows: str | int, columns: int, depth: int, epilogue: str = "") -> str:
    """The body of a product of a format of `block_formats`, of which only the number of rows may be symbolic."""
    dtypes = {"mxfp4": ("f4e2m1fn_x2", "f8e8m0fnu"), "nvfp4": ("f4e2m1fn_x2", "f8e4m3fn")}
    data, scale = dtypes.get(name, ("f8e4m3fn" if name == "mxfp8" else "f8e5m2", "f8e8m0fnu"))
    stored = depth // 2 if data == "f4e2m1fn_x2" else depth
    wide = -(-depth // FORMATS[name].size // 4) * 512
    tall = f"{-(-rows // 128) * wide}" if isinstance(rows, int) else f"{wide} * (({rows} + 127) // 128)"
    dim = "" if isinstance(rows, int) else f"dim {rows} = 1, 1024, 1\n"
    return f"""{dim}a: {data}[{rows}, {stored}]
    w: {data}[{columns}, {stored}]
    sa: {scale}[{tall}]
    sb: {scale}[{-(-columns // 128) * wide}]
    bias: bf16[{columns}]
    b: {data}[{stored}, {columns}](1, {stored}) = t.default(self=w)
    y: bf16[{rows}, {columns}] = _scaled_mm.default(self=a, mat2=b, scale_a=sa, scale_b=sb, bias=bias, out_dtype="bf16")
    {epilogue or "return y"}"""


def random_operand(name: str, rows: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Data with any bits but NaN, and scales of a few sizes."""
    packed = FORMATS[name].data == torch.float4_e2m1fn_x2
    data = torch.randint(0, 256, (rows, depth // 2 if packed else depth), dtype=torch.uint8)
    data = data if packed else torch.where((data & 0x7F) >= 0x7C, 0x44, data)
    scales = torch.randint(0x30, 0x40, (rows, depth // FORMATS[name].size), dtype=torch.uint8)
    scales += 0x48 if FORMATS[name].scales == torch.float8_e8m0fnu else 0
    return data.view(FORMATS[name].data), scales.view(FORMATS[name].scales)


def defined(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The product by the definition, in float64."""
    return dequantize(*a).double() @ dequantize(*b).double().T


@pytest.mark.parametrize("kind", ARCHES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_products(name: str, kind: str, rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    a, b = random_operand(name, rows, depth), random_operand(name, columns, depth)
    bias = torch.randn(columns).bfloat16()
    exact = defined(a, b) + bias.double()
    for which in range(2 if rows == 1 else 1):
        kernel = generate(body(product(name, rows, columns, depth)), "k", ARCHES[kind], which)
        assert kernel is not None
        assert ("dot_scaled" in kernel.source) == (kind == "native")
        output = torch.empty(rows, columns, dtype=torch.bfloat16)
        run(kernel, [a[0], b[0], to_blocked(a[1]), to_blocked(b[1]), bias, output])
        assert_right([output], [exact.float().bfloat16()], [exact])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("sa: f8e8m0fnu[2048]", "sa: f8e8m0fnu[512]", "512 scales of 133 rows"),
        ("sb: f8e8m0fnu[1024]", "sb: f8e4m3fn[1024]", "with scales in f8e8m0fnu and f8e4m3fn"),
        ("out_dtype=", "scale_result=sr, out_dtype=", "whose result has a scale"),
    ],
)
def test_products_that_kernels_do_not_have(old: str, new: str, problem: str) -> None:
    """Their calls say what is wrong, or run by the definition."""
    text = "sr: f32[1]\n" + product("mxfp4", 133, 24, 160)
    assert text.count(old) == 1
    with pytest.raises(Unsupported, match=problem):
        generate(body(text.replace(old, new)), "k", arch_of(120), 0)


def test_sizes_of_calls() -> None:
    """A file can't let a kernel read beyond the second matrix."""
    one = TensorType("f4e2m1fn_x2", (8, 16), (16, 1))
    with pytest.raises(Unsupported, match="rows of 16 by columns of 8"):
        Inference()("aten._scaled_mm.default", [(n, Value(n, one)) for n in ("self", "mat2", "scale_a", "scale_b")])


INSTRUCTIONS = {
    "mxfp8": "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
    "mxfp8_e5m2": "kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e5m2.e5m2.f32.ue8m0",
    "mxfp4": "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
    "nvfp4": "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
}


def test_instructions() -> None:
    """Binaries for sm_120 have the instruction of a format; PTX that later GPUs take, and binaries for others, not."""
    wanted = {}
    for name in INSTRUCTIONS:
        targets = [Target(120)] + [Target(89), Target(90), Target(120, ptx=True)] * (name == "nvfp4")
        for target in targets:
            kernel = generate(body(product(name, 256, 64, 512)), f"{name}_{target}", target.arch, 0)
            assert kernel is not None
            wanted[kernel, target] = INSTRUCTIONS[name] if target == Target(120) else None
    for pair, built in compile_kernels(wanted).items():
        assert built.problem is None
        ptx = built.codes[0].ptx.decode()
        assert (wanted[pair] or "mma") in ptx
        assert ("block_scale" in ptx) == (wanted[pair] is not None)
