"""The forward and backward graphs of training with kernels: the calls that are left, every kernel in Triton's
interpreter against the calls of its body, gradients against eager's, and that all loops compile without spills."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from benchmarks import models
from benchmarks.numerics import assert_right, tensors, widened
from benchmarks.training import without_dropout
from tests.lowering.kernels.kernel_bodies import body, check_split_graph
from tests.lowering.test_kernel_models import body_in_float64, check, drawn, kernels, small
from torch_rtx.backend import compiler, entry
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.ir import Graph, Node, TensorType
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.kernels.generate import Form, forms, generate
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.passes.expand_norms import expand_norms
from torch_rtx.lowering.pipeline import lower
from torch_rtx.runtime.code import compile_graph
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import OWN
from torch_rtx.targets import PORTABLE, Target, arch_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"reuse_cached_engines": False}
SPILLS = 16  # bytes per thread
MOST = 8  # kernels of a graph that are interpreted
# Kernels, and the calls that are left, of forward and backward.
COUNTS: dict[str, tuple[tuple[int, dict[str, int]], tuple[int, dict[str, int]]]] = {
    "bert_base": ((25, {}), (34, {})),
    "gpt2": ((23, {}), (32, {})),
    "llama": ((27, {}), (44, {})),
    "resnet50": (
        (53, {"copy_": 69}),  # of running statistics and of the numbers of batches
        (28, {"convolution_backward": 23}),
    ),
    "vit_b_16": ((26, {}), (32, {"convolution_backward": 1})),
}


@contextmanager
def recorded() -> Iterator[list[Graph]]:
    """The graphs that are compiled meanwhile, as they are where there are kernels; here these run as calls."""
    graphs: list[Graph] = []
    get_or_build, patch = entry.get_or_build, pytest.MonkeyPatch()

    def kept(*args: Any) -> Any:
        program = get_or_build(*args)
        graphs.append(program.graph)
        return program

    patch.setattr(entry, "get_or_build", kept)
    patch.setattr(compiler, "formed_for", lambda *_: PORTABLE)
    patch.setattr(entry, "formed_for", lambda *_: PORTABLE)
    yield graphs
    patch.undo()


def model_of(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A small model without dropout, and inputs; images are channels-last."""
    torch.manual_seed(0)
    model, args, kwargs = models.build(name, "small", dtype=torch.float32)
    images = torch.utils._pytree.tree_map_only(torch.Tensor, laid_out, (args, kwargs))
    return without_dropout(model).train().to(memory_format=torch.channels_last), *images


def laid_out(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def step(model: nn.Module, call: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The loss of a step under autocast, its gradients, and the buffers after it."""
    with torch.autocast("cpu", torch.bfloat16):
        found = tensors(call(*args, **kwargs))
    wide = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in found if t.requires_grad)
    loss = sum(t.square().mean() for t in wide)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), *gradients, *model.buffers()]


def compiled_step(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Graph], list[torch.Tensor]]:
    """The forward and backward graphs of a model, and what `step` gives."""
    torch._dynamo.reset()
    with recorded() as graphs:
        found = step(model, torch.compile(model, backend="rtx", fullgraph=True, options=OPTIONS), args, kwargs)
    return graphs, found


@cache
def step_of(name: str) -> tuple[list[Graph], list[torch.Tensor]]:
    """The same of a model of the zoo."""
    return compiled_step(*model_of(name))


def graphs_of(name: str) -> list[Graph]:
    """The forward and backward graphs of a model of the zoo."""
    return step_of(name)[0]


def counts(graph: Graph) -> tuple[int, dict[str, int]]:
    """Kernels, and calls by name."""
    calls = Counter(node.op.split(".")[1] for node in graph.nodes if node.kind == "extern")
    return sum(node.kind == "kernel" for node in graph.nodes), dict(calls)


# ResNet's take as long as those of all others: they are looked at beside GPU tests. `Residual` has what it has.
LONG = pytest.param("resnet50", marks=pytest.mark.gpu)


@pytest.mark.parametrize("name", [LONG if name == "resnet50" else name for name in COUNTS])
def test_calls_that_are_left(name: str) -> None:
    assert tuple(map(counts, graphs_of(name))) == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "resnet50"])  # it takes as long as all others
def test_kernels(name: str) -> None:
    torch.manual_seed(0)
    for graph in graphs_of(name):
        found = [node for node in kernels(graph).values() if not is_joint(node) and small(node, {})]
        assert found
        for node in found[:: -(-len(found) // MOST)]:
            check(node, {})


@pytest.mark.parametrize("name", ["bert_base", "gpt2", "vit_b_16"])
def test_gradients_of_norms_sum_in_their_loop(name: str) -> None:
    """All of them but where no loop over rows computes what is summed, or where one adds it to embeddings, as of the
    first layer."""
    torch.manual_seed(0)
    _, backward = graphs_of(name)
    joint = [node.body for node in kernels(backward).values() if node.body is not None and is_joint(node)]
    assert len(joint) >= 2
    for part in joint[:3]:
        inputs = [drawn(value, {}) for value in part.inputs]
        assert len(check_split_graph(part, body_in_float64(part), 8, inputs, {}).nodes) == 2


def is_joint(node: Node) -> bool:
    """No kernel alone computes what `node` does, see `fuse_column_sums`."""
    return node.body is not None and generate(node.body, node.op, arch_of(80), 0) is None


@pytest.mark.parametrize(("name", "target"), [("bert_base", 86), pytest.param("resnet50", 90, marks=pytest.mark.gpu)])
def test_loops_compile_without_spills(name: str, target: int) -> None:
    for graph in graphs_of(name):
        assert spilling(graph, Target(target)) == []


def spilling(graph: Graph, target: Target) -> list[str]:
    """The loops of `graph` that spill more than a few numbers."""
    loops = tuple(node for node in kernels(graph).values() if node.body and region(node.body).anchor is None)
    table, report = build_kernels(Graph("fused", graph.inputs, nodes=loops), [target], own_kernel)
    assert not report.missing, str(report)
    return [
        name
        for name, found in table.tactics.items()
        if any(launch.aligned.spills > SPILLS for (tactic,) in found.values() for launch in tactic.kernels.values())
    ]


def own_kernel(node: Node, target: Target) -> list[Form]:
    """A kernel node as it is launched whole, in all configurations, or else split."""
    assert node.body is not None
    found = forms(node.body, node.op, target.arch)
    return [form for form in found if (form[0].kind == "split" if is_joint(node) else OWN in form[0].kernels)]


class Residual(nn.Module):
    """Convolutions with batch norms, and a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 8, 3, padding=1, bias=False) for c in (3, 8))
        self.last = nn.Conv2d(8, 5, 3)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return self.last(self.norm3(F.relu(x + self.norm2(self.second(x)))).relu())


def compared(model: nn.Module, args: Any, kwargs: Any, done: tuple[list[Graph], list[torch.Tensor]]) -> None:
    """A step of the expanded graphs, call by call, is as near to float64 as eager's is; `model` is not trained yet."""
    graphs, found = done
    wide = copy.deepcopy(model).double()
    expected, exact = step(model, model, args, kwargs), step(wide, wide, *widened((args, kwargs)))
    assert len(graphs) == 2
    assert all(any(node.kind == "kernel" for node in graph.nodes) for graph in graphs)
    assert_right(found, expected, exact)


# Of ResNet's last norms small images leave two numbers per channel: its gradients are chaos, in eager as well.
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "resnet50"])
def test_gradients(name: str) -> None:
    compared(*model_of(name), step_of(name))


def test_gradients_of_norms() -> None:
    images = torch.randn(4, 3, 12, 10).to(memory_format=torch.channels_last)
    for model, x in ((Residual().to(memory_format=torch.channels_last), images), (Residual(), images.contiguous())):
        compared(model, (x,), {}, compiled_step(copy.deepcopy(model), (x,), {}))


class Pooled(nn.Module):
    """A pooling whose windows overlap, of an activation that is nothing else's operand, and one of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 3, stride=2, padding=1)
        return self.second(F.max_pool2d(x, 2, ceil_mode=True))


@pytest.mark.parametrize(("size", "dtypes"), [((13, 10), ["i16", "i16"]), ((190, 183), ["i16", "i32"])])
def test_gradients_of_pooling_save_narrow_positions(size: tuple[int, int], dtypes: list[str]) -> None:
    model, x = Pooled(), torch.randn(2, 3, *size)
    done = compiled_step(copy.deepcopy(model), (x,), {})
    compared(model, (x,), {}, done)
    _, backward = done[0]
    saved = [value.type.dtype for value in backward.inputs if isinstance(value.type, TensorType)]
    assert sorted(dtype for dtype in saved if dtype.startswith("i")) == dtypes
    assert not any("with_indices.default" in node.op for body in bodies(backward) for node in body.nodes)


def bodies(graph: Graph) -> Iterator[Graph]:
    """A graph, and those in it."""
    yield graph
    for node in graph.nodes:
        if node.body is not None:
            yield from bodies(node.body)


IMAGE = "H[4, 16, 8, 8](1024, 1, 128, 16)"
NORMS = {
    "a batch norm": f"""
        x: {IMAGE}
        w: f32[16]
        m: f32[16]
        v: f32[16]
        y: {IMAGE}, a: f32[16], b: f32[16], c: f32[16], d: f32[16] = _native_batch_norm_legit_functional.default(
        input=x, weight=w, bias=w, running_mean=m, running_var=v, training=True, momentum=0.1, eps=0.001)
        return y, a, b, c, d""",
    "its gradients": f"""
        g: {IMAGE}
        x: {IMAGE}
        w: f32[16]
        m: f32[16]
        s: f32[16]
        y: {IMAGE}, a: f32[16], b: f32[16] = native_batch_norm_backward.default(grad_out=g, input=x,
        weight=w, running_mean=m, running_var=m, save_mean=m, save_invstd=s, train=True, eps=0.001,
        output_mask=[True, True, True])
        return y, a, b""",
    "gradients of a layer norm": """
        g: H[4, 32, 16]
        x: H[4, 32, 16]
        m: f32[4, 32, 1]
        s: f32[4, 32, 1]
        w: f32[16]
        y: H[4, 32, 16], a: f32[16], b: f32[16] = native_layer_norm_backward.default(grad_out=g, input=x,
        normalized_shape=[16], mean=m, rstd=s, weight=w, bias=w, output_mask=[True, True, True])
        return y, a, b""",
}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_parts(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    lowered, _ = lower(body(re.sub(r"([,(])\s*\n", r"\1 ", NORMS[name]), dtype), CompilationSettings(), None, PORTABLE)
    found = [node.body for node in lowered.nodes if node.body is not None]
    assert len(found) == 1
    for part in found:
        inputs = [drawn(value, {}) for value in part.inputs]
        form = check_split_graph(part, body_in_float64(part), 4, inputs, {})
        assert len(form.nodes) in (2, 3)


def test_gradients_of_an_rms_norm() -> None:
    """Its ATen call is for GPUs alone, so that no text of the pass can be run here."""
    program = body(
        """
        x: f32[5, 6]
        g: f32[5, 6]
        r: f32[5, 1]
        w: f32[6]
        d: f32[5, 6], e: f32[6] = _fused_rms_norm_backward.default(grad_out=g, input=x, {})
        return d, e
        """.format("normalized_shape=[6], rstd=r, weight=w, output_mask=[True, True]")
    )
    expanded = expand_norms(program, Inference())
    assert not any("rms_norm" in node.op for node in expanded.nodes)
    x, gradient, weight = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6), torch.randn(6, requires_grad=True)
    F.rms_norm(x, (6,), weight, 1e-5).backward(gradient)
    scale = (x.detach().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    found = compile_graph(expanded, torch.device("cpu"))([x.detach(), gradient, scale, weight.detach()], [])
    torch.testing.assert_close(found, [x.grad, weight.grad])
