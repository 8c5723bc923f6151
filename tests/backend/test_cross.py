"""Engines that are bound to a platform: what they bring along, and where they load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from torch_rtx import CompilationSettings, platforms
from torch_rtx.cli.app import app
from torch_rtx.errors import EngineFormatError, EnginePlatformError, SettingsError
from torch_rtx.targets import PORTABLE

ARGS = (torch.ones(2, 4),)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def made() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What the command line builds."""
    return model(), ARGS


def on(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(platforms, "here", lambda: platform)


def test_names() -> None:
    assert platforms.here() in platforms.PLATFORMS
    assert platforms.runs_here("any")
    assert not platforms.runs_here("plan9")


@pytest.mark.parametrize("weights", [False, True])
def test_for_windows(weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has kernels although no GPU is here, stripped or not; it loads on Windows alone; anybody may look into it."""
    settings = CompilationSettings(targets=["RTX 3090", "RTX 5090"], strip_weights=not weights)
    module = torch_rtx.cross_compile_for_windows(model(), ARGS, settings=settings)
    assert {str(target) for target in module.engine.kernels.targets} == {"sm_86", "sm_120"}
    torch.testing.assert_close(module(*ARGS), model()(*ARGS))  # in this process it is a module like any other
    path = tmp_path / "model.rtx"
    torch_rtx.save_cross_compiled_exported_program(module, path)
    assert torch_rtx.inspect(path).manifest.platform == "windows"
    assert "platform windows" in str(torch_rtx.inspect(path))
    drivers = torch_rtx.inspect(path).drivers  # of the assembler that made the kernels of each target
    assert drivers.keys() == {"sm_86", "sm_120"}
    assert f"drivers of CUDA {drivers['sm_120']} or later" in str(torch_rtx.inspect(path))
    assert torch_rtx.check_engine(path, "RTX 5090").validity == torch_rtx.Validity.VALID
    for load in (torch_rtx.load, torch_rtx.load_cross_compiled_exported_program):
        on(monkeypatch, "linux")
        with pytest.raises(EnginePlatformError, match="model.rtx was built for windows, and this is linux"):
            load(path)
        on(monkeypatch, "windows")
        loaded = load(path, weights=None if weights else model())
        torch.testing.assert_close(loaded(*ARGS), model()(*ARGS))
    assert issubclass(EnginePlatformError, EngineFormatError)


def test_default_targets_are_portable() -> None:
    module = torch_rtx.cross_compile_for_windows(nn.ReLU(), ARGS)
    assert set(module.engine.kernels.targets) == set(PORTABLE)
    settings = CompilationSettings(platform="windows", device="cuda", targets=None)
    assert not torch_rtx.compile(nn.ReLU(), ARGS, settings=settings).engine.kernels
    on_cpu = torch_rtx.compile(nn.ReLU(), ARGS, settings=CompilationSettings(platform="windows"))
    assert not on_cpu.engine.kernels  # the CPU runs none


def test_a_file_for_any_platform_loads_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.rtx"
    torch_rtx.save(torch_rtx.compile(model(), ARGS), path)
    for platform in ("linux", "windows", "darwin"):
        on(monkeypatch, platform)
        torch.testing.assert_close(torch_rtx.load(path, model())(*ARGS), model()(*ARGS))


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="option platform must be 'any' or 'linux' or 'windows', not 'win32'"):
        CompilationSettings(platform="win32")
    with pytest.raises(SettingsError, match="the platform of the settings is linux, not windows"):
        torch_rtx.cross_compile_for_windows(model(), ARGS, settings=CompilationSettings(platform="linux"))
    with pytest.raises(SettingsError, match="was not built for another platform"):
        torch_rtx.save_cross_compiled_exported_program(torch_rtx.compile(model(), ARGS), tmp_path / "model.rtx")
    with pytest.raises(SettingsError, match="platform"):
        torch.compile(model(), backend="rtx", options={"platform": "windows"})(*ARGS)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["build", f"{__name__}:made", "--platform", "windows", "--target", "sm_89"]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "model.rtx")])
    assert done.exit_code == 0, done.output
    found = torch_rtx.inspect(tmp_path / "model.rtx")
    assert (found.manifest.platform, list(found.kernels)) == ("windows", ["sm_89"])
    on(monkeypatch, "linux")
    done = CliRunner().invoke(app, ["run", str(tmp_path / "model.rtx")])
    assert (done.exit_code, "was built for windows" in done.output) == (1, True)
