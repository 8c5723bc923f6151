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
COPIED = ("torch_rtx", "benchmarks", "tests", "docs", "README.md", "pyproject.toml")
CHECK = "check"
# Files that each example touches.
FILES = {"an operator": 1, "a pass": 4, "a tactic": 2, "a target": 2}
# Of the structure, and of pages that the examples touch; each example has a check of what it does.
TESTS = ("tests/test_structure.py", "tests/test_docs.py")
NOT_TOUCHED = (
    *(f"tests/test_docs.py::{test}" for test in ("test_public_name", "test_paths_exist", "test_messages_exist")),
    "tests/test_structure.py::test_imports_are_light",
)


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


def changed(text: str, diff: str, title: str) -> str:
    """`text`, of the file `title`, after a diff whose hunks begin with `@@`, without numbers.

    The lines of a hunk that do not begin with `+` follow each other at one place of the text; of a line that ends with
    `…` the beginning does.
    """
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = [line or " " for line in hunk.splitlines()]
        assert all(line[0] in " +-" for line in lines), hunk
        old = [line[1:] for line in lines if line[0] != "+"]
        pattern = "".join(re.escape(line.removesuffix("…")) + ".*" * line.endswith("…") + "\n" for line in old)
        places = list(re.finditer(f"^{pattern}", text, re.MULTILINE))
        assert len(places) == 1, (
            f"the example of CONTRIBUTING.md for {title} does not fit: the file has these lines {len(places)} times; "
            "write lines there that it has once:\n" + "\n".join(old)
        )
        there = iter(places[0][0].splitlines())
        kept = ((line[0], line[1:] if line[0] == "+" else next(there)) for line in lines)
        new = "".join(f"{line}\n" for mark, line in kept if mark != "-")
        text = text[: places[0].start()] + new + text[places[0].end() :]
    return text


def copy(folder: Path) -> None:
    """Copies to `folder` what the examples need, with bytecode, whose writers leave files for a moment."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.pyc.*", "results"))
        else:
            shutil.copy(source, folder / name)


def change(example: str, folder: Path) -> None:
    """Does to a copy what the blocks of an example say."""
    for block in blocks(example):
        path = folder / block.title
        if block.language == "diff":
            path.write_text(changed(path.read_text(), block.text, block.title))
        elif block.title != CHECK:
            assert not path.exists(), path
            path.write_text(block.text)


def run(folder: Path, *command: str) -> None:
    """Runs a command in the copy, with this Python and the copy's package."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_change_is_whole() -> None:
    """An example says how many files it touches, and has one check of what it does."""
    assert re.findall(r"^## Add (.*)$", TEXT, re.MULTILINE) == list(FILES)
    for example, number in FILES.items():
        files = [block.title for block in blocks(example) if block.title != CHECK]
        assert len(set(files)) == len(files) == number
        check_of(example)


def check_of(example: str) -> Block:
    """The check below the changes."""
    (check,) = (block for block in blocks(example) if block.title == CHECK)
    return check


@pytest.fixture(scope="module")
def all_changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the changes of all examples."""
    folder = tmp_path_factory.mktemp("changed")
    copy(folder)
    for example in FILES:
        change(example, folder)
    return folder


def test_examples(all_changed: Path) -> None:
    """Their checks; those in Python in one process, since importing PyTorch takes longer than most of them."""
    code = f"import torch_rtx\nassert torch_rtx.__file__.startswith({str(all_changed)!r})\n"
    for check in map(check_of, FILES):
        if check.language == "sh":
            run(all_changed, "bash", "-ec", check.text)
        else:
            code += f"exec({check.text!r}, {{}})\n"
    run(all_changed, sys.executable, "-c", code)


def test_a_change_that_does_not_fit() -> None:
    text = "a = 1\nb = [2, 3]\nb = 4\n"
    assert changed(text, " a = 1\n+c = 5\n-b = […\n", "x.py") == "a = 1\nc = 5\nb = 4\n"
    for diff, times in (("+d\n e = 6\n", 0), ("+d\n b = …\n", 2)):
        with pytest.raises(AssertionError, match=rf"for x\.py does not fit: .* {times} times; .*:\s+[be] = "):
            changed(text, diff, "x.py")


def test_examples_follow_the_rules(all_changed: Path) -> None:
    """By the structure test, the tests of pages, and the linters."""
    left_out = (f"--deselect={test}" for test in NOT_TOUCHED)
    run(all_changed, sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *left_out, *TESTS)
    run(all_changed, "ruff", "check", "torch_rtx")
    run(all_changed, "ruff", "format", "--check", "torch_rtx")
