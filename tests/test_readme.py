"""What README.md and docs/ show works: each Python block runs in a process of its own, each command exists.

The tutorial is one session: its blocks run one after another, and so do its commands.
"""

from __future__ import annotations

import linecache
import os
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.forking import forked, say_to
from tests.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
ABOVE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]  # pages of the site, too
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, pages: Iterable[Path] = PAGES) -> list[Any]:
    """The code blocks of a language as test parameters, each called by page and line."""
    found = []
    for page in pages:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands() -> list[str]:
    """The shell commands that belong to this repository, without their comments."""
    pages = (*PAGES, *ABOVE)
    lines = [line.split("#")[0].strip() for block in blocks("sh", pages) for line in str(block.values[0]).splitlines()]
    inline = re.findall(r"(?<!`)`((?:make|python|torch-rtx) [^`]+)`", "\n".join(page.read_text() for page in pages))
    return sorted({line for line in (*lines, *inline) if line.split(" ")[0] in ("make", "python", "torch-rtx")})


def run_block(code: str, folder: Path, environment: dict[str, str]) -> None:
    """What `python -c` would do with a block, in a folder; what it says goes to the file `said` there."""
    os.environ.update(environment)
    os.chdir(folder)
    say_to(Path("said"))
    linecache.cache["<block>"] = len(code), None, code.splitlines(True), "<block>"  # for Triton, which reads sources
    exec(compile(code, "<block>", "exec"), vars(sys.modules["__main__"]))


def run_session(text: str, folder: Path, environment: dict[str, str]) -> None:
    """What a reader does who types the blocks of a page into one session, and its commands into a shell."""
    run_block("", folder, environment)
    from typer.testing import CliRunner

    from torch_rtx.cli.app import app

    for match in BLOCK.finditer(text):
        if match[1] == "python":
            exec(compile(match[2], "<block>", "exec"), vars(sys.modules["__main__"]))
        for command in match[2].splitlines() if match[1] == "sh" else ():
            program, *words = shlex.split(command, comments=True)
            assert program == "torch-rtx", command
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{command}: {done.output}"


def test_tutorial(tmp_path: Path) -> None:
    process = forked(run_session, TUTORIAL.read_text(), tmp_path, dict(os.environ))
    process.join(120)
    process.kill()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "profile.html").exists()


@pytest.mark.parametrize("code", blocks("python", (page for page in PAGES if page != TUTORIAL)))
def test_block_runs(code: str, tmp_path: Path) -> None:
    process = forked(run_block, code, tmp_path, dict(os.environ))
    process.join(120)
    process.kill()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str) -> None:
    program, first, *rest = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{re.escape(first)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "torch-rtx":
        import typer

        from torch_rtx.cli.app import app
        from torch_rtx.cli.trtexec import translated

        found: Any = typer.main.get_command(app)
        (words,), _ = translated([first, *rest])  # of trtexec's flags, too
        while words and hasattr(found, "commands"):
            found = found.commands[words.pop(0)]
        flags = {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-") and word != "-"} <= flags  # "-": standard input
    elif first == "-m":
        assert find_spec(rest[0]) is not None
    elif first == "-c":
        modules = re.findall(r"\b(torch_rtx[\w.]*)", rest[0])
        assert compile(rest[0], command, "exec")
        assert all(find_spec(module) is not None for module in modules)
    else:
        assert (ROOT / first).is_file()


def test_by_hand(tmp_path: Path) -> None:
    """The tour of the stages runs, and its result agrees with eager's."""
    process = forked(run_block, (ROOT / "examples" / "by_hand.py").read_text(), tmp_path, dict(os.environ))
    process.join(120)
    process.kill()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0, said
    assert "8. against eager" in said


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub makes names of them that links can use."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_links() -> None:
    """Links to files of the repository lead somewhere, and so do those to a heading of a page."""
    for page in (*PAGES, *ABOVE):
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            path, _, heading = target.partition("#")
            if "://" not in target:
                other = page.parent / path if path else page
                assert other.exists(), f"{page.relative_to(ROOT)}: {target}"
                assert not heading or heading in anchors(other), f"{page.relative_to(ROOT)}: {target}"
