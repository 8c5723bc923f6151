"""Loop kernels: their source as text, 64-bit indices, configurations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, random_tensor
from torch_rtx.errors import Unsupported
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families.loop import FAMILY
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_configs, loop_kernel, repeated_configs
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.rows import PERSISTENT
from torch_rtx.targets import Target, arch_of

SOURCES = Path(__file__).with_name("sources")
BODIES = {
    "residual and norm": """graph import {
  input in0: f16[8, 384, 768]
  input in1: f16[3072, 768]
  input in2: f16[768]
  v3: f16[8, 384, 768] = op aten.view.default(self=in1, size=[8, 384, 768])
  v4: f16[8, 384, 768] = op aten.add.Tensor(self=in0, other=v3)
  v5: f16[8, 384, 768] = op aten.layer_norm.default(input=v4, normalized_shape=[768], weight=in2)
  return [v4, v5]
}
""",
    "heads of a slice, any batch": """graph import {
  dim s0 = 1, 64, 1
  input in0: f16[s0, 16, 96]
  v1: f16[s0, 16, 64]((16 * 96), 96, 1) = op aten.slice.Tensor(self=in0, dim=2, start=0, end=64)
  v2: f16[s0, 16, 4, 16]((16 * 96), 96, 16, 1) = op aten.view.default(self=v1, size=[s0, 16, 4, 16])
  v3: f16[s0, 4, 16, 16]((16 * 96), 16, 96, 1) = op aten.permute.default(self=v2, dims=[0, 2, 1, 3])
  v4: f16[s0, 4, 16, 16] = op aten.relu.default(self=v3)
  return [v4]
}
""",
    "positions from a mask": """graph import {
  input in0: i64[4, 77]
  v1: bool[4, 77] = op aten.ne.Scalar(self=in0, other=1)
  v2: i64[4, 77] = op aten.cumsum.default(self=v1, dim=1)
  v3: i64[4, 77] = op aten.mul.Tensor(self=v2, other=v1)
  return [v3]
}
""",
    "the largest of long rows": """graph import {
  input in0: f16[80, 32000]
  v1: i64[80] = op aten.argmax.default(self=in0, dim=-1)
  return [v1]
}
""",
    "softmax of long rows": """graph import {
  input in0: f32[5, 9000]
  v1: f32[5, 9000] = op aten.softmax.int(self=in0, dim=-1)
  return [v1]
}
""",
    "groups of images side by side": """graph import {
  input in0: f16[2, 40, 8, 8](2560, 1, 320, 40)
  input in1: f16[2, 24, 8, 8](1536, 1, 192, 24)
  v2: f16[2, 64, 8, 8](4096, 1, 512, 64) = op aten.cat.default(tensors=[in0, in1], dim=1)
  v3: f16[2, 64, 8, 8](4096, 1, 512, 64) = op aten.group_norm.default(input=v2, num_groups=8)
  return [v3]
}
""",
    "means of columns": """graph import {
  input in0: f16[64, 49, 512]
  v1: f16[64, 512] = op aten.mean.dim(self=in0, dim=[1])
  return [v1]
}
""",
}
BODIES = {name: text.replace("(16 * 96)", "1536") for name, text in BODIES.items()}


@pytest.mark.quick
@pytest.mark.parametrize("name", BODIES)
def test_source(name: str) -> None:
    """The text is what it was: whoever changes it reads the difference, and writes the file anew."""
    kernel = loop_kernel(region(parse(BODIES[name])), "kernel")
    assert kernel.source == (SOURCES / f"loops, {name}.txt").read_text()


@pytest.mark.parametrize(("most", "wide"), [("None", True), ("1000000", False), ("100000000000", True)])
def test_indices_have_the_bits_that_sizes_need(most: str, wide: bool) -> None:
    body = parse(f"""graph import {{
  dim s0 = 1, {most}, 1
  input in0: f32[s0, 128]
  v1: f32[s0] = op aten.sum.dim_IntList(self=in0, dim=[1])
  return [v1]
}}
""")
    kernel = loop_kernel(region(body), "kernel")
    assert kernel.wide is wide
    given, found = torch.randn(7, 128), torch.full((7,), torch.nan)
    run(kernel, [given, found], {"s0": 7})
    torch.testing.assert_close(found, given.sum(1))


@pytest.mark.quick
def test_configurations_get_smaller_and_stay_right() -> None:
    found = region(
        parse(BODIES["residual and norm"].replace("8, 384, 768", "2, 3, 768").replace("3072, 768", "6, 768"))
    )
    configs = loop_configs(found)
    assert len(configs) == len(set(configs)) > 2
    x, y, weight = torch.randn(2, 3, 768).half(), torch.randn(6, 768).half(), torch.randn(768).half()
    expected = torch.nn.functional.layer_norm(x + y.view(2, 3, 768), [768], weight)
    for config in [*configs, LoopConfig(2, 256, 4)]:  # the last one in steps
        outputs = [torch.full((2, 3, 768), torch.nan, dtype=torch.float16) for _ in range(2)]
        run(loop_kernel(found, "kernel", config), [x, y, weight, *outputs])
        torch.testing.assert_close(outputs[1], expected, rtol=2e-3, atol=4e-3)


CHANNELS = """
x: H[3, C, 7, 5](INNER)
scale: f32[C]
bias: f32[1, C, 1, 1]
s: f32[C, 1, 1] = view.default(self=scale, size=[C, 1, 1])
y: f32[3, C, 7, 5](INNER) = mul.Tensor(self=x, other=s)
z: f32[3, C, 7, 5](INNER) = add.Tensor(self=y, other=bias)
r: H[3, C, 7, 5](INNER) = _to_copy.default(self=z, dtype='H')
return r
"""
ROWS = """
x: H[70, C]
scale: H[C]
each: f32[70, 1]
y: H[70, C] = mul.Tensor(self=x, other=scale)
z: f32[70, C] = add.Tensor(self=y, other=each)
return z
"""


def repeating(text: str, count: int, dtype: str) -> str:
    """`text` with `count` channels, in which an operand repeats."""
    text = text.replace("INNER", f"{35 * count}, 1, {5 * count}, {count}").replace("'H'", f"'{dtype}'")
    return text.replace("C", str(count)).replace("H[", f"{dtype}[")


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize(("text", "count"), [(CHANNELS, 64), (CHANNELS, 192), (ROWS, 64), (ROWS, 128)])
def test_operands_that_repeat_are_read_once_for_several_rows(text: str, count: int, dtype: str) -> None:
    text = repeating(text, count, dtype)
    configs = repeated_configs(region(body(text)))
    assert len(configs) == 2
    for config in configs:
        assert "tl.load(scale + (R))" in check(text, loop_kernel, config).source
    assert configs[0] not in loop_configs(region(body(text)))  # of so few rows


def test_operands_repeat_along_many_rows_of_whole_blocks() -> None:
    many = region(body(repeating(ROWS, 128, "f16").replace("70", "70000")))
    assert loop_configs(many)[0] == repeated_configs(many)[0]
    for text in (
        ROWS.replace("70", "70000").replace("C", "96"),
        "x: H[70000, 64]\ny: H[70000, 64] = sin.default(self=x)\nreturn y",
    ):
        found = region(body(text))
        assert not repeated_configs(found)
        assert not any(config.repeated for config in loop_configs(found))


def test_what_is_no_loop() -> None:
    rows = parse("""graph import {
  input in0: f32[4, 8]
  v1: f32[4] = op aten.sum.dim_IntList(self=in0, dim=[1])
  v2: f32[8] = op aten.sum.dim_IntList(self=in0, dim=[0])
  return [v1, v2]
}
""")
    with pytest.raises(Unsupported, match="rows of 4 and of 8 elements in one kernel"):
        loop_kernel(region(rows), "kernel")
    product = parse("""graph import {
  input in0: f32[4, 4]
  v1: f32[4, 4] = op aten.mm.default(self=in0, mat2=in0)
  return [v1]
}
""")
    with pytest.raises(Unsupported, match="aten.mm.default as a plain loop"):
        loop_kernel(region(product), "kernel")


def test_scans_and_positions_for_every_target() -> None:
    targets = [Target(sm) for sm in (75, 80, 86, 89, 90, 120)]
    bodies = [BODIES["positions from a mask"], BODIES["the largest of long rows"]]
    bodies += [
        bodies[0].replace("cumsum", "cumprod"),
        bodies[1].replace("32000", "1000"),
        f"""graph import {{
  input in0: bf16[3, {PERSISTENT}]
  v1: bf16[3, {PERSISTENT}] = op aten.cumsum.default(self=in0, dim=1)
  v2: bf16[3], v3: i64[3] = op aten.min.dim(self=in0, dim=1)
  return [v1, v2, v3]
}}
""",
    ]
    for text in bodies:
        found = region(parse(text))
        fitting = targets[1:] if "bf16" in text else targets
        wanted = [(loop_kernel(found, "kernel"), target) for target in fitting]
        assert [built.problem for built in compile_kernels(wanted).values()] == [None] * len(wanted), text


@pytest.mark.parametrize(
    "text",
    [
        "n: f32[s, 6, h, w] = group_norm.default(input=x, num_groups=3, weight=None, bias=None)\nreturn n",
        "a: f32[s, 6, (h * w)] = view.default(self=x, size=[s, 6, -1])\n"
        "n: f32[s, 6, (h * w)] = softmax.int(self=a, dim=-1)\nreturn n",
        "n: f32[6] = sum.dim_IntList(self=x, dim=[0, 2, 3])\nreturn n",
        "g: bool[s, 6, h, w] = gt.Scalar(self=x, other=-2.0)\nn: bool[()] = all.default(self=g)\nreturn n",
        "g: bool[s, 6, h, w] = gt.Scalar(self=x, other=1.0)\nn: bool[6] = any.dims(self=g, dim=[0, 2, 3])\nreturn n",
    ],
)
def test_rows_of_images_of_any_size(text: str) -> None:
    """How many rows there are follows from what is reduced, where no result has as many elements."""
    text = f"dim s = 1, 64, 1\ndim h = 2, 64, 1\ndim w = 2, 64, 1\nx: f32[s, 6, h, w]\n{text}"
    kernel = check(text, loop_kernel, None, dims={"s": 2, "h": 3, "w": 5})
    assert compile_kernels([(kernel, Target(80))])[kernel, Target(80)].problem is None


def test_parts_whose_neighbours_nobody_reads() -> None:
    """A result that is not used has no type: the others have theirs all the same."""
    text = """in0: f32[2, 16, 4, 4]
v1: f32[16, 4, 4], _ = unbind.int(self=in0)
v2: f32[16, 4, 4] = exp.default(self=v1)
_, v3: f32[16, 4, 4] = unbind.int(self=in0)
v4: f32[16, 4, 4] = relu.default(self=v3)
return v2, v4
"""
    check(text, loop_kernel, None)


LOGARITHM = "x: H[9, 120]\ny: H[9, 120] = log_softmax.int(self=x, dim=1)\nreturn y"
PROBABILITIES = LOGARITHM.replace("log_softmax", "softmax")


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("text", [LOGARITHM, PROBABILITIES])
def test_a_maximum_and_exponentials_below_it_in_one_loop(text: str, dtype: str) -> None:
    graph = body(text, dtype)
    kernel = loop_kernel(region(graph), "softmax", LoopConfig(2, 32, 4))
    assert kernel.source.count("for start") == 2  # of the statistics, and of the results
    (x,) = (random_tensor(value.type, {}) for value in graph.inputs)
    x[1], x[2, 5], x[3, 7], x[4, :100], x[5] = -math.inf, math.inf, math.nan, -math.inf, -3e38
    x[6, 3], x[7, :64], x[8], x[8, 117] = 1e5, -math.inf, -math.inf, 1
    y = torch.empty_like(x)
    run(kernel, [x, y], {})
    expected = (x.double().log_softmax(1) if text == LOGARITHM else x.double().softmax(1)).to(x.dtype)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_another_difference_takes_two_loops() -> None:
    """What is taken from x is not its own maximum, or that of another row."""
    other = """
        x: H[120, 120]
        z: H[120, 120]
        m: H[120, 1] = amax.default(self=z, dim=[1], keepdim=True)
        d: H[120, 120] = sub.Tensor(self=x, other=m)
        e: H[120, 120] = exp.default(self=d)
        s: H[120, 1] = sum.dim_IntList(self=e, dim=[1], keepdim=True)
        return s"""
    assert check(other, loop_kernel, LoopConfig(2, 32, 4), "f32").source.count("for start") == 2


ONE_HOT = """
    i: i64[6, 1]
    v: H[6, 1]
    z: H[6, 40] = full.default(size=[6, 40], fill_value=0.0, dtype='DTYPE', device='main')
    h: H[6, 40] = scatter.src(self=z, dim=1, index=i, src=v)
    """


@pytest.mark.parametrize(
    ("rest", "reductions"),
    [
        ("s: H[6, 1] = sum.dim_IntList(self=h, dim=[1], keepdim=True)\nreturn s", 0),
        ("e: H[6, 40](1, 0) = expand.default(self=v, size=[6, 40])\na: H[6, 40] = add.Tensor(self=h, other=e)\n"
         "s: H[6, 1] = sum.dim_IntList(self=a, dim=[1], keepdim=True)\nreturn s", 0),
        ("s: H[6, 1] = sum.dim_IntList(self=h, dim=[1], keepdim=True)\n"
         "y: H[6, 40] = sub.Tensor(self=h, other=s)\nreturn y, s", 0),
        ("c: H[()] = full.default(size=[], fill_value=0.5, dtype='DTYPE', device='main')\n"
         "a: H[6, 40] = add.Tensor(self=h, other=c)\n"
         "s: H[6, 1] = sum.dim_IntList(self=a, dim=[1], keepdim=True)\nreturn s", 0),
        ("s: H[1, 40] = sum.dim_IntList(self=h, dim=[0], keepdim=True)\nreturn s", 1),
        ("q: H[6, 40] = mul.Tensor(self=h, other=h)\n"
         "s: H[6, 1] = sum.dim_IntList(self=q, dim=[1], keepdim=True)\nreturn s", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_known_sums(rest: str, reductions: int, dtype: str) -> None:
    """A sum along which one element, or none, differs from zero or from the others is no reduction."""
    text = (ONE_HOT + rest).replace("DTYPE", dtype)
    check(text, loop_kernel, LoopConfig(4, 16, 4), dtype)
    assert str(region(body(text, dtype))).count("reduce") == reductions


PADDED = """
    x: H[9, 117]
    y: H[9, 117] = softmax.int(self=x, dim=1)
    m: H[9, 1] = amax.default(self=x, dim=[1], keepdim=True)
    p: H[9, 120] = constant_pad_nd.default(self=y, pad=[0, 3], value=0.5)
    return m, p"""


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_are_stored_with_a_padding(dtype: str) -> None:
    assert "range(0, 120, 32)" in check(PADDED, loop_kernel, LoopConfig(2, 32, 4), dtype).source
    with pytest.raises(Unsupported, match="at once"):
        loop_kernel(region(body(PADDED, dtype)), "kernel")


def test_longer_rows_of_results_are_written_in_steps() -> None:
    longer = PADDED.replace("117", "9216").replace("120", "9219")
    equal = longer.replace("9219", "9216").replace("[0, 3]", "[0, 0]")
    for text, held in ((longer, False), (equal, True)):
        configs = loop_configs(region(body(text)))
        assert any(config.held for config in configs) == held
        loop_kernel(region(body(text)), "kernel", configs[0])


QUANTIZED = """
heads: H[1, 2, 5, SIDE](10, 5, 1, 10)
both: H[1, 5, REST]
t: H[1, 5, 2, SIDE](10, 1, 5, 10) = transpose.int(self=heads, dim0=1, dim1=2)
c: H[1, 5, 2, SIDE] = clone.default(self=t, memory_format='contiguous_format')
one: H[1, 5, TWO] = view.default(self=c, size=[1, 5, -1])
g: H[1, 5, REST] = gelu.default(self=both, approximate='tanh')
x: H[1, 5, ALL] = cat.default(tensors=[one, g], dim=-1)
wide: f32[1, 5, ALL] = _to_copy.default(self=x, dtype='f32')
size: f32[1, 5, ALL] = abs.default(self=wide)
most: f32[1, 5, 1] = amax.default(self=size, dim=[-1], keepdim=True)
least: f32[1, 5, 1] = clamp.default(self=most, min=1e-30)
scale: f32[1, 5, 1] = div.Tensor(self=least, other=448)
y: f32[1, 5, ALL] = div.Tensor(self=wide, other=scale)
return scale, y
"""


@pytest.mark.parametrize(
    ("side", "rest", "tiles"),
    [(64, 256, 3), (192, 256, 5), (320, 640, 5), (128, 256, 2), (2048, 8192, 3), (48, 256, 0), (1024, 2048, 0)],
)
def test_rows_are_held_in_registers_in_several_tiles(side: int, rest: int, tiles: int) -> None:
    text = QUANTIZED.replace("SIDE", str(side)).replace("REST", str(rest)).replace("TWO", str(2 * side))
    text = text.replace("ALL", str(2 * side + rest))
    held = [config for config in loop_configs(region(body(text))) if config.held]
    assert bool(held) == bool(tiles)
    for config in held:
        kernel = check(text, loop_kernel, config)
        assert kernel.source.count("tl.store(out1") == tiles
        assert "start" not in kernel.source
        assert "tl.sigmoid" not in kernel.source
        if (2 * side) % config.elements == 0:  # no tile has elements of both tensors
            assert "tl.where(c" not in kernel.source
            assert kernel.source.count("tl.load(") == tiles
    assert all("in_r" not in loop_kernel(region(body(text)), "kernel", config).source for config in held)


def test_a_warp_of_its_own_reads_the_weights_of_a_row() -> None:
    text = """
    x: H[6, 384]
    weight: H[384]
    y: H[6, 384] = layer_norm.default(input=x, normalized_shape=[384], weight=weight)
    return y
    """
    few, *_ = [config for config in loop_configs(region(body(text))) if config.held]
    assert few == LoopConfig(4, 128, 4, held=True)
    assert loop_configs(region(body(text)))[0] != few  # of so few rows
    assert loop_configs(region(body(text.replace("6,", "6000,"))))[0] == few
    assert "weight + (R) + tl.zeros([4, 128], tl.int32)" in check(text, loop_kernel, few).source


SCALED = """
x: f16[ROWS, 3, SIZE]
columns: f32[SIZE]
rows: f32[ROWS, 3, 1]
bias: f16[SIZE]
s: f32[ROWS, 3, SIZE] = mul.Tensor(self=x, other=columns)
t: f32[ROWS, 3, SIZE] = mul.Tensor(self=s, other=rows)
u: f32[ROWS, 3, SIZE] = add.Tensor(self=t, other=bias)
y: f32[ROWS, 3, SIZE] = layer_norm.default(input=u, normalized_shape=[SIZE])
size: f32[ROWS, 3, SIZE] = abs.default(self=y)
most: f32[ROWS, 3, 1] = amax.default(self=size, dim=[-1], keepdim=True)
q: f32[ROWS, 3, SIZE] = div.Tensor(self=y, other=most)
return most, q
"""


@pytest.mark.parametrize("size", [64, 384, 1152])
def test_rows_of_a_program_share_what_repeats_along_them(size: int) -> None:
    text = SCALED.replace("ROWS", "4").replace("SIZE", str(size))
    usual = loop_configs(region(body(text)))[0]
    for sharing in (2, 3):
        config = replace(usual, rows=2 if usual.rows > 1 else 1, sharing=sharing)
        source = check(text, loop_kernel, config).source
        tiles = size // config.elements if config.held else 1
        assert [source.count(f"tl.load({name} ") for name in ("columns", "bias")] == [tiles, tiles]
        assert source.count("tl.load(x ") == sharing * tiles
    with pytest.raises(Unsupported, match="beside each other"):
        loop_kernel(region(body(text)), "kernel", replace(usual, rows=1, sharing=5))


def test_programs_have_several_rows_where_caches_are_read_less() -> None:
    """Vectors of float32 beside one tensor of halves, not beside several, and not where rows are few or long."""
    for rows, size, wanted in ((1024, 3072, True), (1024, 12288, False), (64, 3072, False), (1025, 3072, False)):
        found = region(body(SCALED.replace("ROWS", str(rows)).replace("SIZE", str(size))))
        usual, *_ = loop_configs(found)
        configs = FAMILY.configs(found, arch_of(90))
        assert (configs[0] == replace(usual, sharing=2)) == wanted
        assert configs[int(wanted)] == usual


def test_warps_with_rows_of_their_own_read_four_floats_each() -> None:
    """Beside vectors of float32; those of halves are loads of eight."""
    text = SCALED.replace("ROWS", "1024").replace("SIZE", "768")
    for floats in (True, False):
        found = region(body(text if floats else text.replace("columns: f32", "columns: f16")))
        usual, *_ = loop_configs(found)
        assert usual == LoopConfig(4, 256, 4, held=True)
        assert FAMILY.configs(found, arch_of(90))[0] == (replace(usual, elements=128) if floats else usual)


def test_one_element_is_read_for_a_tile_of_masks() -> None:
    """Rows of no elements have tiles of one: the mask of a position is a tile, and the address of `w` is none."""
    text = """
x: H[3, 1]
w: H[1]
i: i64[0]
p: H[3, 1] = mul.Tensor(self=x, other=w)
q: H[0, 1] = index.Tensor(self=p, indices=[i])
y: H[()] = sum.dim_IntList(self=q, dim=[0, 1])
return y
"""
    check(text, loop_kernel, loop_configs(region(body(text)))[0])


CUT = """
x: H[5, 136]
c: H[5, 133](136, 1) = slice.Tensor(self=x, dim=1, start=0, end=133)
y: H[5, 133] = clone.default(self=c, memory_format='contiguous_format')
s: H[5] = logsumexp.default(self=y, dim=[1])
m: H[5] = amax.default(self=y, dim=[1])
return y, s, m"""


@pytest.mark.parametrize(("pitch", "reads_vectors"), [(136, True), (134, False)])
def test_rows_that_end_within_a_vector(pitch: int, reads_vectors: bool) -> None:
    """They are read to its end, where rows have something there, and what lies there has no part in a result; a copy of
    them is stored as they are read for their statistics."""
    graph = body(CUT.replace("136", str(pitch)), "f16")
    (x,) = (random_tensor(value.type, {}) for value in graph.inputs)
    x[:, 133:] = torch.tensor([math.inf, math.nan, 1e4])[: pitch - 133]
    kernel = loop_kernel(region(graph), "kernel", LoopConfig(1, 32, 4))
    assert ("mask=(R < 136)" in kernel.source) == reads_vectors
    assert kernel.source.count("for start") == kernel.source.count("= tl.load(") == 2  # none for the copy
    results = [torch.empty(5, 133).half(), torch.empty(5).half(), torch.empty(5).half()]
    run(kernel, [x, *results], {})
    given = x[:, :133].double()
    for found, expected in zip(results, (given, given.logsumexp(1), given.amax(1)), strict=True):
        torch.testing.assert_close(found, expected.half())


STEADY = """
x: H[27, 2, 2541]
m: H[54, 1]
r: i64[54, 1]
v: H[54, 2541] = view.default(self=x, size=[54, 2541])
d: H[54, 2541] = sub.Tensor(self=v, other=m)
z: H[54, 2541] = full.default(size=[54, 2541], fill_value=0.0, dtype='DTYPE', device='main')
h: H[54, 2541] = scatter.value(self=z, dim=1, index=r, value=2.0)
e: H[54, 2541] = add.Tensor(self=d, other=h)
y: H[54, 2544] = constant_pad_nd.default(self=e, pad=[0, 3], value=7.0)
return y"""


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_what_a_row_has_once_is_read_once_for_a_piece_of_it(dtype: str) -> None:
    text = STEADY.replace("DTYPE", dtype)
    graph = body(text, dtype)
    config = loop_configs(region(graph))[0]
    assert config.steady
    kernel = check(text, loop_kernel, config, dtype)
    assert "tl.load(m + (X))" in kernel.source
    assert "tl.load(r + (X))" in kernel.source
    assert "//" not in kernel.source.partition("R = ")[2].partition("\n")[2]  # no element divides its index


@pytest.mark.parametrize("strides", ["(199680, 3072, 64, 1)", "(199680, 3072, 1, 48)"])
def test_channels_that_do_not_follow_each_other_are_steady_rows(strides: str) -> None:
    text = f"""
x: H[1, 65, 48, 64]{strides}
w: H[65, 1, 1]
b: H[65, 1, 1]
m: H[1, 65, 48, 64]{strides} = mul.Tensor(self=x, other=w)
y: H[1, 65, 48, 64]{strides} = add.Tensor(self=m, other=b)
return y"""
    config = loop_configs(region(body(text)))[0]
    assert config == LoopConfig(1, 1024, 4, steady=True)
    kernel = check(text, loop_kernel, config)
    assert "tl.load(w + (X))" in kernel.source
    few = region(body(text.replace("65", "40").replace("199680", "122880")))
    assert not loop_configs(few)[0].steady  # of many short programs
