"""Sizes and shapes on the command line."""

from __future__ import annotations

import pytest

from torch_rtx.cli.shapes import shapes_given, spans_given
from torch_rtx.errors import SettingsError


def test_shapes() -> None:
    assert shapes_given("x:8x3,y:0:5,s:scalar") == {"x": (8, 3), "y:0": (5,), "s": ()}
    for text in ("", "x", "x:", ":3", "x:3x", "x:-1", "x:3,x:4", "x:٣"):
        with pytest.raises(SettingsError, match="no list of shapes"):
            shapes_given(text)


def test_spans() -> None:
    """What is not given is that of the next larger one, then the next smaller one."""
    assert spans_given(None, None, None) == []
    assert spans_given(["x:1"], ["x:2"], ["x:3"]) == [{"x": ((1,), (2,), (3,))}]
    assert spans_given(["x:1"], None, ["x:3"]) == [{"x": ((1,), (3,), (3,))}]
    assert spans_given(None, ["x:2"], None) == [{"x": ((2,), (2,), (2,))}]
    assert spans_given(["x:1"], ["x:2"], None) == [{"x": ((1,), (2,), (2,))}]
    assert spans_given(["x:1", "x:4"], None, ["x:3"]) == [{"x": ((1,), (3,), (3,))}, {"x": ((4,), (4,), (4,))}]
    with pytest.raises(SettingsError, match="different ranks"):
        spans_given(["x:1"], None, ["x:3x4"])
