"""Small sums over ranks by kernels: which are, what code does with them, and that all ranks choose alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_rtx import one_shot
from torch_rtx.irparse import parse
from torch_rtx.one_shot import ROOMS, Room
from torch_rtx.runtime import one_shot_choice, ranks
from torch_rtx.runtime.code import compile_graph

CPU = torch.device("cpu")
GRAPH = """graph import {
  input x: f32[4, 4]
  a: f32[4, 4] = op aten.exp.default(self=x)
  b: f32[4, 4] = op _c10d_functional.all_reduce_.default(input=a, reduce_op="sum", group_name="group of a test")
  c: f32[4, 4] = op torch_rtx.wait.default(tensor=b)
  d: f32[4, 4] = op aten.add.Tensor(self=c, other=x)
  return [d]
}
"""


def room(limit: int = 1024, one_shot: int = 1024) -> Room:
    memory = torch.zeros(1024, dtype=torch.bfloat16)
    return Room(one_shot, limit, {dtype: memory.view(dtype) for dtype in one_shot_choice.DTYPES})


@pytest.fixture
def kernel() -> Iterator[list[int]]:
    """PyTorch's kernels, as if another rank had the same operand; collects the sizes, negative ones of two shots."""
    calls: list[int] = []

    def add_up(shared: torch.Tensor, own: torch.Tensor, op: str, group: str, out: torch.Tensor) -> torch.Tensor:
        assert (op, shared.shape, own.data_ptr() % 16) == ("sum", own.shape, 0)
        calls.append(own.numel())
        return out.copy_(shared.copy_(own) * 2)

    def in_two(shared: torch.Tensor, op: str, group: str, out: torch.Tensor) -> torch.Tensor:
        assert (op, shared.shape, out.data_ptr() % 16) == ("sum", out.shape, 0)
        calls.append(-shared.numel())
        return out.copy_(shared * 2)

    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        library.impl("two_shot_all_reduce_out", in_two, "CPU")
        library.impl("one_shot_all_reduce_copy_out", add_up, "CPU")
        yield calls


def test_code_adds_up_in_the_room_of_a_group(kernel: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROOMS, "group of a test", room())
    x = torch.randn(4, 4)
    (found,) = compile_graph(parse(GRAPH), CPU)([x], ())
    torch.testing.assert_close(found, 2 * x.exp() + x)
    assert kernel == [16]
    monkeypatch.setitem(ROOMS, "group of a test", room(one_shot=32))
    (found,) = compile_graph(parse(GRAPH), CPU)([x], ())
    torch.testing.assert_close(found, 2 * x.exp() + x)
    assert kernel == [16, -16]
    monkeypatch.setitem(ROOMS, "group of a test", room(limit=32))
    with pytest.raises(RuntimeError, match="group of a test"):  # there is no such group to ask
        compile_graph(parse(GRAPH), CPU)([x], ())


@pytest.mark.parametrize("one_shot", [1024, 0])
def test_an_operand_at_any_address(kernel: list[int], one_shot: int) -> None:
    memory = torch.ones(9)
    room(one_shot=one_shot).add_up(memory[1:], "any")
    assert memory.tolist() == [1.0] + [2.0] * 8


def test_what_is_added_up() -> None:
    one = room()
    assert one.takes(torch.ones(4, 4))
    assert one.takes(torch.ones(8, dtype=torch.bfloat16))
    for other in (
        torch.ones(512),  # too large
        torch.ones(3),  # not a multiple of 16 bytes
        torch.ones(0),
        torch.ones(4, 4, dtype=torch.float64),
        torch.ones(4, 8)[:, ::2],
        torch.ones(4, 4, device="meta"),
    ):
        assert not one.takes(other)


class Group:
    """A group of two ranks."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = lambda: rank, lambda: 2


@pytest.mark.parametrize(
    ("case", "one_shot", "expected"),
    [
        ("one is slower from 32 KiB on", 8 << 10, 8 << 10),
        ("two shots are faster from 512 KiB on", 128 << 10, 2 << 20),
        ("always faster", 2 << 20, 2 << 20),
        ("never faster", 0, 0),
        ("one is blind", 0, 0),
    ],
)
def test_ranks_choose_alike(case: str, one_shot: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank finds counts for both."""
    store = torch.distributed.HashStore()
    here = threading.local()

    def us(call: Any, device: torch.device) -> float:
        if call.func is torch.distributed.all_reduce:
            return 10.0
        size = call.args[0].nbytes
        if not call.func.__self__.one_shot:
            return 7.0 if case == "always faster" or case.startswith("two shots") else 11.0
        if case.startswith("two shots"):
            return 8.0 if size >= 512 << 10 else 6.0
        slow = case == "never faster" or (case.startswith("one is slower") and here.rank == 1 and size >= 32 << 10)
        return 12.0 if slow else 6.0

    monkeypatch.setattr(ranks, "shared_store", lambda: store)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu"))
    monkeypatch.setattr(one_shot_choice, "_see", lambda device, places: case != "one is blind" or here.rank == 0)
    monkeypatch.setattr(one_shot_choice, "_shared", lambda group, device: room().buffers)
    monkeypatch.setattr(one_shot_choice, "_us", us)
    found: dict[int, int] = {}

    def choose(rank: int) -> None:
        here.rank = rank
        found[rank] = one_shot_choice.choose("both", Group(rank), torch.device("cuda:0"), "key")

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chosen = ROOMS.pop("both", None)
    assert found == {0: expected, 1: expected}
    assert (chosen.one_shot, chosen.limit) == (one_shot, expected) if chosen else not expected


def test_no_room_without_gpus() -> None:
    assert one_shot_choice.choose("none", Group(0), CPU, "key") == 0
    assert "none" not in one_shot.ROOMS
