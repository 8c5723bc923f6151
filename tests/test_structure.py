"""The structure of the package: who imports whom, no cycles, short files and functions, public names documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.sources import nodes, parsed
from tests.paths import ENGINES, ROOT

PACKAGE = ROOT / "torch_rtx"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 600, 60


def _arrows() -> dict[str, set[str]]:
    """Each part of the package and the parts that it may import, as docs/architecture.md has them."""
    (_, text) = (ROOT / "docs" / "architecture.md").read_text().split("## The parts", 1)
    rows = [line.split("|")[1:-1] for line in text.split("\n## ", 1)[0].splitlines() if line.startswith("| `")]
    return {part.strip(" `"): set(re.findall(r"`([^`]+)`", imported)) for part, _, imported in rows}


ARROWS = _arrows()

# Modules that still import each other, below TYPE_CHECKING.


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    inner = module.split(".")[1:]
    return "lowering.kernels" if inner[:2] == ["lowering", "kernels"] else (inner or ["__init__"])[0]


@cache
def module_names() -> set[str]:
    return {module_of(file) for file in FILES}


@cache
def imports(path: Path, types: bool = False) -> set[str]:
    """The modules of the package that a file imports; with `types` also those below TYPE_CHECKING."""
    found = set()
    modules = module_names()
    checkers = [n for n in nodes(path) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    for_checkers = set() if types else {id(inner) for node in checkers for inner in ast.walk(node)}
    for node in nodes(path):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in for_checkers:
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                whole = [f"{node.module}.{name}" for name in names]
                names = [name if name in modules else str(node.module) for name in whole]
            found |= {name for name in names if name.split(".")[0] == "torch_rtx"}
    return found


@pytest.mark.quick
def test_arrows() -> None:
    wrong = []
    for module, path in ((module_of(path), path) for path in FILES):
        own = part_of(module)
        others = {other for other in imports(path) if part_of(other) not in {own, *ARROWS[own]}}
        wrong += [f"{module} must not import {other}" for other in others]
    assert wrong == []


@pytest.mark.quick
def test_every_part_has_its_arrows() -> None:
    assert {part_of(module_of(path)) for path in FILES} == set(ARROWS)


def cycles() -> set[frozenset[str]]:
    """The sets of modules that import each other, directly or through others; a type that is named counts, too."""
    graph = {module_of(path): imports(path, types=True) for path in FILES}

    def reached(module: str) -> set[str]:
        found: set[str] = set()
        pending = [module]
        while pending:
            new = graph[pending.pop()] - found
            found |= new
            pending += new
        return found

    reach = {module: reached(module) for module in graph}
    circles = ({other for other in reach[module] if module in reach[other]} for module in graph)
    return {frozenset(circle) for circle in circles if circle}


def test_no_cycles() -> None:
    """A cycle that is gone has to be taken off the list."""
    assert cycles() == set()


@pytest.mark.quick
def test_lengths() -> None:
    long = [f"{path} has {lines} lines" for path in FILES if (lines := path.read_text().count("\n")) > MAX_FILE]
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                long += [f"{path}: {node.name} has {length} lines"] * (length > MAX_FUNCTION)
    assert long == []


def without_docstring(tree: ast.Module) -> Iterator[str]:
    """The public names of a module that have no docstring, and the module itself."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                public = isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
                if public and not ast.get_docstring(inner):
                    yield f"{node.name}.{inner.name}"


@pytest.mark.quick
def test_public_names_are_documented() -> None:
    assert [f"{path}: {name} has no docstring" for path in FILES for name in without_docstring(parsed(path))] == []


@pytest.mark.quick
def test_passes_are_one_file_each() -> None:
    from torch_rtx.lowering.pipeline import PASSES, PIPELINE

    files = {path.stem for path in (PACKAGE / "lowering" / "passes").glob("*.py")} - {"__init__"}
    assert files == set(PASSES)
    assert [step.name for step in PIPELINE if step.name != "cse"] == [name for name in PASSES if name != "cse"]


# What each statement may not import; what follows imports more.
LIGHT = {
    "torch_rtx.inspect": ("torch", "triton"),
    f"torch_rtx.check_engine({str(ENGINES / 'v6' / 'kernel.rtx')!r})": ("torch", "triton"),
    "import torch_rtx.__main__": ("torch", "triton"),
    "torch_rtx.RtxError; torch_rtx.CompilationSettings()": ("torch", "triton"),
    "torch_rtx.Debugger; torch_rtx.runtime": ("torch", "triton"),
    "torch_rtx.load": ("torch._dynamo", "triton", "torch_rtx.lowering", "torch_rtx.backend"),
    "torch_rtx.runtime.weight_streaming": ("torch._dynamo", "triton", "torch_rtx.lowering", "torch_rtx.backend"),
    f"torch_rtx.load({str(ENGINES / 'v6' / 'mlp.rtx')!r})": ("torch._dynamo", "triton", "torch_rtx.backend"),
}


@pytest.mark.quick
def test_imports_are_light() -> None:
    lines = ["import sys, torch_rtx", "assert not {'torch', 'triton'} & {*sys.modules}"]
    for statement, absent in LIGHT.items():
        new = f"[n for n in {{*sys.modules}} - before if any(f'{{n}}.'.startswith(f'{{a}}.') for a in {absent!r})]"
        lines += ["before = {*sys.modules}", statement, f"assert not {new}, ({statement!r}, {new})"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


@pytest.mark.quick
def test_variables_are_read_in_settings_alone() -> None:
    for path in FILES:
        if path.name != "settings.py":
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path


def test_sm_versions_are_compared_in_targets_alone() -> None:
    """What depends on the SM version is asked of its record, so that a new one is one line."""
    sizes = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
    names = re.compile(r"\b(sm|target|capability|major|arch)\b")
    for path in FILES:
        for node in nodes(path) if path.name != "targets.py" else ():
            if isinstance(node, ast.Compare):
                numbers = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not (numbers & sizes and names.search(ast.unparse(node))), f"{path.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom) and node.module == "torch_rtx.targets":
                assert "ARCHES" not in {alias.name for alias in node.names}, path.name
