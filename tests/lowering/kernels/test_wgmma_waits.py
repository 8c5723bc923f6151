"""Products of Hopper from registers: nothing writes a register that a product in flight still reads."""

from __future__ import annotations

import re

import pytest

from tests.lowering.kernels.kernel_bodies import body
from tests.lowering.kernels.test_gpu_packed import CASES, case_text
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.lowering.kernels.families.gemm import gemm_kernel
from torch_rtx.lowering.kernels.region import region
from torch_rtx.lowering.kernels.toolchain import disassemble
from torch_rtx.lowering.kernels.wgmma_waits import wait_for_registers
from torch_rtx.targets import Target

MMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r90,%r91}}, {{{}}}, %rd1, %p1, 1, 1, 0;"
FIRST, SECOND = MMA.format("%r1,%r2"), MMA.format("%r3,%r4")
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {};"
ONE, NONE = WAIT.format(1), WAIT.format(0)
TRITON = ["$L__BB0_1:", "add.f32 %r1, %f1, %f2;", "ld.shared.v2.b32 {%r3, %r4}, [%r7];", FIRST, COMMIT, ONE, SECOND]
TRITON += [COMMIT, ONE, "@%p7 bra \t$L__BB0_1;", NONE]


def waited(lines: list[str]) -> list[str]:
    """The lines as they are after the pass."""
    return [line.strip() for line in wait_for_registers("\n".join([*lines, ""])).splitlines()]


def test_a_group_of_the_iteration_before_is_waited_for() -> None:
    load = TRITON.index("ld.shared.v2.b32 {%r3, %r4}, [%r7];")
    assert waited(TRITON) == [*TRITON[:load], NONE, *TRITON[load:]]


def test_copies_are_one_register() -> None:
    """Also one that is made after a wait: ptxas gives both the same register."""
    lines = ["$L__BB0_1:", "cvt.u32.u16 %r13, %rs1;", FIRST, COMMIT, ONE, "mov.b32 %r3, %r13;", SECOND, COMMIT, ONE]
    lines.append("@%p7 bra \t$L__BB0_1;")
    assert waited(lines) == [lines[0], NONE, *lines[1:]]


def test_newer_groups_stay_in_flight() -> None:
    lines = [FIRST, COMMIT, SECOND, COMMIT, "mov.b32 %r2, 0;", "@%p1 mov.b32 %r4, 0;", NONE]
    assert waited(lines) == [*lines[:4], ONE, lines[4], NONE, *lines[5:]]


def test_groups_of_paths_that_meet_are_both_in_flight() -> None:
    lines = [FIRST, COMMIT, "@%p1 bra $L__BB0_2;", NONE, "$L__BB0_2:", "{ .reg .b32 l0;", "cvt.u32.u16 %r1, %rs1;", "}"]
    assert waited(lines) == [*lines[:6], NONE, *lines[6:]]


@pytest.mark.parametrize(
    "lines",
    [
        [line.replace("%r3", "%r5").replace("%r4", "%r6") if "ld." in line else line for line in TRITON],
        [FIRST, COMMIT, "st.shared.v2.b32 [%r1], {%r1, %r2};", "add.f32 %r5, %r1, %r2;", NONE, "mov.b32 %r1, 0;"],
        ["wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1}, %rd2, %rd1, %p1, 1, 1, 0, 0, 1;", "mov.b32 %r1, 0;"],
    ],
    ids=["other registers", "reads", "from shared memory"],
)
def test_other_kernels_stay(lines: list[str]) -> None:
    assert waited(lines) == lines


def overwritten(sass: str) -> list[str]:
    """Instructions that write a register which an HGMMA in flight reads; in the order of the text, each loop twice."""
    lines, found = sass.splitlines(), dict[str, None]()
    labels = {match[1]: at for at, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line))}
    loops = (
        (labels[match[1]], at) for at, line in enumerate(lines) if (match := re.search(r"BRA `\((\.L_\w+)\)", line))
    )
    for start, end in [(0, len(lines)), *((start, end) for start, end in loops if start < end)]:
        groups: list[set[int]] = []
        reads: set[int] = set()
        for line in lines[start:end] * 2:
            match = re.search(r"\*/\s+(?:@!?U?P\d\s+)?([\w.]+) (?:R(\d+), )?(?:R(\d+))?", line)
            if match is None:
                continue
            opcode, to, first = match[1], match[2], match[3]
            if opcode.startswith("HGMMA"):
                reads |= set(range(int(first), int(first) + 4)) if first is not None else set()
                if "gsb0" in line:
                    groups, reads = [*groups, reads], set()
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(line.split("gsb0, ")[1].split()[0], 16)
                groups = groups[len(groups) - left :] if left < len(groups) else groups
            elif to is not None and not opcode.startswith(("ST", "RED")):
                width = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
                if set(range(int(to), int(to) + width)) & set().union(reads, *groups):
                    found[line.strip()] = None
    return list(found)


@pytest.mark.parametrize("case", ["many rows of bytes", "stacked bytes"])
def test_no_register_in_flight_is_written(case: str) -> None:
    text, config = CASES[case]
    kernel = gemm_kernel(region(body(case_text(text, "bf16"), "bf16")), "k", config)
    target = Target(90)
    (code,) = compile_kernels([(kernel, target)])[kernel, target].codes
    sass = disassemble(code.cubin)
    if sass is None:
        pytest.skip("Triton ships no nvdisasm")
    assert re.search(r"HGMMA\S* R\d+, R\d+, gdesc", sass)  # from registers
    assert not overwritten(sass)
