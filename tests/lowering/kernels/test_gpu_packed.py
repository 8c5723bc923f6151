"""Products of packed weights on a GPU: every form of their kernels, right by the float64 criterion, and always the same
bits. In Hopper's products from registers a step is unpacked while the one before is multiplied."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.lowering.kernels.kernel_bodies import FLOATS, body, random_tensor
from tests.lowering.kernels.test_gpu_kernels import session, target_of
from tests.lowering.kernels.test_kernel_packed import BYTES, gated, packed
from tests.lowering.kernels.test_kernel_split import kernel_graph
from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.families.gemm import GemmConfig, gemm_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.code import compile_graph

pytestmark = pytest.mark.gpu

JOINED = GemmConfig(256, 128, 128, 8, 3, joined=True)
WIDE, DEEP = GemmConfig(128, 64, 128, 4, 4, joined=True), GemmConfig(64, 64, 256, 4, 3, joined=True)
STACKED = GemmConfig(256, 64, 64, 8, 3, joined=True, stacked=True)
CASES = {
    "joined": (packed(512, 1024, 2048, 128, 32, "T"), JOINED),
    "joined, groups of 32": (packed(300, 200, 2048, 32, 32, "T"), WIDE),
    "joined, few steps": (packed(64, 512, 512, 64, 32, "T"), DEEP),
    "parts": (packed(100, 200, 2048, 128, 32, "T"), GemmConfig(32, 64, 128, 2, 4)),
    "few rows": (packed(8, 2000, 2048, 128, 32, "T"), GemmConfig(8, 64, 256, 2, 3)),
    "slices": (packed(1, 1000, 4096, 128, 32, "T"), GemmConfig(8, 8, 256, 2, 3, slices=4)),
    "joined bytes": (packed(512, 1024, 2048, 128, 32, "T", bits=8), JOINED),
    "joined bytes, few steps": (packed(64, 512, 256, 64, 16, "T", bits=8), DEEP),
    "parts of bytes": (packed(100, 200, 2048, 128, 32, "T", bits=8), GemmConfig(32, 64, 128, 2, 4)),
    "few rows of packed bytes": (packed(8, 2000, 2048, 128, 32, "T", bits=8), GemmConfig(8, 64, 128, 2, 3)),
    "stacked": (gated(packed(500, 2048, 2048, 128, 32, "T"), 500, 1024), replace(STACKED, block_k=128)),
    "stacked bytes": (gated(packed(512, 2000, 2048, 2048, 32, "T", bits=8), 512, 1000), STACKED),
    "slices, 7 rows": (packed(7, 1000, 4096, 32, 32, "T"), GemmConfig(8, 16, 256, 2, 3, slices=2)),
    "many rows of bytes": (BYTES.replace("[3,", "[512,").replace("24", "1024"), GemmConfig(256, 128, 64, 8, 4)),
    "slices of bytes": (BYTES.replace("[3,", "[2,"), GemmConfig(8, 8, 128, 2, 4, slices=4)),
}


def case_text(text: str, dtype: str) -> str:
    """The body of a case, with the types that are left open."""
    return re.sub(r"\b[TH]\b", dtype, text).replace("HALF", dtype).replace("DEPTH", "512").replace("BYTES", "i8")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_right(case: str, dtype: str) -> None:
    text, config = CASES[case]
    target = target_of("native")
    if config.num_warps >= 4 and "wgmma" not in target.arch.features:
        pytest.skip("a tile for Hopper")
    found = body(case_text(text, dtype), dtype)
    torch.manual_seed(0)
    inputs = [random_tensor(value.type, {}).cuda() for value in found.inputs]
    made = session(gemm_kernel(region(found), "k", config), kernel_graph(found, "k"), target)
    first, *others = [[tensor.clone() for tensor in made(inputs)] for _ in range(60)]
    device = torch.device("cuda")
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = compile_graph(parse(re.sub(FLOATS, "f64", str(found))), device)(wide, ())
    assert_right(first, compile_graph(found, device)(inputs, ()), exact)
    assert all(torch.equal(one, other) for run in others for one, other in zip(first, run, strict=True))
