"""Calls of attention libraries in a joint graph get one name, with the gradients of eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from torch_rtx.attention_gradients import ALIGNMENT, _in_aligned_rows
from torch_rtx.backend.attention_calls import BACKWARD, FORWARD, name_attention

Step = Callable[..., tuple[Tensor, ...]]


def step(library: str, *options: Any, **named: Any) -> Step:
    """The result of a library's call, its statistic and the gradients of its operands; a mask if there is a fourth."""

    def run(gradient: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        given = [one.detach().requires_grad_() for one in operands]
        masks = () if library == "flash" else (given[3] if len(given) > 3 else None, True)
        call = getattr(torch.ops.aten, f"_scaled_dot_product_{library}_attention").default
        out, statistic, *_ = call(*given[:3], *masks, *options, **named)
        return out, statistic, *torch.autograd.grad(out, given, gradient)

    return run


def named(run: Step, *given: Tensor) -> fx.GraphModule:
    """The trace of a step on tensors like these, after the pass."""
    traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
    name_attention(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def operands(keys: int = 21, shared: int = 4, mask: bool = False) -> list[Tensor]:
    """Gradient, query, key, value, and a mask in rows that are padded, as PyTorch makes it for "efficient"."""
    torch.manual_seed(0)
    rows = torch.randn(2, 2, 4, 21, 16).transpose(2, 3).contiguous().transpose(2, 3)
    found = [*rows, *torch.randn(2, 2, shared, keys, 16)]
    return [*found, torch.randn(2, 4, 21, 32)[..., :keys]] if mask else found


def calls(traced: fx.GraphModule) -> list[Any]:
    return [node.target for node in traced.graph.nodes if "attention" in str(node.target)]


@pytest.mark.parametrize(
    ("library", "given", "options", "same"),
    [
        ("efficient", operands(mask=True), {}, {}),
        ("efficient", operands(keys=9), {"is_causal": True, "scale": 0.5}, {"is_causal": True, "scale": 0.5}),
        ("flash", operands(shared=2), {"is_causal": True}, {"is_causal": True, "enable_gqa": True}),
        ("cudnn", operands(keys=30), {"scale": 0.5}, {"scale": 0.5}),
    ],
    ids=["mask", "causal", "shared heads", "cudnn"],
)
def test_gradients_are_those_of_eager_mode(library: str, given: list[Tensor], options: Any, same: Any) -> None:
    traced = named(step(library, **options), *given)
    assert calls(traced) == [FORWARD, BACKWARD]
    out, statistic, *gradients = traced(*given)
    gradient, *leaves = (one.detach().requires_grad_() for one in given)
    expected = F.scaled_dot_product_attention(*leaves, **same)
    assert statistic.isfinite().sum() == out[..., 0].numel()
    torch.testing.assert_close([out, *gradients], [expected, *torch.autograd.grad(expected, leaves, gradient)])
    (results,) = traced.graph.output_node().args
    found = [(one.shape, one.stride()) for one in (out, statistic, *gradients)]
    assert [(one.meta["val"].shape, one.meta["val"].stride()) for one in results] == found


def test_masks_are_read_as_they_were_before_padding() -> None:
    """PyTorch pads rows of masks for "efficient", and their gradients."""

    def run(gradient: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        given = [one.detach().requires_grad_() for one in operands]
        mask = F.pad(given[3], (0, 11))[..., :21].expand(2, 4, 21, 21)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(*given[:3], mask, True)[0]
        return out, *torch.autograd.grad(out, given, gradient)

    given = [*operands(), torch.randn(2, 1, 21, 21)]
    traced = named(run, *given)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert not any(word in str(node.target) for node in traced.graph.nodes for word in ("pad_nd", "slice"))
    gradient, *leaves = (one.detach().requires_grad_() for one in given)
    expected = F.scaled_dot_product_attention(*leaves)
    torch.testing.assert_close(list(traced(*given)), [expected, *torch.autograd.grad(expected, leaves, gradient)])


@pytest.mark.parametrize(
    ("library", "given", "options"),
    [
        ("efficient", operands(), {"dropout_p": 0.5}),
        ("flash", operands(), {"dropout_p": 0.5}),
        ("flash", operands(keys=30), {"is_causal": True}),
    ],
    ids=["dropout", "dropout of flash", "causal, not square"],
)
def test_what_has_no_such_definition_stays(library: str, given: list[Tensor], options: Any) -> None:
    assert not {FORWARD, BACKWARD} & {*calls(named(step(library, **options), *given))}


def test_what_is_read_elsewhere_stays() -> None:
    def run(*given: Tensor) -> tuple[Tensor, ...]:
        out, _, *state = torch.ops.aten._scaled_dot_product_efficient_attention(*given, None, True)
        return out, *state

    assert FORWARD not in calls(named(run, *operands()[1:]))


@pytest.mark.parametrize(
    "strides", [(0, 441, 21, 1), (21, 0, 0, 1), (441, 0, 21, 1), (2688, 672, 32, 1), (84, 21, 1, 0)]
)
def test_masks_in_rows_that_the_library_takes(strides: tuple[int, ...]) -> None:
    mask = torch.randn(8192).as_strided((2, 4, 21, 21), strides)
    found = _in_aligned_rows(mask)
    assert found is not None
    assert torch.equal(found, mask)
    assert found.stride(-1) == 1
    assert not any(stride % ALIGNMENT for stride in found.stride()[:-1])
    assert all(made == 0 for made, stride in zip(found.stride()[:-1], strides, strict=False) if stride == 0)
