"""Programs that write to their inputs, whole and in part: results, and all inputs afterwards, are eager's.

Kernels run in Triton's interpreter, in programs of an element or a row each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rtx
from tests.lowering.test_training_graphs import recorded
from tests.runtime.pools import graph_pools
from tests.runtime.test_arena import whole_nodes
from tests.runtime.test_overwriting import one_by_one
from torch_rtx.ir import COPY, Graph, kernel_nodes
from torch_rtx.runtime import session
from torch_rtx.runtime.code import Code, compile_graph
from torch_rtx.runtime.overwriting import overwritten
from torch_rtx.runtime.strided import are_apart

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
Function = Callable[..., Any]


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Code]]:
    """Kernels are formed and launched; the code that was generated meanwhile."""
    made: list[Code] = []

    def compiled(graph: Graph, device: torch.device, *args: Any, **options: Any) -> Code:
        launchers = {node.op: one_by_one(node) for node in kernel_nodes(graph)}
        names = ("distinct", "guarded")
        given = {key: value for key, value in options.items() if key in names}
        made.append(compile_graph(graph, device, *args[:2], tactics=whole_nodes(launchers), **given))
        return made[-1]

    monkeypatch.setattr(session, "compile_graph", compiled)
    with recorded():
        yield made


def left(code: Code) -> int:
    """The copies that no kernel makes."""
    return sum(node.op == COPY for node in code.graph.nodes) - len(overwritten(code.graph))


def assert_as_eager(function: Function, make: Callable[[], Sequence[Tensor]], calls: int = 2) -> None:
    """A compiled function gives, and leaves in its arguments, what it does without a compiler; `make` draws these."""
    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    found = make()
    compiled = torch.compile(function, backend="rtx", fullgraph=True, options={"reuse_cached_engines": False})
    for _ in range(calls):
        torch.testing.assert_close(compiled(*found), function(*expected))
        torch.testing.assert_close(found, expected)


def swap(a: Tensor, b: Tensor) -> None:
    old = a.clone()
    a.copy_(b)
    b.copy_(old)


def rotate(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    old = a + 1
    a.copy_(b)
    b.copy_(c)
    c.copy_(old)
    return old


def narrow(a: Tensor, b: Tensor) -> Tensor:
    a.copy_((b * 2).half())
    b.copy_(a[0])
    return a * b


def same(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    new = c.exp()
    a.copy_(new)
    b.copy_(new)
    return new


def count(a: Tensor, b: Tensor, n: Tensor) -> Tensor:
    places = torch.arange(2) + n
    n.add_(2)
    a.index_copy_(0, places, b)
    return a * n


def flip(a: Tensor, b: Tensor) -> Tensor:
    a.copy_(a.flip(1) + b)
    return a.sum()


def window(a: Tensor, b: Tensor) -> Tensor:
    a.copy_(torch.cat([a[:, 1:], b[:, :1]], 1))
    return a.mean(1)


def square(a: Tensor) -> Tensor:
    a.copy_(a.T + a)
    return a[0]


def late(a: Tensor, b: Tensor) -> Tensor:
    old = a * 2
    a.add_(b)
    return old.softmax(-1) + a


def drawn(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape) for shape in shapes]


def halves() -> list[Tensor]:
    """Columns of one tensor, each beside the other's."""
    both = torch.randn(4, 12)
    return [both[:, ::2], both[:, 1::2]]


def overlapping() -> list[Tensor]:
    memory = torch.randn(30)
    return [memory[:24].view(4, 6), memory[6:].view(4, 6)]


def cache() -> list[Tensor]:
    return [torch.randn(6, 3), torch.randn(2, 3), torch.ones((), dtype=torch.int64)]


CASES: dict[str, tuple[Function, Callable[[], Sequence[Tensor]], int]] = {
    "swap": (swap, drawn((4, 6), (4, 6)), 2),
    "swap of interleaved columns": (swap, halves, 1),
    "rotation": (rotate, drawn((4, 6), (4, 6), (4, 6)), 3),
    "other dtype, and a row for each": (narrow, lambda: [torch.ones(4, 6).half(), torch.randn(4, 6)], 1),
    "one value for two": (same, drawn((4, 6), (4, 6), (4, 6)), 0),
    "one value for what overlaps": (same, lambda: [*overlapping(), torch.randn(4, 6)], 1),
    "a counter": (count, cache, 1),
    "other columns": (flip, drawn((4, 6), (4, 6)), 1),
    "a window": (window, drawn((4, 6), (4, 6)), 1),
    "a transposition": (square, drawn((5, 5)), 1),
    "rows of old contents": (late, drawn((4, 6), (4, 6)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_writes(name: str, codes: list[Code]) -> None:
    function, make, copies = CASES[name]
    assert_as_eager(function, make, 2)
    assert left(codes[-1]) == copies


STEPS: Sequence[Callable[..., Tensor]] = (
    lambda a, b, c: a.copy_(b),
    lambda a, b, c: a.copy_(b + c),
    lambda a, b, c: a.add_(b),
    lambda a, b, c: a.mul_(c.sigmoid()),
    lambda a, b, c: a.copy_(c[0]),
    lambda a, b, c: a.copy_(b.half() * 2),
    lambda a, b, c: a[1:3].copy_(b[:2]),
    lambda a, b, c: a.copy_(b.flip(0)),
    lambda a, b, c: a.copy_((b - b.mean(1, keepdim=True)) * 2),
    lambda a, b, c: a.zero_(),
)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_programs(seed: int, codes: list[Code]) -> None:
    """Any writes in any order, also to inputs that overlap."""
    draw = random.Random(seed)
    program = [(draw.choice(STEPS), draw.sample(range(4), 3)) for _ in range(draw.randint(2, 5))]

    def function(*tensors: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        for step, (target, *others) in program:
            given = (tensors[at].clone() if is_shared else tensors[at] for at in others)  # calls refuse overlaps
            seen.append(step(tensors[target], *given).clone())
        return seen[1::2]

    is_shared = seed % 4 == 3
    make = (lambda: [*overlapping(), *halves()]) if is_shared else drawn(*[(4, 6)] * 4)
    assert_as_eager(function, make)


class Stepper(nn.Module):
    """Counts its calls, and keeps a state, which may lie in the memory of another one."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        memory = torch.arange(10.0)
        self.register_buffer("state", memory[:6] if shared else torch.ones(6))
        self.register_buffer("other", memory[4:] if shared else torch.ones(6))
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))
        self.register_buffer("second", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        number = y[0].long()
        self.first.copy_(number + 1)
        self.second.copy_(number + 1)
        old = self.other * 2
        self.state.copy_(self.state * 0.5 + y)
        self.other.copy_(old + y)
        x.add_(y)
        return old + y


def test_engines_write_over_inputs_and_weights(codes: list[Code]) -> None:
    x, y = torch.rand(6), torch.rand(6)
    engine = torch_rtx.compile(Stepper(), (x, y))
    eager, expected = Stepper(), x.clone()
    assert {value.name for value in overwritten(codes[-1].graph).values()} == codes[-1].graph.written
    for _ in range(2):
        torch.testing.assert_close(engine(x, y), eager(expected, y))
        torch.testing.assert_close([x, *engine.state_dict().values()], [expected, *eager.state_dict().values()])


def test_engines_write_late_where_memory_is_shared(codes: list[Code]) -> None:
    """All is read as it was before the call, and the last write of the program stays."""
    memory = torch.rand(8)
    x, y = memory[:6], memory[2:]
    engine = torch_rtx.compile(Stepper(), (torch.rand(6), torch.rand(6)))
    eager = Stepper()
    for _ in range(2):
        expected, given = x.clone(), y.clone()
        torch.testing.assert_close(engine(x, y), eager(expected, given))
        torch.testing.assert_close([x, *engine.state_dict().values()], [expected, *eager.state_dict().values()])
    module = Stepper(shared=True)
    x, y = torch.rand(6), torch.rand(6)
    engine.attach(module)
    halved, doubled = module.state * 0.5 + y, module.other * 2 + y
    torch.testing.assert_close(engine(x, y), doubled)
    torch.testing.assert_close([module.state[:4], module.other], [halved[:4], doubled])


class Returning(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(1)
        return y * 2, y


def test_an_input_that_is_returned_is_no_copy(codes: list[Code]) -> None:
    x, y = torch.rand(6), torch.rand(6)
    engine = torch_rtx.compile(Returning(), (x, y))
    assert engine(x, y)[1] is y
    old = x.clone()
    doubled, same = engine(x, x)
    torch.testing.assert_close([doubled, same, x], [2 * old, old + 1, old + 1])


def test_which_tensors_are_apart() -> None:
    memory = torch.rand(12)
    assert are_apart([memory[:4], memory[4:8]], [memory[8:], memory[9:], memory[:0]])
    assert not are_apart([memory[:4], memory[3:8]], [])
    assert not are_apart([memory[:4]], [memory[8:], memory])
    assert not are_apart([memory[4:6]], [memory[5:6]])
    assert are_apart([], [memory, memory])


@pytest.mark.gpu
def test_engines_on_a_gpu() -> None:
    """Under a CUDA graph, with inputs that change their place, and that overlap."""
    memory = torch.rand(400, device="cuda")
    x, other, y = memory[:6], memory[64:70], memory[128:134]
    engine, eager = torch_rtx.compile(Stepper().cuda(), (x, y)), Stepper().cuda()
    for at in range(12):
        if at == 4:
            assert torch_rtx.wait(120)
        given, read = (other, y) if at % 4 == 3 else (x, x) if at > 8 else (x, y)
        expected, before = given.clone(), read.clone()
        torch.testing.assert_close(engine(given, read), eager(expected, before))
        torch.testing.assert_close([given, *engine.state_dict().values()], [expected, *eager.state_dict().values()])
    assert any(pool.replays for pool in graph_pools())
