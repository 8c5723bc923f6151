"""The table of ONNX models: each peer measured and compared with onnxruntime, and what fails said in its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

from benchmarks import onnx_latency


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_RTX_ONNX_MODELS", str(tmp_path))  # an empty folder
    path = tmp_path / "rows.json"
    peers = "eager,rtx-exported,onnxruntime,rtx-kernels"
    args = ["--size", "small", "--peers", peers, "--dtypes", "float32", "--json", str(path)]
    rows = onnx_latency.main(["det", "bert_base:script", *args])
    assert json.loads(path.read_text()) == rows
    found = {row["peer"]: row for row in rows}
    assert [*found] == peers.split(",")
    for peer in ("eager", "rtx-exported", "onnxruntime"):
        assert found[peer]["error"] < 1e-5
        assert found[peer]["wall_ms"] > 0
    assert "CUDA" in found["rtx-kernels"]["why_not"]
    printed = capsys.readouterr().out
    assert "LookupError: no package rapidocr_onnxruntime" in printed
    assert printed.count("bert_base:script") == 4
