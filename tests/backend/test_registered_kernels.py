"""Kernels in CUDA C++, PTX and cubins: registration, capture, build without a GPU, and launch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

import torch_rtx
from tests.doubles.fake_driver import STREAM, FakeDriver
from tests.helpers.foreign_kernels import Launches
from torch_rtx.backend.registered_kernels import nvrtc
from torch_rtx.errors import CaptureError, KernelError, SettingsError
from torch_rtx.foreign import launch_in
from torch_rtx.ir import Node, kernel_nodes
from torch_rtx.lowering.foreign_calls import OPERATORS
from torch_rtx.runtime.launch import Gpu, load
from torch_rtx.tactics import OWN, runnable_tactics
from torch_rtx.targets import LATER

# What NVRTC makes of SOURCE.
PTX = """
.version 8.0
.target sm_80
.address_size 64

.visible .entry axpy(
	.param .u64 axpy_param_0,
	.param .u64 axpy_param_1,
	.param .u64 axpy_param_2,
	.param .u32 axpy_param_3,
	.param .f32 axpy_param_4
)
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<5>;
	.reg .b32 	%r<6>;
	.reg .b64 	%rd<11>;
	ld.param.u64 	%rd1, [axpy_param_0];
	ld.param.u64 	%rd2, [axpy_param_1];
	ld.param.u64 	%rd3, [axpy_param_2];
	ld.param.u32 	%r2, [axpy_param_3];
	ld.param.f32 	%f1, [axpy_param_4];
	mov.u32 	%r3, %ctaid.x;
	mov.u32 	%r4, %ntid.x;
	mov.u32 	%r5, %tid.x;
	mad.lo.s32 	%r1, %r3, %r4, %r5;
	setp.ge.s32 	%p1, %r1, %r2;
	@%p1 bra 	$L__BB0_2;
	cvta.to.global.u64 	%rd4, %rd1;
	mul.wide.s32 	%rd5, %r1, 4;
	add.s64 	%rd6, %rd4, %rd5;
	cvta.to.global.u64 	%rd7, %rd2;
	add.s64 	%rd8, %rd7, %rd5;
	ld.global.f32 	%f2, [%rd8];
	ld.global.f32 	%f3, [%rd6];
	fma.rn.f32 	%f4, %f2, %f1, %f3;
	cvta.to.global.u64 	%rd9, %rd3;
	add.s64 	%rd10, %rd9, %rd5;
	st.global.f32 	[%rd10], %f4;
$L__BB0_2:
	ret;
}
"""
SOURCE = """
extern "C" __global__ void axpy(const float* x, const float* y, float* out, int n, float a) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] + a * y[i];
}
"""


def _calls(x: Any, y: Any, a: Any, out: Any) -> Any:
    return x, y, out, x.numel(), a


REGISTRATION: dict[str, Any] = {
    "entry": "axpy",
    "args": _calls,
    "grid": lambda x, y, a, out: (x.numel() + 127) // 128,
    "block": 128,
    "reference": lambda x, y, out, n, a: out.copy_(x + a * y),
}


@torch.library.custom_op("rtxtests::axpy", mutates_args=())
def axpy(x: torch.Tensor, y: torch.Tensor, a: float) -> torch.Tensor:
    raise AssertionError("an engine launches the kernel")


@axpy.register_fake
def _(x: torch.Tensor, y: torch.Tensor, a: float) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    OPERATORS.clear()


def built(targets: Any = LATER, dynamic: bool = False) -> torch_rtx.CompiledModule:
    shapes = (({0: Dim("rows", min=2, max=512)},) * 2,) if dynamic else None
    model = Launches(lambda x, y: axpy(x, y, 0.25))
    given = torch.randn(6, 40), torch.randn(6, 40)
    return torch_rtx.compile(model, given, dynamic_shapes=shapes, device="cuda", targets=targets)


def node_of(module: torch_rtx.CompiledModule) -> Node:
    (node,) = (node for node in kernel_nodes(module.engine.graph) if launch_in(node.body) is not None)
    return node


def check_launch(module: torch_rtx.CompiledModule, sm: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The parameters of a launch for 11 rows; returns the image."""
    node, driver = node_of(module), FakeDriver((8, 8, 8, 4, 4), (sm // 10, sm % 10))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    (tactic, target), *_ = runnable_tactics(module.engine.kernels.tactics[node.op], sm, 1 << 20)
    launch = tactic.kernels[OWN]
    assert str(launch.grid[0]).endswith("// 128)")
    load(Gpu(driver, 0), node, tactic, target, module.engine.kernels.binaries).kernels[OWN](
        [16, 32, 48], [440], (4, 1, 1)
    )
    (launched,) = driver.launched
    quarter = struct.unpack("i", struct.pack("f", 0.25))[0]
    assert launched.parameters == (16, 32, 48, 440, quarter)
    assert (launched.entry, launched.block, launched.shared) == ("axpy", (128, 1, 1), 0)
    return launched.image


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_equals_the_reference(dynamic: bool, tmp_path: Path) -> None:
    torch_rtx.register_kernel("rtxtests::axpy", ptx=PTX, **REGISTRATION)
    module = built(dynamic=dynamic)
    assert not [node for node in module.engine.graph.nodes if node.kind == "fallback"]
    assert len(node_of(module).inputs) == 2, "the result is memory of the kernel's own"
    for rows in (6, 11) if dynamic else (6,):
        x, y = torch.randn(rows, 40), torch.randn(rows, 40)
        torch.testing.assert_close(module(x, y), (2 * x + 0.25 * 2 * y).relu())


def test_ptx_is_built_for_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_rtx.register_kernel("rtxtests::axpy", ptx=PTX, **REGISTRATION)
    module = built(["sm_80", "sm_89", "sm_90", "sm_120", "compute_80"], dynamic=True)
    for sm in (80, 89, 90, 120):
        assert check_launch(module, sm, monkeypatch).startswith(b"\x7fELF")
    assert b".entry axpy" in check_launch(module, 100, monkeypatch), "newer GPUs get PTX"
    torch_rtx.save(module, tmp_path / "axpy.rtx")
    assert list(torch_rtx.inspect(tmp_path / "axpy.rtx").foreign)[0].startswith("axpy_")


def test_a_cubin_serves_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_rtx.register_kernel("rtxtests::axpy", ptx=PTX, **REGISTRATION)
    binary = check_launch(built(["sm_80"], dynamic=True), 80, monkeypatch)
    types = ("pointer", "pointer", "pointer", "i32", "f32")
    torch_rtx.register_kernel("rtxtests::axpy", cubin={80: binary}, types=types, **REGISTRATION)
    module = built(["sm_86"], dynamic=True)
    assert check_launch(module, 86, monkeypatch) == binary
    assert module.engine.kernels.tactics[node_of(module).op].popitem()[1][0].kernels[OWN].aligned.registers > 0  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match="has no code for sm_90"):
        built(["sm_90"])


def has_nvrtc() -> bool:
    try:
        nvrtc('extern "C" __global__ void f() {}', 80, 80, ())
    except KernelError:
        return False
    return True


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
def test_cuda_source_is_compiled_for_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_rtx.register_kernel("rtxtests::axpy", source=SOURCE, **REGISTRATION)
    module = built(["sm_75", "sm_80", "sm_90", "sm_120", "compute_80"], dynamic=True)
    for sm in (75, 80, 90, 120):
        check_launch(module, sm, monkeypatch)
    torch_rtx.register_kernel("rtxtests::axpy", source=SOURCE.replace("float a)", "float a"), **REGISTRATION)
    with pytest.raises(KernelError, match="NVRTC 13 refuses the source for sm_80") as caught:
        built(["sm_80"])
    assert "foreign_kernels.py" in str(caught.value.loc)


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rtx.backend.registered_kernels.import_module", lambda name: __import__("no_such_module"))
    torch_rtx.register_kernel("rtxtests::axpy", source=SOURCE + "// without NVRTC", **REGISTRATION)
    with pytest.raises(KernelError, match="NVRTC, which is missing"):
        built(["sm_80"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": lambda x, y, a, out: (x, y, out, x.numel())}, "has 5 parameters, and gets 4 arguments"),
        (
            {"args": lambda x, y, a, out: (x, y, out, a, x.numel())},
            "parameter 3 .* is of type i32, and gets the number",
        ),
        ({"args": lambda x, y, a, out: (x, y, 7, x.numel(), a)}, "does not get result 0"),
        ({"args": lambda x, y, a, out: (x.t(), y, out, x.numel(), a)}, "a tensor that .* neither takes nor returns"),
        ({"args": lambda x, y, a, out: (x, y, out, "n", a)}, "argument 3 is a str"),
        ({"grid": lambda x, y, a, out: (1, 1, 1, 1)}, "not one to three integers"),
        ({"entry": "axpi"}, r"the code has no kernel axpi; it has axpy"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    torch_rtx.register_kernel("rtxtests::axpy", ptx=PTX, **{**REGISTRATION, **change})
    with pytest.raises((CaptureError, KernelError), match=message) as caught:
        built(["sm_80"])
    assert "foreign_kernels.py" in str(caught.value), "the line of the call"


def test_wrong_registrations() -> None:
    register = torch_rtx.register_kernel
    with pytest.raises(SettingsError, match="there is no operator 'rtxtests::no_such_op'"):
        register("rtxtests::no_such_op", ptx=PTX, **REGISTRATION)
    with pytest.raises(SettingsError, match="takes one of source, ptx and cubin"):
        register("rtxtests::axpy", **REGISTRATION)
    with pytest.raises(SettingsError, match="a block of 2048 x 1 x 1 threads"):
        register("rtxtests::axpy", ptx=PTX, **{**REGISTRATION, "block": 2048})
    with pytest.raises(SettingsError, match="do not say the types"):
        register("rtxtests::axpy", cubin={80: b""}, **REGISTRATION)
    torch.library.define("rtxtests::writes", "(Tensor(a!) x) -> ()")
    with pytest.raises(SettingsError, match="writes to an argument"):
        register("rtxtests::writes", ptx=PTX, **REGISTRATION)
