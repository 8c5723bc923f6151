"""`torch-rtx cache`: every command, its errors, and its exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import torch_rtx
from torch_rtx import CompilationSettings
from torch_rtx.cli.app import app
from torch_rtx.cli.cache import size_of


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["cache", *map(str, args)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A cache with two engines, and their keys, the older one first."""
    folder = tmp_path_factory.mktemp("cache")
    settings = CompilationSettings(engine_cache_dir=str(folder))
    found: list[str] = []
    for rows in (2, 3):
        torch_rtx.compile(nn.Linear(4, 4), (torch.ones(rows, 4),), settings=settings)
        found += [path.stem for path in (folder / "engines").iterdir() if path.stem not in found]
    return folder, found


@pytest.fixture
def names(built: tuple[Path, list[str]], cache_folder: Path) -> list[str]:
    """The keys of the engines in the test's own cache."""
    shutil.copytree(built[0], cache_folder)
    return built[1]


def test_ls(names: list[str], cache_folder: Path) -> None:
    lines = call("ls").stdout.splitlines()
    assert {line[:12] for line in lines[:2]} == {name[:12] for name in names}
    assert "engine" in lines[0]
    assert "1 aten.linear.default" in lines[0]
    assert lines[2].startswith("2 entries, ")
    assert str(cache_folder) in lines[2]
    assert {row["key"] for row in json.loads(call("ls", "--json").stdout)} == set(names)
    assert call("ls", "--dir", cache_folder).stdout == call("ls").stdout


@pytest.mark.parametrize("given", ["ls", "show a", "why a b", "prune", "verify", "export x", "import x"])
def test_folders_are_not_made_up(given: str, tmp_path: Path) -> None:
    """`--dir` is the folder of a cache; an import may make it, but not the folder that it is in."""
    done = call(*given.split(), "--dir", tmp_path / "none" / "absent")
    assert (done.exit_code, "there is no folder" in done.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_contradicting_options() -> None:
    assert call("prune", "--all", "--size", "5M").exit_code == 2


def test_show(names: list[str]) -> None:
    text = call("show", names[0][:6].upper()).stdout
    assert text.startswith(names[0])
    for line in ("  aten.linear.default: 1", "  2: float32[2, 4](4, 1) main", "  min_block_size: 1", "  device: cpu"):
        assert f"{line}\n" in text
    assert f"torch: {torch.__version__}" in text
    found = json.loads(call("show", names[0], "--json").stdout)
    assert found["key"] == names[0]
    assert list(found["parts"])[:3] == ["kind", "graph", "inputs"]


def test_why(names: list[str]) -> None:
    text = call("why", *names).stdout
    assert "inputs: " in text
    assert "float32[2, 4](4, 1) main -> float32[3, 4](4, 1) main" in text
    assert call("why", names[0], names[0]).stdout == "the same key\n"


def test_prune(names: list[str], cache_folder: Path) -> None:
    size = (cache_folder / "engines" / f"{names[1]}.rtxcache").stat().st_size
    assert call("prune").stdout.startswith("removed 0 entries")
    assert call("prune", "--size", size + 10).stdout.startswith("removed 1 entries")
    assert [path.stem for path in (cache_folder / "engines").iterdir()] == [names[1]]
    assert call("prune", "--all").stdout.endswith("0 are left\n")
    assert list((cache_folder / "engines").iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("10", 10), ("2k", 2048), ("1.5M", 3 << 19), ("1G", 1 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


def test_verify(names: list[str], cache_folder: Path) -> None:
    assert call("verify").stdout == "2 of 2 entries are intact\n"
    path = cache_folder / "engines" / f"{names[0]}.rtxcache"
    path.write_bytes(path.read_bytes()[:-1])
    result = call("verify")
    assert (result.exit_code, result.stdout) == (1, "1 of 2 entries are intact\n")
    assert f"damaged: entry {names[0]}" in result.stderr
    path.write_bytes(b"")
    assert "damaged" in call("ls").stdout


def test_export_and_import(names: list[str], tmp_path: Path, cache_folder: Path) -> None:
    assert call("export", tmp_path / "all.tar").stdout.startswith("2 entries")
    assert call("export", tmp_path / "one.tar", names[0][:8]).stdout.startswith("1 entries")
    assert call("import", tmp_path / "one.tar", "--dir", tmp_path / "other").exit_code == 0
    assert call("import", tmp_path / "all.tar", "--dir", tmp_path / "other").stdout.startswith("2 entries")
    for path in (cache_folder / "engines").iterdir():
        assert (tmp_path / "other" / "engines" / path.name).read_bytes() == path.read_bytes()


ERRORS: dict[str, tuple[tuple[Any, ...], str]] = {
    "no such key": (("show", "123"), "no entry begins with '123'"),
    "no key at all": (("show", "xyz"), "no entry begins with 'xyz'"),
    "not unique": (("show", ""), "2 entries begin with ''"),
    "size": (("prune", "--size", "much"), "'much' is not a size"),
    "endless size": (("prune", "--size", "inf"), "'inf' is not a size"),
    "no file": (("import", "absent.tar"), "No such file"),
    "no archive": (("import", __file__), "is not an archive of entries"),
    "no folder": (("export", "absent/all.tar"), "No such file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, message = ERRORS[name]
    result = call(*args)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own_without_torch(names: list[str]) -> None:
    code = "import sys; sys.modules['torch'] = None; from torch_rtx.cli.app import app; app()"
    done = subprocess.run([sys.executable, "-c", code, "cache", "ls"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("engine ") == 2
