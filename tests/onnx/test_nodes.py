"""The test cases of the onnx package that pass go on passing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx_ir")

import torch_rtx
from tests.onnx.cases import cases, check, compare, passing, value_of
from torch_rtx.detection import suppressed

CHUNKS = 16


def test_the_list_names_cases() -> None:
    assert set(passing()) <= set(cases())
    assert passing() == sorted(set(passing()))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cases(chunk: int) -> None:
    """A case that fails is a fault; take none off the list. `python -m tests.onnx.cases OP` says more."""
    failed = {}
    for name in passing()[chunk::CHUNKS]:
        try:
            check(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert failed == {}


@pytest.mark.parametrize(
    "name",
    [
        "pytorch-converted/test_GLU",
        "test_attention_4d_causal_expanded",
        "test_gru_defaults",
        "test_lstm_with_peepholes",
        "test_quantizelinear_axis",
        "pytorch-converted/test_Conv2d",
    ],
)
def test_engines(name: str) -> None:
    check(name, compiled=True)


@pytest.mark.parametrize("name", ["test_nonmaxsuppression_two_batches", "test_unique_sorted_with_axis_3d"])
def test_files(name: str, tmp_path: Path) -> None:
    """What data decides the size of goes into files."""
    ((inputs, outputs),) = cases()[name].read()
    args = tuple(map(value_of, inputs))
    path = tmp_path / "model.rtx"
    torch_rtx.save(torch_rtx.compile(cases()[name].model, args), path)
    found = torch_rtx.load(path)(*args)
    for one, other in zip(found if isinstance(found, tuple) else (found,), map(value_of, outputs), strict=True):
        compare(one, other, 1e-6, 0)


def test_boxes_that_do_not_fit() -> None:
    """Files may call the operator with anything."""
    boxes, scores, limit = torch.rand(1, 8, 2), torch.rand(1, 3, 9), torch.tensor(0.5)
    for given in ((boxes, scores), (boxes[:, :0], scores[..., :0]), (boxes[0], scores)):
        with pytest.raises(RuntimeError, match="boxes"):
            suppressed(given[0], given[0], given[1], limit, 5)
    assert suppressed(boxes, boxes, scores[..., :8], limit, 0).shape == (1, 3, 0)
