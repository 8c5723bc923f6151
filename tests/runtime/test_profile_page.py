"""The page of a profile: it shows every node and what was measured, loads nothing, escapes what the model names, and in
a browser sorts, groups and filters without scrolling sideways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.profiles import made
from torch_rtx.runtime.profile_page import lanes
from torch_rtx.runtime.profiling import Profile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script></title><script>alert(\"x\")</script><img src=x onerror='alert(1)'>&amp;"


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects elements with their attributes, and texts by tag."""

    VOID = {"meta", "input", "wbr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        """The attributes of the elements of a tag, with a class."""
        found = [attributes for element, attributes in self.elements if element == tag]
        return [attributes for attributes in found if name in (attributes.get("class") or "")]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What the script knows of the nodes."""
        return list(json.loads(next(t for t in self.texts["script"] if t.startswith("{")))["rows"])


def written(profile: Profile, folder: Path, model: str | None = None) -> tuple[str, Page]:
    profile.html(folder / "page.html", model)
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def profile() -> Profile:
    """Nodes of every kind, in nested modules."""
    modules = ["stem", "body.0.norm", "body.0.mlp", "body.1.mlp", ""]
    found = made([(3.0,), (1.0,), (40.0,), (20.0,), (2.0,)], modules, [(), (0,), (1,), (2,), (0, 3)])
    kinds = ("extern", "kernel", "kernel", "view", "fallback")
    rows = tuple(replace(row, kind=kind) for row, kind in zip(found.rows, kinds, strict=True))
    return replace(found, rows=rows, about={"model": "Net", "versions": "torch 2.13.0"})


def test_page(profile: Profile, tmp_path: Path) -> None:
    text, page = written(profile, tmp_path)
    assert [node["data-i"] for node in page.all("div", "node")] == ["0", "1", "2", "3", "4"]
    edges = [(int(p["data-a"] or -1), int(p["data-b"] or -1)) for p in page.all("path")]
    assert edges == [(source, index) for index, row in enumerate(profile.rows) for source in row.inputs]
    assert [tr["data-i"] for tr in page.all("tr") if "data-i" in tr] == ["2", "3", "0", "4", "1"]  # the longest first
    assert ["where", "stem @ model.py:0"] in page.rows[0]["details"]
    # Nothing is loaded: no address anywhere but the names of namespaces.
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=|@import|url\(", text)


def test_what_was_measured(profile: Profile, tmp_path: Path) -> None:
    """Model, versions, device and sums, each with a unit, and a legend of every kind of node."""
    _, page = written(profile, tmp_path)
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert (facts["model"], facts["versions"], facts["device"]) == ("Net", "torch 2.13.0", "the CPU")
    assert (facts["5 nodes, medians of 1 runs"], facts["whole call"]) == ("66.0 µs", "100.0 µs")
    assert [item["class"] for item in page.all("li") if "class" in item] == ["kernel", "extern", "view", "fallback"]
    assert "<dt>model</dt><dd>m.rtx</dd>" in written(profile, tmp_path, "m.rtx")[0]


@pytest.mark.parametrize(
    ("factor", "unit", "longest"), [(1, "µs", "40.0"), (1e3, "ms", "40.000"), (1e6, "s", "40.000")]
)
def test_units(profile: Profile, tmp_path: Path, factor: float, unit: str, longest: str) -> None:
    rows = tuple(replace(row, times=tuple(factor * us for us in row.times)) for row in profile.rows)
    _, page = written(replace(profile, rows=rows), tmp_path)
    assert f"time, {unit}" in page.texts["button"]
    assert longest in page.texts["span"]
    assert longest in page.texts["td"]


def test_page_escapes(tmp_path: Path) -> None:
    hostile = made([(1.0,), (2.0,)], [HOSTILE, "b"], [(), (0,)])
    hostile = replace(hostile, rows=tuple(replace(row, operations=(HOSTILE,)) for row in hostile.rows), device=HOSTILE)
    text, page = written(hostile, tmp_path, HOSTILE)
    assert "<img" not in text
    assert text.count("<script") == 2
    assert not page.all("img")
    assert any(HOSTILE in t for t in page.texts["small"])
    assert sum(HOSTILE in t for t in page.texts["dd"]) == 2
    assert any(HOSTILE in value for _, value in page.rows[0]["details"])


def test_empty_and_large_pages(tmp_path: Path) -> None:
    nothing = Profile((), "the CPU", 1.0, 1.0, False)
    _, page = written(nothing, tmp_path)
    assert not page.all("div", "node")
    assert "0 nodes" in str(nothing)
    assert nothing.by_module().rows == ()
    chain = [(i - 1,) if i else () for i in range(1500)]
    times = [(float(i),) for i in range(1, 1501)]
    text, page = written(made(times, [f"layer.{i}" for i in range(1500)], chain), tmp_path)
    assert len(page.all("div", "node")) == 1500
    assert len(text) < 3_000_000


SCRIPT = """
const texts = selector => [...document.querySelectorAll(selector)].map(item => item.textContent);
const wide = [...document.querySelectorAll("html, main, section, table, #nodes")].filter(item =>
  item.scrollWidth > item.clientWidth + 1).map(item => item.id || item.tagName);
const seen = {wide, groups: texts(".group button"), sums: texts(".group .us"), first: texts("tbody .us")};
document.querySelector(".group button").click();
seen.folded = texts("tbody tr:not(.group) .us");
document.querySelector("#depth").value = "0";
document.querySelector("#depth").dispatchEvent(new Event("change"));
document.querySelector("[data-key=where]").click();
seen.where = texts("td.where");
document.querySelector("[data-key=us]").click();
document.querySelector("[data-key=us]").click();
seen.shortest = texts("td.us")[0];
seen.sort = document.querySelector("th.us").getAttribute("aria-sort");
document.querySelector("#filter").value = "body.1";
document.querySelector("#filter").dispatchEvent(new Event("input"));
seen.filtered = texts("td.us");
document.querySelectorAll(".node")[3].click();
seen.details = texts("#details dd");
seen.marked = [...document.querySelectorAll("path.on")].map(path => path.dataset.a + path.dataset.b);
document.title = JSON.stringify(seen);
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser(profile: Profile, tmp_path: Path) -> None:
    """What the script does, and that nothing is wider than its place, however narrow the window and long the names."""
    long = replace(profile.rows[0], operations=("linear", "gelu", "mul") * 40)
    profile = replace(profile, rows=(long, *profile.rows[1:]))
    text, _ = written(profile, tmp_path)
    frame = text.replace("</body>", f"<script>{SCRIPT}</script></body>").replace("&", "&amp;").replace('"', "&quot;")
    frames = "".join(f'<iframe width="{width}" height="700" srcdoc="{frame}"></iframe>' for width in (1500, 800, 400))
    titles = 'JSON.stringify(Array.from(document.querySelectorAll("iframe"), found => found.contentDocument.title))'
    ready = f"onload = () => document.title = {titles}"
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html>{frames}<script>{ready}</script>", encoding="utf-8")
    assert BROWSER is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chrome'}", "--dump-dom")
    command = [BROWSER, *options, (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title></head>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr
    for seen in map(json.loads, json.loads(unescape(title[1]))):
        assert seen["wide"] == []
        assert seen["groups"] == [
            "body.0, 2 nodes",
            "body.1, 1 node",
            "stem, 1 node",
            "(the model itself), 1 node",
        ]
        assert seen["sums"] == ["41.0", "20.0", "3.0", "2.0"]
        assert seen["first"] == ["41.0", "40.0", "1.0", "20.0", "20.0", "3.0", "3.0", "2.0", "2.0"]
        assert seen["folded"] == ["20.0", "3.0", "2.0"]
        assert seen["where"][:3] == ["@ model.py:4", "body.0.mlp @ model.py:2", "body.0.norm @ model.py:1"]
        assert (seen["shortest"], seen["sort"]) == ("1.0", "ascending")
        assert seen["filtered"] == ["20.0"]
        assert seen["details"][0] == "v3 = view aten.exp.default"
        assert sorted(seen["marked"]) == ["23", "34"]


def test_lanes() -> None:
    """A chain stays in one lane; what waits for a later reader keeps its own."""
    assert lanes([(), (0,), (1,)]) == [0, 0, 0]
    residual: list[tuple[int, ...]] = [(), (0,), (1,), (0, 2), (3,)]
    assert lanes(residual) == [0, 1, 1, 0, 0]
    assert lanes([(), (), (), (0, 1, 2)]) == [0, 1, 2, 0]
    assert lanes([(), (), ()]) == [0, 0, 0]  # nobody reads these


@pytest.mark.parametrize("seed", range(5))
def test_lanes_do_not_cross_nodes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs: list[tuple[int, ...]] = []
    for index in range(60):
        picked = torch.randint(0, max(index, 1), (3,), generator=generator).tolist()
        inputs.append(tuple(dict.fromkeys(picked)) if index else ())
    taken = lanes(inputs)
    for index, read in enumerate(inputs):
        for source in read:
            assert all(taken[between] != taken[source] for between in range(source + 1, index))
