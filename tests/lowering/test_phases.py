"""Transposed convolutions as convolutions, against PyTorch's own."""

from __future__ import annotations

import pytest

from tests.lowering.test_passes import assert_same_numbers
from torch_rtx.ir import Graph, Node, Parameter, TensorType, Value, Weight, contiguous
from torch_rtx.lowering.infer import Inference
from torch_rtx.lowering.phases import is_transposed
from torch_rtx.lowering.pipeline import PASSES, Context
from torch_rtx.settings import CompilationSettings
from torch_rtx.targets import PORTABLE

CALLS = {1: "conv_transpose1d.default", 2: "conv_transpose2d.input", 3: "conv_transpose3d.input"}
# Window, stride, padding, output padding, dilation, groups, and whether it becomes a convolution.
CASES = [
    ((2, 2), (2, 2), 0, 0, 1, 1, True),
    ((3, 3), (2, 2), 1, 1, 1, 1, True),
    ((4, 3), (2, 3), 1, 0, 1, 2, True),
    ((4, 4), (2, 2), 3, 1, 1, 4, True),
    ((3, 2), (1, 1), 1, 0, 2, 2, True),
    ((5, 3), (1, 2), 0, 0, 1, 1, True),
    ((16,), (8,), 4, 0, 1, 1, True),
    ((7,), (3,), 5, 2, 1, 4, True),
    ((2, 3, 2), (2, 2, 2), 0, 1, 1, 1, True),
    ((1, 1), (2, 2), 0, 0, 1, 1, False),  # most phases are zeros
    ((3, 3), (2, 2), 1, 0, 2, 1, False),  # phases read different windows
    ((2, 2), (1, 1), 2, 0, 1, 1, False),  # a part of the image is cut off
]


@pytest.mark.parametrize(("window", "strides", "padding", "more", "dilation", "groups", "becomes"), CASES)
@pytest.mark.parametrize("general", [False, True])
def test_numbers(
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: int,
    more: int,
    dilation: int,
    groups: int,
    becomes: bool,
    general: bool,
) -> None:
    """Both compute the same, as the call of its rank or as `aten.convolution`; nothing transposed is left."""
    rank, sizes, infer = len(window), (5, 4, 3), Inference()
    types = {
        "input": _type(2, 8, *sizes[:rank]),
        "weight": _type(8, 3, *window),
        "bias": _type(3 * groups),
    }
    values = {name: Value(name, type_) for name, type_ in types.items()}
    each = {"stride": strides, "padding": padding, "output_padding": more, "groups": groups, "dilation": dilation}
    given = {name: (one,) * rank if name != "groups" and isinstance(one, int) else one for name, one in each.items()}
    op = CALLS[rank]
    if general:
        op, given["transposed"] = "convolution.default", True
        order = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        given = {name: given[name] for name in order}
    args = (*values.items(), *given.items())
    result = Value("result", infer(f"aten.{op}", args)[0])
    parameters = tuple(Parameter(name, types[name]) for name in ("weight", "bias"))
    weights = tuple(Weight(values[one.name], (one.name,)) for one in parameters)
    node = Node("op", f"aten.{op}", args, (result,))
    before = Graph("import", (values["input"],), parameters, weights, (node,), (result,))
    after = PASSES["channels_last"](before, infer, Context(CompilationSettings(), PORTABLE))
    assert any(map(is_transposed, after.nodes)) is not becomes
    assert_same_numbers(before, after)


def _type(*shape: int) -> TensorType:
    return TensorType("f64", shape, contiguous(shape))
