"""Each kind of tactic on a GPU: it is used where it is asked for, and is right by the float64 criterion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton")  # builds; running needs the driver alone

import torch_rtx
from benchmarks.numerics import assert_right
from tests.lowering.test_int8 import Dynamic, Static
from tests.lowering.test_prologues import Int4, Int8, Packed
from torch_rtx.settings import CompilationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu


class Residual(nn.Module):
    """Convolutions whose results stay channels-last, the last one with a sum before its activation."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.last(torch.relu(self.second(x))) + x).mean((2, 3))


def layers(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), activation, nn.Linear(512, 256), activation)


class InFloat32(nn.Module):
    """A product of halves whose result is cast, as the gradients of weights under autocast are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.mT @ self.weight).float()


CASES = {
    "relu": (layers(nn.ReLU()), (48, 256), ("kernel", "library", "cublaslt")),
    "gelu": (layers(nn.GELU(approximate="tanh")), (2, 24, 256), ("kernel", "library", "cublaslt")),
    "in float32": (InFloat32(), (256, 768), ("kernel", "library", "cublas")),
    "convolutions": (Residual(), (4, 64, 28, 28), ("kernel", "library", "cudnn")),
    "few rows": (nn.Sequential(nn.Linear(8192, 512), nn.ReLU()), (16, 8192), ("kernel", "split", "library")),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("case", "kind"), [(name, kind) for name, (*_, kinds) in CASES.items() for kind in kinds])
def test_kinds(case: str, kind: str, dtype: torch.dtype) -> None:
    model, shape, _ = CASES[case]
    model = copy.deepcopy(model).to("cuda", dtype).eval()
    runtime = RuntimeSettings(tactics=kind, specialization_strategy="none")
    settings = CompilationSettings(targets="current")
    x = torch.randn(shape, device="cuda", dtype=dtype)
    module = torch_rtx.compile(copy.deepcopy(model), (x,), settings=settings, runtime=runtime)
    assert kind in {tactic.kind for tactic in module.session.tactics.values()}
    for _ in range(3):  # plain, captured and replayed
        x = torch.randn(shape, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert_right([module(x)], [expected], [exact])


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("kind", ["kernel", "library"])
@pytest.mark.parametrize("make", [Int8, Int4])
def test_packed_weights(make: type[nn.Module], kind: str, rows: int) -> None:
    """A product whose kernel widens its weights, and one after a kernel that does."""
    model = make().cuda().eval()
    x = torch.randn(rows, 128, device="cuda").half()
    runtime = RuntimeSettings(tactics=kind, specialization_strategy="none")
    module = torch_rtx.compile(
        copy.deepcopy(model), (x,), settings=CompilationSettings(targets="current"), runtime=runtime
    )
    assert {"i8", "i32"} & {weight.value.type.dtype for weight in module.engine.graph.weights}
    for _ in range(3):
        x = torch.randn(rows, 128, device="cuda").half()
        exact = copy.deepcopy(model).double()(x.double())
        assert_right([module(x)], [model(x)], [exact])


@pytest.mark.parametrize(("rows", "kind"), [(1, "kernel"), (16, "split"), (100, "kernel"), (100, "library")])
@pytest.mark.parametrize(("depth", "columns"), [(4096, 512), (1000, 72), (100, 19)])
def test_products_of_int8(depth: int, columns: int, rows: int, kind: str) -> None:
    """Also in sizes that libraries do not have; PyTorch's own product on a GPU does not take these."""
    model, x = Dynamic(depth, columns).eval(), torch.randn(rows, depth).half()
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
    runtime = RuntimeSettings(tactics=kind, specialization_strategy="none")
    settings = CompilationSettings(targets="current")
    module = torch_rtx.compile(model.cuda(), (x.cuda(),), settings=settings, runtime=runtime)
    if depth == 4096:
        assert kind in {tactic.kind for tactic in module.session.tactics.values()}
    for _ in range(3):
        assert_right([module(x.cuda()).cpu()], [expected], [exact])


@pytest.mark.parametrize("size", [7, 28])
@pytest.mark.parametrize("channels", [3, 32, 64])
def test_convolutions_of_int8(channels: int, size: int) -> None:
    model, x = Static(channels).cuda().eval(), torch.randn(4, channels, size, size, device="cuda")
    runtime = RuntimeSettings(specialization_strategy="none")
    module = torch_rtx.compile(model, (x,), settings=CompilationSettings(targets="current"), runtime=runtime)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 33, 200])
@pytest.mark.parametrize("packing", ["low first", "words of rows", "table"])
def test_packings(packing: str, rows: int, dtype: torch.dtype) -> None:
    model = Packed(packing, 264, 2048, 64, dtype, "integers").cuda().eval()
    x = torch.randn(rows, 2048, device="cuda").to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    for kind in ("kernel", "split", "library"):
        runtime = RuntimeSettings(tactics=kind, specialization_strategy="none")
        settings = CompilationSettings(targets="current")
        module = torch_rtx.compile(copy.deepcopy(model), (x,), settings=settings, runtime=runtime)
        assert "i32" in {weight.value.type.dtype for weight in module.engine.graph.weights}
        assert_right([module(x)], [model(x)], [exact])


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_weights_packed_by_pytorch(tiles: int) -> None:
    """The layout of the library's own kernel, unpacked."""
    codes = torch.randint(0, 256, (512, 512), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, tiles)
    scales = torch.randn(1024 // 128, 512, 2, device="cuda").bfloat16()

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed, self.scales = torch.nn.Buffer(packed), torch.nn.Buffer(scales)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, self.packed, 128, self.scales)

    x = torch.randn(20, 1024, device="cuda").bfloat16()
    runtime = RuntimeSettings(specialization_strategy="none")
    module = torch_rtx.compile(Call().eval(), (x,), settings=CompilationSettings(targets="current"), runtime=runtime)
    (node,) = module.engine.graph.nodes
    assert node.kind == "kernel"
    plain = torch.stack([torch.ones_like(scales[..., 0]), torch.zeros_like(scales[..., 0])], -1)
    unscaled = torch.ops.aten._weight_int4pack_mm(torch.eye(1024, device="cuda").bfloat16(), packed, 128, plain)
    scale, zero = scales.double().repeat_interleave(128, 0).unbind(-1)
    assert_right([module(x)], [Call()(x)], [x.double() @ (unscaled.double() * scale + zero)])
