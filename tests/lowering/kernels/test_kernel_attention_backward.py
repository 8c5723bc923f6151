"""Attention of training steps: what the forward saves, and the gradients of attention to few keys, in Triton's
interpreter, by the float64 criterion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.doubles.interpreter import run
from tests.lowering.kernels.kernel_bodies import body, check, check_split, library, offered
from torch_rtx.errors import Unsupported
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.attention_backward import backward_configs, backward_kernel
from torch_rtx.lowering.kernels.attention_configs import AttentionConfig, attention_configs
from torch_rtx.lowering.kernels.attention_forward import attention_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.source import block_of
from torch_rtx.targets import ARCHES, Arch, Target, arch_of


@dataclass(frozen=True)
class Call:
    """A call of attention in training, as the text of a body.

    Attributes:
        mask, bias: the types of the mask and of what is added beside it, "" without one.
        wanted: the gradient of the mask is.
        extra: lines before the call, which may define the mask m.
        outer: sequence before heads in memory, as linear layers have it.
    """

    batch: int | str = 1
    heads: int = 2
    queries: int | str = 19
    keys: int = 19
    width: int = 16
    values: int | None = None
    shared_heads: int | None = None
    mask: str = ""
    bias: str = ""
    wanted: bool = False
    library: str = "efficient"
    options: str = ""
    extra: str = ""
    outer: bool = False
    dim: str = ""

    def tensor(self, heads: int, length: int | str, width: int) -> str:
        strides = f"({length} * {heads * width}, {width}, {heads * width}, 1)" if self.outer else ""
        return f"H[{self.batch}, {heads}, {length}, {width}]{strides}"

    @property
    def types(self) -> tuple[str, str, str, str, str]:
        """Of query, key, value, result and statistic."""
        shared, values = self.shared_heads or self.heads, self.values or self.width
        rows: int | str = self.queries
        if self.library == "efficient":
            rows = -(-rows // 32) * 32 if isinstance(rows, int) else f"32 * (({rows} + 31) // 32)"
        last = ", 1" if self.library == "cudnn" else ""
        return (
            self.tensor(self.heads, self.queries, self.width),
            self.tensor(shared, self.keys, self.width),
            self.tensor(shared, self.keys, values),
            self.tensor(self.heads, self.queries, values),
            f"f32[{self.batch}, {self.heads}, {rows}{last}]",
        )

    def forward(self) -> str:
        query, key, value, result, statistic = self.types
        given = f"library='{self.library}'{self.options}{', bias=b' if self.bias else ''}"
        mask = "".join(f"{name}: {type_}\n" for name, type_ in (("m", self.mask), ("b", self.bias)) if type_)
        named = ", attn_mask=m" if self.mask or self.extra else ""
        call = f"torch_rtx.attention_forward.default(query=q, key=k, value=v{named}, {given})"
        return (
            f"{self.dim}q: {query}\nk: {key}\nv: {value}\n{mask}{self.extra}y: {result}, lse: {statistic} = {call}\n"
            "return y, lse"
        )

    def backward(self) -> str:
        query, key, value, result, statistic = self.types
        given = f"library='{self.library}'{self.options}, mask_gradient={self.wanted}{', bias=b' if self.bias else ''}"
        mask = "".join(f"{name}: {type_}\n" for name, type_ in (("m", self.mask), ("b", self.bias)) if type_)
        named = "m" if self.mask or self.extra else "None"
        of_mask = f"H[{self.batch}, {self.heads}, {self.queries}, {self.keys}]" if self.wanted else "H[0]"
        inputs = f"g: {result}\nq: {query}\nk: {key}\nv: {value}\n{mask}o: {result}\nlse: {statistic}\n{self.extra}"
        operands = f"grad_out=g, query=q, key=k, value=v, attn_mask={named}, out=o, logsumexp=lse"
        call = f"torch_rtx.attention_backward.default({operands}, {given})"
        names = "dq, dk, dv, dm" if self.wanted else "dq, dk, dv"
        return f"{self.dim}{inputs}dq: {query}, dk: {key}, dv: {value}, dm: {of_mask} = {call}\nreturn {names}"


def biased(**given: object) -> Call:
    call = Call(**given)  # type: ignore[arg-type]
    shape = f"H[{call.batch}, {call.heads}, {call.queries}, {call.keys}]"
    return Call(**{"mask": shape, "wanted": True, **given})  # type: ignore[arg-type]


DIMS = "dim b = 1, 64, 1\ndim m = 1, 512, 1\n"
# NaN in rows of padding.
COMPUTED = """t: H[2, 1, 1, 19]
n: H[1, 1, 19, 1]
m: H[2, 1, 19, 19] = div.Tensor(self=t, other=n)
"""
CALLS = {
    "a window": biased(batch=2, queries=49, keys=49, width=32, outer=True),
    "one block": Call(queries=16, keys=16),
    "several blocks": Call(queries=50, keys=33),
    "causal": Call(queries=37, keys=37, options=", is_causal=True", library="flash"),
    "scale below 0": Call(options=", scale=-0.3"),
    "mask of keys": Call(batch=2, mask="H[2, 1, 1, 19]", library="cudnn"),
    "boolean mask": Call(batch=2, mask="bool[2, 1, 19, 19]"),
    "mask with strides": Call(mask="H[1, 2, 19, 19](1216, 608, 32, 1)", wanted=True),
    "shared heads": Call(heads=6, shared_heads=2, queries=21, keys=21, library="flash"),
    "shared heads, causal": Call(heads=4, shared_heads=1, library="flash", options=", is_causal=True"),
    "head of 72": Call(width=72, queries=17, keys=20),
    "values of 40": biased(width=24, values=40),
    "a mask and a bias": Call(batch=3, mask="H[3, 1, 19, 19]", bias="f32[1, 2, 19, 19]", wanted=True),
    "77 keys": Call(queries=21, keys=77),
    "one query": Call(queries=1, keys=45),
    "open sizes": Call(batch="b", queries="m", outer=True, dim=DIMS),
    "computed mask": Call(batch=2, extra=COMPUTED),
}


SIZES = {"b": 2, "m": 37}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    call = CALLS[name]
    config = AttentionConfig(64 if name == "a window" else 16, block_of(call.keys), 4, 1)
    check(call.backward(), backward_kernel, config, "bf16" if name == "several blocks" else "f16", SIZES)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
def test_what_the_forward_saves(name: str) -> None:
    config = AttentionConfig(32, 32, 4, 1)
    check(CALLS[name].forward(), attention_kernel, config, "bf16" if name == "several blocks" else "f16", SIZES)


SPLIT = {
    "ranges": Call(batch=2, queries=200, keys=20, outer=True),
    "ranges of several blocks": Call(queries=300, keys=33),
    "ranges with a mask": Call(queries=100, mask="H[1, 2, 100, 19]", wanted=True),
    "ranges with a bias": Call(queries=100, mask="H[1, 2, 1, 19]", bias="f32[1, 2, 100, 19]", wanted=True),
    "ranges with a mask of keys": Call(batch=2, queries=70, mask="H[2, 1, 1, 19]"),
}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", SPLIT)
def test_ranges_of_queries(name: str) -> None:
    call = SPLIT[name]
    form = check_split(call.backward(), 2 if call.queries == 300 else 16)
    assert [len(node.outputs) for node in form.nodes] == [4 if call.wanted else 3, 2]


def test_few_heads_are_split_by_queries() -> None:
    def kinds(call: Call) -> list[str]:
        return list(offered(body(call.backward()), 90))

    assert kinds(Call(batch=4, heads=8, queries=4096, keys=77, width=40, library="flash"))[0] == "split"
    assert "split" not in kinds(Call(batch=64, heads=24, queries=49, keys=49, width=32))
    assert "split" not in kinds(Call(heads=8, queries=4096, keys=77, options=", is_causal=True"))
    assert "split" not in kinds(Call(heads=8, shared_heads=4, queries=4096, keys=77, library="flash"))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_rows_without_keys() -> None:
    """Rows that see no key have a result and gradients of 0, and those whose keys all get the least number a mean of
    the values. A library's saved sum cannot tell the latter; none is read."""
    call = biased(mask="H[1, 2, 19, 19]")
    graph = body(call.backward(), "bf16")
    torch.manual_seed(0)
    g, q, k, v = (torch.randn(1, 2, 19, 16).bfloat16() for _ in range(4))
    mask = torch.randn(1, 2, 19, 19).bfloat16()
    mask[0, 0, 3], mask[0, 1, 5] = -math.inf, torch.finfo(torch.bfloat16).min
    made = [torch.full_like(one, math.nan) for one in (q, k, v, mask)]
    kernel = backward_kernel(region(graph), "kernel", AttentionConfig(32, 32, 4, 1))
    run(kernel, [g, q, k, v, mask, g, torch.full((1, 2, 32), math.nan), *made])
    exact = [one.double().requires_grad_() for one in (q, k, v, mask)]
    result = scaled_dot_product_attention(*exact)
    expected = torch.autograd.grad(result, exact, g.double())
    assert not made[0][0, 0, 3].any()
    torch.testing.assert_close(made, [one.bfloat16() for one in expected], atol=2e-2, rtol=2e-2)
    out, saved = torch.full_like(q, math.nan), torch.full((1, 2, 32), math.nan)
    run(
        attention_kernel(region(body(call.forward(), "bf16")), "kernel", AttentionConfig(32, 32, 4, 1)),
        [q, k, v, mask, out, saved],
    )
    torch.testing.assert_close(out, result.bfloat16(), atol=2e-2, rtol=2e-2)
    assert saved[0, 0, 3] == 0
    assert saved[..., 19:].eq(math.inf).all()


@pytest.mark.parametrize("arch", [arch for sm, arch in ARCHES.items() if sm >= 80], ids=lambda arch: f"sm_{arch.sm}")
@pytest.mark.parametrize(("keys", "width"), [(49, 32), (77, 64), (128, 64), (197, 64), (64, 160)])
def test_configurations_fit_the_target(keys: int, width: int, arch: Arch) -> None:
    found = region(body(Call(batch=32, queries=keys, keys=keys, width=width).backward()))
    try:
        configs = backward_configs(found, arch)
    except Unsupported:
        assert keys * width > 8192
        return
    assert len(set(configs)) == len(configs)
    assert all(config.keys == block_of(keys) for config in configs)


def test_a_window_needs_few_registers() -> None:
    """Several programs of a window then share a multiprocessor, and hide each other's waiting."""
    found = region(body(CALLS["a window"].backward()))
    kernel = backward_kernel(found, "kernel", backward_configs(found, arch_of(90))[0])
    built = compile_kernels([(kernel, Target(90))])[kernel, Target(90)]
    assert built.problem is None
    assert built.spills == 0
    assert all(code.registers <= 104 and 5 * code.shared <= arch_of(90).shared for code in built.codes)


@pytest.mark.parametrize(
    ("call", "dtype", "reason"),
    [
        (Call(), "f32", "f32"),
        (Call(keys=300), "f16", "300 keys"),
        (Call(keys=256, width=256), "f16", "256 elements and 256 keys"),
    ],
)
def test_gradients_that_libraries_keep(call: Call, dtype: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        backward_configs(region(body(call.backward(), dtype)), arch_of(80))


def test_what_is_saved_has_no_epilogue() -> None:
    text = (
        CALLS["one block"].forward().replace("return y, lse", "t: f32[1, 2, 32] = neg.default(self=lse)\nreturn y, t")
    )
    with pytest.raises(Unsupported, match="saves"):
        attention_kernel(region(body(text)), "kernel", AttentionConfig(32, 32, 4, 1))


def test_blocks_reach_the_end_of_padding() -> None:
    graph = body(Call(queries=8, keys=4096, width=64).forward())
    assert {config.rows % 32 for config in attention_configs(region(graph), arch_of(90))} == {0}
    assert offered(graph, 90).keys() == {"kernel", "library"}


def test_libraries_are_rivals() -> None:
    assert library(body(Call(batch=64, queries=49, keys=49, width=32).backward()), 90) == "slower"
    assert library(body(Call(batch=64, queries=197, keys=197, width=64).backward()), 90) == "faster"
    assert library(body(Call(batch=64, queries=49, keys=49, width=32).forward()), 90) == "slower"
