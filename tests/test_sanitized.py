"""What runs below compute-sanitizer, without it and without a GPU: small models, each compared with eager."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.suites.common import WrongResult
from tests import sanitized
from torch_rtx.backend import entry


def test_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of run, except that nobody trains a decode step."""
    monkeypatch.setattr(sanitized, "TACTICS", ("kernel",))
    sanitized.main(["bert_base"], "cpu")
    sanitized.main(["--only", "training", "gpt2_decode"], "cpu")
    called, stepped = capsys.readouterr().out.splitlines()
    assert called.startswith("bert_base kernel: 0 kernels, ")
    assert stepped == "bert_base kernel, training: 0 kernels, gradients are right"


def test_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that is off ends the run."""

    def wrong(graph: torch.fx.GraphModule, inputs: object, **options: object) -> object:
        def call(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(1.5 * result for result in graph(*args))

        return call

    assert sanitized.rtx is entry.rtx
    monkeypatch.setattr(sanitized, "rtx", wrong)
    with pytest.raises(WrongResult, match="wrong gradients: error 5.00e-01"):
        sanitized.main(["--only", "training", "bert_base"], "cpu")
    torch._dynamo.reset()
