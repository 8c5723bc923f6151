"""Results that kernels write over inputs: when they may, and that the inputs then hold what copies would leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.doubles.interpreter import Interpreted
from tests.lowering.kernels.kernel_bodies import body, random_tensor
from tests.lowering.test_fuse import TARGETS, programs
from tests.lowering.test_training_graphs import recorded
from tests.runtime.test_arena import CPU, interpreted, whole_nodes
from torch_rtx.ir import COPY, Graph, Node, Value, has_parts, kernel_nodes
from torch_rtx.irparse import parse
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.horizontal import horizontal_kernel, loops, loops_configs
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.passes.finish import finish
from torch_rtx.lowering.passes.fuse import fuse
from torch_rtx.lowering.passes.fuse_horizontally import fuse_horizontally
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.overwriting import overwritten

STEP = """
    p: f32[70]
    m: f32[70]
    g: f32[70]
    q: f32[9, 9]
    n: f32[9, 9]
    h: f32[9, 9]
    s: f32[()]
    t: f32[()] = add.Tensor(self=s, other=1)
    a: f32[70] = mul.Tensor(self=m, other=0.9)
    b: f32[70] = add.Tensor(self=a, other=g)
    c: f32[70] = div.Tensor(self=b, other=t)
    l: f32[70] = full_like.default(self=p, fill_value=0.5)
    k: f32[70] = mul.Tensor(self=c, other=l)
    d: f32[70] = sub.Tensor(self=p, other=k)
    e: f32[9, 9] = mul.Tensor(self=n, other=0.9)
    f: f32[9, 9] = add.Tensor(self=e, other=h)
    i: f32[9, 9] = div.Tensor(self=f, other=t)
    j: f32[9, 9] = sub.Tensor(self=q, other=i)
    op aten.copy_.default(self=p, src=d)
    op aten.copy_.default(self=m, src=b)
    op aten.copy_.default(self=q, src=j)
    op aten.copy_.default(self=n, src=f)
    op aten.copy_.default(self=s, src=t)
    return"""


def lowered(text: str) -> Graph:
    """The graph of a text, with kernels."""
    return with_kernels(body(text))


def with_kernels(graph: Graph) -> Graph:
    """`graph` after the passes that form kernels."""
    return finish(fuse_horizontally(fuse(graph, Inference(), TARGETS), Inference(), TARGETS), Inference())


def compiled(graph: Graph) -> tuple[Code, Code]:
    """Code that launches kernels, in Triton's interpreter, and code that calls."""
    launchers = {node.op: interpreted(node, {}) for node in kernel_nodes(graph)}
    return compile_graph(graph, CPU, tactics=whole_nodes(launchers), distinct=True), compile_graph(graph, CPU)


@pytest.mark.quick
def test_an_optimizer_step_writes_over_its_inputs() -> None:
    graph = lowered(STEP)
    assert set(overwritten(graph)) == {"d", "b", "j", "f", "t"}
    code, calls = compiled(graph)
    assert code.plan.buffers == [], "no result needs memory"
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    expected, before = [x.clone() for x in inputs], [x._version for x in inputs]
    for _ in range(3):
        code(inputs, [])
        calls(expected, [])
    torch.testing.assert_close(inputs, expected)
    written = [value.name in graph.written for value in graph.inputs]
    assert [x._version > old for x, old in zip(inputs, before, strict=True)] == written


def test_a_target_that_kernels_cannot_write_to_gets_a_copy() -> None:
    """It begins between multiples of 16 bytes, or has other strides than in the capture."""
    graph = lowered(STEP)
    code, calls = compiled(graph)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    torch.manual_seed(0)
    inputs[0], inputs[4] = torch.rand(71)[1:], torch.rand(9, 9).T
    assert inputs[0].data_ptr() % 16
    expected = [x.clone() for x in inputs]
    code(inputs, [])
    calls(expected, [])
    torch.testing.assert_close(inputs, expected)


WRITE = "op aten.copy_.default(self=x, src=y)"
REFUSED = {
    "a flip": f"""
        x: f32[6, 8]
        a: f32[6, 8] = flip.default(self=x, dims=[1])
        y: f32[6, 8] = exp.default(self=a)
        {WRITE}
        return""",
    "a transposition": f"""
        x: f32[8, 8]
        a: f32[8, 8](1, 8) = permute.default(self=x, dims=[1, 0])
        y: f32[8, 8] = mul.Tensor(self=x, other=a)
        {WRITE}
        return""",
    "a window that moves": f"""
        x: f32[6, 8]
        z: f32[6, 1]
        a: f32[6, 7](8, 1) = slice.Tensor(self=x, dim=1, start=1, end=8)
        y: f32[6, 8] = cat.default(tensors=[a, z], dim=1)
        {WRITE}
        return""",
    "a row that repeats": f"""
        x: f32[6]
        z: f32[6, 6]
        y: f32[6] = exp.default(self=x)
        a: f32[6, 6] = mul.Tensor(self=z, other=x)
        b: f32[6](7) = diagonal.default(self=a)
        c: f32[6] = mul.Tensor(self=b, other=y)
        {WRITE}
        return c""",
    "a reduction": f"""
        x: f32[6, 8]
        y: f32[6, 8] = softmax.int(self=x, dim=-1)
        {WRITE}
        return""",
    "a statistic, which several threads load": f"""
        x: f32[6]
        z: f32[6, 8]
        a: f32[6] = mean.dim(self=z, dim=[1])
        y: f32[6] = lerp.Scalar(self=x, end=a, weight=0.1)
        {WRITE}
        return""",
    "another result needs the old contents": f"""
        x: f32[6, 8]
        z: f32[6, 8]
        y: f32[6, 8] = exp.default(self=z)
        a: f32[6, 8] = mul.Tensor(self=x, other=z)
        {WRITE}
        return a""",
    "a call needs the old contents": f"""
        x: f32[8, 8]
        y: f32[8, 8] = exp.default(self=x)
        a: f32[8] = select.int(self=x, dim=0, index=1)
        b: f32[8], c: i64[8] = sort.default(self=a)
        {WRITE}
        return b""",
    "a caller needs the result": f"""
        x: f32[6, 8]
        y: f32[6, 8] = exp.default(self=x)
        {WRITE}
        return y""",
    "another dtype": f"""
        x: f16[6, 8]
        a: f32[6, 8] = _to_copy.default(self=x, dtype='f32')
        y: f32[6, 8] = exp.default(self=a)
        {WRITE}
        return""",
    "a value from elsewhere, beside one of the old contents": f"""
        x: f32[6, 8]
        z: f32[6, 8]
        y: f32[6, 8] = copy.default(self=x, src=z)
        a: f32[6, 8] = copy.default(self=z, src=x)
        {WRITE}
        return a""",
    "a call computes it": f"""
        x: f32[6]
        y: f32[6], c: i64[6] = sort.default(self=x)
        {WRITE}
        return""",
}


ACCEPTED = {
    "what a loop over rows does not read": """
        x: f16[6, 8]
        z: f32[6, 8]
        a: f32[6, 8] = softmax.int(self=z, dim=-1)
        b: f32[6, 8] = ones_like.default(self=x, dtype='f32')
        c: f32[6, 8] = add.Tensor(self=a, other=b)
        y: f16[6, 8] = copy.default(self=x, src=c)
        op aten.copy_.default(self=x, src=y)
        return""",
    "a counter, and the position that it gives": """
        x: i64[()]
        z: i64[1]
        a: i64[1] = add.Tensor(self=z, other=x)
        y: i64[()] = add.Tensor(self=x, other=1)
        op aten.copy_.default(self=x, src=y)
        return a""",
    "the state of a cell, beside parts of a product": """
        x: f32[2, 8]
        z: f32[2, 16]
        a: f32[2, 8](16, 1), b: f32[2, 8](16, 1) = unsafe_split.Tensor(self=z, split_size=8, dim=1)
        c: f32[2, 8] = sub.Tensor(self=x, other=a)
        y: f32[2, 8] = mul.Tensor(self=c, other=b)
        op aten.copy_.default(self=x, src=y)
        return""",
    "dimensions of size 1": """
        x: f32[1, 6]
        z: f32[6]
        a: f32[6] = squeeze.dim(self=x, dim=0)
        b: f32[6] = lerp.Scalar(self=a, end=z, weight=0.5)
        y: f32[1, 6] = unsqueeze.default(self=b, dim=0)
        c: f32[1, 6] = clone.default(self=y)
        op aten.copy_.default(self=x, src=c)
        return b""",
}


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_which_results_are_copied(name: str) -> None:
    graph = lowered((ACCEPTED | REFUSED)[name])
    assert len(overwritten(graph)) == (name in ACCEPTED)
    code, calls = compiled(graph)
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in graph.inputs]
    expected = [x.clone() for x in inputs]
    torch.testing.assert_close(code(inputs, []), calls(expected, []))
    torch.testing.assert_close(inputs, expected)


PARTS = """graph fused {
  input x: f32[6]
  input w: f32[6]
  input z: f32[6]
  y: f32[6], a: f32[6] = kernel adds(in0=x, in1=w, in2=z) graph import {
    input in0: f32[6]
    input in1: f32[6]
    input in2: f32[6]
    v3: f32[6] = kernel add(in0=in0, in1=in1) graph import {
      input in0: f32[6]
      input in1: f32[6]
      v2: f32[6] = op aten.add.Tensor(self=in0, other=in1)
      return [v2]
    }
    v4: f32[6] = kernel add(in0=in2, in1=in1) graph import {
      input in0: f32[6]
      input in1: f32[6]
      v2: f32[6] = op aten.add.Tensor(self=in0, other=in1)
      return [v2]
    }
    return [v3, v4]
  }
  extern aten.copy_.default(self=x, src=y)
  return [a]
}
"""


def test_no_other_part_reads_what_a_part_overwrites() -> None:
    assert set(overwritten(parse(PARTS))) == {"y"}
    assert overwritten(parse(PARTS.replace("add(in0=in2, in1=in1)", "add(in0=in2, in1=in0)"))) == {}


def test_nothing_is_written_early_before_a_fallback_or_another_write() -> None:
    text = PARTS.replace("  extern", "  b: f32[6] = fallback aten.exp.default(self=w)\n  extern")
    assert overwritten(parse(text)) == {}
    again = "  extern aten.copy_.default(self=x, src=w)\n  extern"
    assert overwritten(parse(PARTS.replace("  extern", again))) == {}


SIZES = [(70, 64), (9, 7), (9, 7), (33, 3), (64,), (128, 64), (3,), (0, 2), ()]


def adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return torch.optim.AdamW(parameters, 0.1, foreach=True).step


def clip(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_norm_(parameters, 0.1, foreach=True)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("kind", "count"), [(adamw, len(SIZES)), (clip, len(SIZES) - 1)])
def test_steps_as_pytorch_writes_them(kind: Callable[[list[nn.Parameter]], Callable[[], object]], count: int) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SIZES[:count]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with recorded() as graphs:
        torch.compile(kind(parameters), backend="rtx", options={"reuse_cached_engines": False})()
    graph = graphs[-1]
    assert any(has_parts(node.body) for node in graph.nodes if node.body is not None)
    copies = [node for node in graph.nodes if node.writes]
    assert len(copies) >= count
    assert len(overwritten(graph)) == len(copies)
    code, calls = compiled(graph)
    torch.manual_seed(0)
    inputs = [torch.rand(value.type.shape) + 0.1 for value in graph.inputs]  # type: ignore[union-attr]
    expected = [x.clone() for x in inputs]
    torch.testing.assert_close(code(inputs, []), calls(expected, []))
    torch.testing.assert_close(inputs, expected)


@st.composite
def writing(draw: st.DrawFn) -> Graph:
    """A drawn graph that copies some of its results to inputs of their types at its end."""
    graph = draw(programs())
    nodes, left = list(graph.nodes), [value for value in graph.outputs if isinstance(value, Value)]
    for target in graph.inputs:
        source = next((value for value in left if value.type == target.type and value not in graph.inputs), None)
        if source is not None:
            nodes.append(Node("op", COPY, (("self", target), ("src", source)), ()))
            left.remove(source)
    return replace(graph, nodes=tuple(nodes), outputs=tuple(left))


def one_by_one(node: Node) -> Interpreted:
    """A kernel whose programs compute an element or a row each: none has loaded what another one overwrites."""
    assert node.body is not None
    found = region(node.body)
    if found.parts:
        configs = [replace(config, rows=1) for config in loops_configs(found)[0]]
        return Interpreted(horizontal_kernel(found, node.op, loops(found, configs)))
    return Interpreted(loop_kernel(found, node.op, replace(loop_configs(found)[0], rows=1)))


@settings(max_examples=30)
@given(writing())
def test_drawn_graphs(graph: Graph) -> None:
    """Equal bits, whether kernels write over inputs or copies do it."""
    program = with_kernels(bind(graph, dict.fromkeys(graph.syms, 3)))
    tactics = whole_nodes({node.op: one_by_one(node) for node in kernel_nodes(program)})
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}) for value in program.inputs]
    copies = [x.clone() for x in inputs]
    found = compile_graph(program, CPU, tactics=tactics, distinct=True)(inputs, [])
    expected = compile_graph(program, CPU, tactics=tactics)(copies, [])
    torch.testing.assert_close([*found, *inputs], [*expected, *copies], rtol=0, atol=0, equal_nan=True)
