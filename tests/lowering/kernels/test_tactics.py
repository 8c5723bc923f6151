"""What is expected of library calls against kernels."""

from __future__ import annotations

import math
import re

import pytest

from tests.lowering.kernels.kernel_bodies import library
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.cost import typical
from torch_rtx.op_work import flops

PRODUCT = """graph import {{
  input in0: f16[{m}, {k}]
  input in1: f16[{n}, {k}]
  v2: f16[{m}, {n}] = op aten.linear.default(input=in0, weight=in1)
  return [v2]
}}
"""
OTHERS = {
    "conv": (
        """graph import {
  input in0: f16[2, 8, 16, 16](2048, 1, 128, 8)
  input in1: f16[4, 8, 3, 3](72, 1, 24, 8)
  v2: f16[2, 4, 14, 14](784, 1, 56, 4) = op aten.conv2d.default(input=in0, weight=in1)
  return [v2]
}
""",
        2 * (2 * 4 * 14 * 14) * (8 * 3 * 3),
    ),
    "attention": (
        """graph import {
  dim s0 = 2, 64, 1
  input in0: f16[s0, 12, 128, 64]
  input in1: f16[s0, 12, 256, 64]
  input in2: f16[s0, 12, 256, 32]
  v2: f16[s0, 12, 128, 32] = op aten.scaled_dot_product_attention.default(query=in0, key=in1, value=in2)
  return [v2]
}
""",
        2 * (64 * 12 * 128 * 256) * (64 + 32),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_flops(kind: str) -> None:
    text, expected = OTHERS[kind]
    assert flops(parse(text).nodes[0], typical) == expected


@pytest.mark.parametrize(
    ("sizes", "sm", "expected"),
    [
        ((128, 3072, 768), 90, "slower"),
        ((3072, 768, 3072), 90, "faster"),
        ((3072, 768, 3072), 89, "slower"),
        ((512, 768, 50257), 90, "slower"),  # no multiple of 16 bytes
        ((1, 4096, 4096), 90, "slower"),
    ],
)
def test_products(sizes: tuple[int, int, int], sm: int, expected: str) -> None:
    m, k, n = sizes
    body = parse(PRODUCT.format(m=m, k=k, n=n))
    assert flops(body.nodes[0], typical) == 2 * m * k * n
    assert library(body, sm) == expected


def test_a_loop_has_no_rival() -> None:
    body = parse(
        "graph import {\n  input in0: f16[4]\n  v1: f16[4] = op aten.exp.default(self=in0)\n  return [v1]\n}\n"
    )
    assert library(body, 90) == "none"


CONVOLUTION = """\
graph import {{
  input in0: f16[{n}, {c}, {h}, {w}]({c}*{h}*{w}, 1, {c}*{w}, {c})
  input in1: f16[{o}, {c}, {kh}, {kw}]({c}*{kh}*{kw}, 1, {c}*{kw}, {c})
  v1: f16[{n}, {o}, {h}, {w}]({o}*{h}*{w}, 1, {o}*{w}, {o}) = op aten.conv2d.default({call})
  return [v1]
}}
"""


@pytest.mark.parametrize(
    ("image", "channels", "window", "sm", "expected"),
    [
        ((2, 64, 64), (960, 320), (3, 3), 90, "faster"),
        ((2, 64, 64), (960, 320), (3, 3), 89, "slower"),
        ((32, 28, 28), (128, 128), (3, 3), 90, "slower"),
        ((2, 8, 8), (1280, 1280), (3, 3), 90, "slower"),  # too few programs for either
        ((8, 1, 3000), (768, 768), (1, 3), 90, "slower"),  # a sequence
        ((16, 64, 64), (320, 320), (1, 1), 90, "slower"),  # a product
        ((16, 64, 64), (640, 640), (3, 3), 90, "faster"),
    ],
)
def test_convolutions(
    image: tuple[int, int, int], channels: tuple[int, int], window: tuple[int, int], sm: int, expected: str
) -> None:
    (n, h, w), (c, o), (kh, kw) = image, channels, window
    call = f"input=in0, weight=in1, padding=[{kh // 2}, {kw // 2}]"
    text = CONVOLUTION.format(n=n, c=c, h=h, w=w, o=o, kh=kh, kw=kw, call=call)
    text = re.sub(r"\d+(\*\d+)+", lambda found: str(math.prod(map(int, found[0].split("*")))), text)
    assert library(parse(text), sm) == expected
