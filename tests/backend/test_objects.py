"""Graphs with tensor subclasses, and with values that the IR does not express and only fallbacks take."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from tests.helpers.compiled import Recorder, compile_rtx
from torch_rtx.backend import entry
from torch_rtx.errors import InvalidIR
from torch_rtx.ir import verify
from torch_rtx.irparse import parse
from torch_rtx.settings import CompilationSettings, RuntimeSettings


class Scaled(torch.Tensor):
    """The tensor `data`, and with it another one, for which every call is made as well."""

    @staticmethod
    def __new__(cls, data, other):
        meta = {"dtype": data.dtype, "device": data.device, "strides": data.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, requires_grad=data.requires_grad, **meta)

    def __init__(self, data, other):
        self.data_, self.other = data, other

    def __repr__(self):
        return f"Scaled({self.data_}, {self.other})"

    def __tensor_flatten__(self):
        return ["data_", "other"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Scaled(inner["data_"], inner["other"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        first, second = (
            func(*of[0], **of[1]) for of in (pytree.tree_map_only(Scaled, part, given) for part in (_data, _other))
        )
        return pytree.tree_map(lambda a, b: Scaled(a, b) if isinstance(a, torch.Tensor) else a, first, second)


def _data(tensor):
    return tensor.data_


def _other(tensor):
    return tensor.other


def scaled(tensor):
    return Scaled(tensor.detach().clone(), tensor.detach() * 2)


def model():
    """Operators that capture keeps whole elsewhere."""
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Softmax(-1))
    for module in net:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(scaled(parameter)))
    return net


def parts(tensors):
    return [part for tensor in tensors for part in (tensor.data_, tensor.other)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_subclasses_in_inference(mode):
    net, x = model(), scaled(torch.linspace(-1, 1, 12).view(3, 4))
    compiled = compile_rtx(net)
    with mode():
        torch.testing.assert_close(parts([compiled(x)]), parts([net(x)]))
    with torch.no_grad():
        net[0].weight.mul_(3)
        torch.testing.assert_close(parts([compiled(x)]), parts([net(x)]))


def test_subclasses_in_training():
    net, x = model(), scaled(torch.linspace(-1, 1, 12).view(3, 4))
    found = []
    for call in (compile_rtx(net), net):
        call(x)[:, 0].sum().backward()
        found.append(parts([parameter.grad for parameter in net.parameters()]))
        net.zero_grad()
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensor_parallel(mesh, monkeypatch):
    """The device mesh of each parameter is an input of the graph."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, recorder = torch.randn(4, 8), Recorder(monkeypatch)
    plain = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    net.load_state_dict(plain.state_dict())
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    compiled = torch.compile(net, backend="rtx")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))
    assert "object" in str(recorder.sessions[0].graph)
    torch._dynamo.reset()
    for call in (compiled, plain):
        call(x).sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to_local(), theirs.grad)


def test_a_generator_as_an_input():
    graph, mode = fx.Graph(), FakeTensorMode()
    fake = mode.from_tensor(torch.rand(64))
    x, generator = graph.placeholder("x"), graph.placeholder("generator")
    x.meta["val"], generator.meta["val"] = fake, torch.Generator()
    drawn = graph.call_function(torch.ops.aten.bernoulli.default, (x,), {"generator": generator})
    drawn.meta["val"] = fake
    result = graph.call_function(torch.ops.aten.add.Tensor, (drawn, 1))
    result.meta["val"] = fake
    graph.output((result,))
    call = entry._compile(fx.GraphModule({}, graph), [], frozenset(), CompilationSettings(), RuntimeSettings())
    given = torch.rand(64)
    for seed in (1, 2, 1):
        expected = torch.bernoulli(given, generator=torch.Generator().manual_seed(seed)) + 1
        assert torch.equal(call([given, torch.Generator().manual_seed(seed)])[0], expected)


def test_only_fallbacks_take_objects():
    text = """
graph import {
  input x: f32[2]
  input g: object
  y: f32[2] = KIND aten.bernoulli.default(self=x, generator=g)
  return [y]
}"""
    verify(parse(text.strip().replace("KIND", "fallback")))
    with pytest.raises(InvalidIR, match="only a fallback takes or makes an object"):
        verify(parse(text.strip().replace("KIND", "op")))


@pytest.mark.gpu
def test_checkpoints_draw_the_same_again():
    """The partitioner gives the forward and the backward graph a generator each."""
    compiled = compile_rtx(lambda x: checkpoint(lambda x: F.dropout(x, 0.5).sin(), x, use_reentrant=False))
    for _ in range(3):
        x = torch.rand(4096, device="cuda") + 0.1
        y = compiled(x.requires_grad_())
        y.sum().backward()
        drawn = y.detach() != 0
        assert 0.3 < drawn.float().mean() < 0.7
        torch.testing.assert_close(x.grad, torch.where(drawn, 2 * (2 * x.detach()).cos(), 0.0))
