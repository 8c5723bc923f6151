"""Engine files as parts, which can be changed and put together again under right digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch_rtx.engine import DTYPES
from torch_rtx.ir import Graph
from torch_rtx.manifest import FORMAT_VERSION

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # by key: dtype as the IR names it, shape, data


@dataclass
class Parts:
    """A file: the JSON that torch_rtx wrote, the table of tensors that safetensors wrote, and the data."""

    program: dict[str, Any]
    table: dict[str, Any]
    data: bytes

    @staticmethod
    def of(content: bytes) -> Parts:
        """The parts of an intact file."""
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        return Parts(json.loads(table.pop("__metadata__")["torch_rtx"]), table, content[8 + length :])

    def join(self) -> bytes:
        """The file, with right digests of whatever is in it."""
        text, manifest = self.program.get("graph"), self.program.get("manifest")
        if isinstance(text, str) and isinstance(manifest, dict) and isinstance(manifest.get("digests"), dict):
            manifest["digests"]["graph"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        digests = {"header_digest": "0" * 64, "data_digest": hashlib.sha256(self.data).hexdigest()}
        rest = {name: value for name, value in self.program.items() if name not in digests}
        inner = json.dumps({**digests, **rest}, separators=(",", ":"))
        body = json.dumps({"__metadata__": {"torch_rtx": inner}, **self.table}, separators=(",", ":")).encode()
        return _sealed(body + b" " * (-len(body) % 8), self.data)


def _sealed(body: bytes, data: bytes) -> bytes:
    start = len(body).to_bytes(8, "little")
    return start + body.replace(b"0" * 64, hashlib.sha256(start + body).hexdigest().encode(), 1) + data


def resealed(content: bytes) -> bytes:
    """`content` with right digests, if its first bytes are those of an engine."""
    length = int.from_bytes(content[:8], "little")
    body, data = content[8 : 8 + length], content[8 + length :]
    places = [body.find(name) + len(name) for name in (b'header_digest\\":\\"', b'data_digest\\":\\"')]
    if not 0 < places[0] < places[1] < 300:
        return content
    for place, digest in zip(places, (b"0" * 64, hashlib.sha256(data).hexdigest().encode()), strict=True):
        body = body[:place] + digest + body[place + 64 :]
    return _sealed(body, data)


def engine_of(graph: Graph, tensors: Tensors) -> bytes:
    """A file of this graph and these tensors, by their keys in the file; it is called with one argument per input."""
    leaf = {"type": "builtins.tuple", "context": None}
    names = [value.name for value in graph.inputs]
    given = {**leaf, "children": [None] * len(names)}
    nothing = {"type": "builtins.dict", "context": [], "children": []}
    signature = {
        "names": names,
        "leaves": list(range(len(names))),
        "in": {**leaf, "children": [given, nothing]},
        "out": {**leaf, "children": [None] * len(graph.outputs)},
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "min_reader": 1,
        "device": "cpu",
        "platform": "any",
        "producer": {},
        "inputs": names,
        "signature": signature,
        "unused_names": [],
        "profiles": [],
        "stripped": False,
        "products": {},
        "onnx": None,
        "digests": {},
    }
    table, data = {}, b""
    for key, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        table[key] = {"dtype": DTYPES[dtype][0], "shape": list(shape), "data_offsets": offsets}
        data += content
    return Parts({"manifest": manifest, "graph": str(graph)}, table, data).join()
