"""Where the command line begins: what it needs, and command lines of trtexec."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_sources import FACTORIES
from torch_rtx.cli.entry import main


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_what_is_not_installed(package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from torch_rtx.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: the command line needs {package}, which is not installed\n  pip install 'torch_rtx[cli]'\n"
    )


def test_the_end_looks_for_no_garbage() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_count()[0], gc.get_freeze_count()))"
    code += "; from torch_rtx.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=60)
    _, counts = done.stdout.splitlines()
    young, frozen = map(int, counts.split())
    assert young < 100 < frozen


def ended(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    """The exit status of a command line."""
    monkeypatch.setattr(sys, "argv", ["torch-rtx", *given])
    try:
        main()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    return 0


def test_without_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of trtexec's builds and measures, says what it is here, and stops at the first error."""
    onnx = pytest.importorskip("onnx")
    from tests.onnx.models import linear

    monkeypatch.chdir(tmp_path)
    onnx.save(linear(), tmp_path / "m.onnx")
    quick = ("--iterations=3", "--duration=0", "--warmUp=0", "--device=cpu")
    assert ended(monkeypatch, "--onnx=m.onnx", "--saveEngine=m.rtx", "--shapes=x:2x3x4", *quick) == 0
    out, err = capsys.readouterr()
    assert "torch-rtx build m.onnx --out m.rtx --opt-shapes x:2x3x4 --no-strip\n" in err
    assert re.search(r"^wrote m.rtx\ndevice: CPU.*\nthroughput: ", out)
    assert ended(monkeypatch, "--loadEngine=m.rtx", "--shapes=x:2x3x4", "--exportOutput=y.npz") == 0
    assert (tmp_path / "y.npz").exists()
    assert ended(monkeypatch, "--onnx=none.onnx", "--saveEngine=n.rtx", *quick) == 1
    assert ended(monkeypatch, "--onnx=m.onnx", "--saveEngine=m.rtx", "--fp16") == 2
    assert "--fp16 has no equivalent here" in capsys.readouterr().err


def test_flags_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "of_trtexec.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ended(monkeypatch, "build", "of_trtexec:plain", "--saveEngine=a.rtx", "--cpuOnly", "--device", "cpu") == 0
    assert (tmp_path / "a.rtx").exists()
    assert "--cpuOnly: no build needs a GPU\n" in capsys.readouterr().err
    assert ended(monkeypatch, "inspect", "a.rtx", "--saveEngine=a.rtx") == 2
