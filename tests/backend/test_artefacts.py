"""Stages of kernels as files: what is written where, and what takes the place of a stage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are built with Triton, which is not installed")

from tests.helpers.kernels import ADD
from torch_rtx.artefacts import Artefacts
from torch_rtx.errors import KernelError
from torch_rtx.lowering.kernels import toolchain
from torch_rtx.lowering.kernels.aot import Built, compile_kernels
from torch_rtx.targets import PTX, Target

SM80 = Target(80)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def compiled(dump: Path | None = None, override: Path | None = None, target: Target = SM80) -> Built:
    artefacts = Artefacts(dump and str(dump), override and str(override)).of(ADD.name, target)
    pair = ADD, target
    return compile_kernels([pair], artefacts={pair: artefacts})[pair]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_files_of_one_op_share_a_number(tmp_path: Path) -> None:
    all_ = Artefacts(str(tmp_path / "kernels"))
    for op in ("b", "a", "b"):
        all_.of(op).write("region", op)
        all_.of(op, SM80, "", "generic").write("py", op)
    all_.of("a.b").write("region", "")
    assert files_of(tmp_path / "kernels") == [
        *("000_b.region", "000_b.sm_80.generic.py"),
        *("001_a.b.region", "001_a.region", "001_a.sm_80.generic.py"),
    ]


def test_nothing_is_written_or_read_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = Artefacts().of("a", SM80)
    nothing.write("py", "text")
    assert nothing.read("py") is None
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("name", ["a.sm_80.py", "007_a.sm_80.py"])
def test_overrides_are_found_by_their_names(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    for other in ("b_a.sm_80.py", "a.sm_80.ptx", "a.sm_86.py", "a.sm_80.generic.py", "a-sm_80.py"):
        (tmp_path / other).write_text("other")
    artefacts = Artefacts(override=str(tmp_path)).of("a", SM80)
    assert artefacts.read("py") is None
    assert caplog.records == []
    (tmp_path / name).write_text("edited")
    assert artefacts.read("py") == "edited"
    assert caplog.messages == [f"the stage py of the kernel a.sm_80 is taken from {tmp_path / name}"]
    assert caplog.records[0].levelno == logging.WARNING


def test_overrides_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"an override of a can't be read: .*absent"):
        Artefacts(override=str(tmp_path / "absent")).of("a").read("py")
    (tmp_path / "a.py").write_bytes(b"\xff")
    artefacts = Artefacts(override=str(tmp_path)).of("a")
    with pytest.raises(KernelError, match="an override of a can't be read"):
        artefacts.read("py")
    (tmp_path / "1_a.py").write_text("")
    with pytest.raises(KernelError, match=r"both .*1_a.py and a.py override the stage py of a"):
        artefacts.read("py")


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_every_stage_is_written(tmp_path: Path) -> None:
    code = compiled(tmp_path).codes[0]
    cases = [f"000_add.sm_80{case}" for case in ("", ".generic")]
    assert files_of(tmp_path) == sorted(
        ["000_add.sm_80.py", *(f"{case}.{stage}" for case in cases for stage in ("ttir", "ptx", "sass"))]
    )
    assert (tmp_path / "000_add.sm_80.py").read_text() == ADD.source
    assert "tt.func public @add(" in (tmp_path / "000_add.sm_80.ttir").read_text()
    assert (tmp_path / "000_add.sm_80.ptx").read_bytes() == code.ptx
    assert "EXIT" in (tmp_path / "000_add.sm_80.sass").read_text()
    generic, aligned = ((tmp_path / f"{case}.ttir").read_text() for case in reversed(cases))
    assert generic != aligned


def test_stages_are_written_for_each_target_and_again(tmp_path: Path) -> None:
    """Also where another target has the same code, and where this process has compiled it before."""
    targets = [SM80, Target(86), PTX]
    for folder in (tmp_path / "first", tmp_path / "second"):
        files = {(ADD, target): Artefacts(str(folder)).of("add", target) for target in targets}
        compile_kernels(files, artefacts=files)
        assert {f"000_add.{target}.ptx" for target in targets} <= set(files_of(folder))
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_the_source_of_a_refused_kernel_is_written(tmp_path: Path) -> None:
    (tmp_path / "add.sm_80.py").write_text(ADD.source.replace("+", "@"))
    with pytest.raises(KernelError, match="Triton refuses the kernel add"):
        compiled(tmp_path / "dump", tmp_path)
    assert "@" in (tmp_path / "dump" / "000_add.sm_80.py").read_text()


def test_nothing_is_disassembled_without_a_disassembler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(name: str) -> None:
        raise RuntimeError(f"no nvdisasm in {name}")

    toolchain._disassembler.cache_clear()
    with caplog.at_level(logging.INFO), monkeypatch.context() as patch:
        patch.setattr(toolchain, "import_module", absent)
        assert toolchain.disassemble(b"") is toolchain.disassemble(b"") is None
    toolchain._disassembler.cache_clear()
    assert caplog.messages == ["kernels are not disassembled: Triton brings no nvdisasm: no nvdisasm in triton"]


# ---- overrides -------------------------------------------------------------------------------------------------------


def edit(folder: Path, stage: str, old: str, new: str) -> None:
    """Put the stage that `folder/dump` has into `folder`, with `new` in place of `old`."""
    text = (folder / "dump" / f"000_add.sm_80.{stage}").read_text()
    assert old in text
    (folder / f"add.sm_80.{stage}").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("stage", "old", "new", "cases"),
    [
        ("py", ") + tl.load", ") * tl.load", (True, True)),
        ("ttir", "arith.addf", "arith.mulf", (True, False)),
        ("ptx", "add.f32", "mul.f32", (True, False)),
    ],
)
def test_an_edited_stage_is_compiled(
    tmp_path: Path, stage: str, old: str, new: str, cases: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    before = compiled(tmp_path / "dump")
    edit(tmp_path, stage, old, new)
    after = compiled(tmp_path / "edited", tmp_path)
    for was, now, edited in zip(before.codes, after.codes, cases, strict=True):
        assert (b"mul.f32" in now.ptx, b"mul.f32" in was.ptx) == (edited, False)
        assert (now.cubin != was.cubin) == edited
        assert (now.entry, now.shared, now.num_warps) == (was.entry, was.shared, was.num_warps)
    assert (tmp_path / "edited" / "000_add.sm_80.ptx").read_bytes() == after.codes[0].ptx
    assert new in (tmp_path / "edited" / f"000_add.sm_80.{stage}").read_text()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert compiled().codes == before.codes  # what is kept in this process is not the edited code


def test_an_override_is_for_its_target_alone(tmp_path: Path) -> None:
    compiled(tmp_path / "dump")
    edit(tmp_path, "ptx", "add.f32", "mul.f32")
    files = {(ADD, target): Artefacts(None, str(tmp_path)).of("add", target) for target in (SM80, Target(86), PTX)}
    built = compile_kernels(files, artefacts=files)
    assert [b"mul.f32" in built[ADD, t].codes[0].ptx for t in (SM80, Target(86), PTX)] == [True, False, False]
