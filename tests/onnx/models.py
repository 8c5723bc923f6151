"""Small ONNX models for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Shape = Sequence["int | str | None"] | None


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node; inputs and outputs are names with spaces between, `-` for none."""
    names = [[name.replace("-", "", name == "-") for name in names.split()] for names in (inputs, outputs)]
    return helper.make_node(op, *names, name=f"the_{op}", **attributes)


def value(name: str, shape: Shape = None, dtype: int = FLOAT) -> ValueInfoProto:
    """A typed value."""
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Mapping[str, Any] | None = None,
) -> GraphProto:
    """A graph with arrays as initializers."""
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    return helper.make_graph(nodes, "graph", inputs, outputs, tensors)


def model(graph: GraphProto, opset: int = 20, **options: Any) -> ModelProto:
    """A model of a graph."""
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], **options)


def linear(opset: int = 20) -> ModelProto:
    """`x.reshape(batch, -1) @ weight`, the shape computed from that of x."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Constant", "", "zero", value_ints=[0]),
        node("Gather", "shape zero", "batch"),
        node("Concat", "batch rest", "sizes", axis=0),
        node("Reshape", "x sizes", "rows"),
        node("MatMul", "rows layer.weight", "y"),
    ]
    weight = np.arange(24, dtype=np.float32).reshape(12, 2) / 10
    weights = {"layer.weight": weight, "rest": np.array([-1])}
    return model(graph(nodes, [value("x", ["batch", 3, 4])], [value("y", ["batch", 2])], weights), opset)


def one(op: str, inputs: Mapping[str, Any], outputs: str = "y", opset: int = 20, **attributes: Any) -> ModelProto:
    """A model of one node whose inputs are initializers."""
    made = node(op, " ".join(inputs), outputs, **attributes)
    return model(graph([made], [], [value(name) for name in outputs.split()], inputs), opset)


def external(folder: Any, location: str = "weights.bin", **entries: Any) -> str:
    """Writes a model to `model.onnx` in a folder, with the data of its weight elsewhere; the path."""
    made = linear()
    tensor = made.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    tensor.ClearField("raw_data")
    path = f"{folder}/model.onnx"
    onnx.save(made, path)
    return path
