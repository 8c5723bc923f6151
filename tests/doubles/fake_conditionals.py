"""Conditional nodes of CUDA graphs without a GPU: their bodies are graphs of the fake driver, run as often as the node
asks for at each replay."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.doubles.fake_driver import Function, Status
from tests.doubles.fake_graphs import FakeGraph, FakeStream, GraphDriver, Node, Params, _Recorder, install
from torch_rtx.runtime import conditional

TELL = Function("tell", b"")
ENDLESS = 1000  # passes


class ConditionalDriver(GraphDriver):
    """A driver with conditional nodes.

    Attributes:
        asked: what each handle was told last, by its number.
    """

    def __init__(self, sizes: tuple[int, ...], kernels: dict[str, Any]) -> None:
        super().__init__(sizes, kernels)
        self.asked: list[int] = []
        self.open: list[tuple[FakeGraph, _Recorder]] = []  # the graphs around the body that is recorded
        self.CUstream = lambda raw: raw
        self.CUgraphNodeParams = lambda: SimpleNamespace(conditional=SimpleNamespace())
        self.CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_IF=0, CU_GRAPH_COND_TYPE_WHILE=1)
        self.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL = 13
        self.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
        self.CUstreamUpdateCaptureDependencies_flags = SimpleNamespace(CU_STREAM_SET_CAPTURE_DEPENDENCIES=1)

    def cuLaunchKernel(self, function: Function, *given: Any) -> tuple[Status]:
        if function != TELL:
            return super().cuLaunchKernel(function, *given)
        places = (ctypes.c_void_p * 3).from_address(given[-2])
        handle, truth = (ctypes.c_uint64.from_address(place or 0).value for place in places[:2])
        negated = ctypes.c_uint32.from_address(places[2] or 0).value

        def tell() -> None:
            self.asked[handle] = ctypes.c_uint8.from_address(truth).value ^ negated

        FakeGraph.last.nodes.append(Node("tell", Params(), tell))
        return (Status.CUDA_SUCCESS,)

    def cuGraphConditionalHandleCreate(
        self, graph: FakeGraph, context: int, default: int, flags: int
    ) -> tuple[Status, int]:
        assert graph is FakeGraph.last
        self.asked.append(-1)
        return Status.CUDA_SUCCESS, len(self.asked) - 1

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:
        before = FakeGraph.last.nodes[-1:]
        return Status.CUDA_SUCCESS, 1, 7, FakeGraph.last, [*before, None], [], len(before)

    def cuGraphAddNode(self, graph: FakeGraph, before: Any, edges: Any, count: int, params: Any) -> tuple[Status, Node]:
        asks, outer = params.conditional, FakeGraph.last
        assert before == graph.nodes[-1:]
        assert len(before) == len(edges) == count == asks.size == 1
        body = FakeGraph()
        FakeGraph.last = outer

        def call() -> None:
            for _ in range(ENDLESS if asks.type == 1 else 1):
                assert self.asked[asks.handle] in (0, 1)
                if not self.asked[asks.handle]:
                    return
                self.run(body)
            assert asks.type == 0, "the loop does not end"

        asks.phGraph_out = [body]
        graph.nodes.append(Node("conditional", Params(), call))
        return Status.CUDA_SUCCESS, graph.nodes[-1]

    def run(self, graph: FakeGraph) -> None:
        """Run a body."""
        for node in graph.nodes:
            if node.kind == "copy":
                ctypes.memmove(node.params.dstDevice, node.params.srcDevice, node.params.nbytes)
            elif node.call is not None:
                node.call()
            else:
                self._run(node.params)

    def cuStreamUpdateCaptureDependencies(
        self, stream: int, nodes: list[Node], edges: Any, count: int, flags: int
    ) -> tuple[Status]:
        assert (nodes, count, flags) == (FakeGraph.last.nodes[-1:], 1, 1)
        return (Status.CUDA_SUCCESS,)

    def cuStreamBeginCaptureToGraph(
        self, stream: int, graph: FakeGraph, before: Any, edges: Any, count: int, mode: int
    ) -> tuple[Status]:
        self.open.append((FakeGraph.last, _Recorder(graph)))
        FakeGraph.last = graph
        self.open[-1][1].__enter__()
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Status, FakeGraph]:
        body = FakeGraph.last
        FakeGraph.last, recorder = self.open.pop()
        recorder.__exit__(None, None, None)
        return Status.CUDA_SUCCESS, body

    def cuGraphNodeGetType(self, node: Node) -> tuple[Status, int]:
        return (Status.CUDA_SUCCESS, 13) if node.kind in ("tell", "conditional") else super().cuGraphNodeGetType(node)


def install_conditionals(monkeypatch: pytest.MonkeyPatch, driver: ConditionalDriver) -> None:
    """As `install`; tensors on the CPU stand for those of the device."""
    install(monkeypatch, driver)
    always: Callable[..., Any] = lambda *given: nullcontext()  # noqa: E731
    monkeypatch.setattr(conditional, "records", lambda value: driver.capturing)
    monkeypatch.setattr(conditional, "driver", lambda: driver)
    monkeypatch.setattr(conditional, "new_stream", lambda device: FakeStream(55, driver.waits))
    monkeypatch.setattr(conditional, "_kernel", lambda index: TELL)
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", always)
