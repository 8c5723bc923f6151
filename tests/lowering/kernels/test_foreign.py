"""Triton kernels that others wrote: capture, build for all targets without a GPU, and launch."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import pytest
import torch
import triton
from torch.export import Dim
from torch.library import triton_op, wrap_triton

import torch_rtx
from tests.doubles.fake_driver import STREAM, FakeDriver
from tests.doubles.interpreter import InterpretedForeign, run_foreign
from tests.helpers.caching import Traffic
from tests.helpers.compiled import Recorder, compile_rtx
from tests.helpers.foreign_kernels import (
    CASES,
    Launches,
    Product,
    elsewhere,
    hidden,
    in_place,
    scaled_sum,
    scaled_sum_op,
    through_float8,
    with_options,
    wrong,
)
from torch_rtx.backend.fake_triton import standing_in
from torch_rtx.errors import CaptureError, InvalidIR, KernelError
from torch_rtx.foreign import find, launch_in
from torch_rtx.ir import Graph, Node, kernel_nodes
from torch_rtx.lowering.kernels import compile_worker
from torch_rtx.lowering.kernels.triton_kernels import TritonKernel
from torch_rtx.machine import Machine
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.compile_client import _with_foreign
from torch_rtx.runtime.launch import Gpu, load
from torch_rtx.tactics import OWN, KernelTable, Tactic, read_table, runnable_tactics, write_table
from torch_rtx.targets import LATER
from torch_rtx.validity import Validity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine calls a kernel without launching it, it runs in Triton's interpreter."""
    monkeypatch.setattr(TritonKernel, "run", run_foreign)


def operands(count: int, rows: int = 6) -> list[torch.Tensor]:
    return [torch.randn(rows, 40, generator=torch.Generator().manual_seed(index)) for index in range(count)]


def built(name: str, targets: object = LATER, dynamic: bool = False) -> torch_rtx.CompiledModule:
    function, count, _ = CASES[name]
    shapes = ({0: Dim("rows", min=2, max=512)},) * count if dynamic else None
    given = operands(count)
    return torch_rtx.compile(
        Launches(function), tuple(given), dynamic_shapes=(shapes,) if shapes else None, device="cuda", targets=targets
    )


def expected(name: str, given: list[torch.Tensor]) -> torch.Tensor:
    return CASES[name][2](*(2 * x for x in given)).relu()


def foreign_nodes(graph: Graph) -> list[Node]:
    return [node for node in kernel_nodes(graph) if launch_in(node.body) is not None]


def kernel_of(node: Node) -> TritonKernel:
    found = launch_in(node.body)
    assert found is not None
    kernel = find(found[1].kernel)
    assert isinstance(kernel, TritonKernel)
    return kernel


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str, dynamic: bool) -> None:
    module = built(name, dynamic=dynamic)
    graph = module.engine.graph
    assert all(node.kind == "kernel" or node.op.startswith("aten.") for node in graph.nodes), "nothing falls back"
    nodes = foreign_nodes(graph)
    assert len(nodes) == (2 if name == "several" else 1)
    for rows in (6, 11) if dynamic else (6,):
        given = operands(CASES[name][1], rows)
        torch.testing.assert_close(module(*given), expected(name, given))
        # With addresses in the arena, parameters by their slots, and results where kernels write them.
        for which in range(len(kernel_of(nodes[0]).configs)):
            launchers = {node.op: InterpretedForeign(kernel_of(node), node.body, which) for node in nodes}  # type: ignore[arg-type]
            tactics = {op: Tactic("foreign", 1.0, {OWN: launcher}) for op, launcher in launchers.items()}
            copies = [x.clone() for x in given]
            weights = [compile_graph(w.recipe, CPU)((), ())[0] for w in graph.weights if w.recipe is not None]
            code = compile_graph(graph, CPU, tactics=tactics)  # type: ignore[arg-type]
            torch.testing.assert_close(code(copies, weights)[0], expected(name, given))
            assert all(launcher.launches == 1 for launcher in launchers.values())
            assert all(torch.equal(a, b) for a, b in zip(copies, given, strict=True)), "operands stay as they are"


def test_memory_that_a_kernel_fills_is_not_filled_before() -> None:
    (node,) = foreign_nodes(built("direct").engine.graph)
    assert len(node.inputs) == 2
    assert len(built("direct").engine.graph.nodes) <= 4


def test_every_configuration_is_built_for_every_target(tmp_path: Path) -> None:
    targets = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "compute_80"]
    module = built("autotune", targets, dynamic=True)
    (node,) = foreign_nodes(module.engine.graph)
    found = module.engine.kernels.tactics[node.op]
    assert {str(target) for target in found} == set(targets)
    for target, tactics in found.items():
        assert [tactic.kind for tactic in tactics] == ["foreign", "foreign 1"], target
        for tactic, warps, block in zip(tactics, (2, 4), (64, 128), strict=True):
            launch = tactic.kernels[OWN]
            assert launch.aligned.num_warps == warps
            assert str(launch.grid[0]) == f"(({block - 1} + (40 * s17)) // {block})".replace("s17", _only_symbol(node))
            assert [(slot.kind, slot.source) for slot in launch.slots or ()] == [
                *[("pointer", "tensor")] * 3,
                ("i32", "scalar"),
                *[("u64", "constant")] * 2,
            ]
            assert launch.generic is not None, "40 rows may be no multiple of 16"
    path = tmp_path / "tuned.rtx"
    torch_rtx.save(module, path)
    text = path.read_bytes()
    assert b"tl.load" not in text
    assert b"program_id" not in text
    seen = torch_rtx.inspect(path)
    (name,) = seen.foreign
    assert name.startswith("tuned_sum_")
    assert f"foreign kernel {name}" in str(seen)
    table = KernelTable(module.engine.kernels.tactics)
    assert read_table(write_table(table), module.engine.graph) == table


def test_results_that_nobody_reads_are_memory_of_the_kernel() -> None:
    (node,) = foreign_nodes(built("function").engine.graph)
    assert (len(node.inputs), len(node.outputs)) == (2, 2)
    assert not [one for one in built("function").engine.graph.nodes if one.kind == "extern"]


class Trained(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(self.a(x), self.b(x)).square().mean()


def test_gradients_that_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile; Dynamo looks into launches where it finds a GPU."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    model, plain, x = Trained(), Trained(), torch.randn(4, 8)
    record = Recorder(monkeypatch)
    with standing_in():
        loss = compile_rtx(model)(x)
        loss.backward()
    expected_loss = (plain.a(x) * plain.b(x)).square().mean()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss)
    for mine, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad)
    assert not record.fallbacks
    assert record.ops.count("launch") == 3


def _only_symbol(node: Node) -> str:
    assert node.body is not None
    (name,) = node.body.syms
    return name


def test_a_file_without_the_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_rtx.save(built("direct", ["sm_80"]), tmp_path / "direct.rtx")
    monkeypatch.setattr("torch_rtx.foreign._registry", {})
    with pytest.raises(InvalidIR, match=r"launches kernels that others wrote: scaled_sum_\w+\n.*trust_binaries=True"):
        torch_rtx.load(tmp_path / "direct.rtx", device="cpu")
    module = torch_rtx.load(tmp_path / "direct.rtx", device="cpu", trust_binaries=True)
    with pytest.raises(KernelError, match=r"scaled_sum_\w+ has no code that may run here"):
        module(*operands(2))
    assert not torch_rtx.inspect(tmp_path / "direct.rtx").needs_trust, "the decision is that for binaries"
    for sm, fit in ((80, Validity.VALID), (90, Validity.INVALID)):
        machine = Machine(sm=sm, triton=True, bindings=True)
        assert torch_rtx.check_engine(tmp_path / "direct.rtx", machine).validity == fit


def wrongly(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    wrong[(1,)](x, out, x.numel(), BLOCK=16)
    return out


def test_a_kernel_that_does_not_compile_is_named_with_its_line() -> None:
    with pytest.raises(KernelError, match=r"(?s)Triton refuses the kernel wrong.*no_such_thing") as caught:
        torch_rtx.compile(Launches(wrongly), (torch.randn(4, 4),), device="cuda", targets=["sm_80"])
    assert "foreign_kernels.py" in str(caught.value.loc), "where the model calls it"


def test_a_kernel_that_compiles_for_some_targets(caplog: pytest.LogCaptureFixture) -> None:
    model, given = Launches(through_float8), (torch.randn(2, 8),)
    with pytest.raises(KernelError, match="has no code for sm_80: Triton refuses the kernel rounded for sm_80"):
        torch_rtx.compile(model, given, device="cuda", targets=["sm_80", "sm_90"])
    module = torch_rtx.compile(model, given, device="cuda", targets="portable")
    (node,) = foreign_nodes(module.engine.graph)
    assert {str(target) for target in module.engine.kernels.tactics[node.op]} == {"sm_89", "sm_90", "sm_120"}
    assert "the engine does not run on sm_86" in caplog.text


def lacking(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    scaled_sum[(1,)](x, x, out, BLOCK=16)
    return out


def test_a_wrong_signature_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match="scaled_sum lacks the argument n") as caught:
        torch_rtx.compile(Launches(lacking), (torch.randn(4, 4),), device="cuda", targets=["sm_80"])
    assert "foreign_kernels.py" in str(caught.value.loc)


def test_launches_whose_results_a_capture_would_lose() -> None:
    """PyTorch takes them for launches that write to nothing, and drops them."""
    for function, message in ((hidden, "of_a_pair gets a tensor inside of a tuple"), (elsewhere, "writes to none")):
        with pytest.raises(CaptureError, match=message) as caught:
            torch_rtx.compile(Launches(function), (torch.randn(4, 4),), device="cuda", targets=LATER)
        assert "foreign_kernels.py" in str(caught.value), "where the model calls it"


def test_options_of_a_launch() -> None:
    module = torch_rtx.compile(Launches(with_options), (torch.randn(2, 8),), device="cuda", targets=["sm_80"])
    (node,) = foreign_nodes(module.engine.graph)
    (config,) = kernel_of(node).configs
    assert (config.num_warps, dict(config.options)) == (2, {"maxnreg": 64, "enable_fp_fusion": False})


class Counting(torch.nn.Module):
    """Its kernel writes to its input, and to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(6, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        in_place(self.count)
        return in_place(x).sum() + self.count.sum()


def test_what_a_kernel_writes_to_may_be_an_input_or_a_buffer() -> None:
    module = torch_rtx.compile(Counting(), (torch.zeros(6, 40),), device="cuda", targets=LATER)
    x = torch.zeros(6, 40)
    for step in (1.0, 2.0, 3.0):
        torch.testing.assert_close(module(x), torch.tensor(2 * 240.0 * step))
        torch.testing.assert_close(x, torch.full_like(x, step))


def empty_grid(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    scaled_sum[(triton.cdiv(x[:0].numel(), 16),)](x, x, out, x.numel(), 1.0, BLOCK=16)
    return out


def test_an_empty_grid_launches_nothing_as_in_eager() -> None:
    module = torch_rtx.compile(Launches(empty_grid), (torch.randn(4, 4),), device="cuda", targets=LATER)
    assert not module(torch.randn(4, 4)).any()


def test_just_in_time_the_worker_gets_code_in_place_of_a_source() -> None:
    (node,) = foreign_nodes(built("autotune").engine.graph)
    assert node.body is not None
    request = _with_foreign({"region": (node.body, 1)}, 90, None)
    found = compile_worker.build(pickle.loads(pickle.dumps(request)), 90)["region"]
    assert (found.rank, found.tactic.kind) == (1, "foreign 1")
    assert found.tactic.kernels[OWN].aligned.num_warps == 4


def test_parameters_lie_as_the_kernel_expects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("triton_op", ["sm_90"], dynamic=True)
    (node,) = foreign_nodes(module.engine.graph)
    driver = FakeDriver((8, 8, 8, 4, 4, 8, 8))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    ((tactic, target),) = runnable_tactics(module.engine.kernels.tactics[node.op], 90, 1 << 20)
    launcher = load(Gpu(driver, 0), node, tactic, target, module.engine.kernels.binaries).kernels[OWN]
    launcher([16, 32, 48], [400], (7, 1, 1))
    (launched,) = driver.launched
    quarter = struct.unpack("i", struct.pack("f", 0.25))[0]
    assert launched.parameters == (16, 32, 48, 400, quarter, 0, 0)
    assert (launched.grid, launched.block) == ((7, 1, 1), (128, 1, 1))
    assert launcher.pointers == (0, 1, 2)
    launcher([16, 32, 48], [401], (7, 1, 1))
    assert driver.launched[1].parameters[3] == 401


def test_an_operator_with_a_kernel_for_the_cpu_is_called_there() -> None:
    @triton_op("rtxtests::on_both", mutates_args={})
    def on_both(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        wrap_triton(scaled_sum)[(1,)](x, x, out, x.numel(), 1.0, BLOCK=16)
        return out

    on_both.register_kernel("cpu")(lambda x: 3 * x)
    x = torch.randn(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(Launches(on_both), backend="rtx", fullgraph=True)(x), (6 * x).relu())


def test_the_engine_cache_knows_kernels_by_what_they_are_made_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(caplog)

    def build(alpha: float) -> torch_rtx.CompiledModule:
        model = Launches(lambda x, y: scaled_sum_op(x, y, alpha))
        options = {"targets": LATER, "engine_cache_dir": str(tmp_path)}
        return torch_rtx.compile(model, tuple(operands(2)), device="cuda", **options)

    build(0.5)
    assert traffic.counts == (0, 1)
    monkeypatch.setattr("torch_rtx.foreign._registry", {})  # as in another process, whose tables differ
    module, given = build(0.5), operands(2)
    assert traffic.counts == (1, 1)
    torch.testing.assert_close(module(*given), (2 * given[0] + given[1]).relu())
    build(0.25)
    assert traffic.counts == (1, 2), "another constant"
