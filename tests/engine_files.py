"""Engines for tests, and engine files with wrong content under right digests."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_rtx.binaries import decompress
from torch_rtx.engine import Engine, Manifest, save
from torch_rtx.engine_header import PROGRAM
from torch_rtx.ir import Graph
from torch_rtx.irparse import parse
from torch_rtx.manifest import COMPRESSED, IN_HEADER

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


@dataclass
class Parts:
    """A file of any format: the JSON that torch_rtx wrote, with that of the program; the table of tensors that
    safetensors wrote, and the data, both without the program."""

    program: dict[str, Any]
    table: dict[str, Any]
    data: bytes

    @staticmethod
    def of(content: bytes) -> Parts:
        """The parts of an intact file."""
        length = int.from_bytes(content[:8], "little")
        table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        inner = json.loads(table.pop("__metadata__")["torch_rtx"])
        if "program" in inner:
            sizes, (start, _) = inner.pop("program"), table.pop(PROGRAM)["data_offsets"]
            unpack = {"zlib": zlib.decompress, "xz": decompress}[sizes["codec"]]
            raw, data = unpack(data[start:]), data[:start]
            rest = json.loads(raw[: sizes["tables"]])
            manifest = {**inner["manifest"], **rest["manifest"]}
            inner |= {**rest, "manifest": manifest, "graph": raw[sizes["tables"] :].decode()}
        inner["manifest"]["digests"].pop("graph")
        return Parts(inner, table, data)

    def join(self, stored: bytes | None = None, codec: str = "zlib", **sizes: int) -> bytes:
        """The file, with right digests of whatever is in it, but for one of the graph that the manifest has.

        Args:
            stored: the data of the tensor `program`; None: what the program gives.
            codec: what the header says that it is compressed with.
            sizes: what the header says of it in place of what is so.
        """
        text, manifest = self.program.get("graph"), self.program.get("manifest")
        if isinstance(text, str) and isinstance(manifest, dict) and isinstance(manifest.get("digests"), dict):
            manifest = {**manifest, "digests": dict(manifest["digests"])}
            manifest["digests"].setdefault("graph", hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
        inner = {name: value for name, value in self.program.items() if name not in ("header_digest", "data_digest")}
        inner |= {"manifest": manifest} if "manifest" in inner else {}
        table, data = self.table, self.data
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version not in range(COMPRESSED):  # also where it is no version
            inner, made = _compressed(inner)
            stored = made if stored is None else stored
            inner["program"] = {
                "digest": hashlib.sha256(stored).hexdigest(),
                "codec": codec,
                **inner["program"],
                **sizes,
            }
            spans = (entry.get("data_offsets") for entry in table.values() if isinstance(entry, dict))
            ends = (span[1] for span in spans if isinstance(span, list) and len(span) == 2)
            end = max((one for one in ends if isinstance(one, int)), default=0)
            entry = {"dtype": "U8", "shape": [len(stored)], "data_offsets": [end, end + len(stored)]}
            table, data = {**table, PROGRAM: entry}, data + stored
        digests = {"header_digest": "0" * 64, "data_digest": hashlib.sha256(data).hexdigest()}
        metadata = json.dumps({**digests, **inner}, separators=(",", ":"))
        body = json.dumps({"__metadata__": {"torch_rtx": metadata}, **table}, separators=(",", ":")).encode()
        return sealed(body + b" " * (-len(body) % 8), data)


def _compressed(program: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The header's part of a program, and the data of its tensor. What is no text stands in place of the text."""
    rest, manifest = dict(program), program.get("manifest")
    text, head = rest.pop("graph", ""), manifest
    if isinstance(manifest, dict):
        head = {name: manifest[name] for name in IN_HEADER if name in manifest}
        rest["manifest"] = {name: value for name, value in manifest.items() if name not in IN_HEADER}
    graph = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else json.dumps(text).encode()
    tables = json.dumps(rest, separators=(",", ":")).encode()
    stored = zlib.compress(tables + graph, 9)
    return {"manifest": head, "program": {"tables": len(tables), "graph": len(graph)}}, stored


def sealed(body: bytes, data: bytes) -> bytes:
    """A file of a header with zeros for its digest, and data."""
    start = len(body).to_bytes(8, "little")
    return start + body.replace(b"0" * 64, hashlib.sha256(start + body).hexdigest().encode(), 1) + data


def forge(
    path: Path,
    inner: Callable[[dict[str, Any]], object] = lambda _: None,
    outer: Callable[[dict[str, Any]], object] = lambda _: None,
    data: bytes | None = None,
    what: Engine = ENGINE,
) -> Path:
    """An engine file whose header was edited and whose digests are right: `inner` changes what torch_rtx wrote, `outer`
    what safetensors wrote, `data` replaces what comes before the program."""
    parts = Parts.of(saved(path, what))
    parts.data = parts.data if data is None else data
    inner(parts.program)
    outer(parts.table)
    path.write_bytes(parts.join())
    return path
