"""Arithmetic of sizes: the same numbers as the operators on tensors give, and symbols stay symbols."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

pytest.importorskip("onnx_ir")

from onnx import helper, numpy_helper

from tests.onnx.models import graph, model, node, value
from torch_rtx.onnx.host import HOST_OPS, Host, known
from torch_rtx.onnx.module import from_onnx
from torch_rtx.onnx.registry import find

A, B = [7, -7, 6, 0], [2, 2, -4, 5]
CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    *[
        (name, [A, B], {})
        for name in ["Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Equal", "Less", "LessOrEqual", "Greater"]
    ],
    ("GreaterOrEqual", [A, B], {}),
    ("Mod", [A, B], {"fmod": 1}),
    ("Add", [[2**63 - 1], [1]], {}),
    ("Mul", [[[1], [2]], [3, 4]], {}),
    *[(name, [A], {}) for name in ("Neg", "Abs", "Identity")],
    *[(name, [[0.5, -0.5, 3.0]], {}) for name in ("Floor", "Ceil", "Neg")],
    ("Div", [[1.0, -7.0], [3.0, 2.0]], {}),
    ("Not", [[True, False]], {}),
    *[(name, [[True, True, False], [True, False, False]], {}) for name in ("And", "Or")],
    ("Where", [[True, False, True, False], A, B], {}),
    ("Cast", [[1.7, -1.7]], {"to": 7}),
    ("Cast", [A], {"to": 1}),
    ("Cast", [A], {"to": 9}),
    ("Gather", [A, [[0, -1]]], {}),
    ("Gather", [[A, B], 1], {"axis": 1}),
    ("Slice", [A, [1], [2**63 - 1]], {}),
    ("Slice", [[A, B], [-1], [-(2**63)], [1], [-2]], {}),
    ("Concat", [A, B, [1]], {"axis": 0}),
    ("Split", [A, [1, 3]], {}),
    ("Split", [[1, 2, 3]], {"num_outputs": 2}),
    ("Unsqueeze", [A, [0, -1]], {}),
    ("Squeeze", [[A], [0]], {}),
    ("Squeeze", [[[3]]], {}),
    ("Transpose", [[A, B]], {}),
    ("Transpose", [[A, B]], {"perm": [0, 1]}),
    ("Reshape", [A, [2, -1]], {}),
    ("Reshape", [[A], [0, -1]], {}),
    ("Expand", [[3], [2, 2]], {}),
    ("ConstantOfShape", [[2]], {"value": torch.tensor([7])}),
    ("Range", [1, 8, 3], {}),
    ("Range", [3, -3, -2], {}),
    *[(name, [[A, B]], {}) for name in ("ReduceSum", "ReduceProd", "ReduceMin", "ReduceMax")],
    ("ReduceSum", [[A, B], [1]], {"keepdims": 0}),
    ("ReduceSum", [A, []], {"noop_with_empty_axes": 1}),
]


def host(numbers: Any) -> Host:
    tensor = torch.tensor(numbers, dtype=None if numbers != [] else torch.int64)
    return known(tensor.reshape(-1).tolist(), tensor.shape, tensor.dtype)


@pytest.mark.parametrize(("name", "inputs", "attributes"), CASES)
def test_like_tensors(name: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    operator = find("", name, 20)
    assert operator is not None
    hosts = [host(given) for given in inputs]
    told = {"outputs": 2} if name == "Split" else {}
    found = HOST_OPS[name](attributes, *hosts, **told)
    assert found is not None
    names = [f"i{number}" for number in range(len(inputs))]
    arrays = {one: given.tensor(torch.device("cpu")).numpy() for one, given in zip(names, hosts, strict=True)}
    outputs = ["y", "z"][: told.get("outputs", 1)]
    tensors = {k: numpy_helper.from_array(v.numpy()) for k, v in attributes.items() if isinstance(v, torch.Tensor)}
    made = node(name, " ".join(names), " ".join(outputs), **{**attributes, **tensors})
    # Inputs of the graph: known to no one before the call.
    typed = [value(one, x.shape, helper.np_dtype_to_tensor_dtype(x.dtype)) for one, x in arrays.items()]
    module = from_onnx(model(graph([made], typed, [value(one) for one in outputs])))
    wanted = module(*map(torch.from_numpy, arrays.values()))
    for one, other in zip(found if isinstance(found, tuple) else [found], wanted if told else [wanted], strict=True):
        assert torch.equal(one.tensor(torch.device("cpu")), other)
        assert one.dtype == other.dtype


def test_the_sizes_of_an_upsampling_stay_symbols() -> None:
    """What exporters write for a size times a float, rounded: no operator runs, and no size is fixed."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Slice", "shape one two", "size"),
        node("Cast", "size", "float", to=1),
        node("Mul", "float scale", "scaled"),
        node("Floor", "scaled", "floored"),
        node("Cast", "floored", "sizes", to=7),
        node("ConstantOfShape", "sizes", "y"),
    ]
    weights = {
        "one": np.array([1]),
        "two": np.array([2]),
        "scale": np.array([1.5], np.float32),
    }
    module = from_onnx(model(graph(nodes, [value("x", [1, "n"])], [value("y")], weights)))
    assert module(torch.ones(1, 5)).shape == (7,)
    program = torch.export.export(module, (torch.ones(1, 5),), dynamic_shapes=({1: Dim("n", min=2, max=64)},))
    assert program.module()(torch.ones(1, 8)).shape == (12,)
    assert not [n for n in program.graph.nodes if str(n.target).startswith("aten.mul")]
