"""`check_engine` says before `load` what becomes of an engine on a machine, and needs no torch for it."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import torch_rtx
from tests.engine_files import forge
from tests.paths import ENGINES
from torch_rtx import engine, machine
from torch_rtx.engine import Engine
from torch_rtx.irparse import parse
from torch_rtx.machine import Machine, this_machine
from torch_rtx.manifest import Manifest
from torch_rtx.tactics import KernelTable
from torch_rtx.validity import EngineCheck, Validity, check_engine

VALID, SUBOPTIMAL, INVALID = Validity
GIB = 1 << 30
# With a new driver, everything installed, and all the memory that there is.
RTX_4090 = Machine("linux", 89, "NVIDIA GeForce RTX 4090", 24 * GIB, (13, 1), True, True)
RTX_5090 = replace(RTX_4090, sm=120)
PTXAS = {"ptxas for sm_89": "12.8", "ptxas for sm_120": "13.1", "ptxas for compute_80": "13.1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines for CUDA: with kernels for all portable targets, for sm_120 alone, with none; bound to Windows; large."""
    folder = tmp_path_factory.mktemp("engines")
    every, new = (engine.load(ENGINES / "v6" / name) for name in ("kernel.rtx", "split.rtx"))
    manifest = replace(every.manifest, device="cuda", producer=PTXAS)
    every, new = replace(every, manifest=manifest), replace(new, manifest=replace(new.manifest, device="cuda"))
    engine.save(every, folder / "every.rtx")
    engine.save(new, folder / "new.rtx")
    engine.save(replace(every, kernels=KernelTable()), folder / "later.rtx")
    engine.save(replace(every, manifest=replace(manifest, platform="windows")), folder / "windows.rtx")
    return folder


def checked(folder: Path, name: str, machine: Machine | str | int) -> EngineCheck:
    found = check_engine(folder / f"{name}.rtx", machine)
    assert all(reason.text and str(reason) in str(found) for reason in found.reasons)
    assert found.validity == max((reason.validity for reason in found.reasons), key=list(Validity).index, default=VALID)
    assert found.as_dict()["validity"] == found.validity
    return found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "machine", "expected", "what", "text"),
    [
        ("every", "RTX 4090", VALID, None, ""),
        ("every", RTX_4090, VALID, None, ""),
        ("every", RTX_5090, VALID, None, ""),
        ("new", RTX_5090, VALID, None, ""),
        ("windows", replace(RTX_4090, platform="windows"), VALID, None, ""),
        ("windows", RTX_4090, INVALID, "platform", "built for windows, and this is linux"),
        ("every", Machine("linux", why="there is no NVIDIA driver"), SUBOPTIMAL, "gpu", "on the CPU here: there is no"),
        ("every", replace(RTX_4090, sm=70), INVALID, "gpu", "older than sm_75"),
        ("every", replace(RTX_4090, bindings=False), SUBOPTIMAL, "packages", "cuda-bindings"),
        # kernels
        ("every", "sm_87", SUBOPTIMAL, "kernels", "none for sm_87, so that those for sm_86 run"),
        ("every", 100, SUBOPTIMAL, "kernels", "none for sm_100, so that those for compute_80 run"),
        ("new", RTX_4090, SUBOPTIMAL, "kernels", "1 of 1 have no code that runs on sm_89: Triton compiles"),
        ("new", replace(RTX_4090, triton=False), SUBOPTIMAL, "kernels", "operations run one by one"),
        ("later", "RTX 4090", VALID, "kernels", "the file has none: Triton compiles them there"),
        ("later", RTX_4090, VALID, "kernels", "in the background"),
        ("later", replace(RTX_4090, triton=False), SUBOPTIMAL, "kernels", "the file has none: operations run one by"),
        # driver
        ("every", replace(RTX_4090, driver=(12, 0)), VALID, None, ""),
        ("every", replace(RTX_5090, driver=(12, 8)), SUBOPTIMAL, "driver", "for sm_120, which need one for CUDA 13.0"),
        ("every", replace(RTX_4090, driver=(11, 8)), SUBOPTIMAL, "driver", "for sm_89, which need one for CUDA 12.0"),
        ("new", replace(RTX_5090, driver=(12, 8)), VALID, None, ""),  # what made its kernels is not known
        # memory: weights of 144 bytes; a call of one row takes 2 x 32 bytes of inputs, 32 of the sum, 16 of the result
        (
            "every",
            replace(RTX_4090, memory=144 + 112 - 1),
            INVALID,
            "memory",
            "weights take 144 B and a call of the smallest sizes 112 B",
        ),
        ("every", replace(RTX_4090, memory=144 + 112), SUBOPTIMAL, "memory", "a call of the typical sizes 7.0 KiB"),
        ("every", replace(RTX_4090, memory=144 + 64 * 112), VALID, None, ""),
    ],
)
def test_check(
    folder: Path, name: str, machine: Machine | str | int, expected: Validity, what: str | None, text: str
) -> None:
    found = checked(folder, name, machine)
    assert found.validity == expected
    if what is None:
        assert found.reasons == ()
    else:
        (reason,) = found.reasons
        assert reason.what == what
        assert text in reason.text
        assert bool(reason.remedy) is (expected != VALID and what != "gpu")


def test_several_reasons_come_worst_first(folder: Path) -> None:
    found = checked(folder, "windows", replace(RTX_4090, sm=87, bindings=False, memory=1))
    assert [reason.what for reason in found.reasons] == ["platform", "memory", "packages", "kernels"]
    assert str(found).startswith("INVALID for NVIDIA GeForce RTX 4090 (sm_87), 1 B, driver for CUDA 13.1\nplatform: ")


@pytest.mark.parametrize("path", sorted(ENGINES.rglob("*.rtx")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_engines_of_every_release(path: Path, tmp_path: Path) -> None:
    assert check_engine(path, "RTX 4090").validity == VALID
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    for at in (0, 8, 60, length // 2, length - 1):
        damaged = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        for content in (damaged, raw[:at], raw[at:]):
            if content != raw:
                (tmp_path / "damaged.rtx").write_bytes(content)
                found = check_engine(tmp_path / "damaged.rtx", "RTX 4090")
                assert found.validity == INVALID
                assert [reason.what for reason in found.reasons] == ["format"]


def test_a_file_of_a_later_release(tmp_path: Path) -> None:
    def edit(program: dict[str, Any]) -> None:
        program["manifest"] = {"format_version": 99, "min_reader": 98, "producer": {"torch_rtx": "7.5.0"}}

    found = check_engine(forge(tmp_path / "model.rtx", edit), "RTX 4090")
    assert found.validity == INVALID
    (reason,) = found.reasons
    assert reason.what == "version"
    assert reason.remedy.startswith("update torch_rtx to 7.5.0, or")


def test_what_is_no_question(folder: Path) -> None:
    with pytest.raises(torch_rtx.SettingsError, match="means GPUs of several SM versions: sm_100, sm_103"):
        check_engine(folder / "every.rtx", "blackwell")
    with pytest.raises(torch_rtx.SettingsError, match="did you mean 'rtx4090'"):
        check_engine(folder / "every.rtx", "RTX 409")
    with pytest.raises(FileNotFoundError):
        check_engine(folder / "no.rtx", "RTX 4090")


def test_views_take_no_memory(tmp_path: Path) -> None:
    """Neither of a weight nor of a value."""
    graph = parse("""\
graph fused {
  input x: f32[4, 4]
  parameter 'w': f32[4, 4]
  weight w: f32[4, 4] = 'w'
  row: f32[16] = view aten.view.default(self=x, size=[16])
  turned: f32[4, 4](1, 4) = view aten.t.default(self=w)
  product: f32[4, 4] = extern aten.mm.default(self=x, mat2=turned)
  last: f32[16] = extern aten.relu.default(self=row)
  return [product, last]
}
""")
    engine.save(Engine(graph, Manifest("cuda", inputs=("x",)), {}, None), tmp_path / "model.rtx")
    for memory, validity in ((4 * 64 - 1, INVALID), (4 * 64, VALID)):
        assert check_engine(tmp_path / "model.rtx", replace(RTX_4090, memory=memory)).validity == validity


class Driver:
    """A driver for CUDA 12.8 with one GPU."""

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = gpus

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == "cuDriverGetVersion":
                args[0]._obj.value = 12080
            elif name == "cuDeviceGet":
                return 0 if args[1] < self.gpus else 101
            elif name == "cuDeviceGetName":
                args[0].value = b"NVIDIA H200"
            elif name == "cuDeviceTotalMem_v2":
                args[0]._obj.value = 140 * GIB
            elif name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 9, 76: 0}[args[1]]
            return 0

        return call


@pytest.mark.parametrize(
    ("built_for", "gpus", "index", "sm", "why"),
    [
        ("12.8", 1, 0, 90, ""),
        (None, 1, 0, 90, ""),  # there is no PyTorch
        ("12.8", 1, 1, None, "the driver finds no GPU 1"),
        ("13.0", 1, 0, None, "the driver is for CUDA 12.8, PyTorch for 13.0"),
        ("12.8", None, 0, None, "there is no NVIDIA driver"),
        ("", 1, 0, None, "this build of PyTorch has no CUDA"),
    ],
)
def test_this_machine(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, gpus: int | None, index: int, sm: int | None, why: str
) -> None:
    def library(name: str) -> Driver:
        if gpus is None:
            raise OSError(name)
        return Driver(gpus)

    monkeypatch.setattr(machine, "_cuda_of_torch", lambda: built_for)
    monkeypatch.setattr(ctypes, "CDLL", library)
    found = this_machine(index)
    assert (found.sm, found.why) == (sm, why)
    assert found.platform == machine.here()
    if sm:
        assert str(found) == "NVIDIA H200 (sm_90), 140.0 GiB, driver for CUDA 12.8"


def test_the_cuda_of_pytorch_without_importing_it() -> None:
    import torch

    assert machine._cuda_of_torch() == (torch.version.cuda or "")


@pytest.mark.gpu
def test_this_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The driver says what PyTorch says, and an engine that is VALID uses its kernels."""
    import torch

    gpu, found = torch.cuda.get_device_properties(0), this_machine()
    assert (found.gpu, found.sm, found.memory) == (gpu.name, 10 * gpu.major + gpu.minor, gpu.total_memory)
    assert found.driver is not None
    other = "sm_120" if found.sm != 120 else "sm_90"
    for targets, validity in (("current", VALID), ("portable", None), (other, SUBOPTIMAL)):
        settings = torch_rtx.CompilationSettings(device="cuda", targets=targets)
        module = torch_rtx.compile(torch.nn.GELU(), (torch.randn(8, 64, device="cuda"),), settings=settings)
        torch_rtx.save(module, tmp_path / "model.rtx")
        checked = check_engine(tmp_path / "model.rtx")
        assert validity in (None, checked.validity), checked
        caplog.clear()
        torch_rtx.load(tmp_path / "model.rtx", trust_binaries=True)
        assert ("runs call by call" in caplog.text) is any("no code that runs" in str(r) for r in checked.reasons)
