"""Engine files as parts, which can be changed and put together again under right digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from tests.engine_files import Parts, sealed
from torch_rtx.engine_header import DTYPES
from torch_rtx.ir import Graph
from torch_rtx.manifest import FORMAT_VERSION, MIN_READER

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # by key: dtype as the IR names it, shape, data


def resealed(content: bytes) -> bytes:
    """`content` with right digests, if its first bytes are those of an engine."""
    length = int.from_bytes(content[:8], "little")
    body, data = content[8 : 8 + length], content[8 + length :]
    places = [body.find(name) + len(name) for name in (b'header_digest\\":\\"', b'data_digest\\":\\"')]
    if not 0 < places[0] < places[1] < 300:
        return content
    for place, digest in zip(places, (b"0" * 64, hashlib.sha256(data).hexdigest().encode()), strict=True):
        body = body[:place] + digest + body[place + 64 :]
    return sealed(body, data)


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
        "min_reader": MIN_READER,
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
