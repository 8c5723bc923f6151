"""What is right of a region, in pieces: the same numbers as all at once, in little memory."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.lowering.kernels import test_kernel_attention_backward as backward
from tests.lowering.kernels.kernel_bodies import body, random_tensor
from tests.lowering.kernels.test_kernel_ops import sampled
from torch_rtx.errors import RtxError
from torch_rtx.ir import Graph, Node, TensorType, attr_values
from torch_rtx.runtime import reference
from torch_rtx.runtime.bind import bind
from torch_rtx.runtime.candidate_check import CandidateCheck
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.independent_axes import cut, families, shape_of
from torch_rtx.runtime.reference import Calls, Level, Part, in_float64
from torch_rtx.runtime.streaming import nbytes

CPU = torch.device("cpu")
NOTHING = Graph("import")
# Operators whose samples PyTorch has, of sizes that can be cut.
OPERATORS = (
    *("where", "cumsum", "roll", "split", "cat", "stack", "gather", "scatter", "index_select", "index_copy"),
    *("index_put", "squeeze", "permute", "tril"),
)
# Calls, with the axes of the first result that can be cut, or together with others.
CALLS = {
    "sum": ("x: f32[4, 3, 6]\ny: f32[4, 6] = sum.dim_IntList(self=x, dim=[1])", {0, 1}),
    "sum of all": ("x: f32[4, 3]\ny: f32[()] = sum.default(self=x)", set()),
    "maximum": ("x: f32[4, 3, 6]\ny: f32[4, 3, 1] = amax.default(self=x, dim=[-1], keepdim=True)", {0, 1}),
    "statistics": ("x: f32[4, 6]\ny: f32[4], z: f32[4] = var_mean.correction(self=x, dim=[1], correction=0)", {0}),
    "softmax": ("x: f32[4, 6]\ny: f32[4, 6] = _softmax.default(self=x, dim=1, half_to_float=False)", {0}),
    "normalized": (
        "x: f32[2, 4, 3, 6]\nw: f32[3, 6]\ny: f32[2, 4, 3, 6] = "
        "layer_norm.default(input=x, normalized_shape=[3, 6], weight=w, bias=None, eps=1e-5)",
        {0, 1},
    ),
    "groups": (
        "x: f32[2, 12, 5]\nw: f32[12]\ny: f32[2, 12, 5] = group_norm.default(input=x, num_groups=4, weight=w)",
        {0, 1},
    ),
    "one group": ("x: f32[2, 12, 5]\ny: f32[2, 12, 5] = group_norm.default(input=x, num_groups=1)", {0}),
    "rows merged": ("x: f32[4, 3, 6]\ny: f32[12, 6] = view.default(self=x, size=[12, 6])", {0, 1}),
    "rows split": ("x: f32[12, 6]\ny: f32[4, 3, 3, 2] = view.default(self=x, size=[4, 3, 3, 2])", {0, 2}),
    "rows of one": ("x: f32[1, 4, 6]\ny: f32[4, 6] = view.default(self=x, size=[4, 6])", {0, 1}),
    "turned": ("x: f32[4, 6]\ny: f32[6, 4] = t.default(self=x)", {0, 1}),
    "with itself turned": (
        "x: f32[6, 6]\nt: f32[6, 6] = t.default(self=x)\ny: f32[6, 6] = add.Tensor(self=x, other=t)",
        set(),
    ),
    "expanded": ("x: f32[4, 1]\ny: f32[4, 6] = expand.default(self=x, size=[4, 6])", {0, 1}),
    "padded": ("x: f32[4, 6]\ny: f32[4, 9] = constant_pad_nd.default(self=x, pad=[1, 2])", {0}),
    "constants": ("y: f32[4, 6] = full.default(size=[4, 6], fill_value=2.0)", {0, 1}),
    "product": ("x: f32[4, 3]\nw: f32[3, 6]\ny: f32[4, 6] = mm.default(self=x, mat2=w)", {0, 1}),
    "square": ("x: f32[6, 6]\ny: f32[6, 6] = mm.default(self=x, mat2=x)", set()),
    "linear": (
        "x: f32[2, 4, 3]\nw: f32[6, 3]\nb: f32[6]\ny: f32[2, 4, 6] = linear.default(input=x, weight=w, bias=b)",
        {0, 1, 2},
    ),
    "with an addend": (
        "a: f32[1, 6]\nx: f32[4, 3]\nw: f32[3, 6]\ny: f32[4, 6] = addmm.default(self=a, mat1=x, mat2=w)",
        {0, 1},
    ),
    "batches": ("x: f32[2, 4, 3]\nw: f32[2, 3, 6]\ny: f32[2, 4, 6] = bmm.default(self=x, mat2=w)", {0, 1, 2}),
    "convolution": (
        "x: f32[2, 3, 5, 5]\nw: f32[4, 3, 3, 3]\nb: f32[4]\n"
        "y: f32[2, 4, 3, 3] = conv2d.default(input=x, weight=w, bias=b)",
        {0, 1},
    ),
    "by channel": (
        "x: f32[2, 4, 5, 5]\nw: f32[4, 1, 3, 3]\ny: f32[2, 4, 3, 3] = conv2d.default(input=x, weight=w, groups=4)",
        {0},
    ),
    "transposed": (
        "x: f32[2, 3, 5]\nw: f32[3, 4, 3]\ny: f32[2, 4, 7] = convolution.default(input=x, weight=w, bias=None, "
        "stride=[1], padding=[0], dilation=[1], transposed=True, output_padding=[0], groups=1)",
        {0, 1},
    ),
    "attention": (
        "q: f32[2, 4, 6, 8]\nk: f32[2, 4, 5, 8]\nm: f32[2, 1, 6, 5]\n"
        "y: f32[2, 4, 6, 8] = scaled_dot_product_attention.default(query=q, key=k, value=k, attn_mask=m)",
        {0, 1, 2},
    ),
    "shared heads": (
        "q: f32[2, 4, 6, 8]\nk: f32[2, 2, 5, 8]\nv: f32[2, 2, 5, 10]\n"
        "y: f32[2, 4, 6, 10] = torch_rtx.attention.default(query=q, key=k, value=v, scale=0.3, enable_gqa=True)",
        {0, 1, 2},
    ),
    "a mask for all": (
        "q: f32[2, 4, 6, 8]\nk: f32[2, 4, 5, 8]\nm: bool[6, 5]\n"
        "y: f32[2, 4, 6, 8] = torch_rtx.attention.default(query=q, key=k, value=k, attn_mask=m, scale=0.3)",
        {0, 1, 2},
    ),
    "causal": (
        "q: f32[2, 4, 6, 8]\nk: f32[2, 4, 6, 8]\nv: f32[2, 4, 6, 8]\n"
        "y: f32[2, 4, 6, 8] = scaled_dot_product_attention.default(query=q, key=k, value=v, is_causal=True)",
        {0, 1},
    ),
    "shuffled": (
        "x: f32[2, 3, 8, 2, 2]\ny: f32[2, 3, 2, 4, 4] = pixel_shuffle.default(self=x, upscale_factor=2)",
        {0, 1},
    ),
    "pooled": ("x: f32[2, 3, 4, 4]\ny: f32[2, 3, 2, 2] = max_pool2d.default(self=x, kernel_size=[2, 2])", {0, 1}),
    "sampled": (
        "x: f32[2, 3, 4, 4]\ng: f32[2, 5, 5, 2]\ny: f32[2, 3, 5, 5] = grid_sampler_2d.default("
        "input=x, grid=g, interpolation_mode=0, padding_mode=0, align_corners=False)",
        {0, 1},
    ),
    "resized": ("x: f32[2, 3, 4]\ny: f32[2, 3, 8] = upsample_nearest1d.default(self=x, output_size=[8])", {0, 1}),
    "looked up": ("t: f32[9, 6]\ni: i64[2, 4]\ny: f32[2, 4, 6] = embedding.default(weight=t, indices=i)", {0, 1, 2}),
    "indexed": (
        "t: f32[9, 2, 9, 4]\ni: i64[5]\ny: f32[5, 2, 4] = index.Tensor(self=t, indices=[i, None, i])",
        {0, 1, 2},
    ),
}


def assert_cut_right(graph: Graph, tensors: dict[str, torch.Tensor]) -> int:
    """Each family of each result alone, by single units and by several: the same as all at once. Returns how many."""
    found = 0
    for output in attr_values(graph.outputs):
        alone = replace(graph, outputs=(output,))
        named = {value.name: value for value in (*graph.inputs, output)}
        (whole,) = compile_graph(in_float64(alone), CPU)([_wide(tensors[value.name]) for value in graph.inputs], ())
        for family in families(alone, [output]):
            sizes = {(n, a): shape_of(named[n])[a] // family.units for n, a in family.axes.items() if n in named}
            for units in {1, family.units // 2 + 1} - {family.units}:
                part = Part(cut(alone, family, units), (0,), (Level(family, units, sizes),), NOTHING, NOTHING, 0)
                pieces = [(lies, new, Calls(part, CPU, True)(tensors, lies)[0]) for lies, new in part.places()]
                assert_joined(output.name, pieces, whole)
                found += 1
    return found


def assert_joined(name: str, pieces: list[Any], whole: torch.Tensor) -> None:
    """Each element of `whole` is new in one of the pieces."""
    seen = torch.zeros(whole.shape, dtype=torch.int32)
    for lies, new, made in pieces:
        at = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(lies[name], new[name], strict=True))
        torch.testing.assert_close(made[new[name]], whole[at], rtol=1e-9, atol=1e-9, equal_nan=True)
        seen[at] += 1
    assert bool((seen == 1).all())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def test_samples() -> None:
    for name in OPERATORS:
        checked = 0
        for one in sampled(name, every=False):
            tensors = {value.name: x for value, x in zip(one.graph.inputs, one.tensors, strict=True)}
            checked += assert_cut_right(one.graph, tensors)
        assert checked, name


def drawn(graph: Graph) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {value.name: random_tensor(value.type, {}) for value in graph.inputs}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    text, axes = CALLS[name]
    graph = body(f"{text}\nreturn y")
    (output,) = attr_values(graph.outputs)
    assert {family.axes[output.name] for family in families(graph, [output])} == axes
    assert bool(assert_cut_right(graph, drawn(graph))) == bool(axes)


@pytest.mark.parametrize("name", ["mask of keys", "shared heads, causal", "a mask and a bias"])
def test_attention_of_training(name: str) -> None:
    call = backward.CALLS[name]
    for text in (call.forward(), call.backward()):
        graph = bind(body(text, "f32"), backward.SIZES if call.dim else {})
        assert assert_cut_right(graph, drawn(graph)) or name.startswith("shared heads")


# Regions, with the results that are computed together.
REGIONS = {
    "logits": (
        """x: H[3, 5, 8]
w: H[40, 8]
f: H[15, 8] = view.default(self=x, size=[15, 8])
t: H[8, 40] = t.default(self=w)
p: H[15, 40] = mm.default(self=f, mat2=t)
q: H[3, 5, 40] = view.default(self=p, size=[3, 5, 40])
s: H[3, 5, 40] = tanh.default(self=q)
y: H[3, 5, 40] = mul.Tensor(self=s, other=30.0)
return y""",
        [(0,)],
    ),
    "normalized product": (
        """x: H[24, 16]
w: H[16, 24]
a: f32[24, 16] = _to_copy.default(self=x, dtype='f32')
b: f32[24, 16] = mul.Tensor(self=a, other=a)
m: f32[24, 1] = mean.dim(self=b, dim=[-1], keepdim=True)
e: f32[24, 1] = add.Scalar(self=m, other=1e-5)
r: f32[24, 1] = rsqrt.default(self=e)
n: f32[24, 16] = mul.Tensor(self=a, other=r)
h: H[24, 16] = _to_copy.default(self=n, dtype='H')
y: H[24, 24] = mm.default(self=h, mat2=w)
return y""",
        [(0,)],
    ),
    "causal": (
        """q: H[3, 2, 24, 8]
k: H[3, 2, 24, 8]
v: H[3, 2, 24, 8]
o: H[3, 2, 24, 8] = scaled_dot_product_attention.default(query=q, key=k, value=v, is_causal=True)
t: H[3, 24, 2, 8](384, 8, 192, 1) = transpose.int(self=o, dim0=1, dim1=2)
c: H[3, 24, 2, 8] = clone.default(self=t, memory_format='contiguous_format')
y: H[3, 24, 16] = view.default(self=c, size=[3, 24, 16])
return y""",
        [(0,)],
    ),
    "a large product": ("x: H[96, 10]\nw: H[10, 96]\ny: H[96, 96] = mm.default(self=x, mat2=w)\nreturn y", [(0,)]),
    "a mask of positions": (
        """x: H[30, 40]
r: i64[30] = arange.default(end=30, device='main')
c: i64[40] = arange.default(end=40, device='main')
u: i64[30, 1] = unsqueeze.default(self=r, dim=1)
m: bool[30, 40] = ge.Tensor(self=u, other=c)
y: H[30, 40] = mul.Tensor(self=x, other=m)
return y""",
        [(0,)],
    ),
    "a row and its sum over rows": (
        """x: H[50, 24]
g: H[50, 24]
y: H[50, 24] = mul.Tensor(self=x, other=g)
z: H[24] = sum.dim_IntList(self=y, dim=[0])
m: H[50] = amax.default(self=y, dim=[1])
return y, z, m""",
        [(0,), (1,), (2,)],
    ),
    "queries, keys and values in one tensor": (
        """x: H[1, 24, 48]
p: H[1, 24, 16](1152, 48, 1) = slice.Tensor(self=x, dim=2, start=0, end=16)
a: H[1, 24, 2, 8](1152, 48, 8, 1) = view.default(self=p, size=[1, 24, 2, 8])
q: H[1, 2, 24, 8](1152, 8, 48, 1) = transpose.int(self=a, dim0=1, dim1=2)
r: H[1, 24, 16](1152, 48, 1) = slice.Tensor(self=x, dim=2, start=16, end=32)
b: H[1, 24, 2, 8](1152, 48, 8, 1) = view.default(self=r, size=[1, 24, 2, 8])
k: H[1, 2, 24, 8](1152, 8, 48, 1) = transpose.int(self=b, dim0=1, dim1=2)
s: H[1, 24, 16](1152, 48, 1) = slice.Tensor(self=x, dim=2, start=32, end=48)
c: H[1, 24, 2, 8](1152, 48, 8, 1) = view.default(self=s, size=[1, 24, 2, 8])
v: H[1, 2, 24, 8](1152, 8, 48, 1) = transpose.int(self=c, dim0=1, dim1=2)
y: H[1, 2, 24, 8] = scaled_dot_product_attention.default(query=q, key=k, value=v)
return y""",
        [(0,)],
    ),
    "a cache": (
        """c: H[4, 30, 8]
i: i64[3]
x: H[4, 3, 8]
n: H[4, 3, 8] = neg.default(self=x)
y: H[4, 30, 8] = index_copy_.default(self=c, dim=1, index=i, source=n)
return y""",
        [(0,)],
    ),
}
SMALL = 6 << 10  # bytes: regions that are tests are small


def kernel_of(name: str, dtype: str = "f16") -> Node:
    graph = body(REGIONS[name][0].replace("'H'", f"'{dtype}'"), dtype)
    given = tuple((value.name, value) for value in graph.inputs)
    made = tuple(replace(value, name=f"{value.name}_made") for value in attr_values(graph.outputs))
    return Node("kernel", "k", given, made, graph)


class Live(TorchDispatchMode):
    """The most bytes of float64 that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and one.device.type != "meta":
                storage = one.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.live)
        return made

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


@pytest.mark.parametrize("name", REGIONS)
def test_regions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is what the region computes at once, and takes little memory; wrong elements are found wherever they
    are."""
    node = kernel_of(name)
    assert node.body is not None
    whole = CandidateCheck(node, CPU)
    monkeypatch.setattr(reference, "BUDGET", SMALL)
    check = CandidateCheck(node, CPU)
    assert [part.positions for part in check._parts] == REGIONS[name][1]
    assert all(part.levels and part.bytes <= SMALL for part in check._parts)
    whole._inputs = check._inputs
    exact = [piece.right for piece in whole._pieces(wide=True)]
    seen = [torch.zeros(one.shape, dtype=torch.int32) for one in exact]
    for piece in check._pieces(wide=True):
        seen[piece.position][piece.lies] += 1
        torch.testing.assert_close(piece.right, exact[piece.position][piece.lies], rtol=1e-9, atol=1e-9)
    del piece
    with Live() as live:
        for piece in check._pieces(wide=True):
            del piece
    assert all(bool((one == 1).all()) for one in seen)
    assert live.most <= 1.5 * SMALL < sum(one.nbytes for one in exact) + whole._parts[0].bytes
    assert_found(check)


def assert_found(check: CandidateCheck) -> None:
    """Right results are, and others are not."""
    right = check.code({})(check._given(), ())
    assert check.problem(lambda *_: right) is None  # type: ignore[arg-type]
    for position, one in enumerate(right):
        for place in (0, one.numel() // 2, one.numel() - 1):
            wrong = [x.clone() for x in right]
            wrong[position].view(-1)[place] += 100
            assert f"output {position}" in str(check.problem(lambda *_, wrong=wrong: wrong))  # type: ignore[misc,arg-type]


TABLE = """t: f16[4000, 16]
i: i64[2, 6]
e: f16[2, 6, 16] = embedding.default(weight=t, indices=i)
y: f16[2, 6, 16] = layer_norm.default(input=e, normalized_shape=[16])
return y"""


def test_a_table_stays_narrow() -> None:
    """Only the rows that are looked up become float64."""
    graph = body(TABLE)
    given = tuple((value.name, value) for value in graph.inputs)
    check = CandidateCheck(Node("kernel", "k", given, (graph.outputs[0],), graph), CPU)
    with Live() as live:
        (piece,) = check._pieces(wide=True)
    table, indices = check._inputs
    expected = torch.nn.functional.layer_norm(table.double()[indices], (16,))
    torch.testing.assert_close(piece.right, expected, rtol=1e-12, atol=1e-12)
    assert piece.right.dtype == torch.float64
    assert live.most < 1.5 * check._parts[0].bytes < table.nbytes
    assert_found(check)


def test_calls_need_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel runs, results that are those of the calls are right; others are compared with float64."""
    check = CandidateCheck(kernel_of("logits"), CPU)
    code = check.code({})
    made = list[Graph]()
    monkeypatch.setattr(reference, "in_float64", lambda graph: made.append(graph) or in_float64(graph))
    assert check.problem(code) is None
    assert not made
    right = code.run
    twice = replace(code, run=lambda *given: [2 * one for one in right(*given)])
    assert "relative error" in str(check.problem(twice))
    assert made


def test_small_regions_are_not_cut() -> None:
    for name in REGIONS:
        check = CandidateCheck(kernel_of(name), CPU)
        assert [part.levels for part in check._parts] == [()]


def test_one_tensor_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row that is summed there are no pieces; of filters there are a few, though the image does not fit."""
    monkeypatch.setattr(reference, "BUDGET", SMALL)
    row = body("x: f16[1, 4096]\ny: f16[1] = sum.dim_IntList(self=x, dim=[1])\nreturn y")
    image = body(
        "x: f16[1, 8, 32, 32]\nw: f16[16, 8, 3, 3]\ny: f16[1, 16, 30, 30] = conv2d.default(input=x, weight=w)\nreturn y"
    )
    counts = []
    for graph in (row, image):
        given = tuple((value.name, value) for value in graph.inputs)
        check = CandidateCheck(Node("kernel", "k", given, tuple(attr_values(graph.outputs)), graph), CPU)
        counts.append(len(list(check._pieces(wide=True))))
        assert check.problem(check.code({})) is None
    assert counts[0] == 1
    assert 1 < counts[1] <= 8


def test_memory_that_a_check_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and results as they are, and a piece: twice as much has to be free, or kept by the allocator."""
    monkeypatch.setattr(reference, "BUDGET", SMALL)
    check = CandidateCheck(kernel_of("logits"), CPU)
    monkeypatch.setattr(check, "device", torch.device("cuda", 0))
    need = 2 * (3 * 5 * 8 + 40 * 8 + 3 * 5 * 40) + max(part.bytes for part in check._parts)
    for free, kept, fits in (
        (2 * need, 0, True),
        (2 * need - 2, 0, False),
        (need, need, True),
        (need, need - 2, False),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, kept=kept: kept + 100)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
        with nullcontext() if fits else pytest.raises(RtxError, match="checking it needs"):
            check._check_memory()


@pytest.mark.gpu
def test_memory_of_a_check() -> None:
    """Beside inputs and results in their dtypes, a check of logits and one of attention need little memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    texts = (
        "x: f16[512, 1024]\nw: f16[65536, 1024]\ny: f16[512, 65536] = linear.default(input=x, weight=w)\nreturn y",
        "q: f16[4, 16, 2048, 64]\nk: f16[4, 16, 2048, 64]\nv: f16[4, 16, 2048, 64]\ny: f16[4, 16, 2048, 64] = "
        "scaled_dot_product_attention.default(query=q, key=k, value=v, is_causal=True)\nreturn y",
    )
    for text in texts:
        graph = body(text)
        outputs = tuple(attr_values(graph.outputs))
        given = tuple((value.name, value) for value in graph.inputs)
        types = [value.type for value in (*graph.inputs, *outputs)]
        own = sum(nbytes(type_) for type_ in types if isinstance(type_, TensorType))
        torch.mm(torch.ones(8, 8, device=device), torch.ones(8, 8, device=device))  # a workspace of the library
        torch.mm(*(torch.ones(8, 8, device=device, dtype=torch.float64) for _ in range(2)))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        check = CandidateCheck(Node("kernel", "k", given, outputs, graph), device)
        right = compile_graph(graph, device)(check._given(), ())
        assert check.problem(lambda *_, right=right: right) is None  # type: ignore[misc,arg-type]
        more = torch.cuda.max_memory_allocated(device) - before - own
        piece = max(part.bytes for part in check._parts)
        assert piece <= reference.MORE * reference.BUDGET
        assert more < piece + reference.BUDGET
        assert check.problem(lambda *_, right=right: [1.1 * right[0]]) is not None  # type: ignore[misc,arg-type]
        del check, right
