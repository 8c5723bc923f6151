"""Kernels that add in memory, or put values there, in Triton's interpreter: duplicates, ranges of positions, dtypes,
neighbours."""

from __future__ import annotations

import pytest
import torch

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, offered
from tests.lowering.kernels.test_kernel_ops import Body
from torch_rtx.accumulation import continued
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Node, verify
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.loops import loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import arch_of

A = torch.ops.aten
DTYPES8 = {"f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}
DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def calls(dtype: torch.dtype):
    """Calls with many duplicates."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul(9).to(dtype)

    def positions(size: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, size, shape)

    table, cube = drawn(6, 20), drawn(3, 6, 10)
    one, two = positions(6, 30, low=-6), positions(20, 7, 1, low=-20)
    yield A.index_put.default, (table, [one], drawn(30, 20), True), {}
    yield A.index_put.default, (table, [one], drawn(20), True), {}  # the same for each position
    yield A.index_put.default, (table, [None, two], drawn(6, 7, 1), True), {}
    yield A._unsafe_index_put.default, (cube, [positions(3, 7, 1), positions(6, 5)], drawn(7, 5, 10), True), {}
    yield A.index_put.default, (cube, [None, positions(6, 4).int(), positions(10, 4)], drawn(3, 4), True), {}
    yield A.index_add.default, (cube, 1, positions(6, 40), drawn(3, 40, 10)), {}
    yield A.index_add.default, (cube, -1, positions(10, 7).int(), drawn(3, 6, 7)), {"alpha": 3}
    yield A.scatter_add.default, (cube, 1, positions(6, 2, 9, 10), drawn(3, 9, 11)), {}
    yield A.scatter_reduce.two, (table, 0, positions(6, 40, 20), drawn(40, 20), "sum"), {}
    yield A.scatter_reduce.two, (table, -1, positions(20, 6, 0), drawn(6, 0), "sum"), {"include_self": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for op, args, kwargs in calls(dtype):
        Body(op, args, kwargs, op(*args, **kwargs)).check()


def puts(dtype: torch.dtype):
    """Calls that put values at different positions."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul(9).to(dtype)

    table, cube, few = drawn(6, 20), drawn(3, 6, 10), torch.randperm(6)[:4]
    rows = torch.rand(3, 6, 10).argsort(1)[:, :4]
    yield A.index_put.default, (table, [few - 6], drawn(4, 20)), {}
    yield A.index_put.default, (table, [None, torch.randperm(20)[:7].int()], drawn(1)), {}
    yield A._unsafe_index_put.default, (cube, [torch.arange(3)[:, None], few], drawn(3, 4, 10)), {}
    yield A.index_put.default, (cube, [cube[..., 0] > 0], drawn(1)), {}
    yield A.index_put.default, (table, [table > 0], drawn()), {}
    yield A.index_copy.default, (cube, 1, few, drawn(3, 4, 10)), {}
    yield A.index_fill.int_Scalar, (cube, -2, few, 3), {}
    yield A.index_fill.int_Tensor, (table, 0, few[0], drawn()), {}
    yield A.scatter.src, (cube, 1, rows, drawn(3, 5, 11)), {}
    yield A.scatter.value, (cube, 1, rows[:2], 1), {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_what_is_put_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for op, args, kwargs in puts(dtype):
        Body(op, args, kwargs, op(*args, **kwargs)).check()


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", ["f8e4m3fn", "f8e5m2"])
def test_float8_is_put_in_place(dtype: str, sm: int) -> None:
    """As bytes, where the target does not have the dtype."""
    text = """
        c: F[5, 16]
        i: i64[3]
        s: bf16[3, 16]
        f: F[3, 16] = _to_copy.default(self=s, dtype='F')
        v: F[5, 16] = index_put_.default(self=c, indices=[i], values=f)
        return v"""
    graph = body(text.replace("F[", f"{dtype}[").replace("'F'", repr(dtype)))
    kernel = generate(graph, "k", arch_of(sm), 0)
    assert kernel is not None
    found = torch.randn(5, 16).to(DTYPES8[dtype])
    index, source, expected = torch.tensor([4, -5, 2]), torch.randn(3, 16).bfloat16(), found.clone()
    compile_graph(graph, torch.device("cpu"))([expected, index, source], ())
    run(kernel, [found, index, source, found])
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (A.index_put.default, (torch.zeros(3, 4), [torch.tensor([True, False, True])], torch.ones(2, 4)), {}),
        (A.scatter_reduce.two, (torch.zeros(3), 0, torch.tensor([1]), torch.ones(1), "amax"), {}),
        (A.scatter_reduce.two, (torch.zeros(3), 0, torch.tensor([1]), torch.ones(1), "sum"), {"include_self": False}),
        (A.index_add.default, (torch.zeros(3).half(), 0, torch.tensor([1]), torch.ones(1).half()), {}),
        (A.index_add.default, (torch.zeros(3).bfloat16(), 0, torch.tensor([1]), torch.ones(1).bfloat16()), {}),
        (A.index_add.default, (torch.zeros(3, 4).t(), 0, torch.tensor([1]), torch.ones(1, 3)), {}),
    ],
)
def test_calls_that_do_not_add_or_are_left_to_libraries(op, args, kwargs) -> None:
    with pytest.raises(Unsupported):
        region(Body(op, args, kwargs, op(*args, **kwargs)).graph)


def test_positions_out_of_range() -> None:
    """They are left out: nothing else in memory changes, on either side of the table."""
    memory = torch.zeros(7, 4)
    table, index, source = torch.zeros(3, 4), torch.tensor([-9, -4, -3, 0, 2, 3, 10**12]), torch.ones(7, 4)
    for text, wrapped in (
        ("index_put.default(self=z, indices=[i], values=s, accumulate=True)", 1.0),
        ("index_add.default(self=z, dim=0, index=i, source=s)", 0.0),
        ("scatter_add.default(self=z, dim=0, index=j, src=s)", 0.0),
    ):
        rows = "i: i64[7]\nj: i64[7, 4]"
        graph = body(f"z: f32[3, 4]\n{rows}\ns: f32[7, 4]\nv: f32[3, 4] = {text}\nreturn v")
        kernel = loop_kernel(region(graph), "kernel")
        memory.zero_()
        run(kernel, [table, index, index[:, None].expand(7, 4).contiguous(), source, memory[2:5]])
        assert memory.tolist() == [[x] * 4 for x in (0, 0, 1.0 + wrapped, 0, 1, 0, 0)]


DROPPED = """
z: f32[9, 24]
g: f16[5, 7, 24]
m: bool[5, 7, 24]
i: i64[5, 7]
a: f32[5, 7, 24] = _to_copy.default(self=g, dtype='f32')
b: f32[5, 7, 24] = mul.Tensor(self=a, other=m)
c: f32[5, 7, 24] = mul.Scalar(self=b, other=2.0)
v: f32[9, 24] = index_put.default(self=z, indices=[i], values=c, accumulate=True)
return v
"""


def test_what_computes_the_addends_is_part_of_the_kernel() -> None:
    kernel = check(DROPPED, loop_kernel, None)
    assert kernel.source.count("tl.atomic_add") == 1
    assert "tl.store" not in kernel.source


ROWS = """
dim s0 = 2, 64, 1
y: f32[9, 24]
z: f32[6, 24]
g: f32[s0, 24]
x: f32[s0, 24]
i: i64[s0]
j: i64[s0]
a: f32[s0, 24] = softmax.int(self=x, dim=-1)
b: f32[s0, 24] = mul.Tensor(self=a, other=g)
v: f32[9, 24] = index_put.default(self=y, indices=[i], values=b, accumulate=True)
w: f32[6, 24] = index_add.default(self=z, dim=0, index=j, source=b)
return b, v, w
"""


def test_rows_that_are_stored_and_added_to_two_tables() -> None:
    kernel = check(ROWS.replace("6, 24", "9, 24"), loop_kernel, None, dims={"s0": 19})
    assert kernel.source.count("tl.atomic_add") == 2
    assert kernel.source.count("tl.store") == 1


@pytest.mark.parametrize(
    "text",
    [
        # What is added to is computed, read, or added to twice in the same kernel, or the sum is read there.
        "y: f32[9, 4] = exp.default(self=z)\n"
        "v: f32[9, 4] = index_add.default(self=y, dim=0, index=i, source=s)\nreturn v",
        "v: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=z)\nreturn v",
        "v: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=s)\nw: f32[9, 4] = exp.default(self=v)\n"
        "return w",
        "v: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=s)\n"
        "w: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=s)\nreturn v, w",
        "v: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=s)\nreturn v, v",
        "p: f32[9, 4] = mm.default(self=s, mat2=m)\n"
        "v: f32[9, 4] = index_add.default(self=z, dim=0, index=i, source=p)\nreturn v",
    ],
)
def test_what_one_kernel_can_not_do(text: str) -> None:
    graph = body(f"z: f32[9, 4]\ns: f32[9, 4]\nm: f32[4, 4]\ni: i64[9]\n{text}")
    with pytest.raises(Unsupported, match=r"kernel|product"):
        region(graph)


def test_the_operand_that_a_result_lies_in() -> None:
    graph = body(ROWS.replace("6, 24", "9, 24"))
    node = Node("kernel", "k", tuple((v.name, v) for v in graph.inputs), graph.outputs, graph)  # type: ignore[arg-type]
    assert {name: value.name for name, value in continued(node).items()} == {"v": "y", "w": "z"}
    assert continued(graph.nodes[0]) == {}


@pytest.mark.parametrize(
    "text",
    [
        DROPPED,
        "z: f32[9, 24]\ni: i64[5]\ng: f32[5, 24]\n"
        "v: f32[9, 24] = index_put.default(self=z, indices=[i], values=g, accumulate=True)\nreturn v",
    ],
)
def test_the_library_is_a_rival(text: str) -> None:
    """After a kernel for what computes the addends; expected to be slower, since it sorts."""
    graph = body(text)
    found = offered(graph, 90)
    assert list(found) == ["kernel", "library"]
    rival = found["library"].body
    assert (rival is None) == (len(graph.nodes) == 1)
    if rival is not None:
        verify(rival, ALLOWED)
        torch.manual_seed(0)
        tensors = [torch.zeros(9, 24), torch.randn(5, 7, 24).half(), torch.rand(5, 7, 24) < 0.5]
        tensors.append(torch.randint(0, 9, (5, 7)))
        mine, right = (compile_graph(one, torch.device("cpu"))(tensors, ())[0] for one in (rival, graph))
        torch.testing.assert_close(mine, right)
