"""SM targets: limits, sets, the user's option, dtypes that a target lacks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from torch_rtx import CompilationSettings, SettingsError, targets
from torch_rtx.chips import chip_named
from torch_rtx.errors import Unsupported
from torch_rtx.settings import from_options
from torch_rtx.targets import ARCHES, NEWEST, PORTABLE, PTX, Target, arch_of, is_explicit, lacks, parse_targets, usable


@pytest.mark.quick
def test_portable() -> None:
    assert [str(target) for target in PORTABLE] == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "compute_80"]
    assert parse_targets("portable") == PORTABLE


@pytest.mark.quick
@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("sm_86", ["sm_86"]),
        (75, ["sm_75"]),
        ("ptx", ["compute_80"]),
        (["sm_120", "sm86", 89, "ptx"], ["sm_86", "sm_89", "sm_120", "compute_80"]),
        (("compute_86", "89", 89), ["sm_89", "compute_86"]),
        (["portable", 75], ["sm_75", *map(str, PORTABLE)]),
        ("current", ["sm_90"]),
        (["current", "sm_90"], ["sm_90"]),
        ("Portable", [*map(str, PORTABLE)]),
        (["SM_80", "8.9", "12.0"], ["sm_80", "sm_89", "sm_120"]),
        ("RTX 4090", ["sm_89"]),
        (["rtx4090", "rtx-20", "RTX_30", "rtx50"], ["sm_75", "sm_86", "sm_89", "sm_120"]),
        ("RTX 3060 Ti", ["sm_86"]),
        ("H100 SXM5", ["sm_90"]),
        (["DGX Spark", "B200", "B300"], ["sm_100", "sm_103", "sm_121"]),
        (["Jetson Orin", "Jetson Thor"], ["sm_87", "sm_110"]),
        (["Turing", "Ampere", "ada", "Hopper"], ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]),
        ("blackwell", ["sm_100", "sm_103", "sm_110", "sm_120", "sm_121"]),
    ],
)
def test_options(option: Any, names: list[str]) -> None:
    assert [str(target) for target in parse_targets(option, (9, 0))] == names
    assert CompilationSettings(targets=option).targets in (option, tuple(option) if isinstance(option, list) else ())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("option", "gpus"),
    [
        ("RTX 4060", ["RTX 4060"]),
        (["RTX 4060", "RTX 3050", "ptx"], ["RTX 3050", "RTX 4060", None]),
        (["RTX 4060", "rtx4060"], ["RTX 4060"]),
        (["RTX 4060", "RTX 4070"], [None]),  # what stands for both
        (["RTX 4060", "sm_89"], [None]),
        ("RTX 4090", [None]),  # it stands for sm_89
        ("RTX 4060 Laptop GPU", [None]),
        (["current", "rtx40"], [None, "H100"]),
        (["current", "H200"], [None]),
    ],
)
def test_one_gpu_is_what_kernels_are_chosen_for(option: Any, gpus: list[str | None]) -> None:
    found = parse_targets(option, (9, 0), lambda: chip_named("H100"))
    assert [target.chip for target in found] == [None if gpu is None else chip_named(gpu) for gpu in gpus]
    for target in found:
        assert target == Target(target.sm, target.ptx)
        assert target.arch.chip == (target.chip or Target(target.sm, target.ptx).arch.chip)


REFUSED = ["sm_85", "volta", 70, [], "", ["sm_80", "x"], "sm_80a", "rtx6000", 8.6, True, ["sm_\u0668\u0660"]]


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_refused(option: Any) -> None:
    with pytest.raises(SettingsError, match="targets"):
        CompilationSettings(targets=option)
    with pytest.raises(SettingsError):
        from_options({"targets": option})


def test_errors_say_what_is_known() -> None:
    with pytest.raises(SettingsError, match=r"unknown target 'sm_85'\n.*sm_75, sm_80.*sm_120.*portable.*current"):
        parse_targets("sm_85")
    with pytest.raises(SettingsError, match='needs a CUDA GPU in this process\n  name the GPU .*"RTX 4090"'):
        parse_targets("current")
    with pytest.raises(SettingsError, match="70 is older than the GPUs that kernels are built for\n  sm_75, Turing"):
        parse_targets("current", (7, 0))
    with pytest.raises(SettingsError, match=r"unknown target 'RTX 4099'\n  did you mean 'rtx4090'"):
        parse_targets("RTX 4099")
    with pytest.raises(SettingsError, match=r"did you mean .*'hopper'"):
        parse_targets("hoper")


NAMES = {
    75: [
        "NVIDIA GeForce RTX 2080 Ti",
        "NVIDIA GeForce GTX 1660 SUPER",
        "Tesla T4",
        "Quadro RTX 6000",
        "NVIDIA TITAN RTX",
    ],
    80: ["NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A30"],
    86: ["NVIDIA GeForce RTX 3070 Laptop GPU", "NVIDIA GeForce RTX 3060 12GB", "NVIDIA RTX A6000", "NVIDIA A10G"],
    87: ["Orin", "Jetson AGX Orin", "Jetson Orin Nano"],
    89: ["NVIDIA GeForce RTX 4070 Ti SUPER", "NVIDIA RTX 6000 Ada Generation", "NVIDIA L4", "NVIDIA L40S"],
    90: ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA GH200 480GB"],
    100: ["NVIDIA B200", "NVIDIA GB200"],
    103: ["NVIDIA GB300"],
    110: ["NVIDIA Thor", "Jetson AGX Thor"],
    120: ["NVIDIA GeForce RTX 5090", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"],
    121: ["NVIDIA GB10"],
}


@pytest.mark.parametrize("sm", NAMES)
def test_names_of_devices(sm: int) -> None:
    for name in NAMES[sm]:
        assert parse_targets(name) == (ARCHES[sm].target,), name


def test_gpus_that_are_not_known() -> None:
    """The nearest older record, without binaries, which are for one SM version."""
    newest = arch_of(NEWEST)
    assert arch_of(150) == replace(newest, sm=150, like=NEWEST)
    assert [str(arch_of(sm).target) for sm in (88, 101)] == ["compute_87", "compute_89"]
    assert arch_of(150).target == Target(newest.portable, ptx=True)
    assert parse_targets("current", (15, 0)) == (arch_of(150).target,)
    with pytest.raises(Unsupported, match="older than sm_75"):
        arch_of(70)


def test_records_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SM version that no ptxas knows is PTX however it is named; nothing asks for a binary of it."""
    monkeypatch.setitem(ARCHES, 140, replace(arch_of(121), sm=140, like=121))  # type: ignore[arg-type]
    monkeypatch.setitem(targets._NAMES, "rtx7090", (140,))
    for option in ("RTX 7090", "sm_140", "14.0", 140):
        assert parse_targets(option) == (Target(120, ptx=True),), option
    assert parse_targets("compute_140") == (Target(140, ptx=True),)
    with pytest.raises(SettingsError, match=r"sm_140 \(as PTX\)"):
        parse_targets("sm_85")


def test_code_that_later_gpus_take() -> None:
    for sm, arch in ARCHES.items():
        assert arch.target == (Target(sm) if arch.like is None else Target(arch.portable, ptx=True))
        code = Target(sm, ptx=True).arch
        assert code.sm <= sm
        assert all(code.features <= later.features for at, later in ARCHES.items() if at >= sm)


def test_limits() -> None:
    """The table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide, in KB."""
    found = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
    assert {sm: arch.shared // 1024 for sm, arch in ARCHES.items() if arch.like is None} == found
    assert PTX.shared == 99 << 10  # it has to fit sm_86 and sm_120 as well
    assert Target(120, ptx=True).shared == 99 << 10


def test_dtypes() -> None:
    found = {
        dtype: [t.sm for t in map(Target, ARCHES) if lacks(t.arch, dtype)]
        for dtype in ("f16", "bf16", "f8e4m3fn", "i4")
    }
    assert found == {"f16": [], "bf16": [75], "f8e4m3fn": [75, 80, 86, 87], "i4": [75]}
    assert [t.sm for t in map(Target, ARCHES) if lacks(t.arch, "f4e2m1fn_x2")] == [75, 80, 86, 87, 89, 90]
    assert lacks(PTX.arch, "f8e5m2")


def test_usable() -> None:
    used = [("aten.mm.default", "f16"), ("aten.mul.Tensor", "bf16")]
    assert [str(target) for target in usable((Target(75), Target(80)), used, explicit=False)] == ["sm_80"]
    with pytest.raises(SettingsError, match=r"aten.mul.Tensor computes in bf16, which sm_75 lacks"):
        usable((Target(75), Target(80)), used, explicit=True)
    by_bytes = [("aten._scaled_mm.default", dtype) for dtype in ("f8e4m3fn", "f8e5m2", "f4e2m1fn_x2")]
    assert usable(PORTABLE, by_bytes, explicit=True) == PORTABLE
    with pytest.raises(SettingsError, match="which sm_75 lacks"):
        usable((Target(75),), [("aten.add.Tensor", "bf16")], explicit=False)
    assert usable(PORTABLE, [], explicit=True) == PORTABLE
    assert [is_explicit(option) for option in ("portable", "current", "sm_80", ["portable"])] == [
        False,
        True,
        True,
        True,
    ]


def test_light() -> None:
    code = "import sys, torch_rtx.targets; assert not {'torch', 'triton'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
