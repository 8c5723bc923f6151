"""A profile as one HTML page: the graph in the order of execution, coloured by time, and a table.

The page loads nothing, and its content security policy forbids it to. Nodes and table are plain markup; the script only
selects and filters. Text from the model, such as module names, is escaped, and the script inserts it as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape

from torch_rtx.runtime.profile_row import Row

HEIGHT = 24  # of a row; all lengths are in pixels
LANE, LANES = 14, 280  # width of a lane, and the maximum for all lanes
TIME, BAR, LABEL = 64, 120, 640  # widths of the columns beside the graph
OPERATIONS = 48  # characters of the operations of a row in the drawing


def page(rows: Sequence[Row], totals: Iterable[str]) -> str:
    """The page as HTML text.

    Args:
        rows: the nodes in the order of execution.
        totals: lines for the head of the page.
    """
    longest = max((row.us for row in rows), default=0.0) or 1.0
    order = sorted(range(len(rows)), key=lambda index: -rows[index].us)
    head = "".join(f"<li>{escape(line)}</li>" for line in totals)
    data = json.dumps([_details(row) for row in rows]).replace("<", "\\u003c")
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
<header><h1>Where the time goes</h1><ul>{head}</ul></header>
<main>
<section id="graph" aria-label="The graph in the order in which it runs">{_drawing(rows, longest)}</section>
<section id="side">
<dl id="details"><dt>Select a node</dt><dd>to see what it does and where it comes from.</dd></dl>
<input id="filter" type="search" placeholder="Filter by operation or module" aria-label="Filter">
<table>
<thead><tr><th>us</th><th>share</th><th>operations</th><th>where</th></tr></thead>
<tbody>
{"".join(_line(index, rows[index], longest) for index in order)}</tbody>
</table>
</section>
</main>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


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


def _drawing(rows: Sequence[Row], longest: float) -> str:
    places = lanes([row.inputs for row in rows])
    step = min(LANE, LANES / (max(places, default=0) + 1))
    left = step * (max(places, default=0) + 1) + LANE
    points = [(LANE / 2 + step * lane, HEIGHT * (index + 0.5)) for index, lane in enumerate(places)]
    edges = "".join(
        f'<path d="{_curve(*points[source], *points[index])}" data-a="{source}" data-b="{index}"/>'
        for index, row in enumerate(rows)
        for source in row.inputs
    )
    nodes = "".join(_node(index, row, points[index], left, longest) for index, row in enumerate(rows))
    width, height = left + TIME + BAR + LABEL, HEIGHT * len(rows)
    size = f'width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}"'
    return f'<svg {size} xmlns="http://www.w3.org/2000/svg"><g class="edges">{edges}</g>{nodes}</svg>'


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """An edge: straight down the lane of the source, and into the lane of the reader within the last row."""
    bend = to_y - HEIGHT
    return f"M{x:g} {y:g}V{bend:g}C{x:g} {bend + HEIGHT / 2:g} {to_x:g} {bend + HEIGHT / 2:g} {to_x:g} {to_y:g}"


def _node(index: int, row: Row, point: tuple[float, float], left: float, longest: float) -> str:
    x, y = point
    text = y + 4
    heat = 100 * math.sqrt(row.us / longest)  # the root shows a hundredth of the longest time as a tenth of the colour
    label = f"{escape(brief(row.what, OPERATIONS))} <tspan>{escape(row.module)}</tspan>"
    return (
        f'<g class="node {row.kind}" data-i="{index}" style="--heat:{heat:.0f}%">'
        f"<title>{escape(_tooltip(row))}</title>"
        f'<rect class="row" y="{y - HEIGHT / 2:g}" width="100%" height="{HEIGHT}"/>'
        f'<circle cx="{x:g}" cy="{y:g}" r="5"/>'
        f'<text class="time" x="{left + TIME - 8:g}" y="{text:g}">{row.us:.1f}</text>'
        f'<rect class="bar" x="{left + TIME:g}" y="{y - 6:g}" width="{BAR * row.us / longest:.1f}" height="12" rx="2"/>'
        f'<text x="{left + TIME + BAR + 10:g}" y="{text:g}">{label}</text></g>\n'
    )


def _line(index: int, row: Row, longest: float) -> str:
    heat = 100 * math.sqrt(row.us / longest)
    cells = f"<td>{row.us:.1f}</td><td>{row.share:.1%}</td>"
    return (
        f'<tr data-i="{index}" style="--heat:{heat:.0f}%">{cells}'
        f"<td>{escape(row.what)}</td><td>{escape(row.where)}</td></tr>\n"
    )


def brief(text: str, width: int) -> str:
    """`text`, truncated to `width` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def digits(number: float) -> str:
    """`number` with three significant digits, or all digits before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _tooltip(row: Row) -> str:
    return f"{row.what}\n{row.us:.1f} us, {row.share:.1%}, {row.runs_as}\n{row.where}"


def _details(row: Row) -> list[tuple[str, str]]:
    """The (title, text) pairs of the panel."""
    shown = [
        ("node", f"{row.name} = {row.kind} {row.op}"),
        ("time", f"{row.us:.2f} us, 95th percentile {row.p95:.2f} us, {row.share:.2%} of all nodes"),
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
h1 { margin: 0 0 4px; font-size: 16px; }
ul { margin: 0; padding: 0; list-style: none; color: var(--soft); }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
section { overflow: auto; padding: 12px 20px; }
#side { border-left: 1px solid var(--line); }
.edges path { fill: none; stroke: var(--edge); stroke-width: 1.5; }
.edges path.on { stroke: var(--hot); stroke-width: 2.5; }
.node, tbody tr { cursor: pointer; }
.node .row { fill: transparent; }
.node:hover .row, .node.on .row { fill: var(--mark); }
.node .row { fill-opacity: .6; }
.node text { fill: var(--fore); font-size: 12px; }
.node tspan, .node .time { fill: var(--soft); }
.node .time { text-anchor: end; }
.node circle, .bar { fill: color-mix(in oklab, var(--hot) var(--heat), var(--cold)); }
.node circle { stroke: var(--back); stroke-width: 1.5; }
.view circle { fill: var(--back); stroke: var(--edge); }
.fallback text { font-style: italic; }
dl { position: sticky; top: -12px; margin: -12px -20px 12px; padding: 12px 20px; display: grid;
  grid-template-columns: max-content 1fr; gap: 2px 14px; background: var(--mark); }
dt { color: var(--soft); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9em; overflow-y: auto; }
input { width: 100%; margin-bottom: 8px; padding: 6px 10px; font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: 6px; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 500; color: var(--soft); }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
td:nth-child(-n+2) { white-space: nowrap; text-align: right; }
th:nth-child(-n+2) { text-align: right; }
td:first-child { border-left: 4px solid color-mix(in oklab, var(--hot) var(--heat), var(--cold)); }
tr.on, tbody tr:hover { background: var(--mark); }
@media (max-width: 900px) { body { height: auto; } main { display: block; } #graph { max-height: 60vh; } }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const all = selector => [...document.querySelectorAll(selector)];
const lines = all("tbody tr");
function select(index, from) {
  for (const item of all(".on")) item.classList.remove("on");
  for (const item of all(`[data-i="${index}"], path[data-a="${index}"], path[data-b="${index}"]`)) {
    item.classList.add("on");
    if (item.tagName === "path") item.parentNode.append(item);
    else if (!item.contains(from)) item.scrollIntoView({block: "center"});
  }
  const details = document.getElementById("details");
  details.replaceChildren();
  for (const [title, text] of data[index]) {
    for (const [kind, content] of [["dt", title], ["dd", text]]) {
      const item = document.createElement(kind);
      item.textContent = content;
      details.append(item);
    }
  }
}
document.querySelector("main").addEventListener("click", event => {
  const found = event.target.closest("[data-i]");
  if (found) select(found.dataset.i, event.target);
});
document.getElementById("filter").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  for (const line of lines) line.hidden = !line.textContent.toLowerCase().includes(wanted);
});
"""
