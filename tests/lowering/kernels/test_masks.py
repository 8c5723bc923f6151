"""Masks in PTX: which `and` and `or`, or `xor`, become one instruction, and that it is the same function."""

from __future__ import annotations

import re

import pytest

from torch_rtx.lowering.kernels.masks import LEAST, fold_masks

HEAD = ".visible .entry k(\n\t.param .u64 k_0\n)\n.reqntid 64\n{\n\t.reg .b32 \t%r<90>;\n\n// %bb.0:\n"
PAIR = "\tshr.u32 \t%r9, %r1, 4;\n\tand.b32 \t{0}, %r9, 983055;\n\tor.b32 \t{1}, {0}, 1124090624;\n\tuse.b32 \t{1};\n"


def ptx(pair: str = PAIR, count: int = LEAST) -> str:
    return HEAD + "".join(pair.format(f"%r{20 + index}", f"%r{50 + index}") for index in range(count)) + "\tret;\n}\n"


def run(text: str, value: int) -> list[int]:
    """What `use` gets, where %r1 is `value`."""
    registers, found = {"%r1": value, "%ctaid.z": 0}, []
    for op, args in re.findall(r"^\t([a-z0-9.]+) \t?([^;]*);", text, re.MULTILINE):
        if op.startswith((".", "ret")):
            continue
        result, *rest = args.split(", ")
        given = [registers[one] if one.startswith("%") else int(one) for one in rest]
        match op.split(".")[0], given:
            case "mov", (one,):
                registers[result] = one
            case "add", (one, two):
                registers[result] = one + two
            case "shr", (one, two):
                registers[result] = one >> two
            case "and", (one, two):
                registers[result] = one & two
            case "or", (one, two):
                registers[result] = one | two
            case "xor", (one, two):
                registers[result] = one ^ two
            case "lop3", (*three, table):
                bits = range(32)
                index = [sum((one >> bit & 1) << (2 - at) for at, one in enumerate(three)) for bit in bits]
                registers[result] = sum((table >> index[bit] & 1) << bit for bit in bits)
            case "use", ():
                found.append(registers[result])
    return found


@pytest.mark.parametrize("op", ["or", "xor"])
def test_masks_with_many_uses(op: str) -> None:
    text = ptx(PAIR.replace("\tor", f"\t{op}").replace("1124090624", "1132479361"))
    found = fold_masks(text)
    assert found.count("lop3.b32") == LEAST
    assert "and.b32" not in found
    assert [run(found, value) for value in (0x12345678, 0xFEDCBA98)] == [
        run(text, value) for value in (0x12345678, 0xFEDCBA98)
    ]


@pytest.mark.parametrize(
    ("pair", "count"),
    [
        (PAIR, LEAST - 1),
        (PAIR + "\tuse.b32 \t{0};\n", LEAST),  # what is masked is read elsewhere, too
        (PAIR.replace("\tor", "\tmov.u32 \t%r9, 0;\n\tor"), LEAST),  # what is masked has another value by then
        (PAIR.replace("\tor", "@!%p1 mov.u32 %r9, 0;\n\tor"), LEAST),
        (PAIR.replace("\tor", "\tmov.b64 \t{{%r8, %r9}}, %rd1;\n\tor"), LEAST),
        (PAIR.replace("\tor", "$L__BB0_{0}:\n\tor"), LEAST),
        (PAIR + "\tmov.u32 \t%r3, %ctaid.z;\n", LEAST),  # grids of three dimensions
        ("\tshr.u32 \t%r9, %r1, 4;\n\tor.b32 \t{1}, %r9, 1124090624;\n", LEAST),
    ],
)
def test_others_stay(pair: str, count: int) -> None:
    assert fold_masks(ptx(pair, count)) == ptx(pair, count)
