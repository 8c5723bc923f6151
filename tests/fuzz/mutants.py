"""Engine files with something wrong in them: bytes, JSON, the text of the graph, tables, data."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.files import Parts, resealed
from tests.paths import ENGINES
from torch_rtx.dtypes import DTYPES
from torch_rtx.errors import RtxError
from torch_rtx.irparse import parse
from torch_rtx.optable import ALLOWED

INTS = (0, 1, -1, 2, 3, 7, 16, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
VALUES = (*INTS, True, False, None, 1.5, float("inf"), float("nan"), "", "x", "\x1b[31m", "../x", "\ud800", [], {})
VALUES += (
    [[]],
    "main",
    "cuda",
    "meta",
    "sm_90",
    "self",
    "f32",
    "aten.relu.default",
    "0" * 32,
    {"a": 1},
    "s * 0",
    "(" * 99,
)
TOKEN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*|\d+|'[^'\n]*'|\n|[^\sA-Za-z0-9_']|[^\S\n]+|'")
WORDS = ("None", "inf", "nan", "-1", "[]", "True", "'x'", "(", "graph import {", "min(", "// 0", "_", "x", "aten", "''")
BYTES = rb'0123456789"\{}[],:. xnulltrue-eE' + b"\x00\xff\x1b"
KINDS = {"bytes": 50, "sealed": 70, "graph": 180, "manifest": 60, "tactics": 80, "table": 30, "data": 29, "large": 1}
TACTICS = ("tactics", "kernels", "splits")  # the names of their tables in any format
LAUNCH_INTS = (0, 1, 2, 16, 32, 33, 48 << 10, 100 << 10, 2**20, 2**31 - 1)
DIMS = ("0", "1", "s", "(2 * s)", "(4294967296 * s)", "(-1 + s)", "(s // 2)", "(1 // s)", "(s % 3)", "min(3, s)")
DIMS += ("65536", "2147483648", "4294967296", "9223372036854775808", "-1")
OPS, DTYPE_NAMES = tuple(sorted(ALLOWED)), tuple(DTYPES)


@cache
def originals() -> dict[str, bytes]:
    """The files that mutants are made of, by a name: those of all released formats."""
    paths = sorted(ENGINES.glob("v*/*.rtx"))
    return {f"{path.parent.name}/{path.stem}": Path(path).read_bytes() for path in paths}


def mutant(rng: Random) -> tuple[str, bytes]:
    """The kind of a mutant, and its bytes."""
    name = rng.choice(list(originals()))
    times = rng.choice((1, 1, 1, 2, 3))
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    if kind in ("bytes", "sealed"):
        content = _bytes(originals()[name], rng, times, kind == "sealed")
        return kind, resealed(content) if kind == "sealed" else content
    if kind == "tactics":
        name = rng.choice([name for name in originals() if name.endswith(("kernel", "split"))])
    parts = Parts.of(originals()[name])
    if kind == "large":
        parts.program["graph"] = _grown(parts.program["graph"], rng)
    elif kind == "graph":
        parts.program["graph"] = _graph(parts.program["graph"], rng, times)
    elif kind == "manifest":
        change_json({"manifest": parts.program["manifest"]}, rng, times, parts.program)
    elif kind == "tactics":
        change_tactics(parts, rng, times)
    elif kind == "table":
        change_json(parts.table, rng, times)
    else:
        parts.data = _bytes(parts.data or b"\0", rng, times, False)
    return kind, parts.join()


def _bytes(content: bytes, rng: Random, times: int, sealed: bool) -> bytes:
    """Other, fewer and more bytes; with `sealed` those of the header after its digests."""
    found = bytearray(content)
    length = int.from_bytes(content[:8], "little")
    for _ in range(times):
        if sealed:
            found[8 + 230 + rng.randrange(max(1, min(length, len(found)) - 240))] = rng.choice(BYTES)
            continue
        at, choice = rng.randrange(len(found) or 1), rng.random()
        if choice < 0.6 and found:
            found[at] = rng.randrange(256)
        elif choice < 0.8:
            del found[at:]
        else:
            found[at:at] = rng.randbytes(rng.randrange(9))
    return bytes(found)


def change_tactics(parts: Parts, rng: Random, times: int) -> None:
    """Change the tables of tactics, in the words of any format: their structure, or values within their types."""
    tables = {name: parts.program[name] for name in TACTICS if name in parts.program}
    if rng.random() < 0.4:
        change_json(tables, rng, times, parts.program)
        return
    symbols = re.findall(r"dim (\w+) =", parts.program["graph"]) or ["1"]
    for _ in range(times):
        leaves = [(holder, at) for holder, at in _places(tables) if not isinstance(holder[at], dict | list)]
        holder, at = rng.choice(leaves)
        if isinstance(holder[at], bool):
            holder[at] = not holder[at]
        elif isinstance(holder[at], int):
            holder[at] = rng.choice(LAUNCH_INTS)
        elif isinstance(holder, list) and not str(holder[at]).startswith(("sm_", "compute_")):
            holder[at] = rng.choice(DIMS).replace("s", rng.choice(symbols))


def change_json(value: dict[str, Any], rng: Random, times: int, target: dict[str, Any] | None = None) -> None:
    """Change values, names and structure in JSON; `target` gets the names that `value` has then."""
    for _ in range(times):
        places = list(_places(value))
        if not places:
            break
        holder, at = rng.choice(places)
        found, choice = holder[at], rng.random()
        if choice < 0.4:
            holder[at] = copy.deepcopy(rng.choice(VALUES))
        elif choice < 0.6 and isinstance(found, str) and found:
            holder[at] = _graph(found, rng, 1) if found.startswith("graph ") else _tokens(found, rng)
        elif choice < 0.7:
            other, key = rng.choice(places)
            holder[at] = copy.deepcopy(other[key])
        elif choice < 0.8 and isinstance(holder, dict):
            holder[f"{at}x"] = holder.pop(at)
        elif choice < 0.9:
            del holder[at]
        elif isinstance(holder, list):
            holder.extend(copy.deepcopy(found) for _ in range(rng.choice((1, 1, 50))))
        else:
            holder[at] = [found]
    if target is not None:
        target.update(value)


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _graph(text: str, rng: Random, times: int) -> str:
    for _ in range(times):
        text = _lines(text, rng) if rng.random() < 0.1 else _tokens(text, rng)
    if rng.random() < 0.7:  # as the format writes it, so that more of the reader is reached
        with suppress(RtxError):
            text = str(parse(text))
    return text


def _grown(text: str, rng: Random) -> str:
    """The same with a part of it many times: what takes time, or memory, for each pair of them?"""
    size = rng.choice((30_000, 100_000, 300_000, 900_000))
    lines = text.split("\n")
    nodes = [at for at, line in enumerate(lines) if re.match(r"  \w+: .* = (extern|view) ", line)]
    if nodes and rng.random() < 0.5:
        at = rng.choice(nodes)
        name, _, rest = lines[at].partition(":")
        source, chained = rng.choice(re.findall(r"=(\w+)", rest) or ["x"]), rng.random() < 0.5
        copies = []
        for number in range(size // len(lines[at])):
            copies.append(f"{name}_{number}:{rest}")
            if chained and number:
                copies[-1] = re.sub(rf"={source}\b", f"={name.strip()}_{number - 1}", copies[-1])
        lines[at + 1 : at + 1] = copies
        return "\n".join(lines)
    tokens = TOKEN.findall(text)
    start = rng.randrange(len(tokens))
    part = tokens[start : start + rng.choice((1, 1, 2, 3, 4, 12))]
    tokens[start : start + len(part)] = part * (size // max(1, len("".join(part))))
    return "".join(tokens)


def _lines(text: str, rng: Random) -> str:
    lines = text.split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    choice = rng.random()
    if choice < 0.4:
        lines[a], lines[b] = lines[b], lines[a]
    elif choice < 0.7:
        lines[a:a] = [lines[b]] * rng.choice((1, 1, 200))
    else:
        del lines[a]
    return "\n".join(lines)


def _tokens(text: str, rng: Random) -> str:
    tokens = TOKEN.findall(text)
    at, choice = rng.randrange(len(tokens)), rng.random()
    wanted, others = next(
        (wanted, others)
        for limit, wanted, others in (
            (0.25, str.isdigit, INTS),
            (0.4, lambda token: token.startswith("aten."), OPS),
            (0.5, DTYPES.__contains__, DTYPE_NAMES),
            (0.65, str.isidentifier, [token for token in tokens if token.isidentifier()]),
            (1.0, None, WORDS),
        )
        if choice < limit
    )
    places = range(len(tokens)) if wanted is None else [i for i, token in enumerate(tokens) if wanted(token)]
    if wanted is None and choice < 0.75:
        tokens[at : at + 1] = [] if choice < 0.7 else [tokens[at], rng.choice(tokens)]
    elif places and others:
        tokens[rng.choice(places)] = str(rng.choice(others))
    return "".join(tokens)
