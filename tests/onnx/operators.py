"""One operator of ONNX, as a model of one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import numpy_helper
from torch import Tensor

from tests.onnx.models import graph, model, node, value
from torch_rtx.onnx.dtypes import DTYPES
from torch_rtx.onnx.module import OnnxModule, from_onnx

CODES = {dtype: code for code, dtype in DTYPES.items()}


def module(op: str, opset: int, inputs: Sequence[Any], outputs: int = 1, **attributes: Any) -> OnnxModule:
    """The operator: tensors are inputs with symbolic sizes, arrays and numbers are initializers, None is missing."""
    names = ["-" if given is None else f"x{number}" for number, given in enumerate(inputs)]
    results = [f"y{number}" for number in range(outputs)]
    given = [
        value(name, [f"{name}_{axis}" if size != 1 else 1 for axis, size in enumerate(x.shape)], CODES[x.dtype])
        for name, x in zip(names, inputs, strict=True)
        if isinstance(x, Tensor)
    ]
    attributes = {key: numpy_helper.from_array(x) if isinstance(x, np.ndarray) else x for key, x in attributes.items()}
    weights = {name: x for name, x in zip(names, inputs, strict=True) if x is not None and not isinstance(x, Tensor)}
    nodes = [node(op, " ".join(names), " ".join(results), **attributes)]
    return from_onnx(model(graph(nodes, given, [value(name) for name in results], weights), opset))


def call(op: str, opset: int, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
    """The results of the operator."""
    return module(op, opset, inputs, outputs, **attributes)(*(x for x in inputs if isinstance(x, Tensor)))
