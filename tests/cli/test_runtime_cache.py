"""`torch-rtx cache runtime`: every command, its errors, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import torch_rtx
from tests.cache.test_runtime_cache import ADA, BLACKWELL, change, kernels
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cli.app import app
from torch_rtx.cli.cache import size_of

OLD = replace(ADA, versions="torch_rtx 0 [beta]")


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["cache", "runtime", *map(str, args)])


@pytest.fixture
def path(cache_folder: Path) -> Path:
    """The default file, with entries of two devices, and of other versions."""
    path = cache_folder / "runtime.sqlite"
    for device in (OLD, BLACKWELL, ADA):
        with closing(RuntimeCache(path, device)) as cache:
            cache.put("kernel", "a", bytes(30_000))
            cache.put("tactic", "a", b"config")
    return path


def test_info(path: Path) -> None:
    lines = call("info").stdout.splitlines()
    assert lines[0].split()[:5] == ["GPU", "SM", "driver", "kernels", "tactics"]
    assert [line.split("  ")[0].strip() for line in lines[1:4]] == [ADA.name, BLACKWELL.name, ADA.name]
    assert lines[1].split()[4:9] == ["89", "13000", "1", "1", "29.3"]
    assert "torch_rtx 0 [beta]" in lines[3]
    assert lines[4] == f"6 entries of 3 devices, 0.1 MiB, in {path}"
    found = json.loads(call("info", "--json").stdout)
    assert [held["device"] for held in found] == [asdict(device) for device in (ADA, BLACKWELL, OLD)]
    assert found[0]["counts"] == {"kernel": 1, "tactic": 1}
    assert call("info", "--file", path).stdout.splitlines() == lines


def test_no_file(cache_folder: Path) -> None:
    absent = cache_folder / "runtime.sqlite"
    assert call("info").stdout == f"0 entries of 0 devices, 0.0 MiB, in {absent}\n"
    assert call("prune").stdout == "removed 0 entries; 0 are left\n"
    assert call("clear").stdout == "removed 0 entries\n"
    assert not absent.exists()


def test_export_and_import(path: Path, tmp_path: Path) -> None:
    assert call("export", tmp_path / "all").stdout == f"6 entries in {tmp_path / 'all'}\n"
    assert call("export", tmp_path / "one", "--gpu", "rtx 5090").stdout.startswith("2 entries")
    result = call("import", tmp_path / "one", tmp_path / "all", "--file", tmp_path / "new")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["2", "4"]
    assert kernels(tmp_path / "new", "a", device=BLACKWELL) == [bytes(30_000)]
    assert sorted(os.listdir(tmp_path)) == ["all", "new", "one"]


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ((), 0),
        (("--size", "50K"), 3),
        (("--days", "1"), 0),
        (("--days", "0"), 6),
        (("--outdated",), 2),
        (("--gpu", "4090"), 4),
        (("--gpu", "5090", "--outdated"), 0),
        (("--gpu", "4090", "--outdated"), 2),
        (("--gpu", "4090", "--days", "0"), 4),
        (("--gpu", "4090", "--days", "1"), 0),
        (("--size", "0"), 6),
    ],
)
def test_prune(options: tuple[str, ...], removed: int, path: Path) -> None:
    assert call("prune", *options).stdout == f"removed {removed} entries; {6 - removed} are left\n"
    if options == ("--outdated",):
        assert kernels(path, "a", device=OLD) == [None]
        assert kernels(path, "a") == [bytes(30_000)]


def test_sizes() -> None:
    """Those of the options as well, in any case."""
    given = {"5": 5, "1.5K": 1536, "2m": 2 << 20, "3T": 3 << 40, "500MB": 500 * 10**6, "2 GiB": 2 << 30, "1gb": 10**9}
    assert {text: size_of(text) for text in given} == given


def test_generate_for_the_cpu(tmp_path: Path) -> None:
    engine = tmp_path / "cpu.rtx"
    torch_rtx.save(torch_rtx.compile(torch.nn.ReLU(), (torch.ones(3),)), engine)
    result = call("generate", engine, "--gpu", "RTX 4090", "--sm", 89, "--driver", 12080)
    assert result.exit_code == 1
    assert "was built for the cpu, which runs no kernels" in result.stderr


def test_verify(path: Path) -> None:
    assert call("verify").stdout == "6 of 6 entries are intact\n"
    change(path, "UPDATE entry SET value = x'00' WHERE kind = 'tactic'")
    result = call("verify")
    assert (result.exit_code, result.stdout) == (1, "3 of 6 entries are intact\n")


def test_clear(path: Path) -> None:
    """Entries, and damaged files, whether they were set aside or not."""
    aside = Path(f"{path}.damaged")
    aside.touch()
    user = RuntimeCache(path, ADA)
    assert user.get("kernel", "a") is not None
    assert call("clear").stdout == "removed 6 entries\n"
    user.put("kernel", "a", b"new")
    user.close()
    assert kernels(path, "a") == [b"new"]
    assert not aside.exists()
    path.write_bytes(b"x" * 5000)
    assert call("clear").stdout == "removed 0 entries\n"
    assert os.listdir(path.parent) == []


ERRORS: dict[str, tuple[tuple[Any, ...], str]] = {
    "no file": (("export", "new", "--file", "absent"), "there is no runtime cache"),
    "nothing to import": (("import", "absent"), "there is no runtime cache"),
    "no database": (("import", __file__), "file is not a database"),
    "off": (("info", "--file", "off"), "the runtime cache is off"),
    "size": (("prune", "--size", "much"), "'much' is not a size"),
    "unit": (("prune", "--size", "5 XB"), "'5 XB' is not a size"),
    "no folder": (("info", "--file", "none/a.sqlite"), "there is no folder of none/a.sqlite"),
    "sm": (("generate", "a.rtx", "--gpu", "x", "--sm", "999", "--driver", "12080"), "unknown target 999"),
    "verify": (("verify", "--file", "absent"), "there is no runtime cache"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, message = ERRORS[name]
    result = call(*args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: " in result.stderr
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own_without_torch(path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from torch_rtx.cli.app import app; app()"
    command = [sys.executable, "-c", code, "cache", "runtime", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NVIDIA") == 3
