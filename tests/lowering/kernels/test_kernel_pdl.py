"""Kernels that wait by themselves: where the instructions stand in PTX, and that ptxas takes them."""

from __future__ import annotations

import re

import pytest

from torch_rtx.irparse import parse
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.generate import generate
from torch_rtx.lowering.kernels.pdl import TRIGGER, WAIT, insert_pdl
from torch_rtx.targets import Target, arch_of

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

HEAD, TAIL = "graph import {\n", "}\n"
BODIES = {
    "loop": """  input x: f16[64, 100]
  y: f16[64, 100] = op aten.exp.default(self=x)
  return [y]
""",
    "long rows": """  input x: f16[64, 20000]
  y: f16[64, 20000] = op aten.softmax.int(self=x, dim=-1)
  return [y]
""",
    "product": """  input x: f16[200, 768]
  input w: f16[768, 768]
  y: f16[200, 768] = op aten.linear.default(input=x, weight=w)
  return [y]
""",
    "few rows": """  input x: f16[1, 768]
  input w: f16[768, 768]
  y: f16[1, 768] = op aten.linear.default(input=x, weight=w)
  return [y]
""",
    "convolution": """  input x: f16[2, 8, 17, 17](2312, 1, 136, 8)
  input w: f16[16, 8, 3, 3](72, 1, 24, 8)
  y: f16[2, 16, 15, 15](3600, 1, 240, 16) = op aten.conv2d.default(input=x, weight=w)
  return [y]
""",
    "attention": """  input q: f16[2, 4, 100, 64]
  y: f16[2, 4, 100, 64] = op aten.scaled_dot_product_attention.default(query=q, key=q, value=q, is_causal=True)
  return [y]
""",
}


def instructions(name: str, sm: int) -> tuple[list[str], bool, bool]:
    """Those of a kernel in PTX, whether it is known to wait, and whether it lets the next one start at once."""
    kernel = generate(parse(HEAD + BODIES[name] + TAIL), "k", arch_of(sm), 0)
    assert kernel is not None
    code = compile_kernels([(kernel, Target(sm))])[kernel, Target(sm)].aligned
    assert code is not None
    text = code.ptx.decode()
    lines = [line.strip() for line in text[text.index("{\n") :].splitlines()]
    return (
        [line for line in lines if line and not line.startswith(("//", ".", "{"))],
        code.uses_pdl,
        kernel.trigger_early,
    )


@pytest.mark.parametrize("sm", [90, 120])
@pytest.mark.parametrize("name", BODIES)
def test_kernels_wait_before_they_touch_memory(name: str, sm: int) -> None:
    lines, waits, early = instructions(name, sm)
    assert waits
    assert early == (name == "few rows" and sm == 90)  # on sm_120 it has a tile like any other
    assert lines.count(WAIT) == lines.count(TRIGGER) == 1
    before = lines[: lines.index(WAIT)]
    allowed = re.compile(
        r"(ld\.param|mov|shl|shr|and|or|xor|add|sub|mul|mad|div|rem|bfe|bfi|prmt|cvt|cvta|setp|selp)\b"
    )
    assert all(allowed.match(line) or line == TRIGGER for line in before), before
    assert any("%ctaid" in line for line in before)  # addresses are computed meanwhile
    store = next(place for place, line in enumerate(lines) if "st.global" in line)
    if early:
        assert lines.index(TRIGGER) < lines.index(WAIT)
    else:
        assert lines.index(WAIT) < lines.index(TRIGGER) < store
        assert store - lines.index(TRIGGER) <= 2


def test_older_targets_have_no_such_instruction() -> None:
    for sm in (80, 89):
        lines, waits, _ = instructions("loop", sm)
        assert not waits
        assert not any("griddepcontrol" in line for line in lines)


BEGINNING = ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)\n{\n\t.reg .b32 \t%r<9>;\n\n"


@pytest.mark.parametrize(
    "line",
    [
        "ld.global.b32 \t%r1, [%rd1];",
        "@%p1 ld.global.b32 \t%r1, [%rd1];",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;",
        "ld.volatile.global.b32 \t%r1, [%rd1];",
        "ld.b32 \t%r1, [%rd1];",
        "atom.global.add.u32 \t%r1, [%rd1], 1;",
        "@%p1 bra \t$L__BB0_2;",
        "brx.idx \t%r1, $L_brx_0;",
        "$L__BB0_1:",
        "{ .reg .b32 %r2; ld.global.b32 %r2, [%rd1]; }",
        "mov.b32 \t%r1, 0; ld.global.b32 %r1, [%rd1];",
        "{",
        "shfl.sync.idx.b32 \t%r1, %r1, 0, 31, -1;",
        "call.uni \t(retval0), read, (param0);",
        "ret;",
    ],
)
def test_what_ends_the_beginning(line: str) -> None:
    begin = BEGINNING + "\tld.param.b64 \t%rd1, [k_param_0];\n\tmov.u32 \t%r1, %tid.x;\n"
    assert insert_pdl(f"{begin}\t{line}\n\tret;\n}}\n", False) == f"{begin}\t{WAIT}\n\t{line}\n\tret;\n}}\n"


def test_functions_before_a_kernel() -> None:
    function = ".func (.param .b32 out) read()\n{\n\t.reg .b32 \t%r<2>;\n\tld.global.b32 \t%r1, [x];\n\tret;\n}\n"
    assert insert_pdl(f"{function}{BEGINNING}\tret;\n}}\n", False) == f"{function}{BEGINNING}\t{WAIT}\n\tret;\n}}\n"


def test_kernels_without_results_wait_too() -> None:
    assert insert_pdl(BEGINNING + "\tret;\n}\n", False) == f"{BEGINNING}\t{WAIT}\n\tret;\n}}\n"
