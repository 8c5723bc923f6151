"""What two ranks check about collectives in compiled functions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.utils._pytree import tree_map

import torch_rtx
from tests.distributed.ranks import device
from torch_rtx.collectives import is_ordered
from torch_rtx.errors import RanksError
from torch_rtx.one_shot import ROOMS
from torch_rtx.runtime.session import watched_calls
from torch_rtx.runtime.shared_tuning import SharedTuning


def _in_place(x: Tensor) -> Tensor:
    y = x * 2
    dist.all_reduce(y)
    return y + 1


def _two_at_once(x: Tensor) -> tuple[Tensor, Tensor]:
    gathered = funcol.all_gather_tensor(x * 3, 0, dist.group.WORLD)
    reduced = funcol.all_reduce(x.relu(), "max", dist.group.WORLD)
    return gathered.sum(0) * reduced, reduced


def _of_an_input(x: Tensor) -> Tensor:
    """The collective reads what the function overwrites after the wait."""
    gathered = funcol.wait_tensor(funcol.all_gather_tensor(x, 0, dist.group.WORLD))
    x.mul_(2)
    return gathered + 1


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce of a transpose": lambda x: funcol.all_reduce(x.exp().t(), "sum", dist.group.WORLD),
    "all_reduce_coalesced": lambda x: funcol.all_reduce_coalesced([x, x * 2], "sum", dist.group.WORLD)[1] + 1,
    "all_gather": lambda x: funcol.all_gather_tensor(x.t().contiguous(), 0, dist.group.WORLD) * 2,
    "all_gather_coalesced": lambda x: funcol.all_gather_into_tensor_coalesced([x, x + 1], dist.group.WORLD)[1].cos(),
    "reduce_scatter": lambda x: funcol.reduce_scatter_tensor(x.exp(), "sum", 0, dist.group.WORLD).relu(),
    "reduce_scatter_coalesced": lambda x: funcol.reduce_scatter_tensor_coalesced(
        [x, x.exp()], "sum", [0, 0], dist.group.WORLD
    )[1],
    "all_to_all uneven": lambda x: funcol.all_to_all_single(x * 2, [2, 2], [2, 2], dist.group.WORLD) + 1,
    "broadcast": lambda x: funcol.broadcast(x + 1, 1, dist.group.WORLD) * 3,
    "all_reduce returned": lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD),
    "all_reduce in place": _in_place,
    "two at once": _two_at_once,
    "of an input that is overwritten": _of_an_input,
}


def all_forms(x: Tensor) -> dict[str, Any]:
    """What each form returns for a copy of `x`, and what it leaves of this."""
    found = {}
    for name, function in FORMS.items():
        given = x.clone()
        found[name] = function(given), given
    return found


def forms() -> list[str]:
    """Check that the compiled functions return what eager ones do; returns the kinds of the nodes for collectives."""
    with torch.no_grad(), watched_calls() as calls:
        compiled = torch.compile(all_forms, backend="rtx", fullgraph=True)
        x = torch.randn(4, 6, device=device()) + dist.get_rank()
        torch.testing.assert_close(compiled(x), tree_map(torch.as_tensor, all_forms(x)))
    ((session, _),) = calls
    return [node.kind for node in session.graph.nodes if is_ordered(node)]


def replayed(count: int) -> tuple[str | None, int]:
    """Check calls of a function with collectives, also after it was captured as a CUDA graph; returns why it was not,
    and how many calls replayed it."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = funcol.all_reduce(x @ w, "sum", dist.group.WORLD)
        return funcol.all_gather_tensor(y.relu() @ w, 0, dist.group.WORLD) * 2, y

    compiled = torch.compile(function, backend="rtx", fullgraph=True, dynamic=False)
    w = torch.randn(64, 64, device=device()) / 8
    with torch.no_grad(), watched_calls() as calls:
        for step in range(count):
            torch.manual_seed(step + dist.get_rank())
            x = torch.randn(16, 64, device=device())
            torch.testing.assert_close(compiled(x, w), tree_map(torch.as_tensor, function(x, w)), rtol=1e-2, atol=1e-2)
            if step == 2:
                torch_rtx.wait(120)
    session, _ = calls[-1]
    return session.no_graphs, 0 if session.pool is None else session.pool.replays


def measured() -> tuple[dict[str, str], int]:
    """Check a function that ranks measure together; returns the tactics of its regions, and how many of these this rank
    has measured."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = (x @ w).relu().softmax(-1) + x.sum(0)
            w = torch.cat([w, w.sin()], 1)[:, : 2 * x.shape[1]].repeat(2, 1)
            x = x.repeat(1, 2)
        return x

    compiled = torch.compile(function, backend="rtx", fullgraph=True, options={"runtime_cache": "off"})
    given, taken = (torch.randn(32, 64, device=device()), torch.randn(64, 64, device=device())), SharedTuning.take
    counts = []

    def take(shared: SharedTuning) -> list[str]:
        counts.append(len(found := taken(shared)))
        return found

    with torch.no_grad(), watched_calls() as calls, patch.object(SharedTuning, "take", take):
        dist.barrier()
        compiled(*given)
        assert torch_rtx.wait(120)
        torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-2, atol=1e-2)
    base = calls[-1][0].specializer.base
    return {one.key: one.choice.name for one in base.regions if one.choice is not None}, sum(counts)


def random_shapes(count: int) -> None:
    """Calls of random sizes, compiled in the background at other times on each rank, in step."""

    def function(x: Tensor) -> Tensor:
        y = funcol.all_reduce(x.exp().sum(1), "sum", dist.group.WORLD)
        return funcol.all_gather_tensor(y * 2, 0, dist.group.WORLD)

    compiled = torch.compile(function, backend="rtx", fullgraph=True, dynamic=True)
    sizes = torch.randint(2, 300, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        for rows, columns in sizes:
            x = torch.full((rows, columns), float(dist.get_rank()), device=device())
            wanted = 2 * columns * sum(torch.tensor(float(rank)).exp() for rank in range(dist.get_world_size()))
            found = compiled(x)
            torch.testing.assert_close(found, torch.full_like(found, float(wanted)), rtol=1e-4, atol=1e-4)
            assert found.shape == (rows * dist.get_world_size(),)


def different_programs() -> None:
    """A rank has its collectives in another order than the other one: an error of both, and none waits."""
    group = dist.new_group(list(range(dist.get_world_size())))

    def reduced(x: Tensor) -> Tensor:
        return funcol.all_reduce(x * 2, "sum", group)

    def gathered(x: Tensor) -> Tensor:
        return funcol.all_gather_tensor(x, 0, group).sum()

    def function(x: Tensor, first: bool) -> Tensor:
        return gathered(reduced(x)) if first else reduced(gathered(x))

    compiled = torch.compile(function, backend="rtx", fullgraph=True)
    problem = "collective 1 of rank . is all_.*, and that of rank . is all_"
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RanksError, match=problem):
            compiled(torch.ones(4, device=device()), dist.get_rank() == 0)


def killed() -> None:
    """The second rank is killed while both replay a CUDA graph, which has no timeout: the first one ends as well."""
    compiled = torch.compile(lambda x: funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1, backend="rtx")
    x = torch.ones(4096, 4096, device=device())
    with torch.no_grad():
        for step in range(12):
            compiled(x)
            if step == 2:
                torch_rtx.wait(60)
        torch.cuda.synchronize()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                compiled(x)
                torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)


def leave() -> None:
    """The second rank ends in the middle of a call, the first one waits for it."""

    def function(x: Tensor) -> Tensor:
        return funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    compiled = torch.compile(function, backend="rtx", fullgraph=True)
    with torch.no_grad():
        compiled(torch.ones(4, device=device()))
        if dist.get_rank() == 1:
            os._exit(1)
        with pytest.raises(RanksError, match=r"(?i)a collective of the group .*(connection|peer|closed)"):
            compiled(torch.ones(4, device=device()))
    raise EOFError("the other rank has ended")


def small_sums(count: int) -> tuple[int, int]:
    """Check sums by kernels, of sizes below and above the limit, in turn with other collectives; returns the limit,
    and how many calls replayed a CUDA graph."""

    def function(x: Tensor) -> Tensor:
        y = funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + x
        z = funcol.all_gather_tensor(funcol.all_reduce(y + 1, "sum", dist.group.WORLD), 0, dist.group.WORLD)
        return funcol.all_reduce(z.relu(), "sum", dist.group.WORLD)

    compiled = torch.compile(function, backend="rtx", fullgraph=True, dynamic=False)
    with torch.no_grad(), watched_calls() as calls:
        for step in range(count):
            for rows in (2, 64, 4096):
                x = torch.full((rows, 512), float(dist.get_rank() + step), device=device())
                torch.testing.assert_close(compiled(x), torch.as_tensor(function(x)))
            if step == 2:
                torch_rtx.wait(60)
    room = ROOMS.get(dist.group.WORLD.group_name)
    session, _ = calls[-1]
    return (0 if room is None else room.limit), (0 if session.pool is None else session.pool.replays)
