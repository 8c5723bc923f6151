"""Updates in place: drawn graphs with and without the pass, inputs that share memory, decoders over several steps."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

import torch_rtx
from benchmarks.numerics import assert_right
from tests.helpers.ahead import Function, through_file
from tests.helpers.compiled import Recorder, check, compile_rtx, same
from tests.helpers.releases import RELEASE
from tests.lowering.test_passes import assert_same_numbers
from torch_rtx import aten
from torch_rtx.backend import program_cache
from torch_rtx.backend.capture import capture_export
from torch_rtx.errors import InputError, Unsupported
from torch_rtx.ir import COPY, UPDATES, Graph, Node, TensorType, Value, contiguous, verify
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.body_builder import flat
from torch_rtx.lowering.passes.write_in_place import write_in_place
from torch_rtx.lowering.pipeline import lower
from torch_rtx.lowering.rewrite import Rewriter
from torch_rtx.lowering.support import unsupported_reason
from torch_rtx.lowering.symbols import Symbols
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import PORTABLE

CPU = torch.device("cpu")
UNPASSED = CompilationSettings(disabled_passes=["write_in_place"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def updates(graph: Graph) -> list[str]:
    """The calls that write, by the names of their ops, also in kernels."""
    return [call.op.split(".")[1] for call in flat(flat(graph.nodes)) if call.writes]


# ---- drawn graphs ----------------------------------------------------------------------------------------------------

SHAPES = {"x": (6, 3), "y": (6, 3), "k": (2, 3), "row": (3,)}
READS = {
    "aten.neg.default": {},
    "aten.clone.default": {},
    "aten.alias.default": {},
    "aten._unsafe_view.default": {"size": (-1, 3)},
    "aten.slice.Tensor": {"start": 1, "end": 3},
    "aten.select.int": {"dim": 0, "index": -1},
    "aten.sum.dim_IntList": {"dim": (0,)},
}
WRITES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "aten.index_copy.default": ("source", {"dim": 0}, (2, 3)),
    "aten.slice_scatter.default": ("src", {"start": -3, "end": 5}, (2, 3)),
    "aten.select_scatter.default": ("src", {"dim": 0, "index": 2}, (3,)),
}


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    """Reads and updates of two inputs in any order; some results are written back, some returned."""
    inputs = [Value(name, TensorType("f32", shape, contiguous(shape))) for name, shape in SHAPES.items()]
    at = Value("at", TensorType("i64", (2,), (1,)))
    rewriter = Rewriter(Graph("import", (*inputs, at)), Inference())
    pool, whole = list(inputs), inputs[:2]
    held = {value: value for value in inputs[:2]}  # the latest contents of each

    def pick(shape: tuple[int, ...]) -> Value:
        return draw(st.sampled_from([value for value in pool if value.type.shape == shape]))  # type: ignore[union-attr]

    for _ in range(draw(st.integers(1, 9))):
        if draw(st.booleans()):
            op = draw(st.sampled_from(list(WRITES)))
            name, args, shape = WRITES[op]
            index = {"index": at} if op == "aten.index_copy.default" else {}
            target = draw(st.sampled_from(inputs[:2]))
            old = held[target] if draw(st.integers(0, 7)) else draw(st.sampled_from(whole))
            held[target] = rewriter.emit(op, None, self=old, **index, **args, **{name: pick(shape)})
            whole.append(held[target])
            if draw(st.booleans()):
                pool.append(held[target])
        else:
            op = draw(st.sampled_from([*READS, "aten.add.Tensor"]))
            value = draw(st.sampled_from(pool))
            args = READS.get(op) or ({} if op in READS else {"other": value})
            try:
                pool.append(rewriter.emit(op, None, self=value, **args))
            except Unsupported:
                continue
    ends = [
        Node(
            "op",
            COPY,
            (("self", target), ("src", latest if draw(st.integers(0, 7)) else draw(st.sampled_from(whole)))),
            (),
        )
        for target, latest in held.items()
        if draw(st.integers(0, 7))
    ]
    outputs = tuple(draw(st.lists(st.sampled_from(pool), max_size=2)))
    return replace(rewriter.finish(), nodes=(*rewriter.nodes, *ends), outputs=outputs)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(programs())
def test_drawn_graphs(program):
    """The pass alone, and all passes with the kernels of a GPU, whose bodies run here."""
    note(str(program))
    verify(program, aten.ALLOWED)
    passed = write_in_place(program, Inference())
    verify(passed, aten.ALLOWED)
    event(f"in place: {sum(node.op in UPDATES for node in passed.nodes)}")
    assert passed.written == program.written
    assert_same_numbers(program, passed)
    fused, _ = lower(program, CompilationSettings(), targets=PORTABLE)
    assert_same_numbers(program, fused)


# ---- inputs that share memory ----------------------------------------------------------------------------------------


def cached(cache: torch.Tensor, other: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(0, at, new)
    return cache.sum(0) + other.sum(0)


ROWS = torch.arange(24.0).view(8, 3)
NEW, AT = torch.full((2, 3), 100.0), torch.tensor([1, 6])


def test_overlapping_inputs_are_read_as_they_were() -> None:
    """What a functional capture means, and what the engine without the pass does."""
    module = torch_rtx.compile(Function(cached), (ROWS.clone(), ROWS.clone(), NEW, AT))
    plain = torch_rtx.compile(Function(cached), (ROWS.clone(), ROWS.clone(), NEW, AT), settings=UNPASSED)
    assert (updates(module.engine.graph), updates(plain.engine.graph)) == (["index_copy_"], ["copy_"])
    for part in (slice(None), slice(0, 8, 2)):
        memory, expected = torch.zeros(16, 3), torch.zeros(16, 3)
        memory[4:12], expected[4:12] = ROWS, ROWS
        for one, run in ((memory, module), (expected, plain)):
            whole = one[4:12]
            one_result = run(whole, whole if part == slice(None) else one[2:10], NEW, AT)
            if run is module:
                result = one_result
        assert torch.equal(result, one_result)
        assert torch.equal(memory, expected)


def test_memory_beside_an_updated_input_is_not_copied() -> None:
    module = torch_rtx.compile(Function(cached), (ROWS.clone(), ROWS.clone(), NEW, AT))
    memory = torch.cat([ROWS, ROWS])
    with patch("torch_rtx.runtime.alias_guard.copy_strided") as copied:
        result = module(memory[:8], memory[8:], NEW, AT)
    copied.assert_not_called()
    assert torch.equal(result, memory[:8].sum(0) + ROWS.sum(0))
    assert torch.equal(module(torch.zeros(8, 3), memory[8:], NEW, AT), NEW.sum(0) + ROWS.sum(0))


def test_one_tensor_for_two_inputs_that_are_written() -> None:
    def both(a: torch.Tensor, b: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        a.index_copy_(0, at, new)
        b.index_copy_(0, at, -new)
        return a.sum() + b.sum()

    module = torch_rtx.compile(Function(both), (ROWS.clone(), ROWS.clone(), NEW, AT))
    memory = torch.stack([ROWS, ROWS], 1)  # interleaved, and yet apart
    module(memory[:, 0], memory[:, 1], NEW, AT)
    assert torch.equal(memory[AT], torch.stack([NEW, -NEW], 1))
    with pytest.raises(InputError, match="same memory, and the model writes to both"):
        module(memory[:, 0], memory[:, 0], NEW, AT)


def test_a_buffer_given_as_an_input() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", ROWS.clone())

        def forward(self, other: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return cached(self.cache, other, new, at)

    model = Model()
    module = torch_rtx.compile(model, (ROWS.clone(), NEW, AT))
    assert updates(module.engine.graph) == ["index_copy_"]
    result = module(model.cache, NEW, AT)
    assert torch.equal(model.cache[AT], NEW)
    assert torch.equal(result, model.cache.sum(0) + ROWS.sum(0))


@pytest.mark.parametrize("first", [0, 4, 8])
def test_aliases_under_torch_compile(first: int) -> None:
    memory = torch.cat([ROWS, ROWS])
    check(cached, memory[:8], memory[first : first + 8], NEW, AT)


def test_version_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    cache, before = ROWS.clone(), ROWS._version
    assert torch.equal(compile_rtx(cached)(cache, ROWS, NEW, AT), cache.sum(0) + ROWS.sum(0))
    assert (cache._version > 0, ROWS._version == before) == (True, True)
    assert updates(recorder.sessions[0].graph) == ["index_copy_"]


# ---- other ways to write ---------------------------------------------------------------------------------------------


def by_numbers(cache, new):
    cache[:, 2:4] = new
    cache[:, -1] = new[:, 0]
    return cache.sum(1)


def by_strides(cache, new):
    cache[:, ::4] = new
    return cache.sum(1)


def by_broadcast(cache, new):
    cache[:, 2:4] = new[:, :1]
    return cache.sum(1)


def by_cast(cache, new):
    cache[:, 2:4] = new.double()
    return cache.sum(1)


def by_slots(cache, new):
    cache.view(-1, 3)[torch.tensor([4, -1])] = new[:, 0]
    return cache.sum(1)


def by_slots_added(cache, new):
    cache.view(-1, 3).index_put_((torch.tensor([4, 4]),), new[:, 0], accumulate=True)
    return cache.sum(1)


def by_row_and_range(cache, new):
    cache[-1, 2:8:3] = new[0]
    cache[:, 3, 1:] = 0.5
    return cache.sum(1)


def by_its_own_rows(cache, new):
    cache[1, 2:5] = cache[0, 1:4]
    return cache.sum(1)


def by_list(cache, new):
    cache[:, torch.tensor([4, 1])] = new
    return cache.sum(1)


def by_mask(cache, new):
    cache[cache > 0.5] = 0.25
    return cache.sum(1)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_numbers, ["index_copy_", "index_copy_"]),
        (by_strides, ["index_copy_"]),
        (by_broadcast, ["index_copy_"]),
        (by_cast, ["index_copy_"]),
        (by_list, ["index_put_"]),
        (by_slots, ["index_put_"]),
        (by_slots_added, ["index_put_"]),
        (by_row_and_range, ["index_put_", "index_put_"]),
        (by_its_own_rows, ["index_copy_"]),
        (by_mask, ["copy_" if RELEASE >= (2, 15) else "index_put_"]),
    ],
)
def test_ways_to_write(function, expected, monkeypatch):
    recorder = Recorder(monkeypatch)
    cache, new = torch.rand(2, 8, 3), torch.rand(2, 2, 3)
    check(function, cache, new)
    assert updates(recorder.sessions[0].graph) == expected
    module = torch_rtx.compile(Function(function), (cache.clone(), new))
    mine, theirs = cache.clone(), cache.clone()
    same((module(mine, new), mine), (function(theirs, new), theirs))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint16], ids=str)
def test_dtypes_without_some_calls(dtype):
    def step(cache, new):
        cache[:, 2:4] = new
        return cache.view(torch.int8).sum(1)

    cache, new = torch.rand(2, 8, 3).mul(9).to(dtype), torch.rand(2, 2, 3).mul(9).to(dtype)
    module = torch_rtx.compile(Function(step), (cache.clone(), new))
    mine, theirs = cache.clone(), cache.clone()
    assert torch.equal(module(mine, new), step(theirs, new))
    assert torch.equal(mine.view(torch.int8), theirs.view(torch.int8))


def test_a_position_that_is_a_number_of_each_call(monkeypatch):
    recorder = Recorder(monkeypatch)

    def step(cache, new, position):
        cache[:, position : position + 2] = new
        return cache.sum(1)

    compiled, cache, expected = (
        torch.compile(step, backend="rtx", dynamic=True),
        torch.zeros(2, 8, 3),
        torch.zeros(2, 8, 3),
    )
    for position in (2, 5, 0, 6):
        new = torch.rand(2, 2, 3)
        same((compiled(cache, new, position), cache), (step(expected, new, position), expected))
    assert updates(recorder.sessions[-1].graph) == ["index_copy_"]


def test_the_capture_may_not_bring_an_update() -> None:
    gm = capture_export(Function(lambda x: x + 1), (ROWS,), None).graph_module
    graph = gm.graph
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(x):
        node = graph.call_function(torch.ops.aten.index_copy_.default, (x, 0, x, x))
    node.meta["val"] = x.meta["val"]
    assert unsupported_reason(node, Symbols(CPU)) == "it writes to its argument"


# ---- decoders --------------------------------------------------------------------------------------------------------

STEPS = 4


def steps(model: Any, first: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits of a prompt of one token and a few more, each at the next position."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (STEPS, 2, 1), generator=generator)
    return [model(ids[i], torch.tensor([first + i])).clone() for i in range(STEPS)]


def caches(model: Any) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.startswith(("keys", "values"))]


def assert_few_launches(graph: Graph, layers: int) -> None:
    """A layer is eight kernels and no call: the projections of its input, their rotary embeddings and all that goes
    into its caches, attention, three further products, and two norms with the sums before them."""
    stores = [at for at, node in enumerate(graph.nodes) if node.kind == "kernel" and node.writes]
    assert len(stores) == layers
    assert {after - before for before, after in itertools.pairwise(stores)} == {8}
    assert [node.op for node in graph.nodes if node.kind != "kernel"] == [COPY] * layers  # lengths of the caches


def test_a_decoder_over_several_steps(tmp_path, monkeypatch):
    """Compiled, ahead of time, as for a GPU and from a file: as eager, and bit for bit as without the pass."""
    models = pytest.importorskip("benchmarks.models")
    model, args, kwargs = models.build("llama_decode")
    for key, buffer in model.named_buffers():
        if key.startswith(("keys", "values")):
            buffer.normal_()  # so that what may not be written would show
    eager, plain, ahead = (copy.deepcopy(model) for _ in range(3))
    expected = steps(eager, 3)
    layers = len(caches(model)) // 2

    recorder = Recorder(monkeypatch)
    unpassed = torch.compile(plain, backend="rtx", options={"disabled_passes": ["write_in_place"]})
    unpassed_steps = steps(unpassed, 3)
    compiled_steps = steps(torch.compile(model, backend="rtx"), 3)
    assert all(map(torch.equal, compiled_steps, unpassed_steps))
    assert all(map(torch.equal, caches(model), caches(plain)))
    for found, wanted in ((compiled_steps, expected), (caches(model), caches(eager))):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    before, after = (updates(session.graph) for session in recorder.sessions)
    assert before.count("copy_") == 3 * layers  # keys, values and the length of each layer
    assert (after.count("copy_"), after.count("index_copy_")) == (layers, 2 * layers)

    gpu = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    for setting in (CompilationSettings(), gpu):
        fresh = copy.deepcopy(ahead)
        with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
            module = torch_rtx.compile(fresh, args, kwargs, settings=setting)
        assert updates(module.engine.graph).count("index_copy_") == 2 * layers
        if setting is gpu:
            assert_few_launches(module.engine.graph, layers)
        module = through_file(module, tmp_path, weights=fresh)
        for a, b in zip(steps(module, 3), expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_halves_over_several_steps() -> None:
    """As for a GPU, by the float64 criterion."""
    models = pytest.importorskip("benchmarks.models")
    model, args, kwargs = models.build("llama_decode", dtype=torch.bfloat16)
    wide = copy.deepcopy(model).double()
    gpu = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        module = torch_rtx.compile(copy.deepcopy(model), args, kwargs, settings=gpu)
    exact = steps(wide, 0)
    assert_right(steps(module, 0), steps(model, 0), exact)
