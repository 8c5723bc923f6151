"""The test cases of the onnx package that pass go on passing."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx_ir")

from tests.onnx.cases import cases, check, passing

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
