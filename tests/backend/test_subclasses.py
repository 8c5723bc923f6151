"""Parameters of classes of their own: how an engine names them, how it gets new ones, and when changes are seen."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.ahead import through_file
from tests.helpers.compiled import Recorder, compile_rtx
from tests.helpers.packed import BlockLinear, Blocks, Packed, Quantized
from torch_rtx.errors import RefitError
from torch_rtx.runtime.subclasses import names_of, outer_name, plain_tensors

IDS = torch.arange(10).reshape(2, 5)
X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
CUDA = torch_rtx.CompilationSettings(device="cuda")


def same(one, other):
    assert type(one) is torch.Tensor
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def names(module):
    return {name for p in module.engine.graph.parameters for name in (p.name, *p.aliases)}


def test_names_of_inner_tensors():
    plain = plain_tensors(dict(Quantized().named_parameters()))
    assert "up.weight" not in plain
    assert plain["up.parametrizations.weight.original0"].dtype is torch.int8
    assert {outer_name(name) for name in plain} == {"embed.weight", "up.weight", "up.bias", "down.weight"}
    assert names_of("weight", Packed.of(torch.ones(2, 2)))[1] == "parametrizations.weight.original1"
    assert [outer_name(name) for name in ("original0", "a.original1", "parametrizations.a.b.original0")] == [
        *("original0", "a.original1", "parametrizations.a.b.original0")
    ]


@pytest.mark.parametrize("how", ["module", "ExportedProgram", "cuda"])
def test_an_engine_has_the_inner_tensors(how, tmp_path):
    model = Quantized()
    if how == "ExportedProgram":
        module = torch_rtx.compile(torch.export.export(model, (IDS,)))
    else:
        module = torch_rtx.compile(model, (IDS,), settings=CUDA if how == "cuda" else None)
    assert names(module) == set(plain_tensors(dict(model.named_parameters())))
    same(module(IDS), model(IDS))
    same(through_file(module, tmp_path, weights=model)(IDS), model(IDS))
    assert not [node.op for node in module.engine.graph.nodes if node.kind == "fallback"]


def test_engines_of_other_sizes():
    ids = torch_rtx.Input(min_shape=(1, 3), opt_shape=(2, 5), max_shape=(7, 9), dtype=torch.int64)
    model = Quantized()
    module = torch_rtx.compile(model, (ids,), settings=CUDA)
    for shape in ((1, 3), (7, 9)):
        same(module(IDS.flatten()[:1].expand(shape)), model(IDS.flatten()[:1].expand(shape)))


@pytest.mark.parametrize("form", ["module", "state dict", "names of export", "compiled"])
def test_refit(form):
    model, other = Quantized(), Quantized(seed=1)
    state = other.state_dict()
    weights = {"module": other, "state dict": state, "names of export": plain_tensors(state), "compiled": other}[form]
    if form == "compiled":
        module = compile_rtx(model)
        same(module(IDS), model(IDS))
        torch_rtx.refit_module_weights(module, weights)
    else:
        module = torch_rtx.compile(model, (IDS,))
        module.refit(weights)
    same(module(IDS), other(IDS))


def test_tied_weights_stay_one():
    model, other = Quantized(tied=True), Quantized(seed=1, tied=True)
    module = torch_rtx.compile(model, (IDS,))
    assert len(module.engine.graph.parameters) == 5
    module.refit(other.state_dict())
    same(module(IDS), other(IDS))
    with pytest.raises(RefitError, match="is tied to"):
        module.refit(Quantized(seed=2))


def test_what_a_refit_refuses():
    module = torch_rtx.compile(Quantized(), (IDS,))
    state = Quantized(seed=1).state_dict()
    with pytest.raises(RefitError, match="up.weight: is not quantized as in the engine") as raised:
        module.refit({**state, "up.weight": torch.ones(8, 8)})
    assert raised.value.missing == raised.value.unexpected == ()
    flat = plain_tensors(state)
    del flat["up.parametrizations.weight.original1"]
    with pytest.raises(RefitError, match="missing: up.parametrizations.weight.original1"):
        module.refit(flat)
    with pytest.raises(RefitError, match="expected dtype torch.int8"):
        module.refit({**state, "up.weight": Packed(torch.ones(8, 8), torch.ones(8, 1))})


@pytest.mark.parametrize("ahead", [False, True])
def test_changes_are_seen(ahead, monkeypatch, fresh_dynamo):
    model, recorder = Quantized(), Recorder(monkeypatch)
    module = torch_rtx.compile(model, (IDS,)) if ahead else compile_rtx(model)
    same(module(IDS), model(IDS))
    before = module(IDS)
    model.up.weight.scale.mul_(2)
    model.down.weight.copy_(Quantized(seed=1).down.weight)
    assert not torch.equal(module(IDS), before)
    same(module(IDS), model(IDS))
    if not ahead:
        assert recorder.fallbacks == []
        names = {parameter.name for parameter in recorder.sessions[-1].store.parameters}
        assert names == set(plain_tensors(dict(model.named_parameters())))
        model.up.weight = Quantized(seed=2).up.weight
        same(module(IDS), model(IDS))


@pytest.mark.parametrize("how", ["compiled", "module", "cuda"])
def test_parameters_with_attributes(how):
    model = nn.Sequential(BlockLinear(torch.sin(torch.arange(96.0 * 64)).reshape(96, 64)))
    if how == "compiled":
        module = compile_rtx(model)
    else:
        module = torch_rtx.compile(model, (X,), settings=CUDA if how == "cuda" else None)
        assert "0.weight" in names(module)
    same(module(X), model(X))
    other = torch.cos(torch.arange(96.0 * 64)).reshape(96, 64)
    with torch.no_grad():
        model[0].weight.as_tensor().copy_(Blocks.of(other).as_tensor())
    same(module(X), model(X))
    assert type(model[0].weight) is Blocks
    assert "forward_pre" not in str(model[0]._forward_pre_hooks)


class Adapted(nn.Module):
    """A layer with blocks, and an adapter that is trained."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = BlockLinear(torch.ones(8, 64)), nn.Linear(64, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def test_training_beside_parameters_with_attributes(fresh_dynamo):
    model = Adapted()
    found = []
    for call in (model, compile_rtx(model)):
        x = X.clone().requires_grad_()
        result = call(x)
        found.append((result.detach(), *torch.autograd.grad(result.square().sum(), (x, model.adapter.weight))))
    for one, other in zip(*found, strict=True):
        same(other, one)


@pytest.mark.parametrize("settings", [None, CUDA])
def test_tensors_in_attributes_are_parameters_too(settings):
    """As the scales of bitsandbytes, which are in an object that the parameter has."""
    model = nn.Sequential(BlockLinear(torch.sin(torch.arange(96.0 * 64)).reshape(96, 64)))
    model[0].weight.extra = SimpleNamespace(offset=torch.tensor(0.5), kind="plain")
    model[0].weight.extra.itself = model[0].weight.extra
    module = torch_rtx.compile(model, (X,), settings=settings)
    assert names(module) == {"0.weight", "0.weight_extra_offset", "0.weight.offset"}
    same(module(X), model(X))
    for value, weights in ((-2.0, lambda: model), (3.0, model.state_dict)):
        model[0].weight.extra.offset = torch.tensor(value)
        module.refit(weights())
        same(module(X), model(X))
    assert list(model[0]._buffers) == []


def test_packed_weights_take_no_more_room_in_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).requires_grad_(False)
    model[0].weight = nn.Parameter(Packed.of(model[0].weight), requires_grad=False)
    settings = torch_rtx.CompilationSettings(device="cuda", strip_weights=False)
    torch_rtx.save(torch_rtx.compile(model, (torch.ones(2, 256),), settings=settings), tmp_path / "model.rtx")
    assert (tmp_path / "model.rtx").stat().st_size <= 1.1 * 256 * (256 + 4)
