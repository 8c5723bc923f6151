"""What a call still sees without guards on layers, and how a session tells parameters apart."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.compiled import compile_rtx, same
from torch_rtx.backend.sessions import identities
from torch_rtx.errors import RefitError

X = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.out, self.scale = nn.Linear(8, 4), 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.bn(self.conv(x))).relu().mean((2, 3))) * self.scale


@pytest.fixture
def net(fresh_dynamo):
    model = Net().eval()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-1.5, -0.5)
        yield model, torch.compile(model, backend="rtx", options={"guard_filter_fn": torch_rtx.skip_layer_guards})


def test_identities_are_the_ids() -> None:
    for count in (0, 1, 2, 300):
        objects = tuple(torch.empty(0) for _ in range(count))
        assert identities(objects) == b"".join(id(item).to_bytes(8, "little") for item in objects)


def test_guards_on_layers_are_left_out(net) -> None:
    model, _ = net
    kept: list[list[str]] = []

    def count(guards):
        keep = torch_rtx.skip_layer_guards(guards)
        kept.append([guard.name for guard, wanted in zip(guards, keep, strict=True) if wanted])
        return keep

    torch.compile(model, backend="eager", options={"guard_filter_fn": count})(X)
    names = kept[-1]
    assert any(name.endswith("['bn'].training") for name in names)
    assert any(name.endswith(".scale") for name in names)
    assert "x" in names or "L['x']" in names
    assert not any(name.endswith(("['weight']", ".eps", ".stride")) for name in names)


@pytest.mark.parametrize("mode", ["gradients", "statistics"])
def test_where_a_layer_trains_its_tensors_are_guarded(fresh_dynamo, mode: str) -> None:
    """Parameters, or the statistics that are written, are inputs of the graph: no session checks them."""
    model = nn.Sequential(nn.Embedding(10, 4), nn.BatchNorm1d(4)).train(mode == "statistics")
    compiled = torch.compile(model, backend="rtx", options={"guard_filter_fn": torch_rtx.skip_layer_guards})
    tokens = torch.arange(8)
    with torch.set_grad_enabled(mode == "gradients"):
        for change in (lambda: model, model.double, model.half, model.float):
            change()
            same(compiled(tokens), copy.deepcopy(model)(tokens), atol=1e-2, rtol=1e-2)
        assert compiled(tokens).requires_grad == (mode == "gradients")


@pytest.mark.parametrize("trains", [False, True])
def test_where_a_layer_trains_the_placement_of_its_tensors_is_guarded(trains: bool) -> None:
    def guard(kind: str) -> SimpleNamespace:
        source = SimpleNamespace(is_unspecialized_builtin_nn_module=lambda: True)
        return SimpleNamespace(name="w", value=None, guard_type=kind, orig_guard=SimpleNamespace(source=source))

    kinds = ("TENSOR_MATCH", "DTENSOR_SPEC_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH", "CONSTANT_MATCH")
    with torch.set_grad_enabled(trains):
        assert torch_rtx.skip_layer_guards([guard(kind) for kind in kinds]) == [trains] * 3 + [False]


CHANGES = {
    "in place": lambda m: m.conv.weight.mul_(2),
    "statistics": lambda m: m.bn.running_mean.add_(1),
    "data of another": lambda m: setattr(m.out.weight, "data", torch.ones(4, 8)),
    "data of another, computed": lambda m: setattr(m.conv.weight, "data", torch.ones(8, 3, 3, 3)),
    "new parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.ones(8, 3, 3, 3))),
    "assigned": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "another layer": lambda m: setattr(m, "out", nn.Linear(8, 4)),
    "own attribute": lambda m: setattr(m, "scale", 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_still_seen(name, net) -> None:
    model, compiled = net
    before = compiled(X)
    CHANGES[name](model)
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(compiled(X), before)


def test_training_and_other_inputs_are_still_seen(net) -> None:
    model, compiled = net
    compiled(X)
    model.bn.train()
    twin = Net()
    twin.load_state_dict(model.state_dict())
    twin.eval().bn.train()
    same(compiled(X), twin(X), atol=1e-5, rtol=1e-4)
    same(model.bn.running_mean, twin.bn.running_mean)
    model.eval()
    same(compiled(X[:1]), model(X[:1]), atol=1e-5, rtol=1e-4)


def test_a_parameter_of_another_type_is_refused(net) -> None:
    model, compiled = net
    compiled(X)
    model.out.weight = nn.Parameter(torch.ones(5, 8))
    with pytest.raises(RefitError, match=r"expected shape \[4, 8\]"):
        compiled(X)
    model.out.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.float64))
    with pytest.raises(RefitError, match="float64"):
        compiled(X)
    model.out.weight = nn.Parameter(torch.ones(4, 8))
    same(compiled(X), model(X), atol=1e-5, rtol=1e-4)


def test_only_what_is_open_decides_under_guards(fresh_dynamo, recorder) -> None:
    """A call with hundreds of inputs, as in training, looks at none of them where all sizes are known."""

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y

    x, y = torch.randn(3, 4), torch.randn(4)
    same(compile_rtx(f)(x, y), f(x, y))
    assert recorder.sessions[-1]._types([x, y]) == ()
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    compiled = compile_rtx(f)
    for size in (3, 5, 5, 3):
        x = torch.randn(size, 4)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        same(compiled(x, y), f(x, y))
    assert len(recorder) == 2
    given = [3, x, y] if len(recorder.sessions[-1].graph.inputs) == 3 else [x, y]
    assert 0 < len(recorder.sessions[-1]._types(given)) < len(given)
