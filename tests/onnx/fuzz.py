"""Damages the models of the test cases, reads them and runs them: only typed errors may come of it.

`python -m tests.onnx.fuzz 10000 --seed 7` runs more of them, and others, than the test does.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto

from tests.onnx.cases import cases, value_of
from torch_rtx.errors import RtxError
from torch_rtx.onnx.module import from_onnx

Random = np.random.RandomState


def bytes_of(model: ModelProto, random: Random) -> bytes:
    """A serialized model that is cut, has other bytes, lacks some or has some twice."""
    content = bytearray(model.SerializeToString())
    first, last = sorted(random.randint(0, len(content), 2))
    kind = random.randint(4)
    if kind == 0:
        return bytes(content[:first])
    if kind == 1:
        for place in random.randint(0, len(content), 3):
            content[place] = random.randint(256)
        return bytes(content)
    return bytes(content[:first] + content[last:] if kind == 2 else content[:last] + content[first:])


def structure_of(model: ModelProto, random: Random, others: list[ModelProto]) -> bytes:
    """A serialized model whose nodes, attributes, initializers or versions are others."""
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    names = [value.name for value in graph.input] + [
        name for node in graph.node for name in (*node.input, *node.output)
    ]
    for _ in range(random.randint(1, 4)):
        node = graph.node[random.randint(len(graph.node))]
        kind = random.randint(7)
        if kind == 0 and node.input:
            node.input[random.randint(len(node.input))] = names[random.randint(len(names))]
        elif kind == 1 and node.input:
            del node.input[random.randint(len(node.input))]
        elif kind == 2:
            node.op_type = others[random.randint(len(others))].graph.node[0].op_type
        elif kind == 3 and node.attribute:
            attribute = node.attribute[random.randint(len(node.attribute))]
            attribute.i, attribute.f = int(random.randint(-9, 9)), float(random.randn())
            attribute.type = int(random.randint(0, 12)) if random.randint(2) else attribute.type
            if attribute.ints:
                attribute.ints[random.randint(len(attribute.ints))] = int(random.randint(-9, 9))
        elif kind == 4 and node.attribute:
            del node.attribute[random.randint(len(node.attribute))]
        elif kind == 5 and graph.initializer:
            tensor = graph.initializer[random.randint(len(graph.initializer))]
            tensor.data_type = int(random.randint(0, 29))
            if tensor.dims:
                tensor.dims[0] = int(random.randint(-2, 5))
        elif kind == 6:
            changed.opset_import[0].version = int(random.randint(0, 30))
    return changed.SerializeToString()


def fuzz(count: int, seed: int, path: Path) -> Counter[str]:
    """What became of damaged models, by number; anything but a result or an RtxError is raised."""
    random = Random(seed)
    small = [case for case in cases().values() if case.model.ByteSize() < 20_000]
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        case = small[random.randint(len(small))]
        if random.randint(3):
            path.write_bytes(structure_of(case.model, random, [other.model for other in small]))
        else:
            path.write_bytes(bytes_of(case.model, random))
        try:
            module = from_onnx(path)
            inputs = case.read()[0][0][: len(module.inputs)]
            with torch.no_grad():
                module(*map(value_of, inputs))
            outcomes["result"] += 1
        except RtxError as error:
            outcomes[type(error).__name__] += 1
    return outcomes


def main() -> None:
    """Fuzz as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print(fuzz(options.count, options.seed, Path(folder) / "model.onnx"))


if __name__ == "__main__":
    main()
