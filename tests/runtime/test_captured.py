"""Captured graphs without a GPU: what is copied and what is not, and that replays read and write the right memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.doubles.fake_graphs import (
    BODY,
    DEVICE,
    SIZES,
    EdgeData,
    FakeGraph,
    GraphDriver,
    S,
    add,
    adders,
    install,
    program,
)
from torch_rtx import aten
from torch_rtx.errors import InputError
from torch_rtx.ir import Dim
from torch_rtx.irparse import parse
from torch_rtx.runtime import captured, code, cudagraph
from torch_rtx.runtime.captured import EXECUTABLES, may_draw
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.cudagraph import GraphPool, why_not
from torch_rtx.runtime.graph_borders import is_worth
from torch_rtx.runtime.graph_params import Use, kernel_uses

CPU = torch.device("cpu")


class Module:
    """A graph with kernels `k`, which add, and the pool of its CUDA graphs."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, text: str, size: Dim = S, uses_pdl: bool = False, **options: Any
    ) -> None:
        self.driver = GraphDriver(SIZES, {"entry": add})
        install(monkeypatch, self.driver)
        self.graph = program(text)
        tactics = adders(self.graph, self.driver, size=size, uses_pdl=uses_pdl)
        self.code = compile_graph(self.graph, CPU, tactics=tactics)
        self.store = SimpleNamespace(generation=0, values=[])
        self.pool = GraphPool(self.graph, lambda code, *given: code.run(*given), DEVICE, 4, **options)

        self.keys: dict[object, object] = {}  # one object for equal sizes, as sessions have

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        sizes = tuple(x.shape for x in inputs)
        return self.pool(self.keys.setdefault(sizes, sizes), self.code, inputs, self.store)  # type: ignore[arg-type]


CHAIN = """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=y) KERNEL
  b: f32[s] = kernel k(in0=a, in1=x) KERNEL
  return [b]
"""


@pytest.mark.quick
def test_kernels_alone_need_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other addresses in each call, results that are kept, and several shapes in turn."""
    module = Module(monkeypatch, CHAIN)
    held = []
    for step in range(12):
        x, y = torch.randn(2, 16 if step % 3 else 8).unbind()
        held.append((module(x, y)[0], 2 * x + y))
    for got, expected in held:
        torch.testing.assert_close(got, expected)
    assert FakeGraph.last.kinds() == ["kernel", "kernel"]
    assert (module.pool.captures, module.pool.replays) == (2, 10)


ADDITIONS = (
    CHAIN.replace("in1=x) KERNEL", "in1=x) " + BODY)
    .replace(
        "op aten.add.Tensor(self=in0, other=in1)", "op aten.index_add.default(self=in0, dim=0, index=i, source=in1)"
    )
    .replace("    r: f32[s]", "    i: i64[s] = op aten.arange.default(end=s, device='main')\n    r: f32[s]")
)


def test_a_result_that_a_kernel_adds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels write it: both get the address that a replay brings."""
    module = Module(monkeypatch, ADDITIONS)
    held = []
    for _ in range(6):
        x, y = torch.randn(2, 16).unbind()
        held.append((module(x, y)[0], 2 * x + y))
    for got, expected in held:
        torch.testing.assert_close(got, expected)
    assert FakeGraph.last.kinds() == ["kernel", "kernel"]
    assert (module.pool.captures, module.pool.replays) == (1, 5)


INTERRUPTED = """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=y) KERNEL
  b: f32[s] = kernel k(in0=a, in1=x) KERNEL
  c: f32[s] = op aten.neg.default(self=b)
  d: f32[s] = kernel k(in0=c, in1=a) KERNEL
  e: f32[s] = kernel k(in0=d, in1=a) KERNEL
  return [e]
"""


@pytest.mark.parametrize("uses_pdl", [True, False])
def test_kernels_that_wait_start_early(monkeypatch: pytest.MonkeyPatch, uses_pdl: bool) -> None:
    """Those that follow a kernel; what follows anything else, and calls, start when all before them has ended."""
    module = Module(monkeypatch, INTERRUPTED, uses_pdl=uses_pdl)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(4):
        torch.testing.assert_close(module(x, y)[0], 2 * (x + y) - (2 * x + y))
    graph = FakeGraph.last
    assert graph.kinds() == ["kernel", "kernel", "call", "kernel", "kernel"]
    places = {node: place for place, node in enumerate(graph.nodes)}
    edges = sorted((places[one], places[other], data.type, data.from_port) for one, other, data in graph.edges)
    early = int(uses_pdl)
    assert edges == [(0, 1, early, early), (1, 2, 0, 0), (2, 3, 0, 0), (3, 4, early, early)]


LONG = """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=y) KERNEL
  b: f32[s] = kernel k(in0=a, in1=x) KERNEL
  c: f32[s] = kernel k(in0=b, in1=a) KERNEL
  d: f32[s] = kernel k(in0=c, in1=a) KERNEL
  return [d]
"""


def connected(edges: Sequence[tuple[int, int]], data: EdgeData | None = None) -> Callable[[FakeGraph], None]:
    """What ends captures whose nodes, by number, have these edges."""

    def end(graph: FakeGraph) -> None:
        graph.edges = [(graph.nodes[one], graph.nodes[other], data or EdgeData()) for one, other in edges]

    return end


REFUSALS: dict[str, Callable[[Module], object]] = {
    "an old driver": lambda module: setattr(module.driver, "version", 12_020),
    "old bindings": lambda module: delattr(module.driver, "CUgraphEdgeData"),
    "no programmatic edges": lambda module: setattr(module.driver, "programmatic", False),
    "memory that is allocated in the graph": lambda module: setattr(module.driver, "fixed", True),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_edges_that_stay(monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    """The graph is replayed as it was captured."""
    module = Module(monkeypatch, CHAIN, uses_pdl=True)
    REFUSALS[refusal](module)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(4):
        torch.testing.assert_close(module(x, y)[0], 2 * x + y)
    assert (module.pool.captures, module.pool.replays) == (1, 3)
    assert [data.type for _, _, data in FakeGraph.last.edges] == [0]


@pytest.mark.parametrize(
    ("edges", "early"),
    [
        ([(0, 1), (0, 2), (1, 3), (2, 3)], []),
        ([(0, 1), (1, 2), (1, 3)], [(0, 1)]),
        ([(0, 2), (1, 2), (2, 3)], [(2, 3)]),
        ([(0, 1), (0, 1), (2, 3)], [(2, 3)]),
    ],
)
def test_edges_stay_where_streams_part_or_meet(
    monkeypatch: pytest.MonkeyPatch, edges: list[tuple[int, int]], early: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(FakeGraph, "end", connected(edges))
    module = Module(monkeypatch, LONG, uses_pdl=True)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(2):
        module(x, y)
    graph = FakeGraph.last
    places = {node: place for place, node in enumerate(graph.nodes)}
    changed = [(places[one], places[other]) for one, other, data in graph.edges if data.type]
    assert (sorted(changed), len(graph.edges)) == (early, len(edges))


def test_edges_with_data_of_their_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library made them."""
    monkeypatch.setattr(FakeGraph, "end", connected([(0, 1), (1, 2), (2, 3)], EdgeData(from_port=2)))
    module = Module(monkeypatch, LONG, uses_pdl=True)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(2):
        module(x, y)
    assert [(data.from_port, data.type) for _, _, data in FakeGraph.last.edges] == 3 * [(2, 0)]


def test_only_what_has_moved_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(monkeypatch, CHAIN)
    module.driver.full = True  # one executable
    x, y, z = torch.randn(3, 16).unbind()
    expected = 2 * x + y
    for _ in range(3):
        held = module(x, y)[0]
    before = module.driver.set
    results = [held]
    for _ in range(3):  # only the result is elsewhere each time
        results.append(module(x, y)[0])
        before += 1
        assert module.driver.set == before
    assert all(torch.allclose(result, expected) for result in results)
    results.append(module(x, z)[0])  # the first kernel reads z, the second writes the result
    assert module.driver.set == before + 2
    torch.testing.assert_close(results[-1], 2 * x + z)


def test_addresses_that_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each executable of the graph keeps those of a replay, so that nothing is set when they come again."""
    module = Module(monkeypatch, CHAIN)
    pairs = [torch.randn(2, 16).unbind() for _ in range(9)]
    results = torch.empty(16), torch.empty(16)
    turns = itertools.cycle(results)
    monkeypatch.setitem(code.EMPTY, "cuda", lambda *like: next(turns))  # as an allocator whose caller keeps one result

    def check(count: int, calls: int) -> int:
        """How many nodes are set by so many calls with these pairs in turn."""
        before = module.driver.set
        for step in range(calls):
            x, y = pairs[step % count]
            torch.testing.assert_close(module(x, y)[0], 2 * x + y)
        return module.driver.set - before

    check(2, 10)
    assert check(2, 20) == 0
    assert len(module.driver.executables) == 1
    check(4, 20)
    assert check(4, 20) == 0
    assert check(9, 20) > 0
    assert len(module.driver.executables) == EXECUTABLES - 1
    module.pool.captured.clear()
    assert not any(executable.alive for executable in module.driver.executables)


def test_random_draws_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches the one executable that it has."""
    text = CHAIN.replace("return [b]", "c: f32[s] = extern aten.rand_like.default(self=y)\n  return [b]")
    module = Module(monkeypatch, text)
    for _ in range(5):
        module(*torch.rand(2, 16).unbind())
    assert (FakeGraph.last.replays, module.driver.streams, module.driver.executables) == (4, [], [])
    assert module.driver.set > 4


def test_inputs_that_kernels_cannot_take_are_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other strides than the capture's, and addresses that are no multiples of 16."""
    module = Module(monkeypatch, CHAIN)
    base = torch.randn(64)
    for step in range(8):
        x = base[:16] if step < 2 else (base[1:17], base[0:32:2], base[4:20])[step % 3]
        y = torch.randn(16)
        torch.testing.assert_close(module(x, y)[0], 2 * x + y)
    assert FakeGraph.last.kinds() == ["kernel", "kernel"]
    assert module.pool.replays == 7


def test_what_calls_touch_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """`x` is read by a library call, `c` is written by one; `y` and `b` are not."""
    text = CHAIN.replace("return [b]", "c: f32[s] = extern aten.exp.default(self=x)\n  return [b, c]")
    module = Module(monkeypatch, text)
    held = []
    for _ in range(5):
        x, y = torch.randn(2, 16).unbind()
        held.append((module(x, y), [2 * x + y, x.exp()]))
    for got, expected in held:
        torch.testing.assert_close(got, expected)
    assert FakeGraph.last.kinds() == ["copy", "kernel", "kernel", "call", "copy"]


def test_executables_are_made_of_copies_in_memory_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver looks at the memory of copies, and what was captured may be unmapped by then."""
    text = CHAIN.replace("return [b]", "c: f32[s] = extern aten.exp.default(self=x)\n  return [b, c]")
    module = Module(monkeypatch, text)
    instantiate, made = module.driver.cuGraphInstantiate, []

    def recorded(graph: FakeGraph, flags: int) -> tuple[Any, Any]:
        made.append([(node.params.srcDevice, node.params.dstDevice) for node in graph.nodes if node.kind == "copy"])
        return instantiate(graph, flags)

    monkeypatch.setattr(module.driver, "cuGraphInstantiate", recorded)
    held = []
    for _ in range(6):
        x, y = torch.randn(2, 16).unbind()
        made.clear()
        results = module(x, y)
        held.append((x, y, results))
        for (source, _), (_, target) in made:
            assert (source, target) == (x.data_ptr(), results[1].data_ptr())
    assert len(module.driver.executables) == EXECUTABLES - 1


VIEWS = """
  input x: f32[s, 4]
  input y: f32[4]
  u: f32[4] = view aten.select.int(self=x, dim=0, index=INDEX)
  a: f32[4] = kernel k(in0=u, in1=y) graph import {
    input in0: f32[4]
    input in1: f32[4]
    r: f32[4] = op aten.add.Tensor(self=in0, other=in1)
    return [r]
  }
  t: f32[2, 2] = view aten.view.default(self=a, size=[2, 2])
  w: f32[s, 2](4, 1) = view aten.slice.Tensor(self=x, dim=1, start=1, end=3)
  return [RESULTS]
"""


def views(monkeypatch: pytest.MonkeyPatch, index: int, results: str) -> Module:
    return Module(monkeypatch, VIEWS.replace("INDEX", str(index)).replace("RESULTS", results), 4)


@pytest.mark.quick
def test_views_move_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel reads a part of an input; two results are views of one kernel's, a third is a view of an input."""
    module = views(monkeypatch, 1, "t, w, a")
    held = []
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(4)
        t, w, a = module(x, y)
        assert w.data_ptr() == x[:, 1:].data_ptr()
        assert t.data_ptr() == a.data_ptr()
        held.append((t, a, x[1] + y))
    for t, a, expected in held:
        assert t.shape == (2, 2)
        assert torch.equal(t.flatten(), expected)
        assert torch.equal(a, expected)
    assert FakeGraph.last.kinds() == ["kernel"]


@pytest.mark.parametrize("results", ["c, t", "w, t", "w, c, w"])
def test_results_of_calls_share_memory_in_each_replay(monkeypatch: pytest.MonkeyPatch, results: str) -> None:
    """The result of a library call and views of it, one of which leaves out most of what it spans."""
    text = f"""
      input x: f32[s, 8]
      c: f32[s, 8] = extern aten.exp.default(self=x)
      t: f32[8, s](1, 8) = view aten.permute.default(self=c, dims=[1, 0])
      w: f32[s](8) = view aten.select.int(self=c, dim=1, index=2)
      return [{results}]"""
    module = Module(monkeypatch, text, 8)
    held = []
    for _ in range(4):
        x = torch.randn(2, 8)
        first, *others = module(x)
        first.fill_(7)
        expected = x.exp()
        {"c": expected, "w": expected[:, 2]}[results[0]].fill_(7)
        held += [
            (other, {"t": expected.t(), "c": expected, "w": expected[:, 2]}[name])
            for other, name in zip(others, results.split(", ")[1:], strict=True)
        ]
    for other, right in held:
        assert torch.equal(other, right)
    assert module.pool.replays == 3


def test_results_of_several_dtypes_in_one_memory_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph, "driver", lambda: object())
    text = """
graph fused {
  input x: f32[8]
  y: f32[8] = extern aten.exp.default(self=x)
  i: i32[8] = view aten.view.dtype(self=OF, dtype='i32')
  return [y, i]
}"""
    reasons = [cudagraph.why_not(parse(text.strip().replace("OF", of))) for of in ("x", "y")]
    assert reasons == [None, "results of several dtypes share memory"]


def test_a_dropout_and_its_mask_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are saved for the backward together; the first is the input itself if nothing is dropped."""
    monkeypatch.setattr(cudagraph, "driver", lambda: object())
    text = """graph fused {
  input x: f32[8]
  t: f32[8] = extern aten.tanh.default(self=x)
  y: f32[8], m: bool[8] = extern aten.native_dropout.default(input=t, p=0.5, train=True)
  return [t, y, m]
}"""
    graph = parse(text)
    assert cudagraph.why_not(graph) is None
    assert aten.bases(graph) == {"y": "t"}


def test_a_result_that_is_an_input_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a part of the caller's tensor, without gradients even where that has them."""
    text = """
      input x: f32[s, 4]
      t: f32[s, 3](4, 1) = view aten.slice.Tensor(self=x, dim=1, start=1, end=4)
      i: i32[s, 3](4, 1) = view aten.view.dtype(self=t, dtype='i32')
      c: c64[s, 2] = view aten.view.dtype(self=x, dtype='c64')
      e: f32[0, 4] = view aten.slice.Tensor(self=x, dim=0, start=2, end=2)
      return [t, i, c, e]"""
    module = Module(monkeypatch, text)
    for step in range(4):
        x = torch.randn(6 * 4 + 4)[:24].view(6, 4) if step % 2 else torch.randn(8, 4)[2:]
        x.requires_grad_()
        results = module(x)
        plain = x.detach()
        expected = plain[:, 1:], plain[:, 1:].view(torch.int32), plain.view(torch.complex64), plain[2:2]
        for got, right in zip(results, expected, strict=True):
            assert (got.dtype, got.data_ptr()) == (right.dtype, right.data_ptr())
            assert (got.shape, got.stride()) == (right.shape, right.stride())
            assert not got.requires_grad or step == 0  # the double of a plain call has gradients
    assert module.pool.replays == 3
    with pytest.raises(InputError, match="input 'x' does not begin at a multiple of the size of torch.complex64"):
        module(torch.randn(25)[1:].view(6, 4))


def test_an_empty_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node of the graph writes it, and each replay returns another tensor."""
    text = """
      input x: f32[s, 4]
      v: f32[0, 4] = view aten.slice.Tensor(self=x, dim=0, start=2, end=2)
      e: f32[0, 4] = extern aten.exp.default(self=v)
      return [e]"""
    module = Module(monkeypatch, text)
    results = [module(torch.randn(8, 4))[0] for _ in range(4)]
    assert all((result.shape, result.stride()) == ((0, 4), (4, 1)) for result in results)
    assert len({id(result) for result in results}) == 4
    assert module.pool.replays == 3


@pytest.mark.parametrize("results", ["t", "t, t", "x, t, t"])
def test_a_view_of_an_input_that_was_captured_with_other_strides(monkeypatch: pytest.MonkeyPatch, results: str) -> None:
    """Its strides are others than the result's, so that the code has to copy it; no kernel reads it."""
    text = f"""
      input x: f32[s, 4]
      t: f32[4] = view aten.select.int(self=x, dim=0, index=1)
      return [{results}]"""
    module = Module(monkeypatch, text)
    held = []
    for _ in range(5):
        x = torch.randn(4, 6).t()
        held.append((module(x), x[1]))
    for got, expected in held:
        assert all(torch.equal(result, expected) for result in got if result.dim() == 1)
    assert module.pool.replays == 4


def test_a_view_of_an_input_that_the_module_writes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its strides are others than at the capture, it is a copy, and that has what was written."""
    text = """
      input x: f32[s]
      input y: f32[s]
      a: f32[s] = kernel k(in0=x, in1=x) KERNEL
      v: f32[1, s] = view aten.unsqueeze.default(self=y, dim=0)
      extern aten.copy_.default(self=x, src=a)
      return [v]"""
    module = Module(monkeypatch, text)
    x = torch.arange(32.0)[::2]
    for step in range(4):
        before, y = x.clone(), x if step == 3 else torch.randn(16)
        (v,) = module(x, y)
        assert torch.equal(x, 2 * before)
        assert torch.equal(v[0], y)
    assert module.pool.replays == 3


def test_a_result_with_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    module = views(monkeypatch, 0, "t")
    held = []
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(4)
        held.append((module(x, y)[0], (x[0] + y).view(2, 2)))
    assert all(torch.equal(got, expected) for got, expected in held)
    assert FakeGraph.last.kinds() == ["kernel"]


def test_a_view_at_an_odd_address_is_captured_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code copies that part of the input before its kernel, so that no kernel has its address."""
    text = VIEWS.replace("f32[s, 4]", "f32[s, 5]").replace("view aten.select.int(self=x, dim=0, index=INDEX)", "PART")
    text = text.replace("w: f32[s, 2](4, 1)", "w: f32[s, 2](5, 1)").replace("RESULTS", "a")
    text = text.replace("PART", "view aten.as_strided.default(self=x, size=[4], stride=[1], storage_offset=1)")
    module = Module(monkeypatch, text, 4)
    held = []
    for _ in range(5):
        x, y = torch.randn(3, 5), torch.randn(4)
        held.append((module(x, y)[0], x.flatten()[1:5] + y))
    assert all(torch.equal(got, expected) for got, expected in held)
    assert FakeGraph.last.kinds() == ["copy", "copy", "kernel"]
    assert module.pool.captures == 1


def test_a_driver_that_refuses_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fails, and the next one sets everything again."""
    module = Module(monkeypatch, CHAIN)
    x, y = torch.randn(2, 16).unbind()
    results = [module(x, y)[0] for _ in range(3)]
    module.driver.refuse = True
    z = torch.randn(16)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE when setting the addresses"):
        module(z, y)
    module.driver.refuse = False
    results.append(module(z, y)[0])
    torch.testing.assert_close(results[-1], 2 * z + y)
    torch.testing.assert_close(results[0], 2 * x + y)


def test_a_replay_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only executable of a graph that draws random numbers is that of PyTorch: the next call sets it again."""
    module = Module(monkeypatch, CHAIN.replace("return", "c: f32[s] = extern aten.rand_like.default(self=y)\n  return"))
    x, y, z = torch.randn(3, 16).unbind()
    for _ in range(3):
        module(x, y)

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    (graph,) = module.pool.captured.values()
    nodes = {node for slots in graph._executables._slots for *_, node in slots}
    with monkeypatch.context() as patch:
        for node in nodes:
            patch.setitem(vars(node), "set_params", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module(z, y)
    before = module.driver.set
    module(z, y)
    assert module.driver.set == before + len(nodes)
    assert module.driver.executables == []


def test_no_memory_for_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set then, so that the next call does."""
    module = Module(monkeypatch, CHAIN)
    x, y, z = torch.randn(3, 16).unbind()
    for _ in range(3):
        module(x, y)

    def fail(*given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setitem(code.EMPTY, "cuda", fail)
        with pytest.raises(torch.OutOfMemoryError):
            module(z, y)
    torch.testing.assert_close(module(z, y)[0], 2 * z + y)


class Allocator:
    """What PyTorch's allocator and current stream are told around captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: GraphDriver) -> None:
        self.underway: list[object] = []
        self.locked: list[bool] = []
        self.driver = driver
        capture = torch.cuda.graph

        @contextmanager
        def told(graph: Any, handle: object = None, stream: Any = None, **named: Any) -> Iterator[None]:
            """As PyTorch's: a capture that can't be ended leaves its memory and its stream as they are."""
            assert handle not in self.underway, "already recording"
            self.underway.append(handle)
            before, driver.stream = driver.stream, stream.raw
            try:
                with capture(graph):
                    yield
            finally:
                if getattr(graph, "broken", False):
                    raise RuntimeError("operation failed due to a previous error during capture")
                driver.stream = before
                self.underway.remove(handle)

        def end(index: int, handle: object) -> None:
            self.locked.append(cudagraph._CAPTURING.locked())
            if handle not in self.underway:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.underway.remove(handle)

        monkeypatch.setattr(torch.cuda, "graph", told)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(driver, "stream", stream.raw))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(size))


@pytest.mark.parametrize("where", ["in the capture", "at its end", "after it"])
def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str) -> None:
    """The call is run plainly, as are all that follow; nothing is left of the capture, and others can be made."""
    module = Module(monkeypatch, CHAIN, shared=True)
    other = copy(module)
    other.pool = GraphPool(module.graph, module.pool.run, DEVICE, 4, shared=True)
    allocator, before = Allocator(monkeypatch, module.driver), module.driver.stream
    run = module.pool.run

    def failing(*given: Any) -> list[Any]:
        if allocator.underway and where == "in the capture":
            raise torch.OutOfMemoryError("no more\nin detail")
        FakeGraph.last.broken = bool(allocator.underway) and where == "at its end"
        return run(*given)

    def refuse(*given: Any) -> Any:
        raise RuntimeError("CUDA driver: no more")

    module.pool.run = failing
    x, y = torch.randn(2, 16).unbind()
    with monkeypatch.context() as patch:
        if where == "after it":
            patch.setattr(module.driver, "cuGraphGetNodes", refuse)
        for _ in range(3):
            torch.testing.assert_close(module(x, y)[0], 2 * x + y)
    assert (module.pool.captures, module.pool.replays) == (0, 0)
    assert caplog.text.count("no CUDA graphs for this module, it can't be captured") == 1
    assert (allocator.underway, allocator.locked, module.driver.stream) == ([], [True], before)
    for _ in range(3):
        torch.testing.assert_close(other(x, y)[0], 2 * x + y)
    assert (other.pool.captures, other.pool.replays) == (1, 2)


def test_static_outputs_stay_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(monkeypatch, CHAIN, static_outputs=True, shared=True)
    x, y, z = torch.randn(3, 16).unbind()
    module(x, y)
    first, second = module(x, y)[0], module(x, z)[0]
    assert first.data_ptr() == second.data_ptr()
    torch.testing.assert_close(second, 2 * x + z)
    assert module.pool.memory is not Module(monkeypatch, CHAIN, shared=True).pool.memory


def test_memory_is_shared_by_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of several sessions are in one memory; another stream has to wait for the last replay of any of them."""
    one, other, alone, elsewhere = (Module(monkeypatch, CHAIN, shared=shared) for shared in (True, True, False, True))
    driver, x, y = elsewhere.driver, *torch.randn(2, 16).unbind()
    usual = driver.stream
    for module, stream in ((one, usual), (other, usual), (alone, usual), (elsewhere, 5)):
        driver.stream = stream
        install(monkeypatch, module.driver)
        module.driver.stream = stream
        for _ in range(2):
            torch.testing.assert_close(module(x, y)[0], 2 * x + y)
    assert one.pool.memory is other.pool.memory
    assert len({module.pool.memory.handle for module in (one, other, alone, elsewhere)}) == 3

    driver.stream = 5
    torch.testing.assert_close(other(x, y)[0], 2 * x + y)
    assert driver.waits == [(5, usual)]
    one(x, y)  # after the replay of `other`, on the same stream
    assert driver.waits == [(5, usual)]
    alone(x, y)
    assert driver.waits == [(5, usual)] * 2


KEPT = {"static_outputs": True}
MIXED = """
  input x: f32[s]
  input y: f32[s]
  input z: f32[s]
  v: f32[s] = view aten.view.default(self=x, size=[s])
  u: f32[s, 1] = view aten.unsqueeze.default(self=v, dim=1)
  a: f32[s] = kernel k(in0=v, in1=v) KERNEL
  b: f32[s] = kernel k(in0=a, in1=z) KERNEL
  c: f32[s] = CALL
  d: f32[s] = kernel k(in0=b, in1=c) KERNEL
  return [b, u, d]
"""


@pytest.mark.parametrize(
    "call",
    [
        "extern aten.add.Tensor(self=a, other=z)",
        "fallback my_lib.add.default(a=a, b=z)",
        "fallback python(index=0, inputs=[a, z])",
    ],
)
def test_what_only_kernels_touch(call: str) -> None:
    """Not `a` and `z`, which something else reads, nor `c`, which it makes; `y` is read by nobody."""
    found = kernel_uses(program(MIXED.replace("CALL", call)))
    alone = {name: Use(name, at) for name, at in (("x", (0, 0)), ("y", ()), ("b", (1, 2)), ("d", (2,)))}
    assert found == {**alone, "v": alone["x"], "u": alone["x"]}


@pytest.mark.parametrize(("text", "options", "count"), [("CHAIN", {}, 0), ("SAVING", {}, 1), ("CHAIN", KEPT, 1)])
def test_a_graph_holds_what_stands_in_for_nothing(
    text: str, options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a result that each replay brings memory for, but one that is copied, since a call reads it, or stays."""
    module = Module(monkeypatch, globals()[text], **options)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(2):
        module(x, y)
    (found,) = module.pool.captured.values()
    assert len(found._stand_ins) == count


def test_memory_that_another_value_had_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read a freed value are no users of the result that got its memory. Without the order of the
    launches, nobody can tell them apart."""
    module = Module(monkeypatch, CHAIN)
    x, y = torch.randn(2, 16).unbind()
    for _ in range(2):
        module(x, y)
    (found,) = module.pool.captured.values()
    memory = torch.arange(64).untyped_storage()
    nodes = found._nodes
    slots = [(memory.data_ptr() + 8 * at, at, node, cell) for _, at, node, cell in nodes._arguments]
    nodes._arguments = slots
    assert {at for _, at, *_ in slots} == {0, 1}
    last = [cell for _, at, _, cell in slots if at == 1]
    assert [slot.holder for slot in nodes.kernels(memory, (1,) * len(last)) or ()] == last
    nodes._in_order = False
    assert nodes.kernels(memory, (1,) * len(last)) is None


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("extern aten.exp.default(self=x)", False),
        ("view aten.alias.default(self=x)", False),
        ("extern aten.bernoulli.default(self=x)", True),
        ("fallback my_lib.noise.default(x=x)", True),
    ],
)
def test_graphs_that_may_draw_random_numbers(call: str, expected: bool) -> None:
    """PyTorch launches these: it gives the generator's state to each replay."""
    assert may_draw(program(f"  input x: f32[s]\n  a: f32[s] = {call}\n  return [a]")) is expected


def test_attention_draws_only_for_dropout() -> None:
    text = """
  input q: f16[1, 4, 8, 16]
  a: f16[1, 4, 8, 16] = extern aten.scaled_dot_product_attention.default(query=q, key=q, value=q MORE)
  return [a]"""
    drawn = [may_draw(program(text.replace(" MORE", more))) for more in ("", ", dropout_p=0.0", ", dropout_p=0.1")]
    assert drawn == [False, False, True]


@pytest.mark.parametrize(
    ("kernels", "nbytes", "expected"), [(0, 8, True), (4, 8, True), (12, 1024, False), (12, 8 << 20, True)]
)
def test_small_inputs_of_many_kernels_are_copied(kernels: int, nbytes: int, expected: bool) -> None:
    assert is_worth(kernels, nbytes) is expected


def test_copies_that_make_others_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is shared in another way once something is copied: what kernels then have elsewhere is copied, too."""
    module = Module(monkeypatch, CHAIN)
    asked: list[set[str]] = []

    class Found(captured.Captured):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            asked.append(set(*given[4:]))
            self.missing = {"x", "y"} - asked[-1] and {min({"x", "y"} - asked[-1])}

    monkeypatch.setattr(captured, "Captured", Found)
    for _ in range(4):
        x, y = torch.randn(2, 16).unbind()
        torch.testing.assert_close(module(x, y)[0], 2 * x + y)
    assert asked == [set(), {"x"}, {"x", "y"}]
    assert FakeGraph.last.kinds() == ["copy", "copy", "kernel", "kernel"]


SAVING = """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=y) KERNEL
  b: f32[s] = op aten.neg.default(self=a)
  v: f32[s] = op aten.view.default(self=b, size=[s])
  return [b, v, a]
"""


@pytest.mark.parametrize("saved", [{2}, {0, 2}, {1}])
def test_saved_results_are_overwritten_only_when_nobody_has_them(
    monkeypatch: pytest.MonkeyPatch, saved: set[int]
) -> None:
    """They stay where they are, also if the caller gets another result in the same memory, which is a copy."""
    module = Module(monkeypatch, SAVING, saved=frozenset(saved), shared=True)

    def check(results: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
        torch.testing.assert_close(list(results), [-(x + y), -(x + y), x + y])

    seen = set()
    for _ in range(5):
        x, y = torch.randn(2, 16).unbind()
        results = module(x, y)
        check(results, x, y)
        seen.add(tuple(results[index].data_ptr() for index in sorted(saved)))
        del results
    replays = module.pool.replays
    assert (module.pool.captures, replays) == (1, 4)
    held = []
    for _ in range(3):
        x, y = torch.randn(2, 16).unbind()
        held.append((module(x, y), x, y))
    assert module.pool.replays == replays + 1  # while the first is held, the others run the plain code
    for results, x, y in held:
        check(results, x, y)
    seen.add(tuple(held[0][0][index].data_ptr() for index in sorted(saved)))
    assert len(seen) <= 2  # the plain call, and the graph's memory
    part = held[0][0][min(saved)][2:3]  # holds as much as the whole
    held.clear()
    del results
    expected = part.clone()
    module(y, x)
    assert torch.equal(part, expected)
    assert module.pool.replays == replays + 1
    assert module.pool.held
    del part
    check(module(y, x), y, x)
    assert module.pool.replays == replays + 2


def test_saved_results_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph has its own pool of memory: what another graph keeps there lives longer than its replay."""
    module = Module(monkeypatch, SAVING, saved=frozenset({2}))
    handles = []
    for size in (8, 8, 16, 16):
        module(*torch.randn(2, size).unbind())
        handles.append(module.pool.memory.handle)
    assert module.pool.captures == 2
    assert handles[1] != handles[3]


@pytest.mark.parametrize("guarded", [False, True])
def test_pinned_inputs_are_read_where_they_are(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Library calls read them without a copy; at another address they are inputs of another graph."""
    module = Module(monkeypatch, SAVING, pinned=frozenset({0}), guarded=guarded)
    x, other = torch.randn(2, 16).unbind()
    for _ in range(4):
        y = torch.randn(16)
        torch.testing.assert_close(module(x, y)[2], x + y)
        x.mul_(2)
    assert (module.pool.captures, module.pool.replays) == (1, 3)
    torch.testing.assert_close(module(other, y)[2], other + y)
    assert (module.pool.captures, module.pool.replays) == (1, 3)
    torch.testing.assert_close(module(x, y)[2], x + y)
    assert (module.pool.captures, module.pool.replays) == (1, 4)


COMPUTED = """
graph fused {
  dim d0 = 0, None, 1
  dim n = 2, 64, 1
  input x: f32[n]
  a: float = KIND torch_rtx.truediv.default(a=NUMBER, b=n)
  m: int[d0] = extern torch_rtx.round.default(number=a)
  y: f32[n] = extern aten.mul.Tensor(self=x, other=a)
  z: f32[d0] = extern aten.zeros.default(size=[d0])
  return [y, z]
}
"""


def test_arithmetic_on_sizes_can_be_captured_and_on_data_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph, "driver", lambda: "a driver")
    text = COMPUTED.strip()
    assert why_not(parse(text.replace("KIND", "extern").replace("NUMBER", "1"))) is None
    assert "the host needs" in str(why_not(parse(text.replace("KIND", "fallback").replace("NUMBER", "1"))))


class Generator:
    """In the place of `torch.Generator`, of a GPU."""

    device = DEVICE


DRAWS = """
  input x: f32[s]
  input g: object
  y: f32[s] = kernel k(in0=x, in1=x) KERNEL
  READ
  return [y]
"""
BERNOULLI = "_ = fallback aten.bernoulli.default(self=x, generator=g)"


def test_graphs_have_the_generators_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", Generator)
    module = Module(monkeypatch, DRAWS.replace("READ", BERNOULLI))
    monkeypatch.setattr(module.pool, "run", lambda code, inputs, *_: [2 * inputs[0]])
    one, other, key, x = Generator(), Generator(), ("key",), torch.ones(8)
    for given in (one, one, other, other, one):
        module.pool(key, module.code, [x, given], module.store)  # type: ignore[arg-type]
    assert (module.pool.captures, module.pool.replays) == (2, 3)
    assert FakeGraph.last.generators == [other]


def test_any_other_object_ends_graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Unless nothing reads it."""
    caplog.set_level("INFO", "torch_rtx")
    for read, disabled in (
        ("_ = fallback aten.bernoulli.default(self=x, generator=g)", "an input is a object"),
        ("", None),
    ):
        module = Module(monkeypatch, DRAWS.replace("  READ\n", f"  {read}\n" if read else ""))
        monkeypatch.setattr(module.pool, "run", lambda code, inputs, *_: [2 * inputs[0]])
        for _ in range(3):
            (y,) = module.pool(("key",), module.code, [torch.ones(8), object()], module.store)  # type: ignore[arg-type]
            assert y.eq(2).all()
        assert module.pool.disabled == disabled
        assert module.pool.captures == (disabled is None)
    assert [record.message for record in caplog.records if "no CUDA graphs" in record.message] == [
        "no CUDA graphs for this module: an input is a object"
    ]
