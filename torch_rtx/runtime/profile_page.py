"""A profile as one HTML page: the graph in the order of execution, coloured by time, and a table.

The page loads nothing, and its content security policy forbids it to. The graph and the table are plain markup; the
script selects, sorts, groups and filters. Text from the model, such as module names, is escaped, and the script inserts
it as text. No width is fixed, so that nothing scrolls sideways: what is too long is cut off in the graph, where the
panel has it in full, and wrapped in the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch_rtx.runtime.profile_row import Row

HEIGHT = 24  # of a row of the graph; all lengths are in pixels
LANE, LANES = 14, 160  # width of a lane, and the maximum for all lanes
DEPTH = 2  # names of a module's path by which the table is grouped at first
UNITS = ((1e7, 1e6, "s", 3), (1e4, 1e3, "ms", 3), (0, 1, "µs", 1))  # from so many us on: us per unit, name, decimals
KINDS = {
    "kernel": "kernel",
    "extern": "library call",
    "view": "view, which moves no data",
    "fallback": "fallback, which PyTorch runs",
}
COLUMNS = (("us", "time"), ("share", "share"), ("runs", "runs as"), ("what", "operations"), ("where", "where"))


def page(rows: Sequence[Row], about: Mapping[str, str], sums: Iterable[tuple[str, float]]) -> str:
    """The page as HTML text.

    Args:
        rows: the nodes in the order of execution.
        about: names and values of what was measured where: the model, the device, versions.
        sums: names and microseconds of what was measured as a whole.
    """
    longest = max((row.us for row in rows), default=0.0) or 1.0
    _, unit, name, decimals = next(found for found in UNITS if longest >= found[0])

    def time(us: float) -> str:
        return f"{us / unit:,.{decimals}f}"

    facts = [*about.items(), *((what, f"{time(us)} {name}") for what, us in sums)]
    order = sorted(range(len(rows)), key=lambda index: -rows[index].us)
    data = {"unit": unit, "decimals": decimals, "rows": [_data(row) for row in rows]}
    inserted = json.dumps(data).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>torch_rtx profile</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>Where the time goes</h1>{_terms(facts)}{_legend(time(longest), name)}</header>
<main>
<section id="graph" aria-label="The graph in the order in which it runs">{_drawing(rows, longest, name, time)}</section>
<section id="side">
<dl id="details"><dt>Select a node</dt><dd>to see what it does and where it comes from.</dd></dl>
<div id="tools"><input id="filter" type="search" placeholder="Filter by operation or module" aria-label="Filter">
<label>group by <select id="depth">{_depths(rows)}</select></label></div>
<table>
<thead><tr>{_heads(name)}</tr></thead>
<tbody>
{"".join(_line(index, rows[index], longest, time) for index in order)}</tbody>
</table>
</section>
</main>
<script type="application/json" id="data">{inserted}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _terms(facts: Iterable[tuple[str, str]]) -> str:
    terms = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl id="about">{terms}</dl>'


def _legend(longest: str, unit: str) -> str:
    marks = (
        f'<li class="{kind}"><svg width="14" height="14">{_mark(kind, 7, 7)}</svg>{escape(text)}</li>'
        for kind, text in KINDS.items()
    )
    scale = f'<li>0 <i class="scale"></i> {longest} {unit}</li>'
    return f'<ul id="legend">{"".join(marks)}<li>a line leads from a result to its reader</li>{scale}</ul>'


def _depths(rows: Sequence[Row]) -> str:
    """The choices of the table's groups: none, or the first so many names of a module's path."""
    deepest = max((row.module.count(".") + 1 for row in rows if row.module), default=0)
    chosen = min(DEPTH, deepest)
    texts = ["nothing", *(f"module, depth {depth}" for depth in range(1, deepest + 1))]
    return "".join(
        f'<option value="{depth}"{" selected" * (depth == chosen)}>{text}</option>' for depth, text in enumerate(texts)
    )


def _heads(unit: str) -> str:
    texts = {**dict(COLUMNS), "us": f"time, {unit}"}
    return "".join(f'<th class="{key}"><button data-key="{key}">{text}</button></th>' for key, text in texts.items())


def lanes(inputs: Sequence[Sequence[int]]) -> list[int]:
    """Interval colouring: per row, the lane that its result occupies until its last reader, with as few lanes as
    possible.

    Args:
        inputs: per row, the positions of the rows that it reads.
    """
    last = list(range(len(inputs)))
    for index, read in enumerate(inputs):
        for source in read:
            last[source] = index
    until: list[int] = []  # per lane, the row at which it is free again
    taken = []
    for index in range(len(inputs)):
        free = (lane for lane, end in enumerate(until) if end <= index)
        lane = next(free, len(until))
        until[lane : lane + 1] = [max(last[index], index + 1)]
        taken.append(lane)
    return taken


def _drawing(rows: Sequence[Row], longest: float, unit: str, time: Callable[[float], str]) -> str:
    places = lanes([row.inputs for row in rows])
    step = min(LANE, LANES / (max(places, default=0) + 1))
    left = step * max(places, default=0) + 2 * LANE
    points = [(LANE / 2 + step * lane, HEIGHT * (index + 0.5)) for index, lane in enumerate(places)]
    edges = "".join(
        f'<path d="{_curve(*points[source], *points[index])}" data-a="{source}" data-b="{index}"/>'
        for index, row in enumerate(rows)
        for source in row.inputs
    )
    marks = "".join(
        f'<g class="{row.kind}" style="--heat:{_heat(row, longest)}">{_mark(row.kind, *point)}</g>'
        for row, point in zip(rows, points, strict=True)
    )
    size = f'width="{left:g}" height="{HEIGHT * len(rows)}"'
    svg = f'<svg {size} xmlns="http://www.w3.org/2000/svg"><g class="edges">{edges}</g>{marks}</svg>'
    head = f'<div class="head"><span class="time">{unit}</span><span></span><span>operations, module</span></div>'
    nodes = "".join(_node(index, row, longest, time) for index, row in enumerate(rows))
    return f'<div style="--left:{left:g}px">{head}<div id="nodes">{svg}{nodes}</div></div>'


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """An edge: straight down the lane of the source, and into the lane of the reader within the last row."""
    bend = to_y - HEIGHT
    return f"M{x:g} {y:g}V{bend:g}C{x:g} {bend + HEIGHT / 2:g} {to_x:g} {bend + HEIGHT / 2:g} {to_x:g} {to_y:g}"


def _mark(kind: str, x: float, y: float) -> str:
    """The shape that stands for a kind of node."""
    if kind == "extern":
        return f'<rect x="{x - 4.5:g}" y="{y - 4.5:g}" width="9" height="9"/>'
    if kind == "fallback":
        return f'<polygon points="{x:g},{y - 6:g} {x + 6:g},{y:g} {x:g},{y + 6:g} {x - 6:g},{y:g}"/>'
    return f'<circle cx="{x:g}" cy="{y:g}" r="{4 if kind == "view" else 5}"/>'


def _heat(row: Row, longest: float) -> str:
    """How hot the colour of a row is; by the root, a hundredth of the longest time is a tenth of the colour."""
    return f"{100 * math.sqrt(row.us / longest):.0f}%"


def _node(index: int, row: Row, longest: float, time: Callable[[float], str]) -> str:
    style = f"--heat:{_heat(row, longest)};--bar:{100 * row.us / longest:.1f}%"
    return (
        f'<div class="node {row.kind}" data-i="{index}" style="{style}" title="{escape(_tooltip(row, time))}">'
        f'<span class="time">{time(row.us)}</span><span class="bar"><i></i></span>'
        f'<span class="what">{escape(row.what)} <small>{escape(row.module)}</small></span></div>\n'
    )


def _line(index: int, row: Row, longest: float, time: Callable[[float], str]) -> str:
    texts = {"us": time(row.us), "share": f"{row.share:.1%}", "runs": row.runs_as, "what": row.what, "where": row.where}
    cells = "".join(f'<td class="{key}">{_wrapping(texts[key])}</td>' for key, _ in COLUMNS)
    return f'<tr data-i="{index}" style="--heat:{_heat(row, longest)}">{cells}</tr>\n'


def _wrapping(text: str) -> str:
    """`text` with the places of a path where a line may end."""
    return escape(text).replace("/", "/<wbr>")


def brief(text: str, width: int) -> str:
    """`text`, truncated to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def digits(number: float) -> str:
    """`number` with three significant digits, or all digits before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _tooltip(row: Row, time: Callable[[float], str]) -> str:
    return f"{row.what}\n{time(row.us)}, {row.share:.1%}, {row.runs_as}\n{row.where}"


def _data(row: Row) -> dict[str, Any]:
    """What the script needs of a row: values to sort by, and the (title, text) pairs of the panel."""
    values = {"us": row.us, "share": row.share, "runs": row.runs_as, "what": row.what, "where": row.where}
    return {**values, "module": row.module, "details": _details(row)}


def _details(row: Row) -> list[tuple[str, str]]:
    shown = [
        ("node", f"{row.name} = {row.kind} {row.op}"),
        ("time", f"{row.us:,.2f} µs, 95th percentile {row.p95:,.2f} µs, {row.share:.2%} of all nodes"),
        ("runs as", row.runs_as),
        ("operations", row.what),
        ("where", "\n".join(map(str, row.locs))),
    ]
    if row.cost is not None:
        shown.append(
            ("memory", f"{row.cost.read:,} bytes read, {row.cost.written:,} written" + _rate(row.gbps, "GB/s"))
        )
        shown.append(("products", f"{row.cost.flops:,} FLOPs" + _rate(row.tflops, "TFLOP/s")))
    return [(title, text) for title, text in shown if text]


def _rate(rate: float | None, unit: str) -> str:
    return "" if rate is None else f": {digits(rate)} {unit}"


STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1d2430; --soft: #667085; --line: #e3e7ee; --edge: #b4bccb;
  --cold: #c9d6ea; --hot: #d92d20; --mark: #eef3fb; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --fore: #e4e8f0; --soft: #8c96a8; --line: #262c38;
  --edge: #465066; --cold: #33415c; --hot: #ff6b4a; --mark: #1d2431; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; background: var(--back); color: var(--fore);
  font: 13px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
header { padding: 12px 20px; border-bottom: 1px solid var(--line); }
h1 { margin: 0 0 6px; font-size: 16px; }
#about { margin: 0; display: flex; flex-wrap: wrap; gap: 2px 28px; }
#about div { display: flex; gap: 8px; min-width: 0; }
#about dd, #details dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dt { color: var(--soft); }
#legend { margin: 8px 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px;
  color: var(--soft); }
#legend li { display: flex; align-items: center; gap: 6px; --heat: 40%; }
.scale { width: 80px; height: 10px; border-radius: 2px; background: linear-gradient(to right in oklab, var(--cold),
  color-mix(in oklab, var(--hot), var(--cold)) 25%, var(--hot)); }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
section { min-width: 0; overflow: hidden auto; padding: 0 20px 12px; }
#side { border-left: 1px solid var(--line); }
#nodes { position: relative; }
#nodes svg { position: absolute; left: 0; top: 0; pointer-events: none; }
.head, .node { display: grid; grid-template-columns: 76px 16% minmax(0, 1fr); column-gap: 10px; align-items: center;
  height: 24px; padding-left: var(--left); white-space: nowrap; }
.head { position: sticky; top: 0; z-index: 1; height: 32px; background: var(--back); color: var(--soft); }
.time { text-align: right; color: var(--soft); }
.bar i { display: block; height: 12px; border-radius: 2px; width: var(--bar); }
.what { overflow: hidden; text-overflow: ellipsis; }
small { font-size: inherit; color: var(--soft); }
.edges path { fill: none; stroke: var(--edge); stroke-width: 1.5; }
.edges path.on { stroke: var(--hot); stroke-width: 2.5; }
.node, tbody tr { cursor: pointer; }
.node:hover, .node.on, tr.on, tbody tr:hover { background: var(--mark); }
svg circle, svg rect, svg polygon, .bar i { fill: color-mix(in oklab, var(--hot) var(--heat), var(--cold));
  background: color-mix(in oklab, var(--hot) var(--heat), var(--cold)); stroke: var(--back); stroke-width: 1.5; }
.view circle { fill: var(--back); stroke: var(--edge); }
.fallback .what { font-style: italic; }
#details { position: sticky; top: 0; z-index: 1; margin: 0 -20px 12px; padding: 12px 20px; display: grid;
  grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; background: var(--mark); }
#details dd { white-space: pre-wrap; max-height: 9em; overflow-y: auto; }
#tools { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin-bottom: 8px; }
input, select { padding: 6px 10px; font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: 6px; }
input { flex: 1; min-width: 0; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; }
button { padding: 0; border: 0; background: none; font: inherit; color: inherit; cursor: pointer; text-align: left; }
th { text-align: left; font-weight: 500; color: var(--soft); white-space: nowrap; }
th[aria-sort=descending] button::after { content: " \\25be"; }
th[aria-sort=ascending] button::after { content: " \\25b4"; }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
td.us { border-left: 4px solid color-mix(in oklab, var(--hot) var(--heat), var(--cold)); }
.us { width: 88px; } .share { width: 68px; } .runs { width: 18%; }
.us, .share { text-align: right; white-space: nowrap; }
.group td { background: var(--mark); font-weight: 600; border-left-color: transparent; }
.group button { overflow-wrap: anywhere; }
.group button::before { content: "\\25be  "; }
.group [aria-expanded=false]::before { content: "\\25b8  "; }
@media (max-width: 900px) { body { height: auto; } main { display: block; } #graph { max-height: 60vh; } }
@media (max-width: 600px) { .runs { width: 0; padding: 0; font-size: 0; }
  .head, .node { grid-template-columns: 68px 0 minmax(0, 1fr); } }
"""
SCRIPT = """
const {unit, decimals, rows} = JSON.parse(document.getElementById("data").textContent);
const all = selector => [...document.querySelectorAll(selector)];
const body = document.querySelector("tbody"), lines = all("tbody tr"), closed = new Set();
const depth = document.getElementById("depth"), filter = document.getElementById("filter");
const of = line => rows[line.dataset.i];
let key = "us", sign = -1;
function make(tag, text, name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}
function select(index, from) {
  for (const item of all(".on")) item.classList.remove("on");
  for (const item of all(`[data-i="${index}"], path[data-a="${index}"], path[data-b="${index}"]`)) {
    item.classList.add("on");
    if (item.tagName === "path") item.parentNode.append(item);
    else if (!item.contains(from)) item.scrollIntoView({block: "center"});
  }
  const shown = rows[index].details.flatMap(([title, text]) => [make("dt", title), make("dd", text)]);
  document.getElementById("details").replaceChildren(...shown);
}
function head(group) {
  const line = make("tr", "", "group"), cell = make("td", ""), count = group.lines.length;
  const button = make("button", `${group.name || "(the model itself)"}, ${count} node${count > 1 ? "s" : ""}`);
  button.setAttribute("aria-expanded", !closed.has(group.name));
  button.addEventListener("click", () => { closed.delete(group.name) || closed.add(group.name); arrange(); });
  cell.colSpan = 3;
  cell.append(button);
  const us = (group.us / unit).toLocaleString("en", {minimumFractionDigits: decimals, maximumFractionDigits: decimals});
  line.append(make("td", us, "us"), make("td", `${(100 * group.share).toFixed(1)}%`, "share"), cell);
  return line;
}
function arrange() {
  const compare = (a, b) => sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true}));
  const wanted = filter.value.toLowerCase(), levels = Number(depth.value), groups = new Map();
  for (const line of lines.filter(line => line.textContent.toLowerCase().includes(wanted))) {
    const name = levels ? of(line).module.split(".").slice(0, levels).join(".") : "";
    if (!groups.has(name)) groups.set(name, {name, where: name, what: name, runs: name, us: 0, share: 0, lines: []});
    const group = groups.get(name);
    group.us += of(line).us;
    group.share += of(line).share;
    group.lines.push(line);
  }
  const sorted = [...groups.values()].sort((a, b) => compare(a[key], b[key]));
  body.replaceChildren(...sorted.flatMap(group => {
    const inside = group.lines.sort((a, b) => compare(of(a)[key], of(b)[key]));
    return levels ? [head(group), ...(closed.has(group.name) ? [] : inside)] : inside;
  }));
  for (const cell of all("th"))
    cell.setAttribute("aria-sort", cell.className !== key ? "none" : sign < 0 ? "descending" : "ascending");
}
document.querySelector("main").addEventListener("click", event => {
  const found = event.target.closest("[data-i]"), column = event.target.closest("[data-key]");
  if (found) select(found.dataset.i, event.target);
  if (!column) return;
  sign = column.dataset.key === key ? -sign : ["us", "share"].includes(column.dataset.key) ? -1 : 1;
  key = column.dataset.key;
  arrange();
});
filter.addEventListener("input", arrange);
depth.addEventListener("change", arrange);
arrange();
"""
