"""Kernels on a GPU: built ahead of time, launched from binaries and from PTX of other generations, in CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

import torch_rtx
from benchmarks.numerics import assert_right
from tests.helpers.kernels import ADD, ADD_BF16, SOFTMAX, matmul
from tests.lowering.kernels.kernel_bodies import whole
from tests.paths import ENGINES
from torch_rtx.backend.kernels import build_kernels
from torch_rtx.errors import KernelError
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.runtime.inline import launched
from torch_rtx.runtime.launch import load_tactics
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.weights import WeightStore
from torch_rtx.settings import RuntimeSettings
from torch_rtx.tactics import OWN
from torch_rtx.targets import ARCHES, Target

pytestmark = pytest.mark.gpu
FORMS = ("native", "compute_75", "compute_80", "compute_86", "compute_89")
Inputs = Callable[[int], list[torch.Tensor]]


def program(call: str, arguments: str, type_: str, count: int) -> Graph:
    """A graph of one kernel, `k`, whose `count` inputs and output are of one type."""
    dim = "dim s = 0, 1048576, 1"
    body = "".join(f"    input in{index}: {type_}\n" for index in range(count))
    given = ", ".join(f"in{index}=x{index}" for index in range(count))
    inputs = "".join(f"  input x{index}: {type_}\n" for index in range(count))
    return parse(
        f"graph fused {{\n  {dim}\n{inputs}  y: {type_} = kernel k({given}) graph import {{\n    {dim}\n{body}"
        f"    r: {type_} = op aten.{call}({arguments})\n    return [r]\n  }}\n  return [y]\n}}\n"
    )


def tensors(count: int, *tail: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Makes `count` tensors of shape [s, *tail], with -1 in the place of s."""
    return lambda size: [
        torch.randn(size, *(size if n < 0 else n for n in tail), device="cuda").to(dtype) for _ in range(count)
    ]


ADD_F32 = (ADD, program("add.Tensor", "self=in0, other=in1", "f32[s]", 2), tensors(2))
CASES: dict[str, tuple[Kernel, Graph, Inputs]] = {
    "add": ADD_F32,
    "add_bf16": (
        ADD_BF16,
        program("add.Tensor", "self=in0, other=in1", "bf16[s]", 2),
        tensors(2, dtype=torch.bfloat16),
    ),
    "softmax": (SOFTMAX, program("softmax.int", "self=in0, dim=1", "f32[s, 1000]", 1), tensors(1, 1000)),
    "matmul": (
        matmul(),
        program("mm.default", "self=in0, mat2=in1", "f16[s, s]", 2),
        tensors(2, -1, dtype=torch.float16),
    ),
}


def target_of(form: str) -> Target:
    """The target; skips what this GPU can't run."""
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    if form == "native":
        if sm not in ARCHES:
            pytest.skip(f"no target for this GPU, which is sm_{sm}")
        return Target(sm)
    target = Target(int(form.removeprefix("compute_")), ptx=True)
    if target.sm > sm:
        pytest.skip(f"{form} is newer than this GPU, which is sm_{sm}")
    return target


def session(kernel: Kernel, graph: Graph, target: Target, strategy: str = "disabled") -> Session:
    """A session that launches the kernel, from the code for one target."""
    table, report = build_kernels(graph, [target], lambda *_: [whole([kernel])])
    assert not report.missing, str(report)
    device = torch.device("cuda", torch.cuda.current_device())
    found = load_tactics(table, graph, device)
    assert found["k"].kernels[OWN].target == target
    settings = RuntimeSettings(cuda_graph_strategy=strategy)
    return Session(graph, WeightStore(graph, device, {}), settings, tactics=found)


def check(made: Session, graph: Graph, inputs: list[torch.Tensor]) -> None:
    """The kernel's result against float64, where eager is the session without it."""
    eager = Session(graph, made.store, RuntimeSettings(cuda_graph_strategy="disabled"))
    wide = [x.double() for x in inputs]
    node = graph.nodes[0]
    exact = {"add": lambda: wide[0] + wide[1], "mm": lambda: wide[0] @ wide[1], "softmax": lambda: wide[0].softmax(1)}
    reference = exact[node.body.nodes[0].op.split(".")[1]]()  # type: ignore[union-attr]
    got = made(inputs)
    torch.cuda.synchronize()
    assert_right(got, eager(inputs), [reference])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_right(case: str, form: str) -> None:
    kernel, graph, inputs = CASES[case]
    target = target_of(form)
    if (case, form) == ("add_bf16", "compute_75"):
        pytest.skip("sm_75 has no bf16")
    made = session(kernel, graph, target)
    torch.manual_seed(0)
    for size in (1, 16, 250, 1000, 1024):
        check(made, graph, inputs(size))


def test_large_shared_memory() -> None:
    """The matrix product of `test_right` needs more than a kernel gets without asking."""
    kernel, graph, _ = CASES["matmul"]
    target = target_of("native")
    table, _ = build_kernels(graph, [target], lambda *_: [whole([kernel])])
    (tactic,) = table.tactics["k"][target]
    assert tactic.kernels[OWN].aligned.shared > 48 << 10


def test_odd_addresses_and_strides() -> None:
    kernel, graph, _ = ADD_F32
    made = session(kernel, graph, target_of("native"))
    memory = torch.randn(4096, device="cuda")
    for x, y in ((memory[1:1025], memory[3:1027]), (memory[::4], memory[1::4]), (memory[:1000], memory[1:1001])):
        check(made, graph, [x, y])


def test_nothing_to_do() -> None:
    kernel, graph, inputs = CASES["softmax"]
    made = session(kernel, graph, target_of("native"))
    assert made(inputs(0))[0].shape == (0, 1000)


def test_a_launch_that_the_driver_refuses() -> None:
    kernel, graph, _ = ADD_F32
    launcher = launched(session(kernel, graph, target_of("native")).tactics)["k"]
    with pytest.raises(KernelError, match="can't be launched with 1 x 65536 x 1 blocks"):
        launcher((0, 0, 0), (0,), (1, 65536, 1))
    with pytest.raises(KernelError, match=r"can't be launched with the sizes \[4294967296\]"):
        launcher((0, 0, 0), (2**32,), (1, 1, 1))


@pytest.mark.parametrize("form", ["native", "compute_80"])
def test_cuda_graphs(form: str) -> None:
    kernel, graph, inputs = CASES["matmul"]
    made = session(kernel, graph, target_of(form), "whole_graph_capture")
    for size in (256, 250):
        for _ in range(4):
            check(made, graph, inputs(size))
    assert made.pool is not None
    assert made.pool.disabled is None
    assert (made.pool.captures, made.pool.replays) == (2, 6)


def test_odd_addresses_in_cuda_graphs() -> None:
    """The plain call copies such inputs; those of a graph are at round addresses already."""
    kernel, graph, _ = ADD_F32
    made = session(kernel, graph, target_of("native"), "whole_graph_capture")
    memory = torch.randn(5000, device="cuda")
    for start in (1, 2, 3, 0):
        check(made, graph, [memory[start : start + 1024], memory[2048 + start : 3072 + start]])
    assert made.pool is not None
    assert made.pool.replays == 3


def test_inside_a_callers_own_capture() -> None:
    kernel, graph, inputs = CASES["softmax"]
    made = session(kernel, graph, target_of("native"))
    x = inputs(64)[0]
    made([x])
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        (y,) = made([x])
    x.copy_(torch.randn_like(x))
    captured.replay()
    torch.testing.assert_close(y, x.softmax(1))


@pytest.mark.parametrize("strategy", ["disabled", "whole_graph_capture"])
def test_threads_and_streams(strategy: str) -> None:
    """One launcher in several threads, each with a stream and sizes of its own; some threads make no other call."""
    kernel, graph, _ = ADD_F32
    made = session(kernel, graph, target_of("native"), strategy)
    failures: list[str] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(100):
                    size = 1000 + 16 * number + step % 3
                    x, y = (torch.full((size,), float(value), device="cuda") for value in (number, step))
                    (z,) = made([x, y])
                    if not bool((z == number + step).all()):
                        failures.append(f"thread {number}, step {step}")
        except Exception as error:
            failures.append(f"thread {number}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_thread_without_a_context() -> None:
    """A launch is the first thing that a thread does: its memory comes from PyTorch's cache."""
    kernel, graph, inputs = ADD_F32
    made = session(kernel, graph, target_of("native"))
    x, y = inputs(1024)
    made([x, y])
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.extend(made([x, y])))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], x + y)


@pytest.mark.parametrize("path", sorted(ENGINES.glob("v*/kernel.rtx")), ids=lambda path: path.parent.name)
def test_engine_file(path: Path) -> None:
    weights = path.with_suffix(".weights.safetensors")
    module = torch_rtx.load(path, weights=weights, device="cuda", trust_binaries=True)
    plain = torch_rtx.load(path, weights=weights, device="cuda")
    assert set(launched(module.session.tactics)) == {"add_k"}
    assert not plain.session.tactics
    for size in (3, 64, 3, 64):
        x, y = torch.randn(2, size, 8, device="cuda")
        torch.testing.assert_close(module(x, y), plain(x, y))
