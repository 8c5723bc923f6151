"""Which CUDA graphs a pool captures and keeps, without a GPU: the capture itself is a double."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_rtx.ir import Graph
from torch_rtx.runtime import graphmemory
from torch_rtx.runtime.admission import PATIENCE, TRACKED_PER_SLOT
from torch_rtx.runtime.cudagraph import GraphPool
from torch_rtx.runtime.graphmemory import GraphMemory
from torch_rtx.runtime.session import _number

STORE = SimpleNamespace(generation=0, values=[])


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> GraphPool:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    pool = GraphPool(Graph("fused"), lambda code, inputs, weights: [], torch.device("cuda", 0), 2)

    def capture(code: Any, inputs: Any, store: Any) -> Any:
        pool.captures += 1
        return SimpleNamespace(used=0, code=code)

    monkeypatch.setattr(pool, "_capture", capture)
    return pool


def call(pool: GraphPool, key: object, store: Any = STORE, code: Any = None) -> bool:
    """One call with `key`; whether it replays a graph."""
    found = pool._find(key, code, [], store)
    pool.replays += found is not None
    pool._warm.done = True
    return found is not None


@pytest.mark.quick
def test_plain_then_captured(pool: GraphPool) -> None:
    assert [call(pool, "a") for _ in range(4)] == [False, True, True, True]
    assert pool.captures == 1


def test_other_code_is_captured_again(pool: GraphPool) -> None:
    """After a swap of the code the old graph is dropped, and the new code runs plain once before it is captured."""
    slow, fast = object(), object()
    assert [call(pool, "a", code=slow) for _ in range(3)] == [False, True, True]
    assert [call(pool, "a", code=fast) for _ in range(3)] == [False, True, True]
    assert pool.captures == 2
    assert [found.code for found in pool.captured.values()] == [fast]


def test_the_least_recently_used_goes_first(pool: GraphPool) -> None:
    for key in "aabbb":
        call(pool, key)
    assert [call(pool, "c") for _ in range(PATIENCE + 1)] == [*[False] * (PATIENCE - 1), True, True]
    assert set(pool.captured) == {"b", "c"}
    captures = pool.captures
    assert all(call(pool, key) for key in "bcbcbc")
    assert pool.captures == captures


def test_more_shapes_than_graphs(pool: GraphPool) -> None:
    """In turn, they would all lose their graph before they come again: two keep theirs, and nothing is captured."""
    replayed = [call(pool, key) for _ in range(100) for key in "abcde"]
    assert set(pool.captured) == {"a", "b"}
    assert (pool.captures, sum(replayed)) == (2, 198)


def test_keys_met_once_are_bounded(pool: GraphPool) -> None:
    for key in range(1000):
        assert not call(pool, key)
    assert len(pool._policy._misses) == TRACKED_PER_SLOT * 2


def test_moved_weights_empty_the_pool(pool: GraphPool) -> None:
    assert [call(pool, "a") for _ in range(2)] == [False, True]
    moved = SimpleNamespace(generation=1, values=[])
    assert not call(pool, "a", moved)
    assert pool.captured == {}
    assert call(pool, "a", moved)


def test_a_cleared_pool_captures_again(pool: GraphPool) -> None:
    assert [call(pool, "a") for _ in range(2)] == [False, True]
    pool.clear()
    assert pool.captured == {}
    assert [call(pool, "a") for _ in range(2)] == [False, True]
    assert pool.captures == 2


class Held:
    """A captured graph, which a memory follows weakly."""


def test_a_memory_ends_with_the_last_of_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch takes no more captures into a memory whose graphs are gone."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    memory = GraphMemory(torch.device("cuda", 0))
    memory.begin()
    first, graphs = memory.handle, [Held(), Held()]
    for graph in graphs:
        memory.hold(graph)
    graph = graphs.pop()
    memory.begin()
    assert memory.handle is first
    graphs.clear()
    memory.begin()
    assert memory.handle is first
    del graph
    memory.begin()
    assert memory.handle is not first


def test_after_a_failed_capture_others_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    memory, graph = GraphMemory(torch.device("cuda", 0)), Held()
    memory.begin()
    memory.hold(graph)
    before = memory.handle
    memory.leave()
    memory.begin()
    assert memory.handle is not before


def test_a_memory_lasts_as_long_as_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other graphs in it may be dropped meanwhile, by other threads."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    memory, graph = GraphMemory(torch.device("cuda", 0)), Held()
    memory.begin()
    memory.hold(graph)
    before, held = memory.handle, memory.begin()
    assert held == [graph]
    del graph
    memory.begin()
    assert memory.handle is before
    held.clear()
    memory.begin()
    assert memory.handle is not before


def test_memories_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of memories that are gone are used again."""
    monkeypatch.setattr(graphmemory, "_IDLE", defaultdict(list))
    monkeypatch.setattr(graphmemory, "new_stream", lambda device: object())
    one, other, elsewhere = (GraphMemory(torch.device("cuda", index)) for index in (0, 0, 1))
    streams = [memory.capture_stream for memory in (one, other, elsewhere)]
    assert len(set(streams)) == 3
    assert one.capture_stream is streams[0]
    del one, elsewhere
    assert GraphMemory(torch.device("cuda", 0)).capture_stream is streams[0]
    assert GraphMemory(torch.device("cuda", 1)).capture_stream is streams[2]


def test_numbers_that_differ_have_graphs_of_their_own() -> None:
    numbers = (0.0, -0.0, 0, False, 1.0, 1, True, 2, float("inf"))
    assert len({_number(number) for number in numbers}) == len(numbers)
    assert _number(float("nan")) == _number(float("nan"))
