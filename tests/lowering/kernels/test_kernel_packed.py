"""Products whose second operand is packed in words of eight values, in Triton's interpreter and as machine code."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import DTYPES, body, check, check_split, offered
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families.gemm import GemmConfig, gemm_configs, gemm_contraction, gemm_kernel
from torch_rtx.lowering.kernels.gemm_problem import gemm_problem
from torch_rtx.lowering.kernels.matmul_template import packing
from torch_rtx.lowering.kernels.packed import Packing
from torch_rtx.lowering.kernels.region import Region, region
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import Target, arch_of

MMA = GemmConfig(32, 32, 128)
FEW, SOME = GemmConfig(8, 32, 256, num_warps=2), GemmConfig(16, 32, 128, num_warps=2)
JOINED, FLAT = (GemmConfig(64, 32, block_k, joined=True) for block_k in (256, 64))
WIDE = GemmConfig(32, 32, 256, extra_n=16)
GEMV = GemmConfig(16, 8, 512, gemv=True)


def codes(columns: int, depth: int, run: int, bits: int) -> str:
    """The codes of the words `w`: [columns, runs, parts, run, 2]."""
    parts = 16 // bits
    runs, words = depth // run // (2 * parts), f"{columns}, {depth // run // (2 * parts)}, 1, {run}, 1"
    shape = f"{columns}, {runs}, {parts}, {run}, 2"
    return f"""\
words: i32[{words}] = view.default(self=w, size=[{words}])
all: i64[{2 * parts}] = arange.start_step(start=0, end=32, step={bits}, dtype='i64', device='main')
halves: i64[2, {parts}] = view.default(self=all, size=[2, {parts}])
turned: i64[{parts}, 2](1, {parts}) = permute.default(self=halves, dims=[1, 0])
dense: i64[{parts}, 2] = clone.default(self=turned, memory_format='contiguous_format')
at: i64[{parts}, 1, 2] = view.default(self=dense, size=[{parts}, 1, 2])
shifted: i32[{shape}] = bitwise_right_shift.Tensor(self=words, other=at)
codes: i32[{shape}] = bitwise_and.Scalar(self=shifted, other={2**bits - 1})"""


def packed(
    rows: int, columns: int, depth: int, group: int, run: int = 16, dtype: str = "f16", held: str = "", bits: int = 4
) -> str:
    """A linear layer of packed weights with a scale and a zero point for each group, computed in `held`."""
    held, parts, groups = held or dtype, 16 // bits, depth // group
    shape = f"{columns}, {depth // run // (2 * parts)}, {parts}, {run}, 2"
    scales = f"f32[{columns}, {groups}, 1](1, {columns}, {columns})"
    return f"""
x: {dtype}[{rows}, {depth}]
w: i32[{columns}, {depth // (2 * parts)}]
s: {scales}
z: {scales}
{codes(columns, depth, run, bits)}
floats: {held}[{shape}] = _to_copy.default(self=codes, dtype='{held}')
rows: {held}[{columns}, {groups}, {group}] = view.default(self=floats, size=[{columns}, {groups}, {group}])
scale: {held}[{columns}, {groups}, 1](1, {columns}, {columns}) = _to_copy.default(self=s, dtype='{held}')
zero: {held}[{columns}, {groups}, 1](1, {columns}, {columns}) = _to_copy.default(self=z, dtype='{held}')
less: {held}[{columns}, {groups}, {group}] = sub.Tensor(self=rows, other=zero)
scaled: {held}[{columns}, {groups}, {group}] = mul.Tensor(self=less, other=scale)
wide: {held}[{columns}, {depth}] = view.default(self=scaled, size=[{columns}, {depth}])
same: {dtype}[{columns}, {depth}] = _to_copy.default(self=wide, dtype='{dtype}')
y: {dtype}[{rows}, {columns}] = linear.default(input=x, weight=same)
return y
"""


BYTES = """
x: H[3, DEPTH]
w: BYTES[24, DEPTH]
s: H[24, 1]
b: H[24]
floats: H[24, DEPTH] = _to_copy.default(self=w, dtype='HALF')
wide: H[24, DEPTH] = mul.Tensor(self=floats, other=s)
y: H[3, 24] = linear.default(input=x, weight=wide, bias=b)
return y
"""

GROUPS = """
x: H[3, 512]
w: i8[24, 512]
s: H[24, 2, 1]
floats: H[24, 512] = _to_copy.default(self=w, dtype='bf16')
rows: H[24, 2, 256] = view.default(self=floats, size=[24, 2, 256])
scaled: H[24, 2, 256] = mul.Tensor(self=rows, other=s)
wide: H[24, 512] = view.default(self=scaled, size=[24, 512])
y: H[3, 24] = linear.default(input=x, weight=wide)
return y
"""

PLAIN = """
x: bf16[ROWS, 4096]
w: bf16[32768, 4096]
y: bf16[ROWS, 32768] = linear.default(input=x, weight=w)
return y
"""


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("config", [MMA, WIDE, GEMV, FEW, SOME, JOINED, FLAT])
@pytest.mark.parametrize(
    ("bits", "sizes"),  # rows, columns, depth, group, run
    [
        (4, (1, 32, 512, 128, 32)),
        (4, (3, 19, 384, 64, 16)),
        (4, (8, 40, 512, 32, 32)),
        (4, (33, 24, 256, 32, 32)),
        (4, (16, 37, 384, 128, 16)),
        (8, (2, 19, 448, 64, 16)),
        (8, (35, 24, 256, 128, 32)),
    ],
)
def test_packed_operands(config: GemmConfig, dtype: str, sizes: tuple[int, int, int, int, int], bits: int) -> None:
    if sizes[0] <= 8 or not (config.gemv or config.block_m == 8):
        kernel = check(packed(*sizes, dtype, bits=bits), gemm_kernel, config, dtype)
        pairs = 16 // bits * (1 + (config.extra_n > 0))  # two values at once, of each accumulator's columns
        masks = {(4, "f16"): "0x03C003C0", (4, "bf16"): "0x000F000F", (8, "f16"): "0x00FF00FF", (8, "bf16"): "0x7F007F"}
        assert kernel.source.count(masks[bits, dtype]) == pairs


@pytest.mark.parametrize("added", [-256, -128, -8, 1])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(("bits", "config"), [(4, MMA), (8, MMA), (8, FLAT)])
def test_every_code_is_exact(bits: int, config: GemmConfig, dtype: str, added: int) -> None:
    """The product with a matrix that has a 1 in each row is the weights."""
    depth, columns, parts = 256, 32, 16 // bits
    shape = f"{columns}, {depth // 16 // (2 * parts)}, {parts}, 16, 2"
    graph = body(
        f"""
        x: H[{depth}, {depth}]
        w: i32[{columns}, {depth // (2 * parts)}]
        {codes(columns, depth, 16, bits)}
        moved: i32[{shape}] = add.Tensor(self=codes, other={added})
        floats: H[{shape}] = _to_copy.default(self=moved, dtype='{dtype}')
        wide: H[{columns}, {depth}] = view.default(self=floats, size=[{columns}, {depth}])
        y: H[{depth}, {columns}] = linear.default(input=x, weight=wide)
        return y
        """,
        dtype,
    )
    assert packing(gemm_contraction(region(graph))) == Packing(bits, 16)
    words = torch.arange(256).repeat(columns * depth * bits // 32 // 64).to(torch.uint8).view(torch.int32)
    inputs = [torch.eye(depth, dtype=DTYPES[dtype]), words.view(columns, -1)]
    (expected,) = compile_graph(graph, torch.device("cpu"))(inputs, ())
    result = torch.full_like(expected, math.nan)
    run(gemm_kernel(region(graph), "kernel", config), [*inputs, result])
    assert len(expected.unique()) == 2**bits
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("weight", ["i8", "u8", "f8e4m3fn", "f8e5m2"])
@pytest.mark.parametrize("config", [FEW, SOME, JOINED, GEMV])
@pytest.mark.parametrize("depth", [200, 256])
def test_scales_of_columns_follow_the_sums(depth: int, config: GemmConfig, weight: str, dtype: str) -> None:
    text = BYTES.replace("DEPTH", str(depth)).replace("BYTES", weight).replace("H[", f"{dtype}[")
    kernel = check(text.replace("HALF", dtype), gemm_kernel, config, dtype)
    assert ("tl.sum(acc0_2, 1)[:, None] * " if config.gemv else "acc0 = acc0 * ") in kernel.source


@pytest.mark.parametrize(
    ("slices", "sizes", "dtype"),
    [
        (8, (1, 32, 2048, 128, 32), "bf16"),
        (4, (1, 19, 512, 32, 16), "f16"),
        (2, (1, 16, 512, 128, 32), "bf16"),
        (4, (2, 24, 1024, 128, 32), "f16"),
        (2, (3, 20, 768, 64, 16), "bf16"),
        (4, (3, 16, 1024, 128, 32), "f16"),
        (2, (7, 24, 512, 32, 16), "bf16"),
    ],
)
def test_slices_of_packed_operands(slices: int, sizes: tuple[int, int, int, int, int], dtype: str) -> None:
    config = GemmConfig(8, 8, 128, num_warps=2, slices=slices)
    kernel = check(packed(*sizes, dtype), gemm_kernel, config, dtype)
    assert f"range(0, {sizes[2] // slices // 128}" in kernel.source or sizes[2] == slices * 128
    assert f"[{8 * slices}, {16 if sizes[0] * slices > 8 else 8}], tl.float32)" in kernel.source


def gated(text: str, rows: int, columns: int) -> str:
    """The product `y` of twice as many columns, with the gate of each column in the first half."""
    halves = [
        f"{name}: H[{rows}, {columns}]({2 * columns}, 1) = slice.Tensor(self=y, dim=1, start={at}, end={at + columns})"
        for name, at in (("g", 0), ("u", columns))
    ]
    ends = f"a: H[{rows}, {columns}] = silu.default(self=g)", f"v: H[{rows}, {columns}] = mul.Tensor(self=a, other=u)"
    return text.replace("return y", "\n".join((*halves, *ends, "return v")))


def test_slices_of_a_gated_product() -> None:
    """Both halves of the columns, whose tiles are read together."""
    text = gated(packed(2, 32, 512, 64, 16, "bf16"), 2, 16)
    kernel = check(text, gemm_kernel, GemmConfig(8, 8, 128, num_warps=2, slices=4), "bf16")
    assert "acc1 = tl.sum(" in kernel.source


@pytest.mark.parametrize("weight", [4, 8, "i8"])
def test_a_gated_product_is_one_product(weight: int | str) -> None:
    """Of both halves of the columns, some of which are past the end, as are some rows."""
    text = gated(packed(35, 48, 256, 64, 16, "bf16", bits=8 if weight == 8 else 4), 35, 24)
    if weight == "i8":
        text = BYTES.replace("[3,", "[35,").replace("24", "48").replace("DEPTH", "200").replace("BYTES", "i8")
        text = gated(text.replace("HALF", "bf16"), 35, 24)
    config = GemmConfig(32, 16, 128, joined=weight != "i8", stacked=True)
    source = check(text, gemm_kernel, config, "bf16").source
    assert source.count("tl.dot(") == 1
    assert ("acc1 = acc1 * " in source) == (weight == "i8")


def test_other_accumulators_are_no_rows_of_one_product() -> None:
    config = GemmConfig(16, 16, 128, joined=True, stacked=True)
    for text in (packed(16, 32, 256, 64), gated(packed(16, 32, 256, 64), 16, 16)):  # one; few rows, that are scaled
        with pytest.raises(Unsupported, match="no rows of one product"):
            gemm_kernel(region(body(text)), "kernel", replace(config, joined="return y" in text))


@pytest.mark.parametrize("weight", ["i8", "f8e4m3fn"])
@pytest.mark.parametrize(("rows", "slices"), [(1, 8), (3, 2), (2, 2)])
def test_slices_of_bytes(rows: int, slices: int, weight: str) -> None:
    """Also where a slice is no whole number of steps, and a tile has columns past the end."""
    text = BYTES.replace("[3,", f"[{rows},").replace("DEPTH", "384").replace("BYTES", weight).replace("24", "23")
    text = text.replace("HALF", "bf16").replace("H[", "bf16[")
    check(text, gemm_kernel, GemmConfig(8, 4, 32, num_warps=2, slices=slices), "bf16")


@pytest.mark.parametrize("config", [FEW, SOME])
def test_scales_of_groups_of_bytes_follow_the_sums_of_a_step(config: GemmConfig) -> None:
    text = GROUPS.replace("STEP", str(config.block_k))
    assert ", num_stages=3)" in check(text, gemm_kernel, config, "bf16").source
    assert "num_stages" not in check(text, gemm_kernel, replace(config, block_m=32), "bf16").source


@pytest.mark.parametrize(
    ("expression", "follows"),
    [
        ("sub.Tensor(self=rows, other=8)", True),
        ("add.Tensor(self=rows, other=zero)", True),
        ("mul.Tensor(self=rows, other=zero)", True),
        ("sub.Tensor(self=zero, other=rows)", False),
        ("div.Tensor(self=rows, other=zero)", False),
    ],
)
def test_other_shifts(expression: str, follows: bool) -> None:
    text = packed(5, 24, 256, 64, 32, "bf16").replace("sub.Tensor(self=rows, other=zero)", expression)
    kernel = check(text, gemm_kernel, FEW, "bf16")
    assert (" += acc0_" in kernel.source) == follows


def test_quantization_is_no_rounding_of_a_call() -> None:
    """A weight that is quantized on the way has the numbers of float8."""
    text = BYTES.replace("DEPTH", "256").replace("BYTES", "f32").replace("HALF", "bf16").replace("H[", "bf16[")
    quantized = "q: f8e4m3fn[24, 256] = _to_copy.default(self=w, dtype='f8e4m3fn')\nfloats: "
    text = text.replace("floats: ", quantized).replace(
        "_to_copy.default(self=w, dtype='bf16')", "_to_copy.default(self=q, dtype='bf16')"
    )
    assert "448.0" in check(text, gemm_kernel, FEW, "bf16").source


@pytest.mark.parametrize("config", [FEW, JOINED])
def test_symbolic_rows(config: GemmConfig) -> None:
    text = packed(7, 24, 384, 64, 16, "bf16").replace("[7,", "[n,").replace("x:", "dim n = 1, 64, 1\nx:", 1)
    for rows in (1, 19):
        check(text, gemm_kernel, config, "bf16", {"n": rows})


def test_one_row_is_read_once() -> None:
    """The other rows of the tile are masked."""
    source = check(packed(1, 24, 512, 64, 32, "bf16"), gemm_kernel, FEW, "bf16").source
    loads = [line for line in source.splitlines() if "tl.load(ap" in line]
    assert len(loads) == 4
    assert all("mask=in_m" in line for line in loads)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_values_that_are_computed_in_f32(dtype: str) -> None:
    check(packed(16, 24, 256, 64, 16, dtype, held="f32"), gemm_kernel, MMA, dtype)


@pytest.mark.parametrize("dtype", ["i8", "u8", "i32"])
def test_a_number_that_is_added_may_wrap(dtype: str) -> None:
    """Codes minus 8 as bytes are large, and so no packed operand."""
    text = packed(16, 24, 256, 64).replace("_to_copy.default(self=codes", "_to_copy.default(self=signed")
    signed = f"signed: {dtype}[24, 2, 8, 16] = add.Tensor(self=bytes, other=-8)"
    cast = f"bytes: {dtype}[24, 2, 8, 16] = _to_copy.default(self=codes, dtype='{dtype}')"
    text = text.replace("floats: ", f"{cast}\n{signed}\nfloats: ")
    kernel = check(text, gemm_kernel, MMA)
    assert ("- 24.0" in kernel.source) == (dtype != "u8")


@pytest.mark.parametrize(("number", "is_held"), [(0.5, True), (0.1, False), (2049.0, False)])
def test_numbers_that_halves_lack(number: float, is_held: bool) -> None:
    """PyTorch computes with them in float32, and rounds what comes of it."""
    text = packed(16, 24, 256, 64).replace("self=scaled, size=[24, 256]", "self=times, size=[24, 256]")
    times = f"times: f16[24, 4, 64] = mul.Tensor(self=scaled, other={number})"
    kernel = check(text.replace("wide: ", f"{times}\nwide: "), gemm_kernel, MMA)
    assert ("bitcast=True) - 16.0" in kernel.source) == is_held


def test_other_runs_are_no_packed_operands() -> None:
    def run_of(depth: int, run: int) -> Packing | None:
        return packing(gemm_contraction(region(body(packed(16, 24, depth, 32, run)))))

    assert [run_of(256, 32), run_of(128, 16), run_of(1024, 32)] == [Packing(4, 32), Packing(4, 16), Packing(4, 32)]
    assert [run_of(256, 8), run_of(64, 1)] == [None, None]
    check(packed(16, 24, 64, 32, 1), gemm_kernel, GemmConfig(16, 16, 32), "f16")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_split_k(dtype: str) -> None:
    form = check_split(packed(4, 24, 1024, 128, 32, dtype), 2, dtype)
    contraction = gemm_contraction(region(form.nodes[0].body))  # type: ignore[arg-type]
    assert packing(contraction) == Packing(4, 32)
    assert gemm_problem(region(form.nodes[0].body), contraction, arch_of(80)).dtype == dtype  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sm", "rows", "bits"),
    [
        (80, 1, 4),
        (90, 1, 4),
        (80, 16, 4),
        (89, 16, 4),
        (90, 16, 4),
        (120, 16, 4),
        (90, 512, 4),
        (80, 16, 8),
        (90, 512, 8),
    ],
)
def test_machine_code(sm: int, rows: int, bits: int) -> None:
    """Words and scales are copied to shared memory ahead of time, words 16 bytes at a time; no integer is converted."""
    depth = 4096 if rows == 1 else 2048  # of one row, slices of less are a single step
    text = _code(region(body(packed(rows, 2048, depth, 128, 32, "bf16", bits=bits))), sm)
    assert "cvt.rn.f32.s" not in text
    assert "cvt.rn.f32.u" not in text
    assert "ld.global" not in text
    assert "cp.async.cg.shared.global [ %r" in text


def test_hopper_splits_accumulators_in_registers() -> None:
    """Nothing goes through shared memory but the result, on its way to memory."""
    found = region(body(gated(packed(512, 4096, 2048, 128, 32, "bf16"), 512, 2048), "bf16"))
    config = next(one for one in gemm_configs(found, arch_of(90)) if one.stacked)
    kernel, target = gemm_kernel(found, "kernel", config), Target(90)
    (code,) = compile_kernels([(kernel, target)])[kernel, target].codes
    text = code.ptx.decode()
    assert code.spills <= 8
    *_, last = re.finditer(r"wgmma\.mma_async", text)
    stored = [found.start() for found in re.finditer(r"st\.shared|stmatrix", text)]
    assert stored == [at for at in stored if at > last.end()] != []
    assert len(stored) <= 512 * 64 // (32 * config.num_warps) // 4  # of the result alone, in words
    assert "shfl" not in text


@pytest.mark.parametrize("weight", [4, 8, "i8"])
def test_hopper_multiplies_from_registers(weight: int | str) -> None:
    """What is unpacked never is in shared memory, and products of a step run while the next one is unpacked."""
    text = packed(512, 2048, 2048, 128, 32, "bf16", bits=4 if weight == 4 else 8)
    if weight == "i8":
        text = BYTES.replace("24", "2048").replace("[3,", "[512,").replace("DEPTH", "2048").replace("BYTES", "i8")
    code = _code(region(body(text.replace("HALF", "bf16"), "bf16")), 90)
    products = list(re.finditer(r"wgmma\.mma_async[^;]*\}, \{(%r\d+,?){4}\}, %rd", code))
    assert len(products) > 1
    assert "st.shared" not in code[products[0].start() : products[-1].start()]
    assert max(map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", code))) > 0
    assert weight == "i8" or "prmt" not in code[products[0].start() : products[-1].start()]


def _code(found: Region, sm: int) -> str:
    """The PTX of the kernel in the first configuration, which spills hardly anything."""
    config = next(one for one in gemm_configs(found, arch_of(sm)) if not one.gemv)
    kernel, target = gemm_kernel(found, "kernel", config), Target(sm)
    (code,) = compile_kernels([(kernel, target)])[kernel, target].codes
    assert code.spills <= 8
    return re.sub(r"\s+", " ", code.ptx.decode())


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_configurations_for_packed_operands(sm: int) -> None:
    """Few rows are those of one instruction, of one row with slices of K in the place of others. Hopper's products by
    warpgroups take all parts of a step at once."""

    def offered_for(rows: int) -> list[GemmConfig]:
        found = gemm_configs(region(body(packed(rows, 2048, 2048, 128, 32, "bf16"))), arch_of(sm))
        return [config for config in found if not config.gemv]

    assert {(config.block_m, config.joined) for config in offered_for(8) if config.slices == 1} == {(8, False)}
    assert offered_for(1)[0].slices > 1
    assert any(config.joined for config in offered_for(512)) == (sm == 90)
    assert offered_for(512)[0].block_m >= 32  # a weight is unpacked for many rows at once
    for config in (*offered_for(33), *offered_for(512)):
        assert config.joined == (sm == 90 and config.block_n >= 64 and config.num_warps >= 4)
        assert not config.joined or config.block_n >= 16 * config.num_warps  # none is unpacked twice


def test_few_rows_move_the_packed_bytes() -> None:
    """The model knows that a product of few rows takes as long as its weights are read, and one of many does not."""
    for sm, rows, least, most in ((89, 1, 0.25, 0.6), (89, 16, 0.25, 0.6), (89, 4096, 0.95, 1.4), (90, 512, 1.1, 1.4)):
        wide = PLAIN.replace("ROWS", str(rows))
        plain, ours = (
            offered(body(text, "bf16"), sm)["kernel"].expected_us
            for text in (wide, packed(rows, 32768, 4096, 128, 32, "bf16"))
        )
        assert least < ours / plain < most


def test_tensor_memory_is_limited() -> None:
    """Of each of the four products of a step Triton sums apart, where tensor cores have a memory of their own."""
    found = region(body(packed(128, 256, 1024, 128, 32)))
    kernel, target = gemm_kernel(found, "kernel", GemmConfig(128, 128, 128, num_warps=8)), Target(100)
    problem = compile_kernels([(kernel, target)])[kernel, target].problem
    assert problem == "a block needs 544 columns of tensor memory, sm_100 has 512"
