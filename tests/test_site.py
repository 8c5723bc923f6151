"""The documentation site: what it is built from fits together. `make docs` builds it, with packages of its own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

import torch_rtx
from tests.paths import ROOT
from torch_rtx import quantization

DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text()


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation(hooks: Any) -> None:
    """Once each; the pages that are made of other files as well."""
    shown = re.findall(r"^ +- .+: (\S+\.md)$", CONFIG.partition("\nnav:\n")[2].partition("\n\n")[0], re.MULTILINE)
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    made = [*map(str.lower, hooks.PAGES), "reference.md"]
    assert sorted(shown) == sorted([*pages, *made]), "mkdocs.yml: list each page of docs/ once"


def test_every_public_name_is_on_the_page_of_docstrings(hooks: Any) -> None:
    names = re.findall(r"^::: ([\w.]+)$", hooks.reference(), re.MULTILINE)
    assert len(set(names)) == len(names)
    assert {name.rpartition(".")[2] for name in names} == {*torch_rtx.__all__, *quantization.__all__}
    for name in names:
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), name


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("architecture.md", "[a](../CONTRIBUTING.md#rules)", "[a](contributing.md#rules)"),
        ("architecture/training.md", "[a](../../CHANGELOG.md)", "[a](../changelog.md)"),
        (
            "contributing.md",
            "[a](CHANGELOG.md), [b](docs/debugging.md#dump)",
            "[a](changelog.md), [b](debugging.md#dump)",
        ),
        ("onnx.md", "[a](trust.md), [b](../README.md)", "[a](trust.md), [b](../README.md)"),
    ],
)
def test_links_to_files_above(hooks: Any, page: str, link: str, turned: str) -> None:
    """Links that hold in the repository hold on the site."""
    assert hooks.on_page_markdown(link, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, None) == turned


def test_pages_link_to_pages(hooks: Any) -> None:
    """What a page links to is a page, or a file that becomes one."""
    for path in DOCS.rglob("*.md"):
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if "://" not in target:
                other = (path.parent / target).resolve()
                assert other.is_relative_to(DOCS) or PurePosixPath(target).name in hooks.PAGES, f"{path}: {target}"
