"""Layers in block-scaled formats on the GPU: by the instruction for them where there is one, elsewhere by halves."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")  # builds; running needs the driver alone

import torch_rtx
from tests.lowering.test_block_scaled import DEPTH, ROWS, Scaled
from torch_rtx.settings import CompilationSettings, RuntimeSettings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", ["current", "compute_80", "compute_89"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_layers(name: str, form: str) -> None:
    model, x = layer(name), torch.randn(ROWS, DEPTH, device="cuda")
    runtime = RuntimeSettings(tactics="kernel", specialization_strategy="none")
    module = torch_rtx.compile(model, (x,), settings=CompilationSettings(targets=(form,)), runtime=runtime)
    check(model, module, x)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_tuned(name: str) -> None:
    """Kernels for this GPU and these sizes pass the comparison with the calls that they stand for."""
    model, x = layer(name), torch.randn(4 * ROWS, DEPTH, device="cuda")
    runtime = RuntimeSettings(specialization_strategy="eager")
    module = torch_rtx.compile(model, (x,), settings=CompilationSettings(targets=("current",)), runtime=runtime)
    check(model, module, x)


def layer(name: str) -> Scaled:
    """A layer in the format, if this PyTorch can capture it: 2.11's shape function counts two codes of mxfp4 as one."""
    model = Scaled(name).cuda()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            model(mode.from_tensor(torch.randn(ROWS, DEPTH, device="cuda")))
        except RuntimeError as error:
            pytest.skip(f"PyTorch {torch.__version__}: {error}")
    return model


def check(model: Scaled, module: torch_rtx.CompiledModule, x: torch.Tensor) -> None:
    exact = model.exact(x)
    with torch.no_grad():
        for _ in range(3):  # plain, captured and replayed
            error = (module(x).double() - exact).norm() / exact.norm()
            assert error < 1e-3  # what lies midway between two codes may become either
