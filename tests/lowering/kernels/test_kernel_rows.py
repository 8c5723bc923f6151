"""Split forms of reductions: rows in parts, in Triton's interpreter against ATen; and where they are chosen."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.splits import split_in
from tests.lowering.kernels.kernel_bodies import body, check_split, check_split_graph, random_tensor, split
from torch_rtx.errors import Unsupported
from torch_rtx.ir import Graph
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.targets import arch_of

DTYPES = ("f16", "bf16", "f32")
IMAGE, FLAT = "[2, 12, 6, 10](720, 1, 120, 12)", "[2, 12, 6, 10]"


def group_norm(image: str, extra: str = "", last: str = "n", groups: int = 3) -> str:
    lines = "w: H[12]\nb: H[12]"
    call = f"group_norm.default(input=h, num_groups={groups}, weight=w, bias=b, eps=1e-05)"
    return f"h: H{image}\n{lines}\nn: H{image} = {call}\n{extra}\nreturn {last}".replace("\n\n", "\n")


def rows(call: str, result: str, given: str = "[3, 120]", dtype: str = "H") -> str:
    return f"x: H{given}\ny: {dtype}{result} = {call}\nreturn y"


# Texts and how many kernels they take.
FORMS = {
    "group norm": (group_norm(IMAGE), 3),
    "group norm of rows": (group_norm(FLAT), 3),
    "group norm, one group": (group_norm(IMAGE, groups=1), 3),
    "a group for each channel": (group_norm(IMAGE, groups=12), 3),
    "group norm of sequences": (
        "h: H[2, 12, 60]\nn: H[2, 12, 60] = group_norm.default(input=h, num_groups=4)\nreturn n",
        3,
    ),
    "to rows, with what follows": (
        f"h: H{IMAGE}\nn: H{FLAT} = group_norm.default(input=h, num_groups=3)\n"
        f"s: H{FLAT} = silu.default(self=n)\nc: H{IMAGE} = clone.default(self=s, memory_format='channels_last')\n"
        "return c",
        3,
    ),
    "of two images side by side": (
        "x: H[2, 8, 6, 10](480, 1, 80, 8)\nz: H[2, 4, 6, 10](240, 1, 40, 4)\n"
        f"h: H{IMAGE} = cat.default(tensors=[x, z], dim=1)\n"
        f"n: H{IMAGE} = group_norm.default(input=h, num_groups=3, eps=1e-06)\nreturn n",
        3,
    ),
    "group norm with mean and scale": (
        f"h: H{FLAT}\nn: H{FLAT}, m: H[2, 3], s: H[2, 3] = native_group_norm.default(input=h, weight=None, bias=None, "
        "N=2, C=12, HxW=60, group=3, eps=1e-05)\nreturn n, m, s",
        3,
    ),
    "an activation beside its gradient, of which columns are sums": (
        "g: H[120, 6]\nx: H[120, 6]\ny: H[120, 6] = gelu.default(self=x)\n"
        "d: H[120, 6] = gelu_backward.default(grad_output=g, self=x)\n"
        "s: H[6] = sum.dim_IntList(self=d, dim=[0])\nreturn y, d, s",
        2,
    ),
    "an activation of something else": (
        "g: H[120, 6]\nx: H[120, 6]\nz: H[120, 6]\ny: H[120, 6] = gelu.default(self=z)\n"
        "d: H[120, 6] = gelu_backward.default(grad_output=g, self=x)\n"
        "s: H[6] = sum.dim_IntList(self=d, dim=[0])\nreturn y, d, s",
        3,
    ),
    "layer norm": (
        "x: H[3, 120]\nw: H[120]\nb: H[120]\n"
        "y: H[3, 120] = layer_norm.default(input=x, normalized_shape=[120], weight=w, bias=b)\nreturn y",
        3,
    ),
    "layer norm over two dimensions": (
        "x: H[3, 8, 15]\nw: H[8, 15]\n"
        "y: H[3, 8, 15] = layer_norm.default(input=x, normalized_shape=[8, 15], weight=w)\nreturn y",
        3,
    ),
    "layer norm with mean and scale": (
        "x: H[3, 120]\ny: H[3, 120], m: H[3, 1], s: H[3, 1] = native_layer_norm.default(input=x, "
        "normalized_shape=[120], weight=None, bias=None, eps=1e-05)\nreturn y, m, s",
        3,
    ),
    "rms norm": (
        "x: H[3, 120]\nw: H[120]\ny: H[3, 120] = rms_norm.default(input=x, normalized_shape=[120], weight=w)\nreturn y",
        3,
    ),
    "softmax": (rows("softmax.int(self=x, dim=-1)", "[3, 120]"), 3),
    "safe softmax": (rows("_safe_softmax.default(self=x, dim=-1)", "[3, 120]"), 3),
    "softmax of columns": (rows("softmax.int(self=x, dim=0)", "[120, 3]", "[120, 3]"), 3),
    "log softmax": (rows("log_softmax.int(self=x, dim=1)", "[3, 120]"), 3),
    "sum of everything": (rows("sum.default(self=x)", "[()]", "[6, 4, 10]"), 2),
    "sum of rows": (rows("sum.dim_IntList(self=x, dim=[1])", "[3]"), 2),
    "sum of columns": (rows("sum.dim_IntList(self=x, dim=[0], keepdim=True)", "[1, 5]", "[120, 5]"), 2),
    "sum of flags": (
        "x: H[3, 120]\ng: bool[3, 120] = gt.Scalar(self=x, other=0.0)\n"
        "y: i64[3] = sum.dim_IntList(self=g, dim=[1])\nreturn y",
        2,
    ),
    "mean of images": (
        f"x: H{IMAGE}\ny: H[2, 12, 1, 1] = mean.dim(self=x, dim=[2, 3], keepdim=True)\nreturn y",
        2,
    ),
    "mean of everything": (rows("mean.default(self=x)", "[()]"), 2),
    "mean over dimensions that are apart": (rows("mean.dim(self=x, dim=[0, 2])", "[4]", "[6, 4, 10]"), 2),
    "largest": (rows("amax.default(self=x, dim=[-1])", "[3]"), 2),
    "smallest of everything": (rows("min.default(self=x)", "[()]"), 2),
    "norm": (rows("linalg_vector_norm.default(self=x, ord=2, dim=[1], keepdim=True)", "[3, 1]"), 2),
    "largest norm": (rows("linalg_vector_norm.default(self=x, ord=inf)", "[()]"), 2),
    "logarithm of a sum of exponentials": (rows("logsumexp.default(self=x, dim=[1])", "[3]"), 2),
    "variance": (rows("var.correction(self=x, dim=[1])", "[3]"), 2),
    "standard deviation of columns": (rows("std.correction(self=x, dim=[0], correction=0)", "[5]", "[120, 5]"), 2),
    "variance and mean": (
        "x: H[3, 120]\nv: H[3, 1], m: H[3, 1] = var_mean.correction(self=x, dim=[1], correction=1, keepdim=True)\n"
        "d: H[3, 120] = sub.Tensor(self=x, other=m)\nreturn d, v",
        3,
    ),
    "two sums of one row": (
        "x: H[3, 120]\nq: H[3, 120] = mul.Tensor(self=x, other=x)\n"
        "a: H[3, 1] = mean.dim(self=x, dim=[1], keepdim=True)\n"
        "b: H[3, 1] = mean.dim(self=q, dim=[1], keepdim=True)\nd: H[3, 120] = sub.Tensor(self=x, other=a)\n"
        "y: H[3, 120] = mul.Tensor(self=d, other=b)\nreturn y",
        3,
    ),
    "one sum after the other": (
        "x: H[3, 120]\nm: H[3, 1] = amax.default(self=x, dim=[-1], keepdim=True)\n"
        "d: H[3, 120] = sub.Tensor(self=x, other=m)\n"
        "e: H[3, 120] = exp.default(self=d)\ns: H[3, 1] = sum.dim_IntList(self=e, dim=[-1], keepdim=True)\n"
        "y: H[3, 120] = div.Tensor(self=e, other=s)\nreturn y",
        5,
    ),
    "what is made of whole rows": (
        "x: H[3, 120]\nz: H[3, 1]\nm: H[3, 1] = mean.dim(self=x, dim=[1], keepdim=True)\n"
        "a: H[3, 1] = add.Tensor(self=m, other=z)\ny: H[3, 1] = sigmoid.default(self=a)\nreturn y",
        2,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, dtype: str) -> None:
    text, kernels = FORMS[name]
    assert len(check_split(text, 4, dtype).nodes) == kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_stored_once(dtype: str) -> None:
    """What comes before the norm and is read by others is written by the first kernel, and read by the last."""
    text = group_norm(IMAGE).replace("h: H", "x: H", 1).replace("\nw:", f"\nz: H{IMAGE}\nw:", 1)
    text = text.replace("n: H", f"h: H{IMAGE} = add.Tensor(self=x, other=z)\nn: H", 1).replace(
        "return n", "return h, n"
    )
    form = check_split(text, 4, dtype)
    first, _, last = form.nodes
    assert [value.name for value in first.outputs][-1] == "h"  # type: ignore[union-attr]
    assert [value.name for value in last.inputs][:3] == ["w", "b", "h"]
    assert [node.op for node in last.body.nodes].count("aten.add.Tensor") == 1  # type: ignore[union-attr]
    kernel = generate(first.body, "k", arch_of(80), 0)  # type: ignore[arg-type]
    assert kernel is not None
    assert kernel.source.count("tl.load") == 2  # each element once, though it is summed and stored


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    "text",
    [
        group_norm("[s, 12, 6, 10](720, 1, 120, 12)"),
        group_norm("[s, 12, 6, 10]"),
        rows("sum.default(self=x)", "[()]", "[s, 4, 30]"),
        rows("softmax.int(self=x, dim=-1)", "[s, 120]", "[s, 120]"),
        rows("mean.dim(self=x, dim=[2, 3])", "[s, 4]", "[s, 4, 6, 20]"),
    ],
)
def test_symbolic_batch(text: str, size: int) -> None:
    check_split(f"dim s = 1, 32, 1\n{text}", 4, dims={"s": size})


@pytest.mark.parametrize(("rows_", "columns"), [(7, 11), (9, 25), (1, 77), (13, 3)])
@pytest.mark.parametrize("last", [True, False])
def test_odd_sizes(rows_: int, columns: int, last: bool) -> None:
    """Parts are as long as divisors allow."""
    strides = f"({15 * rows_ * columns}, 1, {15 * columns}, 15)" if last else ""
    image = f"[1, 15, {rows_}, {columns}]{strides}"
    check_split(f"h: H{image}\nn: H{image} = group_norm.default(input=h, num_groups=5)\nreturn n", 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [FORMS["group norm"][0], FORMS["layer norm"][0], FORMS["variance"][0]])
def test_large_means_and_small_variances(text: str, dtype: str) -> None:
    graph = body(text, dtype)
    torch.manual_seed(0)
    tensors = [random_tensor(value.type, {}) for value in graph.inputs]
    tensors[0] = (tensors[0].float() * 0.5 + 32).to(tensors[0].dtype).as_strided_(tensors[0].shape, tensors[0].stride())
    check_split_graph(graph, body(text, "f64"), 4, tensors, {})


@pytest.mark.parametrize(
    "name", ["softmax", "safe softmax", "log softmax", "logarithm of a sum of exponentials", "largest"]
)
def test_rows_of_infinities(name: str) -> None:
    """Parts, and a row, of nothing but minus infinity, which a mask leaves; infinities and NaN as ATen has them."""
    graph = body(FORMS[name][0], "f32")
    (x,) = (random_tensor(value.type, {}) for value in graph.inputs)
    x[0, :60], x[1] = -torch.inf, -torch.inf
    check_split_graph(graph, body(FORMS[name][0], "f64"), 4, [x], {})
    x[0, 3], x[2, 100] = torch.inf, torch.nan
    check_split_graph(graph, body(FORMS[name][0], "f64"), 4, [x], {})


@pytest.mark.parametrize("kind", ["max", "min"])
def test_places_of_extremes(kind: str) -> None:
    """The first of equal ones, or of NaNs."""
    both = f"x: H[4, 120]\nv: H[4], i: i64[4] = {kind}.dim(self=x, dim=1)\nreturn v, i"
    columns = f"x: H[120, 4]\ni: i64[1, 4] = arg{kind}.default(self=x, dim=0, keepdim=True)\nreturn i"
    x = torch.randint(0, 9, (4, 120)).half()
    x[1, 77], x[1, 99], x[2], x[3, :90] = torch.nan, torch.nan, 3, x[3, 90:].amax() + 1
    for text, given in ((both, x), (columns, x.T.contiguous())):
        graph = body(text)
        form = check_split_graph(graph, body(text, "f64"), 4, [given], {})
        assert len(form.nodes) == 2


def test_what_has_no_form() -> None:
    for text, message in {
        rows("cumsum.default(self=x, dim=1)", "[3, 120]"): "cumsum.default in chunks",
        rows("softmax.int(self=x, dim=-1)", "[3, 127]", "[3, 127]"): "no equal chunks",  # 127 is prime
        rows("sum.dim_IntList(self=x, dim=[0])", "[3]", "[s, 3]"): "no equal chunks",  # of an open number of rows
        rows("argmax.default(self=x)", "[()]", "[6, 20]", "i64"): "several dimensions",
        rows("exp.default(self=x)", "[3, 120]"): "without an anchor or rows",
    }.items():
        with pytest.raises(Unsupported, match=message):
            split_in(body(f"dim s = 1, 32, 1\n{text}" if "[s," in text else text), "k", 4)


# ---- where they are chosen -------------------------------------------------------------------------------------------


def normed(channels: int, size: int, batch: object = 2) -> str:
    area = size * size
    image = f"[{batch}, {channels}, {size}, {size}]({channels * area}, 1, {channels * size}, {channels})"
    return f"h: H{image}\nn: H{image} = group_norm.default(input=h, num_groups=32)\nreturn n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (normed(320, 64), True),
        (normed(1280, 32), True),
        (normed(320, 64, "s"), True),
        (normed(1280, 16, 16), False),  # enough rows, of runs of 40 elements: on an H200 13 us, 18 in parts
        (normed(1280, 16), False),  # few steps
        (normed(1280, 8), False),  # a row fits in registers
        (normed(64, 8), False),
        (rows("softmax.int(self=x, dim=-1)", "[8, 50257]", "[8, 50257]"), True),
        (rows("softmax.int(self=x, dim=-1)", "[8, 768]", "[8, 768]"), False),
        (rows("softmax.int(self=x, dim=-1)", "[8192, 50257]", "[8192, 50257]"), False),  # fills any chip
        (rows("softmax.int(self=x, dim=-1)", "[8, 50261]", "[8, 50261]"), False),  # prime
        (rows("argmax.default(self=x, dim=-1)", "[4]", "[4, 128256]", "i64"), True),
        (rows("argmax.default(self=x)", "[()]", "[6, 20]", "i64"), False),  # in several dimensions
        (rows("sum.default(self=x)", "[()]", "[64, 100000]"), True),
        (rows("sum.default(self=x)", "[()]", "[64, 10]"), False),
        (rows("sum.default(self=x)", "[()]", "[64, 0]"), False),
        (rows("softmax.int(self=x, dim=-1)", "[0, 50257]", "[0, 50257]"), False),
        (rows("mean.dim(self=x, dim=[2, 3])", "[32, 2048]", "[32, 2048, 7, 7]"), False),
        (rows("exp.default(self=x)", "[3, 120]"), False),
    ],
)
@pytest.mark.parametrize("sm", [80, 90, 120])
def test_rows_that_are_split(text: str, expected: bool, sm: int) -> None:
    graph = body(f"dim s = 1, 4, 1\n{text}" if "[s," in text else text)
    form = split(graph, "k", sm)
    assert (form is not None) is expected
    assert form == split(graph, "k", sm)


@pytest.mark.parametrize("sm", [80, 90])
def test_many_rows_of_short_runs(sm: int) -> None:
    """A whole row takes as much computing as memory allows where runs have 10 elements: 162 us on an H200, 49 in
    parts."""
    assert split(body(normed(320, 64, 16)), "k", sm) is not None


def test_neighbouring_threads_read_neighbouring_channels() -> None:
    form = split(body(normed(320, 64)), "k", 90)
    assert isinstance(form, Graph)
    first, _, last = (generate(node.body, node.op, arch_of(90), 0) for node in form.nodes)  # type: ignore[arg-type]
    assert first is not None
    assert last is not None
    assert "tl.load(h + ((X % 320) + 20480 * (X // 320) + 320 * R))" in first.source
    assert "tl.load(h + (X))" in last.source
