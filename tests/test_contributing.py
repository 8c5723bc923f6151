"""The examples of CONTRIBUTING.md: each is applied to a copy of the package, and its check runs there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
COPIED = ("torch_rtx", "benchmarks", "tests", "pyproject.toml")
CHECK = "check"
# Files that each example touches.
FILES = {"an operator": 1, "a pass": 3, "a tactic": 1, "a target": 1}


@dataclass(frozen=True)
class Block:
    """A fenced block with a title: the contents of a new file, a change of a file, or a check."""

    language: str
    title: str
    text: str


def blocks(example: str) -> list[Block]:
    """The titled blocks below the heading `## Add EXAMPLE`."""
    section = re.search(rf"^## Add {example}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section is not None
    found = re.findall(r'^```(\w+) title="(.+?)"\n(.*?)^```$', section[1], re.MULTILINE | re.DOTALL)
    return [Block(*groups) for groups in found]


def changed(text: str, diff: str) -> str:
    """`text` after a diff whose hunks begin with `@@`, without numbers: what stands in a hunk is in the text once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-\n" for line in lines), hunk
        old, new = ("".join(line[1:] or line for line in lines if line[0] != mark) for mark in "+-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def copy(folder: Path) -> None:
    """Copies to `folder` what the examples need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "engines", "results"))
        else:
            shutil.copy(source, folder / name)


def change(example: str, folder: Path) -> None:
    """Does to a copy what the blocks of an example say."""
    for block in blocks(example):
        path = folder / block.title
        if block.language == "diff":
            path.write_text(changed(path.read_text(), block.text))
        elif block.title != CHECK:
            assert not path.exists(), path
            path.write_text(block.text)


def run(folder: Path, *command: str) -> None:
    """Runs a command in the copy, with this Python and the copy's package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", FILES)
def test_example(example: str, tmp_path: Path) -> None:
    found = blocks(example)
    files = [block.title for block in found if block.title != CHECK]
    (check,) = (block for block in found if block.title == CHECK)
    assert len(set(files)) == len(files) == FILES[example]
    copy(tmp_path)
    change(example, tmp_path)
    if check.language == "sh":
        run(tmp_path, "bash", "-ec", check.text)
    else:
        mine = f"import torch_rtx\nassert torch_rtx.__file__.startswith({str(tmp_path)!r})\n"
        run(tmp_path, sys.executable, "-c", mine + check.text)


def test_examples_follow_the_rules(tmp_path: Path) -> None:
    """All of them together, by the structure test and the linters."""
    assert re.findall(r"^## Add (.*)$", TEXT, re.MULTILINE) == list(FILES)
    copy(tmp_path)
    for example in FILES:
        change(example, tmp_path)
    run(tmp_path, sys.executable, "-m", "pytest", "-q", "-m", "quick", "tests/test_structure.py")
    run(tmp_path, "ruff", "check", "torch_rtx")
    run(tmp_path, "ruff", "format", "--check", "torch_rtx")
