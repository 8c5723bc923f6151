"""What Windows needs: the rules that all tests enforce (see `windows_rules`), and no call that it lacks."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_rtx
from tests.helpers.sources import nodes, parsed
from tests.paths import ROOT

FILES = sorted((ROOT / "torch_rtx").rglob("*.py"))
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
CALLS = {
    "os": {
        *("chown", "chroot", "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid", "getpgrp", "getuid"),
        *("killpg", "lchown", "mkfifo", "nice", "openpty", "sched_getaffinity", "setpgid", "setsid", "sysconf"),
        *("uname", "wait", "waitpid", "register_at_fork", "getloadavg", "statvfs", "fchmod", "fchown", "setpriority"),
        *("memfd_create", "sendfile", "posix_fallocate", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC"),
    },
    "signal": {"SIGKILL", "SIGALRM", "SIGHUP", "SIGCHLD", "alarm", "setitimer", "pthread_sigmask"},
    "select": {"poll", "epoll"},
    "socket": {"AF_UNIX"},
}
GUARDS = re.compile(r"hasattr\(|sys\.platform|os\.name\b|except \(?.*(ImportError|AttributeError|OSError)")


def posix_only(nodes: Iterable[ast.AST]) -> list[ast.AST]:
    """Imports and attributes that Windows lacks, and paths that only Linux has."""
    found: list[ast.AST] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [node] if any(alias.name in MODULES for alias in node.names) else []
        elif isinstance(node, ast.ImportFrom):
            found += [node] if node.module in MODULES else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node] if node.attr in CALLS.get(node.value.id, ()) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node] if node.value.startswith(("/proc/", "/dev/", "/tmp/")) else []
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_that_windows_lacks(path: Path) -> None:
    """Where there is one, the function that has it, or the condition around it, asks first, or catches what Windows
    says."""
    source = path.read_text()
    parts: list[ast.FunctionDef | ast.If] = [node for node in nodes(path) if isinstance(node, ast.FunctionDef)]
    parts += [node for node in parsed(path).body if isinstance(node, ast.If)]
    for node in posix_only(nodes(path)):
        line: int = node.lineno  # type: ignore[attr-defined]
        around = [part for part in parts if part.lineno <= line <= (part.end_lineno or part.lineno)]
        assert around, f"{path.name}:{line} runs on import"
        inner = ast.get_source_segment(source, max(around, key=lambda f: f.lineno)) or ""
        assert GUARDS.search(inner), f"{path.name}:{line} is for POSIX alone, and nothing asks for it"


def test_the_workflow_runs_what_there_is() -> None:
    named = re.findall(r"\btests/[\w/.]*\w", (ROOT / ".github" / "workflows" / "windows.yml").read_text())
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_lint_finds_them() -> None:
    text = "import fcntl\nos.fork()\nos.path\nsignal.SIGKILL\nopen('/proc/self/maps')\nos.kill"
    found = posix_only(ast.walk(ast.parse(text)))
    assert len(found) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the rules are enforced on Linux; Windows has its own")
def test_the_rules_hold_for_the_package(tmp_path: Path) -> None:
    """`save` can't replace a file that somebody has open, and says so; the old file stays."""
    module = torch_rtx.compile(nn.Linear(4, 3), (torch.ones(2, 4),))
    path = tmp_path / "model.rtx"
    torch_rtx.save(module, path)
    before = path.read_bytes()
    with path.open("rb"), pytest.raises(PermissionError, match="Windows"):
        torch_rtx.save(module, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.rtx"]
    torch_rtx.save(module, path)
    for name in ("aux.rtx", "a?.rtx", "model.rtx."):
        with pytest.raises(OSError, match="Windows"):
            torch_rtx.save(module, tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="the rules are enforced on Linux; Windows has its own")
def test_a_mapped_engine_stays(tmp_path: Path) -> None:
    """What `load(mmap=True)` has mapped, Windows does not replace until the module is gone."""
    path = tmp_path / "model.rtx"
    settings = torch_rtx.CompilationSettings(strip_weights=False)
    model = nn.Linear(64, 64)
    torch_rtx.save(torch_rtx.compile(model, (torch.ones(2, 64),), settings=settings), path)
    loaded = torch_rtx.load(path, mmap=True)
    with pytest.raises(PermissionError, match="Windows"):
        torch_rtx.save(loaded, path)
    torch.testing.assert_close(loaded(torch.ones(2, 64)), model(torch.ones(2, 64)))
