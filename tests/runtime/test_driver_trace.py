"""The fake driver answers as the real one: a program makes the same calls on both, and gets the same answers.

`driver_trace.json` is their common trace. The tests write what they record to $TORCH_RTX_TRACE, if it is set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.doubles.fake_graphs import DEVICE, SIZES, GraphDriver, add, adders, install, program
from tests.runtime.driver_trace import Tracer
from torch_rtx.runtime import captured, code, graph_params
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.cudagraph import GraphPool
from torch_rtx.runtime.driver import driver

GOLDEN = Path(__file__).parent / "driver_trace.json"
# r[i] = a[i] + b[i]; it waits by itself for the kernels before it, and uses no scratch memory.
PTX = b"""
.version 7.8
.target sm_90
.address_size 64
.visible .entry entry(.param .u64 a, .param .u64 b, .param .u64 r, .param .u32 n, .param .u64 s, .param .u64 t)
{
  .reg .pred %end;
  .reg .b32 %i, %n;
  .reg .b64 %a, %b, %r, %at, %offset;
  .reg .f32 %x, %y;
  griddepcontrol.launch_dependents;
  griddepcontrol.wait;
  ld.param.u64 %a, [a];
  ld.param.u64 %b, [b];
  ld.param.u64 %r, [r];
  ld.param.u32 %n, [n];
  mov.u32 %i, %tid.x;
NEXT:
  setp.ge.u32 %end, %i, %n;
  @%end bra DONE;
  mul.wide.u32 %offset, %i, 4;
  add.s64 %at, %a, %offset;
  ld.global.f32 %x, [%at];
  add.s64 %at, %b, %offset;
  ld.global.f32 %y, [%at];
  add.f32 %x, %x, %y;
  add.s64 %at, %r, %offset;
  st.global.f32 [%at], %x;
  add.u32 %i, %i, 128;
  bra NEXT;
DONE:
  ret;
}
"""
# Nothing is copied at the border of the first graph. So many kernels read `x` and `a` of the second that they are.
PROGRAMS: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]]] = {
    "in place": (
        """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=y) KERNEL
  b: f32[s] = kernel k(in0=a, in1=x) KERNEL
  return [b]""",
        lambda x, y: [2 * x + y],
    ),
    "copied": (
        """
  input x: f32[s]
  input y: f32[s]
  a: f32[s] = kernel k(in0=x, in1=x) KERNEL
  b: f32[s] = kernel k(in0=x, in1=x) KERNEL
  c: f32[s] = kernel k(in0=x, in1=a) KERNEL
  d: f32[s] = kernel k(in0=a, in1=a) KERNEL
  e: f32[s] = kernel k(in0=a, in1=y) KERNEL
  return [a, e]""",
        lambda x, y: [2 * x, 2 * x + y],
    ),
}


class Kept(TorchDispatchMode):
    """Keeps all tensors: memory that was freed and used again would be one address in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.append(func(*args, **(kwargs or {})))
        return self.tensors[-1]

    def keeping(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """`make`, which no mode sees."""

        def kept(*given: Any) -> torch.Tensor:
            self.tensors.append(make(*given))
            return self.tensors[-1]

        return kept


def record(monkeypatch: pytest.MonkeyPatch, api: Any, device: torch.device, name: str) -> list[str]:
    """The calls of `api` that loading, a plain call, a capture and three replays make, each with other tensors."""
    text, expected = PROGRAMS[name]
    tracer, kept, graph = Tracer(api, SIZES), Kept(), program(text)
    monkeypatch.setattr(captured, "driver", lambda: tracer)
    monkeypatch.setattr(graph_params, "driver", lambda: tracer)
    for kind, make in list(code.EMPTY.items()):
        monkeypatch.setitem(code.EMPTY, kind, kept.keeping(make))
    tactics = adders(graph, tracer, PTX, uses_pdl=True)
    compiled = compile_graph(graph, device, tactics=tactics)
    pool = GraphPool(graph, lambda code, *given: code.run(*given), DEVICE, 4)
    store: Any = SimpleNamespace(generation=0, values=[])
    pairs = [torch.randn(2, 16, device=device).unbind() for _ in range(4)]
    with kept, torch.no_grad():
        results = [pool("key", compiled, pair, store) for pair in pairs]
    for pair, result in zip(pairs, results, strict=True):
        torch.testing.assert_close(result, expected(*pair))
    assert (pool.captures, pool.replays) == (1, 3)
    return list(tracer.lines)


def check(traces: dict[str, list[str]]) -> None:
    """Compare with the golden file."""
    path = os.environ.get("TORCH_RTX_TRACE")
    if path:
        Path(path).write_text(json.dumps(traces, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert list(traces) == list(golden)
    for name, lines in traces.items():
        assert lines == golden[name]


def test_the_fake_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = {}
    for name in PROGRAMS:
        with monkeypatch.context() as patch:
            api = GraphDriver(SIZES, {"entry": add})
            api.contexts.current = 1100  # the primary context: this thread has made calls of the CUDA runtime
            install(patch, api)
            traces[name] = record(patch, api, torch.device("cpu"), name)
    check(traces)


@pytest.mark.gpu
def test_the_real_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel needs sm_90")
    traces = {}
    for name in PROGRAMS:
        with monkeypatch.context() as patch:
            traces[name] = record(patch, driver(), DEVICE, name)
    check(traces)
