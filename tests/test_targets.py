"""SM targets: limits, sets, the user's option, dtypes that a target lacks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from torch_rtx import CompilationSettings, SettingsError
from torch_rtx.settings import from_options
from torch_rtx.targets import PORTABLE, PTX, SHARED, Target, is_explicit, lacks, parse_targets, usable


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
    ],
)
def test_options(option: Any, names: list[str]) -> None:
    assert [str(target) for target in parse_targets(option, (9, 0))] == names
    assert CompilationSettings(targets=option).targets in (option, tuple(option) if isinstance(option, list) else ())


REFUSED = ["sm_85", "volta", 70, [], "", ["sm_80", "x"], "sm_80a", "SM_80", 8.6, True, ["sm_\u0668\u0660"]]


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_refused(option: Any) -> None:
    with pytest.raises(SettingsError, match="targets"):
        CompilationSettings(targets=option)
    with pytest.raises(SettingsError):
        from_options({"targets": option})


def test_errors_say_what_is_known() -> None:
    with pytest.raises(SettingsError, match=r"unknown target 'sm_85'\n.*sm_75, sm_80.*sm_120.*portable.*current"):
        parse_targets("sm_85")
    with pytest.raises(SettingsError, match="needs a CUDA GPU"):
        parse_targets("current")
    with pytest.raises(SettingsError, match="unknown target 70"):
        parse_targets("current", (7, 0))


def test_limits() -> None:
    """The table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide, in KB."""
    assert {sm: Target(sm).shared // 1024 for sm in SHARED} == {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
    assert PTX.shared == 99 << 10  # it has to fit sm_86 and sm_120 as well
    assert Target(120, ptx=True).shared == 99 << 10


def test_dtypes() -> None:
    found = {
        dtype: [t.sm for t in map(Target, SHARED) if lacks(t, dtype)] for dtype in ("f16", "bf16", "f8e4m3fn", "i4")
    }
    assert found == {"f16": [], "bf16": [75], "f8e4m3fn": [75, 80, 86], "i4": [75]}
    assert [t.sm for t in map(Target, SHARED) if lacks(t, "f4e2m1fn_x2")] == [75, 80, 86, 89, 90]
    assert lacks(PTX, "f8e5m2")


def test_usable() -> None:
    used = [("aten.mm.default", "f16"), ("aten.mul.Tensor", "f8e4m3fn")]
    assert [str(target) for target in usable(PORTABLE, used, explicit=False)] == ["sm_89", "sm_90", "sm_120"]
    with pytest.raises(SettingsError, match=r"aten.mul.Tensor computes in f8e4m3fn, which sm_80 lacks"):
        usable(PORTABLE, used, explicit=True)
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
