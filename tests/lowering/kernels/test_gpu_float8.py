"""float8 on a GPU: the bits of casts, and models with products of float8, by kernels and by libraries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton")  # builds; running needs the driver alone

import torch_rtx
from benchmarks.numerics import assert_right
from tests.lowering.kernels.kernel_bodies import DTYPES
from tests.lowering.kernels.test_float8 import FLOAT8, numbers, rounded, same
from tests.lowering.test_prologues import Float8
from tests.lowering.test_scaled_products import Dynamic
from torch_rtx.settings import CompilationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu
CURRENT, UNTUNED = CompilationSettings(targets="current"), {"specialization_strategy": "none"}


class Casts(nn.Module):
    """To both kinds of float8 and back."""

    def forward(self, wide: torch.Tensor, *narrow: torch.Tensor) -> tuple[torch.Tensor, ...]:
        down = (wide.to(DTYPES[name]) for name in FLOAT8)
        return *down, *(x.to(DTYPES[name]) for x in narrow for name in ("f16", "bf16", "f32"))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "f64"])
def test_casts(dtype: str) -> None:
    every = [torch.arange(256).to(torch.uint8).view(DTYPES[name]) for name in FLOAT8]
    wide = numbers(dtype)
    inputs = [x.cuda() for x in (wide, *every)]
    module = torch_rtx.compile(Casts(), tuple(inputs), settings=CURRENT, runtime=RuntimeSettings(**UNTUNED))
    assert {node.kind for node in module.engine.graph.nodes} == {"kernel"}
    right = [rounded(wide, name) for name in FLOAT8]
    right += [x.to(DTYPES[name]) for x in every for name in ("f16", "bf16", "f32")]
    for found, expected in zip(module(*inputs), right, strict=True):
        assert same(found.cpu(), expected)


class InBf16(Dynamic):
    """With results that libraries have for scales of rows, and sizes that they have."""

    def product(self, x: torch.Tensor, name: str, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, scales = getattr(self, name).t(), getattr(self, f"{name}_scale")
        bias = None if bias is None else bias.bfloat16()
        return torch._scaled_mm(x, weight, scale, scales, bias, out_dtype=torch.bfloat16)


class Recorded(InBf16):
    """`last`: the last product in float64."""

    def product(self, x: torch.Tensor, name: str, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        scales = scale.double() * getattr(self, f"{name}_scale").double()
        self.last = x.double() @ getattr(self, name).double().t() * scales
        return super().product(x, name, scale, bias)


@pytest.mark.parametrize("kind", ["kernel", "library", "best"])
def test_products(kind: str) -> None:
    if kind == "library" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("PyTorch has no products of float8 for this GPU")
    torch.manual_seed(0)
    model, eager = InBf16().cuda(), Recorded().cuda()
    eager.load_state_dict(model.state_dict())
    runtime = RuntimeSettings(tactics=kind, **UNTUNED)
    x = torch.randn(80, 64, device="cuda").half()
    module = torch_rtx.compile(model, (x,), settings=CURRENT, runtime=runtime)
    for _ in range(3):  # plain, captured and replayed
        x = torch.randn(80, 64, device="cuda").half()
        eager(x)
        # Hidden values that are near the middle of two numbers of float8 may become the other one.
        assert (module(x).double() - eager.last).norm() / eager.last.norm() < 0.02


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("kind", ["kernel", "library"])
@pytest.mark.parametrize("dtype", [DTYPES[name] for name in FLOAT8])
def test_weights(dtype: torch.dtype, kind: str, rows: int) -> None:
    model = Float8(dtype).cuda().eval()
    x = torch.randn(rows, 128, device="cuda").half()
    runtime = RuntimeSettings(tactics=kind, **UNTUNED)
    module = torch_rtx.compile(copy.deepcopy(model), (x,), settings=CURRENT, runtime=runtime)
    assert {"f8e4m3fn", "f8e5m2"} & {weight.value.type.dtype for weight in module.engine.graph.weights}
    exact = torch.relu(x.double() @ (model.weight.double() * model.scale.double()).t() + model.bias.double())
    assert_right([module(x)], [model(x)], [exact])
