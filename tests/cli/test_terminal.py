"""What the command line prints of files that others wrote."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.engine_files import forge
from tests.paths import ROOT
from torch_rtx.cache.entries import EngineCache
from torch_rtx.cache.key import Key, Part
from torch_rtx.cache.runtime import RuntimeCache
from torch_rtx.cache.runtime_file import DeviceKey
from torch_rtx.cache.store import FileStore
from torch_rtx.cli.app import app
from torch_rtx.cli.terminal import escaped

# Colours, a title of the window, a line that overwrites the one before it, text from right to left, half a character.
HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\x9b2J\u202eabc\ud800é"
SHOWN = "\\x1b[31mred\\x1b]0;title\\x07\\r\\x9b2J\\u202eabc\\ud800é"


def call(*args: object) -> Any:
    return CliRunner().invoke(app, list(map(str, args)))


def test_escaped() -> None:
    assert escaped(HOSTILE) == SHOWN
    assert escaped("é 日本 ✓\n\tplain") == "é 日本 ✓\n\tplain"
    assert escaped("\0\x7f\u2028") == "\\x00\\x7f\\u2028"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Its names and values are hostile."""

    def edit(inner: dict[str, Any]) -> None:
        manifest = inner["manifest"]
        manifest["producer"] = {HOSTILE: HOSTILE}
        manifest["inputs"], manifest["platform"] = [HOSTILE], HOSTILE
        manifest["signature"] = [math.nan, math.inf, HOSTILE]

    return forge(tmp_path / "engine.rtx", edit)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Caches with hostile entries."""
    cache = EngineCache(FileStore(tmp_path / "engines", 10**6))
    for text in ("nodes: 1", "nodes: 2"):
        cache.put(Key({"kind": Part.of(HOSTILE), "graph": Part.of(text), HOSTILE: Part.of(f"a: {HOSTILE}")}), b"")
    runtime = RuntimeCache(tmp_path / "runtime.sqlite", DeviceKey(HOSTILE[:-2], 89, 13000, HOSTILE[:-2]))
    runtime.put("kernel", "a", b"a")
    runtime.close()
    return tmp_path


@pytest.mark.parametrize(
    "command", ["inspect", "inspect --json", "ls", "ls --json", "show", "show --json", "why", "info", "info --json"]
)
def test_terminals_obey_no_file(command: str, engine: Path, folder: Path) -> None:
    command, *options = command.split()
    names = [path.stem for path in (folder / "engines").iterdir()]
    args: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", engine),
        "ls": ("cache", "ls", "--dir", folder),
        "show": ("cache", "show", names[0], "--dir", folder),
        "why": ("cache", "why", *names, "--dir", folder),
        "info": ("cache", "runtime", "info", "--file", folder / "runtime.sqlite"),
    }
    result = call(*args[command], *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    if options:
        found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert repr(HOSTILE[:-2])[1:-1] in repr(found)
    else:
        assert SHOWN[:-7] in result.stdout or command == "why"


def test_errors_are_escaped(tmp_path: Path) -> None:
    result = call("inspect", tmp_path / "\x1b[31m.rtx")
    assert result.exit_code == 1
    assert "\\x1b[31m.rtx" in result.stderr
    assert "\x1b[31m." not in result.stderr


def test_an_output_that_has_few_characters(engine: Path) -> None:
    """A terminal or a pipe of another encoding."""
    command = [sys.executable, "-m", "torch_rtx", "inspect", engine]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert SHOWN.replace("é", "\\xe9").encode() in done.stdout


def test_everything_is_printed_here() -> None:
    """The one way to print is the one that escapes."""
    files = {path.name: path.read_text() for path in (ROOT / "torch_rtx" / "cli").glob("*.py")}
    assert "secho(" in files.pop("terminal.py")
    for name, text in files.items():
        assert "secho(" not in text, name
        assert not re.search(r"(?<![.\w])print\(", text.replace("print(trtexec.table()", "")), name
        assert text.count("console.print(") == text.count("console.capture("), name
