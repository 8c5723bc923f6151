"""Models of one node, compared with onnxruntime on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from torch_rtx.onnx.module import from_onnx

Arrays = Sequence["np.ndarray | None"]


def model_of(
    op: str, arrays: Arrays, outputs: Sequence[str] = ("y",), domain: str = "", version: int = 17, **attributes: Any
) -> onnx.ModelProto:
    """A model whose inputs are those of its node; an output without a name is not asked for."""
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(arrays)]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
        if array is not None
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    graph = helper.make_graph([helper.make_node(op, names, outputs, domain=domain, **attributes)], "g", inputs, results)
    imports = [helper.make_opsetid(*one) for one in (("", version), ("com.microsoft", 1), ("ai.onnx.ml", 3))]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def ours(model: onnx.ModelProto, arrays: Arrays) -> list[np.ndarray]:
    """The results of the module."""
    with torch.no_grad():
        found = from_onnx(model)(*[torch.from_numpy(np.asarray(array)) for array in arrays if array is not None])
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


def reference(model: onnx.ModelProto, arrays: Arrays) -> list[np.ndarray]:
    """The results of onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": np.asarray(array) for i, array in enumerate(arrays) if array is not None})


def agree(
    op: str,
    arrays: Arrays,
    outputs: Sequence[str] = ("y",),
    *,
    domain: str = "",
    version: int = 17,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    **attributes: Any,
) -> None:
    """Raises AssertionError if the results of a node are not those of onnxruntime."""
    model = model_of(op, arrays, outputs, domain, version, **attributes)
    for found, wanted in zip(ours(model, arrays), reference(model, arrays), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)
