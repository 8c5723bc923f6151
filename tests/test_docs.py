"""docs/ says what the code says: settings, public names, error messages, the IR example."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

import torch_rtx
from tests.paths import ROOT
from torch_rtx import settings
from torch_rtx.ir import verify
from torch_rtx.irparse import parse
from torch_rtx.lowering.pipeline import PIPELINE, REQUIRED

DOCS = ROOT / "docs"


def table_in(page: str) -> str:
    """The first table of a page."""
    lines = (DOCS / page).read_text().splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("|"))
    return "".join(lines[start:end])


@pytest.mark.quick
def test_settings_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_RTX_DUMP", "TORCH_RTX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert table_in("settings.md") == settings.table()


def test_settings_name_passes_and_modes() -> None:
    text = (DOCS / "settings.md").read_text()
    named = re.search(r"`disabled_passes` can name are (.*?);", text, re.DOTALL)
    assert named is not None
    assert re.findall(r"`(\w+)`", named[1]) == [name for name in PIPELINE if name not in REQUIRED]
    assert all(f"`{mode}`" in text for mode in settings.MODES)


@pytest.mark.quick
def test_passes_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert rows == list(PIPELINE)


@pytest.mark.quick
def test_ir_example() -> None:
    """The graph in architecture.md is valid, and is written as the text form writes it."""
    examples = re.findall(r"^```\n(graph .*?)^```$", (DOCS / "architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 1
    graph = parse(examples[0])
    verify(graph)
    assert str(graph) == examples[0]


@pytest.mark.quick
@pytest.mark.parametrize("name", torch_rtx.__all__)
def test_public_name(name: str) -> None:
    """A public name has a docstring of its own and typed arguments, and docs/api.md speaks of it."""
    found = getattr(torch_rtx, name)
    assert found.__doc__
    assert not isinstance(found, type) or "__doc__" in vars(found)
    functions = [found]
    if isinstance(found, type):
        functions = [f for n, f in vars(found).items() if inspect.isfunction(f) and not n.startswith("_")]
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in list(signature.parameters.values())[isinstance(found, type) :]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{function}: {parameter}"
    assert f"`{name}" in (DOCS / "api.md").read_text()


def messages() -> str:
    """Every text in the package's code; what is put in at run time is a line end."""
    found = []
    for path in (ROOT / "torch_rtx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\n".join(str(p.value) for p in node.values if isinstance(p, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "\n", node.value))
    return "\n".join(found)


def headings() -> list[str]:
    """The messages that troubleshooting.md explains."""
    return re.findall(r"^#+ `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def test_messages_exist() -> None:
    """What troubleshooting.md explains is what the code says: each part between the places that vary."""
    source = messages()
    parts = [(heading, part.strip()) for heading in headings() for part in heading.split("…") if part.strip()]
    assert len(headings()) > 20
    assert [(heading, part) for heading, part in parts if part not in source] == []


def test_every_error_is_explained() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    errors = [name for name in torch_rtx.__all__ if isinstance(getattr(torch_rtx, name), type)]
    errors = [name for name in errors if issubclass(getattr(torch_rtx, name), torch_rtx.RtxError)]
    assert [name for name in errors if name != "Unsupported" and f"## {name}" not in text] == []
