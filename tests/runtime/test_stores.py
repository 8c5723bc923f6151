"""Kernels that write to inputs of the graph, in generated code: where they write, and what else sees it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from tests.doubles.interpreter import Interpreted
from tests.lowering.test_passes import graph as parsed
from tests.runtime.test_accumulation import launched
from tests.runtime.test_arena import interpreted, poisoned, whole_nodes
from torch_rtx import aten
from torch_rtx.errors import RtxError
from torch_rtx.ir import Graph, evaluate, verify
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.pipeline import lower
from torch_rtx.optable import ALLOWED
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.runtime.code import EMPTY, compile_graph
from torch_rtx.runtime.graph_params import kernel_uses
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.node_cost import cost
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import Target

# The keys and values of a step go from one product into two caches; a query reads the keys before and after.
DECODER = """
dim s = 1, 9, 1
input keys: H[3, 2, 11, 6]
input values: H[3, 2, 11, 6]
input at: i64[s]
input qkv: H[3, s, 36]
input cos: H[s, 6]
k0: H[3, s, 12]((36 * s), 36, 1) = op aten.slice.Tensor(self=qkv, dim=-1, start=12, end=24)
k1: H[3, s, 2, 6]((36 * s), 36, 6, 1) = op aten.view.default(self=k0, size=[3, s, 2, 6])
k: H[3, 2, s, 6]((36 * s), 6, 36, 1) = op aten.transpose.int(self=k1, dim0=1, dim1=2)
v0: H[3, s, 12]((36 * s), 36, 1) = op aten.slice.Tensor(self=qkv, dim=-1, start=24, end=36)
v1: H[3, s, 2, 6]((36 * s), 36, 6, 1) = op aten.view.default(self=v0, size=[3, s, 2, 6])
v: H[3, 2, s, 6]((36 * s), 6, 36, 1) = op aten.transpose.int(self=v1, dim0=1, dim1=2)
before: H[3, 2] = op aten.amax.default(self=keys, dim=[2, 3])
b0: H[3, 2, 1] = op aten.unsqueeze.default(self=before, dim=-1)
b1: H[3, 2, 1, 1] = op aten.unsqueeze.default(self=b0, dim=-1)
r0: H[3, 2, s, 6]((36 * s), 6, 36, 1) = op aten.mul.Tensor(self=k, other=cos)
r: H[3, 2, s, 6]((36 * s), 6, 36, 1) = op aten.add.Tensor(self=r0, other=b1)
PUTS
x: H[3, 2, 11, 6] = op aten.exp.default(self=keys1)
y: H[3, 2, 11, 6] = op aten.mul.Tensor(self=x, other=values1)
op aten.copy_.default(self=keys, src=keys1)
op aten.copy_.default(self=values, src=values1)
return [y, before]
"""
PUTS = {
    "index_copy_": """
keys1: H[3, 2, 11, 6] = op aten.index_copy.default(self=keys, dim=2, index=at, source=r)
values1: H[3, 2, 11, 6] = op aten.index_copy.default(self=values, dim=2, index=at, source=v)""",
    "index_put_": """
keys1: H[3, 2, 11, 6] = op aten.index_put.default(self=keys, indices=[None, None, at], values=r)
back: i64[s] = op aten.sub.Tensor(self=at, other=11)
values1: H[3, 2, 11, 6] = op aten.index_put.default(self=values, indices=[None, None, back], values=v)""",
    "scatter_": """
a0: i64[s, 1] = op aten.unsqueeze.default(self=at, dim=-1)
a1: i64[3, 2, s, 6](0, 0, 1, 0) = op aten.expand.default(self=a0, size=[3, 2, s, 6])
keys1: H[3, 2, 11, 6] = op aten.scatter.src(self=keys, dim=2, index=a1, src=r)
values1: H[3, 2, 11, 6] = op aten.scatter.src(self=values, dim=2, index=a1, src=v)""",
}


def program(text: str) -> Graph:
    found = parsed(text.replace("H[", "f32["))
    verify(found, ALLOWED)
    return found


def fused(graph: Graph) -> Graph:
    return lower(graph, CompilationSettings(), targets=(Target(80),))[0]


def inputs_of(graph: Graph, sizes: dict[str, int]) -> list[torch.Tensor]:
    """Positions along the dimension before the last one of the first input, which differ; floats."""
    torch.manual_seed(0)
    rows = graph.inputs[0].type.shape[-2:][0]  # type: ignore[union-attr]
    found = []
    for value in graph.inputs:
        shape = [evaluate(dim, sizes) for dim in value.type.shape]  # type: ignore[union-attr]
        dtype = aten.DTYPES[value.type.dtype]  # type: ignore[union-attr]
        found.append(torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randperm(rows)[: shape[0]])
    return found


def writing(graph: Graph) -> list[list[str]]:
    """By kernel that writes: the calls in it that do."""
    bodies = (flat(node.body.nodes) for node in graph.nodes if node.body is not None)
    found = [[call.op.split(".")[1] for call in calls if call.writes] for calls in bodies]
    return [calls for calls in found if calls]


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("name", PUTS)
def test_caches(name: str, size: int) -> None:
    """Launched, called one by one, and without any pass; the reader of the old keys comes before, in a kernel of its
    own."""
    before = program(DECODER.replace("PUTS", PUTS[name]))
    graph = fused(before)
    assert writing(graph) == [[name, name]]
    assert not any(node.kind == "extern" for node in graph.nodes)
    given = inputs_of(before, {"s": size})
    runs = []
    for code in (compile_graph(before, torch.device("cpu")), compile_graph(graph, torch.device("cpu"))):
        copies = [x.clone() for x in given]
        runs.append([*code(copies, ()), *copies])
    code = launched(graph, {"s": size})
    assert all(node.kind == "kernel" for node in inline_kernels(graph, code.tactics).nodes)
    copies = [x.clone() for x in given]
    versions = [x._version for x in copies]
    with patch.dict(EMPTY, {"cpu": poisoned}):
        runs.append([*code(copies, ()), *copies])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])
    assert [x._version > version for x, version in zip(copies, versions, strict=True)] == [True, True, *3 * [False]]


@pytest.mark.parametrize("place", ["other strides", "an odd address"])
def test_memory_that_kernels_do_not_take(place: str) -> None:
    """They write to a copy, which is copied back."""
    before = program(DECODER.replace("PUTS", PUTS["index_copy_"]))
    graph = fused(before)
    given = inputs_of(before, {"s": 2})
    expected = [x.clone() for x in given]
    results = compile_graph(before, torch.device("cpu"))(expected, ())
    if place == "other strides":
        given[0] = given[0].mT.contiguous().mT
    else:
        given[0] = torch.empty(given[0].numel() + 1)[1:].view_as(given[0]).copy_(given[0])
    found = launched(graph, {"s": 2})(given, ())
    torch.testing.assert_close([*found, *given], [*results, *expected], check_stride=False)


def test_two_updates_of_one_input_are_two_kernels() -> None:
    text = """
input c: f32[7, 5]
input i: i64[2]
input a: f32[2, 5]
x: f32[2, 5] = op aten.neg.default(self=a)
c1: f32[7, 5] = op aten.index_copy.default(self=c, dim=0, index=i, source=x)
y: f32[2, 5] = op aten.exp.default(self=a)
c2: f32[7, 5] = op aten.index_put.default(self=c1, indices=[i], values=y, accumulate=True)
op aten.copy_.default(self=c, src=c2)
return []
"""
    before = program(text)
    graph = fused(before)
    assert writing(graph) == [["index_copy_"], ["index_put_"]]
    one, two = inputs_of(before, {}), inputs_of(before, {})
    compile_graph(before, torch.device("cpu"))(one, ())
    assert launched(graph)(two, ()) == []
    torch.testing.assert_close(two, one)
    first = inline_kernels(graph, launched(graph).tactics).nodes[0]
    assert kernel_uses(graph)[first.results[0].name].owner == "c"  # an address that a CUDA graph may set


QUOTED = """
input c: f16[7, 5]
input i: i64[2]
input a: f16[2, 5]
x: f16[2, 5] = op aten.neg.default(self=a)
c1: f16[7, 5] = op aten.index_put.default(self=c, indices=[i], values=x)
op aten.copy_.default(self=c, src=c1)
return []
"""


def test_a_kernel_is_checked_alone() -> None:
    """Each run starts from the same contents, so that a kernel which writes nothing is found out."""
    (node,) = fused(program(QUOTED)).nodes
    launcher = interpreted(node, {})
    check = CandidateCheck(node, torch.device("cpu"))
    code = check.code(whole_nodes({node.op: launcher}))
    assert check.problem(code) is None
    with patch.object(Interpreted, "__call__", lambda *_: None):
        assert "relative error" in str(check.problem(code))


def test_slots_of_pages_are_checked_with_positions_that_differ() -> None:
    text = """
input c: f16[4, 9, 5]
input i: i64[30]
input a: f16[30, 5]
x: f16[30, 5] = op aten.neg.default(self=a)
v: f16[36, 5] = op aten.view.default(self=c, size=[36, 5])
u: f16[36, 5] = op aten.index_put.default(self=v, indices=[i], values=x)
c1: f16[4, 9, 5] = op aten.view.default(self=u, size=[4, 9, 5])
op aten.copy_.default(self=c, src=c1)
return []
"""
    (node,) = fused(program(text)).nodes
    check = CandidateCheck(node, torch.device("cpu"))
    assert check.problem(check.code(whole_nodes({node.op: interpreted(node, {})}))) is None


def test_positions_out_of_range() -> None:
    """The library refuses them, and so does the check of a candidate; a kernel leaves them out."""
    before = program(QUOTED)
    graph = fused(before)
    given = inputs_of(before, {})
    given[1] = torch.tensor([-7, 7])
    expected = given[0].clone()
    expected[0] = -given[2][0]
    with pytest.raises(IndexError):
        compile_graph(graph, torch.device("cpu"))([x.clone() for x in given], ())
    launched(graph)(given, ())
    assert torch.equal(given[0], expected)
    shifted = QUOTED.replace("c1:", "j: i64[2] = op aten.add.Tensor(self=i, other=9)\nc1:").replace("[i]", "[j]")
    (node,) = fused(program(shifted)).nodes
    with pytest.raises(RtxError, match="positions outside"):
        CandidateCheck(node, torch.device("cpu"))


def test_bytes_that_are_moved() -> None:
    """Of the cache, what is put there."""
    (node,) = fused(program(QUOTED)).nodes
    found = cost(node, {})
    assert found is not None
    assert found.written == 2 * 5 * 2
    assert found.read <= 2 * (2 * 5 * 2) + 2 * 8


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("op aten.index_put.default(self=c, indices=[m], values=a)", []),  # a mask decides
        ("op aten.index_put.default(self=c, indices=[i], values=b)", [["index_put_"]]),  # of what another kernel reads
    ],
)
def test_old_contents_are_read_before(call: str, expected: list[list[str]]) -> None:
    text = """
input c: f16[7]
input m: bool[7]
input i: i64[2]
input a: f16[()]
b: f16[2] = op aten.index.Tensor(self=c, indices=[i])
CALL
op aten.copy_.default(self=c, src=c1)
return [b]
"""
    before = program(text.replace("CALL", f"c1: f16[7] = {call}"))
    graph = fused(before)
    assert writing(graph) == expected
    one, two = inputs_of(before, {}), inputs_of(before, {})
    one[1] = two[1] = torch.arange(7) % 2 == 0
    results = compile_graph(before, torch.device("cpu"))(one, ())
    torch.testing.assert_close([*launched(graph)(two, ()), *two], [*results, *one])
