"""What calls in an engine file may not do: each is refused before anything runs."""

from __future__ import annotations

import pytest
import torch

from torch_rtx import aten, optable
from torch_rtx.errors import CallError, EngineFormatError, InvalidIR, RtxError
from torch_rtx.irparse import parse
from torch_rtx.runtime.code import compile_graph
from torch_rtx.runtime.file_check import FileCheck
from torch_rtx.runtime.file_rules import RULES

CPU = torch.device("cpu")
ATTENTION = "extern aten.scaled_dot_product_attention.default"
NORM = "extern aten._native_batch_norm_legit_no_training.default(input=x, weight=w, bias=w, running_mean=w, "
LSTM = "has_biases=False, num_layers=1, dropout=0.0, train=False, bidirectional=False, batch_first=False)"


def graph(*lines: str) -> str:
    return "graph fused {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def check(*lines: str, trusted: tuple[str, ...] = ()) -> FileCheck:
    return FileCheck(parse(graph(*lines)), CPU, trusted)


def call(inputs: str, *nodes: str) -> tuple[str, ...]:
    return (*(f"input {one}" for one in inputs.split("; ")), *nodes, "return [y]")


# inputs, the call, and what is wrong with it
WRONG = {
    "dtype as a number": (
        "x: f32[4]",
        "y: f32[4] = extern aten._to_copy.default(self=x, dtype=-1)",
        "'dtype' is no Scal",
    ),
    "format as a number": (
        "x: f32[4]",
        "y: f32[4] = extern aten.clone.default(self=x, memory_format=3)",
        "no MemoryFormat",
    ),
    "unknown dtype": ("x: f32[4]", "y: f32[4] = extern aten._to_copy.default(self=x, dtype='q8')", "no dtype 'q8'"),
    "layout": (
        "x: f32[4]",
        "y: f32[4] = extern aten._to_copy.default(self=x, layout='sparse')",
        "'layout' is no Layout",
    ),
    "pinned": ("x: f32[4]", "y: f32[4] = extern aten._to_copy.default(self=x, pin_memory=True)", "'pin_memory'"),
    "device": ("x: f32[4]", "y: f32[4] = extern aten._to_copy.default(self=x, device='meta')", "no device 'meta'"),
    "missing device": (
        "x: f32[4]",
        "y: f32[4].cuda99 = extern aten._to_copy.default(self=x, device='cuda99')",
        "no device",
    ),
    "other device": ("x: f32[4]", "y: f32[4].cuda99 = extern aten.relu.default(self=x)", "no device cuda99"),
    "unknown name": ("x: f32[4]", "y: f32[4] = extern aten.relu.default(self=x, alpha=1)", "no argument 'alpha'"),
    "missing": ("x: f32[4]", "y: f32[4] = extern aten.mm.default(self=x)", "argument 'mat2' is missing"),
    "string": ("x: f32[4]", "y: f32[4] = extern aten.add.Tensor(self=x, other=x, alpha='1')", "'alpha' is no number"),
    "nested": ("x: f32[4]", "y: f32[4] = extern aten.sum.dim_IntList(self=x, dim=[[0]])", "'dim' is no List"),
    "tensor in list": ("x: f32[4]", "y: f32[8] = extern aten.cat.default(tensors=[x, 1])", "it does not take"),
    "shape": (
        "x: f32[2, 2]",
        "y: f32[9, 9] = extern aten.mm.default(self=x, mat2=x)",
        r"returns f32\[2, 2\], not f32\[9",
    ),
    "smaller": ("x: f32[2, 2]", "y: f32[1, 1] = extern aten.mm.default(self=x, mat2=x)", "it returns"),
    "rank": ("x: f32[2, 2]", "y: f32[4] = extern aten.mm.default(self=x, mat2=x)", "it returns"),
    "dtype": ("x: f32[2, 2]", "y: u8[2, 2] = extern aten.mm.default(self=x, mat2=x)", "it returns"),
    "gaps": ("x: f32[2, 2]", "y: f32[2, 2](1000, 1) = extern aten.mm.default(self=x, mat2=x)", "the strides"),
    "view with gaps": ("x: f32[2, 2]", "y: f32[2, 2](8, 1) = view aten.t.default(self=x)", "the strides"),
    "overlap": ("x: f32[2, 2]", "y: f32[2, 2](0, 0) = extern aten.mm.default(self=x, mat2=x)", "the strides"),
    "number": ("x: f32[2]", "y: int = extern aten.relu.default(self=x)", "does not return int"),
    "results": ("x: f32[2]", "y: f32[2], z: f32[2] = extern aten.relu.default(self=x)", "has 1 results, not 2"),
    "pieces": ("x: f32[4]", "y: f32[1], z: f32[1] = view aten.split.Tensor(self=x, split_size=1)", "4 results"),
    "symbols": (
        "x: f32[4]",
        "y: f32[3] = extern aten.full.default(size=[2], fill_value=0, device='main')",
        "it returns",
    ),
    "negative": ("x: f32[4]", "y: f32[4] = extern aten.slice.Tensor(self=x, dim=7)", "it does not take"),
    "fallback writes": ("x: f32[4]", "y: f32[4] = fallback aten.copy_.default(self=x, src=x)", "must not write"),
    "backward": ("x: f32[4]", "y: f32[4] = extern aten.tanh_backward.default(grad_output=x, output=x)", "allow-list"),
    "storage": (
        "x: f32[4]",
        "y: f32[2] = view aten.as_strided.default(self=x, size=[2], stride=[1], storage_offset=0)",
        "allow-list",
    ),
    "as_strided": (
        "x: f32[4]",
        "y: f32[3, 2](2, 1) = view aten.as_strided.default(self=x, size=[3, 2], stride=[2, 1])",
        "it reaches 6 elements far in memory of 4",
    ),
    "as_strided in gaps": (
        "x: f32[2, 2](8, 1)",
        "y: f32[10] = view aten.as_strided.default(self=x, size=[10], stride=[1])",
        "it reaches 10 elements far in memory of 4",
    ),
    "as_strided of an expanded tensor": (
        "x: f32[4](0)",
        "y: f32[4] = view aten.as_strided.default(self=x, size=[4], stride=[1])",
        "it reaches 4 elements far in memory of 1",
    ),
    "statistics": (
        "x: f32[1, 400]; w: f32[1]",
        f"y: f32[1, 400], _, _ = {NORM}running_var=w, momentum=0.1, eps=0.0)",
        "shape",
    ),
    "fft dim": (
        "x: f32[8]",
        "y: c64[5] = extern aten._fft_r2c.default(self=x, dim=[9], normalization=0, onesided=True)",
        "dim",
    ),
    "fft enum": (
        "x: c64[8]",
        "y: c64[8] = extern aten._fft_c2c.default(self=x, dim=[0], normalization=9, forward=True)",
        "norma",
    ),
    "fft size": (
        "x: c64[3]",
        "y: f32[99] = extern aten._fft_c2r.default(self=x, dim=[0], normalization=0, last_dim_size=99)",
        "last_dim_size",
    ),
    "fft frequencies": (
        "x: c64[9]",
        "y: f32[14] = extern aten._fft_c2r.default(self=x, dim=[0], normalization=0, last_dim_size=14)",
        "last_dim_size",
    ),
    "randperm without a device": ("x: i64[1]", "y: i64[1] = extern aten.randperm.default(n=8589934592)", "it returns"),
    "window without a device": (
        "x: f32[1]",
        "y: f32[1] = extern aten.hann_window.default(window_length=8589934592)",
        "it returns",
    ),
    "numbers alone": ("x: f32[1]", "y: f32[1] = extern aten.repeat.default(self=1, repeats=[8589934592])", "numbers"),
    "sampler": (
        "x: f32[1, 1, 4, 4]; g: f32[1, 2, 2, 2]",
        "y: f32[1, 1, 2, 2] = extern aten.grid_sampler_2d.default(input=x, grid=g, interpolation_mode=9, "
        "padding_mode=0, align_corners=False)",
        "interpolation_mode is 9",
    ),
    "values": (
        "x: f32[1, 1, 512, 64]; v: f32[1, 1, 1, 64]",
        f"y: f32[1, 1, 512, 64] = {ATTENTION}(query=x, key=x, value=v)",
        "shap",
    ),
    "mask": (
        "x: f32[1, 1, 8, 4]; m: f32[8, 2]",
        f"y: f32[1, 1, 8, 4] = {ATTENTION}(query=x, key=x, value=x, attn_mask=m)",
        "broadcast",
    ),
    "weight norm": (
        "x: f32[1000, 4]; g: f32[1, 1]",
        "y: f32[1000, 4], _ = extern aten._weight_norm_interface.default(v=x, g=g, dim=0)",
        "g has the shape",
    ),
    "weight norm of a view": (
        "x: f32[1, 1]; g: f32[1, 4]",
        "v: f32[1000, 4](0, 0) = view aten.expand.default(self=x, size=[1000, 4])",
        "y: f32[1000, 4], _ = extern aten._weight_norm_interface.default(v=v, g=g, dim=1)",
        "not contiguous",
    ),
    "group norm": (
        "x: f32[2, 4, 4]",
        "y: f32[2, 4, 4], _, _ = extern aten.native_group_norm.default(input=x, weight=None, bias=None, N=2, C=4, "
        "HxW=1000, group=2, eps=1e-05)",
        "N, C and HxW",
    ),
    "scale": (
        "x: f32[1, 1, 8, 8]",
        "y: f32[1, 1, 8, 8] = extern aten.upsample_nearest2d.default(self=x, output_size=[8, 8], scales_h=1e-30)",
        "a scale",
    ),
    "tables of an empty tensor": (
        "x: f32[0, 1, 8]",
        "y: f32[0, 1, 4294967296] = extern aten.upsample_linear1d.default(self=x, output_size=[4294967296], "
        "align_corners=False)",
        "is empty",
    ),
    "reduction": (
        "x: f32[4]",
        "y: f32[()] = extern aten.mse_loss.default(self=x, target=x, reduction=7)",
        "reduction is 7",
    ),
    "number of a size": ("x: f32[4, 3]", "y: int[5] = extern aten.sym_size.int(self=x, dim=0)", "does not return int"),
    "number of another kind": ("n: int", "y: int = extern torch_rtx.truediv.default(a=n, b=2)", "does not return int"),
    "number that is a tensor": ("n: int", "y: f32[()] = extern torch_rtx.add.default(a=n, b=2)", "does not return f32"),
    "item of another kind": (
        "x: f32[()]",
        "y: int = extern aten._local_scalar_dense.default(self=x)",
        "does not return int",
    ),
    "lstm": (
        "x: f32[5, 2, 4]; h: f32[1, 2, 8]; a: f32[1, 4]; b: f32[32, 8]",
        f"y: f32[5, 2, 8], _, _ = extern aten.lstm.input(input=x, hx=[h, h], params=[a, b], {LSTM}",
        "other shapes",
    ),
}


FUSED = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
OTHERS = {"fewer heads": (1, 3, 8, 16), "more heads": (1, 8, 8, 16), "batches": (2, 4, 8, 16), "empty": (1, 4, 0, 16)}


@pytest.mark.quick
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", FUSED)
def test_kernels_of_attention_get_heads_and_batches_that_fit(kind: str, name: str) -> None:
    query, other = torch.empty(1, 4, 8, 16, device="meta"), torch.empty(OTHERS[name], device="meta")
    rule = RULES[f"_scaled_dot_product_{kind}"]
    assert rule({"query": query, "key": other, "value": other}, [True])
    half = query[:, :2]
    assert not rule({"query": query, "key": half, "value": half}, [True])


@pytest.mark.quick
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("target", ["f32[0]", "f32[1, 4]", "f32[()]"])
def test_targets_of_losses_have_the_shape_of_the_input(loss: str, target: str) -> None:
    with pytest.raises(EngineFormatError, match="the target has the shape"):
        check(
            *call(f"x: f32[4]; t: {target}", f"y: f32[4] = extern aten.{loss}.default(self=x, target=t, reduction=0)")
        )


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused(name: str) -> None:
    inputs, *nodes, message = WRONG[name]
    with pytest.raises(RtxError, match=message):
        check(*call(inputs, *nodes))


RIGHT = {
    "numbers": ("x: f32[4]", "y: f32[4] = extern aten.add.Tensor(self=x, other=2, alpha=0.5)"),
    "permuted": ("x: f32[2, 3]", "y: f32[2, 3](1, 2) = extern aten.relu.default(self=x)"),
    "broadcast": ("x: f32[4]", "y: f32[2, 4](0, 1) = view aten.expand.default(self=x, size=[2, 4])"),
    "positions": ("x: f32[4]", "y: i64[u, 1] = extern aten.nonzero.default(self=x)"),
    "different": (
        "x: f32[4, 3]",
        "y: f32[u], i: i64[4, 3], c: i64[u] = "
        "extern aten._unique2.default(self=x, return_inverse=True, return_counts=True)",
    ),
    "different rows": (
        "x: f32[4, 3]",
        "y: f32[u, 3], i: i64[4], _ = extern aten.unique_dim.default(self=x, dim=-2, return_inverse=True)",
    ),
    "boxes": (
        "b: f32[1, 8, 2]; s: f32[1, 3, 8]; l: f32[()]",
        "y: i64[1, 3, 5] = extern torch_rtx.suppressed.default(low=b, high=b, scores=s, limit=l, count=5)",
    ),
    "masked": ("x: f32[4, 3]; m: bool[4]", "y: f32[u, 3] = extern aten.index.Tensor(self=x, indices=[m])"),
    "item": ("x: i64[()]", "y: int = extern aten._local_scalar_dense.default(self=x)"),
    "size": ("x: f32[4, 3]", "y: int[4] = extern aten.sym_size.int(self=x, dim=0)"),
    "quotient": ("n: int", "y: float = extern torch_rtx.truediv.default(a=1, b=n)"),
    "comparison": ("n: float", "y: bool = extern torch_rtx.lt.default(a=n, b=2)"),
    "least": ("n: int", "y: float = extern torch_rtx.sym_min.default(a=n, b=1.5)"),
    "rounded": ("n: float", "y: int[u] = extern torch_rtx.round.default(number=n)"),
    "product with a number": ("x: f32[4]; n: float", "y: f32[4] = extern aten.mul.Tensor(self=x, other=n)"),
    "grouped heads": (
        "x: f32[1, 4, 8, 16]; k: f32[1, 2, 6, 16]; m: bool[8, 6]",
        f"y: f32[1, 4, 8, 16] = {ATTENTION}(query=x, key=k, value=k, attn_mask=m, enable_gqa=True)",
    ),
    "padded heads": (  # as libraries on a GPU return heads of 36
        "x: f16[2, 4, 8, 36]",
        f"y: f16[2, 4, 8, 36](1280, 320, 40, 1) = {ATTENTION}(query=x, key=x, value=x)",
    ),
    "lstm": (
        "x: f32[5, 2, 4]; h: f32[1, 2, 8]; a: f32[32, 4]; b: f32[32, 8]",
        f"y: f32[5, 2, 8], _, _ = extern aten.lstm.input(input=x, hx=[h, h], params=[a, b], {LSTM}",
    ),
    "scaled": (
        "x: f32[1, 1, 5, 5]",
        "y: f32[1, 1, 7, 7] = extern aten.upsample_nearest2d.default(self=x, output_size=[7, 7], scales_h=1.5)",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_call_is_accepted(name: str) -> None:
    inputs, node = RIGHT[name]
    check("dim u = 0, None, 1", *call(inputs, node))


def test_no_operator_of_a_file_is_untrusted() -> None:
    assert optable.FILE_OPS < optable.ALLOWED
    names = {name.split(".")[1] for name in optable.FILE_OPS}
    assert not [name for name in names if "backward" in name]
    # These two have the checks of `index` and `view`.
    assert {name for name in names if name.startswith("_unsafe")} == {"_unsafe_index", "_unsafe_view"}
    arguments = {
        a.name for name in filter(aten.exists, optable.FILE_OPS) for a in aten.overload(name)._schema.arguments
    }
    assert "unsafe" not in arguments


def test_trusted_operators_are_not_checked() -> None:
    view = "y: f32[9] = view aten.as_strided.default(self=x, size=[9], stride=[1], storage_offset=0)"
    lines = call("x: f32[4]", view)
    with pytest.raises(InvalidIR, match=r'trusted_ops=\["aten.as_strided.default"\]'):
        check(*lines)
    check(*lines, trusted=("aten.as_strided.default",))


def test_bodies_and_recipes_are_checked() -> None:
    body = ("input a: f32[4]", "y: f32[9] = op aten.relu.default(self=a)", "return [y]")
    inner = ("graph import {", *(f"  {line}" for line in body), "}")
    kernel = ("input x: f32[4]", "z: f32[9] = kernel k(a=x) " + inner[0], *inner[1:], "return [z]")
    recipe = ("constant 'c': f32[4]", "weight w: f32[9] = 'c' " + inner[0], *inner[1:], "return [w]")
    for lines in (kernel, recipe):
        with pytest.raises(EngineFormatError, match="relu.default of y: it returns"):
            check(*lines)


def test_equal_calls_are_checked_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model's layers are. The calls on the way to the 20th are no others."""
    layers = [f"v{i}: f32[n] = extern aten.relu.default(self={f'v{i - 1}' if i else 'x'})" for i in range(20)]
    checked = []
    found = check(
        "dim n = 1, None, 1", "input x: f32[n]", *layers, "y: f32[n] = extern aten.neg.default(self=v19)", "return [y]"
    )
    monkeypatch.setattr(FileCheck, "_check", lambda self, node, sizes: checked.append(node.op))
    found.at({"n": 7})
    assert checked == ["aten.relu.default", "aten.neg.default"]
    wrong = (
        "v19: f32[(n + 1)] = extern aten.relu.default(self=v18)",
        "y: f32[(n + 1)] = extern aten.neg.default(self=v19)",
    )
    monkeypatch.undo()
    with pytest.raises(EngineFormatError, match="relu.default of v19: it returns"):
        check("dim n = 1, None, 1", "input x: f32[n]", *layers[:-1], *wrong, "return [y]")


def test_sizes_are_checked_when_they_are_met() -> None:
    """A type that is right for all sizes but one."""
    pad = "extern aten.constant_pad_nd.default(self=x, pad=[0, 4])"
    found = check("dim s = 1, None, 1", *call("x: f32[s]", f"y: f32[(4 + (s % 999983))] = {pad}"))
    found.at({"s": 7})
    with pytest.raises(EngineFormatError, match="constant_pad_nd.default of y: it returns"):
        found.at({"s": 999_983})
    relu = "extern aten.relu.default(self=x)"
    for lie in ("(s // (s + -64))", "(s + -1000)", "(s * 4611686018427387904)"):
        with pytest.raises(EngineFormatError, match=r"relu.default of y: (a size|it returns|f32\[.* negative)"):
            check("dim s = 1, None, 1", *call("x: f32[s]", f"y: f32[{lie}] = {relu}"))


RECIPES = {
    "memory": ("w: f32[2147483648] = op aten.full.default(size=[2147483648], fill_value=1.0, device='main')",),
    "time": tuple(f"{x}: f32[3000, 3000] = op aten.linalg_matrix_exp.default(self={y})" for x, y in ("ac", "ba", "wb")),
    "views": (
        "e: f32[1073741824, 4](0, 1) = op aten.expand.default(self=c, size=[1073741824, 4])",
        "w: f32[4] = op aten.sum.dim_IntList(self=e, dim=[0])",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_a_budget(name: str) -> None:
    given = "c: f32[3000, 3000]" if name == "time" else "c: f32[4]"
    lines = (f"input {given}", *RECIPES[name], "return [w]")
    type_ = lines[-2].partition(" = ")[0].removeprefix("w: ")
    weight = (f"weight w: {type_} = 'c' graph import {{", *(f"  {line}" for line in lines), "}")
    with pytest.raises(EngineFormatError, match="the recipes of the weights take"):
        check(f"constant 'c'{given[1:]}", *weight, "return [w]")


def test_strides_of_parameters_count() -> None:
    with pytest.raises(EngineFormatError, match="the recipes of the weights take"):
        check("constant 'c': f32[2, 2](1000000000, 1)", "weight w: f32[2, 2](1000000000, 1) = 'c'", "return [w]")


def test_a_table_of_common_size_is_computed() -> None:
    lines = ["a: i64[4096] = op aten.arange.default(end=4096, device='main')"]
    lines += ["b: i64[4096, 1] = op aten.unsqueeze.default(self=a, dim=1)"]
    lines += ["c: bool[4096, 4096] = op aten.le.Tensor(self=a, other=b)"]
    lines += ["w: f32[4096, 4096] = op aten._to_copy.default(self=c, dtype='f32')", "return [w]"]
    check("weight w: f32[4096, 4096] = graph import {", *(f"  {line}" for line in lines), "}", "return [w]")


# What a file may state of a size that data decide, and a call where it is wrong.
STATED = {
    "another number": ("i64[5, 1]", "nonzero.default(self=x)", "a size of 3, and the graph has 5"),
    "another size": ("i64[t, 1]", "nonzero.default(self=x)", "a size of 3, and the graph has 4"),
    "half of it": ("i64[(2 * u), 1]", "nonzero.default(self=x)", "a size of 3, and the graph has 2"),
    "a multiple": ("i64[w, 1]", "nonzero.default(self=x)", "a size of 3, which is not from 0 to 8, a multiple of 4"),
    "a mask": ("f32[5]", "index.Tensor(self=x, indices=[m])", "a size of 3, and the graph has 5"),
    "an element": ("int[5]", "_local_scalar_dense.default(self=n)", "a size of 3, and the graph has 5"),
}


@pytest.mark.parametrize("name", STATED)
def test_sizes_that_data_decide_are_compared_with_their_types(name: str) -> None:
    """Memory and kernels rely on them, and no check before the call can know them."""
    type_, call_, message = STATED[name]
    dims = ("dim t = 1, None, 1", "dim u = 0, None, 1", "dim w = 0, 8, 4")
    given = call("x: f32[3]; m: bool[3]; n: i64[()]; z: f32[t]", f"y: {type_} = extern aten.{call_}")
    text = parse(graph(*dims, *given))
    FileCheck(text, CPU)
    code = compile_graph(text, CPU)
    with pytest.raises(CallError, match=message):
        code([torch.ones(3), torch.ones(3, dtype=torch.bool), torch.tensor(3), torch.ones(4)], [])


HUGE = 2**62
ENDLESS = {"pow": (3, HUGE), "lshift": (1, HUGE), "round": (5, -HUGE), "mul": (HUGE, HUGE), "floordiv": (1, 0)}


@pytest.mark.quick
@pytest.mark.parametrize("name", ENDLESS)
def test_arithmetic_of_the_host_is_bounded(name: str) -> None:
    """Python's own would compute numbers of as many bits as memory holds."""
    function = aten.overload(f"torch_rtx.{name}.default")
    if name == "round":
        assert function(*ENDLESS[name]) == 0
        return
    with pytest.raises((ArithmeticError, RuntimeError)):
        function(*ENDLESS[name])
