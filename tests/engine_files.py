"""Engines for tests, and engine files with wrong content under right digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_rtx.engine import Engine, Manifest, save
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse

GRAPH = parse("""\
graph fused {
  dim s = 1, 64, 1
  input x: f32[s, 3]
  constant 'table': i64[2]
  parameter 'lin.weight', 'tied.weight': f32[2, 3](1, 2)
  parameter 'it\\'s "odd"\\n': bf16[()]
  weight w: f32[2, 3](1, 2) = 'lin.weight'
  y: f32[s, 2] = extern aten.linear.default(input=x, weight=w)  # model.lin @ model.py:3
  z: f32[s, 2] = fallback my_lib.op.default(x=y)
  return [z]
}
""")
MANIFEST = Manifest(
    device="cuda",
    inputs=("x",),
    signature={"kwargs": {"b": 1, "a": [None, True, 1.5]}, "out": ["tuple", ["é"]]},
    producer={"torch_rtx": "0.1.0", "torch": "2.13.0"},
    unused_names=("head.bias",),
    digests={"model": "abc"},
)
ENGINE = Engine(
    GRAPH,
    MANIFEST,
    {"table": torch.tensor([3, -4])},
    {"lin.weight": torch.arange(6.0).reshape(3, 2).t(), 'it\'s "odd"\n': torch.tensor(1.5, dtype=torch.bfloat16)},
)


SMALL = Engine(
    parse("graph fused {\n  constant 'c': u8[3]\n  weight w: u8[3] = 'c'\n  return [w]\n}\n"),
    Manifest("cpu"),
    {"c": torch.tensor([1, 2, 3], dtype=torch.uint8)},
    {},
)


def saved(path: Path, what: Engine = ENGINE) -> bytes:
    """Saves to `path`; the bytes."""
    save(what, path)
    return path.read_bytes()


def digest_of(graph: Graph) -> str:
    return hashlib.sha256(str(graph).encode()).hexdigest()


def same(a: Any, b: Any) -> bool:
    """Whether two mappings of tensors, or None, are equal to the bit."""
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(
            a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)
        )
        for name in a
    )


def forge(
    path: Path,
    inner: Callable[[dict[str, Any]], object] = lambda _: None,
    outer: Callable[[dict[str, Any]], object] = lambda _: None,
    data: bytes | None = None,
    what: Engine = ENGINE,
) -> Path:
    """An engine file whose header was edited and whose digests are right: `inner` changes what torch_rtx wrote, `outer`
    what safetensors wrote, `data` replaces the bytes after the header."""
    raw = saved(path, what)
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :] if data is None else data
    program = json.loads(header["__metadata__"]["torch_rtx"])
    inner(program)
    if isinstance(program.get("graph"), str) and isinstance(program.get("manifest"), dict):
        program["manifest"].setdefault("digests", {})
        if isinstance(program["manifest"]["digests"], dict):
            program["manifest"]["digests"].setdefault("graph", hashlib.sha256(program["graph"].encode()).hexdigest())
    program["data_digest"], program["header_digest"] = hashlib.sha256(data).hexdigest(), "0" * 64
    header["__metadata__"]["torch_rtx"] = json.dumps(program, separators=(",", ":"))
    outer(header)
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    start = len(body).to_bytes(8, "little")
    body = body.replace(b"0" * 64, hashlib.sha256(start + body).hexdigest().encode(), 1)
    path.write_bytes(start + body + data)
    return path
