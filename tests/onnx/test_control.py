"""If, Loop and Scan: eagerly, written out, and as operators of PyTorch that hold graphs; their derivatives."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnx_ir")

import onnx
from onnx import TensorProto

import torch_rtx
from tests.onnx.models import BOOL, INT64, graph, model, node, value
from torch_rtx.errors import InputError, OnnxError
from torch_rtx.onnx.module import OnnxModule, from_onnx

X, START = torch.tensor([2.0, 1.5]), torch.ones(2)
YES, NO = torch.tensor(True), torch.tensor(False)
Calls = Sequence[tuple[torch.Tensor, ...]]


def agree(found: Any, wanted: Any) -> None:
    """Raises AssertionError if results differ."""
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def captured(module: OnnxModule, calls: Calls, sizes: Any = None) -> torch.export.ExportedProgram:
    """The exported module, which gives what the module gives in these calls."""
    program = torch.export.export(module, calls[0], dynamic_shapes=sizes)
    run = program.module()
    for args in calls:
        agree(run(*args), module(*args))
    return program


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


# ---- If --------------------------------------------------------------------------------------------------------------


def branching(condition: str, nodes: list[Any]) -> Any:
    """`2 * x` where the condition holds, else `x + w`."""
    then = graph([node("Add", "x x", "t")], [], [value("t")])
    other = graph([node("Add", "x w", "e")], [], [value("e")], {"w": np.full(2, 10, np.float32)})
    made = [*nodes, node("If", condition, "y", then_branch=then, else_branch=other)]
    inputs = [value("x", ["n"]), value("flag", [], BOOL)]
    return model(graph(made, inputs, [value("y")], {"zero": np.float32(0), "two": np.array(2)}))


def test_if_is_folded_where_sizes_decide() -> None:
    sized = [node("Size", "x", "size"), node("Equal", "size two", "is_two")]
    module = from_onnx(branching("is_two", sized))
    program = torch.export.export(module, (torch.ones(2), torch.tensor(True)))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.add.Tensor"]
    assert module(torch.ones(2), torch.tensor(False)).tolist() == [2, 2]


def test_if_of_data() -> None:
    """A branch of a tensor is taken in eager mode, and is `torch.cond` in a capture."""
    module = from_onnx(branching("flag", []))
    assert module(torch.ones(2), YES).tolist() == [2, 2]
    assert module(torch.ones(2), NO).tolist() == [11, 11]
    captured(module, [(torch.ones(2), YES), (torch.ones(2), NO)])


def alternatives(other: list[Any]) -> OnnxModule:
    """`x`, or something else, and then Neg."""
    then = graph([node("Identity", "x", "t")], [], [value("t")])
    nodes = [
        node("If", "flag", "z", then_branch=then, else_branch=graph(other, [], [value("e")])),
        node("Neg", "z", "y"),
    ]
    given = [value("x", [2]), value("flag", [], BOOL)]
    return from_onnx(model(graph(nodes, given, [value("y")], {"zero": np.array([0])})))


def test_branches_of_different_sizes() -> None:
    """The size of the result is one that data decides; of different ranks or types they are an error in a capture."""
    module = alternatives([node("Concat", "x x", "e", axis=0)])
    captured(module, [(X, YES), (X, NO)])
    module = alternatives([node("Unsqueeze", "x zero", "e")])
    assert module(X, NO).shape == (1, 2)
    with pytest.raises(OnnxError, match=r"give float32\[2\] and float32\[1, 2\].*node 'the_If'"):
        torch.export.export(module, (X, YES))


def test_a_branch_for_other_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A branch that can't run with the sizes of a capture is left out of it, for a check that it is not taken."""
    then = graph([node("MatMul", "x narrow", "t")], [], [value("t")])
    other = graph([node("MatMul", "x wide", "e")], [], [value("e")])
    weights = {"narrow": np.ones((3, 2), np.float32), "wide": np.ones((4, 2), np.float32)}
    made = [node("If", "flag", "y", then_branch=then, else_branch=other)]
    inputs = [value("x", [1, "n"]), value("flag", [], BOOL)]
    module = from_onnx(model(graph(made, inputs, [value("y")], weights)))
    for size, flag, wrong in ((3, YES, NO), (4, NO, YES)):
        x = torch.ones(1, size)
        path = tmp_path / "model.rtx"
        torch_rtx.save(torch_rtx.compile(module, (x, flag)), path)
        run = torch_rtx.load(path)
        run.refit(module)
        assert run(x, flag).tolist() == [[size, size]]
        with pytest.raises(RuntimeError, match="takes a branch that was left out"):
            run(x, wrong)
    assert "a branch is left out of the capture" in caplog.text
    with pytest.raises(OnnxError, match="MatMul"):
        torch.export.export(module, (torch.ones(1, 5), YES))


def test_fixed_inputs() -> None:
    """They are no inputs any more, and decide what depends on them."""
    module = from_onnx(branching("flag", []), fixed={"flag": False})
    assert [given.name for given in module.inputs] == ["x"]
    program = torch.export.export(module, (torch.ones(2),))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.add.Tensor"]
    assert module(torch.ones(2)).tolist() == [11, 11]
    assert "flag" not in module.state_dict()
    compiled = torch_rtx.compile(module, dynamic_shapes={"n": 2})
    assert compiled(torch.ones(2)).tolist() == [11, 11]
    wrong = [({"other": 1}, "no input 'other'"), ({"flag": [True]}, "1 axes, not 0"), ({"flag": None}, "to None")]
    for fixed, message in wrong:
        with pytest.raises(InputError, match=message):
            from_onnx(branching("flag", []), fixed=fixed)


# ---- Loop and Scan ---------------------------------------------------------------------------------------------------


def looping(condition: bool) -> Any:
    """Adds x and its index until the sum of the first element is at least 10; stacks the sums."""
    nodes = [
        node("Add", "sum x", "next"),
        node("Cast", "index", "number", to=TensorProto.FLOAT),
        node("Add", "next number", "result"),
        node("ReduceSum", "result", "total", keepdims=0),
        node("Less", "total ten", "small") if condition else node("Identity", "going", "small"),
    ]
    inputs = [value("index", [], INT64), value("going", [], BOOL), value("sum", [2])]
    outputs = [value("small", [], BOOL), value("result", [2]), value("result", [2])]
    body = graph(nodes, inputs, outputs)
    body.output[2].name = "row"
    body.node.append(node("Identity", "result", "row"))
    made = graph(
        [node("Loop", "count yes x", "last rows", body=body)],
        [value("x", [2])],
        [value("last"), value("rows")],
        {"count": np.array(4), "yes": np.array(True), "ten": np.float32(10)},
    )
    return model(made)


def test_loops() -> None:
    x = torch.ones(2)
    counted = from_onnx(looping(condition=False))
    program = torch.export.export(counted, (x,)).module()
    for run in (counted, program):
        last, rows = run(x)
        assert rows.tolist() == [[2, 2], [4, 4], [7, 7], [11, 11]]
        assert torch.equal(last, rows[-1])


def repeated(limit: Any, rows: bool, body: Sequence[Any] = (), start: Any = (2,), weights: Any = None) -> Any:
    """`state = state * x + number` while a flag, then the sum of the state, allows; the limit "n" is an input."""
    nodes = body or [
        node("Mul", "state x", "product"),
        node("Cast", "number", "f", to=1),
        node("Add", "product f", "next"),
    ]
    nodes = [*nodes, node("ReduceSum", "next", "total", keepdims=0), node("Less", "total most", "small")]
    given = [value("number", [], INT64), value("going", [], BOOL), value("state")]
    made = [value("small", [], BOOL), value("next")]
    if rows:
        nodes.append(node("Identity", "next", "row"))
        made.append(value("row"))
    inputs = [value("x", [2]), value("start", start), value("flag", [], BOOL)]
    inputs += [value("n", [], INT64)] if limit == "n" else []
    loop = node(
        "Loop",
        f"{'-' if limit is None else 'n'} flag start",
        "last rows" if rows else "last",
        body=graph(nodes, given, made),
    )
    tensors = {"most": np.float32(50), **(weights or {})} | ({"n": np.array(limit)} if isinstance(limit, int) else {})
    return from_onnx(model(graph([loop], inputs, [value("last"), *([value("rows")] if rows else [])], tensors)))


LIMITS: list[Any] = [None, "n", 3, 2**63 - 1]


def repeated_calls(limit: Any) -> list[tuple[torch.Tensor, ...]]:
    """Inputs for which the condition, the limit or nothing lets it pass."""
    numbers = [(torch.tensor(n),) for n in (4, 0, 9)] if limit == "n" else [()]
    return [(X, START, flag, *number) for flag in (YES, NO) for number in numbers]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("limit", LIMITS)
def test_loop_of_data(limit: Any, rows: bool) -> None:
    """Eagerly as Python, in a capture as `while_loop`; what is stacked has as many rows as there were passes."""
    module = repeated(limit, rows)
    state, wanted = START, []
    while state.sum() < 50 and len(wanted) < (limit if isinstance(limit, int) else 9):
        state = state * X + len(wanted)
        wanted.append(state)
    found = module(*repeated_calls(limit)[2 if limit == "n" else 0])
    agree(found, (state, torch.stack(wanted)) if rows else state)
    with torch.no_grad():
        called = operators(captured(module, repeated_calls(limit)))
    assert called.count("while_loop") == 1 + (rows and limit in (None, 2**63 - 1))  # passes are counted first


@pytest.mark.parametrize("limit", ["n", None])
def test_loop_of_data_compiled(limit: Any) -> None:
    """Under both compilers, without a break of the graph; with the derivatives that it has eagerly."""
    module, calls = repeated(limit, True), repeated_calls(limit)
    ahead, dynamo = torch_rtx.compile(module, calls[0]), torch.compile(module, backend="rtx", fullgraph=True)
    for args in calls:
        agree(ahead(*args), module(*args))
        gradients = []
        for run in (module, dynamo):
            leaves = [args[0].clone().requires_grad_(), args[1].clone().requires_grad_()]
            last, rows = run(*leaves, *args[2:])
            (last.sum() + (rows * 3).sum()).backward()
            gradients.append(tuple(torch.zeros(2) if x.grad is None else x.grad for x in leaves))
        agree(gradients[1], gradients[0])


def test_many_passes() -> None:
    """More passes than a capture writes out are an operator, too; there they are as many as eagerly."""
    body = graph(
        [node("Add", "state x", "next"), node("Identity", "go", "on")],
        [value("number", [], INT64), value("go", [], BOOL), value("state", [2])],
        [value("on", [], BOOL), value("next", [2])],
    )
    made = graph([node("Loop", "n - x", "last", body=body)], [value("x", [2])], [value("last")], {"n": np.array(5000)})
    module = from_onnx(model(made))
    assert "while_loop" in operators(captured(module, [(X,)]))
    assert module(X).tolist() == [2 * 5001, 1.5 * 5001]


def test_numbers_that_the_host_knows_at_first() -> None:
    """A state that begins as a number of the host and becomes a tensor decides the next pass, not the first."""
    body = [node("Add", "state x", "next")]
    nodes = [*body, node("Less", "state most", "small")]
    inner = graph(
        nodes,
        [value("number", [], INT64), value("go", [], BOOL), value("state", [], INT64)],
        [value("small", [], BOOL), value("next", [], INT64)],
    )
    made = graph(
        [node("Loop", "- yes zero", "last", body=inner)],
        [value("x", [], INT64)],
        [value("last")],
        {"yes": np.array(True), "zero": np.array(0), "most": np.array(10)},
    )
    module = from_onnx(model(made))
    assert module(torch.tensor(4)).item() == 16
    captured(module, [(torch.tensor(n),) for n in (4, 11, 1)])


def test_places_that_passes_count() -> None:
    """`x[:, n : n + 1]` has a size of 1 in the pass n, as has the element that `n` alone selects."""
    body = [
        node("Reshape", "number one", "first"),
        node("Add", "first one", "last"),
        node("Slice", "table first last one", "part"),
        node("Gather", "table number", "picked", axis=1),
        node("Squeeze", "part one", "flat"),
        node("Add", "flat picked", "both"),
        node("Add", "state both", "next"),
    ]
    weights = {"one": np.array([1]), "table": np.arange(10, dtype=np.float32).reshape(2, 5)}
    module = repeated("n", True, body, weights=weights)
    calls = [(X, START, YES, torch.tensor(n)) for n in (3, 0, 5)]
    captured(module, calls)
    assert module(*calls[0])[1].tolist() == [[1, 11], [3, 23], [7, 37]]


NUMBERED = [node("Mod", "number two", "odd"), node("Cast", "odd", "f", to=1), node("Add", "state f", "next")]
NESTED = [
    node(
        "Loop",
        "number going state",
        "next inner",
        body=graph(
            [node("Add", "s x", "t"), node("Identity", "c", "d"), node("Identity", "t", "u")],
            [value("i", [], INT64), value("c", [], BOOL), value("s")],
            [value("d", [], BOOL), value("t"), value("u")],
        ),
    )
]


@pytest.mark.parametrize("body", [(), NUMBERED, NESTED])
def test_no_pass(body: Any) -> None:
    """What no pass gives has no rows, of the size that a pass would give."""
    last, rows = repeated(0, True, body, weights={"two": np.array(2)})(X, START, YES)
    assert last.tolist() == [1, 1]
    assert rows.shape == (0, 2)


@pytest.mark.parametrize(
    ("first", "on", "passes"),
    [("no", "Identity going", 0), ("yes", "Not going", 1), ("yes", "Less number two", 3), ("-", "Identity no", 1)],
)
def test_conditions_that_the_host_knows(first: str, on: str, passes: int) -> None:
    """They count, too, where data decides the limit."""
    op, _, inputs = on.partition(" ")
    body = graph(
        [node("Add", "state x", "next"), node(op, inputs, "on"), node("Identity", "next", "row")],
        [value("number", [], INT64), value("going", [], BOOL), value("state")],
        [value("on", [], BOOL), value("next"), value("row")],
    )
    loop = node("Loop", f"n {first} x", "last rows", body=body)
    weights = {"yes": np.array(True), "no": np.array(False), "two": np.array(2)}
    given = [value("x", [2]), value("n", [], INT64)]
    module = from_onnx(model(graph([loop], given, [value("last"), value("rows")], weights)))
    captured(module, [(X, torch.tensor(n)) for n in (5, 0, 1)])
    assert module(X, torch.tensor(5))[1].shape == (passes, 2)


def test_a_condition_on_the_number_of_a_pass() -> None:
    """In a loop that is an operator, it is a number that nobody knows, and the branch `torch.cond`."""
    then, other = (graph([node(op, "state x", name)], [], [value(name)]) for op, name in (("Add", "t"), ("Mul", "e")))
    body = [node("Size", "x", "size"), node("Equal", "number size", "same")]
    body.append(node("If", "same", "next", then_branch=then, else_branch=other))
    module = repeated("n", False, body)
    captured(module, [(X, START, YES, torch.tensor(n)) for n in (4, 0)])


def test_a_module_that_no_graph_can_hold(fresh_dynamo: Any) -> None:
    """It runs as it does eagerly; the code that runs its nodes is no code to be compiled."""
    body = [node("Concat", "state x", "next", axis=0)]
    module = repeated("n", False, body, start=("m",))
    compiled = torch.compile(module, backend=lambda *_: pytest.fail("compiled"))
    for n in (2, 0):
        args = X, START, YES, torch.tensor(n)
        agree(compiled(*args), module(*args))


@pytest.mark.parametrize(
    ("body", "weights", "message"),
    [
        (
            [node("Concat", "state one", "next", axis=0)],
            {"one": np.ones(1, np.float32)},
            r"float32\[2\] before a pass and float32\[3\]",
        ),
        (
            [node("RandomNormalLike", "state", "drawn"), node("Add", "drawn state", "next")],
            {},
            "can't draw random numbers",
        ),
    ],
    ids=["growing", "random"],
)
def test_what_a_capture_refuses(body: Any, weights: Any, message: str) -> None:
    module = repeated(None, True, body, weights=weights)
    with pytest.raises(OnnxError, match=message) as error:
        torch.export.export(module, (X, START, YES))
    assert (error.value.node, error.value.op) == ("the_Loop", "Loop")


def scanning(**attributes: Any) -> OnnxModule:
    """The sums of the products of slices of x along its second axis."""
    nodes = [node("Mul", "sum row", "p"), node("Add", "p row", "next"), node("Identity", "next", "out")]
    body = graph(nodes, [value("sum", [2]), value("row", [2])], [value("next", [2]), value("out", [2])])
    made = node("Scan", "start x", "last rows", body=body, num_scan_inputs=1, scan_input_axes=[1], **attributes)
    given = [value("start", [2]), value("x", [2, "n"])]
    return from_onnx(model(graph([made], given, [value("last"), value("rows")])))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("back", [(0, 0), (1, 0), (0, 1)])
def test_scan(axis: int, back: tuple[int, int]) -> None:
    """Along a fixed axis its slices are written out, along one whose size varies it is an operator."""
    directions = {"scan_input_directions": [back[0]], "scan_output_directions": [back[1]]}
    module = scanning(scan_output_axes=[axis], **directions)
    calls = [(START, torch.arange(2.0 * n).reshape(2, n)) for n in (3, 1, 5)]
    for start, x in calls:
        state, wanted = start, []
        for row in x.flip(1).unbind(1) if back[0] else x.unbind(1):
            state = state * row + row
            wanted.append(state)
        agree(module(start, x), (state, torch.stack(wanted[:: -1 if back[1] else 1], axis)))
    assert "while_loop" not in operators(captured(module, calls[:1]))
    assert "while_loop" in operators(captured(module, calls, ({}, {1: Dim("n", min=1, max=8)})))


def test_scan_of_opset_8() -> None:
    """Each sample of a batch by itself, up to its length."""
    body = graph(
        [node("Add", "sum row", "next"), node("Identity", "next", "out")],
        [value("sum", [2]), value("row", [2])],
        [value("next", [2]), value("out", [2])],
    )
    made = node("Scan", "lengths start x", "last rows", body=body, num_scan_inputs=1, directions=[1])
    given = [value("lengths", [2], INT64), value("start", [2, 2]), value("x", [2, 3, 2])]
    module = from_onnx(model(graph([made], given, [value("last"), value("rows")]), 8))
    x = torch.arange(12.0).reshape(2, 3, 2)
    last, rows = module(torch.tensor([2, 3]), torch.ones(2, 2), x)
    assert last.tolist() == [[3, 5], [25, 28]]
    assert rows.tolist() == [[[3, 4], [3, 5], [0, 0]], [[11, 12], [19, 21], [25, 28]]]


# ---- what exporters write --------------------------------------------------------------------------------------------


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.of_input(x) + self.of_state(state))


class Recurrent(nn.Module):
    """A list that grows in a loop over an axis whose size varies."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        states = [state]
        for place in range(x.shape[0]):
            state = self.cell(x[place], state)
            states.append(state)
        return torch.stack(states)


class Greedy(nn.Module):
    """Words until all samples have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell, self.head = nn.Embedding(7, 4), Cell(), nn.Linear(4, 7)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        word, done = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
        found = torch.zeros(2, 6, dtype=torch.int64)
        number = 0
        while number < 6 and not bool(done.all()):
            state = self.cell(self.words(word), state)
            word = self.head(state).argmax(-1)
            found[:, number] = word
            done = done | (word == 3)
            number += 1
        return found


class Collatz(nn.Module):
    """If in a loop."""

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        steps = torch.zeros_like(n)
        while bool(n > 1):
            if bool(n % 2 == 0):  # noqa: SIM108 (a branch)
                n = n // 2
            else:
                n = 3 * n + 1
            steps += 1
        return steps


@pytest.mark.parametrize("name", ["recurrent", "greedy", "collatz"])
def test_scripted(name: str) -> None:
    torch.manual_seed(1)
    made: nn.Module = {"recurrent": Recurrent, "greedy": Greedy, "collatz": Collatz}[name]()
    calls: dict[str, Any] = {
        "recurrent": [(torch.randn(n, 2, 4), torch.ones(2, 4)) for n in (3, 1, 6)],
        "greedy": [(torch.randn(2, 4),) for _ in range(3)],
        "collatz": [(torch.tensor(n),) for n in (7, 1, 12)],
    }
    sizes = ({0: Dim("n", min=1, max=8)}, {}) if name == "recurrent" else None
    named = {"input_names": ["x", "state"], "dynamic_axes": {"x": {0: "n"}}} if name == "recurrent" else {}
    file = io.BytesIO()
    torch.onnx.export(torch.jit.script(made), calls[name][0], file, dynamo=False, opset_version=17, **named)
    module = from_onnx(onnx.load_model_from_string(file.getvalue()))
    for args in calls[name]:
        agree(module(*args), made(*args))
    called = operators(captured(module, calls[name], sizes))
    assert "while_loop" in called
