"""`torch-rtx targets`, `doctor` and `check`: what can be built for, what this machine has, and what fits it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.paths import ENGINES
from torch_rtx.cli import doctor
from torch_rtx.cli.app import app
from torch_rtx.errors import KernelError
from torch_rtx.lowering.kernels import toolchain
from torch_rtx.targets import ARCHES, gpus_of, parse_targets


def call(*given: str) -> Result:
    return CliRunner().invoke(app, list(given))


def test_targets() -> None:
    found = json.loads(call("targets", "--json").stdout)
    assert [row["target"] for row in found["targets"]] == [f"sm_{sm}" for sm in ARCHES]
    by_target = {row["target"]: row for row in found["targets"]}
    assert "rtx4090" in by_target["sm_89"]["gpus"]
    assert "f8e4m3fn" in by_target["sm_89"]["dtypes"]
    assert "bf16" not in by_target["sm_75"]["dtypes"]
    assert by_target["sm_120"]["portable"]


def test_every_name_means_its_targets() -> None:
    for sm in ARCHES:
        for name in gpus_of(sm):
            assert ARCHES[sm].target in parse_targets(name)


def test_targets_of_a_gpu() -> None:
    found = call("targets", "GeForce RTX 4090").stdout
    assert found.startswith("sm_89 (portable): ")
    assert "sm_90" not in found
    refused = call("targets", "RTX 9999")
    assert (refused.exit_code, "unknown target" in refused.output) == (1, True)


def test_doctor() -> None:
    done = call("doctor")
    assert done.exit_code == (1 if "  fault  " in done.output else 0)
    for text in ("torch_rtx", "kernel compiler", "engine cache", "runtime cache", f"torch {torch.__version__}"):
        assert text in done.output
    rows = json.loads(call("doctor", "--json").stdout)
    assert {row["state"] for row in rows} <= {"ok", "missing", "fault"}
    assert all(row["remedy"] for row in rows if row["state"] != "ok")


def test_check(tmp_path: Path) -> None:
    path = ENGINES / "v6" / "kernel.rtx"
    done = call("check", str(path), "--gpu", "RTX 4090")
    assert (done.exit_code, done.output) == (0, "VALID for sm_89\n")
    (tmp_path / "cut.rtx").write_bytes(path.read_bytes()[:100])
    done = call("check", str(tmp_path / "cut.rtx"), "--gpu", "RTX 4090", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["validity"], found["reasons"][0]["what"]) == (1, "INVALID", "format")
    for wrong in ([str(tmp_path / "no.rtx")], [str(path), "--gpu", "blackwell"]):
        refused = call("check", *wrong)
        assert (refused.exit_code, "error: " in refused.output) == (1, True)


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> list[doctor.Finding]:
    found = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=8 << 30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    return list(doctor._gpus())


@pytest.mark.parametrize(("sm", "state"), [((8, 9), "ok"), ((7, 0), "fault"), ((12, 9), "missing")])
def test_gpus(sm: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = gpu(monkeypatch, *sm)
    assert found.state == state
    assert bool(found.remedy) == (state != "ok")


def test_what_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise KernelError("no Triton", hint="install it")

    monkeypatch.setattr(toolchain, "versions", fail)
    (found,) = doctor._kernels()
    assert (found.state, found.text) == ("missing", "no Triton")
    assert found.remedy.startswith("install it; ")


def test_a_fault_hides_no_other_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[doctor.Finding]:
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor, "_gpus", fail)
    done = call("doctor")
    assert done.exit_code == 1
    assert "RuntimeError: broken" in done.output
    assert "engine cache" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="folders of Windows have no such modes")
def test_a_folder_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = doctor._folder("engine cache", "/nowhere/at/all")
    assert found.state == "fault"
    assert "TORCH_RTX_CACHE_DIR" in found.remedy


def test_version() -> None:
    from torch_rtx.version import __version__

    assert call("--version").output == f"{__version__}\n"
