"""Neighbours as pairs: tiles that are split in registers, and joined again."""

from __future__ import annotations

import pytest

from tests.lowering.kernels.kernel_bodies import body, check
from torch_rtx.lowering.kernels.loops import LoopConfig, loop_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.toolchain import Job, lower

ROTATED = """
p: f32[1, N, 6, HALF, 2] = view.default(self=v, size=[1, N, 6, HALF, 2])
e: f32[1, N, 6, HALF](ES) = select.int(self=p, dim=-1, index=0)
o: f32[1, N, 6, HALF](ES) = select.int(self=p, dim=-1, index=1)
ec: f32[1, N, 6, HALF] = mul.Tensor(self=e, other=cos)
os: f32[1, N, 6, HALF] = mul.Tensor(self=o, other=sin)
first: f32[1, N, 6, HALF] = sub.Tensor(self=ec, other=os)
es: f32[1, N, 6, HALF] = mul.Tensor(self=e, other=sin)
oc: f32[1, N, 6, HALF] = mul.Tensor(self=o, other=cos)
second: f32[1, N, 6, HALF] = add.Tensor(self=es, other=oc)
s: f32[1, N, 6, HALF, 2] = stack.default(tensors=[first, second], dim=-1)
w: f32[1, N, 6, SIZE] = view.default(self=s, size=[1, N, 6, SIZE])
y: H[1, N, 6, SIZE] = _to_copy.default(self=w, dtype='DTYPE')
return y
"""
HEADS = "x: H[1, 6, WIDE]\n"
TABLES = "cos: f32[6, HALF]\nsin: f32[6, HALF]\n"
SLICED = """
h: H[1, 6, N, SIZE](ALL, WIDE, SIZE, 1) = view.default(self=x, size=[1, 6, N, SIZE])
t: H[1, N, 6, SIZE](ALL, SIZE, WIDE, 1) = permute.default(self=h, dims=[0, 2, 1, 3])
"""
JOINED = """
a: H[1, N, 2, SIZE]
b: H[1, N, 4, SIZE]
t: H[1, N, 6, SIZE] = cat.default(tensors=[a, b], dim=2)
"""
NORM = "n: H[1, N, 6, SIZE] = rms_norm.default(input=t, normalized_shape=[SIZE], weight=weight, eps=1e-06)\n"
WIDENED = "v: f32[1, N, 6, SIZE] = _to_copy.default(self=FROM, dtype='f32')"


def sized(text: str, size: int, dtype: str, heads: int = 3) -> str:
    """`text` with `heads` heads of `size` elements."""
    words = {"DTYPE": dtype, "HALF": size // 2, "SIZE": size, "WIDE": heads * size, "ALL": 6 * heads * size}
    text = text.replace("ES", f"{heads * 6 * size}, {6 * size}, {size}, 2")
    for word, number in words.items():
        text = text.replace(word, str(number))
    return "\n".join(line for line in text.replace("N,", f"{heads},").splitlines() if line)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    ("size", "config", "paired"),
    [
        (16, LoopConfig(4, 16, 4), True),
        (48, LoopConfig(2, 16, 4, held=True), True),
        (48, LoopConfig(2, 64, 4), False),  # a tile with a mask
        (16, LoopConfig(2, 8, 4), False),  # in steps
    ],
)
def test_rows_that_are_rotated(size: int, config: LoopConfig, paired: bool, dtype: str) -> None:
    text = HEADS + TABLES + "weight: H[SIZE]\n" + SLICED + NORM + WIDENED.replace("FROM", "n") + ROTATED
    source = check(sized(text, size, dtype), loop_kernel, config, dtype).source
    tiles = size // config.elements if config.held else 1
    assert source.count("tl.split(") == source.count("tl.join(") == (tiles if paired else 0)
    if paired:
        assert source.count("tl.load(") == 4 * tiles  # the row, the weight, the cosines and the sines
        assert "tl.where" not in source


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("given", [HEADS + SLICED, JOINED])
@pytest.mark.parametrize("rows", [32, 256])
def test_elements_that_are_rotated(given: str, rows: int, dtype: str) -> None:
    text = sized(given + TABLES + WIDENED.replace("FROM", "t") + ROTATED, 16, dtype)
    source = check(text, loop_kernel, LoopConfig(rows, 1, 4), dtype).source
    assert ("tl.split(" in source) == (rows == 32)
    if rows == 32:
        assert source.count("tl.where") == (given == JOINED)
        assert "% 2)" not in source


def test_what_is_no_pair() -> None:
    """Neighbours that a tensor does not have on either side, and parts of which one has no elements of its own."""
    odd = """
    x: f32[6, 15]
    e: f32[6, 8](15, 2) = slice.Tensor(self=x, dim=1, step=2)
    i: f32[6, 8] = neg.default(self=e)
    s: f32[6, 8, 2] = stack.default(tensors=[e, i], dim=-1)
    return s
    """
    source = check(odd, loop_kernel, LoopConfig(32, 1, 4), "f32").source
    assert "tl.split(" not in source
    assert "tl.join(" in source
    number = """
    x: f32[6, 8]
    z: f32[6, 8] = full.default(size=[6, 8], fill_value=2, dtype='f32')
    s: f32[6, 8, 2] = stack.default(tensors=[x, z], dim=-1)
    return s
    """
    assert "tl.join(" not in check(number, loop_kernel, LoopConfig(32, 1, 4), "f32").source


def test_pairs_stay_in_their_threads() -> None:
    """No element moves by way of shared memory, and loads are of 16 bytes."""
    text = sized(HEADS + SLICED + TABLES + WIDENED.replace("FROM", "t") + ROTATED, 128, "bf16", 8)
    kernel = loop_kernel(region(body(text, "bf16")), "kernel", LoopConfig(1024, 1, 4))
    code = lower(Job("kernel", kernel.source, kernel.pointers, (), False, 4, 1, 90))
    assert code.shared == code.spills == 0
    assert code.ptx.decode().count("ld.global.v4.b32") == 1 + 2  # of eight elements of x, and of four of each table
