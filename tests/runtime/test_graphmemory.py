"""Forward and backward graphs in one memory, without a GPU: gradients lie where saved tensors were, unnoticed."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tests.doubles.fake_graphs import DEVICE, SIZES, FakeGraph, GraphDriver, add, adders, install, program
from torch_rtx import aten
from torch_rtx.backend import capture, compiler
from torch_rtx.backend.entry import static_inputs
from torch_rtx.backend.training import TrainingStep
from torch_rtx.backend.undefined_gradients import without
from torch_rtx.ir import Graph
from torch_rtx.lowering.from_fx import Role
from torch_rtx.runtime import cudagraph
from torch_rtx.runtime.code import PLACED, Code, compile_graph
from torch_rtx.runtime.control import Owned
from torch_rtx.runtime.cudagraph import GraphPool
from torch_rtx.runtime.graphmemory import MOVES, Block, block_of, references
from torch_rtx.runtime.plan import Room
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import CompilationSettings, RuntimeSettings

CPU = torch.device("cpu")
SIZE = 32


class Half:
    """The forward or the backward of a step: kernels that add, and calls."""

    def __init__(self, driver: GraphDriver, text: str, **options: Any) -> None:
        self.graph = program(text.replace("[s]", f"[{SIZE}]"))
        self.code = compile_graph(self.graph, CPU, tactics=adders(self.graph, driver, size=SIZE))
        store: Any = SimpleNamespace(generation=0, values=[])

        def run(code: Code, inputs: Any, *given: Any) -> list[Any]:
            return code.run(inputs, *given)

        def placed(code: Code, stay: frozenset[str], room: Room | None) -> Code:
            return compile_graph(code.graph, CPU, tactics=code.tactics, stay=stay, room=room)

        self.pool = GraphPool(self.graph, run, DEVICE, 4, guarded=True, compiled=placed, **options)
        self.key, self._store = object(), store

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        return self.pool(self.key, self.code, inputs, self._store)


class Step:
    """A forward that saves and its backward, as autograd calls them.

    Args:
        saved: how many of the last results of the forward are saved; the first inputs of the backward.
        parameters: how many of the first inputs of the forward stay where they are.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, forward: str, backward: str, saved: int, parameters: int = 0
    ) -> None:
        driver = GraphDriver(SIZES, {"entry": add})
        install(monkeypatch, driver)
        self.keeps = False
        monkeypatch.setattr(cudagraph, "KEEPS_GRAPH", lambda: self.keeps)
        outputs = len(program(forward).outputs)
        self.saved = range(outputs - saved, outputs)
        self.forward = Half(driver, forward, saved=frozenset(self.saved), pinned=frozenset(range(parameters)))
        self.backward = Half(driver, backward, pinned=frozenset(range(saved)))

    def begin(self, *inputs: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """The results of the forward, and what it has saved."""
        results = self.forward(*inputs)
        return results[: self.saved.start], results[self.saved.start :]

    def replays(self) -> tuple[int, int]:
        return self.forward.pool.replays, self.backward.pool.replays

    def block(self) -> Block:
        (graph,) = self.forward.pool.captured.values()
        assert graph.block is not None
        return graph.block


FORWARD = """
  input p: f32[s]
  input x: f32[s]
  u: f32[s] = kernel k(in0=p, in1=x) KERNEL
  v: f32[s] = kernel k(in0=p, in1=p) KERNEL
  a: f32[s] = kernel k(in0=u, in1=v) KERNEL
  b: f32[s] = kernel k(in0=a, in1=u) KERNEL
  c: f32[s] = kernel k(in0=b, in1=v) KERNEL
  return [c, a, b]
"""
BACKWARD = """
  input a: f32[s]
  input b: f32[s]
  input t: f32[s]
  d: f32[s] = kernel k(in0=t, in1=b) KERNEL
  e: f32[s] = kernel k(in0=d, in1=t) KERNEL
  g: f32[s] = kernel k(in0=e, in1=a) KERNEL
  return [d, g]
"""


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """A step whose graphs replay, of a parameter `p`, which is its first input."""
    made = Step(monkeypatch, FORWARD, BACKWARD, 2, 1)
    p = torch.randn(SIZE)
    for _ in range(4):
        check(made, p)
    assert made.replays() == (3, 2)  # the backward is captured when its inputs come the second time
    made.p = p  # type: ignore[attr-defined]
    return made


def right(p: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> list[torch.Tensor]:
    a = p + x + p + p
    b = a + p + x
    return [t + b, t + b + t + a]


def check(step: Step, p: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a step, which are right."""
    x, t = torch.randn(SIZE), torch.randn(SIZE)
    _, saved = step.begin(p, x)
    gradients = step.backward(*saved, t)
    torch.testing.assert_close(gradients, right(p, x, t))
    return gradients


def test_gradients_lie_over_what_was_saved(step: Step) -> None:
    gradients = check(step, step.p)
    block = step.block()
    assert {gradient.untyped_storage().data_ptr() for gradient in gradients} == {block.storage.data_ptr()}
    assert block.storage.nbytes() == 4 * 256  # as much as the forward needs
    assert [graph._likes for graph in step.backward.pool.captured.values()] == [[]]  # a replay brings no memory


def test_a_gradient_that_is_kept_keeps_its_value(step: Step) -> None:
    """No parameter has it, so that it can't be moved: the forward runs its plain code."""
    before = step.replays()
    d, g = check(step, step.p)
    expected = g.clone()
    del d
    check(step, step.p)
    assert torch.equal(g, expected)
    assert step.replays() == (before[0] + 1, before[1] + 1)
    del g
    check(step, step.p)
    assert step.replays() == (before[0] + 2, before[1] + 2)


def test_gradients_that_are_accumulated_move(step: Step) -> None:
    """`.grad` takes the first ones as they are, and adds those of later steps."""
    for _ in range(3):
        before, total = step.replays(), torch.zeros(SIZE)
        for micro in range(4):
            g = check(step, step.p)[1]
            total += g
            if micro:
                step.p.grad += g
            else:
                step.p.grad = g.detach()
            del g
        torch.testing.assert_close(step.p.grad, total)
        assert step.replays() == (before[0] + 4, before[1] + 4)
        step.p.grad = None


def test_a_view_of_a_gradient_follows_it(step: Step) -> None:
    """No gradient moves away from its views; the forward runs its plain code."""
    step.p.grad = check(step, step.p)[1]
    view, before = step.p.grad.view(-1), step.replays()
    check(step, step.p)
    step.p.grad += 1
    assert torch.equal(view, step.p.grad)
    assert step.replays() == before
    del view
    check(step, step.p)
    assert step.replays() == (before[0] + 1, before[1] + 1)


def test_gradients_that_move_in_each_step_get_memory_of_their_own(step: Step) -> None:
    """As where a loop clears `.grad` between forward and backward. The room stays that of temporary values."""
    places = []
    for _ in range(MOVES + 4):
        x, t = torch.randn(SIZE), torch.randn(SIZE)
        _, saved = step.begin(step.p, x)
        step.p.grad = None
        gradients = step.backward(*saved, t)
        del saved
        torch.testing.assert_close(gradients, right(step.p, x, t))
        step.p.grad = gradients.pop()
        places.append(step.p.grad.untyped_storage().data_ptr() == step.block().storage.data_ptr())
        del gradients
    assert places == [*[True] * MOVES, *[False] * 4]
    (graph,) = step.backward.pool.captured.values()
    assert not graph.is_stale
    before = step.replays()
    check(step, step.p)
    assert step.replays() == (before[0] + 1, before[1] + 1)


def test_a_result_that_is_returned_twice_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters with one gradient would else share it."""
    step = Step(monkeypatch, FORWARD, BACKWARD.replace("[d, g]", "[d, g, d, g]"), 2, 1)
    p = torch.randn(SIZE)
    for _ in range(4):
        x, t = torch.randn(SIZE), torch.randn(SIZE)
        d, g, d2, g2 = step.backward(*step.begin(p, x)[1], t)
        torch.testing.assert_close([d, g], right(p, x, t))
        assert (d is d2, g is g2) == (True, True)
        del d, g, d2, g2
    assert step.replays()[1] == 2


def test_autograd_may_call_a_forward_in_a_thread_of_its_own(step: Step) -> None:
    """Where a checkpoint computes it again: this is no thread that trains."""
    with ThreadPoolExecutor(1) as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
        other.submit(check, step, step.p).result()
    step.p.grad = check(step, step.p)[1]
    before = step.replays()
    check(step, step.p)
    assert step.replays() == (before[0] + 1, before[1] + 1)


def test_gradients_without_memory_stay(step: Step) -> None:
    """A sparse one has no memory of its own."""
    g = check(step, step.p)[1]
    step.p.grad = torch.zeros(SIZE).to_sparse()
    expected = g.clone()
    check(step, step.p)
    assert torch.equal(g, expected)


def test_no_gradient_moves_while_other_threads_train(step: Step) -> None:
    """They may be adding to it."""
    step.forward.pool.memory.threads.add(-1)
    before = step.replays()
    step.p.grad = check(step, step.p)[1]
    expected, place = step.p.grad.clone(), step.p.grad.data_ptr()
    check(step, step.p)
    assert (step.p.grad.data_ptr(), step.replays()) == (place, (before[0] + 1, before[1] + 1))
    assert torch.equal(step.p.grad, expected)
    for _ in range(MOVES - 1):
        assert step.block().takes_gradients
        check(step, step.p)
    assert not step.block().takes_gradients  # from now on they are in nobody's way


def test_a_backward_that_is_kept_writes_over_nothing(step: Step) -> None:
    x, t = torch.randn(SIZE), torch.randn(SIZE)
    _, saved = step.begin(step.p, x)
    values = [tensor.clone() for tensor in saved]
    step.keeps = True
    before = step.replays()
    for _ in range(3):
        torch.testing.assert_close(step.backward(*saved, t), right(step.p, x, t))
        assert all(map(torch.equal, saved, values))
    step.keeps = False
    torch.testing.assert_close(step.backward(*saved, t), right(step.p, x, t))
    assert step.replays() == (before[0], before[1] + 3)
    assert not all(map(torch.equal, saved, values))


def test_both_graphs_are_in_one_memory(step: Step) -> None:
    assert next(iter(step.forward.pool.captured.values())).kept_bytes == step.block().storage.nbytes()
    pools = step.forward.pool, step.backward.pool
    (forward, backward) = (graph for pool in pools for graph in pool.captured.values())
    assert backward._memory is forward._memory is step.block().memory


def test_memory_that_somebody_gives_back(step: Step) -> None:
    """They have resized the storage of a gradient: the graph would use memory that it no longer has."""
    step.block().storage = torch.empty(0).untyped_storage()  # the double's memory can't be given back
    before = step.forward.pool.captures
    for _ in range(4):
        check(step, step.p)
    assert step.forward.pool.captures == before + 1


def test_the_backward_goes_with_its_forward(step: Step) -> None:
    """Its graph would keep the memory."""
    step.forward.pool.captured.clear()
    gc.collect()  # a graph may be in a cycle with a frame
    assert block_of([]) is None
    check(step, step.p)
    assert not step.backward.pool.captured
    for _ in range(4):
        check(step, step.p)
    assert step.backward.pool.replays >= 4


def test_references_are_those_of_the_tensors_alone() -> None:
    """Others may be about to go, and would hide one that comes."""
    first = torch.empty(64)
    second, other = PLACED(first, (8,), (1,), 0), first.detach()
    storage = first.untyped_storage()
    assert (references([first, second, first]), references([second])) == (3, 2)
    del other
    assert torch._C._storage_Use_Count(storage._cdata) == 3


def test_a_clear_of_workspaces_follows_each_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each graph would have one of its own."""
    cleared: list[int] = []
    monkeypatch.setattr(cudagraph, "CLEAR_WORKSPACES", lambda: cleared.append(len(FakeGraph.last.nodes)))
    made = Step(monkeypatch, FORWARD, BACKWARD, 2, 1)
    p = torch.randn(SIZE)
    for _ in range(4):
        check(made, p)
    assert cleared == [5, 3]


CALLS = """
  input a: f32[s]
  input b: f32[s]
  input t: f32[s]
  d: f32[s] = kernel k(in0=t, in1=b) KERNEL
  g: f32[s] = extern aten.neg.default(self=a)
  h: f32[s] = extern aten.neg.default(self=b)
  i: f32[s] = extern aten.neg.default(self=d)
  j: f32[s] = extern aten.neg.default(self=t)
  k: f32[s] = kernel k(in0=a, in1=b) KERNEL
  return [g, h, i, j, k]
"""


class Called(torch.autograd.Function):
    """A step whose gradients are results of calls, of which not all find room in what the forward has saved."""

    @staticmethod
    def forward(ctx: Any, step: Step, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.step = step
        (result,), ctx.kept = step.begin(*parameters, x)
        return result

    @staticmethod
    def backward(ctx: Any, t: torch.Tensor) -> Any:  # type: ignore[override]
        saved, ctx.kept = ctx.kept, None
        return None, None, *ctx.step.backward(*saved, t)


class OfCalls:
    """Parameters of which autograd calls such a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library_calls_have_places(monkeypatch)
        others = "".join(f"  input {name}: f32[s]\n" for name in "qrst")
        self.step = Step(monkeypatch, FORWARD.replace("  input x", others + "  input x"), CALLS, 2, 5)
        self.parameters = [torch.randn(SIZE, requires_grad=True) for _ in range(5)]
        for _ in range(4):
            self.run()
        assert self.step.replays() == (3, 2)

    def run(self, keep: bool = False, clear: bool = False) -> None:
        """A step, whose gradients are right. If `clear`, old ones go after the forward; without `keep`, all in the
        end."""
        x, t = torch.randn(SIZE), torch.randn(SIZE)
        before = [torch.zeros(SIZE) if p.grad is None or clear else p.grad.clone() for p in self.parameters]
        with torch.no_grad():
            a = x + 3 * self.parameters[0]
            b = a + x + self.parameters[0]
        result = Called.apply(self.step, x, *self.parameters)
        for p in self.parameters if clear else ():
            p.grad = None
        result.backward(t)
        for p, old, new in zip(self.parameters, before, [-a, -b, -t - b, -t, a + b], strict=True):
            torch.testing.assert_close(p.grad, old + new)
            p.grad = p.grad if keep else None

    def own(self) -> set[int]:
        """The addresses of gradients that lie in memory of the session."""
        (graph,) = self.step.backward.pool.captured.values()
        return {storage.data_ptr() for storage in graph._kept.storages}


def test_gradients_of_calls_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing copies them, and other graphs leave theirs in the same memory."""
    made = OfCalls(monkeypatch)
    made.run(keep=True)
    own = made.own()
    assert len(own) == 2
    assert own < {p.grad.data_ptr() for p in made.parameters}  # type: ignore[union-attr]
    (graph,) = made.step.backward.pool.captured.values()
    assert graph.graph.kinds().count("copy") == 1  # of an input that a call reads
    made.step.backward.key = object()  # as for inputs of other sizes
    for p in made.parameters:
        p.grad = None
    for _ in range(3):
        made.run()
    assert len(made.step.backward.pool.captured) == 2
    assert {s.data_ptr() for g in made.step.backward.pool.captured.values() for s in g._kept.storages} == own


def test_gradients_of_calls_that_are_accumulated_move_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = OfCalls(monkeypatch)
    for _ in range(MOVES + 1):
        before = made.step.replays()
        for _ in range(3):
            made.run(keep=True)
        for p in made.parameters:
            p.grad = None
        assert made.step.replays() == (before[0] + 3, before[1] + 3)
    assert made.own()


def test_gradients_of_calls_that_are_cleared_after_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backward would overwrite them, and finds nobody there."""
    made = OfCalls(monkeypatch)
    places = made.own()
    for _ in range(MOVES + 2):
        made.run(keep=True, clear=True)
    assert places < made.own()  # with those that lay over what was saved
    before = made.step.replays()
    made.run(keep=True, clear=True)
    assert made.step.replays() == (before[0] + 1, before[1] + 1)


def test_gradients_of_calls_that_somebody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward runs its plain code, and in the end writes to new tensors."""
    made = OfCalls(monkeypatch)
    own = made.own()
    made.run(keep=True)
    (kept,) = [p.grad for p in made.parameters if p.grad.data_ptr() == min(own)]  # type: ignore[union-attr]
    expected, before = kept.clone(), made.step.replays()  # type: ignore[union-attr]
    for p in made.parameters:
        p.grad = None
    for _ in range(MOVES):
        made.run()
    assert made.step.replays() == (before[0] + MOVES, before[1])
    for _ in range(3):
        made.run()
    assert made.step.replays()[1] > before[1]
    assert not made.own()
    assert torch.equal(kept, expected)  # type: ignore[arg-type]


def drawn(rng: random.Random, names: list[str], prefix: str, count: int) -> str:
    """Lines that compute new values from old ones; the names of them are added to `names`."""
    lines = []
    for index in range(count):
        one, other = rng.choices(names[-6:], k=2)
        name = f"{prefix}{index}"
        call = f"kernel k(in0={one}, in1={other}) KERNEL"
        call = rng.choice([call, call, call, f"extern aten.neg.default(self={one})"])
        lines.append(f"  {name}: f32[s] = {call}")
        names.append(name)
        if rng.random() < 0.2:
            lines.append(f"  v{name}: f32[s] = view aten.view.default(self={name}, size=[{SIZE}])")
            names.append(f"v{name}")
    return "\n".join(lines) + "\n"


def step_of(seed: int) -> tuple[str, str, int]:
    """The forward and the backward of a random step, and how many tensors are saved."""
    rng = random.Random(seed)
    names = ["p", "x"]
    forward = "\n  input p: f32[s]\n  input x: f32[s]\n" + drawn(rng, names, "a", 12)
    made = names[2:]
    saved = rng.sample(made, rng.randint(2, 6))
    results = [rng.choice([*made, "x"]) for _ in range(2)]
    forward += f"  return [{', '.join([*results, *saved])}]\n"
    inputs = [f"s{index}" for index in range(len(saved))]
    backward = "\n" + "".join(f"  input {name}: f32[s]\n" for name in [*inputs, "t"])
    names = [*inputs, "t"]
    rng.shuffle(names)
    backward += drawn(rng, names, "b", 14)
    outputs = [rng.choice(names[len(inputs) + 1 :]) for _ in range(4)]
    outputs += [rng.choice(inputs)] * (rng.random() < 0.2)
    return forward, backward + f"  return [{', '.join(outputs)}]\n", len(saved)


def plain(graph: Graph, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return compile_graph(graph, CPU)([x.clone() for x in inputs], ())


def library_calls_have_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of random steps write to given addresses, like products."""
    monkeypatch.setattr(aten, "OUT", aten.OUT | {"aten.neg.default"})


@pytest.mark.parametrize("seed", range(30))
def test_random_steps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is kept, and in whatever order forwards and backwards come, all numbers are right."""
    if seed % 2:
        library_calls_have_places(monkeypatch)
    forward, backward, count = step_of(seed)
    step, rng = Step(monkeypatch, forward, backward, count, 1), random.Random(seed)
    p = torch.randn(SIZE)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(12):
        x, t = torch.randn(SIZE), torch.randn(SIZE)
        results, saved = step.begin(p, x)
        wanted = plain(step.forward.graph, [p, x])
        pairs = [*zip(results, wanted, strict=False)]
        if rng.random() < 0.2:  # another forward comes before the backward
            _, others = step.begin(p, t)
            if rng.random() < 0.5:
                step.backward(*others, t)
            del others
        step.keeps = rng.random() < 0.2
        for _ in range(1 + step.keeps):
            gradients = step.backward(*saved, t)
            pairs += zip(gradients, plain(step.backward.graph, [*wanted[len(results) :], t]), strict=True)
            step.keeps = False
        del saved, results, gradients
        torch.testing.assert_close([one for one, _ in pairs], [other for _, other in pairs])
        kept += rng.sample(pairs, rng.choice([0, 0, 1]))
        del pairs
        if rng.random() < 0.5:
            kept.clear()
        for one, other in kept:
            torch.testing.assert_close(one, other)
    assert step.forward.pool.replays


class Model(nn.Module):
    """A transformer block between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return F.cross_entropy(self.head(x + self.mlp(x)).flatten(0, 1), ids.flatten())


class Trained:
    """A model whose forward and backward are captured and replayed as calls, between which autograd works; and eager's.

    Attributes:
        pools: of the forward and of the backward.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.eager = Model()
        self.model = copy.deepcopy(self.eager)
        self.pools: list[GraphPool] = []
        self._step = TrainingStep()
        self.driver = GraphDriver(SIZES, {"entry": add})
        with monkeypatch.context() as patch:
            install(patch, self.driver)
            self.compiled = torch.compile(self.model, backend=self._backend, fullgraph=True, dynamic=False)
            self.gradients(lambda model, ids: model(ids).backward())
        install(monkeypatch, self.driver)
        for _ in range(3):
            self.gradients(lambda model, ids: model(ids).backward())
        assert all(pool.replays >= 2 for pool in self.pools)

    def _backend(self, gm: fx.GraphModule, inputs: Any) -> Any:
        def forward(graph: fx.GraphModule, _: Any) -> Any:
            return self._pooled(graph, *self._step.forward(graph, static_inputs(graph)))

        def backward(graph: fx.GraphModule, _: Any) -> Any:
            return self._pooled(without(graph, ()), self._step.backward(graph), frozenset())

        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            return capture.capture(gm, inputs, forward, forward, backward)

    def _pooled(self, graph: fx.GraphModule, pinned: frozenset[int], saved: frozenset[int]) -> Any:
        roles = [Role("input", node.name) for node in graph.graph.find_nodes(op="placeholder")]
        with unset_fake_temporarily():
            program = compiler.compile_fx(graph, roles, CompilationSettings()).program
            store = WeightStore(program.graph, CPU, program.constants)
            session = Session(program.graph, store, RuntimeSettings(specialization_strategy="none"))
        given = False, True, pinned, saved, True, session.placed
        pool = GraphPool(program.graph, session.run, DEVICE, 4, *given)
        self.pools.append(pool)
        key = object()

        def call(args: list[Any]) -> list[Any]:
            inputs = Owned(args)
            args.clear()
            return pool(key, session.specializer.base.code, inputs, store)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def gradients(self, work: Callable[[Any, torch.Tensor], object]) -> None:
        """`work` leaves equal gradients in both."""
        ids = torch.randint(0, 20, (4, 8))
        work(self.eager, ids)
        work(self.compiled, ids)
        self.same()
        self.eager.zero_grad()
        self.model.zero_grad()

    def same(self) -> None:
        for (name, right), mine in zip(self.eager.named_parameters(), self.model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def replays(self) -> list[int]:
        return [pool.replays for pool in self.pools]


def accumulate(model: Any, ids: torch.Tensor) -> None:
    for shift in range(3):
        model((ids + shift) % 20).backward()


def clear_late(model: Any, ids: torch.Tensor) -> None:
    for shift in range(MOVES + 3):
        loss = model((ids + shift) % 20)
        for parameter in getattr(model, "_orig_mod", model).parameters():
            parameter.grad = None
        loss.backward()


def two_forwards(model: Any, ids: torch.Tensor) -> None:
    one, other = model(ids), model((ids + 1) % 20)
    other.backward()
    one.backward()


def keep_the_graph(model: Any, ids: torch.Tensor) -> None:
    for _ in range(2):
        loss = model(ids)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()


def keep_gradients(model: Any, ids: torch.Tensor) -> None:
    parameters = list(getattr(model, "_orig_mod", model).parameters())
    kept = [torch.autograd.grad(model((ids + shift) % 20), parameters) for shift in range(3)]
    for parameter, *gradients in zip(parameters, *kept, strict=True):
        parameter.grad = torch.stack(gradients).sum(0)


def leave_a_forward(model: Any, ids: torch.Tensor) -> None:
    model((ids + 1) % 20)
    kept = model((ids + 2) % 20)
    model(ids).backward()
    del kept


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that autograd and loops do between forwards and backwards."""
    trained = Trained(monkeypatch)
    block = next(iter(trained.pools[0].captured.values())).block
    assert block is not None
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (trained.eager, trained.model)]
    before = trained.replays()
    for _ in range(3):
        ids = torch.randint(0, 20, (4, 8))
        for model, optimizer in zip((trained.eager, trained.compiled), optimizers, strict=True):
            model(ids).backward()
            optimizer.step()
        trained.same()
        inside = [p for p in trained.model.parameters() if p.grad.untyped_storage()._cdata == block.storage._cdata]  # type: ignore[union-attr]
        assert inside
        for optimizer in optimizers:
            optimizer.zero_grad()
    trained.gradients(accumulate)
    trained.gradients(accumulate)
    assert trained.replays() == [count + 9 for count in before]
    for work in (two_forwards, keep_the_graph, keep_the_graph, keep_gradients, leave_a_forward):
        for _ in range(2):
            trained.gradients(work)
    before = trained.replays()
    trained.gradients(lambda model, ids: model(ids).backward())
    assert trained.replays() == [count + 1 for count in before]
    trained.gradients(clear_late)
    assert not block.takes_gradients
    trained.gradients(accumulate)
    before = trained.replays()
    trained.gradients(accumulate)
    assert trained.replays() == [count + 3 for count in before]
