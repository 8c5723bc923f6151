"""What MkDocs does beside its configuration: pages that are made of other files of the repository.

Files such as CONTRIBUTING.md become pages, and links to them lead there. The page of docstrings is made of the
public names, so that none is forgotten.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
QUANTIZATION = "torch_rtx.quantization"
SECTIONS = ("Functions", "Classes", "Errors", "Quantization")


def reference() -> str:
    """The page of docstrings, as Markdown for mkdocstrings."""
    sys.path.insert(0, str(ROOT))
    import torch_rtx  # loads no other part of the package, and no torch

    homes = {name: home for home, names in torch_rtx._HOMES.items() for name in names}
    found: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name in torch_rtx.__all__:
        home = homes[name]
        section = "Errors" if home == "torch_rtx.errors" else "Classes" if name[0].isupper() else "Functions"
        found[section].append(f"{home}.{name}")
    text = (ROOT / "torch_rtx" / "quantization" / "__init__.py").read_text()
    names = re.search(r"__all__ = \[(.*?)\]", text, re.DOTALL)
    found["Quantization"] = [f"{QUANTIZATION}.{name}" for name in re.findall(r'"(\w+)"', names[1] if names else "")]
    lines = ["# Docstrings", "", "This page says what each [public name](api.md) takes, returns and raises.", ""]
    for section, paths in found.items():
        lines += [f"## {section}", "", *(f"::: {path}\n" for path in paths)]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    texts = {name.lower(): (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    for name, text in {**texts, "reference.md": reference()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the repository into links to their pages."""
    above = r"(?:docs/)?" if page.file.src_uri in map(str.lower, PAGES) else r"\.\./"
    names = "|".join(map(re.escape, PAGES))
    markdown = re.sub(rf"\]\({above}((?:\.\./)*)({names})", lambda link: f"]({link[1]}{link[2].lower()}", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)
