"""Loops over rows and sums over all rows in one kernel, in Triton's interpreter against ATen."""

from __future__ import annotations

import pytest
import torch

from tests.doubles.interpreter import run
from tests.lowering.kernels import kernel_bodies
from tests.lowering.kernels.kernel_bodies import body, check_split, empty, offered, random_tensor
from torch_rtx.errors import Unsupported
from torch_rtx.ir import attr_values, verify
from torch_rtx.lowering.kernels import row_blocks
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families import loop
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.row_blocks import TILES
from torch_rtx.lowering.kernels.split_columns import separate_columns, split_columns
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import Target, arch_of

LAYER_NORM = """
x: f32[ROWS, 40]
w: f32[40]
b: f32[40]
g: H[ROWS, 40]
r: f32[ROWS, 40]
y: f32[ROWS, 40], m: f32[ROWS1], s: f32[ROWS1] = native_layer_norm.default(input=x, normalized_shape=[40], weight=w, \
bias=b, eps=1e-05)
h: H[ROWS, 40] = _to_copy.default(self=y, dtype='HALF')
f: f32[ROWS, 40] = _to_copy.default(self=g, dtype='f32')
a: f32[ROWS, 40] = mul.Tensor(self=f, other=w)
c: f32[ROWS, 40] = sub.Tensor(self=x, other=m)
n: f32[ROWS, 40] = mul.Tensor(self=c, other=s)
d: f32[ROWS, 40] = mul.Tensor(self=a, other=n)
t: f32[ROWS1] = mean.dim(self=d, dim=[-1], keepdim=True)
u: f32[ROWS1] = mean.dim(self=a, dim=[-1], keepdim=True)
e: f32[ROWS, 40] = mul.Tensor(self=n, other=t)
i: f32[ROWS, 40] = sub.Tensor(self=a, other=e)
j: f32[ROWS, 40] = sub.Tensor(self=i, other=u)
k: f32[ROWS, 40] = mul.Tensor(self=j, other=s)
l: f32[ROWS, 40] = add.Tensor(self=r, other=k)
q: H[ROWS, 40] = _to_copy.default(self=l, dtype='HALF')
dy: f32[ROWS, 40] = mul.Tensor(self=f, other=n)
dw: f32[40] = sum.dim_IntList(self=dy, dim=[OUTER])
db: f32[40] = sum.dim_IntList(self=f, dim=[OUTER])
o: H[40] = sum.dim_IntList(self=q, dim=[OUTER])
return h, l, q, dw, db, o"""
SOFTMAX = """
p: H[23, 50]
g: H[23, 50]
m: H[23, 50] = mul.Tensor(self=p, other=g)
t: H[23, 1] = sum.dim_IntList(self=m, dim=[1], keepdim=True)
s: H[23, 50] = sub.Tensor(self=g, other=t)
d: H[23, 50] = mul.Tensor(self=s, other=p)
b: H[1, 50] = sum.dim_IntList(self=d, dim=[0], keepdim=True)
return d, b"""
RMS_NORM = """
x: H[3, 5, 4, 9]
w: H[4, 9]
g: H[3, 5, 4, 9]
f: f32[3, 5, 4, 9] = _to_copy.default(self=x, dtype='f32')
q: f32[3, 5, 4, 9] = mul.Tensor(self=f, other=f)
m: f32[3, 5, 1, 1] = mean.dim(self=q, dim=[2, 3], keepdim=True)
s: f32[3, 5, 1, 1] = rsqrt.default(self=m)
n: f32[3, 5, 4, 9] = mul.Tensor(self=f, other=s)
y: f32[3, 5, 4, 9] = mul.Tensor(self=n, other=w)
a: f32[3, 5, 4, 9] = mul.Tensor(self=g, other=n)
d: f32[4, 9] = sum.dim_IntList(self=a, dim=[0, 1])
return y, s, d"""


def layer_norm(rows: str, dtype: str = "f16") -> str:
    """The gradients of a layer norm, and of the bias before it, of `rows` rows."""
    outer = ", ".join(map(str, range(rows.count(",") + 1)))
    text = LAYER_NORM.replace("ROWS1", f"{rows}, 1").replace("ROWS", rows).replace("OUTER", outer)
    return text.replace("HALF", dtype)


@pytest.mark.parametrize("rows", ["24", "29"])
def test_tiles_are_loaded_ahead(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are reduced, and a program has more steps than that."""
    monkeypatch.setattr(row_blocks, "TILES", ((64, 1),))
    parts, _ = check_split(layer_norm(rows), 4, "f16").nodes
    assert parts.body is not None
    found = region(parts.body)
    first, second = row_blocks.block_configs(found)
    assert (first.ahead, second.ahead) == (row_blocks.AHEAD, 1)
    assert "in tl.range(0, 4, 1, num_stages=3):" in row_blocks.block_kernel(found, "k", first).source
    monkeypatch.setattr(row_blocks, "AHEAD_BYTES", 3 * 64 * (2 + 4 + 4) - 1)
    assert [config.ahead for config in row_blocks.block_configs(found)] == [1]


@pytest.mark.parametrize("block", [4, 6])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("rows", ["24", "3, 8", "29", "3, 7"])
def test_gradients_of_a_layer_norm(rows: str, dtype: str, block: int) -> None:
    """Also of a number of rows that blocks do not divide."""
    form = check_split(layer_norm(rows, dtype), block, dtype)
    parts, total = form.nodes
    stored = [value.type.shape for value in parts.results]  # type: ignore[union-attr]
    whole = [shape for shape in stored if shape[-1] == 40 and len(shape) == rows.count(",") + 2 and 1 not in shape]
    assert len(whole) == 3  # what the loop has to store: nothing of that size is for the sums
    assert len(total.results) == 3


@pytest.mark.parametrize("text", [SOFTMAX, RMS_NORM])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_other_rows(text: str, dtype: str) -> None:
    check_split(text, 4, dtype)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_any_number_of_rows(size: int) -> None:
    text = "dim z = 1, 64, 1\n" + layer_norm("z, 3").strip()
    form = check_split(text, 8, dims={"z": size})
    assert str(form.nodes[0].outputs[0].type) == "f32[((7 + (3 * z)) // 8), 1, 40]"  # type: ignore[union-attr]


@pytest.mark.parametrize("size", ["29, 384", "24, 384", "3, 7, 200", "33, 4, 24"])
def test_columns_beside_no_rows(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program has some columns of a block, and the gradient of a bias is summed where that of its layer is made."""
    monkeypatch.setattr(kernel_bodies, "split_in", split_columns)
    monkeypatch.setattr(loop, "PROGRAMS_PER_PROCESSOR", 0)  # as if there were many rows
    text = f"""
        g: H[{size}]
        x: H[{size}]
        y: H[{size}] = gelu.default(self=x)
        d: H[{size}] = gelu_backward.default(grad_output=g, self=x)
        b: H[{size.partition(", ")[2]}] = sum.dim_IntList(self=d, dim=[0])
        return y, d, b"""
    parts, _ = check_split(text, 8).nodes
    kernel = generate(parts.body, "k", arch_of(80), 0)  # type: ignore[arg-type]
    assert kernel is not None
    assert "for start in range(0, 8, " in kernel.source
    assert ("column = program % 3 * 128" in kernel.source) == ("384" in size)


@pytest.mark.parametrize(("rows", "first"), [(4096, True), (16, False)])
def test_blocks_are_tried_where_there_are_enough(rows: int, first: bool) -> None:
    call = "sum.dim_IntList(self=x, dim=[1], keepdim=True, dtype='f32')"
    graph = body(f"x: H[{rows}, 16, 768]\nb: f32[{rows}, 1, 768] = {call}\nreturn b")
    kernel = generate(graph, "k", arch_of(90), 0)
    assert kernel is not None
    assert ("for start" in kernel.source) == first


def test_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tile, it divides a block, and results are right."""
    for tile in TILES:
        monkeypatch.setattr(row_blocks, "TILES", [tile])
        form = check_split(layer_norm("29"), 16)
        (config,) = row_blocks.block_configs(region(form.nodes[0].body))  # type: ignore[arg-type]
        assert 16 % config.rows == 0
        assert config.elements == 64


@pytest.mark.parametrize(("columns", "sm"), [(768, 80), (1024, 90), (4096, 120)])
def test_the_first_configuration_fits(columns: int, sm: int) -> None:
    text = layer_norm("8, 512").replace("40", str(columns))
    parts = split_columns(body(text), "k", 8).nodes[0]
    kernel = generate(parts.body, "k", arch_of(sm), 0)  # type: ignore[arg-type]
    assert kernel is not None
    (built,) = compile_kernels([(kernel, Target(sm))]).values()
    assert (built.problem, built.spills) == (None, 0)


def test_the_loop_loads_before_it_reduces() -> None:
    parts = split_columns(body(layer_norm("24")), "k", 4).nodes[0]
    kernel = generate(parts.body, "k", arch_of(90), 0)  # type: ignore[arg-type]
    assert kernel is not None
    loop = kernel.source.partition("for start in ")[2]
    assert "tl.load(" not in loop[loop.index("tl.sum(") :]
    assert loop.count("tl.load(") == 3


@pytest.mark.parametrize(
    "text",
    [
        SOFTMAX.replace("sum.dim_IntList(self=d, dim=[0]", "amax.default(self=d, dim=[0]"),  # no sum
        SOFTMAX.replace("return d, b", "u: H[23, 50] = sub.Tensor(self=d, other=b)\nreturn d, u"),  # needed by the rows
        "z: H[46, 50]\n" + SOFTMAX.strip().replace("self=d, dim=[0]", "self=z, dim=[0]"),  # other rows
        "z: H[21, 50]\n" + SOFTMAX.strip().replace("self=d, dim=[0]", "self=z, dim=[0]"),
    ],
)
def test_what_is_no_such_loop(text: str) -> None:
    with pytest.raises(Unsupported):
        kernels_of(text)


def kernels_of(text: str) -> list[Kernel | None]:
    """The kernels of the split form."""
    first, second = (node.body for node in split_columns(body(text), "k", 4).nodes)
    assert first is not None
    assert second is not None
    found = region(first)
    row_blocks.row_blocks(found)
    return [generate(part, "k", arch_of(90), 0) for part in (first, second)]


def test_the_other_way_stores_statistics_of_rows() -> None:
    """What sums need beside what is stored anyway is computed again."""
    whole = body(layer_norm("24", "f32"), "f32")
    form = separate_columns(whole, "k")
    verify(form, ALLOWED)
    rows, columns = form.nodes
    assert [str(value.type) for value in rows.results[3:]] == ["f32[24, 1]"] * 2
    assert len(columns.results) == 3
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in whole.inputs]
    cpu, values = torch.device("cpu"), dict(zip((value.name for value in whole.inputs), inputs, strict=True))
    for node in form.nodes:
        kernel = generate(node.body, node.op, arch_of(80), 0)  # type: ignore[arg-type]
        assert kernel is not None
        made = {value.name: empty(value.type, {}) for value in node.results}
        run(kernel, [*(values[value.name] for value in node.inputs), *made.values()], {})
        values |= made
    expected = compile_graph(whole, cpu)(inputs, ())
    torch.testing.assert_close([values[value.name] for value in attr_values(form.outputs)], expected)


@pytest.mark.parametrize("sm", [86, 90, 120])
def test_tactics(sm: int) -> None:
    """No kernel alone computes such a region; the two ways are rivals."""
    found = offered(body(layer_norm("2048").replace("40", "768")), sm)
    assert found.keys() == {"split", "separate"}
    assert all(tactic.kernels and tactic.body is not None for tactic in found.values())
