"""Models of the zoo, exported and read back: the same kernels as those of the module, and the same results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from benchmarks.exports import batches, export, lowered, positional, work
from torch_rtx.ir import Graph, TensorType, Value, kernel_nodes
from torch_rtx.onnx.module import from_onnx

# `python -m benchmarks.exports` has a table of all models.
SAME = [("bert_base", "dynamo"), ("bert_base", "script"), ("t5", "script")]


def masks(graph: Graph) -> list[tuple[object, ...]]:
    """The shapes of the masks of attention: one with a row for each query is read more slowly."""
    inner = [node for kernel in kernel_nodes(graph) if kernel.body is not None for node in kernel.body.nodes]
    found = [node.arg("attn_mask") for node in inner]
    return [mask.type.shape for mask in found if isinstance(mask, Value) and isinstance(mask.type, TensorType)]


@pytest.mark.parametrize(("name", "exporter"), SAME)
def test_same_kernels(name: str, exporter: str, tmp_path: Path) -> None:
    model = positional(name)
    export(model, exporter, tmp_path / "model.onnx")
    module = from_onnx(tmp_path / "model.onnx")
    with torch.no_grad():
        found, wanted = module(*model.inputs), model(*model.inputs)
    for one, other in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    mine, theirs = lowered(module, model.inputs), lowered(model, model.inputs)
    assert work(mine) == work(theirs)
    assert masks(mine) == masks(theirs)


def test_same_kernels_for_any_batch(tmp_path: Path) -> None:
    """The mask of zeros that the exporter computes with the batch is seen to hide nothing."""
    model = positional("vit_b_16")
    export(model, "script", tmp_path / "model.onnx", open_batch=True)
    module, shapes = from_onnx(tmp_path / "model.onnx"), batches(model.inputs)
    found = work(lowered(module, model.inputs, shapes))
    assert found == work(lowered(model, model.inputs, (shapes,)))
    assert found["attention"] == 2
