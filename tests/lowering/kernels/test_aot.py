"""Kernels ahead of time, without a GPU: every target, limits, determinism, and what goes wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

from tests.helpers.kernels import ADD, ADD_1000, ADD_BF16, HEAD, S16, SPILLING, S, matmul
from tests.paths import ROOT
from torch_rtx.errors import KernelError
from torch_rtx.ir import Sym, dim_expr
from torch_rtx.lowering.kernels import toolchain
from torch_rtx.lowering.kernels.aot import Built, _too_large, compile_kernels, multiple
from torch_rtx.lowering.kernels.kernel import Kernel
from torch_rtx.lowering.kernels.toolchain import Code, Job
from torch_rtx.lowering.kernels.turing import NoTensorCores, rewrite
from torch_rtx.targets import NEWEST, PORTABLE, PTX, Target

ALL = (Target(75), *PORTABLE)


def built(kernel: Kernel, sm: int, ptx: bool = False) -> Built:
    return compile_kernels([(kernel, Target(sm, ptx))])[kernel, Target(sm, ptx)]


def named(name: str, source: str) -> Kernel:
    """A kernel of two pointers with this body."""
    return Kernel(name, f"{HEAD}def {name}(x, out):\n{source}", ("f32", "f32"), (), (1, 1, 1))


# ---- what is built ---------------------------------------------------------------------------------------------------


def test_every_target() -> None:
    progress: list[tuple[int, int]] = []
    found = compile_kernels([(ADD, target) for target in ALL], progress=lambda *step: progress.append(step))
    assert list(found) == [(ADD, target) for target in ALL]
    for built in found.values():
        assert built.problem is None
        assert len(built.codes) == 2
        for code in built.codes:
            assert code.cubin[:4] == b"\x7fELF"
            assert (code.entry, code.num_warps, code.shared, code.spills) == ("add", 4, 0, 0)
            assert 8 <= code.registers <= 64
            # Pointers in order, the size, and two of scratch memory.
            parameters = [line.split()[1] for line in code.ptx.decode().splitlines() if line.startswith("\t.param ")]
            assert parameters == [".u64"] * 3 + [".u32"] + [".u64"] * 2
    # sm_75, 90 and 120 alone, and one for sm_80, 86 and 89, each aligned and generic; the last serves as PTX, too.
    assert progress == [(done, 8) for done in range(1, 9)]


def test_one_binary_for_a_generation() -> None:
    found = compile_kernels([(ADD, target) for target in PORTABLE])
    assert found[ADD, Target(80)] == found[ADD, Target(86)] == found[ADD, Target(89)] == found[ADD, PTX]
    assert found[ADD, Target(86)].codes[0].cubin != built(ADD, 86).codes[0].cubin  # alone it gets its own
    assert b".target sm_86" in built(ADD, 86).codes[0].ptx


def test_ptx_is_for_old_drivers() -> None:
    (aligned, _) = built(ADD, 80, ptx=True).codes
    assert b".version 8.0\n" in aligned.ptx
    assert b".target sm_80\n" in aligned.ptx
    assert b".loc" not in aligned.ptx


@pytest.mark.quick
def test_variants() -> None:
    aligned, generic = built(ADD, 80).codes
    assert b"ld.global.v4" in aligned.ptx
    assert b"ld.global.v4" not in generic.ptx
    assert len(built(ADD_1000, 80).codes) == 1  # no scalars: addresses are always aligned
    assert len(built(replace(ADD, scalars=(dim_expr("*", 32, S),)), 80).codes) == 1
    wide = built(replace(ADD, wide=True), 80).codes[0].ptx
    assert wide.count(b"\t.param .u64") == 6


@pytest.mark.quick
def test_multiples() -> None:
    t = Sym("t", multiple=8)
    dims = (S, t, 48, dim_expr("*", 2, t), dim_expr("+", dim_expr("*", 32, S), 16), dim_expr("//", t, 2), 0)
    assert [multiple(dim) for dim in dims] == [1, 8, 48, 16, 16, 1, 0]
    assert multiple(dim_expr("min", t, 12)) == 4


def test_tensor_cores() -> None:
    kernel = matmul(block=64, deep=32, size=S16)
    instructions = {75: b"m16n8k8.row.col.f32.f16", 80: b"m16n8k16.row.col.f32.f16", 90: b"wgmma", 120: b"m16n8k16"}
    found = compile_kernels([(kernel, Target(sm)) for sm in instructions])
    for sm, instruction in instructions.items():
        aligned = found[kernel, Target(sm)].codes[0]
        assert instruction in aligned.ptx, sm
        assert aligned.spills == 0
    assert b"cp.async" in found[kernel, Target(80)].codes[0].ptx
    assert b"cp.async" not in found[kernel, Target(75)].codes[0].ptx


def test_turing_has_no_products_of_single_precision() -> None:
    found = built(matmul(block=64, stages=2, dtype="f32", size=S16), 75)
    assert found.codes == ()
    assert "sm_75 has no instruction like mma.sync.aligned." in (found.problem or "")


def test_turing_rewrite_keeps_operands_apart() -> None:
    whole = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %d0, %d1, %d2, %d3 }, { %a0, %a1, %a2, %a3 }, "
    text = rewrite(whole + "{ %b0, %b1 }, { %d0, %d1, %d2, %d3 };")
    half = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    assert text == (
        "{ .reg .b32 %half<4>;\n"
        f"\t{half} {{%half0, %half1, %half2, %half3}}, {{%a0, %a1}}, {{%b0}}, {{ %d0, %d1, %d2, %d3 }};\n"
        f"\t{half} {{ %d0, %d1, %d2, %d3 }}, {{%a2, %a3}}, {{%b1}}, {{%half0, %half1, %half2, %half3}}; }}"
    )
    whole_int = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %d0, %d1, %d2, %d3 }, "
    text = rewrite(whole_int + "{ %a0, %a1, %a2, %a3 }, { %b0, %b1 }, { %c0, %c1, %c2, %c3 };")
    quarter = "mma.sync.aligned.m8n8k16.row.col.satfinite.s32.s8.s8.s32"
    assert text == (
        "{ .reg .b32 %quarter<4>;\n"
        f"\t{quarter} {{%quarter0, %quarter1}}, {{%a0}}, {{%b0}}, {{%c0, %c1}};\n"
        f"\t{quarter} {{%quarter2, %quarter3}}, {{%a1}}, {{%b0}}, {{%c2, %c3}};\n"
        f"\t{quarter} {{%quarter0, %quarter1}}, {{%a2}}, {{%b1}}, {{%quarter0, %quarter1}};\n"
        f"\t{quarter} {{%quarter2, %quarter3}}, {{%a3}}, {{%b1}}, {{%quarter2, %quarter3}};\n"
        "\tmov.b32 %d0, %quarter0;\n\tmov.b32 %d1, %quarter1;\n\tmov.b32 %d2, %quarter2;\n\tmov.b32 %d3, %quarter3;\n}"
    )
    with pytest.raises(NoTensorCores, match="bf16"):
        rewrite(whole.replace("f16.f16", "bf16.bf16") + "{ %b0, %b1 }, { %d0, %d1, %d2, %d3 };")


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_shared_memory() -> None:
    kernel = matmul(stages=5, size=S16)
    found = compile_kernels([(kernel, Target(sm)) for sm in (75, 80, 86, 90, 120)] + [(kernel, PTX)])
    problems = {str(target): built.problem for (_, target), built in found.items()}
    assert problems["sm_75"] is None  # there is no pipelining
    assert problems["sm_80"] is None
    assert problems["sm_90"] is None
    for name in ("sm_86", "sm_120", "compute_80"):
        assert problems[name] == f"a block needs 131072 bytes of shared memory, {name} has 101376"
    assert found[kernel, Target(86)].codes == ()


def test_spills() -> None:
    found = built(SPILLING, 80)
    assert found.spills > 128
    assert found.problem == f"each thread spills {found.spills} bytes"
    assert found.codes[0].stack > 0


def test_registers() -> None:
    code = Code(b"", b"", "k", 16, 0, 128, 0, 0)
    assert _too_large(code, Target(80)) is None
    assert _too_large(replace(code, registers=129), Target(80)) == "a block needs 69632 registers, sm_80 has 65536"
    large = "a block needs 513 columns of tensor memory, sm_100 has 512"
    assert _too_large(replace(code, tensor_memory=513), Target(100)) == large


def test_dtypes_that_a_target_lacks() -> None:
    found = compile_kernels([(ADD_BF16, Target(75)), (ADD_BF16, Target(80))])
    assert found[ADD_BF16, Target(75)] == Built(None, None, "sm_75 lacks bf16")
    assert found[ADD_BF16, Target(80)].problem is None
    fp8 = replace(ADD, source=ADD.source.replace("tl.load(y + at, mask)", "tl.load(y + at, mask).to(tl.float32)"))
    fp8 = replace(fp8, pointers=("f32", "f8e4m3fn", "f32"))
    found = compile_kernels([(fp8, Target(sm)) for sm in (86, 89)])
    assert found[fp8, Target(86)].problem == "sm_86 lacks f8e4m3fn"
    assert b".target sm_89" in found[fp8, Target(89)].codes[0].ptx


# ---- determinism -----------------------------------------------------------------------------------------------------

DIGESTS = """
import hashlib
from tests.helpers.kernels import ADD, matmul
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.targets import PORTABLE, Target
kernels = (ADD, matmul(block=64, deep=32, stages=2))
found = compile_kernels([(k, t) for k in kernels for t in (Target(75), *PORTABLE)])
for built in found.values():
    for code in built.codes:
        print(hashlib.sha256(code.cubin + code.ptx).hexdigest())
"""


def test_equal_sources_are_equal_bytes(tmp_path: Path) -> None:
    kernels = (ADD, matmul(block=64, deep=32, stages=2))
    found = compile_kernels([(k, t) for k in kernels for t in ALL])
    here = [hashlib.sha256(c.cubin + c.ptx).hexdigest() for b in found.values() for c in b.codes]
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", DIGESTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == here
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernel", [ADD, matmul(block=64, deep=32, stages=2)], ids=["add", "matmul"])
def test_ttir_is_that_of_all_options(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is made once: also where Triton checks integers, as it does by default."""
    scalars = (True,) * len(kernel.scalars)
    job = Job(kernel.name, kernel.source, kernel.pointers, scalars, kernel.wide, 4, 2, 80)
    other = replace(job, num_warps=8, num_stages=4, sm=90, trigger_early=True, portable=True)
    text = toolchain.lower_to_ttir(job)
    assert toolchain.lower_to_ttir(other) is text
    backend = toolchain._triton().backend
    parse = backend.parse_options
    monkeypatch.setattr(backend, "parse_options", lambda self, given: parse(self, {**given, "sanitize_overflow": True}))
    assert toolchain._ttir.__wrapped__(other) == text


def test_without_torch_and_traces() -> None:
    """Neither torch nor Triton's driver is loaded, and the environment and Triton's knobs are as before."""
    code = """
import os, sys
before = dict(os.environ)
from tests.helpers.kernels import ADD
from torch_rtx.lowering.kernels.aot import compile_kernels
from torch_rtx.targets import Target
compile_kernels([(ADD, Target(80))])
assert "torch" not in sys.modules
from triton import knobs
from triton.runtime import driver
assert dict(os.environ) == before
assert "disable_line_info" not in vars(knobs.compilation)
assert driver._active is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_knobs_of_the_user_come_back() -> None:
    from triton import knobs

    vars(knobs.compilation)["disable_line_info"] = False
    try:
        kernel = replace(ADD, source=ADD.source + "# knobs\n")
        assert b".loc" not in built(kernel, 80).codes[0].ptx
        assert vars(knobs.compilation)["disable_line_info"] is False
    finally:
        del vars(knobs.compilation)["disable_line_info"]


@pytest.mark.parametrize(
    ("version", "sm", "expected"), [("12.8", 80, 80), ("12.8", 90, NEWEST), ("12.9", 90, 90), ("13.0", 90, 90)]
)
def test_hopper_gets_a_ptxas_that_is_right(version: str, sm: int, expected: int) -> None:
    """Triton's own, unless it is too old: PTX is written for the one that Triton was told to use."""
    tools = {80: version, 90: version, NEWEST: "12.9"}
    triton: Any = SimpleNamespace(get_ptxas=lambda sm: SimpleNamespace(version=tools[sm], sm=sm))
    assert toolchain._assembler(triton, sm).sm == expected


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_ptxas_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    asm = 'tl.inline_asm_elementwise("bogus.u32 $0, $1;", "=f,f", [value], tl.float32, True, 1)'
    kernel = named("wrong", f"    value = tl.load(x + tl.arange(0, 32))\n    tl.store(out + tl.arange(0, 32), {asm})\n")
    with pytest.raises(KernelError, match=r"(?s)ptxas refuses the kernel wrong for sm_90: .*bogus.*targets") as caught:
        built(kernel, 90)
    assert len(str(caught.value).splitlines()) <= 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("message", "kernel"),
    [
        ("unknown_name", named("a", "    tl.store(out, unknown_name)\n")),
        ("SyntaxError", named("b", "    tl.store(out,\n")),
        ("defines no JIT function c", replace(ADD, name="c")),
        (r"parameters x, y, out, n are not the 3", replace(ADD, scalars=())),
        ("no pointers to c64", replace(ADD, pointers=("c64",) * 3)),
    ],
    ids=["name", "syntax", "function", "parameters", "dtype"],
)
def test_triton_refuses(message: str, kernel: Kernel) -> None:
    with pytest.raises(KernelError, match=f"(?s)Triton refuses the kernel {kernel.name} for sm_80: .*{message}"):
        built(kernel, 80)


@pytest.fixture
def fresh_toolchain() -> Iterator[None]:
    toolchain._triton.cache_clear()
    toolchain.lower.cache_clear()
    yield
    toolchain._triton.cache_clear()
    toolchain.lower.cache_clear()


@pytest.mark.usefixtures("fresh_toolchain")
def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelError, match=r"(?s)built with Triton, which can't be imported.*extra `build`"):
        built(ADD, 80)


@pytest.mark.usefixtures("fresh_toolchain")
def test_triton_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.5.1")
        with pytest.raises(KernelError, match=r"(?s)triton 3.5.1 is too old.*install triton 3.6"):
            built(ADD, 80)
    monkeypatch.setattr(triton, "__version__", "9.0")
    monkeypatch.delattr(CUDABackend, "make_llir")
    with pytest.raises(KernelError, match=r"(?s)triton 9.0 has other stages.*make_llir.*install triton 3.6"):
        built(ADD, 80)


def test_parsing_that_fails_for_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython's parser may fail where several threads parse; the second try counts."""
    from triton.compiler import ASTSource

    toolchain.forget()
    failed: list[int] = []
    make_ir = ASTSource.make_ir

    def sometimes(self: Any, *args: Any) -> Any:
        if len(failed) < limit:
            failed.append(1)
            raise SystemError("AST constructor recursion depth mismatch")
        return make_ir(self, *args)

    monkeypatch.setattr(ASTSource, "make_ir", sometimes)
    limit = 1
    assert compile_kernels([(ADD_1000, Target(80))])[ADD_1000, Target(80)].aligned is not None
    assert len(failed) == 1
    toolchain.forget()
    limit = 3
    with pytest.raises(KernelError, match="recursion depth mismatch"):
        compile_kernels([(ADD_1000, Target(80))])
    toolchain.forget()
