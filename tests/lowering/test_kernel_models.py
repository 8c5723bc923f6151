"""The kernels that fusion forms in the model zoo, in Triton's interpreter, against the calls of their bodies."""

from __future__ import annotations

import copy
import io
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import torch_rtx
from benchmarks import models
from benchmarks.numerics import assert_right, in_float64
from tests.doubles.interpreter import begin, run
from tests.helpers.eager_memory import most_held
from torch_rtx import aten
from torch_rtx.backend import program_cache
from torch_rtx.ir import Graph, Node, Sym, TensorType, Value, evaluate
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.loops import loop_configs, loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.inline import inline_kernels
from torch_rtx.runtime.plan import Plan, most_alive
from torch_rtx.settings import CompilationSettings
from torch_rtx.tactics import KernelTable
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")
PROGRAMS = 6
MOST = 5  # kernels of a model
LARGEST = 64  # programs of a kernel with an anchor; what has more is the same for larger images


def fused(name: str, dtype: torch.dtype, dynamic: bool = False) -> tuple[nn.Module, torch_rtx.CompiledModule]:
    """A small model of the zoo, and its engine with the graph that it has for a GPU; here its kernels run as calls."""
    model, args, kwargs = models.build(name, "small", dtype=dtype)
    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=1, max=64)
        leaves = (args, kwargs)
        args_shapes, kwargs_shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: {0: batch}, leaves)
        shapes = dict(kwargs_shapes) if kwargs and not args else args_shapes
    settings = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):  # interpreted here, not compiled
        module = torch_rtx.compile(copy.deepcopy(model), args, kwargs, dynamic_shapes=shapes, settings=settings)
    return model, module


def kernels(graph: Graph) -> dict[str, Node]:
    """The kernel nodes, one of each."""
    return {node.op: node for node in graph.nodes if node.kind == "kernel"}


def drawn(value: Value, sizes: dict[str, int]) -> torch.Tensor:
    """Random contents for an input: integers are small enough to be positions in whatever they index."""
    type_ = value.type
    assert isinstance(type_, TensorType)
    shape, strides = ([evaluate(dim, sizes) for dim in dims] for dims in (type_.shape, type_.strides))
    dtype = aten.DTYPES[type_.dtype]
    extent = aten.extent(shape, strides)
    memory = torch.randn(extent) if dtype.is_floating_point else torch.randint(0, 2, (extent,))
    return memory.to(dtype).as_strided(shape, strides)


def body_in_float64(graph: Graph) -> Graph:
    """The same operations in float64, casts to halves among them."""
    return parse(re.sub(r"\b(b?f16|f32)\b", "f64", str(graph)))


def small(node: Node, sizes: dict[str, int], which: int = 0) -> bool:
    """Whether the kernel of `node` has this configuration, and the interpreter takes no more than seconds for it."""
    assert node.body is not None
    kernel = generate(node.body, node.op, arch_of(80), which)
    assert which or kernel is not None, node.op
    return kernel is not None and (region(node.body).anchor is None or evaluate(kernel.grid[0], sizes) <= LARGEST)


def check(node: Node, sizes: dict[str, int], which: int = 0) -> None:
    """Runs the kernel of `node` in a configuration."""
    assert node.body is not None
    kernel = generate(node.body, node.op, arch_of(80), which)
    assert kernel is not None
    found = region(node.body)
    # The interpreter takes its time for each of them.
    if (programs := evaluate(kernel.grid[0], sizes)) > PROGRAMS and found.anchor is None and not found.parts:
        config = loop_configs(found)[which]
        rows = config.rows << (programs // PROGRAMS).bit_length()
        kernel = loop_kernel(found, node.op, replace(config, rows=rows))
    inputs = [drawn(value, sizes) for value in node.body.inputs]
    dims = [sizes[sym] for sym in node.body.syms]
    assert len(dims) == len(kernel.scalars)
    eager = compile_graph(node.body, CPU)([x.clone() for x in inputs], [])  # it may write to these
    wide = [x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True) for x in inputs]
    exact = compile_graph(body_in_float64(node.body), CPU)(wide, [])
    outputs = [torch.full_like(result, torch.nan if result.is_floating_point() else 1) for result in eager]
    outputs = [
        x.as_strided(x.shape, [evaluate(dim, sizes) for dim in v.type.strides])  # type: ignore[union-attr]
        for x, v in zip(outputs, node.outputs, strict=True)
    ]
    begin(node.body, inputs, outputs)
    run(kernel, [*inputs, *outputs], sizes)
    assert_right(outputs, eager, exact)


def numbers(graph: Graph) -> dict[str, int]:
    """A size for each symbol."""
    return {name: _number(sym) for name, sym in graph.syms.items()}


def _number(sym: Sym) -> int:
    return max(sym.min, 3 * sym.multiple)


# Every model in one dtype, and some with a batch size that is only known at run time. Those that are left out have the
# kernels of others.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAMES = [name for name in models.names() if name not in ("mobilenet_v2", "gpt2_prefill", "llama")]
CASES = [(name, DTYPES[index % 3], False) for index, name in enumerate(NAMES)]
CASES += [("bert_base", torch.float16, True), ("vit_b_16", torch.float16, True)]


@pytest.mark.parametrize(("name", "dtype", "dynamic"), CASES)
def test_kernels(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    torch.manual_seed(0)
    model, module = fused(name, dtype, dynamic)
    graph = module.engine.graph
    sizes = numbers(graph)
    found = [node for node in kernels(graph).values() if small(node, sizes)]
    assert found
    for index, node in enumerate(found[:: -(-len(found) // MOST)]):
        check(node, sizes)
        if index % 4 == 0 and small(node, sizes, which := 1 + index // 4 % 3):
            check(node, sizes, which)
    planned(graph)
    whole(name, dtype, model, through_bytes(module, model))
    if not graph.syms:
        assert Plan(graph, frozenset(), frozenset()).memory({}).arena <= held_by(name, dtype, model)


def through_bytes(module: torch_rtx.CompiledModule, model: nn.Module) -> torch_rtx.CompiledModule:
    """What a file holds of the engine, which is all of it, with the weights that the model has."""
    file = io.BytesIO()
    torch_rtx.save(module, file)
    file.seek(0)
    loaded = torch_rtx.load(file, weights=copy.deepcopy(model), device="cpu")
    assert loaded.engine.graph == module.engine.graph
    return loaded


def planned(graph: Graph) -> None:
    """What one packs is never more than is alive at once, and fused less than call by call."""
    sizes = numbers(graph)
    plan = Plan(graph, frozenset(), frozenset(graph.syms))
    arena = plan.memory(sizes).arena
    assert 0 < arena <= 1.05 * most_alive((buffer, evaluate(buffer.size, sizes)) for buffer in plan.buffers)
    calls = Plan(inline_kernels(graph, {}), frozenset(), frozenset(graph.syms)).memory(sizes)
    assert arena <= 1.01 * calls.peak


def held_by(name: str, dtype: torch.dtype, model: nn.Module) -> int:
    """The most that PyTorch holds for a call of the model."""
    args, kwargs = models.inputs(name, "small", dtype=dtype)
    own = copy.deepcopy(model)
    return most_held(lambda: own(*args, **kwargs))


def whole(name: str, dtype: torch.dtype, model: nn.Module, module: torch_rtx.CompiledModule) -> None:
    """The fused graph as a whole computes what the model does: nothing is lost, and nothing is out of order."""
    args, kwargs = models.inputs(name, "small", dtype=dtype, seed=7)
    exact = in_float64(model, args, kwargs)
    with torch.no_grad():
        eager = copy.deepcopy(model)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    assert_right(module(*args, **kwargs), eager, exact)


class Stem(nn.Module):
    """A first convolution, and what makes its size one that any image has."""

    def __init__(self, channels: int, window: int, stride: int, padding: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 20, window, stride, padding, dilation)
        self.norm = nn.BatchNorm2d(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


# Channels, window, stride, padding and dilation, height and width, dtype, and the axes whose sizes are open.
STEMS = [
    ((3, 7, 2, 3, 1), (19, 22), torch.float16, (0,)),
    ((3, 7, 2, 3, 1), (19, 22), torch.float16, (0, 2, 3)),
    ((3, 3, 2, 1, 1), (15, 13), torch.bfloat16, ()),
    ((5, 3, 1, 0, 2), (10, 11), torch.float16, ()),
    ((9, 4, 3, 2, 1), (12, 9), torch.bfloat16, (0,)),
]


@pytest.mark.parametrize(("conv", "size", "dtype", "dynamic"), STEMS)
def test_first_convolution(
    conv: tuple[int, int, int, int, int], size: tuple[int, int], dtype: torch.dtype, dynamic: tuple[int, ...]
) -> None:
    """An image of few channels is copied with more of them: its kernels are right, and so they are when refitted."""
    torch.manual_seed(0)
    model = Stem(*conv).eval().to(dtype)
    args = (torch.randn(2, conv[0], *size).to(dtype),)
    shapes = ({axis: torch.export.Dim(f"size{axis}", min=2 if axis == 0 else 8, max=64) for axis in dynamic},)
    settings = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        module = torch_rtx.compile(copy.deepcopy(model), args, dynamic_shapes=shapes, settings=settings)
    nodes = kernels(module.engine.graph)
    copied, convolved = (next(node for name, node in nodes.items() if word in name) for word in ("pad", "conv"))
    (image,) = copied.outputs
    assert image in convolved.inputs
    assert isinstance(image.type, TensorType)
    assert image.type.shape[1] == conv[0] + -conv[0] % 4
    sizes = dict.fromkeys(module.engine.graph.syms, 16)
    for node in (copied, convolved):
        check(node, sizes)
    other = Stem(*conv).eval().to(dtype)
    for one in (model, other):
        module.refit(one.state_dict())
        with torch.no_grad():
            assert_right(module(*args), one(*args), in_float64(one, args, {}))
