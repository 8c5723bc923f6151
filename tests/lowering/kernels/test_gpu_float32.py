"""Products of float32 on the tensor cores of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_rtx
from benchmarks.numerics import assert_right, relative_error
from torch_rtx.settings import CompilationSettings, RuntimeSettings
from torch_rtx.targets import HIGH, HIGHEST

pytestmark = pytest.mark.gpu
ONLY_KERNELS = RuntimeSettings(tactics="kernel", specialization_strategy="none", cuda_graph_strategy="disabled")


class Model(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


CASES: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "product": (lambda x, w, b: F.relu(F.linear(x, w, b)), [(200, 1024), (320, 1024), (320,)]),
    "deep product": (F.linear, [(64, 8192), (64, 8192)]),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), [(2, 64, 28, 28), (96, 64, 3, 3)]),
    "attention": (F.scaled_dot_product_attention, [(2, 4, 200, 64)] * 3),
}


def compiled(function: Callable[..., torch.Tensor], args: list[torch.Tensor], level: str) -> torch.Tensor:
    settings = CompilationSettings(targets="current", float32_precision=level)
    module = torch_rtx.compile(Model(function), tuple(args), settings=settings, runtime=ONLY_KERNELS)
    assert {tactic.kind for tactic in module.session.tactics.values()} == {"kernel"}
    return module(*args)


@pytest.mark.parametrize("case", CASES)
def test_errors(case: str) -> None:
    function, shapes = CASES[case]
    args = [torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) for shape in shapes]
    exact = function(*(one.double() for one in args))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_right(compiled(function, args, HIGHEST), function(*args), [exact])
    found = compiled(function, args, HIGH)
    assert 1e-5 < relative_error(found, exact) < 5e-4
    size = float((found * exact).sum() / (exact * exact).sum())
    assert abs(size - 1) < 1e-4  # numbers are rounded, not truncated


def test_what_is_not_finite() -> None:
    x, w = torch.randn(2, 64, 128, device="cuda")
    limit = torch.finfo(torch.float32).max
    x[0, 3], x[1, 4], x[2, 5], x[3, 6], x[4, 7], x[5, 8] = torch.inf, -torch.inf, torch.nan, limit, -limit, 3.4e38
    w[:, 6:9], w[7, 3], w[8, 4] = 0.5, torch.inf, 0.0
    found, exact = compiled(F.linear, [x, w], HIGHEST), F.linear(x.double(), w.double()).float()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isinf() * found.sign(), exact.isinf() * exact.sign())
    finite = exact.isfinite()
    torch.testing.assert_close(found[finite], exact[finite], rtol=1e-5, atol=1e-5)
