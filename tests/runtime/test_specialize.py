"""The tiers: a session starts with calls, and is launching checked and measured kernels soon after, on an emulated
device."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import torch_rtx
from tests.doubles.emulated import Device, Emulated
from tests.doubles.fake_driver import Kept
from torch_rtx.backend import capture, compiler, program_cache
from torch_rtx.errors import KernelError, SettingsError
from torch_rtx.ir import kernel_nodes
from torch_rtx.irparse import parse
from torch_rtx.runtime import admission, candidate_check, specialize, streaming
from torch_rtx.runtime import background as backgrounds
from torch_rtx.runtime import driver as driver_api
from torch_rtx.runtime import tuner as tuners
from torch_rtx.runtime.admission import PATIENCE
from torch_rtx.runtime.background import BACKGROUND, Background, Progress, Work
from torch_rtx.runtime.candidate_check import CandidateCheck, relative_error
from torch_rtx.runtime.inline import inline_kernels, launched
from torch_rtx.runtime.session import Session
from torch_rtx.runtime.tuning_db import KERNEL, TACTIC, name_of
from torch_rtx.runtime.variant import PORTABLE, REFERENCE, SPECIALIZED, Region
from torch_rtx.settings import CompilationSettings, RuntimeSettings
from torch_rtx.tactics import KernelTable

LAZY = RuntimeSettings(specialization_strategy="lazy")
X = torch.randn(4, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.down(self.norm(nn.functional.gelu(self.up(x))))) + x


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.stop()


@cache  # a capture takes as long as what most tests are about
def compiled(make: Callable[[], nn.Module], dynamic: bool, shape: torch.Size) -> torch_rtx.CompiledModule:
    """The engine of a model, as GPUs have it, without kernels."""
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    compilation = CompilationSettings(device="cuda", targets="sm_80", reuse_cached_engines=False)
    with patch.object(program_cache, "kernels_of", lambda *_: KernelTable()):
        return torch_rtx.compile(make().eval(), (torch.randn(shape),), dynamic_shapes=shapes, settings=compilation)


def session(
    device: Device,
    background: Background,
    settings: RuntimeSettings = LAZY,
    dynamic: bool = False,
    store: Any = None,
    make: Callable[[], nn.Module] = Net,
    x: torch.Tensor = X,
) -> tuple[Session, nn.Module]:
    """A session on the emulated device, of a graph as GPUs have it."""
    model, once = make().eval(), compiled(make, dynamic, x.shape)
    graph, context, of = once.engine.graph, device.context(background, store), once.session
    module = torch_rtx.CompiledModule(once.engine, once.device, None, of._callables, of._trusted_ops)
    module.attach(model)
    return Session(graph, module._store, settings, of._callables, of._trusted_ops, context=context), model


def held_back() -> tuple[Device, threading.Event, threading.Event]:
    """A device, what is set when it has begun to build, and what lets it go on."""
    device, entered, leave = Device(), threading.Event(), threading.Event()
    build = device.build

    def slow(*args: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return build(*args)

    device.build = slow  # type: ignore[method-assign]
    return device, entered, leave


def right(made: Session, model: nn.Module, x: torch.Tensor = X) -> None:
    (got,) = made([x])
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.quick
def test_from_calls_to_kernels(background: Background) -> None:
    device = Device()
    made, model = session(device, background)
    base = made.specializer.base
    assert (base.tier, base.ready, device.builds) == (REFERENCE, False, [])
    calls = base.code
    right(made, model)
    assert made.specializer.wait(60)
    assert (base.tier, base.ready) == (SPECIALIZED, True)
    assert base.code is not calls
    ops = {node.op for node in base.code.graph.nodes}
    assert ops <= launched(base.code.tactics).keys()  # there are some inside of others, too
    kernels = {op: kernel for op, kernel in launched(base.code.tactics).items() if isinstance(kernel, Emulated)}
    before = {op: kernel.launches for op, kernel in kernels.items()}
    right(made, model)
    assert {op for op, kernel in kernels.items() if kernel.launches > before[op]} == ops


class Summed(nn.Module):
    """A softmax of rows, and below it the sums of its columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.softmax(-1)
        return torch.cat([rows, rows.sum(0, keepdim=True)])


def test_a_region_that_no_kernel_computes_alone(background: Background) -> None:
    """Sums over all rows beside a loop over rows: from calls to two kernels, by measurement those or others."""
    x = torch.randn(256, 24)
    made, model = session(Device(), background, make=Summed, x=x)
    right(made, model, x)
    assert made.specializer.wait(60)
    right(made, model, x)
    base = made.specializer.base
    assert base.tier == SPECIALIZED
    (region,) = (region for region in base.regions if "sum" in region.node.op)
    assert region.problems == []
    assert region.choice is not None
    assert {name.partition(" ")[0] for name in region.choice.microseconds} == {"split", "separate"}


def test_no_call_waits(background: Background) -> None:
    """Calls run as before while kernels are being compiled."""
    device, entered, leave = held_back()
    made, model = session(device, background)
    for _ in range(3):
        right(made, model)
    assert entered.wait(60)
    right(made, model)
    assert made.specializer.base.tier == REFERENCE
    assert not made.specializer.wait(0.01)
    leave.set()
    assert made.specializer.wait(60)
    right(made, model)
    assert made.specializer.base.tier == SPECIALIZED


def test_eager_waits(background: Background) -> None:
    made, model = session(Device(), background, RuntimeSettings(specialization_strategy="eager"))
    right(made, model)
    assert made.specializer.base.tier == SPECIALIZED


def test_none_stays(background: Background) -> None:
    device = Device()
    made, model = session(device, background, RuntimeSettings(specialization_strategy="none"))
    for _ in range(3):
        right(made, model)
    assert made.specializer.wait(0)
    assert (made.specializer.base.tier, device.builds) == (REFERENCE, [])


def test_wrong_kernels_are_not_used(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    device = Device(wrong="layer_norm")
    made, model = session(device, background)
    right(made, model)
    assert made.specializer.wait(60)
    right(made, model)
    (bad,) = (region for region in made.specializer.base.regions if region.problems)
    assert "layer_norm" in str(bad.body)
    assert not set(bad.ops) & launched(made.specializer.base.code.tactics).keys()
    assert launched(made.specializer.base.code.tactics)
    named = re.escape(
        f"a tactic is not used: kernel 0 of {bad.node.op} (4 warps, 0 bytes of shared memory) computes wrong "
    )
    assert re.search(named + "results: output 0 has a relative error of", caplog.text)


@pytest.mark.parametrize("batch", [5, 32])
def test_kernels_for_any_size_are_checked_in_both_their_forms(background: Background, batch: int) -> None:
    """One is for sizes that are multiples of 16, and it is not the one that the sizes of this call need, or it is."""
    for aligned in (True, False):
        device = Device(wrong="linear", wrong_for=lambda s, aligned=aligned: all(n % 16 == 0 for n in s) == aligned)
        made, model = session(device, background, dynamic=True)
        right(made, model, torch.randn(batch, 16))
        assert made.specializer.wait(60)
        base = made.specializer.base
        assert {bool(region.problems) for region in base.regions if "linear" in str(region.body)} == {True}
        assert not any("linear" in op for op in launched(base.code.tactics))
        right(made, model, torch.randn(batch, 16))


def test_what_cannot_be_compiled(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels can't be compiled here: calls go on, and it is said once."""
    for _ in range(2):
        made, model = session(Device(broken="no compiler on this machine"), background)
        right(made, model)
        assert made.specializer.wait(60)
        right(made, model)
        assert (made.specializer.base.tier, made.specializer.base.ready) == (REFERENCE, True)
    assert caplog.text.count("no compiler on this machine; only kernels that come with the engine are used") == 1


class Product(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.mm(x, x.t()) + 1)


def test_products_that_write_to_a_place(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    """In float64, what kernels are checked against takes places of its own width."""
    made, model = session(Device(), background, make=Product)
    right(made, model)
    assert made.specializer.wait(60)
    assert launched(made.specializer.base.code.tactics)
    assert "can't be tried" not in caplog.text
    right(made, model)


class Chosen(nn.Module):
    """Computes with as many rows as the data says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x[torch.nonzero(x[:, 0] > 0)[:, 0]] * 2 + 1) + x.exp().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_that_depend_on_data(background: Background, caplog: pytest.LogCaptureFixture, dynamic: bool) -> None:
    """A kernel for any size is checked with a typical one, and not measured: no size recurs."""
    made, model = session(Device(), background, dynamic=dynamic, make=Chosen)
    for _ in range(3):
        right(made, model)
        assert made.specializer.wait(60)
    assert caplog.text.count("specialization failed") == 0
    variant = made.current([X])
    assert variant.tier == SPECIALIZED
    assert {node.op for node in variant.code.graph.nodes if node.kind == "kernel"} <= launched(
        variant.code.tactics
    ).keys()
    assert not any(region.choice for region in variant.regions if region.body.syms)
    right(made, model, torch.randn(4, 16))


def test_a_bug_in_the_background(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    device.load = lambda *_: 1 // 0  # type: ignore[assignment,return-value,method-assign]
    made, model = session(device, background)
    right(made, model)
    assert made.specializer.wait(60)
    right(made, model)
    assert "specialization failed" in caplog.text
    assert made.specializer.base.tier == REFERENCE


# ---- measuring -------------------------------------------------------------------------------------------------------


LIBRARY, ENGINE = "library", "engine"


def kind(region: Region) -> str | None:
    """What was measured fastest: the kind of a candidate, or "engine"."""
    return region.choice and region.choice.name.split(" ")[0]


def tactics(made: Session) -> dict[str, str | None]:
    return {region.node.op: kind(region) for region in made.specializer.base.regions if region.choice}


def measured_library(region: Region) -> float | None:
    """Microseconds of the library tactic, if it was measured."""
    times = {} if region.choice is None else region.choice.microseconds
    return next((us for name, us in times.items() if name.startswith(LIBRARY)), None)


def test_the_fastest_stays(background: Background) -> None:
    """Where calls are faster they stay; what was measured is there to read."""
    made, model = session(Device(calls=0.5), background)
    right(made, model)
    assert made.specializer.wait(60)
    found = tactics(made)
    anchored = {op for op, kind in found.items() if kind == LIBRARY}
    assert len(anchored) == 2
    assert set(found) - anchored == launched(made.specializer.base.code.tactics).keys()
    region = next(region for region in made.specializer.base.regions if region.node.op in anchored)
    assert region.choice is not None
    assert measured_library(region) == 0.5
    assert len(region.choice.microseconds) > 2
    right(made, model)


CAPTURE = RuntimeSettings().cuda_graph_strategy


@pytest.mark.parametrize(
    ("calls", "pdl", "graphs", "kept"),
    [
        (0.9, False, CAPTURE, True),
        (0.9, True, CAPTURE, False),
        (0.9, True, "disabled", True),
        (0.5, True, CAPTURE, True),
    ],
)
def test_early_starts_count(background: Background, calls: float, pdl: bool, graphs: str, kept: bool) -> None:
    """Kernels take 1 us alone, and less in a graph where they start early: as do those that follow a call."""
    settings = replace(LAZY, cuda_graph_strategy=graphs)
    made, model = session(Device(calls=calls, pdl=pdl), background, settings)
    right(made, model)
    assert made.specializer.wait(60)
    regions = made.specializer.base.regions
    anchored = [region for region in regions if measured_library(region) is not None]
    alone = [region for region in anchored if not list(kernel_nodes(region.body))]
    assert 0 < len(alone) < len(anchored)
    assert all(kind(region) == LIBRARY for region in anchored if region not in alone)
    assert all((kind(region) == LIBRARY) is kept for region in alone)
    right(made, model)


@pytest.mark.parametrize(("calls", "tried"), [(0.9, tuners.MEASURED_OF_A_KIND), (0.3, tuners.TRIED)])
def test_measuring_ends_where_a_library_is_much_faster(background: Background, calls: float, tried: int) -> None:
    """Kernels take 1 us; those that were tried by then are right all the same."""
    made, model = session(Device(calls=calls), background, replace(LAZY, cuda_graph_strategy="disabled"))
    right(made, model)
    assert made.specializer.wait(60)
    choices = [region.choice for region in made.specializer.base.regions if measured_library(region) is not None]
    counts = [sum(name.startswith("kernel") for name in one.microseconds) for one in choices if one is not None]
    assert max(counts) == tried
    right(made, model)


class Twice(nn.Module):
    """Returns a view of what its last layer computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)).view(-1)


@pytest.mark.parametrize(("graphs", "kept"), [(CAPTURE, False), ("disabled", True)])
def test_copies_of_results_count(background: Background, graphs: str, kept: bool) -> None:
    """Calls take half of a kernel's time, but in a graph their results are copied to where the caller gets them."""
    settings = replace(LAZY, cuda_graph_strategy=graphs)
    made, model = session(Device(calls=0.5), background, settings, make=Twice)
    right(made, model)
    assert made.specializer.wait(60)
    first, last = made.specializer.base.code.graph.nodes[:2]
    kinds = {region.node.op: kind(region) == LIBRARY for region in made.specializer.base.regions}
    assert kinds == {first.op: True, last.op: kept}
    right(made, model)


@pytest.mark.parametrize("settings", [LAZY, RuntimeSettings(specialization_strategy="eager")])
@pytest.mark.parametrize("dynamic", [False, True])
def test_measuring_that_changes_nothing(background: Background, settings: RuntimeSettings, dynamic: bool) -> None:
    """The code stays, and with it the CUDA graphs that were captured from it."""
    memory, first = Kept(), Device()
    made, model = session(first, background, settings, dynamic, store=memory)
    for _ in range(2):
        right(made, model)
    assert background.wait(60)
    again, model = session(Device(kernels=first.kernels), background, settings, dynamic, store=memory)
    swap, codes = tuners.Tuner.swap, []
    with patch.object(tuners.Tuner, "swap", lambda tuner: (swap(tuner), codes.append(tuner.variant.code))):
        for _ in range(2):
            right(again, model)
        assert background.wait(60)
    compiled, measured = codes[-2:]
    assert compiled.tactics
    assert measured is compiled


def test_no_memory_to_measure_in(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    """Regions whose inputs find no memory go on with calls, and the others get their kernels."""
    made, model = session(Device(), background)
    find = candidate_check.random_tensor

    def scarce(value: Any, *given: Any) -> torch.Tensor:
        if value.type.shape == (32, 16):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nin detail")
        return find(value, *given)

    with patch.object(candidate_check, "random_tensor", scarce):
        right(made, model)
        assert made.specializer.wait(60)
    base = made.specializer.base
    without = [region for region in base.regions if region.problems]
    assert without
    assert not {op for region in without for op in region.ops} & launched(base.code.tactics).keys()
    assert launched(base.code.tactics)
    assert "a tactic is not used: CUDA out of memory. Tried to allocate 2.00 GiB" in caplog.text
    assert "in detail" not in caplog.text
    right(made, model)


def test_what_a_job_has_compiled_is_no_kernel_of_the_engine(background: Background) -> None:
    made, model = session(Device(), background)
    right(made, model)
    assert made.specializer.wait(60)
    measured = [region.choice.microseconds for region in made.specializer.base.regions if region.choice]
    assert measured
    assert not any(name.startswith(ENGINE) for times in measured for name in times)


def test_each_check_has_inputs_of_its_own(background: Background) -> None:
    """A kernel that writes nothing may be given the memory of an earlier check: its results must be wrong ones now."""
    made, model = session(Device(), background)
    right(made, model)
    assert made.specializer.wait(60)
    node = next(iter(kernel_nodes(made.specializer.base.code.graph)))
    one, other = (CandidateCheck(node, torch.device("cpu")) for _ in range(2))
    assert relative_error(one.expected[0], other.expected[0]) > 0.1
    assert one.problem(one.code({})) is None


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("aten.softmax.int(self=x, dim=-1, dtype='f32')", "f32"),
        ("aten._softmax_backward_data.default(grad_output=y, output=y, dim=1, input_dtype='f16')", "f16"),
    ],
)
def test_a_check_of_calls_that_name_dtypes(call: str, result: str) -> None:
    """They name wide ones where the check computes in float64."""
    (node,) = parse(f"""graph fused {{
      input x: f16[4, 8]
      input y: f16[4, 8]
      r: {result}[4, 8] = kernel k(in0=x, in1=y) graph import {{
        input x: f16[4, 8]
        input y: f16[4, 8]
        r: {result}[4, 8] = op {call}
        return [r]
      }}
      return [r]
    }}""").nodes
    check = CandidateCheck(node, torch.device("cpu"))
    (exact,) = (piece.right for piece in check._pieces(wide=True))
    assert exact.dtype == torch.float64
    narrow = getattr(torch, {"f16": "float16", "f32": "float32"}[result])
    assert not torch.equal(exact.to(narrow).to(exact.dtype), exact)
    assert check.problem(check.code({})) is None


def test_the_kernel_of_another_engine_was_the_fastest(background: Background) -> None:
    """What is compiled in its place was never checked: it is now, and measured."""
    memory = Kept()
    made, model = session(Device(), background, store=memory)
    right(made, model)
    assert made.specializer.wait(60)
    for kind, key in list(memory):
        if kind == KERNEL:
            del memory[kind, key]
        else:
            memory[kind, key] = b'{"name": "engine kernel", "rank": null, "microseconds": {"engine kernel": 1.0}}'
    device = Device(wrong="layer_norm")
    again, model = session(device, background, store=memory)
    right(again, model)
    assert again.specializer.wait(60)
    right(again, model)
    assert device.timed
    assert ENGINE not in tactics(again).values()


class Deep(nn.Module):
    """A product of few rows over a long depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


def test_a_split_body_that_is_the_fastest(background: Background) -> None:
    """It runs from then on, here and, through the runtime cache, elsewhere."""
    memory, x = Kept(), torch.randn(4, 256)
    known: dict[str, Any] = {}
    for builds in (True, False):
        device = Device(parts=4, kernels=known)
        whole = device.time
        device.time = lambda runs: 0.5 if "_parts4" in runs[0].func.source else whole(runs)  # type: ignore  # noqa: B023
        made, model = session(device, background, store=memory, make=Deep, x=x)
        right(made, model, x)
        assert made.specializer.wait(60)
        right(made, model, x)
        (region,) = (region for region in made.stats().variants[0].regions if region.nodes)
        assert region.tactic == "split"
        assert {us for name, us in region.microseconds.items() if name.startswith("split")} == {0.5}
        assert "_parts4" in made.current([x]).code.source
        assert bool(device.builds) == bool(device.timed) == builds


def test_measuring_is_bounded_in_time(background: Background) -> None:
    device = Device()
    settings = RuntimeSettings(specialization_strategy="lazy", tuning_seconds=0)
    made, model = session(device, background, settings)
    right(made, model)
    assert made.specializer.wait(60)
    assert (device.timed, len(device.builds)) == (0, 1)
    assert made.specializer.base.tier == SPECIALIZED
    right(made, model)


def test_what_was_learnt_is_remembered(background: Background) -> None:
    """A second session builds and measures nothing, and runs the same kernels."""
    memory, first, second = Kept(), Device(), Device()
    made, model = session(first, background, store=memory)
    right(made, model)
    assert made.specializer.wait(60)
    assert {kind for kind, _ in memory} == {KERNEL, TACTIC}
    second.kernels = first.kernels
    again, model = session(second, background, store=memory)
    right(again, model)
    assert again.specializer.wait(60)
    assert (second.builds, second.timed) == ([], 0)
    assert tactics(again) == tactics(made)
    assert {op: k.kernel for op, k in launched(again.specializer.base.code.tactics).items()} == {  # type: ignore[attr-defined]
        op: k.kernel
        for op, k in launched(made.specializer.base.code.tactics).items()  # type: ignore[attr-defined]
    }
    right(again, model)


def test_a_kernel_that_the_compiler_refuses(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    """All others are compiled and measured; and nothing is remembered of what may be a bug."""
    memory, device = Kept(), Device()
    build = device.build

    def picky(bodies: Any, *given: Any) -> Any:
        if any("layer_norm" in str(body) for body, _ in bodies.values()):
            raise KernelError("ptxas ended with an error")
        return build(bodies, *given)

    device.build = picky  # type: ignore[method-assign]
    made, model = session(device, background, store=memory)
    right(made, model)
    assert made.specializer.wait(60)
    regions = made.specializer.base.regions
    (bad,) = (region for region in regions if "layer_norm" in str(region.body))
    ops = launched(made.specializer.base.code.tactics).keys()
    assert ops == {op for region in regions if region is not bad for op in region.ops}
    run = {node.op for node in inline_kernels(made.graph, made.specializer.base.code.tactics).nodes}
    assert {r.key for r in regions if r.choice} == {
        r.key for r in regions if r is not bad and not run.isdisjoint(r.ops)
    }
    assert not any(bad.key in key for _, key in memory)
    assert "is not compiled: ptxas ended with an error" in caplog.text
    right(made, model)


def test_damaged_memory(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    memory, device = Kept(), Device()
    made, model = session(device, background, store=memory)
    right(made, model)
    assert made.specializer.wait(60)
    for key in memory:
        memory[key] = b'{"launch": 3}'
    again, model = session(device, background, store=memory)
    right(again, model)
    assert again.specializer.wait(60)
    right(again, model)
    assert again.specializer.base.tier == SPECIALIZED
    assert "has an unreadable" in caplog.text


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_that_recur(background: Background) -> None:
    """Kernels for any size at once; after the second call with the same size, kernels for it."""
    made, model = session(Device(), background, dynamic=True)
    specializer = made.specializer
    right(made, model, torch.randn(7, 16))
    assert specializer.wait(60)
    assert (specializer.base.tier, specializer.base.ready, specializer.variants) == (PORTABLE, False, {})
    for size in (3, 5, 7):
        right(made, model, torch.randn(size, 16))
    assert specializer.wait(60)
    assert list(specializer.variants) == [(7,)]
    (variant,) = specializer.variants.values()
    assert (variant.tier, variant.ready, variant.code.graph.syms) == (SPECIALIZED, True, {})
    assert all(not kernel.scalars for kernel in launched(variant.code.tactics).values())
    for size in (3, 5, 7):
        right(made, model, torch.randn(size, 16))
    assert made.current([torch.randn(7, 16)]) is variant
    assert made.current([torch.randn(9, 16)]) is specializer.base


def test_sizes_are_bounded(background: Background) -> None:
    settings = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=2, tuning_seconds=0)
    made, model = session(Device(), background, settings, dynamic=True)
    for size in (2, 2, 3, 3, 2, *[4] * PATIENCE):
        right(made, model, torch.randn(size, 16))
        assert made.specializer.wait(60)
    assert set(made.specializer.variants) == {(2,), (4,)}
    for size in (2, 3, 4):
        right(made, model, torch.randn(size, 16))


def test_more_sizes_than_places(background: Background) -> None:
    """In turn, they would all lose their place before they come again: the first ones keep theirs, and the others get
    CUDA graphs of what there is for all sizes."""
    device = Device()
    settings = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=2, tuning_seconds=0)
    made, _ = session(device, background, settings, dynamic=True)
    inputs, ready = [torch.randn(2 + size, 16) for size in range(6)], []
    for turn in range(8):
        ready = []
        for x in inputs:
            ready.append(made.specializer.variant(len(x), [x], "lazy").ready)
            assert background.wait(60)
        if turn == 1:
            builds = len(device.builds)
    assert set(made.specializer.variants) == {(2,), (3,)}
    assert len(device.builds) == builds == 3
    assert ready == [True] * 6
    with torch_rtx.runtime_settings(specialization_strategy="eager"):
        made([inputs[-1]])
    assert len(device.builds) == builds


def test_what_is_remembered_of_calls_is_bounded(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are all different, and numbers: a program may make calls for ever."""
    monkeypatch.setattr(admission, "TRACKED_PER_SLOT", 4)
    monkeypatch.setattr(specialize, "MAX_KEYS", 16)
    settings = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=2, tuning_seconds=0)
    made, model = session(Device(broken="none"), background, settings, dynamic=True)
    for size in range(2, 40):
        right(made, model, torch.randn(size, 16))
    assert len(made.specializer._policy._misses) <= 8
    right(made, model)
    right(made, model)
    for number in range(40):
        made.specializer.variant(("key", number), [X], "lazy")
    assert len(made.specializer._by_key) <= 16
    assert list(made.specializer.variants) == [(4,)]


def test_sizes_that_lost_their_place_are_not_compiled_for(background: Background) -> None:
    """The background is busy meanwhile: of all the sizes that recurred, it works for those that are still there."""
    device, entered, leave = Device(), threading.Event(), threading.Event()
    settings = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=1, tuning_seconds=0)
    made, model = session(device, background, settings, dynamic=True)
    background.submit(lambda: (entered.set(), leave.wait(60)), threading.Event())
    assert entered.wait(60)
    for size in (2, 2, *[3] * PATIENCE, *[4] * 2 * PATIENCE):
        right(made, model, torch.randn(size, 16))
    leave.set()
    assert background.wait(60)
    assert len(device.builds) == 2  # for all sizes, and for 4
    assert made.specializer.variants[(4,)].tier == SPECIALIZED


def test_eager_keeps_no_other_thread_waiting(background: Background) -> None:
    """One call compiles; another one, which does not ask for that, goes on at new sizes."""
    device, entered, leave = held_back()
    made, model = session(device, background, dynamic=True)

    def eager() -> None:
        with torch_rtx.runtime_settings(specialization_strategy="eager"):
            made([X])

    thread = threading.Thread(target=eager)
    thread.start()
    assert entered.wait(60)
    waiting = threading.Thread(target=lambda: right(made, model, torch.randn(9, 16)))
    waiting.start()
    waiting.join(20)
    alive = waiting.is_alive()
    leave.set()
    thread.join()
    waiting.join()
    assert not alive


def test_an_interrupted_call_starts_over(background: Background) -> None:
    """Ctrl-C while it compiles: no later call waits for it."""
    settings = RuntimeSettings(specialization_strategy="eager", tuning_seconds=0)
    device = Device()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    made, model = session(device, background, settings, dynamic=True)
    made.specializer.context.database._compiler = SimpleNamespace(some=interrupted)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        made([X])
    made.specializer.context.database._compiler = device  # type: ignore[union-attr]
    thread = threading.Thread(target=lambda: right(made, model), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert made.specializer.variants[(4,)].tier == SPECIALIZED


def test_eager_in_a_call_with_autocast(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    """The dtypes of a graph are those of its capture, in what kernels are checked against, too."""
    settings = RuntimeSettings(specialization_strategy="eager", tuning_seconds=0)
    made, model = session(Device(wrong="linear"), background, settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = made([X])
    with torch.no_grad():
        torch.testing.assert_close(got, model(X), rtol=1e-4, atol=1e-5)
    limits = re.findall(r"the limit is ([\d.e-]+)", caplog.text)
    assert limits
    assert all(float(limit) < 1e-4 for limit in limits)


def test_eager_sizes(background: Background) -> None:
    settings = RuntimeSettings(specialization_strategy="eager", tuning_seconds=0)
    made, model = session(Device(), background, settings, dynamic=True)
    right(made, model, torch.randn(6, 16))
    assert made.specializer.variants[(6,)].tier == SPECIALIZED


def test_many_threads(background: Background) -> None:
    """16 threads at changing sizes while everything is being swapped: every result is right."""
    settings = RuntimeSettings(specialization_strategy="lazy", specialized_shapes=3, tuning_seconds=0)
    made, model = session(Device(), background, settings, dynamic=True)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(6):
                size = int(torch.randint(2, 7, (), generator=generator))
                right(made, model, torch.randn(size, 16, generator=generator))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert made.specializer.wait(120)
    right(made, model, torch.randn(5, 16))


# ---- what is said about it -------------------------------------------------------------------------------------------


def test_stats(background: Background) -> None:
    made, model = session(Device(wrong="layer_norm"), background, dynamic=True)
    before = made.stats()
    assert [(v.tier, v.busy, v.kernels, v.regions) for v in before.variants] == [(REFERENCE, False, 0, ())]
    for _ in range(2):
        right(made, model, torch.randn(6, 16))
    assert made.specializer.wait(60)
    stats = made.stats()
    everything, six = stats.variants
    assert (everything.sizes, everything.tier, everything.busy) == ({}, PORTABLE, False)
    assert (list(six.sizes.values()), six.tier, six.busy) == ([6], SPECIALIZED, False)
    assert six.kernels == len(launched(made.current([torch.randn(6, 16)]).code.tactics))
    assert {region.where.split(" ")[0] for region in six.regions if region.nodes} == {"up", "norm", "@"}
    bad = [region for region in six.regions if region.problems]
    assert [region.tactic for region in bad] == ["calls"]
    timed = [region for region in six.regions if len(region.microseconds) > 1]
    assert all(region.tactic == "kernel" for region in timed)
    assert sum(any(name.startswith(LIBRARY) for name in region.microseconds) for region in timed) == 2  # the products
    text = str(stats)
    assert "all sizes: portable" in text
    assert "= 6: specialized" in text
    assert "relative error" in text
    assert "CUDA graphs: this module has none" in text


def test_settings_of_a_call(background: Background) -> None:
    device = Device()
    made, model = session(device, background)
    with torch_rtx.runtime_settings(specialization_strategy="none"):
        right(made, model)
        assert device.builds == []
        with torch_rtx.runtime_settings(cuda_graph_strategy="disabled"):
            right(made, model)
        with torch_rtx.runtime_settings(specialization_strategy="eager"):
            right(made, model)
            assert made.specializer.base.tier == SPECIALIZED
    builds = len(device.builds)
    right(made, model)
    assert len(device.builds) == builds


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_that_move_keep_their_kernels(
    background: Background, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another budget for weights means other code, with the tactics that were chosen before; nothing is tuned again."""
    monkeypatch.setattr(streaming, "TINY", 64)
    device = Device()
    made, model = session(device, background, dynamic=dynamic)
    for _ in range(3):
        right(made, model)
        assert made.specializer.wait(60)
    before, builds = made.current([X]), len(device.builds)
    assert before.tier == SPECIALIZED
    (expected,) = made([X])
    for budget in ("50%", None):
        made.stream_weights(budget)
        assert (made.streamer is None) == (budget is None)
        for _ in range(2):
            assert torch.equal(made([X])[0], expected)
        after = made.current([X])
        assert after.code is not before.code
        assert after.code.tactics == before.code.tactics
        assert (after.tier, after.sizes, after.regions) == (before.tier, before.sizes, before.regions)
        assert made.specializer.wait(0)
        assert len(device.builds) == builds


def test_weights_that_move_while_kernels_are_built(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TINY", 64)
    device, entered, leave = held_back()
    made, model = session(device, background)
    right(made, model)
    assert entered.wait(60)
    made.stream_weights("50%")
    right(made, model)
    leave.set()
    assert made.specializer.wait(60)
    right(made, model)
    assert made.current([X]).tier == SPECIALIZED
    assert made.streamer is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tactics": "calls"}, "tactics can't be changed per call"),
        ({"specialization_strategy": "soon"}, "must be 'lazy' or 'eager' or 'none', not 'soon'"),
    ],
)
def test_settings_that_a_call_cannot_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message), torch_rtx.runtime_settings(**changes):
        pass


# ---- the background --------------------------------------------------------------------------------------------------


def test_jobs_in_order_and_failures(caplog: pytest.LogCaptureFixture) -> None:
    background, seen = Background(), []
    events = [threading.Event() for _ in range(3)]
    background.submit(lambda: seen.append(1), events[0])
    background.submit(lambda: 1 // 0, events[1])
    background.submit(lambda: seen.append(2), events[2])
    assert background.wait(10)
    assert all(event.is_set() for event in events)
    assert seen == [1, 2]
    leave = threading.Event()
    background.submit(lambda: leave.wait(60), threading.Event())
    assert not background.wait(0.01)
    leave.set()
    assert background.wait(10)
    assert "specialization failed" in caplog.text
    background.stop()


def test_what_can_wait_comes_last() -> None:
    """The first parts of all jobs come before the second part of any; who has failed has none."""
    background, seen, leave = Background(), [], threading.Event()
    events = [threading.Event() for _ in range(4)]
    background.submit(lambda: leave.wait(60), events[0])
    background.submit(lambda: seen.append("first"), events[1], lambda: seen.append("first, later"))
    background.submit(lambda: 1 // 0, events[2], lambda: seen.append("never"))
    background.submit(lambda: seen.append("second"), events[3], lambda: seen.append(events[1].is_set()))
    leave.set()
    assert background.wait(10)
    assert seen == ["first", "second", "first, later", True]
    background.stop()


def test_a_job_gives_the_interpreter_up_soon() -> None:
    background, seen, before = Background(), [], sys.getswitchinterval()
    background.submit(lambda: seen.append(sys.getswitchinterval()), threading.Event())
    assert background.wait(10)
    background.stop()
    assert seen[0] <= 1e-4 < before
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize("stops", [False, True])
def test_a_job_waits_while_the_program_compiles(stops: bool) -> None:
    """The program itself never waits, and the end of the process ends the wait."""
    background, steps = Background(), []
    ended, begun = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        background.step()
        steps.append(1)

    with background.paused(), background.paused():
        background.step()
        background.submit(job, ended)
        assert begun.wait(10)
        assert not ended.wait(0.05)
        if stops:
            background.stop()
            assert ended.wait(10)
    assert ended.wait(10)
    assert steps == [] if stops else [1]
    background.stop()


@pytest.mark.parametrize(
    ("part", "run"),
    [
        ((capture, "keep_ops"), lambda graph, spied: capture.capture(graph, [], spied, spied, spied)),
        ((compiler, "check_settings"), lambda graph, _: compiler.compile_fx(graph, [], CompilationSettings())),
    ],
    ids=["capture", "lowering"],
)
def test_compilations_pause_the_background(
    monkeypatch: pytest.MonkeyPatch, part: tuple[Any, str], run: Callable[..., object]
) -> None:
    seen = []

    def spied(*given: Any) -> Any:
        seen.append(BACKGROUND._pauses)
        raise KeyError("spied")

    graph = torch.fx.symbolic_trace(nn.Identity())
    monkeypatch.setattr(*part, spied)
    with pytest.raises(KeyError, match="spied"):
        run(graph, spied)
    assert seen == [1]
    assert BACKGROUND._pauses == 0


def test_what_is_left_is_told(background: Background, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """While a job compiles, by a callback and by the log; then nothing is."""
    caplog.set_level("INFO", logger="torch_rtx.runtime.background")
    monkeypatch.setattr(backgrounds, "LOGGED_S", 0.0)
    device, entered, leave = held_back()
    made, model = session(device, background)
    right(made, model)
    assert entered.wait(60)
    told: list[Progress] = []

    def progress(left: Progress) -> None:
        told.append(left)
        leave.set()

    regions = len({node.op for node in kernel_nodes(made.graph)})
    assert background.wait(60, progress)
    first, last = told[0], told[-1]
    assert first.kernels == regions
    assert first.tactics == tuners.MEASURED_OF_A_KIND * regions
    assert first.seconds > 0
    assert last == Progress(0, 0, 0.0) == background.left()
    assert [left.kernels for left in told] == sorted((left.kernels for left in told), reverse=True)
    lines = [record.message for record in caplog.records if "left" in record.message]
    tactics = [int(found[1]) for found in (re.search(r"(\d+) tactics", line) for line in lines) if found]
    assert tactics[0] > tactics[-1]
    assert lines[-1] == "nothing is left to compile or to measure"


def test_waiting_for_a_time_tells_what_is_left(background: Background) -> None:
    device, entered, leave = held_back()
    made, model = session(device, background)
    right(made, model)
    assert entered.wait(60)
    told: list[Progress] = []
    assert not background.wait(0.01, told.append)
    assert told
    assert told[-1].kernels > 0

    def end(left: Progress) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        background.wait(60, end)
    leave.set()
    assert background.wait(60)


def test_seconds_left_are_those_of_the_process_so_far() -> None:
    background = Background()
    work = Work(kernels=2, tactics=3, limit_s=100.0)
    background._waiting.append((threading.Event(), work))
    background.compiling.add(4, 8.0)
    background.measuring.add(2, 1.0)
    assert background.left() == Progress(2, 3, 2 * 2.0 + 3 * 2.5)
    work.limit_s = 1.0
    assert background.left().seconds == 2 * 2.0 + 1.0
    work.begun = time.monotonic() - 3
    assert background.left().seconds == pytest.approx(2.0, abs=0.1)


def test_stopping_drops_what_waits() -> None:
    background, entered = Background(), threading.Event()
    ended, dropped, late = threading.Event(), threading.Event(), threading.Event()

    def long() -> None:
        entered.set()
        while True:
            background.step()
            time.sleep(0.001)

    closed = []
    background.on_stop(lambda: closed.append(1))
    background.submit(long, ended)
    background.submit(lambda: closed.append(2), dropped)
    assert entered.wait(10)
    background.stop()
    background.submit(lambda: closed.append(3), late)
    assert ended.wait(10)
    assert dropped.wait(10)
    assert late.is_set()
    assert closed == [1]


def test_stopping_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """What compiles is ended while a job waits for it: that is no reason to warn, or to let the driver compile."""
    background, device, entered, leave = Background(), Device(), threading.Event(), threading.Event()

    def build(*_: Any) -> Any:
        entered.set()
        leave.wait(60)
        raise KernelError("the process that compiles kernels ended: EOFError")

    asked: list[int] = []
    device.build = build  # type: ignore[method-assign]
    made, model = session(device, background)
    context = replace(made.specializer.context, jit=lambda: asked.append(1) or {})  # type: ignore[type-var]
    made.specializer.context = context
    background.on_stop(leave.set)
    background.on_stop(leave.set)
    assert len(background._closing) == 1
    right(made, model)
    assert entered.wait(60)
    background.stop()
    assert made.specializer.wait(60)
    assert (asked, caplog.text.count("process that compiles")) == ([], 0)


def test_a_job_that_ends_its_thread() -> None:
    """Whatever it raises, nobody waits for it for ever, and the next job runs."""
    background, done, later = Background(), threading.Event(), threading.Event()
    background.submit(lambda: sys.exit(1), done)
    assert done.wait(10)
    background.submit(lambda: None, later)
    assert later.wait(10)
    background.stop()


def test_no_thread_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    background, done = Background(), threading.Event()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    background.submit(lambda: None, done)
    assert done.is_set()
    assert "nothing is specialized: can't create new thread" in caplog.text


class Modes:
    """Stands for the driver: what a thread may do while others capture."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self) -> None:
        self.mode = 0

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        before, self.mode = self.mode, mode
        return 0, before


def test_jobs_do_not_break_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's captures forbid every thread to allocate and to load; jobs are exempt, and keep to one stream."""
    driver, streams, seen = Modes(), [], []

    @contextmanager
    def stream(given: object) -> Iterator[None]:
        streams.append(given)
        yield

    monkeypatch.setattr(driver_api, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(tuners, "new_stream", lambda device: object())
    for _ in range(2):
        with suppress(ZeroDivisionError), tuners._own_stream(torch.device("cuda", 7)):
            seen.append(driver.mode)
            1 / 0  # noqa: B018
        assert driver.mode == 0
    assert seen == [2, 2]
    assert streams[0] is streams[1]
    monkeypatch.setattr(driver_api, "driver", lambda: None)
    with driver_api.relaxed():
        assert driver.mode == 0
    tuners._stream.cache_clear()


def test_a_model_that_is_gone_needs_no_kernels(background: Background) -> None:
    device, entered, leave = Device(), threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        leave.wait(60)

    background.submit(block, threading.Event())
    assert entered.wait(60)
    made, model = session(device, background)
    right(made, model)
    done = made.specializer.base.done
    del made, model
    import gc

    gc.collect()
    leave.set()
    assert done.wait(60)
    assert device.builds == []


class Parts(nn.Module):
    """Layers that read parts of one tensor, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts, self.last = nn.Linear(16, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.parts(x).softmax(-1)
        found = x.repeat(1, 4)
        for start in (0, 64, 128):
            found = self.last((found + parts[:, start : start + 64]).softmax(-1))
        return found


@pytest.mark.parametrize("wrong", [None, "start=64, end=128"])
def test_kin_are_measured_once(background: Background, wrong: str | None) -> None:
    """What is the fastest for one is used for the others, and found in the cache from then on; where it is wrong, all
    are tried."""
    memory = Kept()
    times = iter(range(99, 0, -1))  # the tactic that is measured last is the fastest
    device = Device(wrong=wrong, parts=2)
    device.time = lambda runs: float(next(times))  # type: ignore[method-assign]
    made, model = session(device, background, make=Parts, store=memory)
    right(made, model)
    assert made.specializer.wait(60)
    right(made, model)
    regions = made.specializer.base.regions
    measured, other = (region for region in regions if sum(region.kin == one.kin for one in regions) == 2)
    assert measured.choice is not None
    assert measured.choice.rank is not None
    assert measured.choice.rank > 0
    assert other.choice == (None if wrong else measured.choice)
    assert len(other.problems) > tuners.MEASURED_OF_A_KIND if wrong else not other.problems
    assert 99 - next(times) == sum(len(one.choice.microseconds) for one in regions if one.choice and one is not other)
    again, _ = session(Device(), background, make=Parts, store=memory)
    right(again, model)
    assert again.specializer.wait(60)
    choices = {region.key: region.choice for region in again.specializer.base.regions}
    assert choices[measured.key] == measured.choice
    assert wrong or choices[other.key] == measured.choice


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_what_is_measured_next_compiles_meanwhile(background: Background, seconds: float) -> None:
    """While the first kernels are checked, those of the next ranks compile, but not of kernels inside of others."""
    device, later = Device(), list[tuple[str, int]]()
    some = device.some

    def noted(*given: Any) -> Any:
        later.extend((name, rank) for name, _, rank in given[-1])
        return some(*given)

    device.some = noted  # type: ignore[method-assign]
    made, model = session(device, background, replace(LAZY, tuning_seconds=seconds))
    right(made, model)
    assert made.specializer.wait(60)
    whole = {node.op for node in made.graph.nodes}
    regions = [region for region in made.specializer.base.regions if not whole.isdisjoint(region.ops)]
    assert 0 < len(regions) < len(made.specializer.base.regions)
    wanted = [(name_of(region.key), rank) for rank in (1, 2) for region in regions]
    assert later[: len(wanted)] == (wanted if seconds else [])
