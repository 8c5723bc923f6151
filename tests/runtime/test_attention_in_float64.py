"""The check of a kernel runs the calls of its region in float64: all forms of attention compute in it, and in nothing
narrower. A form that mixes dtypes there would have all of its kernels refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import flex
from tests.helpers.splits import split_in
from tests.lowering.kernels import test_kernel_attention as forward
from tests.lowering.kernels import test_kernel_attention_backward as backward
from tests.lowering.kernels import test_kernel_flex as modified
from tests.lowering.kernels import test_kernel_flex_captured as of_captured
from tests.lowering.kernels.kernel_bodies import body
from torch_rtx.aten import is_view
from torch_rtx.ir import Graph, Node, attr_values
from torch_rtx.irparse import parse
from torch_rtx.op_work import FLEX, FLEX_GRADS
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.candidate_check import CandidateCheck

CPU = torch.device("cpu")


class Narrow(TorchDispatchMode):
    """The calls that make floats narrower than float64, but for types alone; views of inputs make none."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            is_float = isinstance(one, torch.Tensor) and one.is_floating_point() and one.device.type != "meta"
            if is_float and one.dtype != torch.float64 and not is_view(func):
                self.found.add(str(func))
        return made


def assert_in_float64(graph: Graph) -> None:
    given = tuple((value.name, value) for value in graph.inputs)
    check = CandidateCheck(Node("kernel", "k", given, tuple(attr_values(graph.outputs)), graph), CPU)
    with Narrow() as narrow:
        exact = [piece.right for piece in check._pieces(wide=True)]
    assert exact[0].dtype == torch.float64
    assert narrow.found <= {FLEX}  # whose statistics are float32 always, as PyTorch's are


def in_parts(graph: Graph) -> Graph:
    """The first kernel of the split form."""
    found = split_in(graph, "k", 4).nodes[0].body
    assert found is not None
    return found


@pytest.mark.parametrize("name", [name for name in forward.CASES if name not in ("no keys", "open sizes, no batch")])
def test_attention(name: str) -> None:
    case = forward.CASES[name]
    assert_in_float64(bind(case.graph("f16"), case.sizes))


@pytest.mark.parametrize("name", ["plain", "odd lengths", "mask of pairs", "added mask", "grouped heads, packed, mask"])
def test_parts(name: str) -> None:
    assert_in_float64(in_parts(forward.CASES[name].graph("bf16")))


@pytest.mark.parametrize(("mask", "more"), [("bool", ", fill=-1e4"), ("bool", ", bias=b"), ("f16", "")])
def test_as_models_write_it_out(mask: str, more: str) -> None:
    text = forward.WRITTEN_OUT.format(mask=f"{mask}[2, 1, 18, 21]\n  input b: f16[1, 2, 18, 21]", fill=more)
    assert_in_float64(parse(text.replace("f32", "f16")))


@pytest.mark.parametrize("name", backward.CALLS)
def test_training(name: str) -> None:
    call = backward.CALLS[name]
    for text in (call.forward(), call.backward()):
        assert_in_float64(bind(body(text), backward.SIZES if call.dim else {}))


@pytest.mark.parametrize("name", backward.SPLIT)
def test_ranges_of_queries(name: str) -> None:
    assert_in_float64(in_parts(body(backward.SPLIT[name].backward())))


@pytest.mark.parametrize("name", ["relative bias", "decoding"])
def test_modified(name: str) -> None:
    call = modified.CALLS[name]
    graph, _ = flex.captured(call.function(), *call.operands())
    assert_in_float64(graph)
    if name == "decoding":
        assert_in_float64(in_parts(graph))


def test_gradients_of_modified() -> None:
    call = of_captured.CALLS["rows, columns, all"]
    call.score_mod = of_captured.MODS["rows, columns, all"]
    _, graph, given = flex.gradients(call)
    for op in FLEX_GRADS:
        assert_in_float64(flex.from_call(graph, given, op)[0])
