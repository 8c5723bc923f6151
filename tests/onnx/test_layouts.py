"""Models as exporters of TensorFlow and Paddle write them launch what they do from PyTorch: not a copy more."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("onnx_ir")
pytest.importorskip("transformers")  # of the model zoo

from benchmarks.exports import lowered, work
from tests.onnx.models import graph, model, node, value
from torch_rtx.onnx.module import from_onnx

RANDOM = np.random.default_rng(0)


class Writer:
    """Nodes one after another, with random weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def add(self, op: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        """A node; the name of its result."""
        names = [self.weight(one) if isinstance(one, np.ndarray) else one for one in inputs]
        self.nodes.append(node(op, " ".join(names), name := f"t{len(self.nodes)}", **attributes))
        return name

    def weight(self, array: np.ndarray) -> str:
        self.weights[name := f"w{len(self.weights)}"] = array
        return name

    def model(self, output: str, inputs: tuple[int, ...], opset: int) -> onnx.ModelProto:
        self.nodes.append(node("Identity", output, "y"))
        return model(graph(self.nodes, [value("x", inputs)], [value("y")], self.weights), opset)


def drawn(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / 4).astype(np.float32)


# ---- TensorFlow: channels last, with transposes around everything that wants them first ------------------------------


class ChannelsLast(Writer):
    """As tf2onnx writes it."""

    def first(self, op: str, x: str, *weights: np.ndarray | str, **attributes: Any) -> str:
        """A node that wants channels first."""
        x = self.add(op, self.add("Transpose", x, perm=[0, 3, 1, 2]), *weights, **attributes)
        return self.add("Transpose", x, perm=[0, 2, 3, 1])

    def conv(self, x: str, *shape: int, stride: int = 1, group: int = 1) -> str:
        sizes = {"strides": [stride] * 2, "kernel_shape": shape[2:], "group": group, "auto_pad": "SAME_UPPER"}
        x = self.first("Conv", x, drawn(*shape), **sizes)
        return self.add("Add", self.add("Mul", x, drawn(shape[0])), drawn(shape[0]))

    def network(self) -> onnx.ModelProto:
        x = self.add("Relu", self.conv("x", 16, 3, 3, 3, stride=2))
        x = self.first("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
        y = self.add("Relu", self.conv(x, 16, 16, 3, 3))
        squeezed = self.add("ReduceMean", y, axes=[1, 2], keepdims=1)
        squeezed = self.add("Relu", self.first("Conv", squeezed, drawn(4, 16, 1, 1), drawn(4)))
        squeezed = self.add("Sigmoid", self.first("Conv", squeezed, drawn(16, 4, 1, 1), drawn(16)))
        x = self.add("Relu", self.add("Add", self.add("Mul", y, squeezed), x))
        x = self.conv(x, 16, 1, 3, 3, group=16)
        scales = np.array([1, 1, 2, 2], np.float32)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        both = [self.first("Resize", x, "-", scales, **how) for _ in range(2)]
        x = self.add("Concat", *both, axis=3)
        x = self.add("ReduceMean", self.conv(x, 8, 32, 1, 1), axes=[1, 2], keepdims=0)
        x = self.add("Softmax", self.add("Add", self.add("MatMul", x, drawn(8, 10)), drawn(10)), axis=-1)
        return self.model(x, (2, 32, 32, 3), 17)


class ChannelsFirst(nn.Module):
    """The same in PyTorch."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.from_numpy(array) for array in weights])

    def forward(self, x: Tensor) -> Tensor:
        weights = iter(self.weights)

        def conv(x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
            weight, factor, addend = (next(weights) for _ in range(3))
            before = weight.shape[-1] // 2 if stride == 1 else 0
            x = x if stride == 1 else F.pad(x, (0, 1, 0, 1))
            x = F.conv2d(x, weight, None, stride, before, 1, groups)
            return x * factor[:, None, None] + addend[:, None, None]

        x = F.max_pool2d(F.pad(conv(x, 2).relu(), (0, 1, 0, 1), value=-torch.inf), 3, 2)
        y = conv(x).relu()
        squeezed = F.conv2d(y.mean((2, 3), keepdim=True), next(weights), next(weights)).relu()
        x = (y * F.conv2d(squeezed, next(weights), next(weights)).sigmoid() + x).relu()
        x = F.interpolate(conv(x, 1, 16), scale_factor=2.0)
        x = conv(torch.cat([x, x], 1)).mean((2, 3))
        return torch.softmax(x @ next(weights) + next(weights), -1)


def test_channels_last() -> None:
    writer = ChannelsLast()
    module = from_onnx(writer.network())
    twin = ChannelsFirst([array for array in writer.weights.values() if array.tolist() != [1, 1, 2, 2]])
    x = torch.randn(2, 32, 32, 3)
    torch.testing.assert_close(module(x), twin(x.permute(0, 3, 1, 2)))
    first = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    assert work(lowered(module, (x,))) == work(lowered(twin.eval(), (first,)))


# ---- Paddle: products and softmax of opset 11 ------------------------------------------------------------------------


class Mixer(nn.Module):
    """A block that mixes tokens (2, 9, 12), in PyTorch."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.from_numpy(array) for array in weights])

    def forward(self, x: Tensor) -> Tensor:
        into, into_bias, out, out_bias = self.weights
        q, k, v = F.linear(x, into.t(), into_bias).reshape(-1, 9, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + F.linear(mixed.transpose(1, 2).flatten(2), out.t(), out_bias)


def test_products_of_opset_11() -> None:
    writer = Writer()
    weights = drawn(12, 36), drawn(36), drawn(12, 12), drawn(12)
    x = writer.add("Add", writer.add("MatMul", "x", weights[0]), weights[1])
    x = writer.add("Reshape", x, np.array([0, 9, 3, 2, 6]))
    x = writer.add("Transpose", x, perm=[2, 0, 3, 1, 4])
    parts = [writer.add("Slice", x, *(np.array([n]) for n in (at, at + 1, 0))) for at in range(3)]
    q, k, v = (writer.add("Squeeze", part, axes=[0]) for part in parts)
    q = writer.add("Mul", q, writer.add("Constant", value_floats=[0.5]))
    scores = writer.add("MatMul", q, writer.add("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = writer.add("MatMul", writer.add("Softmax", scores, axis=3), v)
    mixed = writer.add("Reshape", writer.add("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 9, 12]))
    mixed = writer.add("Add", writer.add("MatMul", mixed, weights[2]), weights[3])
    module = from_onnx(writer.model(writer.add("Add", "x", mixed), (2, 9, 12), 11))
    twin, x0 = Mixer([*weights]), torch.randn(2, 9, 12)
    torch.testing.assert_close(module(x0), twin(x0))
    assert work(lowered(module, (x0,))) == work(lowered(twin.eval(), (x0,)))
