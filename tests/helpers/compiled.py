"""What the tests of torch.compile(backend="rtx") share: comparing with eager, and recording what was compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_rtx.backend import entry
from torch_rtx.runtime.session import Session


class Recorder:
    """The graphs that were compiled since it was installed, as their sessions; count the backend's calls by `len`."""

    def __init__(self, monkeypatch: Any) -> None:
        self.sessions: list[Session] = []

        def record(*args: Any, **kwargs: Any) -> Session:
            self.sessions.append(Session(*args, **kwargs))
            return self.sessions[-1]

        monkeypatch.setattr(entry, "Session", record)

    def __len__(self) -> int:
        return len(self.sessions)

    @property
    def ops(self) -> list[str]:
        """The calls of all graphs, in order: without namespace and overload, fallbacks with a `!` before them."""
        return [("!" if n.kind == "fallback" else "") + _short(n.op) for s in self.sessions for n in s.graph.nodes]

    @property
    def fallbacks(self) -> list[str]:
        return [op for op in self.ops if op.startswith("!")]


def _short(op: str) -> str:
    return op.split(".")[1] if "." in op else op  # kernels, and calls of Python, have names without one


def compile_rtx(function: Any, **kwargs: Any) -> Any:
    """`torch.compile` to one graph, unless told otherwise."""
    return torch.compile(function, backend="rtx", **{"fullgraph": True, **kwargs})


class Counter:
    """The backend, with `frame_count`, the number of graphs it got from Dynamo."""

    def __init__(self) -> None:
        self.frame_count = 0

    def __call__(self, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        self.frame_count += 1
        return entry.rtx(gm, example_inputs, **kwargs)


def counted(function: Any, **kwargs: Any) -> tuple[Any, Counter]:
    counter = Counter()
    return torch.compile(function, backend=counter, **{"fullgraph": True, **kwargs}), counter


def same(actual: Any, expected: Any, **tolerance: Any) -> None:
    """Equal structure, and equal tensors: values, dtypes, shapes, strides, requires_grad."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, equal_nan=True, check_stride=True, **tolerance)
            assert a.requires_grad == b.requires_grad
        else:
            assert type(a) is type(b)
            assert a == b


def check(function: Callable[..., Any], *args: Any, runs: int = 2, compiled: Any = None, **kwargs: Any) -> Any:
    """Call eager and compiled on copies of the arguments, `runs` times: same results, same arguments afterwards."""
    compiled = compile_rtx(function) if compiled is None else compiled
    for _ in range(runs):
        for_eager, for_compiled = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
        expected = function(*for_eager[0], **for_eager[1])
        actual = compiled(*for_compiled[0], **for_compiled[1])
        same(actual, expected)
        same(for_compiled, for_eager)
    return compiled
