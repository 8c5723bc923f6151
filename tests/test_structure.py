"""The structure of the package: who imports whom, no cycles, short files and functions, public names documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ENGINES, ROOT

PACKAGE = ROOT / "torch_rtx"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 600, 60
# Each part of the package and the parts that it may import; docs/architecture.md draws the same.
ARROWS = {
    "errors": set(),
    "artefacts": {"errors"},
    "dtypes": set(),
    "files": set(),
    "serialization": {"dtypes"},
    "optable": set(),
    "chips": {"dtypes"},
    "targets": {"chips", "errors"},
    "platforms": set(),
    "progress": set(),
    "peers": set(),
    "machine": {"platforms"},
    "settings": {"errors", "peers", "platforms", "targets"},
    "ir": {"dtypes", "errors"},
    "irparse": {"dtypes", "errors", "ir"},
    "op_work": {"dtypes", "ir"},
    "detection": set(),
    "attention_gradients": set(),
    "grouped_mm": set(),
    "foreign": {"errors", "ir", "optable"},
    "foreign_op": {"foreign"},
    "scaled_mm": {"block_formats", "dtypes", "ir", "op_work"},
    "accumulation": {"foreign", "ir"},
    "host_ops": set(),
    "block_formats": set(),
    "aten": {
        "attention_gradients",
        "detection",
        "foreign_op",
        "grouped_mm",
        "scaled_mm",
        "dtypes",
        "errors",
        "host_ops",
        "ir",
        "optable",
    },
    "profiles": {"errors", "ir"},
    "manifest": {"errors", "profiles"},
    "tactics": {"errors", "ir", "irparse", "manifest", "optable", "targets"},
    "tactics_v4": {"ir", "manifest", "tactics", "targets"},
    # aten inside `save` alone: it needs torch
    "engine": {
        *("dtypes", "errors", "ir", "irparse", "optable", "profiles", "manifest", "tactics", "tactics_v4", "aten"),
        *("accumulation", "files", "serialization"),
    },
    "inspection": {"engine", "foreign", "ir", "machine", "manifest", "op_work", "profiles", "tactics", "targets"},
    "validity": {
        *("engine", "errors", "foreign", "ir", "machine", "manifest", "platforms", "profiles", "tactics", "targets"),
    },
    "cache": {"errors", "files"},
    "lowering": {
        *("accumulation", "dtypes", "errors", "foreign", "ir", "op_work", "optable", "aten", "settings", "targets"),
        "lowering.kernels",
    },
    # no torch: workers of a build start fast without it
    "lowering.kernels": {
        *("accumulation", "artefacts", "chips", "dtypes", "errors", "foreign", "ir", "op_work", "targets", "tactics"),
    },
    "runtime": {
        *("errors", "ir", "irparse", "optable", "op_work", "aten", "settings", "targets", "profiles", "manifest"),
        *("accumulation", "dtypes", "tactics", "engine", "cache", "artefacts", "onnx", "platforms", "version", "files"),
        *("chips", "foreign"),
    },
    "onnx": {"detection", "errors"},
    "backend": {
        *("errors", "ir", "irparse", "aten", "settings", "targets", "profiles", "tactics", "engine", "cache"),
        *("lowering", "lowering.kernels", "onnx", "runtime", "version", "artefacts", "platforms", "progress"),
        *("attention_gradients", "foreign", "serialization"),
    },
    "cli": {
        *("errors", "ir", "irparse", "aten", "settings", "targets", "profiles", "engine", "cache", "inspection"),
        *("lowering", "lowering.kernels", "onnx", "runtime", "backend", "version", "platforms", "progress"),
        *("chips", "quantization", "validity"),
    },
    "quantization": {"errors", "progress"},  # a layer for users, on torch alone
    # modules that an application imports, one for each library; backend inside of what builds engines alone
    "integrations": {"aten", "backend", "cache", "errors", "ir", "runtime", "settings"},
    "version": set(),
    "__main__": {"cli"},
    "__init__": {"version"},  # its other imports are for type checkers, and lazy
}

# Modules that still import each other, below TYPE_CHECKING.


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    inner = module.split(".")[1:]
    return "lowering.kernels" if inner[:2] == ["lowering", "kernels"] else (inner or ["__init__"])[0]


@cache
def imports(path: Path, types: bool = False) -> set[str]:
    """The modules of the package that a file imports; with `types` also those below TYPE_CHECKING."""
    found = set()
    modules = {module_of(file) for file in FILES}
    tree = ast.parse(path.read_text())
    checkers = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    for_checkers = set() if types else {id(inner) for node in checkers for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in for_checkers:
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                whole = [f"{node.module}.{name}" for name in names]
                names = [name if name in modules else str(node.module) for name in whole]
            found |= {name for name in names if name.split(".")[0] == "torch_rtx"}
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows(path: Path) -> None:
    own = part_of(module_of(path))
    for imported in imports(path):
        other = part_of(imported)
        assert other == own or other in ARROWS[own], f"{module_of(path)} must not import {imported}"


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
@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_lengths(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    assert ast.get_docstring(inner), f"{node.name}.{inner.name} has no docstring"


@pytest.mark.quick
def test_passes_are_one_file_each() -> None:
    from torch_rtx.lowering.pipeline import PASSES, PIPELINE

    files = {path.stem for path in (PACKAGE / "lowering" / "passes").glob("*.py")} - {"__init__"}
    assert files == set(PASSES)
    assert len(PASSES) == len(PIPELINE)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import torch_rtx", ("torch", "triton")),
        ("import torch_rtx; torch_rtx.inspect", ("torch", "triton")),
        (f"import torch_rtx; torch_rtx.check_engine({str(ENGINES / 'v6' / 'kernel.rtx')!r})", ("torch", "triton")),
        ("import torch_rtx.__main__", ("torch", "triton")),
        ("import torch_rtx; torch_rtx.RtxError; torch_rtx.CompilationSettings()", ("torch",)),
        ("import torch_rtx; torch_rtx.Debugger; torch_rtx.runtime", ("torch",)),
        ("import torch_rtx; torch_rtx.runtime.weight_streaming", ("torch._dynamo", "triton", "torch_rtx.backend")),
        (f"import torch_rtx; torch_rtx.load({str(ENGINES / 'v6' / 'mlp.rtx')!r})", ("torch._dynamo", "triton")),
        ("import torch_rtx; torch_rtx.load", ("torch._dynamo", "triton", "torch_rtx.lowering", "torch_rtx.backend")),
    ],
)
def test_imports_are_light(statement: str, absent: tuple[str, ...]) -> None:
    check = f"{statement}; import sys; loaded = [m for m in {absent!r} if m in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


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
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "targets.py" else ():
            if isinstance(node, ast.Compare):
                numbers = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                assert not (numbers & sizes and names.search(ast.unparse(node))), f"{path.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.ImportFrom) and node.module == "torch_rtx.targets":
                assert "ARCHES" not in {alias.name for alias in node.names}, path.name
