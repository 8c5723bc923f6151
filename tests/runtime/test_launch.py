"""Launching without a GPU: which binary is chosen, and what the driver is given, byte by byte."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from tests.doubles.fake_driver import STREAM, FakeDriver, Kept, Status
from torch_rtx.binaries import Binaries, Pack, named
from torch_rtx.errors import InvalidIR, KernelError
from torch_rtx.ir import Graph, Sym
from torch_rtx.irparse import parse
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime import tuning_context
from torch_rtx.runtime.inline import inline_kernels, launched
from torch_rtx.runtime.launch import Gpu, Launcher, bound, is_for, load_tactics
from torch_rtx.tactics import (
    OWN,
    Candidate,
    KernelTable,
    Launch,
    Tactic,
    Variant,
    check,
    fastest_first,
    runnable_tactics,
)
from torch_rtx.targets import PTX, Target

S = Sym("s")
DEVICE = torch.device("cuda", 0)
GRAPH: Graph = parse("""\
graph fused {
  input x: f32[4]
  y: f32[4], z: f32[4] = kernel k(in0=x) graph import {
    input in0: f32[4]
    a: f32[4] = op aten.neg.default(self=in0)
    b: f32[4] = op aten.exp.default(self=in0)
    return [a, b]
  }
  return [y, z]
}
""")
BINARIES = dict(named(text) for text in (b"aligned 90", b"generic 90", b"80", b"86", b"ptx text"))
NAMES = dict(zip((b"aligned 90", b"generic 90", b"80", b"86", b"ptx text"), BINARIES, strict=True))


def variant(image: bytes, shared: int = 0, warps: int = 4) -> Variant:
    return Variant(NAMES[image], "entry", warps, shared, 32, 0)


def launch(image: bytes = b"aligned 90", generic: Variant | None = None, shared: int = 0) -> Launch:
    return Launch((S, S), (S, 2, 1), False, variant(image, shared), generic)


def table_of(launches: Mapping[Target, Launch], binaries: Mapping[str, bytes] = BINARIES) -> KernelTable:
    """One kernel, `k`."""
    tactics = {target: (Tactic("kernel", 1.0, {OWN: one}),) for target, one in launches.items()}
    return KernelTable({"k": tactics}, binaries)


SM90 = Target(90)
NATIVE = {SM90: launch(generic=variant(b"generic 90"))}
FROM_PTX = {PTX: launch(image=b"ptx text")}
SIZES = (8, 8, 8, 4, 4, 8, 8)  # three pointers, two scalars, two of scratch memory


@pytest.fixture(autouse=True)
def current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)


def made(
    driver: FakeDriver, launches: Mapping[Target, Launch], binaries: Mapping[str, bytes] = BINARIES
) -> Launcher | None:
    return launched(load_tactics(table_of(launches, binaries), GRAPH, DEVICE, driver=driver)).get("k")


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "expected"),
    [
        (75, []),
        (80, ["sm_80", "compute_80"]),
        (86, ["sm_86", "sm_80", "compute_80"]),
        (87, ["sm_86", "sm_80", "compute_80"]),
        (89, ["sm_86", "sm_80", "compute_80"]),
        (90, ["sm_90", "compute_90", "compute_80"]),
        (100, ["compute_90", "compute_80"]),  # code for sm_90 is for sm_90 alone
        (120, ["sm_120", "compute_90", "compute_80"]),
        (121, ["compute_90", "compute_80"]),
    ],
)
def test_runnable_tactics(sm: int, expected: list[str]) -> None:
    targets = [Target(80), Target(86), Target(90), Target(120), Target(90, ptx=True), PTX]
    tactics = table_of(dict.fromkeys(targets, launch())).tactics["k"]
    assert [str(target) for _, target in runnable_tactics(tactics, sm, 99 << 10)] == expected


def test_runnable_tactics_fit_the_device() -> None:
    tactics = table_of({Target(80): launch(shared=120 << 10), PTX: launch(shared=99 << 10)}).tactics["k"]
    assert [str(target) for _, target in runnable_tactics(tactics, 80, 163 << 10)] == ["sm_80", "compute_80"]
    assert [str(target) for _, target in runnable_tactics(tactics, 86, 99 << 10)] == ["compute_80"]


@pytest.mark.quick
def test_no_binary(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(SIZES, (7, 5))
    assert made(driver, NATIVE) is None
    assert "kernel k runs call by call: it has no binary for sm_75" in caplog.text
    assert driver.loaded == []


def test_a_binary_that_the_driver_refuses(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(SIZES, refused=(b"aligned 90",))
    found = made(driver, NATIVE | FROM_PTX)
    assert found is not None
    assert found.target == PTX
    assert driver.loaded == [b"compiled ptx text"]
    assert "binary of kernel k for sm_90 can't be loaded: CUDA driver: CUDA_ERROR_INVALID_PTX" in caplog.text
    driver = FakeDriver(SIZES, refused=(b"aligned 90",))
    assert made(driver, NATIVE) is None
    assert "kernel k runs call by call: none of its binaries can be loaded" in caplog.text


def test_what_the_driver_compiled_is_kept() -> None:
    """PTX is compiled once; the next process loads the binary."""
    kept, text = Kept(), table_of(FROM_PTX)
    first, second = FakeDriver(SIZES), FakeDriver(SIZES)
    for driver in (first, second):
        found = launched(load_tactics(text, GRAPH, DEVICE, driver=driver, open_store=lambda: kept))
        assert found["k"].target == PTX
        assert driver.loaded == [b"compiled ptx text"]
    assert (first.linked, second.linked) == (1, 0)
    assert kept == {("kernel", f"ptx {NAMES[b'ptx text']}"): b"compiled ptx text"}


def test_kernels_for_a_gpu_that_is_not_known_are_compiled_by_its_driver() -> None:
    driver, kept = FakeDriver(SIZES, (15, 0)), Kept()
    candidate = Candidate(Tactic("kernel", 1.0, {OWN: launch(image=b"ptx text")}), 0, BINARIES)
    found = tuning_context._load(Gpu(driver, 0), lambda: kept, GRAPH.nodes[0], candidate)  # type: ignore[arg-type, return-value]
    assert is_for(found, 150)
    assert not is_for(found, 120)
    assert driver.loaded == list(kept.values()) == [b"compiled ptx text"]


def test_nothing_is_compiled_where_nobody_waits() -> None:
    driver = FakeDriver(SIZES, (10, 0))
    table = table_of(NATIVE | FROM_PTX)
    assert load_tactics(table, GRAPH, DEVICE, driver=driver, jit=False) == {}
    assert driver.linked == 0
    native = load_tactics(table, GRAPH, DEVICE, driver=FakeDriver(SIZES), jit=False)
    assert is_for(native["k"], 90)
    assert not is_for(native["k"], 120)


@pytest.mark.quick
def test_for_given_sizes() -> None:
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    seven = launcher.bound({"s": 7})
    assert (seven.scalars, seven.grid, launcher.scalars) == ((7, 7), (7, 2, 1), (S, S))
    seven((16, 32, 48), seven.scalars, seven.grid)  # type: ignore[arg-type]
    assert driver.launched[0].grid == (7, 2, 1)


def test_two_variants_of_a_kernel_without_scalars() -> None:
    """No build makes them, but a file may have them: every call is an aligned one."""
    driver = FakeDriver(SIZES[:3] + SIZES[-2:])
    launcher = made(driver, {SM90: Launch((), (1, 1, 1), False, variant(b"aligned 90"), variant(b"generic 90"))})
    assert launcher is not None
    launcher((16, 32, 48), (), (1, 1, 1))
    assert driver.launched[0].image == b"aligned 90"


def test_a_damaged_binary(caplog: pytest.LogCaptureFixture) -> None:
    pack = Pack(b"no LZMA, but long enough to be some", tuple((name, 9) for name in BINARIES))
    assert made(FakeDriver(SIZES), NATIVE, binaries=Binaries([pack])) is None
    assert "can't be decompressed" in caplog.text


def test_a_block_that_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(SIZES)
    driver.max_threads = 64
    assert made(driver, NATIVE) is None
    assert "a block can't have 128 threads" in caplog.text


def test_where_nothing_is_launched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    table = table_of(NATIVE)
    assert load_tactics(table, GRAPH, torch.device("cpu"), driver=FakeDriver(SIZES)) == {}
    assert load_tactics(KernelTable(), GRAPH, DEVICE, driver=FakeDriver(SIZES)) == {}
    assert caplog.text == ""
    monkeypatch.setattr(driver_api, "driver", lambda: None)
    assert load_tactics(table, GRAPH, DEVICE) == {}
    assert "cuda-bindings is not installed" in caplog.text


def test_loaded_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(SIZES)
    with caplog.at_level(logging.INFO, "torch_rtx"):
        assert made(driver, NATIVE) is not made(driver, NATIVE)
    assert driver.loaded == [b"aligned 90", b"generic 90"]
    assert "tactics of 1 of 1 kernels on sm_90: 1 kernel" in caplog.text


def test_nobody_waits_for_what_the_driver_compiles() -> None:
    """Another thread loads a binary meanwhile."""
    driver, entered, leave = FakeDriver(SIZES), threading.Event(), threading.Event()
    complete = driver.cuLinkComplete

    def slow(state: list[object]) -> object:
        entered.set()
        assert leave.wait(30)
        return complete(state)

    driver.cuLinkComplete = slow  # type: ignore[method-assign,assignment]
    compiling = threading.Thread(target=lambda: made(driver, FROM_PTX))
    compiling.start()
    assert entered.wait(30)
    loading = threading.Thread(target=lambda: made(driver, NATIVE))
    loading.start()
    loading.join(10)
    waits = loading.is_alive()
    leave.set()
    compiling.join()
    loading.join()
    assert not waits
    assert driver.loaded == [b"aligned 90", b"generic 90", b"compiled ptx text"]


def test_large_shared_memory_is_asked_for() -> None:
    driver = FakeDriver(SIZES)
    assert made(driver, {SM90: launch(shared=48 << 10)}) is not None
    assert driver.opted_in == {}
    assert made(driver, {SM90: launch(shared=200 << 10)}) is not None
    assert driver.opted_in == {"entry": 200 << 10}


# ---- launching -------------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    driver = FakeDriver(SIZES)
    aligned = variant(b"aligned 90", 1234, warps=8)
    launcher = made(driver, {SM90: replace(NATIVE[SM90], aligned=aligned)})
    assert launcher is not None
    assert (launcher.scalars, launcher.grid) == ((S, S), (S, 2, 1))
    high = 2**64 - 16
    launcher((16, high, 32), (2**31 - 16, -32), (2**31 - 1, 65535, 65535))
    launcher((16, 32, 48), (16, 33), (1, 2, 3))
    first, second = driver.launched
    assert first.parameters == (16, high, 32, 2**31 - 16, -32, 0, 0)
    assert second.parameters == (16, 32, 48, 16, 33, 0, 0)
    assert (first.image, first.block, first.shared) == (b"aligned 90", (256, 1, 1), 1234)
    assert (second.image, second.block, second.shared) == (b"generic 90", (128, 1, 1), 0)
    assert (first.grid, second.grid) == ((2**31 - 1, 65535, 65535), (1, 2, 3))
    assert first.stream == second.stream == STREAM


@pytest.mark.parametrize(
    ("scalars", "wide", "sizes"),
    [((), False, ()), ((5,), False, (4,)), ((5, 6, 7), False, (4, 4, 4)), ((2**40, -1), True, (8, 8))],
)
def test_layouts(scalars: Sequence[int], wide: bool, sizes: tuple[int, ...]) -> None:
    driver = FakeDriver((8, 8, *sizes, 8, 8))
    launches = {SM90: replace(launch(), scalars=(S,) * len(scalars), wide=wide)}
    graph = parse(
        str(GRAPH).replace(", z: f32[4] =", " =").replace("return [a, b]", "return [a]").replace("[y, z]", "[y]")
    )
    launcher = launched(load_tactics(table_of(launches), graph, DEVICE, driver=driver))["k"]
    launcher((16, 32), scalars, (1, 1, 1))
    unsigned = tuple(value % 2**64 if wide else value for value in scalars)
    assert driver.launched[0].parameters == (16, 32, *unsigned, 0, 0)


def test_without_a_generic_variant_any_scalar_is_fine() -> None:
    driver = FakeDriver(SIZES)
    launcher = made(driver, {SM90: launch()})
    assert launcher is not None
    launcher((16, 16, 16), (1, 3), (1, 1, 1))
    assert driver.launched[0].image == b"aligned 90"


@pytest.mark.parametrize("grid", [(0, 1, 1), (4, 0, 1), (4, 1, 0), (0, 65536, 1)])
def test_empty_grids(grid: tuple[int, int, int]) -> None:
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    launcher((16, 16, 16), (0, 0), grid)
    assert driver.launched == []


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (-1, 1, 1), (-1, -1, 1)])
def test_grids_that_are_too_large(grid: tuple[int, int, int]) -> None:
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    with pytest.raises(KernelError, match=f"kernel k can't be launched with {grid[0]} x {grid[1]} x"):
        launcher((16, 16, 16), (1, 1), grid)
    assert driver.launched == []


def test_scalars_that_are_too_large() -> None:
    launcher = made(FakeDriver(SIZES), NATIVE)
    assert launcher is not None
    with pytest.raises(KernelError, match=r"kernel k can't be launched with the sizes \[2147483648, 1\]"):
        launcher((16, 16, 16), (2**31, 1), (1, 1, 1))


def test_launches_that_fail() -> None:
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    driver.status = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError, match="launching kernel k for sm_90 failed: CUDA_ERROR_INVALID_VALUE"):
        launcher((16, 16, 16), (1, 1), (1, 1, 1))


def test_threads_have_parameters_of_their_own() -> None:
    """The driver reads the parameters while another thread writes its own: it must not see those."""
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    read, meet = driver.cuLaunchKernel, threading.Barrier(2, timeout=30)

    def together(*args: int) -> tuple[Status]:
        meet.wait()  # both threads have written by now
        return read(*args)  # type: ignore[arg-type]

    launcher._launch = together

    def work(number: int) -> None:
        for step in range(50):
            launcher((16 * number,) * 3, (number, step), (1, 1, 1))

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {(16 * n, 16 * n, 16 * n, n, step, 0, 0) for n in (1, 2) for step in range(50)}
    assert len(driver.launched) == 100
    assert {found.parameters for found in driver.launched} == expected


def test_making_a_launcher_changes_no_current_device() -> None:
    """In a thread that has made no call of CUDA yet, a context would decide which device is the current one."""
    driver = FakeDriver(SIZES)
    launcher = made(driver, NATIVE)
    assert launcher is not None
    assert driver.cuCtxGetCurrent()[1] == 0
    launcher((16, 16, 16), (1, 1), (1, 1, 1))
    assert driver.cuCtxGetCurrent()[1] == 1100


# ---- tactics ---------------------------------------------------------------------------------------------------------

NESTED = parse("""graph fused {
  input x: f32[4]
  y: f32[4] = kernel anchored(in0=x) graph import {
    input in0: f32[4]
    a: f32[4] = op aten.exp.default(self=in0)
    b: f32[4] = kernel loop(in0=a) graph import {
      input in0: f32[4]
      a: f32[4] = op aten.neg.default(self=in0)
      return [a]
    }
    return [b]
  }
  return [y]
}
""")


SPLIT = parse("""graph import {
  input in0: f32[4]
  t: f32[4] = kernel parts(in0=in0) graph import {
    input in0: f32[4]
    a: f32[4] = op aten.exp.default(self=in0)
    return [a]
  }
  b: f32[4] = kernel sum(in0=t) graph import {
    input in0: f32[4]
    a: f32[4] = kernel loop(in0=in0) graph import {
      input in0: f32[4]
      a: f32[4] = op aten.neg.default(self=in0)
      return [a]
    }
    return [a]
  }
  return [b]
}
""")


# Expected times, in microseconds, by kind: in the order of each, and one of a loop, which has no library call.
ORDERS = {
    "slower": {"split": 1.0, "kernel": 2.0, "library": 3.0},
    "faster": {"library": 1.0, "split": 2.0, "kernel": 3.0},
    "loop": {"split": 1.0, "kernel": 2.0},
    "whole": {"kernel": 1.0, "library": 2.0},
}


def table(order: str, image: bytes = b"aligned 90", target: Target = SM90) -> KernelTable:
    """Tactics of the kernels of NESTED, the outer one in this order; `image` is that of its split body's second
    kernel."""
    plain = replace(launch(), scalars=(), grid=(1, 1, 1))
    own = Tactic("kernel", 0.0, {OWN: plain})
    forms = {
        "kernel": own,
        "library": Tactic("library", 0.0),
        "split": Tactic("split", 0.0, {"parts": plain, "sum": replace(plain, aligned=variant(image))}, SPLIT),
    }
    outer = fastest_first(replace(forms[kind], expected_us=us) for kind, us in ORDERS[order].items())
    return KernelTable({"anchored": {target: outer}, "loop": {target: (own,)}}, BINARIES)


WHOLE, PARTS, CALL = ["anchored"], ["parts", "sum"], ["aten.exp.default", "loop"]


@pytest.mark.parametrize(
    ("wanted", "order", "expected"),
    [
        ("best", "slower", PARTS),
        ("best", "loop", PARTS),
        ("best", "faster", CALL),
        ("best", "whole", WHOLE),
        ("split", "faster", PARTS),
        ("split", "whole", WHOLE),  # there is no split body
        ("kernel", "slower", WHOLE),
        ("kernel,split", "slower", WHOLE),
        ("split,kernel", "faster", PARTS),
        ("library", "slower", CALL),
        ("library", "whole", CALL),
        ("library", "loop", PARTS),
        ("calls", "slower", ["aten.exp.default", "aten.neg.default"]),
    ],
)
def test_tactics(wanted: str, order: str, expected: list[str]) -> None:
    check(table(order), NESTED)
    found = load_tactics(table(order), NESTED, DEVICE, wanted, FakeDriver((8, 8, 8, 8)))
    assert [node.op for node in inline_kernels(NESTED, found).nodes] == expected
    assert {op for op in expected if not op.startswith("aten.")} <= launched(found).keys()


def test_a_kind_that_there_is_not(caplog: pytest.LogCaptureFixture) -> None:
    found = load_tactics(table("whole"), NESTED, DEVICE, "generated", FakeDriver((8, 8, 8, 8)))
    assert found["anchored"].kind == "kernel"
    assert "tactics='generated': no kernel has such a tactic; there are kernel, library" in caplog.text


def test_kinds_of_an_engine_without_kernels(caplog: pytest.LogCaptureFixture) -> None:
    """`targets="later"`: a session that tunes nothing has no kernels at all."""
    driver = FakeDriver((8, 8, 8, 8))
    without = replace(NESTED, nodes=(), outputs=())
    for wanted, graph in (("best", NESTED), ("calls", NESTED), ("split", without)):
        assert load_tactics(KernelTable(), graph, DEVICE, wanted, driver) == {}
    assert caplog.text == ""
    assert load_tactics(KernelTable(), NESTED, DEVICE, "split,kernel", driver) == {}
    assert "tactics='split,kernel': the engine contains no kernels and runs call by call: build it" in caplog.text


def test_where_no_tactic_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver((8, 8, 8, 8))
    assert load_tactics(table("slower"), NESTED, torch.device("cpu"), "split", driver) == {}
    other = FakeDriver((8, 8, 8, 8), (8, 0))  # the table has nothing for it
    assert load_tactics(table("slower"), NESTED, DEVICE, "split", other) == {}
    monkeypatch.setattr(driver_api, "driver", lambda: None)
    assert load_tactics(table("slower"), NESTED, DEVICE, "split") == {}


def test_a_split_body_of_which_a_kernel_is_refused() -> None:
    """The next tactic runs then: the node's own kernel."""
    driver = FakeDriver((8, 8, 8, 8), refused=(b"generic 90",))
    found = load_tactics(table("slower", b"generic 90"), NESTED, DEVICE, driver=driver)
    assert found["anchored"].kind == "kernel"


def test_split_bodies_for_given_sizes() -> None:
    found = load_tactics(table("slower"), NESTED, DEVICE, driver=FakeDriver((8, 8, 8, 8)))["anchored"]
    assert is_for(found, 90)
    assert not is_for(found, 120)
    seven = bound(found, {"s": 7})
    assert (seven.body, seven.kernels.keys()) == (SPLIT, {"parts", "sum"})


@pytest.mark.parametrize(("order", "kind"), [("slower", "split"), ("whole", "kernel"), ("faster", "library")])
def test_what_the_driver_would_compile(order: str, kind: str) -> None:
    """Until it has, kernels run call by call; a tactic that is a call needs nobody to wait."""
    text, driver = table(order, target=PTX), FakeDriver((8, 8, 8, 8))
    assert load_tactics(text, NESTED, DEVICE, driver=driver)["anchored"].kind == kind
    at_once = load_tactics(text, NESTED, DEVICE, driver=driver, jit=False)
    assert at_once.keys() == ({"anchored"} if kind == "library" else set())


def test_tactics_that_do_not_fit_their_node() -> None:
    kept = table("slower").tactics
    wrong = {
        "launches other": Tactic("split", 1.0, {"other": launch()}, SPLIT),
        "launches self": Tactic("split", 1.0, {OWN: launch()}, SPLIT),
        "takes or returns other types": Tactic("split", 1.0, {}, parse(str(SPLIT).replace("f32[4]", "f32[5]"))),
    }
    for message, tactic in wrong.items():
        with pytest.raises(InvalidIR, match=message):
            check(KernelTable({**kept, "anchored": {SM90: (tactic,)}}), NESTED)
    with pytest.raises(InvalidIR, match="a target without tactics"):
        check(KernelTable({**kept, "loop": {SM90: ()}}), NESTED)
    with pytest.raises(InvalidIR, match="the graph has no kernel parts"):
        check(KernelTable({**kept, "parts": kept["loop"]}), NESTED)
