"""Operators of other libraries that are defined in PyTorch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_rtx
from tests.helpers.compiled import Recorder, compile_rtx
from tests.helpers.foreign_kernels import Launches, scaled_sum_op
from torch_rtx.backend import registered_operators
from torch_rtx.errors import CaptureError, SettingsError
from torch_rtx.targets import LATER


@torch.library.custom_op("rtxtests::swish", mutates_args=())
def swish(x: Tensor, factor: float = 1.0) -> Tensor:
    return x * torch.sigmoid(factor * x)


@swish.register_fake
def _(x: Tensor, factor: float = 1.0) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    registered_operators._registered.clear()


def define() -> None:
    @torch_rtx.register_pointwise("rtxtests::swish")
    def _(x: Tensor, factor: float = 1.0) -> Tensor:
        return x * torch.sigmoid(factor * x)


def test_a_pointwise_operator_fuses_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(4, 8), Launches(lambda x: swish(x, 2.0))
    record = Recorder(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(compile_rtx(model)(x), model(x))
        assert "!swish" in record.ops
        define()
        torch._dynamo.reset()
        record = Recorder(monkeypatch)
        torch.testing.assert_close(compile_rtx(model)(x), model(x))
    assert not record.fallbacks


def test_a_pointwise_operator_is_part_of_a_kernel(tmp_path: Path) -> None:
    define()
    x, model = torch.randn(4, 8), Launches(lambda x: swish(x, 2.0))
    module = torch_rtx.compile(model, (x,), device="cuda", targets=LATER)
    assert [node.kind for node in module.engine.graph.nodes] == ["kernel"]
    torch_rtx.save(module, tmp_path / "swish.rtx")
    torch.testing.assert_close(torch_rtx.load(tmp_path / "swish.rtx", device="cpu")(x), model(x))


def test_instead_of_a_triton_kernel() -> None:
    @torch_rtx.register_pointwise("rtxtests::scaled_sum")
    def _(x: Tensor, y: Tensor, alpha: float) -> Tensor:
        return x + alpha * y

    x, y = torch.randn(4, 8), torch.randn(4, 8)
    model = Launches(lambda x, y: scaled_sum_op(x, y, 0.5))
    module = torch_rtx.compile(model, (x, y), device="cuda", targets=LATER)
    assert [node.kind for node in module.engine.graph.nodes] == ["kernel"]
    torch.testing.assert_close(module(x, y), (2 * x + y).relu())
    registered_operators._registered.clear()
    module = torch_rtx.compile(model, (x, y), device="cuda", targets=LATER)
    assert len(module.engine.graph.nodes) > 1, "PyTorch's own rule is there again"


def test_what_is_not_pointwise_is_refused_as_such() -> None:
    @torch_rtx.register_pointwise("rtxtests::swish")
    def _(x: Tensor, factor: float = 1.0) -> Tensor:
        return x.sum(0)

    with pytest.raises(CaptureError, match=r"rtxtests::swish is registered as pointwise, and makes \[8\] of \[4, 8\]"):
        torch_rtx.compile(Launches(swish), (torch.randn(4, 8),), device="cuda", targets=LATER)


def test_a_decomposition_that_was_registered_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        **registered_operators.decomposition_table,
        torch.ops.rtxtests.swish.default: lambda x, f: x * (f * x).sigmoid(),
    }
    monkeypatch.setattr(registered_operators, "decomposition_table", table)
    x, model = torch.randn(4, 8), Launches(lambda x: swish(x, 2.0))
    module = torch_rtx.compile(model, (x,), device="cuda", targets=LATER)
    assert [node.kind for node in module.engine.graph.nodes] == ["kernel"]
    torch.testing.assert_close(module(x), model(x))


def test_wrong_names() -> None:
    with pytest.raises(SettingsError, match="there is no operator 'rtxtests::nothing'"):
        torch_rtx.register_decomposition("rtxtests::nothing")
    with pytest.raises(SettingsError, match="of PyTorch itself"):
        torch_rtx.register_pointwise("aten::relu")
