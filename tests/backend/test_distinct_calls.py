"""Programs that are taken apart call by call: equal to what PyTorch makes of them, and right where tensors are written
to."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from tests.helpers.ahead import Function
from torch_rtx.backend import capture, distinct_calls

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Layer(nn.Module):
    """Views, composites with and without a kernel, constants, writes to a buffer and to intermediate tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.drop = nn.BatchNorm1d(4), nn.Linear(8, 24), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape) + x
        y += self.drop(x).clip(-1, 1)
        self.seen.mul_(0.5)
        self.seen.add_(x.mean((0, 1)))
        return torch.where(y > 0, y, 0.0) * x.shape[0]


class Layers(nn.Sequential):
    def __init__(self, count: int) -> None:
        super().__init__(*(Layer() for _ in range(count)))

    def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        last.copy_(y[:, -1])
        return y, y.abs().amax() + torch.tensor(2.0)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each program whether it was taken apart here."""
    taken: list[bool] = []

    def decomposed(*args: Any) -> ExportedProgram | None:
        program = distinct_calls.decomposed(*args)
        taken.append(program is not None)
        return program

    monkeypatch.setattr(capture, "decomposed", decomposed)
    return taken


def described(program: ExportedProgram) -> list[str]:
    """The program, without the order of inputs and the names of nodes, with sizes in place of the nodes that compute
    them."""
    names: dict[fx.Node, Any] = {}
    inputs, lines = list[str](), list[str]()

    def of(value: Any) -> str:
        if isinstance(value, Tensor):
            shape = [*map(str, value.shape)], [*map(str, value.stride())]
            return f"{value.dtype} {value.device} {shape} {value.storage_offset()}"
        return str([*map(of, value)]) if isinstance(value, list | tuple) else str(value)

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, SYMBOLIC):
            names[node] = str(value)
            continue
        if node.op == "placeholder":
            names[node] = node.name
            inputs.append(f"{node.name}: {of(value)}")
            continue
        names[node] = f"%{len(lines)}"
        args = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        place = node.meta.get("stack_trace"), [*map(str, (node.meta.get("nn_module_stack") or {}).values())]
        lines.append(f"{names[node]} = {node.target}{args}: {of(value)} {place}")
    signature = program.graph_signature
    inputs += map(str, signature.input_specs)
    outputs = (f"{spec.kind} {spec.target} {type(spec.arg).__name__}" for spec in signature.output_specs)
    lines += outputs
    return [*sorted(inputs), *lines, str(program.range_constraints), str([*program.state_dict, *program.constants])]


# ---- the same programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "varies"), [("cpu", True), ("cuda", False)])
def test_the_program_is_that_of_pytorch(
    device: str, varies: bool, own: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = torch.randn(3, 4, 8), torch.randn(3, 8)
    shapes = {"x": {0: Dim.AUTO}, "last": {0: Dim.AUTO}} if varies else None
    model = Layers(2).eval()
    found = capture.capture_export(model, args, dynamic_shapes=shapes, device=device)
    assert own == [True]
    monkeypatch.setattr(capture, "decomposed", lambda *args: None)
    expected = capture.capture_export(model, args, dynamic_shapes=shapes, device=device)
    assert described(found) == described(expected)


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    before = distinct_calls._Copy._traced

    def count(self: Any, node: fx.Node, *args: Any) -> Any:
        traced.append(str(node.target))
        return before(self, node, *args)

    monkeypatch.setattr(distinct_calls._Copy, "_traced", count)
    counts = []
    for layers in (1, 4):
        traced.clear()
        capture.capture_export(Layers(layers).eval(), (torch.randn(3, 4, 8), torch.randn(3, 8)))
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


def test_literals_that_only_compare_equal_are_told_apart(own: list[bool]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            ones = x.new_full((2,), 1), x.new_full((2,), True), x.new_full((2,), 1.0, dtype=torch.float16)
            return *ones, torch.copysign(x, 0.0), torch.copysign(x, -0.0), torch.sub(x, x), x - 1

    x = torch.arange(2)
    program = capture.capture_export(Model().eval(), (x,))
    assert own == [True]
    for found, expected in zip(program.graph_module(x), Model()(x), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit())


# ---- writes ----------------------------------------------------------------------------------------------------------


class Random(nn.Module):
    """Some calls on views of its inputs, of a buffer and of what came before, many of which write."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("state", torch.arange(12.0).view(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        drawn, live = random.Random(self.seed), [x, y, self.state]
        for _ in range(drawn.randint(3, 8)):
            one = drawn.choice(live)
            like = drawn.choice([other for other in live if other.shape == one.shape])
            calls = (
                lambda one=one, like=like: one.add_(like),
                lambda one=one, like=like: one.copy_(like.flip(0)),
                lambda one=one: one.mul_(2),
                lambda one=one: one.select(0, 0).fill_(7),
                lambda one=one: one + 1,
                lambda one=one: one.reshape(-1),
                lambda one=one: one.transpose(0, -1),
                lambda one=one: one.contiguous(),
                lambda one=one: one.chunk(2, -1)[0],
                lambda one=one: one.view(one.shape),
                lambda one=one: one.clone(),
                lambda one=one: one.to(torch.float32),
            )
            live.append(drawn.choice(calls)())
        return tuple(drawn.sample(live, 2))


def test_writes_are_seen_where_eager_sees_them(own: list[bool]) -> None:
    for seed in range(16):
        model, args = Random(seed).eval(), (torch.ones(3, 4), torch.full((3, 4), 2.0))
        with torch.no_grad():
            program = capture.capture_export(model, args)
            state = {"state": model.state.clone(), "x": args[0].clone(), "y": args[1].clone()}
            results = program.graph_module(*(one.clone() for one in state.values()))
            expected = [one.clone() for one in model(*args)]
        specs = program.graph_signature.output_specs
        found = {spec.target: result for spec, result in zip(specs, results, strict=True) if spec.target}
        for name, after in {"state": model.state, "x": args[0], "y": args[1]}.items():
            assert torch.equal(found.get(name, state[name]), after), (seed, name)
        for result, right in zip(results[len(found) :], expected, strict=True):
            assert torch.equal(result, right), seed
    assert {*own} == {True, False}


def read_after_a_write(x: Tensor) -> Tensor:
    y = x.clone()
    row = y[0]
    y.add_(1)
    return row * 2


def read_after_a_write_through_a_list(x: Tensor) -> Tensor:
    parts = x.clone().chunk(2)
    joined = torch.cat(parts)
    parts[0].add_(1)
    return joined + torch.cat(parts)


def of_another_shape(x: Tensor) -> Tensor:
    y = x.clone()
    y.t_()
    return y @ x


@pytest.mark.parametrize("function", [read_after_a_write, of_another_shape])
def test_what_is_left_to_pytorch(function: Any, own: list[bool]) -> None:
    x = torch.randn(2, 3)
    program = capture.capture_export(Function(function).eval(), (x,))
    assert own == [False]
    assert torch.equal(program.graph_module(x)[0], function(x))


def test_a_write_to_one_of_several_results(own: list[bool]) -> None:
    x = torch.randn(2, 3)
    program = capture.capture_export(Function(read_after_a_write_through_a_list).eval(), (x,))
    assert torch.equal(program.graph_module(x)[0], read_after_a_write_through_a_list(x))
