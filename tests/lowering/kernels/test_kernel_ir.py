"""The kernel IR: its text form, how Triton writes its operations, and the table of dtypes."""

from __future__ import annotations

import math

import pytest
import torch

from torch_rtx import aten
from torch_rtx.dtypes import BOOL, DTYPES, FLOAT, INT, PACKED, highest, lowest, wrapped
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.expressions import (
    ARITY,
    A,
    B,
    C,
    Expression,
    apply,
    eq,
    erf,
    exp,
    log1p,
    maximum,
    ne,
    sigmoid,
    trunc,
    where,
)
from torch_rtx.lowering.kernels.kernel_ir import Pointwise, cast, load
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.triton_ops import CODES, is_expensive, template

BODIES = {
    "a product with what comes before and after": (
        """graph import {
  input in0: f16[64, 128]
  input in1: f16[96, 64]
  input in2: f16[96]
  v1: f16[128, 64](1, 128) = op aten.t.default(self=in0)
  v2: f16[128, 96] = op aten.linear.default(input=v1, weight=in1, bias=in2)
  v3: f16[128, 96] = op aten.silu.default(self=v2)
  v4: f32[128, 96] = op aten._to_copy.default(self=v3, dtype="f32")
  return [v4]
}
""",
        """%0: f16[64, 128] = load in0, strides=[128, 1]
%1: f16[128, 64] = view %0[i1, i0]
%2: f16[96, 64] = load in1, strides=[64, 1]
%3: f16[96] = load in2, strides=[1]
%4: f16[128, 96] = aten.linear.default(input=%1, weight=%2, bias=%3)
%5: f16[128, 96] = mul(%4, sigmoid(%4))
%6: f32[128, 96] = cast(%5, f32)
return %6
""",
    ),
    "rows of a table": (
        """graph import {
  dim s0 = 1, 64, 1
  input in0: i64[s0, 16]
  input in1: f16[100, 32]
  v1: f16[s0, 16, 32] = op aten.embedding.default(weight=in1, indices=in0)
  v2: bool[s0, 16] = op aten.ne.Scalar(self=in0, other=1)
  v3: i64[s0, 16] = op aten.cumsum.default(self=v2, dim=1)
  return [v1, v3]
}
""",
        """%0: f16[100, 32] = load in1, strides=[32, 1]
%1: i64[s0, 16] = load in0, strides=[16, 1]
%2: i64[s0, 16, 32] = view %1[i0, i1]
%3: f16[s0, 16, 32] = gather %0[%2, i2]
%4: bool[s0, 16] = ne(%1, 1)
%5: i64[s0, 16] = cast(%4, i64)
%6: i64[s0, 16] = scan sum %5, axes=[1]
return %3, %6
""",
    ),
    "labels padded by a float": (
        """graph import {
  input in0: i64[9]
  v1: i64[10] = op aten.constant_pad_nd.default(self=in0, pad=[0, 1], value=-100.0)
  return [v1]
}
""",
        """%0: i64[9] = load in0, strides=[1]
%1: i64[10] = select %0, -100, starts=[0]
return %1
""",
    ),
    "a padded softmax": (
        """graph import {
  input in0: f32[4, 9]
  v1: f32[4, 12] = op aten.constant_pad_nd.default(self=in0, pad=[1, 2], value=-1.5)
  v2: f32[4, 12] = op aten.softmax.int(self=v1, dim=-1)
  v3: f16[4, 12] = op aten._to_copy.default(self=v2, dtype="f16")
  return [v3]
}
""",
        """%0: f32[4, 9] = load in0, strides=[9, 1]
%1: f32[4, 12] = select %0, -1.5, starts=[0, 1]
%2: f32[4, 1] = reduce max %1, axes=[1]
%3: f32[4, 12] = view %2[i0, 0]
%4: f32[4, 12] = sub(%1, %3)
%5: f32[4, 12] = exp(%4)
%6: f32[4, 12] = view %2[i0, 0]
%7: f32[4, 12] = sub(%1, %6)
%8: f32[4, 12] = exp(%7)
%9: f32[4, 1] = reduce sum %8, axes=[1]
%10: f32[4, 12] = view %9[i0, 0]
%11: f32[4, 12] = div(%5, %10)
%12: f16[4, 12] = round_to(cast(%11, f32), f16)
return %12
""",
    ),
}
TEMPLATES = [
    (A * sigmoid(A), "{0} * libdevice.fast_dividef(1.0, 1.0 + tl.exp2({0} * -1.4426950408889634))"),
    ((A - B) * (A - B), "({0} - {1}) * ({0} - {1})"),
    (A - (B - C), "{0} - ({1} - {2})"),
    (A - B - C, "{0} - {1} - {2}"),
    (A * (B / C), "{0} * ({1} / {2})"),
    (-A * B, "{0} * -1.0 * {1}"),
    (-(A * B), "{0} * {1} * -1.0"),
    (1.0 - A, "1.0 - {0}"),
    (eq(A, B) | ne(A, A), "({0} == {1}) | ({0} != {0})"),
    (ne(A < 0, B < 0), "({0} < 0) != ({1} < 0)"),
    (A | B & C, "{0} | {1} & {2}"),
    ((A | B) & C, "({0} | {1}) & {2}"),
    (where(-math.inf < A, A + 1, False), 'tl.where({0} > float("-inf"), {0} + 1, False)'),
    (maximum(A, 0), "tl.maximum({0}, 0, propagate_nan=tl.PropagateNan.ALL)"),
    (trunc(A / B), "tl.where(({0} / {1}) < 0, tl.ceil(({0} / {1})), tl.floor(({0} / {1})))"),
    (apply("cast", A < B, dtype="f64"), "({0} < {1}).to(tl.float64)"),
]


@pytest.mark.parametrize("name", BODIES)
def test_text(name: str) -> None:
    body, expected = BODIES[name]
    assert str(region(parse(body))) == expected


@pytest.mark.parametrize(("expression", "expected"), TEMPLATES)
def test_parentheses_stand_where_python_needs_them(expression: Expression, expected: str) -> None:
    assert template(expression) == expected


def test_every_operation_has_code() -> None:
    assert CODES.keys() == ARITY.keys()
    for op, count in ARITY.items():
        assert len(CODES[op].operands) == count, op


def test_casts_take_code_only_where_registers_differ() -> None:
    x = load("x", parse("graph import {\n  input x: f16[4]\n  return [x]\n}\n").inputs[0].type)  # type: ignore[arg-type]
    single, double, rounded = cast(x, "f32"), cast(x, "f64"), cast(x, "bf16", rounded=True)
    assert all(isinstance(one, Pointwise) for one in (single, double, rounded))
    assert [one.same_register for one in (single, double, rounded)] == [x, None, None]  # type: ignore[attr-defined]
    assert template(double.expression, ["f16"]) == "{0}.to(tl.float64)"  # type: ignore[attr-defined]
    assert template(rounded.expression, ["f16"]) == "{0}.to(tl.bfloat16).to(tl.float32)"  # type: ignore[attr-defined]
    assert template(rounded.expression, ["f64"]) == "{0}.to(tl.float32).to(tl.bfloat16).to(tl.float32)"  # type: ignore[attr-defined]
    assert cast(x, "f16") is x


def test_what_takes_many_registers() -> None:
    assert all(is_expensive(one) for one in (1.0 + erf(A), log1p(A)))
    assert not any(is_expensive(one) for one in (exp(A), apply("rint", A), A + B))


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_as_pytorch_has_them(name: str) -> None:
    row, dtype = DTYPES[name], aten.DTYPES[name]
    assert row.bytes == dtype.itemsize
    assert (row.kind == FLOAT, row.kind == INT) == (
        dtype.is_floating_point,
        not (dtype.is_floating_point or dtype.is_complex or row.kind == BOOL),
    )
    assert row.register in ("", name, "f32") or name == PACKED
    if row.kind == INT:
        limits = torch.iinfo(dtype)
        assert (lowest(name), highest(name), row.signed) == (limits.min, limits.max, limits.min < 0)
        assert [wrapped(one, name) for one in (limits.max + 1, limits.min - 1, 3)] == [limits.min, limits.max, 3]
    elif row.kind == FLOAT:
        assert (lowest(name), highest(name)) == (-math.inf, math.inf)
