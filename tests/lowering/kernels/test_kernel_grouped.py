"""Products of groups of rows, in Triton's interpreter against their definition in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.numerics import assert_right
from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import DTYPES, body, offered
from torch_rtx.errors import Unsupported
from torch_rtx.grouped_mm import _by_masks
from torch_rtx.lowering.kernels.families.grouped import FAMILY
from torch_rtx.lowering.kernels.matmul_template import GemmConfig
from torch_rtx.lowering.kernels.region import region
from torch_rtx.runtime.code import compile_graph
from torch_rtx.targets import arch_of

CPU = torch.device("cpu")
PLAIN = """
x: H[37, 50]
w: H[5, 50, 24]
o: i32[5]
y: H[37, 24] = torch_rtx.grouped_mm.default(self=x, mat2=w, offs=o)
return y
"""
EXPERTS = """
dim s = 1, 64, 4
x: H[s, 32]
w: H[5, 48, 32]
o: i64[5]
m: bool[s, 1]
t: H[5, 32, 48](1536, 1, 32) = transpose.int(self=w, dim0=1, dim1=2)
y: H[s, 48] = torch_rtx.grouped_mm.default(self=x, mat2=t, offs=o)
f: H[s, 48] = masked_fill.Scalar(self=y, mask=m, value=0.0)
a: H[s, 24](48, 1) = slice.Tensor(self=f, dim=1, start=0, end=24)
b: H[s, 24](48, 1) = slice.Tensor(self=f, dim=1, start=24, end=48)
g: H[s, 24] = silu.default(self=a)
z: H[s, 24] = mul.Tensor(self=g, other=b)
return z
"""
OFFSETS = {
    "uneven": [3, 20, 21, 30, 37],
    "empty groups": [0, 0, 16, 16, 37],
    "rows behind the last group": [1, 2, 3, 17, 20],
    "no rows": [0, 0, 0, 0, 0],
    "out of order and of range": [-7, 30, 12, 99, 5],
}


def defined(x: torch.Tensor, w: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    out, begin = x.new_zeros(x.shape[0], w.shape[2]), 0
    for matrix, given in zip(w, offsets, strict=True):
        end = max(begin, min(given, x.shape[0]))
        out[begin:end] = x[begin:end] @ matrix
        begin = end
    return out


@pytest.mark.parametrize(
    ("offsets", "dtype"),
    [*((offsets, "f16") for offsets in OFFSETS.values()), *((OFFSETS["uneven"], dtype) for dtype in ("bf16", "f32"))],
    ids=[*OFFSETS, "bf16", "f32"],
)
def test_groups(offsets: list[int], dtype: str) -> None:
    graph, kind = body(PLAIN, dtype), DTYPES[dtype]
    torch.manual_seed(0)
    x, w, o = torch.randn(37, 50).to(kind), torch.randn(5, 50, 24).to(kind), torch.tensor(offsets, dtype=torch.int32)
    exact = defined(x.double(), w.double(), offsets)
    (call,) = compile_graph(graph, CPU)([x, w, o], ())
    assert_right([_by_masks(x, w, o.clamp(0, 37).cummax(0).values)], [call], [exact])
    for config in (GemmConfig(16, 16, 16, group_m=2), GemmConfig(32, 32, 64)):  # several steps, and one
        found = torch.full((37, 24), torch.nan, dtype=kind)
        run(FAMILY.kernel(region(graph), "kernel", config), [x, w, o, found])
        assert_right([found], [call], [exact])
        assert bool((found[max(0, *map(min, offsets, [37] * 5)) :] == 0).all())


@pytest.mark.parametrize("offsets", [[3, 20, 21, 30, 37], [0, 0, 16, 16, 37], [0, 37, 37, 37, 37]], ids=str)
def test_groups_that_are_all_rows(offsets: list[int]) -> None:
    """Whoever calls knows that there are no others: nothing is put in order."""
    graph = body(PLAIN.replace("offs=o", "offs=o, whole=True"))
    torch.manual_seed(0)
    x, w, o = torch.randn(37, 50).half(), torch.randn(5, 50, 24).half(), torch.tensor(offsets, dtype=torch.int32)
    exact = defined(x.double(), w.double(), offsets)
    (call,) = compile_graph(graph, CPU)([x, w, o], ())
    kernel = FAMILY.kernel(region(graph), "kernel", GemmConfig(16, 16, 16, group_m=2))
    found = torch.full((37, 24), torch.nan, dtype=torch.float16)
    run(kernel, [x, w, o, found])
    assert_right([found], [call], [exact])
    assert "_later" not in kernel.source


def test_a_tile_reads_no_rows_behind_its_group() -> None:
    """A tile may begin anywhere, and reach beyond all rows, also if these are a multiple of its own."""
    source = FAMILY.kernel(region(body(PLAIN.replace("37", "32"))), "kernel", GemmConfig(16, 16, 16)).source
    (load,) = (line for line in source.splitlines() if "tl.load(ap" in line)
    assert "in_m" in load


@pytest.mark.parametrize("rows", [1, 19, 64])
def test_the_gate_of_experts_is_part_of_the_product(rows: int) -> None:
    graph = body(EXPERTS)
    torch.manual_seed(0)
    x, w, m = torch.randn(rows, 32).half(), torch.randn(5, 48, 32).half(), torch.rand(rows, 1) < 0.2
    o = torch.randint(0, rows + 1, (5,)).sort().values
    full = defined(x.double(), w.double().mT, o.tolist()).masked_fill(m, 0)
    exact = torch.nn.functional.silu(full[:, :24]) * full[:, 24:]
    (call,) = compile_graph(graph, CPU)([x, w, o, m], ())
    found = torch.full((rows, 24), torch.nan, dtype=torch.float16)
    kernel = FAMILY.kernel(region(graph), "kernel", GemmConfig(16, 8, 16))
    run(kernel, [x, w, o, m, found], {"s": rows})
    assert_right([found], [call], [exact])
    assert kernel.source.count("tl.dot") == 2


@pytest.mark.parametrize(("sm", "dtype", "kinds"), [(90, "bf16", 2), (90, "f16", 1), (89, "bf16", 1), (80, "bf16", 1)])
def test_the_library_is_a_rival_where_it_does_not_wait_for_the_device(sm: int, dtype: str, kinds: int) -> None:
    assert list(offered(body(PLAIN, dtype), sm)) in (["kernel", "library"][:kinds], ["library", "kernel"][:kinds])


def test_few_rows_are_not_padded_to_large_tiles() -> None:
    """Each of 64 experts gets a few of 256 rows, so that a tile of 128 rows would be padding."""
    text = PLAIN.replace("37", "256").replace("5,", "64,").replace("[5]", "[64]").replace("50", "1024")
    configs = FAMILY.configs(region(body(text)), arch_of(90))
    assert configs[0].block_m == 16


@pytest.mark.parametrize("groups", ["2000", "s"])
def test_what_remains_a_call(groups: str) -> None:
    text = f"""
dim s = 1, 9, 2
x: H[37, 50]
w: H[{groups}, 50, 24]
o: i32[{groups}]
y: H[37, 24] = torch_rtx.grouped_mm.default(self=x, mat2=w, offs=o)
return y
"""
    with pytest.raises(Unsupported, match="groups"):
        FAMILY.configs(region(body(text)), arch_of(90))


@pytest.mark.parametrize(("rows", "first"), [(32, "kernel"), (4096, "library")])
def test_expected_times_know_what_matrices_of_few_rows_cost(rows: int, first: str) -> None:
    """All are read whatever the rows are: by FLOPs alone, a library would be ten times as fast with few."""
    text = PLAIN.replace("37", str(rows)).replace("5,", "8,").replace("[5]", "[8]").replace("50", "4096")
    found = offered(body(text.replace("24", "28672"), "bf16"), 90)
    times = {kind: tactic.expected_us for kind, tactic in found.items()}
    assert min(times, key=times.__getitem__) == first
    assert max(times.values()) < 1.2 * min(times.values())
