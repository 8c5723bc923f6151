"""Building the kernels of a graph: the best configuration that fits each target, and the account of it."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

from tests.helpers.kernels import ADD, ADD_1000, GRAPH, S16, matmul
from torch_rtx.backend import compiler
from torch_rtx.backend.kernels import build_kernels, targets_for
from torch_rtx.binaries import packs_of
from torch_rtx.chips import chip_named
from torch_rtx.engine import Engine, Manifest, load, save
from torch_rtx.errors import KernelError, LoweringError, SettingsError
from torch_rtx.inspection import inspect
from torch_rtx.ir import Graph, Node
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels import aot, build
from torch_rtx.lowering.kernels.aot import Built, Code
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.toolchain import Job
from torch_rtx.tactics import OWN, KernelTable, Launch, Tactic, groups_of
from torch_rtx.targets import DTYPE_FEATURES, PORTABLE, PTX, Target

GPU = torch.device("cuda")
BOTH = replace(ADD_1000, name="both", source=ADD_1000.source.replace("add_1000", "both"))
SMALL, LARGE = matmul(64, 2, deep=32, size=S16), matmul(128, 5, size=S16)


def one(op: str) -> Graph:
    """A graph of one kernel."""
    node = next(node for node in GRAPH.nodes if node.op == "both")
    return replace(GRAPH, nodes=(replace(node, op=op, args=(("in0", GRAPH.inputs[0]),)),), outputs=node.outputs)


def form(us: float, *configs: Kernel):
    """The node's own kernel in these configurations, and what it is expected to take."""
    head, *rest = (Tactic("kernel", us, {OWN: config}) for config in configs)
    return head, iter(rest)


def from_list(*configs: Kernel):
    return lambda node, target: [form(1.0, *configs)] if configs else []


def own(table: KernelTable, op: str) -> dict[Target, Launch]:
    """The launches of the nodes' own kernels."""
    found = {target: [t for t in tactics if OWN in t.kernels] for target, tactics in table.tactics[op].items()}
    return {target: tactics[0].kernels[OWN] for target, tactics in found.items() if tactics}


def test_every_node_and_target(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def forms(node: Node, target: Target):
        asked.append((node.op, str(target)))
        return [form(1.0, {"add": ADD, "both": BOTH}[node.op])]

    progress: list[tuple[int, int]] = []
    table, report = build_kernels(GRAPH, PORTABLE, forms, progress=lambda *step: progress.append(step))
    assert sorted(asked) == sorted((op, str(target)) for op in ("add", "both") for target in PORTABLE)
    assert progress[-1] == (9, 9)  # three binaries, of add for two cases: PTX is that of sm_80
    generation = (Target(80), Target(86), Target(89))
    for op, variants in (("add", 2), ("both", 1)):
        launches = own(table, op)
        assert tuple(launches) == PORTABLE
        assert len({launches[target] for target in generation}) == 1
        assert len(set(launches.values())) == 4
        assert {len(launch.variants) for launch in launches.values()} == {variants}
        assert launches[Target(80)].scalars == ((ADD.scalars) if op == "add" else ())
        assert table.binaries[launches[Target(80)].aligned.binary][:4] == b"\x7fELF"
        assert table.binaries[launches[PTX].aligned.binary].lstrip().startswith(b"//")
    assert len(table.binaries) == 12
    assert report.missing == ()
    assert report.nbytes == sum(map(len, table.binaries.values())) == sum(kernel.nbytes for kernel in report.kernels)
    lines = str(report).splitlines()
    assert lines[0].startswith("2 kernels, ")
    assert lines[2].split()[:5] == ["add", "4", str(report.kernels[0].registers), "0", "0"]
    assert lines[2].endswith("sm_80, sm_86, sm_89")
    again, _ = build_kernels(GRAPH, PORTABLE, forms)
    assert again == table
    save(Engine(GRAPH, Manifest("cuda", ("x", "y")), {}, None, table), tmp_path / "a.rtx")
    assert load(tmp_path / "a.rtx").kernels == table
    assert inspect(tmp_path / "a.rtx").kernels["sm_86"][0] == 2


def test_kernels_compile_while_the_next_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is compiled once: for the oldest target of a generation, which comes first."""
    jobs: list[tuple[str, tuple[bool, ...], int]] = []
    began = threading.Event()

    def lower(job: Job) -> Code:
        jobs.append((job.name, job.scalars, job.sm))
        began.set()
        return Code(b"ptx", b"cubin", job.name, 4, 0, 255, 0, 0)

    def forms(node: Node, target: Target):
        assert (node.op, target) == ("add", Target(80)) or began.wait(30)
        return [form(1.0, {"add": ADD, "both": BOTH}[node.op])]

    monkeypatch.setattr(aot, "lower", lower)
    build_kernels(GRAPH, reversed(PORTABLE), forms)
    kernels = [("add", (True,)), ("add", (False,)), ("both", ())]
    assert sorted(jobs) == sorted((*kernel, sm) for kernel in kernels for sm in (80, 90, 120))


def test_an_error_leaves_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of code that looks for kernels, as Ctrl-C does, while one compiles and others wait."""
    began, jobs = threading.Event(), list[Job]()

    def lower(job: Job) -> Code:
        jobs.append(job)
        began.set()
        time.sleep(0.05)
        raise KernelError("refused")

    def forms(node: Node, target: Target):
        if node.op == "both":
            assert began.wait(30)
            raise KeyboardInterrupt
        return [form(1.0, ADD)]

    monkeypatch.setattr(aot, "lower", lower)
    monkeypatch.setattr(aot, "cores", lambda: range(1))
    with pytest.raises(KeyboardInterrupt):
        build_kernels(GRAPH, PORTABLE, forms)
    assert len(jobs) < 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torch_rtx build")]


@pytest.mark.quick
def test_the_first_configuration_that_fits() -> None:
    table, report = build_kernels(one("k"), [Target(86), Target(80)], from_list(LARGE, SMALL))
    launches = own(table, "k")
    assert tuple(launches) == (Target(80), Target(86))
    first, second = launches.values()
    assert first.aligned.shared == 131072
    assert second.aligned.shared < 64 << 10
    assert (first.grid, second.grid) == (LARGE.grid, SMALL.grid)
    binaries = list(table.binaries.values())
    packs = packs_of(groups_of(table), table.binaries)
    assert sum(len(pack.stored) for pack in packs) < 0.85 * sum(len(zlib.compress(binary, 9)) for binary in binaries)
    assert report.missing == ()


def test_none_fits() -> None:
    table, report = build_kernels(one("k"), [Target(80), Target(86)], from_list(LARGE))
    assert list(table.tactics["k"]) == [Target(80)]
    reason = "a block needs 131072 bytes of shared memory, sm_86 has 101376"
    assert report.missing == (("k", Target(86), reason),)
    assert str(report).splitlines()[-1] == f"  k runs call by call on sm_86: {reason}"
    table, report = build_kernels(one("k"), [Target(86)], from_list())
    assert not table
    assert (
        str(report)
        == f"0 kernels, 0.0 KiB of binaries, {report.seconds:.1f} s\n  k runs call by call on sm_86: no code"
    )


@pytest.mark.parametrize(("spills", "taken"), [((500, 300, 400), 300), ((500, 0, 0), 0), ((300,), 300)])
def test_spilling_is_the_last_resort(monkeypatch: pytest.MonkeyPatch, spills: tuple[int, ...], taken: int) -> None:
    """The least of what spills, unless a later configuration does not."""

    def compile_kernels(wanted: Iterable[tuple[Kernel, Target]], **_: object) -> dict[tuple[Kernel, Target], Built]:
        found = {}
        for kernel, target in wanted:
            code = Code(b"ptx", b"cubin", "k", 4, 0, 255, kernel.num_stages, 0)
            found[kernel, target] = Built(code, None, f"spills {kernel.num_stages}" if kernel.num_stages else None)
        return found

    monkeypatch.setattr(build, "compile_kernels", compile_kernels)
    configs = [replace(BOTH, num_stages=count) for count in spills]
    library = Tactic[Kernel]("library", 2.0)
    for others in ([], [(library, iter(()))]):
        table, report = build_kernels(one("k"), [Target(80)], lambda *_, more=others: [form(1.0, *configs), *more])
    assert own(table, "k")[Target(80)].aligned.spills == taken
    assert [kernel.spills for kernel in report.kernels] == [taken]
    assert report.missing == ()


DIVIDED = parse("""graph import {
  dim s = 1, 1048576, 1
  input in0: f32[s]
  t: f32[s], u: f32[s] = kernel inner(in0=in0) graph import {
    dim s = 1, 1048576, 1
    input in0: f32[s]
    a: f32[s] = op aten.exp.default(self=in0)
    b: f32[s] = op aten.neg.default(self=in0)
    return [a, b]
  }
  return [t, u]
}
""")


def test_what_may_be_the_fastest() -> None:
    """The node's own kernel, what is expected to be faster where all of its kernels fit, and what has no kernels."""
    inner = replace(LARGE, name="matmul")

    def forms(node: Node, target: Target):
        assert node.op == "k"
        split_us = 9.0 if target == Target(120) else 1.0
        split = Tactic("split", split_us, {"inner": inner}, DIVIDED)
        return [form(2.0, SMALL), (Tactic[Kernel]("library", 3.0), iter(())), (split, iter(()))]

    targets = (Target(80), Target(86), Target(90), Target(120))
    table, report = build_kernels(one("k"), targets, forms)
    kinds = {target: [tactic.kind for tactic in tactics] for target, tactics in table.tactics["k"].items()}
    assert kinds == {  # LARGE does not fit sm_86
        Target(80): ["split", "kernel", "library"],
        Target(86): ["kernel", "library"],
        Target(90): ["split", "kernel", "library"],
        Target(120): ["kernel", "library"],
    }
    assert {tactic.body for tactic in table.tactics["k"][Target(80)]} == {DIVIDED, None}
    assert report.missing == ()
    assert sorted(kernel.op for kernel in report.kernels) == ["inner"] * 2 + ["k"] * 3


def test_a_body_must_fit_its_kernel() -> None:
    other = Tactic("split", 1.0, {"inner": SMALL}, parse(str(DIVIDED).replace("return [t, u]", "return [t]")))
    with pytest.raises(LoweringError, match="takes or returns other types than k"):
        build_kernels(one("k"), [Target(80)], lambda *_: [form(2.0, SMALL), (other, iter(()))])


def test_names_must_be_apart() -> None:
    text = str(GRAPH).replace("aten.add.Tensor(self=in0, other=in1)", "aten.sub.Tensor(self=in0, other=in1)", 1)
    with pytest.raises(LoweringError, match="two different kernels are called add"):
        build_kernels(parse(text), [Target(80)], from_list(ADD))


def test_targets_of_a_graph(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, "torch_rtx"):
        assert targets_for("portable", GRAPH, GPU) == PORTABLE
    assert caplog.text.count('targets=["portable", "sm_75"] adds them') == 1
    half = parse(str(GRAPH).replace("a: f32[s] = op aten.exp", "a: f8e4m3fn[s] = op aten.exp"))
    assert targets_for("portable", half, GPU) == PORTABLE
    monkeypatch.setitem(DTYPE_FEATURES, "bf16", "fp4")
    half = parse(str(GRAPH).replace("a: f32[s] = op aten.exp", "a: bf16[s] = op aten.exp"))
    assert [str(target) for target in targets_for("portable", half, GPU)] == ["sm_120"]
    assert "no kernels for sm_80, which lacks a dtype" in caplog.text
    with pytest.raises(SettingsError, match=r"aten.exp.default computes in bf16, which sm_86 lacks"):
        targets_for(["sm_86", 90], half, GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 6), (8, 9)][index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiler, "chip_here", lambda index: chip_named(["RTX 3060", "RTX 4060"][index]))
    expected = {"cuda": (86, "RTX 3060"), "cuda:0": (86, "RTX 3060"), "cuda:1": (89, "RTX 4060")}
    for device, (sm, chip) in expected.items():  # that of the model, not the current one
        (target,) = targets_for("current", GRAPH, torch.device(device))
        assert (target, target.chip) == (Target(sm), chip_named(chip))
    assert targets_for("sm_89", GRAPH, GPU)[0].chip is None


def test_misfits_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "torch_rtx"):
        build_kernels(one("k"), [Target(86)], from_list(LARGE, BOTH))
    assert "matmul does not fit sm_86: a block needs 131072 bytes" in caplog.text
